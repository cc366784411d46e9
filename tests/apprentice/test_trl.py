"""Losses and advantages against those of TRL, whose code computed trl_values.json (benchmarks/loss_values.py).

TRL's names are not RSO's: its `hinge` of DPO is hinge_norm, its `hinge` of CPO is hinge (SLiC), and its `ipo` of DPO divides
log-probabilities by the length, where that of CPO takes sums as we do.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apprentice.advantages import gae
from apprentice.losses import PreferenceLoss, clipped_policy_loss, preference_loss, value_loss
from apprentice.masking import length_mask, masked_sum, whiten
from apprentice.rewards import kl_penalty, place_total

VALUES: dict[str, Any] = json.loads((Path(__file__).parent / "trl_values.json").read_text())
PREFERENCES = VALUES["preferences"]
SIDES = ("chosen", "rejected")


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int]) -> Tensor:
    return length_mask(torch.tensor(lengths), 5).double()


def summed(name: str, by_length: bool = False) -> Tensor:
    """[4] log-probabilities of one side of the pairs, or those over the length."""
    mask = mask_of(PREFERENCES["lengths"][name.removeprefix("reference_")])
    return masked_sum(doubles(PREFERENCES[name]), mask) / (mask.sum(1) if by_length else 1.0)


def ours(kind: PreferenceLoss, by_length: bool = False) -> float:
    sides = [summed(name, by_length) for name in (*SIDES, *(f"reference_{side}" for side in SIDES))]
    return float(preference_loss(*sides, kind, PREFERENCES["beta"])[0])


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("sigmoid_norm", "dpo/sigmoid"), ("hinge_norm", "dpo/hinge"), ("hinge", "cpo/hinge"), ("ipo", "cpo/ipo")],
)
def test_preference_losses_are_those_of_trl(kind: PreferenceLoss, theirs: str) -> None:
    assert ours(kind) == pytest.approx(PREFERENCES["values"][theirs], abs=1e-9)


def test_the_ipo_of_trls_dpo_is_ours_on_means_over_tokens() -> None:
    theirs = PREFERENCES["values"]["dpo/ipo"]
    assert ours("ipo", by_length=True) == pytest.approx(theirs, abs=1e-9)
    assert abs(ours("ipo") - theirs) > 0.1


@pytest.mark.parametrize("case", VALUES["ppo"], ids=lambda case: case["kl_estimator"])
def test_advantages_and_policy_loss_are_those_of_trl(case: dict[str, Any]) -> None:
    mask, old_logps = mask_of(case["lengths"]), doubles(case["old_logps"])
    paid = place_total(doubles(case["scores"]), mask, torch.ones(4, dtype=torch.bool), 0.0)
    rewards = paid - case["kl_coef"] * kl_penalty(old_logps, doubles(case["anchor_logps"]), mask, case["kl_estimator"])
    advantages, _ = gae(rewards, doubles(case["old_values"]), mask, case["gamma"], case["gae_lambda"])
    torch.testing.assert_close(advantages, doubles(case["values"]["advantages"]), rtol=0, atol=1e-9)
    # TRL divides by the standard deviation of a sample, n - 1 where we have n
    count = int(mask.sum())
    white = whiten(advantages, mask) * math.sqrt((count - 1) / count)
    torch.testing.assert_close(white, doubles(case["values"]["whitened"]), rtol=0, atol=1e-6)
    loss, _ = clipped_policy_loss(doubles(case["logps"]), old_logps, white, mask, case["clip_range"])
    assert float(loss) == pytest.approx(case["values"]["policy_loss"], abs=1e-6)


def test_the_value_loss_is_that_of_trl() -> None:
    # of full responses alone: TRL's mask has a place after the last token where there is room
    case = next(case for case in VALUES["ppo"] if set(case["lengths"]) == {5})
    old_values = doubles(case["old_values"])
    returns = doubles(case["values"]["advantages"]) + old_values
    loss, _ = value_loss(doubles(case["new_values"]), old_values, returns, mask_of(case["lengths"]), case["clip_range"])
    assert float(loss) == pytest.approx(case["values"]["value_loss"], abs=1e-6)
