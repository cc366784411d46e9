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
Loss = tuple[Tensor, Metrics]
PreferenceLoss = Literal["sigmoid_norm", "hinge_norm", "hinge", "ipo"]


def next_token_loss(logps: Tensor, mask: Tensor, count: float | None = None) -> Loss:
    """Negative log-likelihood per response token, token-weighted: logps, mask [B, T]."""
    check_shape("mask", mask, *logps.shape)
    loss = -masked_mean(logps, mask, count)
    return loss, {"loss": loss.detach()}


def weighted_next_token_loss(logps: Tensor, mask: Tensor, weights: Tensor, count: float | None = None) -> Loss:
    """Negative log-likelihood per unit of weight (C-RLFT, 2309.11235): logps, mask [B, T]; weights, not negative,
    [B] per response or [B, T] per token, constants.

    L = -sum_t w_t logps_t / sum_t w_t over response tokens: only ratios of weights matter, and equal ones give
    `next_token_loss`. `count` is the sum of the weights over the response tokens of the whole batch. Raises ValueError when
    that sum is not positive: rows of weight 0 teach nothing and belong left out.
    """
    check_shape("mask", mask, *logps.shape)
    check_shape("weights", weights, *logps.shape[: max(1, weights.dim())])
    weighted = mask * (weights if weights.dim() == 2 else weights[:, None])
    total = float(weighted.sum()) if count is None else count
    if not total > 0:
        raise ValueError(f"weights: expected a positive sum over response tokens, got {total:g}; leave rows of weight 0 out")
    loss = -(logps * weighted).sum() / total
    return loss, {"loss": loss.detach()}


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, count: float | None = None
) -> Loss:
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
) -> Loss:
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
) -> Loss:
    """Preference losses on summed response log-probabilities, all tensors [B] (RSO, 2309.06657, section 3.3).

    With h = logps - reference_logps and margin = gamma (h_chosen - h_rejected):
    sigmoid_norm (= DPO): -log sigmoid(margin);   hinge_norm: max(0, 1 - margin);
    hinge (SLiC): max(0, 1 - gamma (chosen_logps - rejected_logps)), no reference;
    ipo (2310.12036): (h_chosen - h_rejected - 1 / (2 gamma))^2, on sums.
    Metrics, means over pairs: those of the loss, and displacement, -h_chosen: how far the likelihood of what was chosen fell
    while only the gap was asked for (2410.08847).
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
        "displacement": (reference_chosen_logps - chosen_logps).detach().sum() / total,
    }


def contrastive_loss(logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float, count: float | None = None) -> Loss:
    """Contrastive policy gradient (CoPG, 2406.19185), minimised: k >= 2 samples of one prompt a row, from any source.

    logps (summed over the response, with gradient), reference_logps and rewards (constants): [B, k]. With h = logps -
    reference_logps, and over pairs of a row d = h_i - h_j, D = R_i - R_j:
    L = -mean over pairs of D d - (beta / 2) d^2, minimal at pi_ref exp(R / beta) / Z; its gradient by logps_i is -2 / k times
    the leave-one-out advantage of R - beta h (RLOO). Pairs of equal reward count: they pull d to 0. beta = 0 leaves D d.
    Metrics: reward_variance within a row (over k - 1), residual_variance, that of R - beta h, which starts there at the
    reference and is 0 at the optimum, logps, and displacement, -h, which for samples of the reference estimates its KL to the
    policy; each a mean over rows.
    """
    check_shape("logps", logps, None, None)
    check_shape("reference_logps", reference_logps, *logps.shape)
    check_shape("rewards", rewards, *logps.shape)
    if logps.size(1) < 2:
        raise ValueError(f"logps: expected at least 2 samples of each prompt to contrast, got shape {tuple(logps.shape)}")
    total = logps.size(0) if count is None else count
    log_ratios, gaps = _centred(logps - reference_logps), _centred(rewards)

    def covariance(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum() / (logps.size(1) - 1) / total

    # the mean product of differences over the pairs of a row is twice the covariance
    loss = beta * covariance(log_ratios, log_ratios) - 2 * covariance(gaps, log_ratios)
    residual = (gaps - beta * log_ratios).detach()
    return loss, {
        "loss": loss.detach(),
        "residual_variance": covariance(residual, residual),
        "reward_variance": covariance(gaps, gaps),
        "logps": logps.detach().mean(1).sum() / total,
        "displacement": (reference_logps - logps).detach().mean(1).sum() / total,
    }


def sign_rewards(rewards: Tensor) -> Tensor:
    """Rewards [B, k] of which only the order counts: with them `contrastive_loss` has (beta / 2) times the gradient of IPO,
    (d_chosen_rejected - 1 / (2 beta))^2 averaged over the pairs of a row.

    R'_i = sum_j sign(R_i - R_j) / (2 k): for k = 2 these are 1/4 for the better and -1/4 for the worse (2406.19185,
    property 3). A tie adds 0, the mean of both labels.
    """
    check_shape("rewards", rewards, None, None)
    return (rewards[:, :, None] - rewards[:, None, :]).sign().sum(2) / (2 * rewards.size(1))


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(1, keepdim=True)
