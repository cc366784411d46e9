"""Servers and processes that die in the middle, for real: MLflow, Prefect, DVC, the flow, and two of them at once."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from flows.command import answers
from tests import toy as toys
from tests.conftest import Project
from tests.toy import empty_prefect, empty_store, free_port, knobs, make_toy, run, wait_for, with_stores

pytestmark = pytest.mark.slow
FOLLOW = """
import sys
from tasks.dvcstage import read_stages, repro
from tasks.tracking import followed

(outs,) = (stage.outs for stage in read_stages() if stage.name == "sft")
with followed("sft", outs, print) as listen:
    repro("sft", listen)
"""


class Service:
    """A server on a port of its own, which can be killed and started again."""

    def __init__(self, home: Path, health: str, words: list[str], **own: str) -> None:
        self.port, self.home, self.words, self.own = free_port(), home, words, own
        self.address = f"http://127.0.0.1:{self.port}"
        self.health = self.address + health

    def start(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        command = [sys.executable, "-m", *self.words, "--port", str(self.port)]
        with (self.home / "log.txt").open("a") as log:
            self.child = subprocess.Popen(
                command, env=clean | self.own, cwd=self.home, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: answers(self.health), 240)

    def kill(self) -> None:
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(empty_prefect(), home)
    own = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "true"}
    service = Service(home, "/api/health", ["prefect", "server", "start"], **own)
    service.start()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_store(), home / "mlflow.db")
    words = ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
    words += ["--artifacts-destination", str(home / "artifacts")]
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    service = Service(home, "/health", words, **own)
    service.start()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A toy after a plain `dvc repro`, for comparison and to copy."""
    toy = with_stores(make_toy(tmp_path_factory.mktemp("made") / "toy"))
    done = run(toy, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout
    return toy


Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`toy.begin`, whose processes end with the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: Any, **more: str) -> "subprocess.Popen[str]":
        begun.append(toys.begin(*words, **more))
        return begun[-1]

    yield start
    for child in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    return with_stores(make_toy(tmp_path / "toy"))


def store(address: str, name: str = "apprentice") -> dict[str, Any]:
    """All that a store says of an experiment and the registered model of its name; ids and times left out."""
    own = MlflowClient(address, address)
    found = own.search_runs([own.get_experiment_by_name(name).experiment_id])
    versions = sorted(own.search_model_versions(f"name = '{name}'"), key=lambda version: version.tags["dvc.stage"])
    stage_of = {str(version.version): version.tags["dvc.stage"] for version in versions}
    models = {v.tags["dvc.stage"]: own.get_logged_model(v.source.removeprefix("models:/")) for v in versions}
    return {
        "runs": sorted((r.data.tags["dvc.stage"], r.info.status, tuple(sorted(r.data.params.items()))) for r in found),
        "metrics": sorted(
            (r.data.tags["dvc.stage"], key, [(m.step, m.value) for m in own.get_metric_history(r.info.run_id, key)])
            for r in found
            for key in r.data.metrics
            if not key.startswith("runtime/")
        ),
        "versions": [(v.tags["dvc.stage"], v.tags["dvc.md5"], v.status) for v in versions],
        "models": {stage: sorted((m.key, m.value) for m in model.metrics or []) for stage, model in models.items()},
        "shown": {stage: "mlflow.modelVersions" in model.tags for stage, model in models.items()},
        "aliases": {alias: stage_of[str(v)] for alias, v in own.get_registered_model(name).aliases.items()},
    }


def curves(address: str) -> list[list[int]]:
    """The steps of each run of sft."""
    own = MlflowClient(address, address)
    experiment = own.get_experiment_by_name("apprentice")
    found = own.search_runs([experiment.experiment_id], "tags.`dvc.stage` = 'sft'") if experiment else []
    return [[point.step for point in own.get_metric_history(r.info.run_id, "curve/loss")] for r in found]


def test_mlflow_that_dies_while_a_stage_trains(toy: Project, made: Project, mlflow: Service, begin: Begin) -> None:
    done = run(toy, "-m", "dvc", "repro", "base")
    assert done.returncode == 0, done.stdout
    knobs(toy, hold=["sft"])
    child = begin(toy, "-c", FOLLOW, MLFLOW_TRACKING_URI=mlflow.address)
    wait_for(lambda: curves(mlflow.address) == [[1, 2]], 240)
    mlflow.kill()
    toy.path("go").touch()
    said = toy.path("output.txt")
    assert child.wait(240) == 0, said.read_text()
    assert said.read_text().count("no live charts for sft") == 1, said.read_text()
    assert len(toy.path("data/reports/sft/history.csv").read_text().splitlines()) == 6
    there = {"MLFLOW_TRACKING_URI": mlflow.address}
    refused = run(toy, "-m", "dvc", "repro", **there)
    assert refused.returncode != 0 and f"MLflow does not answer at {mlflow.address}" in refused.stdout
    mlflow.start()
    done = run(toy, "-m", "dvc", "repro", **there)
    assert done.returncode == 0, done.stdout
    assert curves(mlflow.address) == [[1, 2, 3, 4, 5]]
    assert store(mlflow.address) == store(f"sqlite:///{made.root / 'mlflow.db'}")


