"""Masked arithmetic, and the check of shapes at the door; masked means are taken nowhere else."""

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, *wanted: int | None) -> None:
    """Raise ValueError unless `tensor` has the shape `wanted` (None: any size)."""
    got = tuple(tensor.shape)
    if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
        raise ValueError(f"{name}: expected shape {wanted}, got {got}")


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """[B] lengths to a float mask [B, width]: 1 before each row's length, 0 after."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).float()


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last axis where the mask is 1: [B, T] to [B]."""
    return (values * mask).sum(-1)


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean over all unmasked entries.

    `count` replaces the number of unmasked entries: the count of the whole batch when this is one of its micro-batches,
    so that the gradients of the micro-batches add up to the batch's.
    """
    count = mask.sum() if count is None else torch.as_tensor(count, device=values.device)
    return (values * mask).sum() / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance over all unmasked entries."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Shift to mean 0 and scale to std 1 over the mask; constant values give 0; masked entries are 0."""
    mean, std = masked_mean(values, mask), masked_var(values, mask).sqrt()
    constant = std <= 1e-6 * mean.abs()  # the mean of equal values may be off by a rounding
    return torch.where(constant, 0.0, (values - mean) * mask / (std + epsilon))
