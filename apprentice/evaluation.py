"""Measure one model on held-out prompts: a row of figures per prompt, so that models can be compared in pairs.

The verifier is used here, and by the methods that are not called demonstrations-only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.masking import masked_sum
from apprentice.policy import score
from apprentice.sampling import Request, Rollout, sample
from apprentice.tokens import Batch, collate

Verify = Callable[[int, list[int]], bool]  # (number of the question, response ids without end token) -> right or wrong
Verdict = bool | None  # None: no verifier for this question


@dataclass(frozen=True)
class Questions:
    """Held-out prompts: token ids, keys, and the end token."""

    ids: Sequence[Sequence[int]]
    keys: Sequence[str]
    end: int


def respond(
    model: PreTrainedModel,
    questions: Questions,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: str,
    compute: Compute,
) -> Rollout:
    """`samples` responses to each question, question by question; temperature 0 is greedy."""
    requests = [Request(ids, key, n) for ids, key in zip(questions.ids, questions.keys, strict=True) for n in range(samples)]
    return sample(
        model,
        requests,
        seed=seed,
        end=questions.end,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        compute=compute,
    )


def verdicts(rollout: Rollout, samples: int, checkable: Sequence[bool], verify: Verify) -> list[list[Verdict]]:
    """Per question, whether each of its samples is right; a response cut off by the limit is wrong."""
    ids, ended = rollout.response_ids(), rollout.ended.tolist()
    return [
        [
            (ended[i] and verify(question, ids[i])) if known else None
            for i in range(question * samples, (question + 1) * samples)
        ]
        for question, known in enumerate(checkable)
    ]


def sample_metrics(
    rollout: Rollout, logps: Mapping[str, Tensor], right: Sequence[Sequence[Verdict]]
) -> list[dict[str, float | None]]:
    """Per question, over its samples: self_reward, kl_to_sft, kl_to_base, length, eos_rate, distinct_2 and, where `right` is
    known, sampled_accuracy, pass_at_k and self_reward_auc.

    `logps`: [N, T] of the samples under `model`, `sft` and `base`, all at temperature 1.
    """
    samples = len(right[0])
    mask, lengths = rollout.batch.mask, rollout.batch.response_lengths
    sums = {name: masked_sum(values, mask).view(-1, samples) for name, values in logps.items()}
    rewards = sums["sft"] - sums["base"]
    columns = {
        "self_reward": rewards.mean(1).tolist(),
        "kl_to_sft": (sums["model"] - sums["sft"]).mean(1).tolist(),
        "kl_to_base": (sums["model"] - sums["base"]).mean(1).tolist(),
        "length": lengths.float().view(-1, samples).mean(1).tolist(),
        "eos_rate": rollout.ended.float().view(-1, samples).mean(1).tolist(),
    }
    ids = rollout.response_ids()
    columns["distinct_2"] = [distinct(ids[i : i + samples], 2) for i in range(0, len(ids), samples)]
    return [
        {**_correctness(verdict, reward), **{name: values[question] for name, values in columns.items()}}
        for question, (verdict, reward) in enumerate(zip(right, rewards.tolist(), strict=True))
    ]


def _correctness(right: Sequence[Verdict], rewards: Sequence[float]) -> dict[str, float | None]:
    names = ("sampled_accuracy", f"pass_at_{len(right)}", "self_reward_auc")
    if None in right:
        return dict.fromkeys(names)
    positive = [r for r, ok in zip(rewards, right, strict=True) if ok]
    negative = [r for r, ok in zip(rewards, right, strict=True) if not ok]
    return dict(zip(names, (len(positive) / len(right), float(any(right)), auc(positive, negative)), strict=True))


def auc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Probability that a positive scores above a negative, ties a half; None unless there are both."""
    if not positive or not negative:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def distinct(responses: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of several responses; None when there is none."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def held_out_losses(model: PreTrainedModel, batch: Batch, compute: Compute, temperature: float = 1.0) -> list[float]:
    """Nats per response token of each held-out demonstration."""
    losses: list[float] = (-score(model, batch, compute, temperature).sum(1) / batch.response_lengths).tolist()
    return losses


def best_temperature(model: PreTrainedModel, held_out: Batch, temperatures: Sequence[float], compute: Compute) -> float:
    """The temperature under which held-out demonstrations are likeliest, over all their tokens; no label is used."""
    tokens = held_out.response_lengths.tolist()

    def loss(temperature: float) -> float:
        rows = held_out_losses(model, held_out, compute, temperature)
        return float(sum(row * count for row, count in zip(rows, tokens, strict=True)))

    return min(temperatures, key=loss)


def frozen_logps(
    models: Mapping[str, PreTrainedModel], prompts: Mapping[str, Sequence[Sequence[int]]], batch: Batch, compute: Compute
) -> dict[str, Tensor]:
    """[N, T] log-probabilities of the responses of a batch under each model, each after its own form of the N prompts.

    A model given twice with equal prompts is scored once.
    """
    done: dict[tuple[Any, ...], Tensor] = {}
    found: dict[str, Tensor] = {}
    responses = [row[:n] for row, n in zip(batch.responses.tolist(), batch.response_lengths.tolist(), strict=True)]
    for name, model in models.items():
        key = (id(model), *map(tuple, prompts[name]))
        if key not in done:
            done[key] = score(model, collate(prompts[name], responses, 0).to(compute.device), compute)
        found[name] = done[key]
    return found
