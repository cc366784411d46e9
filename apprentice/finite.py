"""Numbers that go wrong: nothing is trained on a loss, reward or gradient that is NaN or infinite."""

import math
from collections.abc import Mapping


class NumbersError(ArithmeticError):
    """A loss, reward or gradient is not finite; the message says where, and what the figures were."""


def check_finite(where: str, figures: Mapping[str, float | None]) -> None:
    """Raise NumbersError that lists all figures when one of them is NaN or infinite; None counts as not measured."""
    if any(value is not None and not math.isfinite(value) for value in figures.values()):
        listed = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
        raise NumbersError(f"{where}: {listed}")
