"""Pieces of a stage's sampling and scoring, kept as they are made: an interrupted run goes on after the last one kept.

The pieces of equal work are made in equal order, so a piece is known by its place in that order.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from apprentice.compute import Compute, Piece
from tasks.resume import load_state, save_state
from tasks.stage import Stage
from tasks.unfinished import prune, take


def keeping(stage: Stage, compute: Compute) -> Compute:
    """The same compute for a stage's sampling and scoring; not for training, whose snapshots a StageRecorder makes."""
    return replace(compute, keep=KeptPieces(stage))


class KeptPieces:
    """Call it with what makes a piece: the piece of the interrupted run where there is one, else made now and soon saved."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.folder = stage, take(stage) / "pieces"
        self.saved = self._whole()
        self.found = deque(piece for number in range(self.saved) for piece in self._load(number))
        self.made: list[object] = []  # since the last save
        self.count = len(self.found)
        self._saved_at = time.monotonic()
        if self.found:
            stage.resumed("piece", len(self.found))
        stage.stoppable = True
        stage.at_end(self._end)

    def __call__(self, make: Callable[[], Piece]) -> Piece:
        """Raises SystemExit once the pieces are saved, where the stage was asked to stop."""
        if self.found:
            piece: Piece = self.found.popleft()
            return piece
        piece = make()
        self.made.append(piece)
        self.count += 1
        if self.stage.snapshot_due(self.count, self._saved_at) or self.stage.stop_signal:
            self._save()
        return piece

    def _end(self) -> None:
        """Save the last pieces too: DVC may be killed before the work is in dvc.lock."""
        if self.made or self.stage.stop_signal:
            self._save()

    def _save(self) -> None:
        if self.stage.helper:
            return
        prune(self.stage)
        save_state(self.folder / str(self.saved), {"pieces": self.made})
        self.saved, self.made, self._saved_at = self.saved + 1, [], time.monotonic()
        self.stage.saved("piece", self.count)

    def _whole(self) -> int:
        number = 0
        while (self.folder / str(number)).exists():
            number += 1
        return number

    def _load(self, number: int) -> list[Piece]:
        state = load_state(self.folder / str(number))
        assert state is not None
        pieces: list[Piece] = state["pieces"]
        return pieces