class Breaking(BaseHTTPRequestHandler):
    """Hands requests on to MLflow; breaks the connection at those named in the server's `cuts`: {path's end: how}.

    `lost`: once, after MLflow did what was asked; `down`: before, and from then on at every request.
    """

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        end = next((end for end in self.server.cuts if self.path.partition("?")[0].endswith(end)), None)
        how = self.server.cuts.get(end)
        self.server.down = self.server.down or how == "down"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.down:
            onward = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
            onward.request(self.command, self.path, body, dict(self.headers))
            reply = onward.getresponse()
            content = reply.read()
        if self.server.down or how == "lost":
            self.server.cuts.pop(end, None)
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def breaking(mlflow: Service) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    server.behind, server.cuts, server.down = mlflow.port, {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("first", {"runs/create": "lost", "model-versions/create": "lost"}),
        ("second", {"runs/log-batch": "lost", "runs/set-tag": "lost"}),
        ("third", {"registered-models/alias": "down"}),
    ],
)
def test_mlflow_that_breaks_off_while_it_registers(
    made: Project, tmp_path: Path, breaking: ThreadingHTTPServer, name: str, cuts: dict[str, str]
) -> None:
    """Whatever was done when the connection broke is found, in the same command or the next."""
    toy = Project(tmp_path / "toy")
    shutil.copytree(made.root, toy.root, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"), symlinks=True)
    toy.set(register__model=name, register__experiment=name)
    address = f"http://127.0.0.1:{breaking.server_port}"
    breaking.cuts = dict(cuts)
    done = run(toy, "-m", "tasks.register", MLFLOW_TRACKING_URI=address)
    assert "MLflow broke off" in done.stdout and breaking.cuts.keys() <= {"registered-models/alias"}
    if name == "third":
        assert done.returncode == 2 and "the same command adds the rest" in done.stdout, done.stdout
        assert done.stdout.count("Traceback") == 0
        breaking.cuts, breaking.down = {}, False
        done = run(toy, "-m", "tasks.register", MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stdout
    wanted = store(f"sqlite:///{made.root / 'mlflow.db'}")
    found = store(f"http://127.0.0.1:{breaking.behind}", name)
    assert found == wanted
    assert run(toy, "-m", "tasks.register", MLFLOW_TRACKING_URI=address).returncode == 0
    assert store(f"http://127.0.0.1:{breaking.behind}", name) == wanted


def outputs(toy: Project) -> dict[str, list[tuple[str, str]]]:
    """Stage to paths and hashes of its outputs, as dvc.lock has them."""
    stages = yaml.safe_load(toy.path("dvc.lock").read_text())["stages"]
    return {name: [(out["path"], out["md5"]) for out in stage["outs"]] for name, stage in stages.items()}


def held(toy: Project, stage: str) -> bool:
    history = toy.path(f"data/reports/{stage}/history.csv")
    return history.exists() and len(history.read_text().splitlines()) == 3


def test_two_flows_and_a_hand_run_at_once_end_as_one_after_the_other(
    toy: Project, made: Project, prefect: Service, begin: Begin
) -> None:
    knobs(toy, hold=["base"])
    there = {"PREFECT_API_URL": f"{prefect.address}/api"}
    first = begin(toy, "-m", "flows.align", **there)
    wait_for(lambda: held(toy, "base"), 240)
    toy.path("output.txt").rename(toy.path("first.txt"))
    second = begin(toy, "-m", "flows.align", **there)
    wait_for(lambda: "waiting for prepare: in use by `" in toy.path("output.txt").read_text(), 240)
    assert "repro --single-item base` (pid " in toy.path("output.txt").read_text()
    by_hand = run(toy, "-m", "dvc", "repro")
    assert by_hand.returncode == 255 and "is busy" in by_hand.stdout and "repro --single-item base" in by_hand.stdout
    toy.path("go").touch()
    assert first.wait(240) == 0, toy.path("first.txt").read_text()
    assert second.wait(240) == 0, toy.path("output.txt").read_text()
    assert outputs(toy) == outputs(made)
    assert store(f"sqlite:///{toy.root / 'mlflow.db'}") == store(f"sqlite:///{made.root / 'mlflow.db'}")
    assert toy.path("data/reports/registry.json").read_bytes() == made.path("data/reports/registry.json").read_bytes()
    assert not json.loads(toy.path(".dvc/tmp/rwlock").read_text()).get("write")


def test_two_flows_that_start_together_in_a_new_project(tmp_path: Path, made: Project, begin: Begin) -> None:
    """No server runs and there is no database yet: each starts Prefect for itself, and both make what they share."""
    toy = make_toy(tmp_path / "toy")
    flows = []
    for name in ("first.txt", "second.txt"):
        flows.append(begin(toy, "-m", "flows.align"))
        toy.path("output.txt").rename(toy.path(name))
    codes = [flow.wait(400) for flow in flows]
    said = toy.path("first.txt").read_text() + toy.path("second.txt").read_text()
    assert codes == [0, 0], said
    ran = re.findall(r"\[(\w+)\] from a (?:warm|cold) start", said)
    assert sorted(ran) == ["base", "evaluate", "evaluate", "prepare", "report", "sft", "words"], said
    assert outputs(toy) == outputs(made)
    assert store(f"sqlite:///{toy.root / 'mlflow.db'}") == store(f"sqlite:///{made.root / 'mlflow.db'}")
    wait_for(lambda: not toys.begun_in(toy))


def test_prefects_server_that_is_killed_and_started_again(toy: Project, made: Project, prefect: Service, begin: Begin) -> None:
    knobs(toy, hold=["base"])
    child = begin(toy, "-m", "flows.align", PREFECT_API_URL=f"{prefect.address}/api")
    wait_for(lambda: held(toy, "base"), 240)
    prefect.kill()
    toy.path("go").touch()
    wait_for(lambda: len(toy.path("data/reports/base/history.csv").read_text().splitlines()) == 6)
    prefect.start()
    assert child.wait(240) == 0, toy.path("output.txt").read_text()
    assert outputs(toy) == outputs(made)


def test_prefects_server_that_stays_away(toy: Project, made: Project, prefect: Service, begin: Begin) -> None:
    knobs(toy, hold=["base"])
    there = {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    child = begin(toy, "-m", "flows.align", **there)
    wait_for(lambda: held(toy, "base"), 240)
    prefect.kill()
    toy.path("go").touch()
    assert child.wait(240) == 1
    said = toy.path("output.txt").read_text()
    prefect.start()
    assert "Prefect's server does not answer" in said and "the same command" in said, said
    done = run(toy, "-m", "flows.align", PREFECT_API_URL=f"{prefect.address}/api")
    assert done.returncode == 0 and outputs(toy) == outputs(made)


@pytest.mark.skipif(not toys.PROC.exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(  # base is forked from a warm Python, another child of the flow
    ("stage", "sign", "code"), [("prepare", signal.SIGTERM, 143), ("base", signal.SIGKILL, -9)]
)
def test_a_flow_with_a_server_of_its_own_leaves_nothing_behind(
    toy: Project, begin: Begin, stage: str, sign: signal.Signals, code: int
) -> None:
    knobs(toy, hang=[stage])
    child = begin(toy, "-m", "flows.align", "--only", "prepare", "base")
    wait_for(lambda: toy.path("hanging").exists() and toy.path("hanging").read_text(), 240)
    assert any("uvicorn" in command for command in toys.begun_in(toy))
    os.kill(child.pid, sign)
    assert child.wait(120) == code, toy.path("output.txt").read_text()
    wait_for(lambda: not toys.begun_in(toy))
    knobs(toy)
    done = run(toy, "-m", "dvc", "repro", stage)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("who", ["dvc", "stage"])
def test_dvc_goes_on_after_a_kill(toy: Project, begin: Begin, who: str) -> None:
    knobs(toy, hang=["prepare"])
    child = begin(toy, "-m", "dvc", "repro", "prepare")
    wait_for(lambda: toy.path("hanging").exists() and toy.path("hanging").read_text())
    stage = int(toy.path("hanging").read_text())
    os.kill(child.pid if who == "dvc" else stage, signal.SIGKILL)
    assert child.wait(60) != 0
    knobs(toy)
    done = run(toy, "-m", "dvc", "repro", "prepare")
    assert done.returncode == 0, done.stdout
    assert not json.loads(toy.path(".dvc/tmp/rwlock").read_text()).get("write")
