"""What one device reaches on models of random weights: `make bench-gpu`, or `python -m benchmarks.gpu`.

Tokens per second, peak memory, and the share of the device's own matrix products in bfloat16, of fine-tuning, scoring,
rollouts, and a whole PPO update. Beside this project it needs torch and transformers alone; for shapes trained as adapters
peft too; where TRL 1.12.0, the last with PPO, can be imported, TRL does the same on the same card, each kind of work alone on
it. Work is counted as model FLOP: 2 a parameter and token that is read or sampled, 6 trained, 4 trained through adapters.
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from apprentice.compute import Compute
from benchmarks import gpu_ours
from benchmarks.gpu_shapes import SHAPES, Shape, Work, parameters
from benchmarks.peer_environment import PPO as TRL

FILE = Path(__file__).with_name("gpu.json")
SIDE = 8192  # of the square matrices by which the device is measured
ENOUGH = 10.0  # seconds of runs, after which none is begun
Figures = dict[str, dict[str, Any]]  # of each kind of work
Side = Callable[[Shape, Compute], dict[str, Work]]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "7b"])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program itself")
    parser.add_argument("--runs", type=int, default=2, help="of each kind of work at most, after one that is not counted")
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device here; --device cpu --shapes tiny tries the program itself")
    compute, there = gpu_ours.computing(asked.device), sides()
    device = compute.device
    found: dict[str, Any] = {"machine": machine(device), "flop_per_second": products(device)}
    for name in asked.shapes:
        found[name] = {}
        for side, works in there.items():
            print(f"{name}, {side}", flush=True)
            found[name][side] = measured(
                works(SHAPES[name], compute), SHAPES[name], device, found["flop_per_second"], asked.runs
            )
            if "trl" in found[name]:
                found[name]["ratio"] = ratio(**found[name])
            write(found, asked.out)
    print(table(found))


def sides() -> dict[str, Side]:
    """Ours, and TRL's where it can be imported."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version == TRL:
        from benchmarks import gpu_trl

        return {"ours": gpu_ours.works, "trl": gpu_trl.works}
    print(
        f"TRL's side is left out: it takes trl {TRL}, and here is {version}; `pip install trl=={TRL}` into the environment of "
        "this Python, or name in PYTHONPATH where it is installed",
        flush=True,
    )
    return {"ours": gpu_ours.works}


def machine(device: torch.device) -> dict[str, str]:
    """The card and the versions."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"card": card, "cuda": str(torch.version.cuda), "torch": torch.__version__, "transformers": transformers.__version__}


def products(device: torch.device) -> float:
    """FLOP a second of square matrix products in bfloat16, the best of five."""
    side = SIDE if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return max(2 * side**3 / seconds(lambda: left @ right, device) for _ in range(5))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of some work, whatever it queued on the device included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measured(works: dict[str, Work], shape: Shape, device: torch.device, limit: float, runs: int) -> Figures:
    """Of each kind of work: seconds, tokens a second, the share of `limit`, and the most memory, GiB (0 without CUDA).
    What finds not enough memory says so instead."""
    found: Figures = {}
    size = parameters(shape)
    for name, work in works.items():
        try:
            taken, peak = timed(work, device, runs)
            found[name] = {
                "seconds": taken,
                "tokens_per_second": work.tokens / taken,
                "share_of_products": work.flop * size / taken / limit,
                "peak_gib": peak,
            }
        except torch.OutOfMemoryError:
            found[name] = {"failed": "out of memory"}
        gc.collect()
        torch.cuda.empty_cache()
        print(f"  {name}: {json.dumps(found[name])}", flush=True)
    return found


def timed(work: Work, device: torch.device, runs: int) -> tuple[float, float]:
    """Median seconds of at most `runs` runs, and peak memory in GiB. The first counts only where it is a long one."""
    run = work.prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = seconds(run, device)
    taken = [first] if first >= ENOUGH else []
    while len(taken) < runs and sum(taken) < ENOUGH:
        taken.append(seconds(run, device))
    return median(taken), torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def ratio(ours: Figures, trl: Figures) -> dict[str, float]:
    """Seconds of TRL for one of ours, where both have some."""
    return {
        name: trl[name]["seconds"] / ours[name]["seconds"]
        for name in ours
        if "seconds" in ours[name] and "seconds" in trl[name]
    }


def write(found: dict[str, Any], out: Path) -> None:
    """The figures, and beside them the table."""
    out.write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(found))


def table(found: dict[str, Any]) -> str:
    """In Markdown, a line for each kind of work of a shape."""
    about, limit = found["machine"], found["flop_per_second"]
    lines = [
        f"{about['card']}, torch {about['torch']}, transformers {about['transformers']}; products reach {limit:.3g} FLOP/s.",
        "",
        "| shape | work | ours, s | TRL, s | TRL for one of ours | our tokens/s | of products | ours, GiB | TRL, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, one in found.items():
        for work, ours in one["ours"].items() if shape in SHAPES else ():
            trl = one.get("trl", {}).get(work, {})
            cells = [ours.get("seconds"), trl.get("seconds"), one.get("ratio", {}).get(work)]
            cells += [ours.get("tokens_per_second"), ours.get("share_of_products"), ours.get("peak_gib"), trl.get("peak_gib")]
            lines.append(f"| {shape} | {work} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    """Three digits; nothing where there is no figure."""
    return "" if value is None else f"{float(f'{value:.3g}'):,g}"


if __name__ == "__main__":
    main()
