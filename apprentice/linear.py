"""Linear layers by oneDNN on processors that MKL, by which PyTorch multiplies, leaves half unused: AMD's with AVX-512, where it
keeps to AVX2."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

FEWEST = 128  # rows; oneDNN compiles a kernel for each shape it meets, and fewer rows do not earn that back


@cache
def half_unused() -> bool:
    """Whether this machine's processor is such a one, and PyTorch has oneDNN's product of float32 matrices."""
    about = torch.cpu.get_capabilities()
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and "AMD" in about.get("cpu_name", "") and bool(about.get("avx512_f"))


def use_onednn(model: nn.Module) -> None:
    """Multiply by oneDNN in the linear layers of a float32 model: a class and no wrapper, so that copies are whole."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _OneDNNLinear


class _OneDNNLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if input.numel() < FEWEST * self.in_features:
            return linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return _product(input.contiguous(), self.weight, self.bias)
        found: Tensor = _Linear.apply(input.contiguous(), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return found


class _Linear(torch.autograd.Function):
    """y = x W' + b, x [..., K], W [N, K], and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, above = x.flatten(0, -2), grad.contiguous().flatten(0, -2)
        return (
            _product(above, weight.t()).view_as(x) if of_x else None,
            _outer(above, rows) if of_weight else None,
            above.sum(0) if of_bias else None,
        )


def _outer(above: Tensor, rows: Tensor) -> Tensor:
    """[M, N] and [M, K] to [N, K], the sum over M; oneDNN is faster when its own result has the longer rows."""
    if above.size(1) < rows.size(1):
        return _product(above.t(), rows.t())
    return _product(rows.t(), above.t()).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Both dense: what is strided otherwise oneDNN multiplies number by number."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
