"""What we ask of DVC, on a toy project with the real DVC."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks import dvcstage
from tests.conftest import Project
from tests.toy import ask, begin, knobs, make_toy, run, runs, wait_for

KEYS = """
import json
from tasks.dvcstage import current_key
print(json.dumps({name: current_key(name) for name in ('sft', 'evaluate@sft', 'extra')}))
"""
LOCKED = """
import json
from tasks.locked import locked_stages
print(json.dumps({stage.name: stage.key for stage in locked_stages()}))
"""


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    return make_toy(tmp_path / "toy")


def test_the_graph_comes_from_dvc_in_an_order_that_can_be_run(toy: Project) -> None:
    code = "import json, dataclasses; from tasks.dvcstage import read_stages; "
    stages = ask(toy, code + "print(json.dumps([dataclasses.asdict(s) for s in read_stages()]))")
    names = [stage["name"] for stage in stages]
    main = {stage["name"] for stage in stages if stage["file"] == "dvc.yaml"}
    assert main == {"prepare", "words", "base", "sft", "evaluate@base", "evaluate@sft", "report", "register"}
    further = {stage["name"] for stage in stages if stage["file"] == "methods/dvc.yaml"}
    assert further == {"extra", "told", "evaluate_methods@extra", "report_methods", "register_methods"}
    assert len(names) == len(main | further)
    for stage in stages:
        assert all(names.index(need) < names.index(stage["name"]) for need in stage["upstream"])
    by_name = {stage["name"]: stage for stage in stages}
    assert by_name["report"]["upstream"] == ["evaluate@base", "evaluate@sft"]
    assert by_name["sft"]["meta"] == {"torch": True, "register": "sft"}
    assert "data/models/sft" in by_name["sft"]["outs"]
    assert by_name["extra"]["upstream"] == ["sft"] and "data/models/extra" in by_name["extra"]["outs"]
    assert by_name["extra"]["deps"] == ["data/models/sft", "salt"], "paths from the root, params left out"


def test_outputs_are_what_dvc_would_remove(toy: Project) -> None:
    code = "import json; from tasks.dvcstage import outputs_of; print(json.dumps([str(p) for p in outputs_of('register')]))"
    assert ask(toy, code) == [str(toy.root / "data/reports/complete")]  # registry.json persists


def test_a_stage_of_the_further_methods_is_found_by_its_name_from_anywhere(toy: Project) -> None:
    code = "import json, os; os.chdir('/'); from tasks.dvcstage import outputs_of; "
    assert ask(toy, code + "print(json.dumps([str(p) for p in outputs_of('register_methods')]))") == [
        str(toy.root / "data/reports/complete_methods")
    ]
    code = "import json; from tasks.stage import address_of; print(json.dumps([address_of(n) for n in {!r}]))"
    names = ["sft", "evaluate@base", "extra", "evaluate_methods@extra"]
    found = ask(toy, code.format(names))
    assert found == ["sft", "evaluate@base", "methods/dvc.yaml:extra", "methods/dvc.yaml:evaluate_methods@extra"]


def test_a_name_that_neither_file_has_is_a_clear_error(toy: Project) -> None:
    code = "import json; from tasks.dvcstage import outputs_of\ntry:\n    outputs_of('nobody')\n"
    code += "except Exception as error:\n    print(json.dumps(f'{type(error).__name__}: {error}'))"
    stages = "prepare, words, base, sft, evaluate@base, evaluate@sft, report, register"
    assert ask(toy, code) == f"StageError: dvc.yaml: no stage 'nobody'; it has {stages}"


def test_a_key_needs_no_dvc_lock_which_another_dvc_may_be_writing(toy: Project) -> None:
    assert run(toy, "-m", "dvc", "repro", "-P").returncode == 0
    whole = ask(toy, KEYS)
    for name in ("dvc.lock", "methods/dvc.lock"):
        text = toy.path(name).read_text()
        toy.path(name).write_text(text[: len(text) // 2])
    assert ask(toy, KEYS) == whole


def test_what_reads_dvc_lock_holds_dvcs_own_lock(toy: Project) -> None:
    code = "import json; from tasks.dvcstage import {0}\nwith {0}() as repo:\n    print(json.dumps(repo.lock.is_locked))"
    assert ask(toy, code.format("open_locked_repo")) is True
    assert ask(toy, code.format("open_repo")) is False


REPRO = """
import json
from tasks.dvcstage import StageFailed, repro
lines = []
try:
    print(json.dumps([repro({name!r}, lines.append, place={{'CUDA_VISIBLE_DEVICES': '7'}}), lines]))
except StageFailed as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def test_a_stage_runs_once_and_is_then_cached(toy: Project) -> None:
    skipped, lines = ask(toy, REPRO.format(name="prepare"))
    assert skipped is None and "[prepare] done on 7" in lines
    assert not any("lock file" in line for line in lines)
    skipped, _lines = ask(toy, REPRO.format(name="prepare"))
    assert skipped == "Stage 'prepare' didn't change, skipping"
    toy.path("salt").write_text("b")
    assert ask(toy, REPRO.format(name="prepare"))[0] is None
    toy.path("salt").write_text("a")
    assert "is cached - skipping run" in ask(toy, REPRO.format(name="prepare"))[0]


