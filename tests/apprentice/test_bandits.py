"""K4: where CoPG, IPO and the policy gradient end on the bandit of 2406.19185, section 5, exactly.

Three arms, pairs drawn off-policy, a uniform reference. Each limit is found twice: by following the population gradient of our
losses, and by solving the method's own equations without them. The printed decimals pin both.
"""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import root
from torch import Tensor

from apprentice.losses import clipped_policy_loss, contrastive_loss, sign_rewards
from apprentice.rewards import kl_penalty
from tests.apprentice.toys import total_variation

ARMS = range(3)
REWARDS, FIRST, SECOND, BETA = [2.5, 2.0, 1.0], [0.1, 0.2, 0.7], [0.05, 0.05, 0.9], 0.5
R = torch.tensor(REWARDS, dtype=torch.float64)
REFERENCE = torch.full((3,), -math.log(3), dtype=torch.float64)
PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(3))
SOURCES = torch.tensor([FIRST, SECOND], dtype=torch.float64)
SHARES = torch.outer(SOURCES[0], SOURCES[1]).flatten()
Loss = Callable[[Tensor], Tensor]


def follow(loss: Loss) -> list[float]:
    """Probabilities at which the gradient of `loss`, a function of log-probabilities [3], vanishes."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.99))
    for step in range(1200):
        adam.param_groups[0]["lr"] = 0.1 * 0.99**step
        adam.zero_grad()
        loss(logits.log_softmax(0)).backward()
        adam.step()
        if logits.grad.abs().max() < 1e-9:
            break
    assert logits.grad.abs().max() < 1e-7
    found: list[float] = logits.detach().softmax(0).tolist()
    return found


def value(p: list[float]) -> float:
    """E_p[R] - beta KL(p || uniform)."""
    return sum(q * (r - BETA * math.log(3 * q)) for q, r in zip(p, REWARDS, strict=True))


def regret(p: list[float]) -> float:
    return value(tilted()) - value(p)


def tilted() -> list[float]:
    parts = [math.exp(r / BETA) for r in REWARDS]
    return [part / sum(parts) for part in parts]


def better(i: int, j: int) -> float:
    """Bradley-Terry probability that arm i is preferred to arm j."""
    return 1 / (1 + math.exp(REWARDS[j] - REWARDS[i]))


# --- by the losses ---


def pair_losses(logps: Tensor, rewards: Tensor) -> Tensor:
    """CoPG's loss of each of the 9 pairs of arms: rewards [9, 2]."""

    def one(pair: Tensor, reference: Tensor, reward: Tensor) -> Tensor:
        return contrastive_loss(pair[None], reference[None], reward[None], BETA)[0]

    return torch.func.vmap(one)(logps[PAIRS], REFERENCE[PAIRS], rewards)


def copg(logps: Tensor) -> Tensor:
    return (SHARES * pair_losses(logps, R[PAIRS])).sum()


def ipo(logps: Tensor) -> Tensor:
    """Each pair is labelled by a Bradley-Terry coin, and only the sign is kept."""
    first_wins = torch.tensor([better(int(i), int(j)) for i, j in PAIRS], dtype=torch.float64)
    first, second = (sign_rewards(torch.tensor([scores]).double()).expand(9, 2) for scores in ([1, 0], [0, 1]))
    losses = first_wins * pair_losses(logps, first) + (1 - first_wins) * pair_losses(logps, second)
    return (SHARES * losses).sum()


def policy_gradient(baseline: Callable[[list[float]], float]) -> Loss:
    """REINFORCE on the regularised reward less a baseline, on the arms of both sources, without importance weights."""
    drawn, ones = SOURCES.mean(0)[:, None], torch.ones(3, 1).double()

    def loss(logps: Tensor) -> Tensor:
        old = logps.detach()[:, None]
        rewards = R[:, None] - BETA * kl_penalty(old, REFERENCE[:, None], ones)
        advantages = (rewards - baseline(old[:, 0].exp().tolist())) * drawn
        return clipped_policy_loss(logps[:, None], old, advantages, ones, 0.2, count=1.0)[0]

    return loss


def mean_reward(p: list[float]) -> float:
    return sum(q * r for q, r in zip(p, REWARDS, strict=True))


# --- by the methods' own equations ---


