"""Make the flow startable and schedulable from Prefect's UI: `python -m flows.serve`, for as long as it runs."""

import sys

from flows.command import serve_options, use_running_server

if __name__ == "__main__":
    OPTIONS = serve_options()
    if not use_running_server():
        sys.exit("No Prefect server at http://127.0.0.1:4200: start `make ui` in another terminal, or set PREFECT_API_URL.")

from flows.align import align


def main(cron: str | None) -> None:
    """Serve one flow run at a time: two would wait for each other's stages."""
    align.serve(name="align", cron=cron, limit=1, description="demonstrations to aligned, evaluated, registered models")


if __name__ == "__main__":
    main(OPTIONS.cron)
