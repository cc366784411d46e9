"""The pairs a reward model learns from, by the table its section opens; the reward models as they stand on disk."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apprentice.compute import CPU
from apprentice.demonstrations import prompt_id, write_jsonl
from apprentice.judge import PreferencePair
from apprentice.policy import decode_responses
from apprentice.reward_model import bt_rewards, new_reward_model
from apprentice.sampling import Request, sample
from apprentice.tokens import collate, encode_prompt
from tasks.ranking import judge_of, ranked_pairs, reward_model_of, room
from tasks.stage import Stage, StageError
from tests.apprentice.toys import hash_of
from tests.tables import candidates, speaker, words, write_answers, write_candidates, write_model, write_table

StageOf = Callable[..., Stage]


def pairs_of(stage: Stage) -> list[PreferencePair]:
    return ranked_pairs(stage, words(), CPU)


def test_each_demonstration_is_over_the_models_own_samples(stage_of: StageOf, tmp_path: Path) -> None:
    # no other table is there to be read
    stage = stage_of("judge", **{"judge.samples": 12, "judge.max_new_tokens": 3, "seed": 5})
    write_model(tmp_path / "data", "sft", speaker())
    write_table(tmp_path / "data", "demonstrations", ("q", "x"), ("p", "x"), ("p q", "y y"))
    found = pairs_of(stage)
    wanted = []
    for prompt, response in (("q", "x"), ("p", "x"), ("p q", "y y")):
        requests = [Request(encode_prompt(words(), prompt), prompt_id(prompt), n) for n in range(12)]
        drawn = sample(speaker(), requests, seed="5/judge", end=words().eos_token_id, max_new_tokens=3)
        texts = decode_responses(words(), drawn.response_ids())
        wanted += [PreferencePair(prompt, response, text, "demonstrations") for text in texts if text != response]
    assert found == wanted
    counts = Counter(pair.prompt for pair in found)
    assert 0 < counts["q"] < 12 and counts["p"] == 0  # after p the model says what was demonstrated
    assert pairs_of(stage) == found


def test_right_candidates_are_over_wrong_ones(stage_of: StageOf, tmp_path: Path) -> None:
    write_answers(tmp_path / "data", {"p": "x", "q": "y", "x": "x"})
    write_candidates(
        tmp_path / "data",
        # cut off, a response is neither right nor wrong
        candidates("p", ("x", 0.0, False), ("y", 9.0), ("x", 0.0), ("q", 1.0, False), (" x", 0.0), ("p", 0.0), ("y y", 0.0)),
        candidates("q", ("y", 0.0), ("y", 0.0)),
        candidates("x", ("x", 0.0), ("q", 0.0), ("x", 0.0)),
        candidates("unknown", ("x", 0.0), ("y", 0.0)),
    )
    assert pairs_of(stage_of("bt_reward", **{"bt_reward.labels": "answers"})) == [
        PreferencePair("p", "x", "y", "answers"),
        PreferencePair("p", " x", "p", "answers"),
        PreferencePair("x", "x", "q", "answers"),
    ]


def test_labelled_pairs_are_taken_as_they_are_but_for_equal_texts(stage_of: StageOf, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "p"}]
    rows = [("p", "x", "y"), (chat, "y", "x"), ("q", "x", "x")]
    table = [{"prompt": prompt, "chosen": a, "rejected": b, "id": "other columns"} for prompt, a, b in rows]
    write_jsonl(tmp_path / "data" / "clean" / "preferences.jsonl", table)
    found = pairs_of(stage_of("judge", **{"judge.labels": "preferences"}))
    assert found == [PreferencePair("p", "x", "y", "preferences"), PreferencePair(chat, "y", "x", "preferences")]


@pytest.mark.parametrize("labels", ["prompts", "answers", "preferences"])
def test_no_pair_at_all_stops_with_advice(stage_of: StageOf, tmp_path: Path, labels: str) -> None:
    data = tmp_path / "data"
    write_model(data, "sft", speaker())
    write_table(data, "demonstrations", ("p", "x"))  # what the model says anyway
    write_answers(data, {"p": "x"})
    write_candidates(data, candidates("p", ("x", 0.0), ("x", 1.0)))
    write_jsonl(data / "clean" / "preferences.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}])
    with pytest.raises(StageError, match=rf"judge.labels: '{labels}' gave no pair of different texts"):
        pairs_of(stage_of("judge", **{"judge.labels": labels}))


def test_without_answers_the_labels_answers_are_refused(stage_of: StageOf, tmp_path: Path) -> None:
    write_answers(tmp_path / "data", {})
    with pytest.raises(StageError, match=r"answers.jsonl is empty"):
        pairs_of(stage_of("judge", **{"judge.labels": "answers"}))


def frozen(model: Any) -> bool:
    return not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_judge_is_loaded_frozen_with_all_its_positions(stage_of: StageOf, tmp_path: Path) -> None:
    write_model(tmp_path / "data", "judge", speaker(0.9))
    judge = judge_of(stage_of("pairwise_ppo"), CPU)
    assert hash_of(judge.model) == hash_of(speaker(0.9))
    assert frozen(judge.model)
    assert judge.max_tokens == room(judge.model) == judge.model.config.max_position_embeddings == 64
    assert judge.labels == tuple(words().convert_tokens_to_ids(["<yes>", "<no>"]))


def test_the_reward_model_is_loaded_frozen(stage_of: StageOf, tmp_path: Path) -> None:
    write_model(tmp_path / "data", "sft", speaker())
    model = new_reward_model(tmp_path / "data" / "models" / "sft")
    nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    write_model(tmp_path / "data", "bt_reward", model)
    loaded, batch = reward_model_of(stage_of("bt_ppo"), CPU), collate([[1], [2, 3]], [[3], [4, 5]], 0)
    assert torch.equal(bt_rewards(loaded, batch), bt_rewards(model, batch).detach())
    assert hash_of(loaded) == hash_of(model)
    assert frozen(loaded)
