"""Linear layers by oneDNN on processors that MKL, by which PyTorch multiplies, leaves half unused: AMD's with AVX-512, where it
keeps to AVX2."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from apprentice.gradients import takes_in_place

FEWEST = 256  # rows; of fewer oneDNN multiplies little faster
STEP = 128  # rows; oneDNN keeps half a MiB for each number of rows it met, so it is given multiples of this alone


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
        rows = input.reshape(-1, self.in_features).contiguous()
        if torch.is_grad_enabled():
            found: Tensor = _Linear.apply(rows, self.weight, self.bias)  # type: ignore[no-untyped-call]
        else:
            found = _product(rows, self.weight, self.bias)
        return found.view(*input.shape[:-1], self.out_features)


class _Linear(torch.autograd.Function):
    """y = x W' + b, x [M, K], W [N, K], and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        above, whole = grad.contiguous(), None
        if of_weight and takes_in_place(weight):
            weight.grad.addmm_(above.t(), x)
        elif of_weight:
            whole = _outer(above, x)
        return _product(above, weight.t()) if of_x else None, whole, above.sum(0) if of_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] and weight [N, K] to [M, N]. Rows of zeros are added to x, or its last rows are left to PyTorch: what copies
    less."""
    rows, (outputs, inputs) = x.size(0), weight.shape
    step = _step(rows)
    if rows % step == 0:
        return _onednn(x, weight, bias)
    if outputs < inputs:
        first, last = x.split([rows - rows % step, rows % step])
        return torch.cat([_onednn(first, weight, bias), linear(last, weight, bias)])
    padded = x.new_zeros(rows - rows % step + step, inputs)
    padded[:rows] = x
    return _onednn(padded, weight, bias)[:rows]


def _outer(above: Tensor, x: Tensor) -> Tensor:
    """above [M, N] and x [M, K] to [N, K], the sum over M; oneDNN is faster when its own result has the longer rows."""
    if above.size(1) >= x.size(1):
        return _sum_over_rows(x, above).t()
    return _sum_over_rows(above, x)


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    rest = left.size(0) % _step(left.size(0))
    whole = left.size(0) - rest
    found = _onednn(left[:whole].t(), right[:whole].t())
    return found.addmm_(left[whole:].t(), right[whole:]) if rest else found


def _step(rows: int) -> int:
    return max(STEP, 1 << (rows.bit_length() - 4))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Both dense: what is strided otherwise oneDNN multiplies number by number."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