@pytest.mark.slow
def test_a_stage_of_the_further_methods_runs_and_is_then_cached(toy: Project) -> None:
    assert run(toy, "-m", "dvc", "repro", "sft").returncode == 0
    skipped, lines = ask(toy, REPRO.format(name="extra"))
    assert skipped is None and "[extra] done on 7" in lines
    assert any(line.startswith("Running stage 'methods/dvc.yaml:extra'") for line in lines)
    assert ask(toy, REPRO.format(name="extra"))[0] == "Stage 'methods/dvc.yaml:extra' didn't change, skipping"
    assert toy.path("methods/dvc.lock").is_file() and "\n  extra:" not in toy.path("dvc.lock").read_text()
    knobs(toy, fail=["told"])
    kind, message = ask(toy, REPRO.format(name="told"))
    assert kind == "StageFailed" and message.startswith("stage told failed") and "the stage cannot" in message


def test_a_stage_that_fails_is_no_fault_of_the_machinery(toy: Project) -> None:
    knobs(toy, fail=["prepare"])
    kind, message = ask(toy, REPRO.format(name="prepare"))
    assert kind == "StageFailed" and "the stage cannot" in message and "exited with 3" in message


@pytest.mark.parametrize(
    ("code", "line", "kind"),
    [
        (255, "ERROR: failed to reproduce 'sft': 'data/x' is busy, it is being blocked by:", dvcstage.MachineryFailed),
        (255, "ERROR: Unable to acquire lock. Most likely another DVC process is running", dvcstage.MachineryFailed),
        (-9, "", dvcstage.MachineryFailed),
        (255, "ERROR: failed to reproduce 'sft': failed to run: python x.py, exited with 1", dvcstage.StageFailed),
        (255, "ERROR: failed to reproduce 'sft': missing data 'source': data/x", dvcstage.StageFailed),
    ],
)
def test_only_faults_of_locks_and_processes_are_the_machinerys(
    monkeypatch: pytest.MonkeyPatch, code: int, line: str, kind: type
) -> None:
    def fake(command: list[str], cwd: Path, env: dict[str, str], say: object, patience: float) -> int:
        assert command[3:5] == ["--wait-for-lock", "repro"] and patience == 60
        say("data/y is busy, says the stage") if line.startswith("ERROR: failed to reproduce 'sft': f") else None
        say(line)
        return code

    monkeypatch.setattr(dvcstage.process, "run", fake)
    with pytest.raises(dvcstage.StageFailed) as caught:
        dvcstage.repro("sft", lambda line: None)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("end", "said"),
    [(130, "stopped by Ctrl-C"), (-2, "stopped by Ctrl-C"), (143, "stopped by SIGTERM"), (-15, "stopped by SIGTERM")],
)
def test_a_stage_that_alone_was_asked_to_stop_did_not_fail(monkeypatch: pytest.MonkeyPatch, end: int, said: str) -> None:
    def fake(command: list[str], cwd: Path, env: dict[str, str], say: Callable[[str], None], patience: float) -> int:
        say("step 1, exited with 3 of 130")
        say(f"ERROR: failed to reproduce 'sft': failed to run: python -m tasks.sft, exited with {end}")
        return 255

    monkeypatch.setattr(dvcstage.process, "run", fake)
    with pytest.raises(dvcstage.StageStopped, match=f"^{said}$"):
        dvcstage.repro("sft", lambda line: None)


@pytest.mark.slow
def test_a_key_is_the_same_now_and_in_dvc_lock_and_follows_the_inputs(toy: Project) -> None:
    assert run(toy, "-m", "dvc", "repro", "report", "methods/dvc.yaml:extra").returncode == 0
    now, locked = ask(toy, KEYS), ask(toy, LOCKED)
    assert all(now[name] == locked[name] for name in ("sft", "evaluate@sft", "extra"))
    toy.set(sft__learning_rate=0.5)
    changed = ask(toy, KEYS)
    assert changed["sft"] != now["sft"] and changed["evaluate@sft"] == now["evaluate@sft"]
    assert ask(toy, LOCKED) == locked
    toy.set(sft__learning_rate=5.0e-4)
    assert ask(toy, KEYS) == now
    toy.path("salt").write_text("b")
    assert ask(toy, KEYS)["evaluate@sft"] != now["evaluate@sft"]


STOP = """
import signal, sys
from tasks import process
from tasks.dvcstage import repro
def stop(*_):
    process.stop_all()
signal.signal(signal.SIGTERM, stop)
try:
    repro('prepare', print)
except process.Stopped:
    sys.exit(5)
"""


@pytest.mark.slow
def test_stopping_ends_the_stage_and_leaves_dvc_usable(toy: Project) -> None:
    knobs(toy, hang=["prepare"])
    child = begin(toy, "-c", STOP)
    wait_for(toy.path("hanging").exists)
    wait_for(lambda: toy.path("hanging").read_text())
    stage = int(toy.path("hanging").read_text())
    assert runs(stage)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(30) == 5, toy.path("output.txt").read_text()
    assert not runs(stage)
    knobs(toy)
    done = run(toy, "-m", "dvc", "repro", "prepare")
    assert done.returncode == 0, done.stdout


def test_a_folder_without_git_is_told_of_in_a_line(project: Project) -> None:
    done = project.run("-m", "tasks.ingest")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not a git repository; `git init` makes one, `dvc config --local core.no_scm true`" in done.stderr
