"""The flow, run for real: a Prefect server of its own, real DVC, a toy pipeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flows.command import STOPPED, answers
from tests.conftest import Project
from tests.toy import begin, empty_prefect, environment, free_port, knobs, make_toy, run, runs, wait_for, with_stores


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a Prefect server that lives as long as this module's tests."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    shutil.copy(empty_prefect(), home)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    own |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with (home / "log.txt").open("w") as log:
        child = subprocess.Popen(command, env=own, cwd=home, stdout=log, stderr=log, start_new_session=True)
    wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/health"), 180)
    yield f"http://127.0.0.1:{port}/api"
    os.killpg(child.pid, signal.SIGTERM)
    child.wait(30)


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    return with_stores(make_toy(tmp_path / "toy"))


def flow(toy: Project, server: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(toy, "-m", "flows.align", *options, PREFECT_API_URL=server)


def ask_server(server: str, what: str, **body: Any) -> list[dict[str, Any]]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server}/{what}/filter", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        return list(json.load(reply))


def last_flow(server: str) -> dict[str, Any]:
    return ask_server(server, "flow_runs", sort="START_TIME_DESC", limit=1)[0]


def tasks_of(server: str, flow_run: dict[str, Any]) -> dict[str, str]:
    """Name to state of the tasks of a flow run."""
    found = ask_server(server, "task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}})
    return {task["name"]: task["state_name"] for task in found}


FURTHER = {"extra", "told", "evaluate_methods@extra", "report_methods", "register_methods"}
STAGES = {"prepare", "words", "base", "sft", "evaluate@base", "evaluate@sft", "report", "register"}


@pytest.mark.slow
def test_the_whole_pipeline_then_all_cached(toy: Project, server: str) -> None:
    knobs(toy, step_seconds=1.0)
    done = flow(toy, server)
    assert done.returncode == 0, done.stdout
    assert "| sft | 1 |" in done.stdout and "data/reports/report.html" in done.stdout
    first = last_flow(server)
    assert tasks_of(server, first) == dict.fromkeys(STAGES, "Completed")
    (artifact,) = ask_server(server, "artifacts", flow_runs={"id": {"any_": [first["id"]]}})
    assert artifact["key"] == "comparison" and artifact["data"] == toy.path("data/reports/report.md").read_text()
    logs = [log["message"] for log in ask_server(server, "logs", logs={"flow_run_id": {"any_": [first["id"]]}})]
    assert "[sft] done on None" in logs and "[sft] from a warm start" in logs and "[prepare] from a cold start" in logs
    assert run(toy, "-m", "dvc", "status", "dvc.yaml").stdout.strip().endswith("up to date.")
    assert not toy.path("methods/dvc.lock").exists()
    check_the_chart_was_live(toy, "sft")

    again = flow(toy, server)
    assert again.returncode == 0, again.stdout
    assert tasks_of(server, last_flow(server)) == dict.fromkeys(STAGES, "Cached")


@pytest.mark.slow
def test_further_methods_come_with_a_flag_or_by_name(toy: Project, server: str) -> None:
    knobs(toy, step_seconds=1.0)
    done = flow(toy, server, "--methods")
    assert done.returncode == 0, done.stdout
    assert "| extra | 1 |" in done.stdout and "data/reports/methods.html" in done.stdout
    first = last_flow(server)
    assert tasks_of(server, first) == dict.fromkeys(STAGES | FURTHER, "Completed")
    (artifact,) = ask_server(server, "artifacts", flow_runs={"id": {"any_": [first["id"]]}})
    assert artifact["data"] == toy.path("data/reports/methods.md").read_text()
    assert run(toy, "-m", "dvc", "status").stdout.strip().endswith("up to date.")
    check_the_chart_was_live(toy, "extra")

    assert flow(toy, server).returncode == 0
    assert tasks_of(server, last_flow(server)) == dict.fromkeys(STAGES, "Cached")
    toy.set(seed=1)
    assert flow(toy, server, "--only", "extra", "evaluate_methods").returncode == 0
    assert tasks_of(server, last_flow(server)) == {"extra": "Completed", "evaluate_methods@extra": "Cached"}


def check_the_chart_was_live(toy: Project, stage: str) -> None:
    """One run of the stage, logged while it trained and adopted when it was registered."""
    own = mlflow.MlflowClient(f"sqlite:///{toy.root / 'mlflow.db'}")
    (found,) = own.search_runs([own.get_experiment_by_name("apprentice").experiment_id], f"tags.`dvc.stage` = '{stage}'")
    assert "dvc.md5" in found.data.tags
    curve = own.get_metric_history(found.info.run_id, "curve/loss")
    assert [metric.step for metric in curve] == [1, 2, 3, 4, 5]
    assert curve[-1].timestamp - curve[0].timestamp > 1500


@pytest.mark.slow
def test_a_stage_that_fails_stops_what_needs_it_and_nothing_else(toy: Project, server: str) -> None:
    knobs(toy, fail=["sft"])
    done = flow(toy, server)
    assert done.returncode == 1, done.stdout
    assert "failed: sft" in done.stdout and "not begun: evaluate@sft, report, register" in done.stdout
    last = last_flow(server)
    states = tasks_of(server, last)
    assert last["state_name"] == "Failed"
    assert states["sft"] == "Failed" and states["evaluate@base"] == states["words"] == "Completed"
    assert states["evaluate@sft"] == states["report"] == states["register"] == "NotReady"
    (sft,) = [t for t in ask_server(server, "task_runs", flow_runs={"id": {"any_": [last["id"]]}}) if t["name"] == "sft"]
    assert "the stage cannot" in sft["state"]["message"] and sft["run_count"] == 1  # not tried again
    knobs(toy)
    assert flow(toy, server).returncode == 0
    assert tasks_of(server, last_flow(server))["base"] == "Cached"


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_flow_ends_the_training_and_leaves_dvc_usable(toy: Project, server: str, sign: signal.Signals) -> None:
    knobs(toy, hang=["sft"])
    child = begin(toy, "-m", "flows.align", PREFECT_API_URL=server)
    wait_for(lambda: toy.path("hanging").exists() and toy.path("hanging").read_text())
    stage = int(toy.path("hanging").read_text())
    os.kill(child.pid, sign)
    assert child.wait(60) == 128 + sign, toy.path("output.txt").read_text()
    assert not runs(stage)
    last = last_flow(server)
    assert last["state_type"] == "CANCELLED" and last["state"]["message"] == STOPPED[sign]
    assert tasks_of(server, last)["sft"] == "Cancelled"
    knobs(toy)
    done = run(toy, "-m", "dvc", "repro", "sft")
    assert done.returncode == 0, done.stdout


def hanging(toy: Project) -> int:
    """The id of the stage that hangs, once it does."""
    wait_for(lambda: toy.path("hanging").exists() and toy.path("hanging").read_text())
    return int(toy.path("hanging").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "sign"), [("prepare", signal.SIGTERM), ("base", signal.SIGINT)])  # cold, warm
def test_a_stage_that_alone_is_stopped_shows_as_cancelled(toy: Project, server: str, stage: str, sign: signal.Signals) -> None:
    knobs(toy, hang=[stage])
    child = begin(toy, "-m", "flows.align", "--only", "prepare", "base", PREFECT_API_URL=server)
    os.kill(hanging(toy), sign)
    assert child.wait(120) == 130, toy.path("output.txt").read_text()
    last = last_flow(server)
    (task,) = [t for t in ask_server(server, "task_runs", flow_runs={"id": {"any_": [last["id"]]}}) if t["name"] == stage]
    assert last["state_type"] == "CANCELLED" and task["run_count"] == 1
    assert task["state_type"] == "CANCELLED" and task["state"]["message"] == STOPPED[sign]


@pytest.mark.slow
def test_a_flow_that_is_stopped_twice_ends_at_once(toy: Project, server: str) -> None:
    knobs(toy, hang=["base"], deaf=True)
    child = begin(toy, "-m", "flows.align", "--only", "prepare", "base", PREFECT_API_URL=server)
    stage = hanging(toy)
    os.kill(child.pid, signal.SIGTERM)
    wait_for(toy.path("asked").exists)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(45) == 143, toy.path("output.txt").read_text()  # else after runtime.stop_seconds, which are 60
    assert not runs(stage) and last_flow(server)["state_type"] == "CANCELLED"


@pytest.mark.slow
def test_a_fault_of_the_machinery_is_tried_again(toy: Project, server: str) -> None:
    """`dvc` in the toy is a stand-in that finds a lock the first time."""
    toy.path("dvc_once").mkdir()
    code = "from dvc.cli import main\nimport pathlib, sys\nmark = pathlib.Path('tried')\n"
    code += "if '--single-item' in sys.argv and not mark.exists():\n    mark.write_text('')\n"
    code += "    print(\"ERROR: failed to reproduce 'prepare': 'data' is busy\")\n    sys.exit(255)\nsys.exit(main())\n"
    toy.path("dvc_once/standin.py").write_text(code)
    source = toy.path("tasks/dvcstage.py").read_text()
    assert '"-m", "dvc", "--wait' in source
    toy.path("tasks/dvcstage.py").write_text(source.replace('"-m", "dvc", "--wait', '"dvc_once/standin.py", "--wait'))
    done = flow(toy, server, "--only", "prepare")
    assert done.returncode == 0, done.stdout
    last = last_flow(server)
    (task,) = ask_server(server, "task_runs", flow_runs={"id": {"any_": [last["id"]]}})
    assert task["run_count"] == 2 and task["state_name"] == "Completed"


@pytest.mark.slow
def test_only_and_force(toy: Project, server: str) -> None:
    assert flow(toy, server, "--only", "prepare").returncode == 0
    assert tasks_of(server, last_flow(server)) == {"prepare": "Completed"}
    assert flow(toy, server, "--only", "prepare", "--force").returncode == 0
    assert tasks_of(server, last_flow(server)) == {"prepare": "Completed"}
    unknown = flow(toy, server, "--only", "prepair")
    assert unknown.returncode == 2 and "no stage 'prepair'; did you mean 'prepare'?" in unknown.stdout


@pytest.mark.slow
def test_without_a_server_a_temporary_one_serves_and_home_stays_untouched(tmp_path: Path) -> None:
    toy, home = make_toy(tmp_path / "toy"), tmp_path / "home"
    home.mkdir()
    done = run(toy, "-m", "flows.align", "--only", "prepare", HOME=str(home), PREFECT_SERVER_API_PORT=str(free_port()))
    assert done.returncode == 0, done.stdout
    assert not (home / ".prefect").exists() and toy.path(".prefect/prefect.db").exists()
    assert "Beginning flow run" in done.stdout and "View at" not in done.stdout  # that server has no pages


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"srppo__kl_coef": -1.0}, "srppo.kl_coef: expected a number at least 0, got -1.0"),
        ({"sft__epoch": 3}, "sft.epoch: no such entry in sft; did you mean 'epochs'?"),
    ],
)
def test_wrong_params_are_named_before_anything_starts(toy: Project, change: dict[str, Any], said: str) -> None:
    path = toy.path("params.yaml")
    text = path.read_text()
    if "sft__epoch" in change:
        path.write_text(text.replace("\nsft:", "\nsft:\n  epoch: 3", 1))
    else:
        toy.set(**change)
    done = run(toy, "-m", "flows.align")
    assert done.returncode == 2
    assert done.stdout.strip().splitlines() == [f"ParamsError: {said}"]


@pytest.mark.parametrize("file", ["dvc.yaml", "methods/dvc.yaml"])
def test_a_broken_pipeline_file_is_one_line(toy: Project, file: str) -> None:
    toy.path(file).write_text("stages: {sft: {cmd: [}}")
    done = run(toy, "-m", "flows.align")
    assert done.returncode == 2 and done.stdout.startswith("PlanError: DVC cannot read the pipeline")


@pytest.mark.parametrize("module", ["flows.align", "flows.serve", "flows.ui"])
def test_help_comes_before_the_slow_imports(toy: Project, module: str) -> None:
    done = run(toy, "-X", "importtime", "-m", module, "--help")
    assert done.returncode == 0 and "usage: python -m " + module in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stdout.splitlines() if line.startswith("import time:")}
    assert not loaded & {"prefect", "mlflow", "dvc", "torch"}


@pytest.mark.slow
def test_the_servers_start_answer_and_stop(toy: Project) -> None:
    ports = [free_port(), free_port()]
    options = ["--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    child = begin(toy, "-m", "flows.ui", *options)
    wait_for(lambda: "Ctrl-C" in toy.path("output.txt").read_text() or child.poll() is not None, 180)
    said = toy.path("output.txt").read_text()
    assert f"http://127.0.0.1:{ports[0]}\n" in said and f"http://127.0.0.1:{ports[1]}/#/experiments/1/runs" in said
    assert answers(f"http://127.0.0.1:{ports[0]}/api/health") and answers(f"http://127.0.0.1:{ports[1]}/health")
    taken = run(toy, "-m", "flows.ui", *options)
    assert taken.returncode == 2 and f"Port {ports[0]} is taken" in taken.stdout
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(60) == 0, toy.path("output.txt").read_text()
    assert not any(answers(f"http://127.0.0.1:{port}/health") for port in ports)


@pytest.mark.slow
def test_a_served_flow_can_be_started_and_cancelled(toy: Project, server: str) -> None:
    knobs(toy, hang=["prepare"])
    child = begin(toy, "-m", "flows.serve", PREFECT_API_URL=server)
    try:
        wait_for(lambda: ask_server(server, "deployments"))
        own = environment(toy, PREFECT_API_URL=server, PREFECT_HOME=str(toy.path(".prefect")))
        prefect = [sys.executable, "-m", "prefect"]
        subprocess.run([*prefect, "deployment", "run", "align/align"], env=own, cwd=toy.root, check=True, capture_output=True)
        wait_for(lambda: toy.path("hanging").exists() and toy.path("hanging").read_text())
        stage = int(toy.path("hanging").read_text())
        wait_for(lambda: last_flow(server)["state_type"] == "RUNNING")
        name = last_flow(server)["id"]
        subprocess.run([*prefect, "flow-run", "cancel", name], env=own, cwd=toy.root, check=True, capture_output=True)
        wait_for(lambda: not runs(stage), 120)
        wait_for(lambda: last_flow(server)["state_type"] == "CANCELLED", 120)
        assert not runs(stage) and last_flow(server)["id"] == name
    finally:
        os.kill(child.pid, signal.SIGINT)
        child.wait(60)


def test_serving_without_a_server_says_what_to_start(toy: Project) -> None:
    if answers("http://127.0.0.1:4200/api/health"):
        pytest.skip("a Prefect server runs on the default port")
    done = run(toy, "-m", "flows.serve")
    assert done.returncode == 1 and "make ui" in done.stdout
