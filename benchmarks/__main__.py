"""Measure speed side by side with peers: `python -m benchmarks [--only FAMILY] [--runs N]`."""

import argparse
import importlib
import subprocess
import sys
import time

from benchmarks.measure import BenchmarkError
from benchmarks.results import Results

FAMILIES = {  # what measures each family, and its rounds
    "ppo": ("ppo:family", 5),
    "sft": ("fine_tuning:sft", 5),
    "dpo": ("fine_tuning:dpo", 5),
    "sampling": ("sampling:family", 3),
    "scoring": ("scoring:family", 5),
    "packing": ("packing:family", 5),
    "rejection": ("rejection:family", 5),
    "tables": ("tables:family", 1),
    "limit": ("limit:family", 3),
    "growth": ("growth:family", 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=FAMILIES, help="one family; the figures of the others stay")
    parser.add_argument("--runs", type=int, help="rounds of each comparison")
    asked = parser.parse_args()
    if asked.only:
        measure(asked.only, asked.runs)
        return
    for name in FAMILIES:  # in a process each: what one held of memory is counted to the processes that it starts
        command = [sys.executable, "-m", "benchmarks", "--only", name, *(["--runs", str(asked.runs)] if asked.runs else [])]
        if code := subprocess.call(command):
            sys.exit(code)


def measure(name: str, asked: int | None) -> None:
    """One family, in so many rounds or its own."""
    target, runs = FAMILIES[name]
    module, function = target.split(":")
    began, results = time.monotonic(), Results(name)
    try:
        getattr(importlib.import_module(f"benchmarks.{module}"), function)(results, asked or runs)
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {name}: {error}")
    results.save()
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
