"""X1: one reward and one beta, four estimators, one optimum: pi_sft^(1 + 1 / beta) pi_base^(-1 / beta).

The reward is the self-reward of every response of the enumerable world. PPO, CoPG and the soft-label sigmoid loss follow exact
gradients; RSO's sampler draws. The whole difference between the methods is left to optimisation, finite samples and capacity.
"""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apprentice.advantages import gae
from apprentice.losses import clipped_policy_loss, contrastive_loss, preference_loss
from apprentice.rejection import rejection_sample
from apprentice.rewards import kl_penalty, place, self_reward, token_rewards
from tests.apprentice.toys import Tabular, total_variation

BETA, SEED, CLOSE = 2.0, 0, 1e-2  # one configuration for all
SFT, BASE = Tabular(1), Tabular(2)
MASK = SFT.mask
PARTS = token_rewards(SFT.frozen(), BASE.frozen(), MASK)
REWARDS = self_reward(PARTS, MASK)
REFERENCE = SFT.frozen().sum(1)
TARGET = ((1 + 1 / BETA) * REFERENCE - BASE.frozen().sum(1) / BETA).softmax(0)
PAIRS = torch.cartesian_prod(torch.arange(40), torch.arange(40))
SOURCES = {"uniform": torch.ones(40).double() / 40, "sft": REFERENCE.exp(), "base": BASE.frozen().sum(1).exp()}


def policy_start() -> Tabular:
    """A policy that begins as the SFT policy."""
    return Tabular(1)


def least(policy: Tabular, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Probabilities of all responses where `loss`, a function of their log-probabilities [40], is least."""
    optimiser = torch.optim.LBFGS(
        [policy.logits], max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss(policy.logps().sum(1))
        found.backward()
        return found

    optimiser.step(closure)
    return policy.frozen().sum(1).exp()


def test_X1_the_target_is_far_from_where_the_methods_start() -> None:
    assert total_variation(REFERENCE.exp(), TARGET) > 0.2
    assert all(total_variation(source, TARGET) > 0.2 for source in SOURCES.values())


@pytest.mark.parametrize("placement", ["eos", "dense"])
def test_X1_self_rewarding_ppo(placement: str) -> None:
    policy = policy_start()
    adam = torch.optim.Adam([policy.logits])
    for step in range(500):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 500)
        logps = policy.logps()
        old = logps.detach()
        placed = place(PARTS, MASK, torch.ones(40, dtype=torch.bool), placement, "sum", -1.0)
        rewards = placed - BETA * kl_penalty(old, SFT.frozen(), MASK)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), MASK, 1.0, 1.0)
        weighted = advantages * old.sum(1, keepdim=True).exp()  # every response as often as the policy draws it
        adam.zero_grad()
        clipped_policy_loss(logps, old, weighted, MASK, 0.2, count=1.0)[0].backward()
        adam.step()
    assert total_variation(policy.frozen().sum(1).exp(), TARGET) < CLOSE


def test_X1_rejection_sampling() -> None:
    # candidates accepted in the first round, whose r_max is that of the whole world, are independent draws from the target
    draws, candidates = 200_000, 900_000
    pool = torch.multinomial(REFERENCE.exp(), candidates, True, generator=torch.Generator().manual_seed(SEED))
    found = rejection_sample(REWARDS[pool].tolist(), draws, BETA, random.Random(SEED))
    assert (found.rounds, len(found.positions)) == (1, draws)
    seen = torch.bincount(pool[found.positions], minlength=40).double() / draws
    # E TV <= sum sqrt(p (1 - p) / n) / 2; above it by s with probability exp(-2 n s^2) at most (McDiarmid): 1e-4 here
    bound = float((TARGET * (1 - TARGET) / draws).sqrt().sum()) / 2 + math.sqrt(math.log(1e4) / (2 * draws))
    assert total_variation(seen, TARGET) < bound < CLOSE


@pytest.mark.parametrize("source", SOURCES)
def test_X1_contrastive_policy_gradient(source: str) -> None:
    shares = SOURCES[source][PAIRS].prod(1)

    def one(logps: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
        return contrastive_loss(logps[None], reference[None], rewards[None], BETA)[0]

    def loss(logps: Tensor) -> Tensor:
        return (shares * torch.func.vmap(one)(logps[PAIRS], REFERENCE[PAIRS], REWARDS[PAIRS])).sum()

    assert total_variation(least(policy_start(), loss), TARGET) < CLOSE


@pytest.mark.parametrize("source", SOURCES)
def test_X1_soft_label_sigmoid_norm(source: str) -> None:
    shares, labels = SOURCES[source][PAIRS].prod(1), (REWARDS[PAIRS[:, 0]] - REWARDS[PAIRS[:, 1]]).sigmoid()

    def one(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        sides = (side[None] for side in (chosen, rejected, reference_chosen, reference_rejected))
        return preference_loss(*sides, "sigmoid_norm", BETA)[0]

    def loss(logps: Tensor) -> Tensor:
        (first, second), (reference, other) = logps[PAIRS].T, REFERENCE[PAIRS].T
        wins = torch.func.vmap(one)(first, second, reference, other)
        loses = torch.func.vmap(one)(second, first, other, reference)
        return (shares * (labels * wins + (1 - labels) * loses)).sum()

    assert total_variation(least(policy_start(), loss), TARGET) < CLOSE
