"""The recorder that keeps rows in memory."""

import math

import pytest

from apprentice.finite import NumbersError
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


def test_by_default_the_first_figure_that_is_not_finite_stops() -> None:
    recorder = Recorder()
    assert recorder.takes("step 1 of 9", {"loss": 0.5, "held_out_loss": None})
    for odd in (math.nan, math.inf, -math.inf):
        with pytest.raises(NumbersError, match=rf"^step 2 of 9: loss 1.5, grad_norm {odd}$"):
            recorder.takes("step 2 of 9", {"loss": 1.5, "held_out_loss": None, "grad_norm": odd})
    assert (recorder.taken, recorder.skipped) == (1, 0)


def test_so_many_in_a_row_are_skipped_warned_of_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(skip_steps=2)
    losses = [1.0, math.nan, 1.0, math.inf, math.nan, 1.0]
    assert [recorder.takes(f"step {i}", {"loss": loss}) for i, loss in enumerate(losses)] == [True, False] * 2 + [False, True]
    assert (recorder.taken, recorder.skipped) == (3, 3)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": skipped")[0] for line in said] == [
        "WARNING: step 1: loss nan",
        "WARNING: step 3: loss inf",
        "WARNING: step 4: loss nan",
    ]
    assert not recorder.takes("step 6", {"loss": math.nan}) and not recorder.takes("step 7", {"loss": math.nan})
    with pytest.raises(NumbersError, match=r"^step 8: loss nan, after 2 skipped in a row$"):
        recorder.takes("step 8", {"loss": math.nan})


def test_only_a_step_that_is_taken_ends_a_row_of_skipped_ones() -> None:
    recorder = Recorder(skip_steps=1)
    assert recorder.skips("rewards", {"reward": math.nan})
    assert not recorder.skips("rewards", {"reward": 1.0})  # the rewards are fine, the step on them is not
    with pytest.raises(NumbersError):
        recorder.takes("step", {"loss": math.nan})


def test_a_run_of_which_every_step_was_skipped_is_none() -> None:
    recorder = Recorder(skip_steps=9)
    for step in (1, 2):
        assert not recorder.takes("step", {"loss": math.nan})
        if step == 1:
            recorder.step(step, 2, {"loss": None}, dict)
    with pytest.raises(NumbersError, match="step 2 of 2: every step was skipped"):
        recorder.step(2, 2, {"loss": None}, dict)
