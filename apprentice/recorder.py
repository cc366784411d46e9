"""What a training loop tells the outside: a row of figures each step, its whole state when a snapshot is due, and what to do
with a step whose figures are not finite."""

from collections.abc import Callable, Mapping
from typing import Any

from apprentice.finite import NumbersError, all_finite, listed

Row = dict[str, float | None]
State = dict[str, Any]  # nested dicts and lists of tensors, numbers, texts


class Recorder:
    """Keeps rows in memory and no snapshots: enough for a library user or a test. Stages pass one that writes files.

    A step with a figure that is NaN or infinite is skipped, as if its batch had not been there, its row left blank: up to
    `skip_steps` of them in a row; the next one raises NumbersError. `skipped` counts them all.
    """

    def __init__(self, skip_steps: int = 0) -> None:
        self.rows: list[Row] = []
        self.skip_steps = skip_steps
        self.taken = self.skipped = self.skipped_in_a_row = 0

    def resume(self) -> State | None:
        """The last snapshot of an interrupted run, or None; restores `rows` and the counts of steps with it."""
        return None

    def skips(self, where: str, figures: Mapping[str, float | None]) -> bool:
        """Whether to skip what these figures stand for, since one is not finite. Raises NumbersError by the rule above."""
        if all_finite(figures):
            return False
        if self.skipped_in_a_row == self.skip_steps:
            before = f", after {self.skip_steps} skipped in a row" if self.skip_steps else ""
            raise NumbersError(f"{where}: {listed(figures)}{before}")
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.warn(f"{where}: {listed(figures)}: skipped, nothing is trained on it ({self.skipped} so far)")
        return True

    def takes(self, where: str, figures: Mapping[str, float | None]) -> bool:
        """Whether to take the step of these figures: the optimiser's, which ends a row of skipped ones."""
        if self.skips(where, figures):
            return False
        self.taken += 1
        self.skipped_in_a_row = 0
        return True

    def step(self, done: int, total: int, row: Mapping[str, float | None], state: Callable[[], State]) -> None:
        """Note that step `done` of `total` is over; `state` makes the snapshot, called only when one is due.

        Raises NumbersError when the last step is over and all were skipped.
        """
        self.rows.append({"step": done, **row})
        if done == total and self.skipped and not self.taken:
            raise NumbersError(f"step {done} of {total}: every step was skipped, so nothing was learnt")

    def over(self, state: Callable[[], State]) -> None:
        """Note that the training is over, after its last step or a stop before; `state` makes the last snapshot."""

    def bad_sign(self, message: str) -> None:
        """Tell of a sign that the run goes wrong; stages may raise BadSignError instead, before anything is trained on it."""
        self.warn(message)

    def warn(self, message: str) -> None:
        """Tell the user what is unhealthy."""
        print(f"WARNING: {message}", flush=True)
