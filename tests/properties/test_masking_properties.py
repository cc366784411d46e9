"""Masked arithmetic against loops over the entries, written out."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apprentice.masking import length_mask, masked_mean, masked_sum, masked_var, whiten
from tests.properties.strategies import steady


@st.composite
def ragged(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int]:
    """Rows of eighths (their sums are exact, and two of them differ by no rounding), their lengths, and a width."""
    width = draw(st.integers(1, 7))
    eighths = st.integers(-800, 800).map(lambda n: n / 8)
    rows = draw(st.lists(st.lists(eighths, min_size=width, max_size=width), min_size=1, max_size=5))
    lengths = draw(st.lists(st.integers(0, width), min_size=len(rows), max_size=len(rows)))
    return rows, lengths, width


def tensors(case: tuple[list[list[float]], list[int], int]) -> tuple[Tensor, Tensor, list[float]]:
    """Values, mask, and the values inside as a plain list."""
    rows, lengths, width = case
    inside = [row[t] for row, length in zip(rows, lengths, strict=True) for t in range(length)]
    return torch.tensor(rows, dtype=torch.float64), length_mask(torch.tensor(lengths), width).double(), inside


@steady(60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_a_mask_is_1_before_each_length(lengths: list[int], width: int) -> None:
    wanted = []
    for length in lengths:
        row = []
        for t in range(width):
            row.append(1.0 if t < length else 0.0)
        wanted.append(row)
    assert length_mask(torch.tensor(lengths), width).tolist() == wanted


@steady(100)
@given(ragged())
def test_sum_mean_and_variance_are_those_of_a_loop(case: tuple[list[list[float]], list[int], int]) -> None:
    rows, lengths, _ = case
    values, mask, inside = tensors(case)
    sums = []
    for row, length in zip(rows, lengths, strict=True):
        total = 0.0
        for t in range(length):
            total += row[t]
        sums.append(total)
    assert masked_sum(values, mask).tolist() == sums
    count = max(len(inside), 1)
    mean = math.fsum(inside) / count
    assert float(masked_mean(values, mask)) == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert float(masked_mean(values, mask, 3.0)) == pytest.approx(math.fsum(inside) / 3, rel=1e-12, abs=1e-12)
    variance = math.fsum((x - mean) ** 2 for x in inside) / count
    assert float(masked_var(values, mask)) == pytest.approx(variance, rel=1e-9, abs=1e-9)


@steady(60)
@given(ragged(), st.data())
def test_micro_batches_with_the_whole_count_add_up_however_they_are_cut(
    case: tuple[list[list[float]], list[int], int], data: st.DataObject
) -> None:
    values, mask, inside = tensors(case)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4))), len(values)]
    parts = [masked_mean(values[a:b], mask[a:b], float(len(inside))) for a, b in pairwise(cuts)]
    assert float(sum(parts)) == pytest.approx(float(masked_mean(values, mask)), rel=1e-12, abs=1e-9)


@steady(100)
@given(ragged())
def test_whitening_is_that_of_a_loop(case: tuple[list[list[float]], list[int], int]) -> None:
    values, mask, inside = tensors(case)
    white = whiten(values, mask)
    assert (white[mask == 0] == 0).all()
    found = [x for row, length in zip(white.tolist(), case[1], strict=True) for x in row[:length]]
    if len(set(inside)) <= 1:
        assert found == [0.0] * len(inside)
        return
    mean = math.fsum(inside) / len(inside)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in inside) / len(inside))
    assert found == pytest.approx([(x - mean) / std for x in inside], rel=1e-6, abs=1e-9)  # epsilon 1e-8 beside the std
    assert math.fsum(found) == pytest.approx(0, abs=1e-6)


@steady(60)
@given(st.floats(-1e6, 1e6, width=32), st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_equal_values_whiten_to_exactly_0_whatever_their_mean_is_rounded_to(value: float, lengths: list[int]) -> None:
    white = whiten(torch.full((len(lengths), 20), value), length_mask(torch.tensor(lengths), 20))
    assert (white == 0).all()


@steady(60)
@given(ragged(), st.floats(-1e6, 1e6))
def test_what_stands_in_the_padding_changes_nothing(case: tuple[list[list[float]], list[int], int], garbage: float) -> None:
    values, mask, _ = tensors(case)
    other = torch.where(mask == 1, values, garbage)
    for function in (masked_sum, masked_mean, masked_var, whiten):
        assert torch.equal(function(other, mask), function(values, mask))
