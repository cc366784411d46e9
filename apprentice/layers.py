"""How the layers of a model compute: by which products, activations kept or computed again, packed or not, and in which type
their weights stand."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from apprentice.attention import use_attention
from apprentice.compute import Compute
from apprentice.gradients import add_rows_in_place
from apprentice.linear import half_unused, use_onednn

Model = TypeVar("Model", bound=PreTrainedModel)


def set_layers(model: Model, compute: Compute) -> Model:
    """Have a model compute as `compute` says; returns it. Raises ValueError where its architecture cannot."""
    if compute.attention != "auto":
        use_attention(model, compute.attention)
    if compute.gradient_checkpointing:
        _recompute(model)
    if compute.device.type == "cpu" and compute.dtype == torch.float32:
        add_rows_in_place(model)
        if half_unused():
            use_onednn(model)
    if compute.packing:
        _check_apart(model, compute)
    return model


def hold_as_cast(model: Model, compute: Compute, lossless: bool = False) -> Model:
    """Have the linear layers of a frozen model hold their weights as mixed precision casts them for each product: the same
    numbers from half the memory. lossless: so that `float` brings the model back, thus only weights that the cast changes
    nothing of, and none that is an embedding too."""
    for module, name, weight in _to_cast(model, compute):
        cast = weight.detach().to(compute.dtype)
        if not lossless or (torch.equal(cast.float(), weight) and weight is not model.get_input_embeddings().weight):
            setattr(module, name, nn.Parameter(cast, requires_grad=False))
    return model


@contextmanager
def weights_as_cast(model: Any, compute: Compute) -> Iterator[None]:
    """The same of any model, inside: cast once, whatever number of products it is asked for."""
    kept = _to_cast(getattr(model, "whole", model), compute)  # of an adapter, the model it stands on
    try:
        for module, name, weight in kept:
            setattr(module, name, nn.Parameter(weight.detach().to(compute.dtype), requires_grad=False))
        yield
    finally:
        for module, name, weight in kept:
            setattr(module, name, weight)


def _to_cast(model: nn.Module, compute: Compute) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Weights and biases of the linear layers that autocast casts; sharded ones are cast by who puts them together."""
    if compute.dtype == torch.float32 or compute.sharding:
        return []
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    found = [(module, name, weight) for module in layers for name, weight in module.named_parameters(recurse=False)]
    return [one for one in found if one[2].dtype == torch.float32]


def _recompute(model: PreTrainedModel) -> None:
    """Keep the input of each layer only. transformers' own switch works in training mode alone, which turns dropout on."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"compute.gradient_checkpointing: {type(model).__name__} has no layers that can be computed again")
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _recomputed(kind)


@cache
def _recomputed(kind: Any) -> Any:
    """The same layer, its forward pass done again on the way back; a class and no wrapper, so that copies are whole."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *inputs, **named)
        return checkpoint(kind.forward, self, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return type(kind.__name__, (kind,), {"forward": forward})


@torch.no_grad()
def _check_apart(model: PreTrainedModel, compute: Compute) -> None:
    """A sequence packed behind another must have the logits it has alone, and the other's tokens no say in them."""

    def logits(*sequences: list[int]) -> Tensor:
        ids = torch.tensor([[token for ids in sequences for token in ids]], device=model.device)
        positions = torch.tensor([[place for ids in sequences for place in range(len(ids))]], device=model.device)
        with compute.autocast():
            found: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -2:]
        return found.float()

    one, other, by_itself = logits([0, 1], [2, 0]), logits([1, 2], [2, 0]), logits([2, 0])
    if not torch.equal(one, other) or float((one - by_itself).abs().max()) > 0.01 * float(by_itself.std()):
        raise ValueError(f"compute.packing: {type(model).__name__} does not keep packed sequences apart; set it to false")
