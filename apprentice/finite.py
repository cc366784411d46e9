"""Numbers that go wrong: nothing is trained on a loss, reward or gradient that is NaN or infinite.

What is done about one is the rule of `Recorder`.
"""

import math
from collections.abc import Mapping
from typing import Any


class NumbersError(ArithmeticError):
    """A loss, reward or gradient is not finite; the message says where, and what the figures were."""


class BadSignError(NumbersError):
    """The figures are finite and tell that a run goes wrong, and it was to stop at that; the message has figures and cause."""


def all_finite(figures: Mapping[str, Any]) -> bool:
    """Whether no figure is NaN or infinite, those of nested mappings included; None counts as not measured."""
    return all(
        all_finite(value) if isinstance(value, Mapping) else not isinstance(value, float) or math.isfinite(value)
        for value in figures.values()
    )


def listed(figures: Mapping[str, float | None]) -> str:
    """The figures in a line, those not measured left out."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
