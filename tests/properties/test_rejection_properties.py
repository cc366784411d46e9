"""Rejection sampling on rewards of any kind: defined, within range, without repetition, and blind to a constant."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from apprentice.rejection import Accepted, any_sample, make_pairs, rejection_sample
from tests.properties.strategies import steady

rewards_lists = st.lists(
    st.floats(-5, 5) | st.floats() | st.sampled_from([-math.inf, math.inf, math.nan, 0.0, 1e308, -1e308]), max_size=12
)
betas = st.sampled_from([0.0, 5e-324, 1e-9, 0.7, 1e9, math.inf]) | st.floats(0, 10)
counts, seeds = st.integers(0, 14), st.integers(0, 999)


class Patient(random.Random):
    """Fails where sampling would never end: every round takes at least one of 12 candidates, so 78 draws and a shuffle do."""

    drawn = 0

    def random(self) -> float:
        self.drawn += 1
        assert self.drawn < 200
        return super().random()


def finite(rewards: list[float]) -> set[int]:
    return {i for i in range(len(rewards)) if -math.inf < rewards[i] < math.inf}


@steady(200)
@given(rewards_lists, counts, betas, seeds)
def test_positions_are_unique_in_range_finite_and_as_many_as_there_are(
    rewards: list[float], count: int, beta: float, seed: int
) -> None:
    may_be_taken = finite(rewards)
    for found in (
        rejection_sample(rewards, count, beta, Patient(seed)),
        any_sample(rewards, count, Patient(seed)),
    ):
        assert set(found.positions) <= may_be_taken
        assert len(set(found.positions)) == len(found.positions) == min(count, len(may_be_taken))
        assert 0 <= found.hits <= found.trials <= len(may_be_taken) and found.hits <= len(found.positions)
        assert (found.rounds > 0) == (len(found.positions) > 0)


@steady(100)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 9), counts, betas, seeds)
def test_equal_candidates_are_all_accepted_at_once(reward: float, size: int, count: int, beta: float, seed: int) -> None:
    found = rejection_sample([reward] * size, count, beta, Patient(seed))
    wanted = min(size, count)
    trials = size if beta == 0 else wanted  # beta 0 looks at all of them
    assert found == Accepted(found.positions, min(1, wanted), trials, wanted)
    assert len(set(found.positions)) == wanted


@steady(60)
@given(st.floats(), st.integers(0, 4), st.integers(1, 5), betas, seeds)
def test_one_candidate_that_may_be_taken_is_taken_and_no_other(
    reward: float, before: int, count: int, beta: float, seed: int
) -> None:
    rewards = [-math.inf] * before + [reward, -math.inf]
    wanted = [before] if math.isfinite(reward) else []
    assert rejection_sample(rewards, count, beta, Patient(seed)).positions == wanted


exact = st.one_of(st.integers(-24, 24).map(lambda n: n / 8), st.sampled_from([-math.inf, math.nan]))


@steady(120)
@given(st.lists(exact, max_size=12), st.integers(-4000, 4000), counts, betas, seeds)
def test_a_constant_added_to_the_rewards_changes_nothing(
    rewards: list[float], eighths: int, count: int, beta: float, seed: int
) -> None:
    moved = [reward + eighths / 8 for reward in rewards]  # sums of eighths are exact
    one, other = (rejection_sample(some, count, beta, Patient(seed)) for some in (rewards, moved))
    assert one == other


@steady(100)
@given(st.lists(exact, max_size=12), st.sampled_from([0.25, 2.0, 1024.0]), counts, st.sampled_from([0.0, 0.5, 3.0]), seeds)
def test_rewards_and_beta_in_another_unit_change_nothing(
    rewards: list[float], unit: float, count: int, beta: float, seed: int
) -> None:
    other = rejection_sample([reward * unit for reward in rewards], count, beta * unit, Patient(seed))
    assert rejection_sample(rewards, count, beta, Patient(seed)) == other


@steady(100)
@given(st.lists(exact, max_size=12), counts, betas, seeds, st.sampled_from(["first_round", "tournament"]))
def test_pairs_are_of_accepted_candidates_the_better_one_chosen(
    rewards: list[float], count: int, beta: float, seed: int, pairing: str
) -> None:
    rng = Patient(seed)
    positions = rejection_sample(rewards, count, beta, rng).positions
    pairs = make_pairs(positions, rewards, pairing, rng)
    assert len(pairs) == (len(positions) // 2 if pairing == "first_round" else max(len(positions) - 1, 0))
    for chosen, rejected in pairs:
        assert chosen != rejected and {chosen, rejected} <= set(positions)
        assert rewards[chosen] >= rewards[rejected]
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
