"""How cost grows with width, length, vocabulary, candidates and rows, each with the exponent fitted to it."""

from collections.abc import Callable

import torch

from apprentice.compute import Compute
from apprentice.layers import set_layers
from apprentice.policy import freeze, score
from apprentice.sampling import Request, sample
from apprentice.sft import train_step
from apprentice.tokens import Batch, collate
from benchmarks.measure import Side, Worker, exponent
from benchmarks.results import Results
from benchmarks.shapes import computing, wide_model
from benchmarks.worker import Figures, Prepare

AXES = {
    "width": (64, 128, 256, 512),
    "length": (64, 128, 256, 512),
    "vocabulary": (2_000, 8_000, 32_000, 150_000),
    "rows": (16, 64, 256, 1024),
    "candidates": (1, 4, 16, 64),
}
WORK = {"width": ("train", "score"), "length": ("train", "score"), "vocabulary": ("train", "score", "sample")}
WORK |= {"rows": ("score", "sample"), "candidates": ("sample",)}


def family(results: Results, runs: int) -> None:
    """CPU time and peak memory of each point, the least of `runs`: other work can only add to it."""
    for axis, sizes in AXES.items():
        for work in WORK[axis]:
            with Worker(Side("benchmarks.growth:points", {"axis": axis, "work": work})) as worker:
                answers = {size: [worker.run(size) for _ in range(runs)] for size in sizes}
            cpu = {size: min(one["cpu"] for one in given) for size, given in answers.items()}
            peak = {f"peak_mib_{size}": given[-1]["peak_mib"] for size, given in answers.items()}
            results.figure(
                f"growth/{axis}/{work}", {"exponent": exponent(cpu)} | {f"cpu_{n}": c for n, c in cpu.items()} | peak
            )


def points(axis: str, work: str) -> Prepare:
    """The points of one axis, asked for by their size in the place of a repeat's number, smallest first."""
    return lambda size: point(axis, size, work)


def point(axis: str, size: int, work: str) -> Callable[[], Figures]:
    """One point; what is not varied: hidden 128, 2 layers, 2,000 words, 64 tokens a row, 16 rows, 1 candidate."""
    given = {"width": 128, "length": 64, "vocabulary": 2_000, "rows": 16, "candidates": 1} | {axis: size}
    compute = computing()
    model = set_layers(wide_model(given["vocabulary"], given["width"], layers=2), compute)
    half = given["length"] // 2
    ids = torch.randint(given["vocabulary"] - 3, (given["rows"], given["length"]), generator=torch.Generator().manual_seed(0))
    batch = collate(ids[:, :half].tolist(), ids[:, half:].tolist(), given["vocabulary"] - 1)
    return {"train": _train, "score": _score, "sample": _sample}[work](model, batch, given["candidates"], compute)


def _train(model: torch.nn.Module, batch: Batch, candidates: int, compute: Compute) -> Callable[[], Figures]:
    return lambda: {"loss": train_step(model, batch, compute)}


def _score(model: torch.nn.Module, batch: Batch, candidates: int, compute: Compute) -> Callable[[], Figures]:
    frozen = freeze(model)
    return lambda: {"sum": float(score(frozen, batch, compute).sum())}


def _sample(model: torch.nn.Module, batch: Batch, candidates: int, compute: Compute) -> Callable[[], Figures]:
    width = int(batch.prompt_lengths[0])
    prompts = batch.ids[:, :width].tolist()
    requests = [Request(prompt, str(i), n) for i, prompt in enumerate(prompts) for n in range(candidates)]

    def draw() -> Figures:
        rollout = sample(model, requests, seed="0", end=-1, max_new_tokens=width, compute=compute)
        return {"tokens": float(rollout.batch.response_lengths.sum())}

    return draw
