"""`ingest` and `validate` on tables of 10^4 and more rows: the stages themselves, in a copy of the project."""

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from apprentice.demonstrations import write_jsonl
from benchmarks.measure import ENVIRONMENT, ROOT, BenchmarkError, exponent
from benchmarks.results import Results

SIZES = (10_000, 100_000)
SMALLEST = 1_000  # rows whose time stands for what a stage takes to start
STAGES = ("ingest", "validate")


def family(results: Results, runs: int) -> None:
    """CPU time, rows a second beyond the start, and peak memory of each stage at each size; `runs` is not used."""
    with tempfile.TemporaryDirectory() as folder:
        project = copy_of_project(Path(folder))
        found = {size: measure(project, size) for size in (SMALLEST, *SIZES)}
    for stage in STAGES:
        start = found[SMALLEST][stage]
        for size in SIZES:
            cpu, wall, peak = found[size][stage]
            speed = (size - SMALLEST) / (cpu - start[0])
            results.figure(f"tables/{stage}/{size}", {"cpu": cpu, "wall": wall, "rows_per_cpu_second": speed, "peak_mib": peak})
        grown = {size: found[size][stage][0] - start[0] for size in SIZES}
        results.figure(f"tables/{stage}/growth", {"start_cpu": start[0], "exponent": exponent(grown)})


def copy_of_project(folder: Path) -> Path:
    """The parts of the project that a stage needs, its source set to a file of ours."""
    import yaml

    for part in ("apprentice", "tasks", "methods"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "dvc.lock"))
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
    for part in (".dvcignore", "dvc.yaml"):
        shutil.copy(ROOT / part, folder / part)
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"]["source"] |= {"kind": "jsonl", "path": "source.jsonl"}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


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
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", f"tasks.{stage}"],
            {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(project), "DVC_ROOT": str(project)},
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )
    _, status, used = os.wait4(child, 0)
    if status:
        raise BenchmarkError(f"tasks.{stage} failed:\n{log.read_text()[-2000:]}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return used.ru_utime + used.ru_stime, time.perf_counter() - began, used.ru_maxrss / unit