def least_squares_limit(gap: Callable[[int, int], float]) -> list[float]:
    """Where sum_ij mu_1(i) mu_2(j) (gap_ij - beta d_ij) grad d_ij = 0: three linear equations in h, one of them replaced."""
    rows, right = [], []
    for a in ARMS:
        row, owed = [0.0, 0.0, 0.0], 0.0
        for b in ARMS:
            share = FIRST[a] * SECOND[b] + FIRST[b] * SECOND[a]
            row[a] += share * BETA * (a != b)
            row[b] -= share * BETA * (a != b)
            owed += share * gap(a, b)
        rows.append(row)
        right.append(owed)
    rows[2], right[2] = [1.0, 1.0, 1.0], 0.0  # h up to a constant
    h = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)).tolist()
    parts = [math.exp(x) for x in h]
    return [part / sum(parts) for part in parts]


def fixed_point(baseline: Callable[[list[float]], float]) -> list[float]:
    """Where sum_i mu(i) A_i (1[i = a] - p_a) = 0 for each arm a, A the regularised reward less the baseline."""

    def equations(z: list[float]) -> list[float]:
        parts = [math.exp(x) for x in z]
        p = [part / sum(parts) for part in parts]
        paid = [
            (m + n) * (r - BETA * math.log(3 * q) - baseline(p)) for m, n, r, q in zip(FIRST, SECOND, REWARDS, p, strict=True)
        ]
        return [*(paid[a] - p[a] * sum(paid) for a in (0, 1)), sum(z)]

    solved = root(equations, [0.0, 0.0, 0.0], tol=1e-12)
    assert solved.success
    parts = [math.exp(x) for x in solved.x]
    return [part / sum(parts) for part in parts]


def none(p: list[float]) -> float:
    return 0.0


LIMITS = {
    "copg": (copg, tilted(), (0.7054, 0.2595, 0.0351), 0.0),
    "ipo": (ipo, least_squares_limit(lambda i, j: better(i, j) - 0.5), (0.4242, 0.3527, 0.2231), 0.1525),
    "pg": (policy_gradient(none), fixed_point(none), (0.1940, 0.2501, 0.5559), 0.6378),
    "pg_reward_baseline": (policy_gradient(mean_reward), fixed_point(mean_reward), (0.8115, 0.1675, 0.0209), 0.0148),
    "pg_value_baseline": (policy_gradient(value), tilted(), (0.7054, 0.2595, 0.0351), 0.0),
}


@pytest.mark.parametrize("method", LIMITS)
def test_K4_limits_of_the_bandit(method: str) -> None:
    loss, solved, printed, lost = LIMITS[method]
    reached = follow(loss)
    assert reached == pytest.approx(solved, abs=1e-6)
    assert reached == pytest.approx(printed, abs=6e-5)
    assert regret(reached) == pytest.approx(lost, abs=6e-5)


def test_K4_the_values_that_regret_is_measured_against() -> None:
    assert tilted() == pytest.approx([0.7054, 0.2595, 0.0351], abs=6e-5)
    assert value(tilted()) == pytest.approx(2.1252, abs=6e-5)
    assert value([1 / 3] * 3) == pytest.approx(1.8333, abs=6e-5)
    assert least_squares_limit(lambda i, j: REWARDS[i] - REWARDS[j]) == pytest.approx(tilted(), abs=1e-9)
    assert fixed_point(value) == pytest.approx(tilted(), abs=1e-9)


def test_K4_ten_thousand_drawn_pairs_come_close_to_the_limit_of_the_population() -> None:
    # CoPG's optimum does not depend on how often a pair was drawn, so long as the pairs link all arms
    generator = torch.Generator().manual_seed(0)
    first, second = torch.multinomial(SOURCES, 10_000, True, generator=generator)
    pairs = torch.stack([first, second], 1)
    reached = follow(lambda logps: contrastive_loss(logps[pairs], REFERENCE[pairs], R[pairs], BETA)[0])
    assert total_variation(torch.tensor(reached), torch.tensor(tilted())) < 1e-6


def test_K4_the_wrong_sign_moves_away_from_the_optimum() -> None:
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    copg(logits.log_softmax(0)).backward()
    down, up = ((logits - step * logits.grad).detach().softmax(0).tolist() for step in (0.01, -0.01))
    assert value(down) > value([1 / 3] * 3) > value(up)
