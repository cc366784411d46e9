"""What is computed over the vocabulary, some rows at a time: float32 numbers of the logits' size never exist at once.

Where a gradient flows, it takes the place of the logits in memory, in their own type.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROOM = {"cpu": 2**20, "cuda": 2**26, "mps": 2**26}  # numbers worked on at once; on a CPU about what a core's caches hold


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log_softmax(logits)[ids] in fp32, with gradient: logits [..., V], ids [...].

    On the way back what a model computed as logits is overwritten by its gradient: nothing may read it after that. PyTorch
    raises RuntimeError where another gradient needs it.
    """
    rows, columns = logits.flatten(0, -2), ids.flatten()[:, None]
    if not logits.requires_grad:
        return by_rows(_gathered, rows, columns).view(ids.shape)
    found: Tensor = _TokenLogps.apply(rows, columns, logits.is_leaf)  # type: ignore[no-untyped-call]
    return found.view(ids.shape)


def _gathered(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, ids).squeeze(-1)


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats: logits [..., V] to [...]."""

    def entropy(rows: Tensor) -> Tensor:
        logps = rows.log_softmax(-1, dtype=torch.float32)
        return -(logps.exp() * logps).sum(-1)

    return by_rows(entropy, logits.flatten(0, -2)).view(logits.shape[:-1])


def by_rows(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`function` of as many rows at once as there is room for, joined; rows: [N, ...], the first [N, V]."""
    parts = [function(*some) for some in _some(*rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _some(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, ROOM[rows[0].device.type] // rows[0].size(1))
    if len(rows[0]) <= size:
        return iter([rows])
    return zip(*(tensor.split(size) for tensor in rows), strict=True)


class _TokenLogps(torch.autograd.Function):
    """d logp / d logits = 1 at the token's place - softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, leaf: bool) -> Tensor:
        logps = by_rows(_gathered, logits, ids)
        ctx.save_for_backward(logits, ids, logits.gather(-1, ids).squeeze(-1) - logps)
        ctx.leaf = leaf
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, normaliser = ctx.saved_tensors
        found = torch.empty_like(logits) if ctx.leaf else logits
        for rows, token, shift, above, out in _some(logits, ids, normaliser[:, None], grad[:, None], found):
            part = torch.sub(rows, shift, out=out if out.dtype == shift.dtype else None)
            part.exp_().mul_(-above)
            part.scatter_(-1, token, part.gather(-1, token) + above)
            if part is not out:
                out.copy_(part)
        return found, None, None
