"""Measure sides against each other: in alternation, each in a process of its own, as ratios of the same round."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THREADS = 1  # of every side
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "DO_NOT_TRACK": "true",
}


class BenchmarkError(RuntimeError):
    """A benchmark cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Side:
    """What to run: `module:function`, which gets `options` and returns what prepares a repeat (see worker.py), and the
    interpreter that has what it imports. tidy: give memory back between repeats, where it is what is compared: touching it
    anew weighs in repeats of milliseconds."""

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    tidy: bool = False


@dataclass(frozen=True)
class Run:
    """One timed repeat. cpu, wall: seconds. figures: what the side says of its work."""

    cpu: float
    wall: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """A side's runs in their order, warm-up left out. peak_mib: the most its process held; begun_mib: before the first run."""

    runs: Sequence[Run]
    peak_mib: float
    begun_mib: float


class Worker:
    """A side's process, idle between its repeats."""

    def __init__(self, side: Side) -> None:
        command = [
            side.python,
            "-u",
            "-m",
            "benchmarks.worker",
            side.target,
            json.dumps(dict(side.options)),
            *["tidy"] * side.tidy,
        ]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        self.side = side
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
        )

    def said(self) -> str:
        """What it has printed so far."""
        self.log.seek(0)
        return self.log.read()

    def run(self, repeat: int) -> dict[str, Any]:
        """One repeat; raises BenchmarkError with the end of its log when the side fails."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{repeat}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        if not (line := self.process.stdout.readline()):
            end = "\n".join(self.said().splitlines()[-15:])
            raise BenchmarkError(f"{self.side.target} {dict(self.side.options)} ended in repeat {repeat}:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()


def alternate(sides: Mapping[str, Side], runs: int, warm_up: int = 1) -> dict[str, Measured]:
    """Run the sides in turn, A B C A B C ..., `warm_up` rounds unmeasured and then `runs` rounds."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(side)) for name, side in sides.items()}
        for repeat in range(warm_up + runs):
            for name, worker in workers.items():
                answers[name].append(worker.run(repeat))
    return {
        name: Measured(
            [Run(one["cpu"], one["wall"], one["figures"]) for one in given[warm_up:]],
            given[-1]["peak_mib"],
            given[-1]["begun_mib"],
        )
        for name, given in answers.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratio(peer: Measured, ours: Measured) -> dict[str, Any]:
    """The peer's CPU time over ours, round by round: above 1, ours is faster. `wall`: the same of wall time.
    `memory_share`: our peak memory over the peer's, `runs`: how many rounds."""
    rounds = list(zip(peer.runs, ours.runs, strict=True))
    return {
        **spread([theirs.cpu / own.cpu for theirs, own in rounds]),
        "runs": len(rounds),
        "wall": spread([theirs.wall / own.wall for theirs, own in rounds]),
        "memory_share": ours.peak_mib / peer.peak_mib,
    }


def summary(measured: Measured) -> dict[str, Any]:
    """A side's own figures: CPU and wall seconds of every run, peak memory, and the median of what it says of its work."""
    names = measured.runs[0].figures
    return {
        "cpu": [run.cpu for run in measured.runs],
        "wall": [run.wall for run in measured.runs],
        "peak_mib": measured.peak_mib,
        "begun_mib": measured.begun_mib,
        **{name: median(run.figures[name] for run in measured.runs) for name in names},
    }


def exponent(cost: Mapping[int, float]) -> float:
    """The slope of log cost over log size, by least squares: cost grows as size to this power."""
    xs, ys = [math.log(size) for size in cost], [math.log(value) for value in cost.values()]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
