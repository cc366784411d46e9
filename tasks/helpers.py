"""The other processes of a stage, where `compute.processes` is above 1: each runs the stage's own command and computes a share.

A helper sees the project through a folder of links, in which it may write what the stage writes without anybody seeing it; no
model and no snapshot. It ends with the stage, however that ends.
"""

import atexit
import json
import os
import sys
import tempfile
import threading
import time
from collections import deque
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import process
from tasks.stage import HELPER, ROOT, Stage, StageError, stores_root
from tasks.unfinished import LOCK

if TYPE_CHECKING:
    import torch

    from apprentice.team import Team

Scratch = tempfile.TemporaryDirectory[str]
PATIENCE = 3600.0  # seconds that one process may be behind another
GRACE = 2.0  # seconds for the stage to end by itself, for the same reason, once a helper has
UNSHARED = ("pretrain", "foreign", "judge", "bt_reward")  # stages whose loop is one process's


@cache
def team_of(stage: Stage, device: "torch.device") -> "Team":
    """The processes of the stage: itself alone, or with helpers, which are started here; in a helper, its place among them."""
    from apprentice.team import ALONE, join

    size = stage.params.compute.processes
    if size == 1 or stage.name in UNSHARED:
        return ALONE
    if stage.helper:
        return join(stage.helper["rank"], size, stage.helper["meeting"], device, PATIENCE)
    _check_devices(size, device)
    scratch = tempfile.TemporaryDirectory(prefix="apprentice-team-")
    helpers = [Helper(stage, rank, scratch) for rank in range(1, size)]
    team = join(0, size, meeting(scratch), device, PATIENCE)

    def end() -> None:
        for helper in helpers:
            helper.end()
        scratch.cleanup()

    stage.at_end(end)
    atexit.register(end)  # where it ends in another way
    stage.say(f"{size} processes share the work")
    return team


def _check_devices(size: int, device: "torch.device") -> None:
    from torch import cuda

    if device.type == "mps" or (device.type == "cuda" and cuda.device_count() < size):
        there = "MPS is one device" if device.type == "mps" else f"{cuda.device_count()} can be seen"
        raise StageError(
            f"compute.processes: {size} processes need a device each, and {there}; lower it, or compute.device: cpu"
        )


def meeting(scratch: Scratch) -> str:
    """Where the processes meet."""
    return f"file://{scratch.name}/meeting"


class Helper:
    """One more process of a stage, in a folder of its own under `scratch`."""

    def __init__(self, stage: Stage, rank: int, scratch: Scratch) -> None:
        self.stage, self.rank, self.scratch, self.ending = stage, rank, scratch, False
        self.lines: deque[str] = deque(maxlen=20)
        root = Path(scratch.name) / str(rank)
        link_project(stage, root)
        told = {"rank": rank, "meeting": meeting(scratch), "key": stage.key, "root": str(root)}
        own = {HELPER: json.dumps(told), "DVC_ROOT": str(root), "DVC_STAGE": stage.label}
        command = [sys.executable, "-m", f"tasks.{stage.name}", *filter(None, [stage.item])]
        self.child = process.start(command, ROOT, {**os.environ, **own}, patience=1.0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Keep what it says; where it ends before the stage, show it."""
        assert self.child.stdout
        self.lines.extend(self.child.stdout)
        self.child.wait()
        time.sleep(GRACE)
        if not self.ending:
            said = "".join(f"    {line}" for line in self.lines)
            print(
                f"[{self.stage.name}] process {self.rank} of {self.stage.params.compute.processes} ended; it said last:\n{said}"
                f"[{self.stage.name}] the same command goes on from the last snapshot",
                file=sys.stderr,
                flush=True,
            )
            self.scratch.cleanup()
            os._exit(2)  # the work waits for it, where no exception can break in

    def end(self) -> None:
        """The work is over."""
        self.ending = True
        assert self.child.stdin
        if not self.child.stdin.closed:
            self.child.stdin.close()
        self.child.wait()


def link_project(stage: Stage, root: Path) -> None:
    """A folder in which the stage's params, data, other stages' reports and last snapshots are found, and what is written is
    written to it alone."""
    root.mkdir()
    for name in ("params.yaml", "dvc.yaml", "methods"):
        (root / name).symlink_to(ROOT / name)
    folders = [(folder, root / "data" / folder.name) for folder in stage.data.iterdir() if folder.is_dir()]
    unfinished = Path(".resume") / stage.label / stage.key
    for source, target in [*folders, (stores_root() / unfinished, root / unfinished)]:
        target.mkdir(parents=True)
        if source.is_dir():
            for child in source.iterdir():
                if child.name != LOCK and child != stage.data / "reports" / stage.name:  # the stage has them
                    (target / child.name).symlink_to(child.resolve())
