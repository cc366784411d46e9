"""Losses: pure functions of tensors that return (loss, metrics): a scalar to differentiate and detached scalars.

`count` is the number of tokens or pairs of the whole batch when the tensors are one of its micro-batches: the parts' losses,
gradients and metrics then add up to the batch's.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from apprentice.masking import check_shape, masked_mean

Metrics = dict[str, Tensor]
PreferenceLoss = Literal["sigmoid_norm", "hinge_norm", "hinge", "ipo"]


def next_token_loss(logps: Tensor, mask: Tensor, count: float | None = None) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood per response token, token-weighted: logps, mask [B, T]."""
    check_shape("mask", mask, *logps.shape)
    loss = -masked_mean(logps, mask, count)
    return loss, {"loss": loss.detach()}


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, count: float | None = None
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (1707.06347, eq. 7), minimised; all tensors [B, T].

    L = mean_t max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  ratio = exp(logps - old_logps).
    Metrics: approx_kl (k3 of old to new), clip_fraction.
    """
    check_shape("old_logps", old_logps, *logps.shape)
    check_shape("advantages", advantages, *logps.shape)
    log_ratio = (logps - old_logps).clamp(-20, 20) * mask
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask, count)
    outside = ((ratio - 1).abs() > clip_range).float()
    return loss, {
        "policy_loss": loss.detach(),
        "approx_kl": masked_mean(ratio - 1 - log_ratio, mask, count).detach(),
        "clip_fraction": masked_mean(outside, mask, count).detach(),
    }


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
    count: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Half the squared error of the critic, all tensors [B, T]; with `clip_range` the larger of plain and clipped error.

    L = 0.5 mean_t max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2).
    """
    check_shape("returns", returns, *values.shape)
    error = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns) ** 2)
    loss = 0.5 * masked_mean(error, mask, count)
    return loss, {"value_loss": loss.detach()}


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    kind: PreferenceLoss,
    gamma: float,
    count: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Preference losses on summed response log-probabilities, all tensors [B] (RSO, 2309.06657, section 3.3).

    With h = logps - reference_logps and margin = gamma (h_chosen - h_rejected):
    sigmoid_norm (= DPO): -log sigmoid(margin);   hinge_norm: max(0, 1 - margin);
    hinge (SLiC): max(0, 1 - gamma (chosen_logps - rejected_logps)), no reference;
    ipo (2310.12036): (h_chosen - h_rejected - 1 / (2 gamma))^2, on sums.
    """
    for name, tensor in (("rejected_logps", rejected_logps), ("reference_chosen_logps", reference_chosen_logps)):
        check_shape(name, tensor, *chosen_logps.shape)
    check_shape("reference_rejected_logps", reference_rejected_logps, *chosen_logps.shape)
    gap = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    if kind == "sigmoid_norm":
        losses = -logsigmoid(gamma * gap)
    elif kind == "hinge_norm":
        losses = relu(1 - gamma * gap)
    elif kind == "hinge":
        losses = relu(1 - gamma * (chosen_logps - rejected_logps))
    elif kind == "ipo":
        losses = (gap - 1 / (2 * gamma)) ** 2
    else:
        raise ValueError(f"kind: expected sigmoid_norm, hinge_norm, hinge or ipo; got {kind!r}")
    total = losses.numel() if count is None else count
    loss = losses.sum() / total
    return loss, {
        "loss": loss.detach(),
        "accuracy": (gap > 0).float().sum() / total,
        "margin": (gamma * gap).detach().sum() / total,
        "chosen_logps": chosen_logps.detach().sum() / total,
        "rejected_logps": rejected_logps.detach().sum() / total,
    }
