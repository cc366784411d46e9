"""What comes before Prefect: command lines, and finding a Prefect server that runs already. Standard library only."""

import argparse
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]  # by which a server of ours may be called
API = f"http://{HOST}:4200/api"  # where `make ui` starts it
STOPPED = {signal.SIGINT: "stopped by Ctrl-C", signal.SIGTERM: "stopped by SIGTERM"}  # what Prefect shows of it


class Terminated(SystemExit):
    """SIGTERM came."""


def align_options() -> argparse.Namespace:
    """Options of `python -m flows.align`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.align",
        description="Bring every DVC stage of the main line up to date, as a Prefect flow: demonstrations in, aligned, "
        "evaluated and registered models out. Stages whose inputs did not change are skipped.",
        epilog="Settings: params.yaml. `make ui` in another terminal shows the flow live. Without Prefect: `dvc repro`.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--methods", action="store_true", help="every further method too (methods/dvc.yaml)")
    which.add_argument(
        "--only", nargs="+", default=[], metavar="STAGE", help="just these stages; what they need is taken as it is"
    )
    parser.add_argument("--force", action="store_true", help="run stages also when nothing changed")
    return parser.parse_args()


def study_options() -> argparse.Namespace:
    """Options of `python -m flows.study`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.study",
        description="Run every run of study/claims.yaml with every seed, as DVC experiments beside the workspace, and write "
        "study/figures.json, claims.json, claims.md, the plots and the table in README.md. What stands is not run again.",
        epilog="Logs: .telemetry/study/. `dvc exp show -A` lists the experiments, `dvc exp apply study-main-1` takes one over.",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 1 to N (5; with --report-only all there are)")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN", help="only these runs of claims.yaml; the record of others stays"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (as many as a flow runs torch stages)")
    parser.add_argument("--report-only", action="store_true", help="run nothing: publish from study/figures.json again")
    return parser.parse_args()


def serve_options() -> argparse.Namespace:
    """Options of `python -m flows.serve`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve",
        description="Make the flow startable and schedulable from Prefect's UI, for as long as this process runs. "
        "Start `make ui` first.",
        epilog="With a worker instead: `prefect deploy --all` reads prefect.yaml.",
    )
    parser.add_argument("--cron", metavar="EXPRESSION", help="also run by the clock, e.g. '0 3 * * *': at three each night")
    return parser.parse_args()


def ui_options() -> argparse.Namespace:
    """Options of `python -m flows.ui`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.ui",
        description="Start the Prefect and MLflow servers on this machine's loopback address. Ctrl-C stops both.",
    )
    parser.add_argument("--prefect-port", type=int, default=4200, metavar="PORT", help="default: 4200")
    parser.add_argument("--mlflow-port", type=int, default=5000, metavar="PORT", help="default: 5000")
    return parser.parse_args()


def exit_code(run: Callable[[], Any], *wrong: type[Exception]) -> int:
    """Run a flow to its final state and say in a line what went amiss: 0 all is well, 1 something failed, 2 it cannot begin
    (an error of the kinds `wrong`), 130 or 143 stopped by Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _terminate)  # or nothing would be tidied up
    try:
        state = run()
    except wrong as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except Terminated:
        return _stopped(signal.SIGTERM)
    except Exception:
        from prefect.settings import PREFECT_API_URL

        if answers(f"{PREFECT_API_URL.value()}/health", 5.0):
            raise
        print("Prefect's server does not answer any more. What is done stays done: start it and run", end=" ", file=sys.stderr)
        print("the same command again.", file=sys.stderr)
        return 1
    if state.is_cancelled():
        return _stopped(next((sign for sign, words in STOPPED.items() if words == state.message), signal.SIGINT))
    if not state.is_completed():
        print(f"\n{state.message} What is done stays done: mend and run the same command again.", file=sys.stderr)
        return 1
    return 0


def _terminate(*_: Any) -> None:
    raise Terminated


def _stopped(sign: signal.Signals) -> int:
    print("Stopped, training included. The same command goes on from here.", file=sys.stderr)
    return 128 + sign


def answers(url: str, seconds: float = 1.0) -> bool:
    """Whether an HTTP server says OK there."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=seconds) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def use_running_server() -> bool:
    """Let Prefect talk to the server of `make ui` when it runs and PREFECT_API_URL names no other; whether one is named."""
    if "PREFECT_API_URL" not in os.environ and answers(f"{API}/health"):
        os.environ["PREFECT_API_URL"] = API
    return "PREFECT_API_URL" in os.environ
