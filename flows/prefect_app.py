"""Prefect's server for programs and pages of this machine alone: `uvicorn --factory flows.prefect_app:create`.

A browser sends what any page asks for to a loopback address too, and the name of such a page's own server can come to mean
this machine (DNS rebinding). So a request must call the server by a name of this machine, and one that comes from a page,
which its Origin tells, from a page of this server. Programs send no Origin.
"""

from typing import Any

from fastapi import FastAPI
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from flows.command import NAMES


class OwnPages:
    """Refuses requests and websockets whose Origin is none of `origins`."""

    def __init__(self, app: Any, origins: list[str]) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand on what may come in."""
        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        refused = origin is not None and origin not in self.origins
        await (PlainTextResponse("pages of elsewhere are refused", 403) if refused else self.app)(scope, receive, send)


def create() -> FastAPI:
    """Prefect's app behind both checks; the origins are those of PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS."""
    app = create_app()
    app.add_middleware(OwnPages, origins=get_current_settings().server.api.cors_allowed_origins.split(","))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)
    return app
