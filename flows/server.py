"""Servers as child processes, and a Prefect server for one run where none runs already.

Prefect would start a temporary one by itself, but leave it behind when the run is killed, and stop it with the same Ctrl-C as
the run, which could then not tell it its end.
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack

from flows import ROOT
from flows.command import HOST, NAMES, answers
from tasks import process
from tasks.store import alone, masked

PATIENCE = 180.0  # seconds for a server to answer


class ServerError(RuntimeError):
    """A server does not start, or ended; the message says what to do, or ends with the server's last lines."""


class Server:
    """One server as a child process that ends with this one; its output is kept for the case that it fails."""

    page = ""  # what of it to open first

    def __init__(self, name: str, address: str, health: str, command: list[str], env: dict[str, str]) -> None:
        self.name, self.address, self.health, self.command, self.env = name, address, f"{address}{health}", command, env
        self.lines: deque[str] = deque(maxlen=20)
        self.child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it; `wait_until_it_answers` tells when it serves."""
        self.child = process.start([sys.executable, "-m", *self.command], ROOT, {**os.environ, **self.env})
        threading.Thread(target=self.lines.extend, args=[self.child.stdout], daemon=True).start()

    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self.child is not None and self.child.poll() is None

    def wait_until_it_answers(self) -> None:
        """Return when it serves; raise with its last lines when it ends instead, or takes too long."""
        until = time.monotonic() + PATIENCE
        while not answers(self.health):
            if not self.runs() or time.monotonic() > until:
                raise ServerError(masked(f"{self.name}'s server did not start:\n" + "".join(self.lines)))
            time.sleep(0.3)

    def stop(self) -> None:
        """End it and all its processes."""
        if self.child is not None:
            self.child.stdin.close()
            self.child.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def prefect_server(port: int, **own: str) -> Server:
    """Prefect's server on a port, for this machine's programs and its own pages; `own` is added to its environment."""
    address = f"http://{HOST}:{port}"
    command = ["uvicorn", "--factory", "flows.prefect_app:create", "--host", HOST, "--port", str(port), "--log-level", "error"]
    own["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] = ",".join(f"http://{name}:{port}" for name in NAMES)
    return Server("Prefect", address, "/api/health", command, {"PREFECT__SERVER_FINAL": "1", **own})


def temporary_server() -> Server:
    """Prefect's API alone, with the services that Prefect gives its own temporary server."""
    return prefect_server(free_port(), PREFECT_UI_ENABLED="0", PREFECT__SERVER_EPHEMERAL="1")


def ensure_server() -> None:
    """Let Prefect talk to the server that its settings name; when they name none, to one that ends with this process."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        return
    server, settings = temporary_server(), ExitStack()
    settings.callback(server.stop)
    atexit.register(settings.close)  # not earlier: Prefect tells it the last things at the very end
    print("starting a Prefect server for this run; `make ui` keeps one, with pages", file=sys.stderr, flush=True)
    with alone("prefect"):  # two that first make its database together would race in the migration
        server.start()
        server.wait_until_it_answers()
    settings.enter_context(temporary_settings({PREFECT_API_URL: f"{server.address}/api"}))
    logging.getLogger("prefect.flow_runs").addFilter(_is_no_link)


def _is_no_link(record: logging.LogRecord) -> bool:
    """Prefect gives the address of the run's page, which this server does not have."""
    return not record.getMessage().startswith("View at ")
