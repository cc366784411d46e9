"""Pairs of right and wrong samples on held-out prompts, and what both reward models say of them."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from apprentice.calibration import expected_calibration_error, flip_rate
from apprentice.compute import Compute
from apprentice.evaluation import respond
from apprentice.judge import PreferencePair, order_logits
from apprentice.policy import decode_responses
from apprentice.reward_model import bt_win_logits, encode_pairs
from apprentice.rewards import ranker_reward
from apprentice.verifiers import verify
from tasks.checkpoints import scorers_of, table, tokenizer_of
from tasks.measuring import Measured, Row
from tasks.ranking import judge_of, reward_model_of
from tasks.stage import Stage, StageError


def judged_pairs(stage: Stage, compute: Compute) -> list[tuple[str, PreferencePair]]:
    """A right and a wrong sample of the SFT model, both ended, for each held-out prompt that has them: (row id, pair)."""
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
        right = [text for text in drawn if verify(row.meta["verifier"], text, row.answer or "")]
        wrong = [text for text in drawn if not verify(row.meta["verifier"], text, row.answer or "")]
        if right and wrong:
            found.append((row.id, PreferencePair(row.prompt, right[0], wrong[0], row.meta["domain"])))
    if not found:
        raise StageError("calibration: no held-out prompt has a right and a wrong sample; raise calibration.samples")
    return found


def logits_of(stage: Stage, pairs: Sequence[tuple[str, PreferencePair]], compute: Compute) -> list[Row]:
    """For each pair the logit that its first response wins under either model, which one is first being a coin flip."""
    rng = random.Random(f"{stage.params.seed}/calibration")
    shown = []
    for _, pair in pairs:
        right_first = rng.random() < 0.5
        first, second = (pair.chosen, pair.rejected) if right_first else (pair.rejected, pair.chosen)
        shown.append((PreferencePair(pair.prompt, first, second, pair.source), right_first))
    one, other = order_logits(judge_of(stage, compute), [(p.prompt, p.chosen, p.rejected) for p, _ in shown])
    first, second = encode_pairs(tokenizer_of(stage, "sft"), [pair for pair, _ in shown])
    scalar = bt_win_logits(reward_model_of(stage, compute), first.to(compute.device), second.to(compute.device), compute)
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
    for name in ("judge", "bt_reward"):
        logits = column(name)
        right = ((logits > 0) == (outcomes > 0.5)).double() * (logits != 0) + 0.5 * (logits == 0)
        found[f"{name}_accuracy"] = round(float(right.mean()), 6)
        found[f"{name}_calibration_error"] = round(expected_calibration_error(logits.sigmoid(), outcomes, bins), 6)
    found["judge_flip_rate"] = round(flip_rate(column("judge_first_order"), column("judge_second_order")), 6)
    return found
