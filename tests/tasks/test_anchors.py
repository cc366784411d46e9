"""What a response must beat: the demonstration of its prompt, or a draw that is the same whenever the prompt comes up."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.compute import CPU
from apprentice.demonstrations import demonstration, prompt_id
from apprentice.policy import decode_responses
from apprentice.ppo import Prompts
from apprentice.sampling import Request, Rollout, sample
from apprentice.tokens import collate, encode_prompts, encode_responses
from tasks.anchors import anchored_pool, anchored_reward, anchors_of
from tasks.ppo_training import Setting
from tasks.stage import Stage
from tests.tables import speaker, words, write_table

StageOf = Callable[..., Stage]
TEXTS = {"p": "x", "q": None, "x q": None, "p q": "y y", "y": None}  # demonstrations, and prompts without one


@pytest.fixture
def setting() -> Setting:
    rows = [demonstration(prompt, text, "test") for prompt, text in TEXTS.items()]
    tokenizer, keys = words(), [prompt_id(prompt) for prompt in TEXTS]
    prompts = Prompts(encode_prompts(tokenizer, list(TEXTS)), keys, tokenizer.eos_token_id, torch.zeros(16).long(), ("word",))
    return Setting(prompts, dict(zip(keys, rows, strict=True)), tokenizer, CPU, {"sft": speaker()})


@pytest.fixture
def stage(stage_of: StageOf) -> Stage:
    return stage_of("pairwise_ppo", **{"pairwise_ppo.max_new_tokens": 4})


def keys(*prompts: str) -> list[str]:
    return [prompt_id(prompt) for prompt in prompts]


def rolled(setting: Setting, *rows: tuple[str, str], cut: Sequence[int] = ()) -> Rollout:
    """Prompts and responses as if sampled; those in `cut` came to no end."""
    ids = encode_responses(setting.tokenizer, [text for _, text in rows])
    ids = [row[:-1] if i in cut else row for i, row in enumerate(ids)]
    batch = collate(encode_prompts(setting.tokenizer, [prompt for prompt, _ in rows]), ids, 0)
    done = torch.tensor([i not in cut for i in range(len(rows))])
    return Rollout(batch, torch.zeros(batch.mask.shape), done, keys(*(prompt for prompt, _ in rows)))


@pytest.mark.parametrize(("name", "prompts"), [("demonstrations", ["p", "q"]), ("samples", ["p", "q", "x", "y"])])
def test_the_pool_has_each_prompt_once_with_its_demonstration(
    stage_of: StageOf, tmp_path: Path, name: str, prompts: list[str]
) -> None:
    write_table(tmp_path / "data", "demonstrations", ("p", "x"), ("q", "x"), ("q", "y"))
    if name == "samples":  # else the table is not even read
        write_table(tmp_path / "data", "prompts", ("x", None), ("p", None), ("y", None), ("q", None))
    pool = anchored_pool(stage_of("pairwise_ppo", **{"pairwise_ppo.anchors": name}))
    assert sorted(row.prompt for row in pool) == prompts
    responses = {row.prompt: row.response for row in pool}
    assert responses["p"] == "x" and responses["q"] == "x"  # of two demonstrations the first
    assert all(responses[prompt] is None for prompt in prompts[2:])


def test_a_demonstration_is_the_anchor_and_nothing_is_drawn(
    stage: Stage, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apprentice.sampling.sample", lambda *_, **__: pytest.fail("nothing is lacking"))
    assert anchors_of(stage, setting, keys("p q", "p", "p q")) == ["y y", "x", "y y"]


def test_the_anchor_of_a_prompt_is_always_the_same_draw(stage: Stage, setting: Setting) -> None:
    together = dict(zip(TEXTS, anchors_of(stage, setting, keys(*TEXTS)), strict=True))
    assert anchors_of(stage, setting, keys("q", "p", "q", "y", "x q", "q")) == [
        together[prompt] for prompt in ("q", "p", "q", "y", "x q", "q")
    ]
    for prompt, text in TEXTS.items():
        assert anchors_of(stage, setting, keys(prompt)) == [together[prompt]]
        if text is not None:
            assert together[prompt] == text


def test_a_draw_is_the_sft_models_at_temperature_1_under_the_seed(stage_of: StageOf, setting: Setting) -> None:
    prompts = [f"{' '.join('x' * n)} q" for n in range(1, 30)]
    rows = [demonstration(prompt, None, "test") for prompt in prompts]
    ids = encode_prompts(setting.tokenizer, prompts)
    pool = Prompts(ids, keys(*prompts), setting.prompts.end, setting.prompts.classes, setting.prompts.class_names)
    many = Setting(pool, dict(zip(pool.keys, rows, strict=True)), setting.tokenizer, CPU, {"sft": speaker(0.6)})
    found = {}
    for seed in (3, 4):
        stage = stage_of("pairwise_ppo", **{"pairwise_ppo.max_new_tokens": 4, "seed": seed})
        found[seed] = anchors_of(stage, many, pool.keys)
    requests = [Request(prompt, key) for prompt, key in zip(ids, pool.keys, strict=True)]
    drawn = sample(speaker(0.6), requests, seed="3/anchors", end=pool.end, max_new_tokens=4)
    assert found[3] == decode_responses(many.tokenizer, drawn.response_ids()) != found[4]
    assert {"x", "y"} < set(found[3])
    assert max(len(text.split()) for text in found[3]) == 4  # cut off by the stage's limit


@pytest.mark.parametrize("form", ["probability", "logit"])
def test_a_response_earns_what_beating_its_anchor_is_worth(stage_of: StageOf, setting: Setting, form: str) -> None:
    stage = stage_of("bt_ppo", **{"bt_ppo.reward_form": form, "bt_ppo.missing_eos_reward": -2.0})
    asked: list[tuple[Any, str, str]] = []
    won = [math.log(3), -math.log(4), math.log(99), 0.0]  # 3/4, 1/5, 99/100, 1/2

    def logits(triples: Sequence[tuple[Any, str, str]]) -> torch.Tensor:
        asked.extend(triples)
        return torch.tensor(won).bfloat16() if form == "probability" else torch.tensor(won)

    rollout = rolled(setting, ("p", "y"), ("p q", "x"), ("p", ""), ("p q", "y y y"), cut=[3])
    found = anchored_reward(stage, setting, logits)(rollout, {})
    assert asked == [("p", "y", "x"), ("p q", "x", "y y"), ("p", "", "x"), ("p q", "y y y", "y y")]
    wanted = [0.75, 0.2, 0.99, 0.5] if form == "probability" else won
    tolerance = 4e-3 if form == "probability" else 1e-6  # bfloat16 in, float32 out
    assert found.totals.tolist() == pytest.approx(wanted, abs=tolerance)
    assert found.totals.dtype == torch.float32
    assert found.placed.tolist() == [
        pytest.approx([0, wanted[0], 0], abs=tolerance),
        pytest.approx([0, wanted[1], 0], abs=tolerance),
        pytest.approx([wanted[2], 0, 0], abs=tolerance),
        [0, 0, -2.0],
    ]
    assert found.figures.keys() == {"anchor_win_rate", "saturated"}
    assert found.figures["anchor_win_rate"] == pytest.approx((0.75 + 0.2 + 0.99 + 0.5) / 4, abs=tolerance)
    assert found.figures["saturated"] == 0.25  # one of four above 0.95


def test_W4_a_policy_equal_to_its_anchors_wins_half_of_the_time(stage: Stage, setting: Setting) -> None:
    # the ranker likes x better than y by ln 9; responses and anchors come from the same model
    prompts = [f"{' '.join('p' * n)} q" for n in range(1, 41)]
    ids = encode_prompts(setting.tokenizer, prompts)
    pool = Prompts(ids, keys(*prompts), setting.prompts.end, setting.prompts.classes, setting.prompts.class_names)
    rows = {key: demonstration(prompt, None, "test") for key, prompt in zip(pool.keys, prompts, strict=True)}
    many = Setting(pool, rows, setting.tokenizer, CPU, {"sft": speaker()})
    requests = [Request(prompt, key, n) for prompt, key in zip(ids, pool.keys, strict=True) for n in range(20)]
    rollout = sample(speaker(), requests, seed="other", end=pool.end, max_new_tokens=8)

    def logits(triples: Sequence[tuple[Any, str, str]]) -> torch.Tensor:
        return torch.tensor([math.log(9) * ((a == "x") - (b == "x")) for _, a, b in triples])

    found = anchored_reward(stage, many, logits)(rollout, {})
    assert ((found.totals > 0) & (found.totals < 1)).all()
    # half of the anchors are x: a win is 0.1, 0.5 or 0.9, its sd below 0.4; the 40 anchors vary most
    assert abs(found.figures["anchor_win_rate"] - 0.5) < 4 * 0.4 / math.sqrt(40)  # 4 sigma
    assert 0.2 < found.totals.std() < 0.4
