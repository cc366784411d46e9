"""`ingest` and `validate` on tables of 10^4 and more rows: the stages themselves, in a copy of the project."""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apprentice.demonstrations import write_jsonl
from benchmarks.measure import ENVIRONMENT, BenchmarkError, exponent
from benchmarks.results import Results
from benchmarks.worker import peak_mib
from tests.conftest import copy_project

SIZES = (10_000, 100_000, 1_000_000)
SMALLEST = 1_000  # rows whose time stands for what a stage takes to start
STAGES = ("ingest", "validate")


def family(results: Results, runs: int) -> None:
    """CPU time, rows a second beyond the start, and peak memory of each stage at each size; `runs` is not used."""
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder))
        project.set(ingest__source__kind="jsonl", ingest__source__path="source.jsonl")
        project.without_git()
        found = {size: measure(project.root, size) for size in (SMALLEST, *SIZES)}
    for stage in STAGES:
        start = found[SMALLEST][stage]
        for size in SIZES:
            cpu, wall, peak = found[size][stage]
            speed = (size - SMALLEST) / (cpu - start[0])
            results.figure(f"tables/{stage}/{size}", {"cpu": cpu, "wall": wall, "rows_per_cpu_second": speed, "peak_mib": peak})
        grown = {size: found[size][stage][0] - start[0] for size in SIZES}
        results.figure(f"tables/{stage}/growth", {"start_cpu": start[0], "exponent": exponent(grown)})


def measure(project: Path, size: int) -> dict[str, tuple[float, float, float]]:
    """CPU seconds, wall seconds and peak MiB of each stage on that many rows."""
    write_jsonl(project / "source.jsonl", rows(size))
    found = {}
    for stage in ("ingest", "tokenizer", "validate"):
        found[stage] = run_stage(project, stage)
    return found


def rows(count: int) -> list[dict[str, str]]:
    """Distinct prompts and responses of few different words."""
    rng = random.Random(count)
    return [
        {
            "prompt": f"task {i // 1000} {i % 1000} : what is {rng.randrange(1000)} and {rng.randrange(1000)} together ?",
            "response": f"first {rng.randrange(1000)} , then {rng.randrange(1000)} ; answer : {rng.randrange(1000)}",
        }
        for i in range(count)
    ]


def run_stage(project: Path, stage: str) -> tuple[float, float, float]:
    """Run a stage to its end. Raises BenchmarkError with the end of its output when it fails."""
    log, began = project / "log", time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", f"tasks.{stage}"],
            cwd=project,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(project)},
            stdout=file,
            stderr=file,
        )
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise BenchmarkError(f"tasks.{stage} failed:\n{log.read_text()[-2000:]}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began, peak_mib(used)
