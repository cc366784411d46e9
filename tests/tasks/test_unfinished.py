"""Folders of unfinished work: one process each, gone as a whole or not at all, kept until dvc.lock has the work."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from tasks import dvcstage, unfinished
from tasks.kept import KeptPieces
from tasks.resume import StageRecorder
from tasks.stage import Stage
from tasks.unfinished import FINISHED, LOCK, drop, prune, sweep, take
from tests.conftest import ROOT, Project
from tests.main_line import end_of_process
from tests.toy import wait_for

HOLDER = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
HOLDER += "print('held', flush=True); time.sleep(300)"


@pytest.fixture
def stage(stage_of: Callable[..., Stage]) -> Stage:
    """A stage under DVC, whose every step is saved."""
    made = stage_of("sft", **{"runtime.checkpoint_steps": 1})
    made.__dict__["key"], made.by_hand = "0123", False
    return made


def lock(folder: Path) -> IO[str]:
    """Have a folder as another process would; BlockingIOError where one has it."""
    file = (folder / LOCK).open("a")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def run_of(stage: Stage, key: str, age: float, snapshot: bool = True) -> Path:
    """A folder that an ended process left some seconds ago."""
    stage.__dict__["key"] = key
    folder = take(stage)
    if snapshot:
        (folder / "last").mkdir()
    end_of_process(stage)
    os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    return folder


def half_removed(path: Path, ignore_errors: bool) -> None:
    """A kill within rmtree: of the pieces the first is gone, of a snapshot its tensors."""
    for first in path.glob("pieces/0/*"):
        first.unlink()
    for first in path.glob("pieces/0"):
        first.rmdir()
    (path / "last" / "tensors.safetensors").unlink(missing_ok=True)
    raise KeyboardInterrupt


def killed_while_dropping(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unfinished.shutil, "rmtree", half_removed)
        drop(folder)


def test_a_snapshot_half_removed_is_not_gone_on_from(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = StageRecorder(stage)
    first.resume()
    first.step(1, 3, {"loss": 1.0}, lambda: {"w": torch.ones(2)})
    end_of_process(stage)
    killed_while_dropping(first.snapshot.parent, monkeypatch)
    assert StageRecorder(stage).resume() is None
    sweep(stage)
    assert [path.name for path in first.snapshot.parent.parent.iterdir()] == ["0123"]


def test_pieces_half_removed_are_not_mixed_with_new_ones(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the second piece still there, the third process would take it for what the second one had not made yet."""
    first = KeptPieces(stage)
    for number in (1, 2):
        first(lambda number=number: f"old {number}")  # type: ignore[misc]
    end_of_process(stage)
    killed_while_dropping(first.folder.parent, monkeypatch)
    KeptPieces(stage)(lambda: "new 1")
    end_of_process(stage)
    third = KeptPieces(stage)
    assert [third(lambda: "made now") for _ in range(3)] == ["new 1", "made now", "made now"]


def test_a_folder_that_another_process_has_is_never_pruned(stage: Stage) -> None:
    folders = [run_of(stage, key, age) for key, age in (("a", 40), ("b", 30), ("c", 20), ("d", 10))]
    other = lock(folders[0])
    stage.__dict__["key"] = "e"
    take(stage)
    prune(stage)
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["a", "c", "d", "e"]  # b is the oldest without one
    other.close()
    prune(stage)
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["c", "d", "e"]


def test_what_is_of_no_use_any_more_goes_first(stage: Stage) -> None:
    done, empty, cut = (run_of(stage, key, 10, snapshot) for key, snapshot in (("done", True), ("empty", False), ("cut", True)))
    (done / FINISHED).touch()
    other = lock(run_of(stage, "begun", 0, snapshot=False))
    stage.__dict__["key"] = "new"
    take(stage)
    assert sorted(path.name for path in cut.parent.iterdir()) == ["begun", "cut", "new"] and not empty.exists()
    other.close()


