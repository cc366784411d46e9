"""Snapshots of a stage's training, in its folder of unfinished work: outside DVC's outputs, which DVC removes before a run.

A snapshot is one safetensors file for the tensors and one JSON file for the rest, in a folder that appears under its name only
when whole.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apprentice.demonstrations import fsync_folder, fsync_inside
from apprentice.recorder import Recorder, State
from tasks.room import writing
from tasks.stage import Stage
from tasks.unfinished import prune, take


class StageRecorder(Recorder):
    """Writes `history.csv`, progress and telemetry as steps happen, a snapshot when one is due, and one at the end.

    `part` names a training beside the stage's own: its snapshots stand apart, and its rows are in no history.
    """

    def __init__(self, stage: Stage, *shown: str, part: str | None = None) -> None:
        super().__init__(stage.params.runtime.skip_steps)
        self.stage, self.shown = stage, shown
        self.unit, self.history = (f"{part} step", None) if part else ("step", stage.history)
        self.snapshot = take(stage) / (part or "last")
        self._saved, self._saved_step = time.monotonic(), 0

    def resume(self) -> State | None:
        """The last snapshot of this very work, if it was interrupted; the history is rewritten up to it."""
        saved = load_state(self.snapshot)
        self.rows = saved.pop("rows") if saved else []
        self.taken, self.skipped, self.skipped_in_a_row = saved.pop("counts") if saved else (0, 0, 0)
        self.stage.skipped_steps += self.skipped
        if self.history:
            self.history.start(self.rows)
        if saved is not None:  # one of rows alone is empty by now
            self.stage.resumed(self.unit, len(self.rows))
        self.stage.start_clock()
        self._saved, self._saved_step = time.monotonic(), len(self.rows)
        self.stage.stoppable = True
        return saved

    def skips(self, where: str, figures: Mapping[str, float | None]) -> bool:
        """Tell the stage of each step that is skipped."""
        skip = super().skips(where, figures)
        self.stage.skipped_steps += skip
        return skip

    def step(self, done: int, total: int, row: Mapping[str, float | None], state: Callable[[], State]) -> None:
        """Append to the history, show progress, snapshot when one is due."""
        super().step(done, total, row, state)
        if self.history:
            self.history.append(self.rows[-1])
        self.stage.progress(done, total, **{name: value for name in self.shown if (value := row.get(name)) is not None})
        if self.stage.agree(done < total and (self.stage.snapshot_due(done, self._saved) or self.stage.stop_signal > 0)):
            self._save(state)
            self.stage.saved(self.unit, done)

    def over(self, state: Callable[[], State]) -> None:
        """Snapshot the last step: the stage, or DVC after it, may be killed before the work is in dvc.lock."""
        done = len(self.rows)
        new = done > self._saved_step
        if new:
            self._save(state)
        self.stage.stoppable = False
        if new or self.stage.stop_signal:
            self.stage.saved(self.unit, done)

    def bad_sign(self, message: str) -> None:
        """Warn or stop, by `runtime.on_bad_sign`."""
        self.stage.bad_sign(message)

    def warn(self, message: str) -> None:
        """Print a warning and keep it in the telemetry."""
        self.stage.warn(message)

    def _save(self, state: Callable[[], State]) -> None:
        from apprentice.sharding import take_part

        if self.stage.helper:
            take_part(state())
        else:
            prune(self.stage)
            counts = [self.taken, self.skipped, self.skipped_in_a_row]
            save_state(self.snapshot, {**state(), "rows": self.rows, "counts": counts})
        self._saved, self._saved_step = time.monotonic(), len(self.rows)


def save_state(folder: Path, state: State) -> None:
    """Write a state atomically: the previous one stays whole until the new one is, and has its name on disk."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    rest = _take_tensors(state, "", tensors)
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    text = json.dumps(rest)
    needed = len(text) + sum(tensor.nbytes for tensor in tensors.values())
    with writing(partial, needed, "the previous snapshot stays"):
        partial.mkdir()
        save_file(tensors, partial / "tensors.safetensors")
        (partial / "rest.json").write_text(text)
        fsync_inside(partial)
    if folder.exists():  # else a crash left `old` alone, and it stays until the new state has its name
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> State | None:
    """Read what `save_state` wrote, the previous state if a crash fell between its last two renames; None if there is none."""
    from safetensors.torch import load_file

    old = folder.with_name(f"{folder.name}.old")
    folder = folder if folder.exists() else old
    if not folder.exists():
        return None
    tensors = load_file(folder / "tensors.safetensors")
    state: State = _put_tensors(json.loads((folder / "rest.json").read_text()), tensors)
    return state


def _take_tensors(value: Any, key: str, tensors: dict[str, Any]) -> Any:
    """Replace each tensor in nested dicts and lists by a reference, gathering the tensors, whole."""
    if hasattr(value, "detach"):
        from apprentice.sharding import whole

        tensors[key] = whole(value).clone()
        return {"tensor": key}
    if isinstance(value, dict):
        return {name: _take_tensors(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, list):
        return [_take_tensors(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"} and value["tensor"] in tensors:
            return tensors[value["tensor"]]
        return {name: _put_tensors(item, tensors) for name, item in value.items()}
    return [_put_tensors(item, tensors) for item in value] if isinstance(value, list) else value
