"""How far a reward model can be trusted: calibration, pair accuracy, agreement of the two orders, saturation."""

import torch
from torch import Tensor

from apprentice.masking import check_shape

SATURATED = 0.95  # a probability above it hardly rises any more: its response earns little for being better still


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int) -> float:
    """Expected calibration error (1706.04599): sum over bins of n_bin / N |mean probability - mean outcome|.

    probabilities: [N] of winning. outcomes: [N], 1 won, 0 lost, 0.5 a tie. The bins have equal width; a bin holds its lower
    edge, the last one 1 as well; empty bins count nothing. Raises ValueError for no rows or values outside [0, 1].
    """
    check_shape("outcomes", outcomes, *probabilities.shape)
    check_shape("probabilities", probabilities, None)
    p, won = probabilities.detach().double().cpu(), outcomes.detach().double().cpu()
    if bins < 1 or not len(p):
        raise ValueError(f"expected_calibration_error: expected bins and rows, got {bins} bins and {len(p)} rows")
    for name, values in (("probabilities", p), ("outcomes", won)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{name}: expected values between 0 and 1, got {values.min():g} to {values.max():g}")
    places = (p * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, places, p - won)
    return float(gaps.abs().sum() / len(p))


def pair_accuracy(margins: Tensor) -> float:
    """Share of pairs [N] whose chosen response is ahead (margin above 0); a tie counts half."""
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


def flip_rate(first_logits: Tensor, second_logits: Tensor) -> float:
    """Share of pairs [N] in which a judge prefers the response shown first in both orders, or the one shown second in both.

    `first_logits`, `second_logits`: logits of P(first shown is better), the second of the same pair in the other order.
    """
    check_shape("second_logits", second_logits, *first_logits.shape)
    return float((first_logits.sign() * second_logits.sign() > 0).float().mean())


def saturated_share(probabilities: Tensor) -> float:
    """Share of responses [N] whose probability of winning is above `SATURATED`."""
    return float((probabilities > SATURATED).float().mean())
