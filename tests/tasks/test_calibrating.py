"""Right and wrong samples on held-out prompts, what both reward models say of them, and the figures of it by hand."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apprentice.compute import CPU
from apprentice.demonstrations import demonstration, write_demonstrations
from apprentice.judge import Judge, PreferencePair, judge_prompts, label_ids
from apprentice.policy import decode_responses
from apprentice.reward_model import new_reward_model
from apprentice.sampling import Request, sample
from apprentice.tokens import encode_prompt, encode_response
from tasks.calibrating import (
    Anchored,
    Drawn,
    anchor_summary,
    anchored,
    judged_pairs,
    logits_of,
    prompt_gap,
    rankers_of,
    reward_gap,
    samples_of,
    summary,
)
from tasks.checkpoints import prompt_keys
from tasks.stage import Stage, StageError
from tests.apprentice.toys import tiny_llama
from tests.tables import speaker, words, write_model

StageOf = Callable[..., Stage]
QUESTIONS = {"p": "x", "q": "x", "x q": "y y", "p q": "y", "y q": "x", "q q": None}  # prompts and their answers
ROWS = [
    dataclasses.replace(
        demonstration(prompt, answer, "test", answer=answer),
        meta={"verifier": None if answer is None else "exact", "domain": "in_domain" if i % 2 else "long"},
    )
    for i, (prompt, answer) in enumerate(QUESTIONS.items())
]


@pytest.fixture
def stage(stage_of: StageOf, tmp_path: Path) -> Stage:
    write_model(tmp_path / "data", "sft", speaker())
    write_demonstrations(tmp_path / "data" / "clean" / "evaluation.jsonl", ROWS)
    return stage_of("calibration", **{"calibration.samples": 16, "calibration.max_new_tokens": 2, "seed": 3})


def test_a_pair_is_the_first_right_and_the_first_wrong_sample_that_ended(stage: Stage) -> None:
    # after p all are right; `y y` is cut off at two tokens, and so never right; `q q` has no answer
    wanted = []
    for row in ROWS:
        requests = [Request(encode_prompt(words(), row.prompt), prompt_keys([row])[0], n) for n in range(16)]
        drawn = sample(speaker(), requests, seed="3/calibration", end=words().eos_token_id, max_new_tokens=2)
        texts = decode_responses(words(), drawn.response_ids())
        ended = [text for text, done in zip(texts, drawn.ended.tolist(), strict=True) if done]
        if row.prompt != "p":
            assert {"x", "y"} == set(ended) < set(texts)
        if row.answer in ("x", "y") and row.prompt != "p":
            wrong = {"x": "y", "y": "x"}[row.answer]
            wanted.append((row.id, PreferencePair(row.prompt, row.answer, wrong, row.meta["domain"])))
    assert judged_pairs(samples_of(stage, CPU)) == wanted
    assert [pair.prompt for _, pair in wanted] == ["q", "p q", "y q"]


def test_without_any_pair_the_stage_stops_with_advice(stage: Stage) -> None:
    path = stage.data / "clean" / "evaluation.jsonl"
    write_demonstrations(path, [ROWS[0], ROWS[2], ROWS[5]])
    with pytest.raises(StageError, match=r"no held-out prompt has a right and a wrong sample; raise calibration.samples"):
        judged_pairs(samples_of(stage, CPU))
    write_demonstrations(path, [ROWS[5]])
    with pytest.raises(StageError, match=r"no held-out prompt has an answer to check by; set ingest.verifier"):
        judged_pairs(samples_of(stage, CPU))


def reward_model(stage: Stage) -> Any:
    """One with a head that is not zero."""
    write_model(stage.data, "trunk", tiny_llama(5, vocab=len(words()), hidden_size=32, intermediate_size=64))
    model = new_reward_model(stage.data / "models" / "trunk")
    nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def rewarded(model: Any, prompt: str, response: str) -> float:
    """The reward of one response, written out."""
    with torch.no_grad():
        ids = encode_prompt(words(), prompt) + encode_response(words(), response)
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(model.score(hidden))


def test_both_models_are_asked_about_the_pair_as_it_is_shown(stage: Stage) -> None:
    judge, reward = tiny_llama(4, vocab=len(words()), hidden_size=32, intermediate_size=64), reward_model(stage)
    write_model(stage.data, "judge", judge)
    pairs = [(f"row {i}", PreferencePair(f"{'p ' * i}q", "x", "y y", "long")) for i in range(12)]
    rows = logits_of(stage, pairs, rankers_of(stage, reward, CPU))
    assert [row["id"] for row in rows] == [name for name, _ in pairs]
    assert {row["domain"] for row in rows} == {"long"}
    assert 0 < sum(row["first_is_right"] for row in rows) < 12  # a coin
    assert all(len({round(row[name], 3) for row in rows}) > 6 for name in ("judge", "bt_reward"))

    def judged(prompt: str, first: str, second: str) -> float:
        """The logit of yes less that of no, one question at a time."""
        asked = Judge(judge, words(), 64)
        (ids,) = judge_prompts(asked.tokenizer, [(prompt, first, second)], 64)
        yes, no = label_ids(words())
        with torch.no_grad():
            logits = judge(torch.tensor([ids])).logits[0, -1]
        return float(logits[yes] - logits[no])

    for row, (_, pair) in zip(rows, pairs, strict=True):
        first, second = (pair.chosen, pair.rejected) if row["first_is_right"] else (pair.rejected, pair.chosen)
        one, other = judged(pair.prompt, first, second), judged(pair.prompt, second, first)
        assert row["judge_first_order"] == pytest.approx(one, abs=1e-4)
        assert row["judge_second_order"] == pytest.approx(other, abs=1e-4)
        assert row["judge"] == pytest.approx((one - other) / 2, abs=1e-4)
        assert row["bt_reward"] == pytest.approx(
            rewarded(reward, pair.prompt, first) - rewarded(reward, pair.prompt, second), abs=1e-4
        )
    assert logits_of(stage, pairs, rankers_of(stage, reward, CPU)) == rows


def test_every_other_sample_stands_beside_the_first_of_its_prompt() -> None:
    mixed, wrong, single = (row for row in ROWS[:3])
    drawn = [
        Drawn(mixed, ["b", "a", "b", "c", "a"], [False, True, False, False, True]),
        Drawn(wrong, ["c", "b"], [False, False]),  # no pair of right and wrong, and yet an anchor
        Drawn(single, ["a"], [True]),
        Drawn(single, [], []),
        Drawn(mixed, ["a", "b", "d"], [True, False, True]),
    ]
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.source, outcome) for pair, outcome in anchored(drawn)] == [
        (mixed.prompt, "a", "b", "long", 1.0),
        (mixed.prompt, "c", "b", "long", 0.5),
        (mixed.prompt, "a", "b", "long", 1.0),
        (wrong.prompt, "b", "c", "in_domain", 0.5),
        (mixed.prompt, "b", "a", "long", 0.0),
        (mixed.prompt, "d", "a", "long", 0.5),
    ]


def test_the_calibration_against_anchors_by_hand(stage_of: StageOf) -> None:
    pair, ln3 = PreferencePair("q", "x", "y", "long"), math.log(3)  # a probability of 3/4
    found = [Anchored(pair, outcome) for outcome in (1.0, 0.5, 0.0, 0.5)]
    # the judge's orders, averaged: 3/4, 3/4, 1/4, 1/4; the other is sure that each response wins
    logits = (torch.tensor([ln3, 2 * ln3, -ln3, 0.0]), torch.tensor([-ln3, 0.0, ln3, 2 * ln3]), torch.full((4,), 30.0))
    # two bins: mean probability and outcome 3/4 and 3/4, 1/4 and 1/4; all in the upper one, 1 and 1/2
    assert anchor_summary(stage_of("calibration", **{"calibration.bins": 2}), found, lambda pairs: logits) == {
        "anchored": 4.0,
        "judge_anchor_calibration_error": pytest.approx(0.0, abs=1e-6),
        "bt_reward_anchor_calibration_error": pytest.approx(0.5, abs=1e-6),
    }


def test_the_gap_between_prompts_by_hand() -> None:
    prompts = ["4 1", "3 2", "none", "5", "10"]
    values = torch.tensor([1.0, 0.5, 9.0, -0.25, 2.0])
    assert prompt_gap("a", prompts, values) == {"a_prompt_gap": 1.375}  # 3/2 - 1/8
    assert prompt_gap("a", prompts[:1] + prompts[2:3], values[:2]) == prompt_gap("a", prompts[1:4], values[1:4]) == {}


def test_the_judges_gap_is_of_the_logits_against_the_anchors(stage_of: StageOf) -> None:
    found = [Anchored(PreferencePair(prompt, "x", "y", "long"), 0.5) for prompt in ("2", "7 2", "8", "none")]
    logits = (torch.tensor([1.0, 0.5, 2.0, 8.0]), torch.tensor([0.0, -0.5, 1.0, 0.0]), torch.full((4,), 30.0))
    # both orders averaged: 1/2, 1/2, 1/2, 4
    assert anchor_summary(stage_of("calibration"), found, lambda pairs: logits)["judge_prompt_gap"] == 0.0
    logits[0][0] = 4.0  # 2, 1/2, 1/2: 5/4 - 1/2
    assert anchor_summary(stage_of("calibration"), found, lambda pairs: logits)["judge_prompt_gap"] == 0.75


def test_the_scalar_models_gap_is_of_the_rewards_of_all_samples(stage: Stage) -> None:
    model = reward_model(stage)
    asked = {"2 p q": ["x", "y", "x"], "q 3": ["y y"], "12 q": [], "p p 1 4": ["x", "y x"], "q": ["y"]}
    drawn = [Drawn(demonstration(prompt, None, "test"), texts, [True] * len(texts)) for prompt, texts in asked.items()]
    rewards = {prompt: [rewarded(model, prompt, text) for text in texts] for prompt, texts in asked.items()}
    even, odd = rewards["2 p q"], rewards["q 3"] + rewards["p p 1 4"]
    wanted = sum(even) / 3 - sum(odd) / 3
    assert abs(wanted) > 0.1
    assert reward_gap(stage, drawn, model, CPU) == {"bt_reward_prompt_gap": pytest.approx(wanted, abs=1e-4)}
    assert reward_gap(stage, drawn[:1] + drawn[4:], model, CPU) == {}


def row(first_is_right: float, judge: float, orders: tuple[float, float], bt: float) -> dict[str, float]:
    return {
        "first_is_right": first_is_right,
        "judge": judge,
        "judge_first_order": orders[0],
        "judge_second_order": orders[1],
        "bt_reward": bt,
    }


def test_the_summary_by_hand() -> None:
    ln3 = math.log(3)  # a probability of 3/4
    rows = [
        row(1.0, ln3, (ln3, -ln3), -ln3),  # right; wrong
        row(0.0, ln3, (1.0, 0.5), ln3),  # wrong, flips; wrong
        row(0.0, -ln3, (-1.0, 1.0), 0.0),  # right; undecided
        row(1.0, ln3, (1.0, -1.0), 0.0),  # right; undecided
    ]
    found = summary(rows, 2)
    # judge: above one half three of 3/4, two won: |9/4 - 2|; below one of 1/4, none won: 1/4; together over four rows
    # other: 1/4 that won: 3/4; above 3/4 that lost and two of 1/2, of which one won: |7/4 - 1|; together over four
    assert found == {
        "pairs": 4.0,
        "judge_accuracy": 0.75,
        "judge_calibration_error": pytest.approx(0.125, abs=1e-6),
        "bt_reward_accuracy": 0.25,
        "bt_reward_calibration_error": pytest.approx(0.375, abs=1e-6),
        "judge_flip_rate": 0.25,
    }


def test_the_sides_the_answers_are_shown_on_do_not_matter_for_accuracy() -> None:
    rows = [row(1.0, 0.3, (0.2, -0.4), -2.0), row(0.0, 0.7, (1.0, -0.4), -1.0), row(1.0, -0.1, (0.1, 0.3), 0.0)]
    turned = [
        row(1 - r["first_is_right"], -r["judge"], (r["judge_second_order"], r["judge_first_order"]), -r["bt_reward"])
        for r in rows
    ]
    here, there = summary(rows, 1), summary(turned, 1)
    assert {name: here[name] for name in here if "calibration" not in name} == {
        name: there[name] for name in there if "calibration" not in name
    }
    assert here["judge_calibration_error"] == pytest.approx(there["judge_calibration_error"], abs=1e-5)
    assert here["judge_accuracy"] == pytest.approx(1 / 3, abs=1e-5)
