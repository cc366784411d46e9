"""Generalised advantage estimation against sums written out."""

import pytest
import torch
from torch import Tensor

from apprentice.advantages import explained_variance, gae, importance_weights, mean_per_response, mean_per_token
from apprentice.masking import length_mask
from apprentice.rewards import place
from tests.apprentice.toys import END, Tabular, enumerate_responses

GAMMA = 0.9


@pytest.fixture
def random_case() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and values [4, 6] with nothing but zeros after lengths 6, 1, 4, 2."""
    torch.manual_seed(0)
    mask = length_mask(torch.tensor([6, 1, 4, 2]), 6).double()
    return torch.randn(4, 6).double() * mask, torch.randn(4, 6).double() * mask, mask


def naive(rewards: list[float], values: list[float], gamma: float, decay: float) -> list[float]:
    """A_t = sum_l (gamma decay)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), each term anew."""
    size = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(size)]
    return [sum((gamma * decay) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)]


def test_importance_weights_by_hand() -> None:
    """Probabilities .5 for .4, .6 for .2 (3, cut to 2), .1 for .2, and padding."""
    logps, sampler = torch.tensor([[0.5, 0.6, 0.1, 1.0]]).log(), torch.tensor([[0.4, 0.2, 0.2, 0.5]]).log()
    found = importance_weights(logps, sampler, torch.tensor([[True, True, True, False]]), cap=2.0)
    assert torch.allclose(found, torch.tensor([[1.25, 2.0, 0.5, 0.0]]))
    with pytest.raises(ValueError, match="sampler_logps"):
        importance_weights(logps, sampler[:, :3], torch.ones(1, 4), cap=2.0)


def test_three_tokens_by_hand() -> None:
    # gamma .5, lambda .5, rewards 0 0 8, values 1 2 4: deltas 0 + 1 - 1 = 0, 0 + 2 - 2 = 0, 8 - 4 = 4
    # A = 4 / 16, 4 / 4, 4;  G = A + V
    advantages, returns = gae(torch.tensor([[0.0, 0, 8]]), torch.tensor([[1.0, 2, 4]]), torch.ones(1, 3), 0.5, 0.5)
    assert advantages.tolist() == [[0.25, 1.0, 4.0]]
    assert returns.tolist() == [[1.25, 3.0, 8.0]]


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.95, 1.0])
def test_every_lambda_matches_the_naive_sum(random_case: tuple[Tensor, Tensor, Tensor], decay: float) -> None:
    rewards, values, mask = random_case
    advantages, returns = gae(rewards, values, mask, GAMMA, decay)
    for row, size in enumerate(mask.sum(1).int().tolist()):
        wanted = naive(rewards[row, :size].tolist(), values[row, :size].tolist(), GAMMA, decay)
        assert advantages[row, :size].tolist() == pytest.approx(wanted, abs=1e-12)
        owed = [a + v for a, v in zip(wanted, values[row].tolist(), strict=False)]
        assert returns[row, :size].tolist() == pytest.approx(owed, abs=1e-12)


def test_P1_lambda_1_gives_the_discounted_return(random_case: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = random_case
    advantages, returns = gae(rewards, values, mask, GAMMA, 1.0)
    for row in range(4):
        size = int(mask[row].sum())
        for t in range(size):
            wanted = sum(GAMMA ** (k - t) * float(rewards[row, k]) for k in range(t, size))
            assert float(advantages[row, t] + values[row, t]) == pytest.approx(wanted, abs=1e-9)
            assert float(returns[row, t]) == pytest.approx(wanted, abs=1e-9)


def test_P1_lambda_0_gives_the_one_step_error(random_case: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = random_case
    advantages, _ = gae(rewards, values, mask, GAMMA, 0.0)
    for row in range(4):
        size = int(mask[row].sum())
        for t in range(size):
            following = float(values[row, t + 1]) if t + 1 < size else 0.0
            wanted = float(rewards[row, t]) + GAMMA * following - float(values[row, t])
            assert float(advantages[row, t]) == pytest.approx(wanted, abs=1e-9)


def test_P2_tokens_after_the_end_have_no_advantage_and_no_influence(random_case: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = random_case
    clean = gae(rewards, values, mask, GAMMA, 0.95)
    garbage = gae(torch.where(mask == 1, rewards, 1e6), torch.where(mask == 1, values, -1e6), mask, GAMMA, 0.95)
    for got, wanted in zip(garbage, clean, strict=True):
        assert (got[mask == 0] == 0).all()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_P7_a_perfect_critic_leaves_no_expected_advantage(decay: float) -> None:
    policy = Tabular(0)
    probabilities = policy.frozen().sum(1).exp().tolist()
    responses = [ids for ids, _ in enumerate_responses()]
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(40, 3, generator=generator).double() * policy.mask
    # a world in which the reward of a token depends on the tokens up to it alone
    first: dict[tuple[int, ...], float] = {}
    for row, ids in enumerate(responses):
        for t in range(len(ids)):
            rewards[row, t] = first.setdefault(tuple(ids[: t + 1]), float(rewards[row, t]))
    owed = rewards.flip(1).cumsum(1).flip(1).tolist()  # the undiscounted return from each token on

    def expected(table: list[list[float]], prefix: list[int]) -> float:
        """Mean of the entry at the prefix's end over the responses that go through it."""
        t = len(prefix)
        through = [i for i, ids in enumerate(responses) if ids[:t] == prefix and len(ids) > t]
        return sum(probabilities[i] * table[i][t] for i in through) / sum(probabilities[i] for i in through)

    values = torch.zeros(40, 3, dtype=torch.float64)
    for row, ids in enumerate(responses):
        for t in range(len(ids)):
            values[row, t] = expected(owed, ids[:t])
    advantages = gae(rewards, values, policy.mask, 1.0, decay)[0].tolist()
    assert max(abs(a) for row in advantages for a in row) > 0.1
    prefixes = {tuple(ids[:t]) for ids in responses for t in range(len(ids))}
    assert len(prefixes) == 1 + END + END**2
    for prefix in prefixes:
        assert expected(advantages, list(prefix)) == pytest.approx(0, abs=1e-9)


