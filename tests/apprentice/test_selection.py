"""Which candidates are fine-tuned on: by hand, at the edges, and what holds for any rewards."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.selection import above, best, top_share

INF, NAN = math.inf, math.nan
rewards_lists = st.lists(st.floats(-50, 50) | st.sampled_from([INF, -INF, NAN]), max_size=12)
quarters = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=12)
shares = st.integers(0, 100).map(lambda n: n / 100)


def test_best_by_hand() -> None:
    assert best([1.0, 4.0, 3.0]) == [1]
    assert best([2.0, 5.0, 5.0, 5.0]) == [1]  # the first of equals
    assert best([-7.0]) == [0]
    assert best([-INF, -9.0, NAN, INF]) == [1]  # not finite: may not be taken
    assert best([-INF, NAN, INF]) == best([]) == []


def test_top_share_by_hand() -> None:
    rewards = [1.0, 4.0, 3.0, 2.0]
    assert top_share(rewards, 0.25) == [1]
    assert top_share(rewards, 0.5) == [1, 2]
    assert top_share(rewards, 0.51) == [1, 2, 3]  # rounded up
    assert top_share([3.0, 1.0, 4.0, 2.0], 0.5) == [0, 2]  # in the order of the candidates, not of the rewards
    assert top_share(rewards, 1.0) == [0, 1, 2, 3]
    assert top_share(rewards, 0.0) == []
    assert top_share(rewards, 1e-6) == [1]
    assert top_share([5.0, 5.0, 6.0, 5.0], 0.5) == [0, 2]  # the first of equals
    assert top_share([0.0] * 4, 0.5) == [0, 1]


def test_the_share_is_of_all_candidates_and_only_finite_ones_are_taken() -> None:
    assert top_share([-INF, 2.0, -INF, 1.0], 0.5) == [1, 3]
    assert top_share([-INF, 2.0, -INF, 1.0], 0.25) == [1]
    assert top_share([-INF, 2.0, NAN, INF], 1.0) == [1]
    assert top_share([-INF, NAN], 1.0) == top_share([], 0.5) == []


@pytest.mark.parametrize(("share", "size", "count"), [(0.28, 25, 7), (0.07, 100, 7), (0.55, 100, 55), (0.1, 30, 3)])
def test_a_share_that_is_a_whole_number_is_not_rounded_up(share: float, size: int, count: int) -> None:
    # in floats 0.28 * 25 is a little above 7
    assert top_share(list(map(float, range(size))), share) == list(range(size - count, size))


def test_above_by_hand() -> None:
    assert above([0.0, 10.0, 8.0, 7.0, -0.0], 0.7) == [1, 2]  # 0.7 itself is not above
    # 2, 4, 3, 2.5 become 0, 1, 0.5, 0.25
    assert above([2.0, 4.0, 3.0, 2.5], 0.2) == [1, 2, 3]
    assert above([2.0, 4.0, 3.0, 2.5], 0.0) == [1, 2, 3]  # all but the lowest
    assert above([2.0, 4.0, 4.0], 0.99) == [1, 2]
    assert above([2.0, 4.0, 4.0], 1.0) == []


def test_without_differences_nothing_is_above() -> None:
    for level in (0.0, 0.7):
        assert above([3.0, 3.0, 3.0], level) == above([3.0], level) == above([], level) == []
        assert above([-INF, 3.0, NAN], level) == []


def test_what_is_not_finite_sets_no_scale() -> None:
    assert above([-INF, 0.0, 1.0, 0.9, INF, NAN], 0.5) == [2, 3]


@given(rewards_lists, shares)
def test_the_best_is_in_every_share_and_above_every_level_below_1(rewards: list[float], share: float) -> None:
    finite = [i for i, r in enumerate(rewards) if math.isfinite(r)]
    winner = best(rewards)
    assert len(winner) == bool(finite)
    assert all(rewards[i] <= rewards[w] for w in winner for i in finite)
    assert share == 0 or set(winner) <= set(top_share(rewards, share))
    if share < 1 and len({rewards[i] for i in finite}) > 1:
        assert set(winner) <= set(above(rewards, share))


@given(rewards_lists, shares)
def test_no_one_left_out_is_better_than_one_taken(rewards: list[float], share: float) -> None:
    for taken in (top_share(rewards, share), above(rewards, share)):
        assert taken == sorted(set(taken))
        assert all(math.isfinite(rewards[i]) for i in taken)
        left = [r for i, r in enumerate(rewards) if i not in taken and math.isfinite(r)]
        assert not left or all(rewards[i] >= max(left) for i in taken)


@given(quarters, shares, st.sampled_from([0.5, 2.0, 8.0]), st.integers(-8, 8))
def test_scale_and_offset_of_a_prompts_rewards_do_not_matter(
    rewards: list[float], share: float, factor: float, offset: int
) -> None:
    moved = [factor * r + offset for r in rewards]  # exact
    assert best(moved) == best(rewards)
    assert top_share(moved, share) == top_share(rewards, share)
    assert above(moved, share) == above(rewards, share)


@given(quarters, st.integers(0, 100))
def test_a_higher_level_keeps_fewer_and_a_higher_share_more(rewards: list[float], percent: int) -> None:
    level = percent / 100
    assert set(above(rewards, level)) <= set(above(rewards, level / 2))
    assert set(top_share(rewards, level / 2)) <= set(top_share(rewards, level))
    assert len(top_share(rewards, level)) == -(-percent * len(rewards) // 100)
