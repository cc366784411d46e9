"""The rows of an evaluation: one per held-out prompt, a cell empty where a figure is not defined."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apprentice.compute import Compute
from apprentice.demonstrations import OUT_OF_DOMAIN, Demonstration, atomic_write, prompt_text
from apprentice.evaluation import (
    Questions,
    frozen_logps,
    held_out_losses,
    respond,
    sample_metrics,
    verdicts,
)
from apprentice.policy import decode_responses
from apprentice.tokens import encode_prompts
from apprentice.verifiers import verify
from tasks.checkpoints import batch_of, prompt_keys
from tasks.stage import Stage

Row = dict[str, Any]
HEADLINE = (
    "in_domain/greedy_accuracy",
    "in_domain/sampled_accuracy",
    "out_of_domain/greedy_accuracy",
    "out_of_domain/sampled_accuracy",
    "in_domain/self_reward",
    "in_domain/kl_to_sft",
    "validation/held_out_loss",
)


def measure(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Demonstration],
    stage: Stage,
    compute: Compute,
) -> tuple[list[Row], list[Row]]:
    """Figures per prompt and a greedy and a sampled response to each; `models` are the model itself, sft and base."""
    config = stage.config
    questions = Questions(encode_prompts(tokenizer, [row.prompt for row in rows]), prompt_keys(rows), tokenizer.eos_token_id)
    common = {"seed": f"{stage.params.seed}/evaluate", "max_new_tokens": config.max_new_tokens, "compute": compute}
    greedy = respond(models["model"], questions, samples=1, temperature=0.0, **common)
    stage.say("greedy responses done")
    sampled = respond(models["model"], questions, samples=config.samples, temperature=config.temperature, **common)
    stage.say("samples done, scoring")
    logps = frozen_logps(models, sampled.batch, compute)
    known = [row.meta["verifier"] is not None for row in rows]

    def check(question: int, ids: list[int]) -> bool:
        row = rows[question]
        return verify(row.meta["verifier"], decode_responses(tokenizer, [ids])[0], row.answer or "")

    figures = sample_metrics(sampled, logps, verdicts(sampled, config.samples, known, check))
    right = [verdict for (verdict,) in verdicts(greedy, 1, known, check)]
    losses = held_out_losses(models["model"], batch_of(tokenizer, rows, compute), compute)
    table = [
        {
            "id": row.id,
            "domain": row.meta["domain"],
            "greedy_accuracy": None if ok is None else float(ok),
            **own,
            "held_out_loss": loss,
        }
        for row, ok, own, loss in zip(rows, right, figures, losses, strict=True)
    ]
    texts = decode_responses(tokenizer, greedy.response_ids())
    first = decode_responses(tokenizer, sampled.response_ids()[:: config.samples])
    return table, [
        {
            "id": row.id,
            "domain": row.meta["domain"],
            "prompt": prompt_text(row.prompt),
            "answer": row.answer,
            "greedy": text,
            "greedy_correct": ok,
            "sample": other,
        }
        for row, text, ok, other in zip(rows, texts, right, first, strict=True)
    ]


def held_out_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Demonstration], compute: Compute
) -> list[Row]:
    """The validation demonstrations: their loss only."""
    losses = held_out_losses(model, batch_of(tokenizer, rows, compute), compute) if rows else []
    return [{"id": row.id, "domain": "validation", "held_out_loss": loss} for row, loss in zip(rows, losses, strict=True)]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the table, six digits a figure, empty cells where a figure is not defined."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


def headline(rows: Sequence[Row]) -> dict[str, float]:
    """Means of the few figures that `dvc metrics show` compares models by; report.json has them all, with intervals."""
    domains = {"in_domain": ("in_domain",), "out_of_domain": OUT_OF_DOMAIN, "validation": ("validation",)}
    found = {}
    for key in HEADLINE:
        domain, metric = key.split("/")
        values = [row[metric] for row in rows if row["domain"] in domains[domain] and row.get(metric) is not None]
        if values:
            found[key] = round(sum(values) / len(values), 4)
    return found
