"""How many torch stages may run side by side, and on which devices each.

Two torch stages on one contended core cost a factor of ten, so each process of a stage has `compute.threads` cores of its own,
or a GPU. Other stages are small and need no place.
"""

import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apprentice.config import Params
from tasks.process import Stopped, stopping
from tasks.stage import read_params
from tasks.warm import warm_python

PATIENCE = 3.0  # seconds to wait for a place before saying so
Place = dict[str, str]  # environment variables of a stage in this place


class Slots:
    """A fixed number of places; each holds one stage at a time."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self._python: Place = {}
        self._free: queue.Queue[Place] = queue.Queue()
        for place in places:
            self._free.put(place)

    @contextmanager
    def take(self, torch: bool, say: Callable[[str], None]) -> Iterator[Place]:
        """Wait for a free place and hold it; a stage without torch needs none."""
        if not torch:
            yield {}
            return
        place, asked, told = None, time.monotonic(), False
        while place is None:
            if stopping():
                raise Stopped("while waiting for a place")
            try:
                place = self._free.get(timeout=0.2)
            except queue.Empty:
                if not told and time.monotonic() - asked > PATIENCE:
                    say(f"waiting for a place: {len(self.places)} torch stage(s) at a time (runtime.parallel_stages)")
                    told = True
        try:
            yield {**place, **self._python}
        finally:
            self._free.put(place)

    @contextmanager
    def warm(self) -> Iterator[None]:
        """Let stages in places without a GPU be forked from one Python (tasks/warm.py); at its end waits for theirs.

        CUDA's and Apple's libraries do not work in a process that was forked.
        """
        if any(self.places) or sys.platform != "linux":
            yield
            return
        with warm_python(read_params().runtime.stop_seconds) as folder:
            self._python = {"PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}  # `python` of dvc.yaml
            try:
                yield
            finally:
                self._python = {}


def slots_of(params: Params) -> Slots:
    """`runtime.parallel_stages` places, or as many as there are GPUs or cores for, at least one.

    Each has `compute.processes` GPUs, or that many times `compute.threads` cores. Raises ValueError for too few GPUs.
    """
    compute, size = params.compute, params.compute.processes
    gpus = cuda_devices() if compute.device in ("auto", "cuda") else []
    if gpus and len(gpus) < size:
        raise ValueError(f"compute.processes: {size} processes need a CUDA device each, and {len(gpus)} can be seen")
    teams = [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]
    count = params.runtime.parallel_stages or len(teams) or max(1, cores() // (compute.threads * size))
    return Slots([{"CUDA_VISIBLE_DEVICES": teams[i % len(teams)]} if teams else {} for i in range(count)])


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_devices() -> list[str]:
    """Names of the CUDA devices for CUDA_VISIBLE_DEVICES, without importing torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.split() if found.returncode == 0 else []
