"""Intervals against numbers worked by hand."""

import math

import pytest

from tasks.intervals import mean_interval, paired_difference, share_interval, t_interval


def test_a_share_has_the_wilson_interval() -> None:
    # 7 of 10, z = 1.959964: centre (p + z2/2n) / (1 + z2/n) = 0.892073 / 1.384146 = 0.644494
    # half = z sqrt(p(1-p)/n + z2/4n2) / (1 + z2/n) = 1.959964 * 0.174939 / 1.384146 = 0.247716
    interval = mean_interval([1.0] * 7 + [0.0] * 3)
    assert interval["mean"] == pytest.approx(0.7)
    assert interval["low"] == pytest.approx(0.644494 - 0.247716, abs=2e-6)
    assert interval["high"] == pytest.approx(0.644494 + 0.247716, abs=2e-6)


def test_a_share_of_all_or_nothing_keeps_a_width() -> None:
    # n of n: low = n / (n + z2) = 20 / 23.841459
    assert mean_interval([1] * 20)["low"] == pytest.approx(20 / 23.841459, abs=1e-6)
    assert mean_interval([0])["high"] == pytest.approx(3.841459 / 4.841459, abs=1e-6)


def test_other_values_have_the_t_interval() -> None:
    # 1, 2, 3, 4: mean 2.5, s2 = 5/3, t(3) = 3.182446: half = 3.182446 * sqrt(5/12) = 2.054260
    interval = mean_interval([1, 2, 3, 4])
    assert interval["mean"] == 2.5
    assert interval["low"] == pytest.approx(2.5 - 2.054260, abs=1e-6)
    assert interval["high"] == pytest.approx(2.5 + 2.054260, abs=1e-6)


def test_one_value_claims_no_interval_and_none_is_an_error() -> None:
    assert mean_interval([0.3]) == {"mean": 0.3, "low": None, "high": None}
    for wrong in (mean_interval, t_interval):
        with pytest.raises(ValueError, match="at least one value"):
            wrong([])


def test_equal_values_have_no_width() -> None:
    assert mean_interval([0.1, 0.1, 0.1]) == {"mean": 0.1, "low": 0.1, "high": 0.1}
    assert t_interval([0.0, 0.0]) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert share_interval([0.0, 0.0])["high"] > 0.5


def test_a_difference_is_paired_over_the_common_ids() -> None:
    # differences over a, b, c: 1, 0, 2: mean 1, s = 1, t(2) = 4.302653: half = 4.302653 / sqrt(3) = 2.484138
    found = paired_difference({"a": 1, "b": 1, "c": 3, "x": 99}, {"c": 1, "b": 1, "a": 0, "y": -99})
    assert found["difference"] == pytest.approx(1.0)
    assert found["low"] == pytest.approx(1 - 2.484138, abs=1e-6)
    assert found["high"] == pytest.approx(1 + 2.484138, abs=1e-6)


def test_pairing_beats_comparing_two_means() -> None:
    hard_and_easy = {i: float(i % 2) * 10 for i in range(50)}
    better = {i: value + 1 + 0.1 * (i % 3) for i, value in hard_and_easy.items()}
    found = paired_difference(better, hard_and_easy)
    assert found["low"] > 1.0
    # unpaired, the two intervals overlap
    assert mean_interval(better.values())["low"] < mean_interval(hard_and_easy.values())["high"]


def test_a_constant_difference_has_no_width_and_no_common_id_is_an_error() -> None:
    assert paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}) == {"difference": 1.0, "low": 1.0, "high": 1.0}
    with pytest.raises(ValueError, match="both sides"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_seeds_pool_by_concatenation() -> None:
    pooled = paired_difference({(0, "a"): 1.0, (1, "a"): 3.0}, {(0, "a"): 0.0, (1, "a"): 1.0})
    assert pooled["difference"] == pytest.approx(1.5)
    # differences 1 and 2: s = sqrt(1/2), t(1) = 12.706205: half = 12.706205 / 2
    assert math.isclose(pooled["high"] - 1.5, 6.3531, abs_tol=1e-4)
