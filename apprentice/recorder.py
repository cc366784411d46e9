"""What a training loop tells the outside: a row of figures each step, and its whole state when a snapshot is due."""

from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, float | None]
State = dict[str, Any]  # nested dicts and lists of tensors, numbers, texts


class Recorder:
    """Keeps rows in memory and no snapshots: enough for a library user or a test. Stages pass one that writes files."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def resume(self) -> State | None:
        """The last snapshot of an interrupted run, or None; restores `rows` with it."""
        return None

    def step(self, done: int, total: int, row: Mapping[str, float | None], state: Callable[[], State]) -> None:
        """Note that step `done` of `total` is over; `state` makes the snapshot, called only when one is due."""
        self.rows.append({"step": done, **row})

    def warn(self, message: str) -> None:
        """Tell the user what is unhealthy."""
        print(f"WARNING: {message}", flush=True)
