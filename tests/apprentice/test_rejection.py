"""Statistical rejection sampling against the target it aims at, and the pairs."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from apprentice.rejection import Accepted, any_sample, finite_positions, make_pairs, rejection_sample

# five outcomes of a toy SFT policy, their probabilities and rewards; the best is common, so that a pool always holds it
PROBABILITIES = [0.30, 0.15, 0.25, 0.20, 0.10]
REWARDS = [1.0, 0.5, 0.0, -0.5, -1.5]
BETA = 0.7
rewards_lists = st.lists(st.floats(-20, 20), min_size=1, max_size=12)


def pools(count: int, size: int, seed: int) -> Iterable[tuple[list[int], random.Random]]:
    """Outcomes of `size` draws from the toy policy, again and again."""
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choices(range(5), PROBABILITIES, k=size), rng


class Script(random.Random):
    """Gives out the uniforms it was made with, and shuffles nothing."""

    def __init__(self, uniforms: Sequence[float]) -> None:
        super().__init__(0)
        self.uniforms = list(uniforms)

    def random(self) -> float:
        return self.uniforms.pop(0)

    def shuffle(self, x: Any) -> None:
        pass


def test_two_rounds_by_hand() -> None:
    # round 1, r_max 2, beta 1: exp(-1) = .368 > .3 takes 0; exp(-2) = .135 < .5 leaves 1; exp(0) takes 2; .368 < .4 leaves 3
    # round 2, r_max 1: exp(-1) = .368 < .9 leaves 1; exp(0) takes 3, and that makes three
    found = rejection_sample([1.0, 0.0, 2.0, 1.0], 3, 1.0, Script([0.3, 0.5, 0.99, 0.4, 0.9, 0.99]))
    assert found == Accepted([0, 2, 3], rounds=2, trials=4, hits=2)


def test_R1_acceptance_rate() -> None:
    wanted = sum(p * math.exp((r - max(REWARDS)) / BETA) for p, r in zip(PROBABILITIES, REWARDS, strict=True))
    trials = hits = 0
    for outcomes, rng in pools(400, 50, seed=1):
        found = rejection_sample([REWARDS[i] for i in outcomes], 50, BETA, rng)
        trials, hits = trials + found.trials, hits + found.hits
    assert trials == 400 * 50
    assert abs(hits / trials - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / trials)  # 4 sigma


@pytest.mark.parametrize("count", [1, 4])
def test_R2_accepted_responses_follow_the_tilt(count: int) -> None:
    tilted = [p * math.exp(r / BETA) for p, r in zip(PROBABILITIES, REWARDS, strict=True)]
    seen: Counter[int] = Counter()
    for outcomes, rng in pools(3000, 40, seed=2):
        found = rejection_sample([REWARDS[i] for i in outcomes], count, BETA, rng)
        assert found.rounds == 1  # later rounds know a lower maximum and are no longer exact
        seen[outcomes[found.positions[-1]]] += 1
    wanted = [3000 * t / sum(tilted) for t in tilted]
    assert chisquare([seen[i] for i in range(5)], wanted).pvalue > 1e-4
    assert chisquare([seen[i] for i in range(5)], [3000 * p for p in PROBABILITIES]).pvalue < 1e-6


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 99))
def test_R3_a_constant_added_to_all_rewards_changes_nothing(eighths: list[int], count: int, seed: int) -> None:
    rewards = [n / 8 for n in eighths]  # sums with 16 are exact
    one, other = (rejection_sample([r + c for r in rewards], count, BETA, random.Random(seed)) for c in (0, 16))
    assert one == other


def test_R4_at_a_huge_beta_all_candidates_are_alike_and_one_round_is_enough() -> None:
    seen: Counter[int] = Counter()
    for seed in range(2000):
        found = rejection_sample(REWARDS, 2, 1e9, random.Random(seed))
        assert (found.rounds, found.trials, found.hits) == (1, 2, 2)
        seen.update(found.positions)
    assert chisquare([seen[i] for i in range(5)]).pvalue > 1e-4


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12, unique=True), st.integers(1, 12), st.sampled_from([0.0, 1e-4]))
def test_R4_beta_0_takes_the_best(rewards: list[int], count: int, beta: float) -> None:
    found = rejection_sample([float(r) for r in rewards], count, beta, random.Random(0))
    assert [rewards[i] for i in found.positions] == sorted(rewards, reverse=True)[:count]


def test_R4_at_beta_0_ties_are_broken_at_random() -> None:
    seen = Counter(tuple(rejection_sample([1.0, 1.0, 0.0], 1, 0.0, random.Random(i)).positions) for i in range(2000))
    assert set(seen) == {(0,), (1,)}
    assert abs(seen[(0,)] - 1000) < 4 * math.sqrt(500)  # 4 sigma


@given(rewards_lists, st.integers(1, 12), st.floats(0.01, 10), st.integers(0, 99))
def test_R5_every_round_accepts_at_least_one(rewards: list[float], count: int, beta: float, seed: int) -> None:
    found = rejection_sample(rewards, count, beta, random.Random(seed))
    assert 1 <= found.rounds <= len(found.positions) == min(count, len(rewards))
    assert len(set(found.positions)) == len(found.positions)
    assert 1 <= found.hits <= found.trials <= len(rewards)


@given(rewards_lists, st.randoms(use_true_random=False), st.integers(0, 99))
def test_R6_permuting_the_candidates_permutes_who_is_accepted(rewards: list[float], shuffler: random.Random, seed: int) -> None:
    size, rng = len(rewards), random.Random(seed)
    uniforms, order = [rng.random() for _ in range(size)], list(range(size))
    shuffler.shuffle(order)
    spare = [0.5] * size * size
    plain = rejection_sample(rewards, size, BETA, Script(uniforms + spare))
    moved = rejection_sample([rewards[i] for i in order], size, BETA, Script([uniforms[i] for i in order] + spare))
    # a whole first round: each candidate keeps its own uniform
    assert {order[i] for i in moved.positions[: moved.hits]} == set(plain.positions[: plain.hits])


def test_R6_the_order_of_the_candidates_does_not_matter_even_with_an_early_stop() -> None:
    tables = []
    for rewards in (sorted(REWARDS), sorted(REWARDS, reverse=True)):
        found = [rejection_sample(rewards, 1, BETA, random.Random(seed)).positions[0] for seed in range(3000)]
        seen = Counter(rewards[i] for i in found)
        tables.append([seen[r] for r in REWARDS])
    assert chi2_contingency(tables).pvalue > 1e-4


def test_R6_equal_rewards_are_accepted_equally_often() -> None:
    seen: Counter[int] = Counter()
    for seed in range(3000):
        seen.update(rejection_sample([0.0, 0.0, 1.0, 0.0], 2, BETA, random.Random(seed)).positions)
    # two are taken each time, so the counts vary less than independent ones would: the bound is on the safe side
    assert chisquare([seen[0], seen[1], seen[3]]).pvalue > 1e-4


def test_R7_degenerate_pools_have_defined_results() -> None:
    rng = random.Random(0)
    infinity = math.inf
    assert sorted(rejection_sample([1.0, 2.0], 8, BETA, rng).positions) == [0, 1]  # fewer than asked for
    same = rejection_sample([3.0] * 5, 4, BETA, rng)  # all equal: duplicates stay apart
    assert (len(set(same.positions)), same.rounds, same.trials, same.hits) == (4, 1, 4, 4)
    assert rejection_sample([3.0], 1, BETA, rng) == Accepted([0], 1, 1, 1)
    for beta in (0.0, BETA):
        assert rejection_sample([], 3, beta, rng) == Accepted([], 0, 0, 0)
        assert rejection_sample([-infinity, -infinity], 3, beta, rng) == Accepted([], 0, 0, 0)
        for odd in (-infinity, infinity, math.nan):
            assert rejection_sample([odd, 1.0, odd], 3, beta, rng).positions == [1]
        assert rejection_sample([1.0, 2.0], 0, beta, rng).positions == []
    assert rejection_sample([-1e9, 0.0], 2, 1e-9, rng).positions == [1, 0]  # exp underflows to 0


def test_R8_the_mean_accepted_reward_falls_with_beta() -> None:
    betas, means = [0.0, 0.05, 0.2, 0.5, 1.0, 3.0, 1e9], []
    for beta in betas:
        total = 0.0
        for outcomes, rng in pools(1500, 12, seed=3):
            rewards = [REWARDS[i] for i in outcomes]
            accepted = [rewards[i] for i in rejection_sample(rewards, 3, beta, rng).positions]
            top = sorted(rewards, reverse=True)[:3]
            assert sum(accepted) <= sum(top) + 1e-9
            total += sum(accepted) / 3
        means.append(total / 1500)
    spread = math.sqrt(sum(p * (r - 0.15) ** 2 for p, r in zip(PROBABILITIES, REWARDS, strict=True)))
    slack = 4 * spread * math.sqrt(2 / 4500)  # 4 sigma of a difference of two means of 1500 * 3 rewards
    assert all(high >= low - slack for high, low in pairwise(means))
    expected = sum(p * r for p, r in zip(PROBABILITIES, REWARDS, strict=True))
    assert abs(means[-1] - expected) < slack  # beta without end: the policy itself
    assert means[0] - means[-1] > 0.5


def test_candidates_of_no_finite_reward_may_not_be_taken() -> None:
    assert finite_positions([1.0, -math.inf, 0.0, math.nan, math.inf, -2.0]) == [0, 2, 5]
    assert finite_positions([-math.inf, math.nan]) == finite_positions([]) == []


def test_any_candidates_are_taken_as_often_whatever_their_reward() -> None:
    seen: Counter[int] = Counter()
    orders: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        found = any_sample([9.0, 0.0, -math.inf, 0.5, -50.0], 2, random.Random(seed))
        assert found.rounds == 1 and found.trials == found.hits == 2
        seen.update(found.positions)
        orders[tuple(found.positions)] += 1
    assert chisquare([seen[i] for i in (0, 1, 3, 4)]).pvalue > 1e-4  # safe side: the counts vary less than independent ones
    assert len(orders) == 12 and chisquare(list(orders.values())).pvalue > 1e-4  # all ordered pairs of the four


@given(st.lists(st.floats(-9, 9) | st.sampled_from([-math.inf, math.nan]), max_size=9), st.integers(0, 12), st.integers(0, 99))
def test_any_candidates_are_distinct_and_as_many_as_there_are(rewards: list[float], count: int, seed: int) -> None:
    found = any_sample(rewards, count, random.Random(seed))
    finite = {i for i, reward in enumerate(rewards) if math.isfinite(reward)}
    assert set(found.positions) <= finite
    assert len(set(found.positions)) == len(found.positions) == min(count, len(finite))
    assert (found.rounds > 0) == (len(found.positions) > 0)
    assert any_sample([0.0 if math.isfinite(r) else r for r in rewards], count, random.Random(seed)) == found


@given(st.integers(0, 15), st.integers(0, 99))
def test_R9_first_round_makes_disjoint_pairs(size: int, seed: int) -> None:
    rng = random.Random(seed)
    rewards = [rng.choice([0.0, 1.0, 2.0]) for _ in range(20)]
    players = rng.sample(range(20), size)
    pairs = make_pairs(players, rewards, "first_round", rng)
    assert len(pairs) == size // 2
    used = [player for pair in pairs for player in pair]
    assert len(set(used)) == len(used)
    assert set(used) <= set(players)
    assert all(rewards[chosen] >= rewards[rejected] for chosen, rejected in pairs)


@given(st.integers(1, 15), st.integers(0, 99))
def test_R9_in_a_tournament_all_but_one_lose_once(size: int, seed: int) -> None:
    rng = random.Random(seed)
    rewards = [rng.choice([0.0, 1.0, 2.0]) for _ in range(20)]
    players = rng.sample(range(20), size)
    pairs = make_pairs(players, rewards, "tournament", rng)
    losers = [rejected for _, rejected in pairs]
    assert len(pairs) == len(set(losers)) == size - 1
    (winner,) = set(players) - set(losers)
    assert rewards[winner] == max(rewards[i] for i in players)
    assert all(rewards[chosen] >= rewards[rejected] for chosen, rejected in pairs)


def test_equal_rewards_are_labelled_by_a_coin() -> None:
    seen = Counter(make_pairs([0, 1], [2.0, 2.0], "first_round", random.Random(i))[0] for i in range(2000))
    assert abs(seen[(0, 1)] - 1000) < 4 * math.sqrt(500)  # 4 sigma


def test_the_same_generator_gives_the_same_pairs() -> None:
    one, other = (make_pairs(range(9), list(map(float, range(9))), "tournament", random.Random(5)) for _ in range(2))
    assert one == other
