"""Snapshots: what is saved comes back bit for bit, the previous one survives a crash, old ones are pruned."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tasks import stage as stage_module
from tasks.resume import StageRecorder, load_state, save_state
from tasks.stage import Stage
from tests.main_line import end_of_process

STATE = {
    "model": {"a.weight": torch.tensor([[1.5, -2.25]]), "b": torch.arange(3)},
    "best": {},
    "losses": [0.1, 0.2],
    "scale": None,
    "step": 7,
    "nested": [{"x": torch.tensor(3.0)}, "text"],
}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path / "last", STATE)
    assert same(load_state(tmp_path / "last"), STATE)


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "last") is None


def test_a_crash_between_the_renames_leaves_the_previous_state(tmp_path: Path) -> None:
    save_state(tmp_path / "last", STATE)
    (tmp_path / "last").rename(tmp_path / "last.old")  # where a crash would leave it
    found = load_state(tmp_path / "last")
    assert found is not None and found["step"] == 7


def test_a_half_written_state_is_never_read(tmp_path: Path) -> None:
    save_state(tmp_path / "last", STATE)
    (tmp_path / "last.partial").mkdir()
    (tmp_path / "last.partial" / "tensors.safetensors").write_bytes(b"torn")
    save_state(tmp_path / "last", {**STATE, "step": 8})
    found = load_state(tmp_path / "last")
    assert found is not None and found["step"] == 8


def test_a_snapshot_is_on_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forced = tmp_path / "last", []
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append((os.fstat(handle).st_ino, folder.exists())))
    save_state(folder, STATE)
    assert set(forced[:-1]) == {(path.stat().st_ino, False) for path in [folder, *folder.rglob("*")]}
    assert forced[-1] == (tmp_path.stat().st_ino, True)


@pytest.fixture
def stage(stage_of: Callable[..., Stage]) -> Stage:
    made = stage_of("sft")
    made.__dict__["key"] = "0123"  # without a DVC project there is none to compute
    return made


def save_always(recorder: StageRecorder) -> None:
    recorder._saved = float("-inf")


def test_an_interrupted_run_continues_with_its_history(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    first = StageRecorder(stage, "loss")
    assert first.resume() is None
    save_always(first)
    first.step(1, 3, {"loss": 2.0}, lambda: {"step": 1, "w": torch.ones(2)})
    first.step(2, 3, {"loss": 1.0}, lambda: {"step": 2})  # no snapshot is due: this step is lost
    second = StageRecorder(stage, "loss")
    saved = second.resume()
    assert saved is not None and saved["step"] == 1 and torch.equal(saved["w"], torch.ones(2))
    assert "continuing after step 1" in capsys.readouterr().out
    assert stage.history.path.read_text() == "step,loss\n1,2\n"
    telemetry = (stage_module.stores_root() / ".telemetry" / "sft.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in telemetry if '"unit"' in line]
    assert [(event["event"], event["unit"]) for event in told] == [("saved", "step"), ("resumed", "step")]
    assert (told[0]["step"], told[1]["resumed_at"]) == (1, 1)


def test_a_snapshot_of_rows_alone_is_continued_and_noted_too(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    first = StageRecorder(stage)
    first.resume()
    save_always(first)
    first.step(1, 3, {"coefficient": 0.5}, dict)
    second = StageRecorder(stage)
    assert second.resume() == {} and second.rows == [{"step": 1, "coefficient": 0.5}]
    assert "continuing after step 1" in capsys.readouterr().out


def test_a_snapshot_is_due_by_steps_too(stage: Stage) -> None:
    runtime = dataclasses.replace(stage.params.runtime, checkpoint_steps=2)
    stage.params = dataclasses.replace(stage.params, runtime=runtime)
    recorder = StageRecorder(stage)
    recorder.resume()
    saved = []
    for step in (1, 2, 3):
        recorder.step(step, 4, {}, lambda step=step: saved.append(step) or {})  # type: ignore[misc]
    assert saved == [2]


def test_work_of_other_inputs_is_never_taken(stage: Stage) -> None:
    first = StageRecorder(stage)
    first.resume()
    save_always(first)
    first.step(1, 3, {"loss": 2.0}, lambda: {"step": 1})
    stage.__dict__["key"] = "4567"
    assert StageRecorder(stage).resume() is None


def test_a_finished_stage_leaves_no_unfinished_work(stage: Stage) -> None:
    recorder = StageRecorder(stage)
    recorder.resume()
    save_always(recorder)
    recorder.step(1, 3, {"loss": 2.0}, lambda: {"step": 1})
    assert recorder.snapshot.exists()
    stage.finish()
    assert not recorder.snapshot.parent.exists()


def test_only_the_newest_unfinished_runs_are_kept(stage: Stage) -> None:
    for key in ("a", "b", "c", "d"):
        stage.__dict__["key"] = key
        recorder = StageRecorder(stage)
        recorder.resume()
        save_always(recorder)
        recorder.step(1, 3, {"loss": 2.0}, lambda: {"step": 1})
        end_of_process(stage)
    assert len(list(recorder.snapshot.parent.parent.iterdir())) == stage.params.runtime.resume_folders == 3
    assert recorder.snapshot.exists()


def test_the_last_step_is_saved_too_and_asked_to_stop_in_it_the_stage_stops(stage: Stage) -> None:
    first = StageRecorder(stage, "loss")
    first.resume()
    first.step(1, 2, {"loss": 2.0}, lambda: {"step": 1})
    stage.ask_to_stop(signal.SIGTERM, None)  # in the step after which the training stops by itself
    with pytest.raises(SystemExit) as stopped:
        first.over(lambda: {"step": 1})
    assert stopped.value.code == 143 and not stage.stoppable
    stage.stop_signal = 0
    second = StageRecorder(stage, "loss")
    assert second.resume() == {"step": 1} and second.rows == [{"step": 1, "loss": 2.0}]
    second.over(lambda: pytest.fail("nothing new is to be saved"))
    assert not stage.stoppable


def test_a_second_training_has_its_own_snapshots_and_leaves_the_history_alone(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.params = dataclasses.replace(stage.params, runtime=dataclasses.replace(stage.params.runtime, skip_steps=1))
    for part in (None, "tuning"):
        recorder = StageRecorder(stage, part=part)
        recorder.resume()
        save_always(recorder)
        assert not recorder.takes("", {"loss": float("nan")})
        recorder.step(1, 3, {part or "loss": 1.0}, lambda part=part: {"of": part})  # type: ignore[misc]
    assert stage.skipped_steps == 2
    stage.skipped_steps = 0  # another process
    found = [StageRecorder(stage, part=part).resume() for part in (None, "tuning")]
    assert found == [{"of": None}, {"of": "tuning"}] and stage.skipped_steps == 2
    assert stage.history.path.read_text() == "step,loss\n1,1\n"
    assert "continuing after tuning step 1 of" in capsys.readouterr().out
