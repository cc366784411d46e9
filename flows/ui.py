"""Prefect's and MLflow's servers on this machine's loopback address: `python -m flows.ui`, or `make ui`."""

import argparse
import signal
import socket
import sys
import time
from contextlib import ExitStack

from flows import ROOT
from flows.command import HOST, ui_options
from flows.server import Server, ServerError, prefect_server
from tasks.store import masked
from tasks.tracking import prepare_store


def prefect_with_pages(port: int) -> Server:
    """Prefect's server; API and UI on one port."""
    address = f"http://{HOST}:{port}"
    own = {"PREFECT_SERVER_API_HOST": HOST, "PREFECT_SERVER_API_PORT": str(port), "PREFECT_API_URL": f"{address}/api"}
    return prefect_server(port, **own, PREFECT_UI_API_URL=f"{address}/api")  # or its pages ask the default port


def mlflow_server(port: int, store: str, experiment: str) -> Server:
    """MLflow's server over the project's store; its checks of Host and Origin stay on."""
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(ROOT / "mlruns")]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # ten processes less
    env["MLFLOW_BACKEND_STORE_URI"] = store  # not in the command, which every user of the machine can read
    server = Server("MLflow", f"http://{HOST}:{port}", "/health", command, env)
    server.page = f"/#/experiments/{experiment}/runs?workflowType=machine_learning"  # else it opens its pages for agents
    return server


def check_free(port: int, flag: str) -> None:
    """Raise when something listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((HOST, port)) == 0:
            raise ServerError(f"Port {port} is taken, perhaps by another `make ui`: stop that, or choose one with {flag} PORT.")


def start(options: argparse.Namespace, started: ExitStack) -> list[Server]:
    """Start what is wanted, wait for it, and say where it is; `started` stops it."""
    check_free(options.prefect_port, "--prefect-port")
    store, experiment = prepare_store()
    servers = [prefect_with_pages(options.prefect_port)]
    if store.startswith("http"):
        print(f"MLflow   {masked(store)}   (MLFLOW_TRACKING_URI)")
    else:
        check_free(options.mlflow_port, "--mlflow-port")
        servers.append(mlflow_server(options.mlflow_port, store, experiment))
    print("starting...", flush=True)
    for server in servers:
        server.start()
        started.callback(server.stop)
    for server in servers:
        server.wait_until_it_answers()
        print(f"{server.name:<8} {server.address}{server.page}")
    if options.prefect_port != 4200:
        print(f"For flows to find it: export PREFECT_API_URL={servers[0].address}/api")
    print("Ctrl-C stops them.", flush=True)
    return servers


def main(options: argparse.Namespace) -> int:
    """Start the servers and keep them until Ctrl-C; 2 when one cannot start or ends by itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with ExitStack() as started:
            servers = start(options, started)
            while all(server.runs() for server in servers):
                time.sleep(0.5)
            ended = next(server for server in servers if not server.runs())
            raise ServerError(masked(f"{ended.name}'s server ended:\n" + "".join(ended.lines)))
    except KeyboardInterrupt:
        return 0
    except (ServerError, ValueError) as error:  # ValueError: params.yaml is wrong
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(ui_options()))
