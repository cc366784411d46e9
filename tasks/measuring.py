"""The rows of an evaluation: one per held-out prompt, a cell empty where a figure is not defined."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apprentice.compute import Compute
from apprentice.demonstrations import OUT_OF_DOMAIN, Demonstration, atomic_write, prompt_text
from apprentice.evaluation import (
    Questions,
    best_temperature,
    frozen_logps,
    held_out_losses,
    respond,
    sample_metrics,
    verdicts,
)
from apprentice.policy import decode_responses
from apprentice.sampling import Rollout
from apprentice.sections import EvaluateConfig
from apprentice.spurious import CUE, have_cues, spurious_share
from apprentice.tilt import Tilt
from apprentice.tokens import encode_prompts
from apprentice.verifiers import verify
from tasks.candidates import tell_where_cut_off
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
CUES = {"spurious_with_cue": True, "spurious_without_cue": False}


@dataclass(frozen=True)
class Measured:
    """A frozen model (or two decoded as one) and the tokenizer whose template it is prompted by."""

    model: PreTrainedModel | Tilt
    tokenizer: PreTrainedTokenizerBase

    def questions(self, rows: Sequence[Demonstration]) -> Questions:
        """The prompts of rows in this model's form."""
        ids = encode_prompts(self.tokenizer, [row.prompt for row in rows])
        return Questions(ids, prompt_keys(rows), self.tokenizer.eos_token_id)


def measure(
    models: Mapping[str, Measured],
    rows: Sequence[Demonstration],
    validation: Sequence[Demonstration],
    stage: Stage,
    compute: Compute,
) -> tuple[list[Row], list[Row], float]:
    """Figures per prompt, a greedy and a sampled response to each, and the best temperature; `models`: the model, sft, base."""
    config, own = stage.params.evaluate, models["model"]
    questions = own.questions(rows)
    common = {"seed": f"{stage.params.seed}/evaluate", "max_new_tokens": config.max_new_tokens, "compute": compute}
    greedy = respond(own.model, questions, samples=1, temperature=0.0, **common)
    stage.say("greedy responses done")
    sampled = respond(own.model, questions, samples=config.samples, temperature=config.temperature, **common)
    chosen = best_temperature(own.model, batch_of(own.tokenizer, validation, compute), config.temperatures, compute)
    tell_where_cut_off(stage.warn, sampled.ended.tolist(), "evaluate.max_new_tokens")
    few = max(1, config.samples // 2)  # for a mean, half the draws do
    best = respond(own.model, questions, samples=few, temperature=chosen, **common)
    stage.say(f"samples done, at the best temperature {chosen:g} too; scoring")
    logps = _sample_logps(models, rows, sampled, stage.params.evaluate, compute)
    known = [row.meta["verifier"] is not None for row in rows]

    def check(question: int, ids: list[int]) -> bool:
        row = rows[question]
        return verify(row.meta["verifier"], decode_responses(own.tokenizer, [ids])[0], row.answer or "")

    figures = sample_metrics(sampled, logps, verdicts(sampled, config.samples, known, check))
    figures = [{**one, **more} for one, more in zip(figures, spurious_figures(rows, own.tokenizer, sampled), strict=True)]
    right = [verdict for (verdict,) in verdicts(greedy, 1, known, check)]
    at_best = [None if None in found else sum(found) / few for found in verdicts(best, few, known, check)]
    losses = held_out_losses(own.model, batch_of(own.tokenizer, rows, compute), compute)
    figures_by_prompt = [
        {
            "id": row.id,
            "domain": row.meta["domain"],
            "greedy_accuracy": None if ok is None else float(ok),
            **own_figures,
            "best_temperature_accuracy": share,
            "held_out_loss": loss,
        }
        for row, ok, own_figures, share, loss in zip(rows, right, figures, at_best, losses, strict=True)
    ]
    return figures_by_prompt, shown(rows, own.tokenizer, greedy, sampled, right), chosen


def _sample_logps(
    models: Mapping[str, Measured], rows: Sequence[Demonstration], sampled: Rollout, config: EvaluateConfig, compute: Compute
) -> dict[str, Tensor]:
    """[N, T] log-probabilities of the samples under the model, sft and base, at temperature 1; the model's own are those
    recorded while sampling, if they were drawn at that temperature and it is neither of the two."""
    own = models["model"].model
    recorded = config.temperature == 1.0 and all(own is not models[name].model for name in ("sft", "base"))
    scorers = {name: scorer for name, scorer in models.items() if not (recorded and name == "model")}
    prompts = {
        name: [ids for ids in scorer.questions(rows).ids for _ in range(config.samples)] for name, scorer in scorers.items()
    }
    logps = frozen_logps({name: scorer.model for name, scorer in scorers.items()}, prompts, sampled.batch, compute)
    return {"model": sampled.logps, **logps}


def spurious_figures(
    rows: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, sampled: Rollout
) -> list[dict[str, float | None]]:
    """Per prompt, how often its worked samples have the spurious step, by whether its cue is there; nothing where the world
    plants none, which its rows tell."""
    if not have_cues(rows):
        return [{} for _ in rows]
    texts, samples = decode_responses(tokenizer, sampled.response_ids()), len(sampled.keys) // len(rows)
    shares = [spurious_share(texts[i : i + samples]) for i in range(0, len(texts), samples)]
    return [
        {name: share if row.meta.get(CUE) is there else None for name, there in CUES.items()}
        for row, share in zip(rows, shares, strict=True)
    ]


def shown(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    greedy: Rollout,
    sampled: Rollout,
    right: Sequence[bool | None],
) -> list[Row]:
    """A greedy response and a sample of each prompt, for the reader."""
    texts = decode_responses(tokenizer, greedy.response_ids())
    first = decode_responses(tokenizer, sampled.response_ids()[:: len(sampled.keys) // len(rows)])
    return [
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


def held_out_rows(own: Measured, rows: Sequence[Demonstration], compute: Compute) -> list[Row]:
    """The validation demonstrations: their loss only."""
    losses = held_out_losses(own.model, batch_of(own.tokenizer, rows, compute), compute) if rows else []
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
