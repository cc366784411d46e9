"""What starting costs before any work is done: `python -m benchmarks.startup [--runs N]`.

CPU seconds and wall seconds, children included, medians over the runs. A cached `dvc repro` and a cached flow are measured in
the project as it stands: bring it up to date first (`make run`), or they are left out.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.measure import ROOT
from tasks.dvcstage import read_stages
from tasks.warm import warm_python

STACK = "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel"
FLOWS = ("align", "study", "serve", "ui")


def median_cost(command: Sequence[str], runs: int) -> tuple[float, float]:
    """Median CPU and wall seconds of a command; raises CalledProcessError when it fails."""
    costs = [_cost(command) for _ in range(runs)]
    return statistics.median(cpu for cpu, _ in costs), statistics.median(wall for _, wall in costs)


def _cost(command: Sequence[str]) -> tuple[float, float]:
    began, before = time.monotonic(), _cpu()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return _cpu() - before, time.monotonic() - began


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(name: str, command: Sequence[str], runs: int) -> None:
    """Print one line of the table."""
    cpu, wall = median_cost(command, runs)
    print(f"{name:<44}{cpu:>8.2f}{wall:>8.2f}", flush=True)


def up_to_date() -> bool:
    """Whether nothing of the main line would run."""
    command = [sys.executable, "-m", "dvc", "status", "--quiet", "dvc.yaml"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each command (3)")
    runs, python = parser.parse_args().runs, sys.executable
    print(f"{'':<44}{'CPU s':>8}{'wall s':>8}")
    for name in sorted({stage.name.split("@")[0] for stage in read_stages()}):
        show(f"tasks.{name} --help", [python, "-m", f"tasks.{name}", "--help"], runs)
    for name in FLOWS:
        show(f"flows.{name} --help", [python, "-m", f"flows.{name}", "--help"], runs)
    show("python", [python, "-c", ""], runs)
    show("torch", [python, "-c", "import torch"], runs)
    show("torch and transformers", [python, "-c", STACK], runs)
    with warm_python() as folder:
        program = [str(folder / "python"), "-m", "this"]
        subprocess.run(program, check=True, capture_output=True)
        show("a program from the warm Python (caller alone)", program, runs)
    if up_to_date():
        show("dvc repro, cached", [python, "-m", "dvc", "repro"], runs)
        show("dvc repro --single-item, cached", [python, "-m", "dvc", "repro", "--single-item", "sft"], runs)
        show("flows.align, cached", [python, "-m", "flows.align"], runs)


if __name__ == "__main__":
    main()
