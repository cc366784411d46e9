"""By default nothing that a tool would tell its maker leaves this machine, and servers are for this machine alone.

Every program here runs under LISTENER, which also sees the processes it starts. Its environment is made anew: in a job of
continuous integration or under pytest the tools keep quiet by themselves, and a proxy would hide whom they seek.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import flows
from flows.server import temporary_server
from flows.ui import prefect_with_pages
from tasks.preset import apply
from tests.conftest import ROOT, Project
from tests.toy import free_port, make_toy, wait_for

LISTENER = '''
"""Notes every address beyond this machine that a Python process or a child resolves, calls or serves, and refuses it."""
import ipaddress, os, sys


def on_this_machine(host):
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def hear(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None  # else a path: a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event == "subprocess.Popen" and arguments[3]:  # DVC gives its daemon a path of its own
        paths = [os.path.dirname(__file__), arguments[3].get("PYTHONPATH", "")]
        arguments[3]["PYTHONPATH"] = os.pathsep.join(paths)
        return
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if isinstance(host, str) and not on_this_machine(host):
        with open(os.environ["HEARD"], "a") as file:
            file.write(f"{event.removeprefix('socket.')} {host or 'every address'}\\n")
        raise ConnectionRefusedError(f"{host}: not on this machine")


sys.addaudithook(hear)
'''
RUN = (
    "import mlflow\nmlflow.set_tracking_uri('sqlite:///own.db')\nwith mlflow.start_run():\n    mlflow.log_metric('loss', 1.0)\n"
)
DVC = "import sys\nfrom dvc.cli import main\nsys.exit(main(['status']))\n"
TABLE = """
from pathlib import Path

import pandas

from apprentice.sections import SourceConfig
from tasks.sources import read_source

pandas.DataFrame({"prompt": ["a"], "response": ["b"]}).to_parquet("rows.parquet")
source = SourceConfig(kind="parquet", path="rows.parquet", name=None, subset=None, split="train", revision=None)
assert [raw.row for raw in read_source(source, Path("."))] == [{"prompt": "a", "response": "b"}]
"""


@dataclass
class Ear:
    """Runs programs of a project and knows whom beyond this machine they addressed."""

    project: Project
    place: Path

    def environment(self, **more: str) -> dict[str, str]:
        own = {name: os.environ[name] for name in ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own |= {"PATH": path, "HOME": str(self.place), "HEARD": str(self.place / "heard")}
        return own | {"PYTHONPATH": os.pathsep.join([str(self.place), str(self.project.root)]), **more}

    def run(self, *words: str, **more: str) -> list[str]:
        """`python WORDS`, which has to end well; the addresses."""
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=self.project.root, env=self.environment(**more), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.heard()

    def heard(self) -> list[str]:
        path = self.place / "heard"
        return sorted(set(path.read_text().splitlines())) if path.exists() else []


@pytest.fixture
def ear(project: Project, tmp_path: Path) -> Ear:
    """An ear in a copy of the project that is no git repository."""
    project.without_git()
    return listening(project, tmp_path)


@pytest.fixture
def toy_ear(tmp_path: Path) -> Ear:
    """An ear in the toy."""
    return listening(make_toy(tmp_path / "toy"), tmp_path)


def listening(project: Project, place: Path) -> Ear:
    (place / "sitecustomize.py").write_text(LISTENER)
    return Ear(project, place)


def made_environment() -> dict[str, str]:
    """What `make` exports to the programs it runs."""
    rule = "include Makefile\nshown:\n\t@python3 -c 'import json, os; print(json.dumps(dict(os.environ)))'\n"
    command = ["make", "--silent", "--no-print-directory", "-f", "-", "shown"]
    done = subprocess.run(command, cwd=ROOT, input=rule, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_exports_every_switch_that_the_flows_set() -> None:
    places = {"PREFECT_HOME", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"}
    switches = {name: value for name, value in flows.DEFAULTS.items() if name not in places}
    made = made_environment()
    assert {name: made.get(name) for name in switches} == switches


def test_the_listener_hears_children_and_lets_nothing_out(ear: Ear) -> None:
    call = "import contextlib, socket\nwith contextlib.suppress(OSError):\n    socket.create_connection(('192.0.2.1', 9), 1)\n"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {call!r}], check=True)\n"
    serve = "import socket\nsocket.create_server(('127.0.0.1', 0)).close()\nsocket.getaddrinfo('localhost', 80)\n"
    assert ear.run("-c", serve) == []
    assert ear.run("-c", child) == ["getaddrinfo 192.0.2.1"]
    everywhere = "import contextlib, socket\nwith contextlib.suppress(OSError):\n    socket.create_server(('', 0))\n"
    assert ear.run("-c", everywhere) == ["bind every address", "getaddrinfo 192.0.2.1"]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["mlflow", "dvc"])  # Prefect's server reports by a clock of its own, too late for a test
def test_a_tool_that_is_told_nothing_is_heard(ear: Ear, tool: str) -> None:
    """Without this the silence below would prove nothing."""
    ear.project.path("pyproject.toml").unlink()
    ear.project.path(".dvc/config").write_text("")
    ear.project.path("program.py").write_text({"mlflow": RUN, "dvc": DVC}[tool])
    ear.run("program.py")
    wait_for(ear.heard, 30)  # in a child that may outlive the program
    assert ear.heard()


@pytest.mark.slow
def test_the_flow_is_heard_by_nobody(toy_ear: Ear) -> None:
    """Prefect with a server of its own, DVC, MLflow with live charts and the registry."""
    assert toy_ear.run("-m", "flows.align") == []
    assert (toy_ear.project.root / "mlflow.db").exists()


@pytest.mark.slow
def test_the_stages_are_heard_by_nobody(ear: Ear) -> None:
    """DVC, Great Expectations, tokenizers and models; without what `make` exports, as all below."""
    apply("smoke", ear.project.root)
    assert ear.run("-m", "dvc", "repro", "sft") == []


@pytest.mark.slow
def test_reading_a_table_is_heard_by_nobody(ear: Ear) -> None:
    assert ear.run("-c", "import flows\n" + TABLE) == []


@pytest.mark.slow
def test_reading_a_table_is_heard_by_nobody_without_the_flow(ear: Ear) -> None:
    assert ear.run("-c", TABLE) == []


@pytest.mark.slow
def test_mlflow_is_heard_by_nobody_without_the_flow(toy_ear: Ear) -> None:
    assert toy_ear.run("-m", "dvc", "repro", "register") == []


def ask(address: str, **headers: str) -> int:
    """The status of a POST."""
    request = urllib.request.Request(address, b"{}", {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def preflight(address: str, origin: str) -> tuple[int, str | None]:
    """What a browser learns before it sends JSON there from a page of that origin: the status, whom the server lets in."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    request = urllib.request.Request(address, headers=headers, method="OPTIONS")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
            return reply.status, reply.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Access-Control-Allow-Origin")


