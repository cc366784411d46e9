"""What the stages share that train or use a reward model: its pairs, and the model as it stands in the pipeline."""

from collections.abc import Sequence
from typing import Any

from tasks.stage import Stage, StageError


def ranked_pairs(stage: Stage, tokenizer: Any, compute: Any) -> list[Any]:
    """Pairs to train a reward model on, from the table that the section's `labels` opens.

    prompts: each demonstration over the SFT model's own samples to its prompt; answers: right candidates of `pairs` over wrong
    ones, none cut off; preferences: the labelled pairs as they are. Equal texts make no pair.
    """
    from apprentice.demonstrations import read_jsonl
    from apprentice.judge import PreferencePair

    labels = stage.config.labels
    if labels == "preferences":
        rows = read_jsonl(stage.data / "clean" / "preferences.jsonl")
        pairs = [PreferencePair(row["prompt"], row["chosen"], row["rejected"], labels) for row in rows]
    else:
        pairs = _right_over_wrong(stage) if labels == "answers" else _demonstrated(stage, tokenizer, compute)
    pairs = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not pairs:
        raise StageError(f"{stage.name}.labels: {labels!r} gave no pair of different texts to learn from; take another table")
    return pairs


def _demonstrated(stage: Stage, tokenizer: Any, compute: Any) -> list[Any]:
    from apprentice.evaluation import respond
    from apprentice.judge import PreferencePair
    from apprentice.policy import decode_responses
    from tasks.candidates import tell_where_cut_off
    from tasks.checkpoints import scorers_of, table
    from tasks.measuring import Measured

    rows, config = table(stage, "demonstrations"), stage.config
    own = Measured(scorers_of(stage, ["sft"], compute)["sft"], tokenizer)
    rollout = respond(
        own.model,
        own.questions(rows),
        samples=config.samples,
        temperature=1.0,
        max_new_tokens=config.max_new_tokens,
        seed=f"{stage.params.seed}/judge",
        compute=compute,
    )
    tell_where_cut_off(stage.bad_sign, rollout.ended.tolist(), f"{stage.name}.max_new_tokens")
    texts = decode_responses(tokenizer, rollout.response_ids())
    asked = [row for row in rows for _ in range(config.samples)]
    return [PreferencePair(row.prompt, row.response, text, "demonstrations") for row, text in zip(asked, texts, strict=True)]


def _right_over_wrong(stage: Stage) -> list[Any]:
    from apprentice.judge import PreferencePair
    from tasks.answers import check_of
    from tasks.candidates import prompt_groups

    check, pairs = check_of(stage), []
    for group in prompt_groups(stage, "pairs"):
        ended = [row for row in group if row["ended"]]
        right = [row for row in ended if check(row["prompt_id"], row["response"])]
        wrong = [row for row in ended if check(row["prompt_id"], row["response"]) is False]
        pairs += [
            PreferencePair(a["prompt"], a["response"], b["response"], "answers") for a, b in zip(right, wrong, strict=False)
        ]
    return pairs


def judge_of(stage: Stage, compute: Any) -> Any:
    """The judge of the pipeline, frozen."""
    from apprentice.judge import Judge
    from tasks.checkpoints import scorers_of, tokenizer_of

    model = scorers_of(stage, ["judge"], compute)["judge"]
    return Judge(model, tokenizer_of(stage, "judge"), room(model), compute)


def reward_model_of(stage: Stage, compute: Any) -> Any:
    """The Bradley-Terry reward model of the pipeline, frozen."""
    from apprentice.layers import hold_as_cast
    from apprentice.policy import freeze
    from apprentice.reward_model import load_reward_model
    from tasks.checkpoints import model_folder

    return hold_as_cast(freeze(load_reward_model(model_folder(stage, "bt_reward"), compute)), compute)


def rewards_of(stage: Stage, model: Any, rows: Sequence[Any], compute: Any) -> Any:
    """[N] rewards by such a model of the responses of N rows (`Demonstration`), each to its prompt."""
    import torch

    from apprentice.reward_model import bt_rewards
    from tasks.checkpoints import batch_of, tokenizer_of

    with torch.no_grad():
        return bt_rewards(model, batch_of(tokenizer_of(stage, "sft"), rows, compute), compute)


def room(model: Any) -> int:
    """Positions of a model."""
    return int(model.config.max_position_embeddings)
