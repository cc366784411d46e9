"""From the SFT model's responses to what per-step learning takes: attempts, values of their steps, pairs or weights."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from apprentice.calculator import calculator_steps
from apprentice.compute import Compute
from apprentice.method_sections import PerStepConfig
from apprentice.policy import decode_responses
from apprentice.sampling import sample
from apprentice.sections import FineTuningConfig
from apprentice.spurious import have_cues, is_spurious
from apprentice.steps import (
    Attempt,
    Completed,
    Prefix,
    StepPairs,
    StepWeights,
    advantage_weights,
    attempts_of,
    complete,
    first_pit,
    practical_pairs,
    rollout_values,
    separator_ids,
    shared_prefix_pairs,
    step_advantages,
    verdict_values,
)
from tasks.answers import check_of
from tasks.candidates import tell_where_cut_off
from tasks.checkpoints import scorers_of
from tasks.pairing import pick_prompts, requests_of
from tasks.ppo_training import with_answers
from tasks.stage import Stage, StageError


def lessons(stage: Stage, tokenizer: Any, compute: Compute) -> tuple[StepPairs | StepWeights, dict[str, float]]:
    """Sample, split, verify, value the steps, and make of it what the section's variant learns from; with figures."""
    config, check = stage.config, check_of(stage)
    policy = scorers_of(stage, ["sft"], compute)["sft"]
    separators = separator_ids(tokenizer, config.separator)
    if not separators:
        raise StageError(
            f"perstep.separator: no token of this tokenizer contains {config.separator!r}, so nothing can be split"
        )

    def verify(key: str, ids: list[int]) -> bool:
        return bool(check(key, decode_responses(tokenizer, [ids])[0]))

    end = tokenizer.eos_token_id
    drawn = {"end": end, "max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    rows = pick_prompts(with_answers(stage, check), config.prompts, stage.params.seed)
    stage.say(f"{config.negatives} responses to each of {len(rows)} prompts, values by {config.values}")
    rollout = sample(
        policy, requests_of(rows, tokenizer, config.negatives), seed=f"{stage.params.seed}/perstep", compute=compute, **drawn
    )
    tell_where_cut_off(stage.bad_sign, rollout.ended.tolist(), "perstep.max_new_tokens")
    attempts = attempts_of(rollout, separators, verify)
    planted = have_cues(rows)  # then right ones are valued too, for a figure that nothing learns from
    valued = [row for row in attempts if planted or config.variant == "advantage_weighted" or not row.right]
    completed = {}
    if config.values == "rollouts":
        completed = complete(
            policy, valued, verify, config, seed=f"{stage.params.seed}/perstep/values", end=end, compute=compute
        )
    values = [_values(row, completed, config, tokenizer) for row in attempts]
    if config.variant == "advantage_weighted":
        found: StepPairs | StepWeights = advantage_weights(attempts, values, config.beta, config.max_weight, end)
        dropped: dict[str, int] = {}
    elif config.variant == "shared_prefix":
        found, dropped = shared_prefix_pairs(attempts, values, completed, separators, end)
    else:
        found, dropped = practical_pairs(attempts, values, end)
    figures = _figures(attempts, values) | {"completions": float(config.completions * len(completed))}
    figures |= spurious_advantages(attempts, values, tokenizer) if planted else {}
    return found, figures | {f"dropped_{reason}": float(count) for reason, count in dropped.items()}


def _values(attempt: Attempt, completed: Mapping[Prefix, Completed], config: PerStepConfig, tokenizer: Any) -> list[float]:
    """Values of an attempt's steps, by completions or by the calculator annotations in each step's text.

    Empty for a right response whose steps nobody asks about.
    """
    if config.values == "rollouts":
        asked = completed.keys() >= set(attempt.prefixes())
        return rollout_values(attempt, completed, config.best_of) if asked else []
    return verdict_values([all(calculator_steps(text)) for text in _step_texts(attempt, tokenizer)], attempt.right)


def _step_texts(attempt: Attempt, tokenizer: Any) -> list[str]:
    starts = [0, *attempt.ends[:-1]]
    return decode_responses(tokenizer, [attempt.response[a:b] for a, b in zip(starts, attempt.ends, strict=True)])


def spurious_advantages(attempts: list[Attempt], values: list[list[float]], tokenizer: Any) -> dict[str, float]:
    """Mean advantage of the spurious steps in right responses, and of the other steps there; the first step and the last are
    left out, since one is the choice to work at all, and after the other the value is the verifier's word."""
    found: dict[str, list[float]] = {"spurious_advantage": [], "other_advantage": []}
    for attempt, row in zip(attempts, values, strict=True):
        if attempt.right:
            steps = zip(_step_texts(attempt, tokenizer), step_advantages(row), strict=True)
            for text, advantage in list(steps)[1:-1]:
                found["spurious_advantage" if is_spurious(text) else "other_advantage"].append(advantage)
    return {name: round(fmean(seen), 6) for name, seen in found.items() if seen}


def _figures(attempts: list[Attempt], values: list[list[float]]) -> dict[str, float]:
    wrong = [(row, value) for row, value in zip(attempts, values, strict=True) if not row.right]
    return {
        "responses": float(len(attempts)),
        "wrong": float(len(wrong)),
        "unsplit_share": round(fmean(len(row.ends) == 1 for row in attempts), 6) if attempts else 0.0,
        "prompt_value": round(fmean(value[0] for _, value in wrong), 6) if wrong else 0.0,
        "pit_position": round(fmean(first_pit(value) / len(row.ends) for row, value in wrong), 6) if wrong else 0.0,
    }


def as_weights(config: PerStepConfig) -> FineTuningConfig:
    """The section as fine-tuning with weights takes it."""
    return FineTuningConfig(
        epochs=config.epochs,
        select="last",
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_share=config.warmup_share,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