def opens_websocket(address: str, origin: str) -> bool:
    """Whether a page of that origin can open one."""
    try:
        connect(address.replace("http:", "ws:"), origin=origin, proxy=None).close()
    except InvalidStatus as error:
        assert error.response.status_code == 403
        return False
    return True


def check_who_can_use_prefect(prefect: str) -> None:
    """Programs, and its own pages under both names of this machine; no page of elsewhere, under whatever name."""
    flows_there, logs, evil = f"{prefect}/api/deployments/filter", f"{prefect}/api/logs/out", "http://evil.example"
    assert ask(flows_there) == 200
    for own in (prefect, prefect.replace("127.0.0.1", "localhost")):
        assert ask(flows_there, Origin=own) == 200 and preflight(flows_there, own) == (200, own)
        assert opens_websocket(logs, own)
    for origin in (evil, "null", "http://127.0.0.1:1"):
        assert preflight(flows_there, origin) == (403, None) and not opens_websocket(logs, origin)
        for kind in ("application/json", "text/plain"):
            assert ask(flows_there, Origin=origin, **{"Content-Type": kind}) == 403
    assert ask(flows_there, Host="evil.example") == ask(flows_there, Host="evil.example", Origin=evil) == 400


def test_a_flows_own_prefect_server_has_the_checks_of_the_one_with_pages() -> None:
    for server in (temporary_server(), prefect_with_pages(4300)):
        assert "flows.prefect_app:create" in server.command and server.address.endswith(f":{server.command[-3]}")
        origins = server.env["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"].split(",")
        assert origins == [server.address, server.address.replace("127.0.0.1", "localhost")]


def page(address: str) -> str:
    """What a browser is shown there."""
    request = urllib.request.Request(address, headers={"Accept": "text/html"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
        return str(reply.read().decode())


@pytest.mark.slow
def test_the_servers_are_for_this_machine_alone(toy_ear: Ear) -> None:
    """Whatever the environment says; a page of elsewhere that a browser shows cannot use them, and theirs tell nobody."""
    ports = [free_port(), free_port()]
    words = ["-m", "flows.ui", "--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    hostile = {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "*",
        "PREFECT_SERVER_API_HOST": "0.0.0.0",
        "PREFECT_API_URL": "http://192.0.2.1/api",
        "MLFLOW_HOST": "0.0.0.0",
    }
    log, root = toy_ear.place / "log", toy_ear.project.root
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=root, env=toy_ear.environment(**hostile), stdout=file, stderr=file
        )
    try:
        wait_for(lambda: "Ctrl-C" in log.read_text() or child.poll() is not None, 180)
        assert child.poll() is None, log.read_text()
        prefect, mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        check_who_can_use_prefect(prefect)
        search = f"{mlflow}/api/2.0/mlflow/experiments/search"
        assert ask(search) == 400  # heard, and found wanting a number of results
        assert ask(search, Host="elsewhere.example") == 403
        assert ask(search, Origin="http://elsewhere.example") == 403
        scripts = re.findall(r'(?:src|href)="([^"]+\.js)"', page(prefect))
        assert scripts and not any("amplitude.com" in page(prefect + script) for script in scripts)
        assert toy_ear.heard() == []
    finally:
        os.kill(child.pid, signal.SIGINT)
        child.wait(60)
