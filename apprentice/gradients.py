"""Gradients of large weights, added to those gathered before where these stand.

PyTorch builds each whole beside them first: that of an embedding is nearly all zeros, since a batch meets few of its rows, and
that of a head tied to it is held until the way back has come to the embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

LARGE = 2**20  # numbers of a weight; with fewer, nothing is gained
_in_place = False


@contextmanager
def added_in_place() -> Iterator[None]:
    """Here a backward pass may add to the `.grad` of weights itself; elsewhere, as in `torch.autograd.grad`, it must not."""
    global _in_place
    _in_place, before = True, _in_place
    try:
        yield
    finally:
        _in_place = before


def takes_in_place(weight: Tensor) -> bool:
    """Whether the way back is to add a weight's gradient to its `.grad` itself, and to pass none on."""
    return _in_place and weight.numel() >= LARGE and weight.is_leaf and weight.grad is not None


def add_rows_in_place(model: nn.Module) -> None:
    """Have the large embeddings of a model do so: a class and no wrapper, so that copies are whole."""
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.numel() >= LARGE and _is_plain(module):
            module.__class__ = _Embedding


def _is_plain(module: nn.Embedding) -> bool:
    return module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        found: Tensor = _Rows.apply(self.weight, input, -1 if self.padding_idx is None else self.padding_idx)  # type: ignore[no-untyped-call]
        return found


class _Rows(torch.autograd.Function):
    """weight [V, K] and ids [...] to [..., K]; the row of the padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding = padding
        return embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        weight, ids = ctx.saved_tensors
        if not takes_in_place(weight):
            dense = torch.ops.aten.embedding_dense_backward
            return dense(grad, ids, weight.size(0), ctx.padding, scale_grad_by_freq=False), None, None
        rows = ids.flatten()
        above = grad.reshape(-1, weight.size(1)).masked_fill((rows == ctx.padding)[:, None], 0.0)
        weight.grad.index_add_(0, rows, above)
        return None, None, None
