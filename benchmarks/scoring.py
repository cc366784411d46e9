"""Scoring responses against the plain way: a padded forward over batches in the order given, logits of every position."""

import torch

from apprentice.masking import length_mask
from apprentice.policy import freeze, score
from benchmarks.measure import Side, alternate
from benchmarks.results import Results
from benchmarks.shapes import computing, computing_plainly, make, material
from benchmarks.worker import Figures, Prepare

ROWS, BATCH = 256, 32


def family(results: Results, runs: int) -> None:
    """Both shapes."""
    for shape in ("tiny", "wide"):
        make(shape)
        sides = {
            "ours": Side("benchmarks.scoring:ours", {"shape": shape}),
            "full_logits": Side("benchmarks.scoring:full_logits", {"shape": shape}),
        }
        results.compare(f"scoring/{shape}", alternate(sides, runs))


def ours(shape: str) -> Prepare:
    """Our scorer."""
    given, compute = material(shape), computing()
    model, batch = freeze(given.model("sft")), given.demonstrated(ROWS)
    tokens = float(batch.response_lengths.sum())

    def work() -> Figures:
        return {"sum": float(score(model, batch, compute).sum()), "tokens": tokens}

    return lambda repeat: work


def full_logits(shape: str) -> Prepare:
    """The plain way."""
    given = material(shape)
    computing_plainly()
    model, batch = freeze(given.plain_model("sft")), given.demonstrated(ROWS)
    lengths = batch.prompt_lengths + batch.response_lengths

    @torch.no_grad()
    def work() -> Figures:
        total = 0.0
        for first in range(0, ROWS, BATCH):
            rows = slice(first, first + BATCH)
            ids, width = batch.ids[rows], batch.ids.size(1)
            attended = length_mask(lengths[rows], width)
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
            logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            response = attended - length_mask(batch.prompt_lengths[rows], width)
            total += float((logps * response[:, 1:]).sum())
        return {"sum": total, "tokens": float(batch.response_lengths.sum())}

    return lambda repeat: work
