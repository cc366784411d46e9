"""Unfinished work of a stage: snapshots under `.resume/<stage>/<key>`, outside DVC's outputs, which DVC removes before a run.

The key is a hash of command, params and inputs, so a changed stage never meets old state. A snapshot is one safetensors
file for the tensors and one JSON file for the rest, in a folder that appears under its name only when whole.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apprentice.recorder import Recorder, State
from tasks.room import writing
from tasks.stage import Stage, stores_root


class StageRecorder(Recorder):
    """Writes `history.csv`, progress and telemetry as steps happen, and a snapshot when one is due."""

    def __init__(self, stage: Stage, *shown: str) -> None:
        super().__init__(stage.params.runtime.skip_steps)
        self.stage, self.shown = stage, shown
        self.folder = resume_folder(stage)
        self._saved = time.monotonic()
        stage.at_end(lambda: clear(stage))

    def resume(self) -> State | None:
        """The last snapshot of this very work, if it was interrupted; the history is rewritten up to it."""
        saved = load_state(self.folder / "last")
        self.rows = saved.pop("rows") if saved else []
        self.taken, self.skipped, self.skipped_in_a_row = saved.pop("counts") if saved else (0, 0, 0)
        self.stage.history.start(self.rows)
        if saved is not None:  # one of rows alone is empty by now
            self.stage.resumed("step", len(self.rows))
        self.stage.start_clock()
        self.stage.stoppable = True
        return saved

    def skips(self, where: str, figures: Mapping[str, float | None]) -> bool:
        """Tell the stage how many steps were skipped."""
        skip = super().skips(where, figures)
        self.stage.skipped_steps = self.skipped
        return skip

    def step(self, done: int, total: int, row: Mapping[str, float | None], state: Callable[[], State]) -> None:
        """Append to the history, show progress, snapshot when one is due."""
        super().step(done, total, row, state)
        self.stage.history.append(self.rows[-1])
        self.stage.progress(done, total, **{name: value for name in self.shown if (value := row.get(name)) is not None})
        self.stage.stoppable = done < total
        if done < total and (self.stage.snapshot_due(done, self._saved) or self.stage.stop_signal):
            prune(self.stage)
            save_state(
                self.folder / "last",
                {**state(), "rows": self.rows, "counts": [self.taken, self.skipped, self.skipped_in_a_row]},
            )
            self._saved = time.monotonic()
            self.stage.saved("step", done)

    def bad_sign(self, message: str) -> None:
        """Warn or stop, by `runtime.on_bad_sign`."""
        self.stage.bad_sign(message)

    def warn(self, message: str) -> None:
        """Print a warning and keep it in the telemetry."""
        self.stage.warn(message)


def resume_folder(stage: Stage) -> Path:
    """Where the unfinished work of a stage stands; of other params, inputs or code elsewhere."""
    return stores_root() / ".resume" / stage.label / stage.key


def clear(stage: Stage) -> None:
    """The stage is done: its unfinished work is no longer needed."""
    shutil.rmtree(resume_folder(stage), ignore_errors=True)


def prune(stage: Stage) -> None:
    """Keep the newest `runtime.resume_folders` unfinished runs of the stage, this one included."""
    folder = resume_folder(stage)
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    folders = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in folders[max(1, stage.params.runtime.resume_folders) :]:
        shutil.rmtree(old, ignore_errors=True)


def save_state(folder: Path, state: State) -> None:
    """Write a state atomically: the previous one stays whole until the new one is."""
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
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if folder.exists():  # else a crash left `old` alone, and it stays until the new state has its name
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
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
    """Replace each tensor in nested dicts and lists by a reference, gathering the tensors."""
    if hasattr(value, "detach"):
        tensors[key] = value.detach().cpu().contiguous().clone()
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
