"""Folders of unfinished work, `.resume/<stage>/<key>`: each for one process at a time, dropped once dvc.lock has the work.

The key is a hash of command, params and inputs, so a changed stage never meets old state. A stage that ended under DVC leaves
its folder, marked as finished: DVC hashes and copies for a while yet, and if it is killed there, the next run removes the
outputs and goes on from the last snapshot.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from apprentice.demonstrations import partial_of
from tasks.alone import hold
from tasks.stage import Stage, stores_root

LOCK, FINISHED = "lock", "finished"  # files of a folder, beside its snapshots


def take(stage: Stage) -> Path:
    """The folder of this very work, for this process until the stage ends; waits while another process has it.

    Drops what the stage left of other work that was finished, or never came to a snapshot.
    """
    folder = stores_root() / ".resume" / stage.label / stage.key
    if folder not in stage.held:
        stage.held[folder] = _hold(folder, stage.say)
        for other in filter(_needless, _beside(folder)):
            drop(other)
    return folder


def leave(stage: Stage, folder: Path) -> None:
    """The stage is done: by hand its folder goes, under DVC it is marked as finished, for `sweep` to drop."""
    if not stage.by_hand and folder.exists():
        (folder / FINISHED).touch()
    stage.held.pop(folder).close()
    if stage.by_hand:
        drop(folder)


def prune(stage: Stage) -> None:
    """Keep the newest `runtime.resume_folders` of the stage, this one included, and those that another process has."""
    folder = take(stage)
    folder.mkdir(parents=True, exist_ok=True)  # where somebody removed it by hand
    os.utime(folder)
    for old in _beside(folder)[max(1, stage.params.runtime.resume_folders) - 1 :]:
        drop(old)


def sweep(stage: Stage) -> None:
    """At a stage's start: remove what killed runs left half-written or half-removed, and finished work that dvc.lock has by
    now, so that a forced run begins anew."""
    for half_written in stage.reports.glob(".*"):  # within atomic_write
        half_written.unlink()
    models = stage.data / "models"
    if any(models.glob(partial_of(models / "*").name)):  # of another stage too, which may be writing it now
        from tasks.dvcstage import outputs_of

        for path in outputs_of(stage.label):
            shutil.rmtree(partial_of(path), ignore_errors=True)
    root = stores_root() / ".resume"
    for dropped in root.glob("*/.*"):
        shutil.rmtree(dropped, ignore_errors=True)
    finished = [mark.parent for mark in root.glob(f"*/*/{FINISHED}")]
    if finished:
        from tasks.dvcstage import recorded_keys

        recorded = recorded_keys({folder.parent.name for folder in finished})
        for folder in finished:
            if recorded.get(folder.parent.name) == folder.name:
                drop(folder)


def drop(folder: Path) -> None:
    """Remove a folder that no process has, under a name that nobody reads: killed halfway, it leaves nothing to go on from."""
    with suppress(BlockingIOError, FileNotFoundError), (folder / LOCK).open("a") as file:  # another has it, or dropped it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dropped = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        folder.rename(dropped)
        shutil.rmtree(dropped, ignore_errors=True)


def _hold(folder: Path, say: Callable[[str], None]) -> IO[str]:
    while True:
        with suppress(FileNotFoundError):  # dropped by another process meanwhile
            file, _ = hold(folder / LOCK, say)
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file


def _beside(folder: Path) -> list[Path]:
    """The stage's other folders, the newest first."""
    found = []
    for other in folder.parent.iterdir():
        if other != folder and not other.name.startswith("."):
            with suppress(FileNotFoundError):
                found.append((other.stat().st_mtime, other))
    return [other for _, other in sorted(found, reverse=True)]


def _needless(folder: Path) -> bool:
    """Whether a folder holds finished work, or no snapshot."""
    names = {path.name for path in folder.glob("*")}
    return FINISHED in names or names <= {LOCK}
