"""Packed against padded training steps, on small batches of texts whose lengths differ much (spread) or not at all (even)."""

import dataclasses
import random

from apprentice.layers import set_layers
from apprentice.sft import train_step
from apprentice.tokens import collate
from benchmarks.measure import Side, alternate
from benchmarks.results import Results
from benchmarks.shapes import WIDE_WORDS, computing, wide_model
from benchmarks.worker import Figures, Prepare

LENGTHS = {"spread": (32, 512), "even": (272, 272)}  # tokens of a text, log-uniform
ROWS, BATCHES, WORDS = 8, 4, WIDE_WORDS // 16
FORWARD_TOKENS = 4096  # the whole batch in one pass


def family(results: Results, runs: int) -> None:
    """Both kinds of lengths."""
    for name in LENGTHS:
        options = {"ours": True, "padded": False}
        sides = {side: Side("benchmarks.packing:steps", {"lengths": name, "packing": on}) for side, on in options.items()}
        results.compare(f"packing/{name}", alternate(sides, runs))


def steps(lengths: str, packing: bool) -> Prepare:
    """The gradients of some batches, half of each text its response; the wide shape with fewer words, so that layers count."""
    compute = dataclasses.replace(computing(), forward_tokens=FORWARD_TOKENS, packing=packing)
    model, rng = set_layers(wide_model(WORDS), compute), random.Random(0)
    low, high = LENGTHS[lengths]

    def text() -> list[int]:
        return [rng.randrange(WORDS) for _ in range(round(low * (high / low) ** rng.random()))]

    texts = [[text() for _ in range(ROWS)] for _ in range(BATCHES)]
    batches = [collate([ids[: len(ids) // 2] for ids in batch], [ids[len(ids) // 2 :] for ids in batch], 0) for batch in texts]
    tokens = float(sum(sum(batch.lengths()) for batch in batches))

    def work() -> Figures:
        model.zero_grad()
        return {"loss": sum(train_step(model, batch, compute) for batch in batches) / BATCHES, "tokens": tokens}

    return lambda repeat: work
