"""The recorder that keeps rows in memory."""

import pytest

from apprentice.recorder import Recorder


def test_rows_are_kept_and_no_snapshot_is_made() -> None:
    recorder = Recorder()

    def state() -> dict[str, int]:
        raise AssertionError("a snapshot costs time and must be made only when due")

    recorder.step(1, 2, {"loss": 0.5}, state)
    recorder.step(2, 2, {"loss": None}, state)
    assert recorder.rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert recorder.resume() is None


def test_warnings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Recorder().warn("the reward is noise")
    assert capsys.readouterr().out == "WARNING: the reward is noise\n"
