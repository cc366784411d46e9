"""The self-reward and its placement on tokens (Self-Rewarding PPO, 2510.21090).

r(x, y) = log pi_target(y|x) - w log pi_baseline(y|x),   target = SFT, baseline = base, w = 1 in the paper.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.masking import check_shape, masked_sum
from apprentice.policy import score
from apprentice.tokens import Batch

Span = Literal["sum", "mean", "eos_token"]
Placement = Literal["eos", "dense"]


def last_token(mask: Tensor) -> Tensor:
    """[B, T] mask to a float [B, T] that is 1 on each row's last response token."""
    steps = torch.arange(mask.size(1), device=mask.device)
    return (steps == mask.sum(1, keepdim=True) - 1).float()


def token_rewards(target_logps: Tensor, baseline_logps: Tensor, mask: Tensor, baseline_weight: float = 1.0) -> Tensor:
    """[B, T] parts of the self-reward, one a token; 0 in the padding."""
    check_shape("baseline_logps", baseline_logps, *target_logps.shape)
    check_shape("mask", mask, *target_logps.shape)
    return (target_logps - baseline_weight * baseline_logps) * mask


def self_reward(parts: Tensor, mask: Tensor, span: Span = "sum") -> Tensor:
    """[B] reward of each response from its [B, T] parts: their sum (the paper), mean, or the last token's part."""
    if span == "eos_token":
        return masked_sum(parts, last_token(mask))
    total = masked_sum(parts, mask)
    return total / mask.sum(1).clamp(min=1) if span == "mean" else total


def place(parts: Tensor, mask: Tensor, ended: Tensor, placement: Placement, span: Span, missing_eos_reward: float) -> Tensor:
    """[B, T] rewards: the whole on the last response token (`eos`), or each token its own part (`dense`).

    A response that never ended earns `missing_eos_reward` on its last token, whatever its parts.
    """
    check_shape("ended", ended, parts.size(0))
    if placement == "eos":
        return place_total(self_reward(parts, mask, span), mask, ended, missing_eos_reward)
    last = last_token(mask)
    scale = mask.sum(1, keepdim=True).clamp(min=1) if span == "mean" else 1.0
    placed = (parts * last if span == "eos_token" else parts * mask) / scale
    return torch.where(ended[:, None], placed, last * missing_eos_reward)


def place_total(totals: Tensor, mask: Tensor, ended: Tensor, missing_eos_reward: float) -> Tensor:
    """[B, T] rewards from a reward [B] of each response: the whole on its last token, or the rule for one that never ended."""
    check_shape("ended", ended, totals.size(0))
    return last_token(mask) * torch.where(ended, totals, missing_eos_reward)[:, None]


def kl_penalty(logps: Tensor, anchor_logps: Tensor, mask: Tensor, estimator: Literal["k1", "k3"] = "k1") -> Tensor:
    """[B, T] estimates of KL(policy || anchor) at sampled tokens.

    k1 = log pi - log anchor is unbiased and may be negative; k3 = exp(-k1) - 1 + k1 never is.
    """
    k1 = (logps - anchor_logps) * mask
    return k1 if estimator == "k1" else (torch.expm1(-k1) + k1).clamp(min=0)


def length_slope(rewards: Tensor, lengths: Tensor) -> float:
    """Least-squares slope of reward [B] against length [B] in nats a token; 0 when all lengths agree."""
    centred = lengths.float() - lengths.float().mean()
    spread = (centred**2).sum()
    return float((centred * rewards).sum() / spread) if spread > 0 else 0.0


def split_by_class(parts: Tensor, mask: Tensor, classes: Tensor, count: int) -> list[float]:
    """Mean over responses of the reward earned by each of `count` classes of tokens: parts, mask, classes [B, T]."""
    return [float(masked_sum(parts, mask * (classes == kind)).mean()) for kind in range(count)]


def sequence_rewards(
    target: PreTrainedModel, baseline: PreTrainedModel, batch: Batch, compute: Compute, baseline_weight: float = 1.0
) -> Tensor:
    """[B] self-rewards of a batch, summed over the response, from the two frozen models."""
    parts = token_rewards(score(target, batch, compute), score(baseline, batch, compute), batch.mask, baseline_weight)
    return self_reward(parts, batch.mask)


def ranker_reward(first_logits: Tensor, second_logits: Tensor) -> Tensor:
    """[B] pointwise reward of a response against a baseline from a pairwise ranker (RSO, 2309.06657, section 3.2).

    `first_logits`: logit of P(response preferred) with the response shown first; `second_logits`: logit of P(first shown
    preferred) with the baseline shown first. Averaged over both orders in logit space, so that an additive position bias
    cancels and the baseline's own reward is exactly 0.
    """
    check_shape("second_logits", second_logits, *first_logits.shape)
    return 0.5 * (first_logits - second_logits)
