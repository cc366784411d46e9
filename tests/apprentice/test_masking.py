"""Masked arithmetic against sums written out."""

import pytest
import torch

from apprentice.masking import check_shape, length_mask, masked_mean, masked_sum, masked_var, whiten

VALUES = torch.tensor([[1.0, 2.0, 100.0], [4.0, 100.0, 100.0]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)


def test_check_shape_names_the_argument_and_both_shapes() -> None:
    check_shape("x", torch.zeros(2, 3), 2, 3)
    check_shape("x", torch.zeros(2, 3), None, 3)
    for wanted in [(2, 4), (2,), (2, 3, 1), (None, 2)]:
        with pytest.raises(ValueError, match=r"rewards: expected shape .*, got \(2, 3\)"):
            check_shape("rewards", torch.zeros(2, 3), *wanted)


def test_length_mask() -> None:
    assert length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_sum_mean_and_variance_by_hand() -> None:
    assert masked_sum(VALUES, MASK).tolist() == [3.0, 4.0]
    assert float(masked_mean(VALUES, MASK)) == pytest.approx(7 / 3, abs=1e-12)
    # ((1 - 7/3)^2 + (2 - 7/3)^2 + (4 - 7/3)^2) / 3 = (16 + 1 + 25) / 27
    assert float(masked_var(VALUES, MASK)) == pytest.approx(42 / 27, abs=1e-12)


def test_the_mean_of_nothing_is_zero() -> None:
    assert float(masked_mean(VALUES, torch.zeros_like(MASK))) == 0.0


def test_G4_micro_batches_with_the_whole_count_add_up_to_the_mean() -> None:
    # rows hold 2 and 1 tokens: 3 / 3 + 4 / 3, and not the mean of the means (1.5 + 4) / 2
    parts = [masked_mean(VALUES[i : i + 1], MASK[i : i + 1], 3.0) for i in range(2)]
    assert float(sum(parts)) == pytest.approx(float(masked_mean(VALUES, MASK)), abs=1e-12)


def test_P4_whitened_values_have_mean_0_and_std_1_over_the_mask() -> None:
    torch.manual_seed(0)
    values, mask = 5 + 3 * torch.randn(7, 9, dtype=torch.float64), length_mask(torch.tensor([9, 1, 4, 3, 9, 2, 5]), 9)
    white = whiten(values, mask)
    inside = [float(white[i, j]) for i in range(7) for j in range(9) if mask[i, j]]
    assert len(inside) == 33
    mean = sum(inside) / 33
    assert mean == pytest.approx(0, abs=1e-9)
    assert sum((x - mean) ** 2 for x in inside) / 33 == pytest.approx(1, abs=1e-7)  # epsilon 1e-8 beside a std of 3
    assert (white[mask == 0] == 0).all()


@pytest.mark.parametrize("constant", [0.0, -1.0, 0.1, 1 / 3, 7.7, 1e4])
@pytest.mark.parametrize("size", [1, 3, 7, 13, 100])
def test_P4_constant_values_whiten_to_exactly_0(constant: float, size: int) -> None:
    # in float32 the mean of equal values may be off by a rounding, which must not be blown up to a std of 1
    mask = torch.ones(2, size)
    mask[0, size // 2 :] = 0
    assert (whiten(torch.full((2, size), constant), mask) == 0).all()


def test_P4_a_small_true_spread_is_not_taken_for_rounding() -> None:
    white = whiten(torch.tensor([[1.0, 1.001]]), torch.ones(1, 2))
    assert white.tolist()[0] == pytest.approx([-1, 1], rel=1e-3)


def test_garbage_in_the_padding_changes_nothing() -> None:
    other = torch.where(MASK == 1, VALUES, -1e6)
    assert masked_mean(other, MASK) == masked_mean(VALUES, MASK)
    assert torch.equal(whiten(other, MASK), whiten(VALUES, MASK))
