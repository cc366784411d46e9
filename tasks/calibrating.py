"""Right and wrong samples on held-out prompts, against each other and against an anchor, and what both reward models say."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apprentice.calibration import expected_calibration_error, flip_rate
from apprentice.compute import Compute
from apprentice.demonstrations import Demonstration, Prompt
from apprentice.evaluation import respond
from apprentice.judge import PreferencePair, order_logits
from apprentice.policy import decode_responses
from apprentice.reward_model import bt_win_logits, encode_pairs
from apprentice.rewards import ranker_reward
from apprentice.spurious import first_is_even
from apprentice.verifiers import verify
from tasks.checkpoints import scorers_of, table, tokenizer_of
from tasks.measuring import Measured, Row
from tasks.ranking import judge_of, rewards_of
from tasks.stage import Stage, StageError

MODELS = ("judge", "bt_reward")
Rankers = Callable[[Sequence[PreferencePair]], tuple[Tensor, Tensor, Tensor]]


class Drawn(NamedTuple):
    """The SFT model's samples to a held-out prompt that ended, each with the verifier's word."""

    row: Demonstration
    texts: list[str]
    right: list[bool]


class Anchored(NamedTuple):
    """A sample beside the first one of its prompt, the anchor. outcome: 1 when it alone is right, 0 when the anchor alone is,
    else 1/2."""

    pair: PreferencePair
    outcome: float


def samples_of(stage: Stage, compute: Compute) -> list[Drawn]:
    """The samples to each held-out prompt that has an answer."""
    config, rows = stage.config, [row for row in table(stage, "evaluation") if row.meta["verifier"] is not None]
    if not rows:
        raise StageError("calibration: no held-out prompt has an answer to check by; set ingest.verifier or leave it out")
    own = Measured(scorers_of(stage, ["sft"], compute)["sft"], tokenizer_of(stage, "sft"))
    rollout = respond(
        own.model,
        own.questions(rows),
        samples=config.samples,
        temperature=1.0,
        max_new_tokens=config.max_new_tokens,
        seed=f"{stage.params.seed}/calibration",
        compute=compute,
    )
    texts, ended = decode_responses(own.tokenizer, rollout.response_ids()), rollout.ended.tolist()
    found = []
    for i, row in enumerate(rows):
        drawn = [texts[n] for n in range(i * config.samples, (i + 1) * config.samples) if ended[n]]
        found.append(Drawn(row, drawn, [verify(row.meta["verifier"], text, row.answer or "") for text in drawn]))
    return found


def judged_pairs(drawn: Sequence[Drawn]) -> list[tuple[str, PreferencePair]]:
    """The first right and the first wrong sample of each prompt that has both: (row id, pair)."""
    found = []
    for row, texts, right in drawn:
        if True in right and False in right:
            chosen, rejected = texts[right.index(True)], texts[right.index(False)]
            found.append((row.id, PreferencePair(row.prompt, chosen, rejected, row.meta["domain"])))
    if not found:
        raise StageError("calibration: no held-out prompt has a right and a wrong sample; raise calibration.samples")
    return found


def anchored(drawn: Sequence[Drawn]) -> list[Anchored]:
    """Each sample against its prompt's anchor, prompts whose samples are all right or all wrong included; equal texts tell
    nothing and are left out."""
    return [
        Anchored(PreferencePair(row.prompt, text, texts[0], row.meta["domain"]), (1 + ok - right[0]) / 2)
        for row, texts, right in drawn
        for text, ok in zip(texts[1:], right[1:], strict=True)
        if text != texts[0]
    ]


def rankers_of(stage: Stage, reward_model: PreTrainedModel, compute: Compute) -> Rankers:
    """Both reward models: N pairs to [N] logits that the first response wins, the judge's in both orders and the
    Bradley-Terry model's."""
    judge, tokenizer = judge_of(stage, compute), tokenizer_of(stage, "sft")

    def win_logits(pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor, Tensor]:
        one, other = order_logits(judge, [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs])
        first, second = encode_pairs(tokenizer, pairs)
        return one, other, bt_win_logits(reward_model, first.to(compute.device), second.to(compute.device), compute)

    return win_logits


