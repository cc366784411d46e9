"""95% intervals of a mean and of a paired difference.

One value a prompt: samples of one prompt are averaged first, so the prompt is the unit and intervals do not shrink with
the number of samples. Values of several seeds pool by concatenation (for differences: ids that carry the seed).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

LEVEL = 0.95
Interval = dict[str, float | None]


def mean_interval(values: Iterable[float]) -> Interval:
    """Mean with its 95% interval: Wilson's for values that are all 0 or 1, Student's t for others.

    Wilson's is the one that stays honest at the ends: 20 right of 20 gives [0.84, 1], not [1, 1].
    """
    numbers = [float(value) for value in values]
    return share_interval(numbers) if numbers and set(numbers) <= {0.0, 1.0} else t_interval(numbers)


def share_interval(values: Iterable[float]) -> Interval:
    """Mean of 0/1 values with Wilson's score interval."""
    from scipy.stats import binomtest  # here, not above: a second of start-up

    numbers = list(values)
    bounds = binomtest(round(sum(numbers)), len(numbers)).proportion_ci(LEVEL, method="wilson")
    return {"mean": sum(numbers) / len(numbers), "low": float(bounds.low), "high": float(bounds.high)}


def t_interval(values: Iterable[float]) -> Interval:
    """Mean with Student's t interval, mean +- t(n - 1) s / sqrt(n).

    One value says nothing of the spread, so `low` and `high` are None. Equal values give an interval of no width, which
    is right for what is constant by construction (the KL of a model to itself is 0).
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("an interval needs at least one value, got none")
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1:
        return {"mean": mean, "low": None, "high": None}
    if min(numbers) == max(numbers):
        return {"mean": numbers[0], "low": numbers[0], "high": numbers[0]}
    from scipy.special import stdtrit

    variance = math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    half = float(stdtrit(len(numbers) - 1, (1 + LEVEL) / 2)) * math.sqrt(variance / len(numbers))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired_difference(values: Mapping[Any, float], baseline: Mapping[Any, float]) -> Interval:
    """Mean of `values - baseline` over the ids both have, with Student's t interval of the differences.

    Pairing removes what prompts have in common (some are hard for every model), so small gains show with few prompts.
    """
    common = [key for key in values if key in baseline]
    if not common:
        raise ValueError("a paired difference needs ids that both sides have, got none")
    interval = t_interval(values[key] - baseline[key] for key in common)
    return {"difference": interval["mean"], "low": interval["low"], "high": interval["high"]}