def test_S6_end_payment_and_dense_payment_differ_by_the_reward_already_paid() -> None:
    torch.manual_seed(3)
    mask = length_mask(torch.tensor([5, 1, 3]), 5).double()
    parts, values, done = torch.randn(3, 5).double() * mask, torch.randn(3, 5).double() * mask, torch.ones(3).bool()
    eos, dense = (gae(place(parts, mask, done, how, "sum", -1.0), values, mask, 1.0, 1.0)[0] for how in ("eos", "dense"))
    for row in range(3):
        for t in range(int(mask[row].sum())):
            paid = sum(float(parts[row, k]) for k in range(t))
            assert float(eos[row, t] - dense[row, t]) == pytest.approx(paid, abs=1e-9)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="values: expected shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 3), 1, 1)
    with pytest.raises(ValueError, match="mask: expected shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), 1, 1)


def test_explained_variance_by_hand() -> None:
    returns, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 3), 7.0), returns, mask) == 0.0  # constant
    # errors 1 - 1 = 0 and 3 - 2 = 1: variance 1/4 beside Var(G) = 1
    assert explained_variance(torch.tensor([[1.0, 2.0, 0.0]]), returns, mask) == pytest.approx(0.75)
    # twice the numbers: errors 0 and 2, variance 1 beside 4
    assert explained_variance(torch.tensor([[2.0, 4.0, 0.0]]), 2 * returns, mask) == pytest.approx(0.75)
    assert explained_variance(torch.zeros(1, 3), torch.ones(1, 3), mask) == 0.0  # nothing to explain


def test_means_per_response_and_per_token() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 50.0], [5.0, 50.0, 50.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert mean_per_response(values, mask) == pytest.approx((3 + 5) / 2)
    assert mean_per_token(values, mask) == pytest.approx((1 + 2 + 5) / 3)