def test_of_two_at_the_same_work_the_second_waits_and_goes_on_from_what_the_first_left(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    first = StageRecorder(stage)
    first.resume()
    first.step(1, 3, {"loss": 1.0}, lambda: {"step": 1})
    end_of_process(stage)
    command = [sys.executable, "-c", HOLDER, str(first.snapshot.parent / LOCK)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(StageRecorder(stage).resume()))
    thread.start()
    said = ""

    def waits() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return "waiting for another process that does the same" in said

    wait_for(waits)
    assert not found
    other.kill()
    other.wait()
    thread.join(20)
    assert found == [{"step": 1}]
    with pytest.raises(BlockingIOError):
        lock(first.snapshot.parent)


def test_who_waited_for_a_folder_that_was_dropped_gets_a_new_one_for_itself(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(stage, "0123", 0)
    other = lock(folder)
    thread = threading.Thread(target=take, args=(stage,))
    thread.start()
    wait_for(lambda: "waiting for" in capsys.readouterr().out)
    folder.rename(folder.with_name(".gone"))
    other.close()
    thread.join(20)
    assert not thread.is_alive() and [path.name for path in folder.iterdir()] == [LOCK]
    with pytest.raises(BlockingIOError):
        lock(folder)


def test_finished_work_stays_until_dvc_has_recorded_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = StageRecorder(stage)
    recorder.resume()
    recorder.step(1, 1, {"loss": 1.0}, lambda: {"step": 1})
    recorder.over(lambda: {"step": 1})
    stage.finish()
    folder, recorded = recorder.snapshot.parent, {"sft": "another"}
    monkeypatch.setattr(dvcstage, "recorded_keys", lambda labels: {name: recorded[name] for name in labels})
    sweep(stage)
    assert StageRecorder(stage).resume() == {"step": 1}  # killed before it was in dvc.lock
    recorded["sft"] = "0123"
    sweep(stage)
    assert folder.exists()  # this process has it
    end_of_process(stage)
    sweep(stage)
    assert not folder.exists()


def test_by_hand_nobody_commits_and_finished_work_goes_at_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.by_hand = True
    folder = take(stage)
    KeptPieces(stage)(lambda: "piece")
    there: dict[str, bool] = {}
    monkeypatch.setattr(stage, "telemetry", lambda **told: there.update({told["event"]: (folder / "pieces" / "0").exists()}))
    stage.finish()
    assert list(folder.parent.iterdir()) == []
    assert there["finished"], "killed right before the note, it could go on from nothing"


def test_a_torn_model_of_its_own_goes_when_the_stage_starts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    models = stage.data / "models"
    monkeypatch.setattr(dvcstage, "outputs_of", lambda label: [models / label, stage.reports / "metrics.json"])
    for name in (".sft.partial", ".srppo.partial"):  # the other may be written just now
        (models / name).mkdir(parents=True)
        (models / name / "model.safetensors").write_bytes(b"torn")
    stage.reports.mkdir(parents=True)
    (stage.reports / ".metrics.json.x1").write_text("{")
    sweep(stage)
    assert [path.name for path in models.iterdir()] == [".srppo.partial"] and not list(stage.reports.iterdir())


TRAINING = '''"""Takes 20 steps, and notes each that it takes."""
from tasks.stage import Stage, run


def main(stage):
    from tasks.resume import StageRecorder

    recorder = StageRecorder(stage)
    saved = recorder.resume()
    state = saved or {"step": 0, "sum": 0}
    for step in range(state["step"] + 1, 21):
        with open("taken", "a") as file:
            print(step, file=file)
        state = {"step": step, "sum": state["sum"] + step}
        recorder.step(step, 20, {"sum": state["sum"]}, lambda: state)
    recorder.over(lambda: state)
    stage.metrics({"sum": state["sum"]})


run(__name__, main, __doc__)
'''
PIPELINE = """stages:
  sft:
    cmd: python -m tasks.sft
    params: [seed]
    outs: [data/reports/sft/history.csv, data/reports/sft/metrics.json]
"""
KILLED = "import os; from dvc.stage import Stage; Stage.save = lambda *_, **__: os.kill(os.getpid(), 9); "
KILLED += "from dvc.cli import main; main(['repro', 'sft'])"


@pytest.mark.slow
def test_work_that_dvc_was_killed_over_is_gone_on_from_and_a_forced_run_begins_anew(project: Project) -> None:
    project.path("tasks/sft.py").write_text(TRAINING)
    project.path("dvc.yaml").write_text(PIPELINE)
    project.without_git()
    for path in ("methods/dvc.yaml", "pipelines.dvc"):
        project.path(path).unlink()

    def taken() -> int:
        return len(project.path("taken").read_text().splitlines())

    def outputs() -> list[bytes]:
        return [project.path(f"data/reports/sft/{name}").read_bytes() for name in ("history.csv", "metrics.json")]

    killed = project.run("-c", KILLED)
    assert killed.returncode == -signal.SIGKILL and taken() == 20 and not project.path("dvc.lock").exists()
    whole = outputs()
    again = project.run("-m", "dvc", "repro", "sft")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing after step 20 " in again.stdout and taken() == 20 and outputs() == whole
    forced = project.run("-m", "dvc", "repro", "-f", "sft")
    assert forced.returncode == 0 and "continuing" not in forced.stdout and taken() == 40 and outputs() == whole
