"""A side of a comparison in its own process: `python -m benchmarks.worker MODULE:FUNCTION OPTIONS [tidy]`, options in JSON.

Reads a repeat's number a line, prepares that repeat, times it, and answers with a line of JSON. Whatever else the side prints
goes to standard error.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Figures = dict[str, float]
Prepare = Callable[[int], Callable[[], Figures]]  # of a repeat's number: what is made before the clock starts


def main() -> None:
    target, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = target.split(":")
    prepare: Prepare = getattr(importlib.import_module(module), name)(**options)
    begun = peak_mib()
    for line in sys.stdin:
        if "tidy" in sys.argv[3:]:
            tidy()
        answers.write(json.dumps(timed(prepare(int(line))) | {"peak_mib": peak_mib(), "begun_mib": begun}) + "\n")
        answers.flush()


def tidy() -> None:
    """Give back what the repeat before left behind, so that it is not counted to the next one's peak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def timed(work: Callable[[], Figures]) -> dict[str, Any]:
    """CPU seconds of the whole process, wall seconds, and what the work says of itself."""
    wall, cpu = time.perf_counter(), time.process_time()
    figures = work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "figures": figures}


def peak_mib(used: resource.struct_rusage | None = None) -> float:
    """The most memory a process held, MiB: this one so far, or the one that has used so much."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return (used or resource.getrusage(resource.RUSAGE_SELF)).ru_maxrss / unit


if __name__ == "__main__":
    main()