def logits_of(stage: Stage, pairs: Sequence[tuple[str, PreferencePair]], rankers: Rankers) -> list[Row]:
    """For each pair the logit that its first response wins under either model, which one is first being a coin flip."""
    rng = random.Random(f"{stage.params.seed}/calibration")
    shown = []
    for _, pair in pairs:
        right_first = rng.random() < 0.5
        first, second = (pair.chosen, pair.rejected) if right_first else (pair.rejected, pair.chosen)
        shown.append((PreferencePair(pair.prompt, first, second, pair.source), right_first))
    one, other, scalar = rankers([pair for pair, _ in shown])
    columns = zip(ranker_reward(one, other).tolist(), one.tolist(), other.tolist(), scalar.tolist(), strict=True)
    return [
        {
            "id": name,
            "domain": pair.source,
            "first_is_right": float(right_first),
            "judge": judge,
            "judge_first_order": one_order,
            "judge_second_order": other_order,
            "bt_reward": bt,
        }
        for (name, _), (pair, right_first), (judge, one_order, other_order, bt) in zip(pairs, shown, columns, strict=True)
    ]


def summary(rows: Sequence[Row], bins: int) -> dict[str, Any]:
    """For either model: pair accuracy and expected calibration error; the judge's flips between orders before averaging."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    outcomes, found = column("first_is_right"), {"pairs": float(len(rows))}
    for name in MODELS:
        logits = column(name)
        right = ((logits > 0) == (outcomes > 0.5)).double() * (logits != 0) + 0.5 * (logits == 0)
        found[f"{name}_accuracy"] = round(float(right.mean()), 6)
        found[f"{name}_calibration_error"] = round(expected_calibration_error(logits.sigmoid(), outcomes, bins), 6)
    found["judge_flip_rate"] = round(flip_rate(column("judge_first_order"), column("judge_second_order")), 6)
    return found


def anchor_summary(stage: Stage, found: Sequence[Anchored], rankers: Rankers) -> dict[str, Any]:
    """For either model the expected calibration error, over all prompts, of the probability that a sample beats the anchor; and
    the gap between prompts of the judge's logit."""
    one, other, scalar = rankers([pair for pair, _ in found])
    judge = ranker_reward(one, other)
    outcomes = torch.tensor([outcome for _, outcome in found], dtype=torch.float64)
    errors = {
        f"{name}_anchor_calibration_error": round(
            expected_calibration_error(logits.double().sigmoid(), outcomes, stage.config.bins), 6
        )
        for name, logits in zip(MODELS, (judge, scalar), strict=True)
    }
    return {"anchored": float(len(found)), **errors, **prompt_gap("judge", [pair.prompt for pair, _ in found], judge)}


def reward_gap(stage: Stage, drawn: Sequence[Drawn], reward_model: PreTrainedModel, compute: Compute) -> dict[str, float]:
    """The gap between prompts of the Bradley-Terry reward, over all samples."""
    rows = [replace(row, response=text) for row, texts, _ in drawn for text in texts]
    rewards = rewards_of(stage, reward_model, rows, compute)
    return prompt_gap("bt_reward", [row.prompt for row in rows], rewards)


def prompt_gap(name: str, prompts: Sequence[Prompt], values: Tensor) -> dict[str, float]:
    """`<name>_prompt_gap`: mean of those of [N] values whose prompt has an even first number, less that of the others.

    Prompts without a number are left out; without both kinds there is no gap.
    """
    both = [
        [value for prompt, value in zip(prompts, values.tolist(), strict=True) if first_is_even(prompt) is even]
        for even in (True, False)
    ]
    return {f"{name}_prompt_gap": round(fmean(both[0]) - fmean(both[1]), 6)} if all(both) else {}
