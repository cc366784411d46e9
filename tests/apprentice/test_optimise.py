"""One optimiser step against AdamW written out, and the schedules."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from apprentice.optimise import Optimiser, constant, flat_then_decay, linear_decay


def test_linear_decay_by_hand() -> None:
    factor = linear_decay(10, warmup_share=0.2)  # 2 steps up
    assert [round(factor(step), 9) for step in (0, 1, 2, 5, 9)] == [0.5, 0.9, 0.8, 0.5, 0.1]
    assert linear_decay(100, 0.0)(0) == 1.0
    assert linear_decay(100, 0.0, floor=0.3)(99) == 0.3


def test_flat_then_decay_by_hand() -> None:
    factor = flat_then_decay(100, warmup_steps=4)
    assert [factor(step) for step in (0, 1, 3, 39)] == [0.25, 0.5, 1.0, 1.0]
    assert factor(70) == pytest.approx(0.3 / 0.6)
    assert factor(99) == 0.03
    assert flat_then_decay(100, 0)(0) == 1.0
    assert constant(10**6) == 1.0


def test_three_steps_match_adamw_written_out() -> None:
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimiser = Optimiser([weight], 0.1, max_grad_norm=100.0, schedule=lambda step: 1 / (step + 1), weight_decay=0.5)
    w = 2.0
    m = v = 0.0
    for step, g in enumerate([1.0, -3.0, 0.5]):
        weight.grad = torch.tensor([g], dtype=torch.float64)
        rate = 0.1 / (step + 1)
        assert optimiser.clip() == pytest.approx(abs(g)) and optimiser.rate == pytest.approx(rate)
        optimiser.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= rate * 0.5 * w  # decoupled weight decay
        w -= rate * (m / (1 - 0.9 ** (step + 1))) / (math.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        assert float(weight.detach()) == pytest.approx(w, abs=1e-9)
        assert weight.grad is None


def test_gradients_are_clipped_by_their_common_norm() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimiser = Optimiser([a, b], 0.1, max_grad_norm=1.0)
    assert optimiser.clip() == pytest.approx(5.0)  # before clipping
    optimiser.step()
    moments = [values["exp_avg"].item() for values in optimiser.state()["moments"].values()]
    assert moments == pytest.approx([0.1 * 3 / 5, 0.1 * 4 / 5], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_dropped_changes_nothing(bad: float) -> None:
    def after(*gradients: float) -> tuple[list[float], dict[str, Any]]:
        a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
        optimiser = Optimiser([a, b], 0.1, 1.0, linear_decay(9, 0.5), weight_decay=0.5)
        for g in gradients:
            a.grad, b.grad = torch.tensor([1.0]), torch.tensor([g])
            fine = math.isfinite(optimiser.clip())
            assert fine == math.isfinite(g)
            optimiser.step() if fine else optimiser.drop()
            assert a.grad is None and b.grad is None
        return a.tolist() + b.tolist(), optimiser.state()

    assert after(1.0, bad, bad, 3.0) == after(1.0, 3.0)


def test_frozen_parameters_are_left_alone() -> None:
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    live = nn.Parameter(torch.ones(1))
    live.grad = torch.ones(1)
    Optimiser([frozen, live], 0.1, 1.0, weight_decay=0.9).step()
    assert frozen.tolist() == [1.0]
    assert live.tolist()[0] < 1.0


def test_a_restored_optimiser_goes_on_as_if_nothing_had_happened() -> None:
    def make(weight: nn.Parameter) -> Optimiser:
        return Optimiser([weight], 0.1, 1.0, linear_decay(6, 0.5))

    def steps(weight: nn.Parameter, optimiser: Optimiser, gradients: list[float]) -> None:
        for g in gradients:
            weight.grad = torch.tensor([float(g)])
            optimiser.step()

    whole = nn.Parameter(torch.ones(1))
    steps(whole, make(whole), [1, 2, -1, 3, 0.5])
    part = nn.Parameter(torch.ones(1))
    optimiser = make(part)
    steps(part, optimiser, [1, 2])
    saved, weight = copy.deepcopy(optimiser.state()), nn.Parameter(part.detach().clone())
    fresh = make(weight)
    fresh.restore(saved)
    assert fresh.steps == 2
    steps(weight, fresh, [-1, 3, 0.5])
    assert torch.equal(weight, whole)
