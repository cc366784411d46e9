"""Generalised advantage estimation (1506.02438) over response tokens."""

import torch
from torch import Tensor

from apprentice.masking import check_shape, masked_mean, masked_var


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each [B, T], from rewards and values [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last response token;
    A_t = sum_l (gamma lambda)^l delta_{t+l};  G_t = A_t + V_t. Zero in the padding, which influences nothing before it.
    """
    check_shape("values", values, *rewards.shape)
    check_shape("mask", mask, *rewards.shape)
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def importance_weights(logps: Tensor, sampler_logps: Tensor, mask: Tensor, cap: float) -> Tensor:
    """[B, T] weights of tokens that another distribution drew than the policy that is trained, both [B, T]; 0 in the padding.

    w_t = min(pi_t / mu_t, cap), truncated importance sampling (Ionides, 2008), here a token at a time.
    """
    check_shape("sampler_logps", sampler_logps, *logps.shape)
    check_shape("mask", mask, *logps.shape)
    return (logps - sampler_logps).exp().clamp(max=cap) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over response tokens: 1 is a perfect critic, 0 a constant one.

    0 when returns do not vary, NaN when one is not finite.
    """
    variance = masked_var(returns, mask)
    return 0.0 if variance <= 1e-12 else float(1 - masked_var(returns - values, mask) / variance)


def mean_per_response(values: Tensor, mask: Tensor) -> float:
    """Mean over responses of the sum over tokens: a KL in nats per response."""
    return float((values * mask).sum(1).mean())


def mean_per_token(values: Tensor, mask: Tensor) -> float:
    """Mean over response tokens."""
    return float(masked_mean(values, mask))
