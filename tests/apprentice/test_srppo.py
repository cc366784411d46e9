"""The self-reward as PPO takes it: its roles, weight, place and span, and its split by class of token, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apprentice.compute import CPU
from apprentice.policy import freeze, score
from apprentice.ppo import Prompts
from apprentice.sampling import Rollout
from apprentice.srppo import SelfReward, SelfRewardingPPO
from apprentice.tokens import collate
from tests.apprentice.toys import END, enumerated, pool, srppo_config, tiny_llama

GARBAGE = 99.0  # stands in the padding
# three classes: token 0, tokens 1 and 2, the end
PROMPTS = Prompts([[0]], ["0"], END, torch.tensor([0, 1, 1, 2]), ("zero", "other", "eos"))
LOGPS = {
    "sft": torch.tensor([[-1.0, -2.0, -0.5], [-1.0, GARBAGE, GARBAGE], [-1.0, -1.0, -2.0]]),
    "base": torch.tensor([[-2.0, -1.0, -1.5], [-3.0, GARBAGE, GARBAGE], [-4.0, -1.5, -2.5]]),
    "third": torch.tensor([[0.0, 0.0, 0.0], [-1.0, GARBAGE, GARBAGE], [-1.0, -1.0, -1.0]]),
}
# log sft - log base: (1, -1, 1), (2), (3, 0.5, 0.5)
ENDED = torch.tensor([True, True, False])


def rollout(ended: Tensor = ENDED) -> Rollout:
    """0 1 end; end; 2 0 0 cut off."""
    batch = collate([[0], [1, 1], [0]], [[0, 1, END], [END], [2, 0, 0]], END)
    return Rollout(batch, torch.zeros(3, 3), ended, ["a", "b", "c"])


def reward(ended: Tensor = ENDED, **changes: Any) -> Any:
    return SelfReward(srppo_config(missing_eos_reward=-7.0, **changes), PROMPTS)(rollout(ended), LOGPS)


def test_the_reward_by_hand() -> None:
    found = reward()
    assert found.totals.tolist() == [1.0, 2.0, 4.0]  # the cut off one as well: before any rule
    assert found.placed.tolist() == [[0, 0, 1], [2, 0, 0], [0, 0, -7]]
    # zero: 1 and 0.5 + 0.5; other: -1 and 3; eos: 1 and 2; over three responses
    assert found.figures == pytest.approx({"reward_zero": 2 / 3, "reward_other": 2 / 3, "reward_eos": 1.0})
    assert sum(found.figures.values()) == pytest.approx(float(found.totals.mean()))


def test_dense_payment_gives_each_token_its_part() -> None:
    found = reward(placement="dense")
    assert found.placed.tolist() == [[1, -1, 1], [2, 0, 0], [0, 0, -7]]
    assert found.totals.tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("span", "totals"), [("sum", [1.0, 2.0, 4.0]), ("mean", [1 / 3, 2.0, 4 / 3]), ("eos_token", [1, 2, 0.5])]
)
def test_spans(span: str, totals: list[float]) -> None:
    found = reward(span=span)
    assert found.totals.tolist() == pytest.approx(totals)
    assert found.placed.sum(1).tolist() == pytest.approx([totals[0], totals[1], -7])
    assert reward(span=span, placement="dense").placed.sum(1).tolist() == pytest.approx([totals[0], totals[1], -7])


def test_the_weight_of_the_baseline() -> None:
    # log sft - log base / 2: (0, -1.5, 0.25), (0.5), (1, -0.25, -0.75)
    assert reward(baseline_weight=0.5).totals.tolist() == [-1.25, 0.5, 0.0]
    assert reward(baseline_weight=0.0).totals.tolist() == [-3.5, -1.0, -4.0]


def test_target_and_baseline_are_any_two_models() -> None:
    assert reward(reward_target="third", reward_baseline="sft").totals.tolist() == [3.5, 0.0, 1.0]
    assert reward(reward_target="third").totals.tolist() == [4.5, 2.0, 5.0]


def test_S1_equal_models_earn_exactly_nothing() -> None:
    found = reward(torch.ones(3, dtype=torch.bool), reward_baseline="sft")
    assert (found.placed == 0).all() and (found.totals == 0).all()
    assert found.figures == {"reward_zero": 0, "reward_other": 0, "reward_eos": 0}


@pytest.mark.parametrize("placement", ["eos", "dense"])
def test_S2_swapping_target_and_baseline_negates_it(placement: str) -> None:
    everyone = torch.ones(3, dtype=torch.bool)
    there, back = (
        reward(everyone, placement=placement, reward_target=a, reward_baseline=b) for a, b in (("sft", "base"), ("base", "sft"))
    )
    assert torch.equal(there.placed, -back.placed)
    assert torch.equal(there.totals, -back.totals)
    assert there.figures == {name: -value for name, value in back.figures.items()}


def test_S3_the_expected_reward_is_the_kl_of_the_two_models() -> None:
    batch = enumerated()
    logps = {name: score(freeze(tiny_llama(seed)), batch) for name, seed in (("sft", 1), ("base", 2))}
    asked = Rollout(batch, logps["sft"], torch.ones(40, dtype=torch.bool), [""] * 40)
    totals = SelfReward(srppo_config(), pool())(asked, logps).totals.double()
    p, q = (logps[name].double().sum(1).exp().tolist() for name in ("sft", "base"))
    assert sum(a * float(r) for a, r in zip(p, totals, strict=True)) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-5
    )
    assert sum(b * float(r) for b, r in zip(q, totals, strict=True)) == pytest.approx(
        -sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)), abs=1e-5
    )


def test_S8_a_response_cut_off_earns_the_configured_value_whatever_the_models_say() -> None:
    cut = torch.zeros(3, dtype=torch.bool)
    for target in ("sft", "third", "base"):
        for placement in ("eos", "dense"):
            placed = reward(cut, reward_target=target, placement=placement).placed
            assert placed.tolist() == [[0, 0, -7], [-7, 0, 0], [0, 0, -7]]


def test_a_role_without_a_model_is_named() -> None:
    with pytest.raises(KeyError, match="nobody"):
        reward(reward_target="nobody")


def test_self_rewarding_ppo_is_ppo_with_that_reward() -> None:
    scorers = {"sft": freeze(tiny_llama(1)), "base": freeze(tiny_llama(2))}
    ppo = SelfRewardingPPO(tiny_llama(1), scorers, pool(), srppo_config(), seed="0", compute=CPU)
    batch = enumerated()
    asked = Rollout(batch, score(scorers["sft"], batch), torch.ones(40, dtype=torch.bool), [""] * 40)
    row, _ = ppo.evaluate(asked)
    logps = {name: score(model, batch) for name, model in scorers.items()}
    wanted = SelfReward(srppo_config(), pool())(asked, logps)
    assert row["reward"] == float(wanted.totals.mean())
    assert {name: row[name] for name in wanted.figures} == wanted.figures
