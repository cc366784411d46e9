"""Calibration error, pair accuracy, flip rate and saturation, by hand."""

import math

import pytest
import torch

from apprentice.calibration import expected_calibration_error, flip_rate, pair_accuracy, saturated_share


def ece(probabilities: list[float], outcomes: list[float], bins: int) -> float:
    return expected_calibration_error(torch.tensor(probabilities), torch.tensor(outcomes), bins)


def test_the_calibration_error_by_hand() -> None:
    # two bins: [0, 0.5) holds 0.1 and 0.3, mean 0.2, won 1/2: gap 0.3; [0.5, 1] holds 0.5, 0.9 and 1, mean 0.8, won 2/3:
    # gap 2/15; together 2/5 * 0.3 + 3/5 * 2/15
    assert ece([0.1, 0.9, 0.3, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0, 0.0], 2) == pytest.approx(0.2, abs=1e-6)
    # one bin: the mean probability 0.56 against the share 3/5
    assert ece([0.1, 0.9, 0.3, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0, 0.0], 1) == pytest.approx(0.04, abs=1e-6)


def test_gaps_of_both_signs_add_up_in_two_bins_and_cancel_in_one() -> None:
    assert ece([0.25, 0.75], [0.0, 1.0], 2) == 0.25
    assert ece([0.25, 0.75], [0.0, 1.0], 1) == 0.0


def test_a_probability_that_is_the_share_of_wins_has_no_error() -> None:
    assert ece([0.25] * 4 + [0.75] * 4, [1, 0, 0, 0, 1, 1, 1, 0], 10) == 0.0
    assert ece([0.5, 0.5], [0.5, 0.5], 10) == 0.0


def test_sure_and_wrong_is_the_worst() -> None:
    assert ece([0.0, 1.0], [1.0, 0.0], 7) == 1.0


def test_the_calibration_error_matches_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200, generator=generator, dtype=torch.float64)
    won = (torch.rand(200, generator=generator) < p**2).double()
    total = 0.0
    for low in range(10):
        rows = [i for i in range(200) if low / 10 <= p[i] < (low + 1) / 10]
        if rows:
            gap = sum(float(p[i]) for i in rows) / len(rows) - sum(float(won[i]) for i in rows) / len(rows)
            total += len(rows) / 200 * abs(gap)
    assert expected_calibration_error(p, won, 10) == pytest.approx(total, abs=1e-12)
    assert total > 0.1  # p^2 is not p


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan])
def test_only_values_between_zero_and_one_are_taken(bad: float) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        ece([bad, 0.5], [1.0, 0.0], 4)
    with pytest.raises(ValueError, match="outcomes"):
        ece([0.5, 0.5], [1.0, bad], 4)


def test_no_rows_no_bins_and_unequal_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        ece([], [], 4)
    with pytest.raises(ValueError, match="0 bins"):
        ece([0.5], [1.0], 0)
    with pytest.raises(ValueError, match="outcomes"):
        ece([0.5, 0.5], [1.0], 4)


def test_accuracy_counts_a_tie_half() -> None:
    assert pair_accuracy(torch.tensor([2.0, -1.0, 0.0, 0.1])) == 0.625


def test_a_flip_is_the_same_side_in_both_orders() -> None:
    # first in both orders; second in both; the same answer, thrice; no opinion in one order
    first, second = torch.tensor([1.0, -2.0, 1.0, -1.0, 3.0, 0.0]), torch.tensor([0.5, -0.1, -3.0, 2.0, -1.0, 1.0])
    assert flip_rate(first, second) == pytest.approx(2 / 6)


def test_saturation_is_above_095() -> None:
    assert saturated_share(torch.tensor([0.96, 0.94, 0.5, 0.999])) == 0.5
