"""Models spread over a team: each process holds its part of every weight, gradient and moment (FSDP2, `fully_shard`).

A training pass gathers the weights of a layer as it comes to it; on the way back it adds up the layer's gradients and leaves
each process its part. So all make equally many passes, through the same modules in the same order. Passes without gradient need
not: inside `gathered` the weights are whole on every process.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from apprentice.compute import Compute

Model = TypeVar("Model", bound=nn.Module)
_FORMS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # of each sharded model, what it was, without weights


def shard(model: Model, compute: Compute) -> Model:
    """Leave each process its part of a model that all have whole, where `compute` says so; returns it.

    In training the model itself is called from then on, never a part of it alone; inside `gathered` a part may be.
    """
    if compute.sharding:
        bare = {id(own): nn.Parameter(torch.empty_like(own, device="meta"), own.requires_grad) for own in model.parameters()}
        _FORMS[model] = copy.deepcopy(model, bare)
        _divide(model, init_device_mesh(compute.device.type, (compute.team.size,)))
        _settle(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` divided it."""
    return isinstance(model, FSDPModule)


def form_of(model: Model) -> Model:
    """A copy of a sharded model as it was before, without weights: for `fill`."""
    return copy.deepcopy(_FORMS[model])  # type: ignore[return-value]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Shard a module without weights as `model` is, and give it those: shards of another one, or whole tensors."""
    _divide(module, next(own.device_mesh for own in model.parameters() if isinstance(own, DTensor)))
    own = dict(module.named_parameters())
    module.load_state_dict({name: spread(tensor, own[name]) for name, tensor in tensors.items()}, strict=False, assign=True)
    _settle(module)


def _divide(module: nn.Module, mesh: DeviceMesh) -> None:
    """One unit for each transformer layer, and one for the rest; gradients are summed, as losses are divided by the count."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    for part in [*reversed(layers), module]:  # an inner one before what it stands in
        unit: Any = fully_shard(part, mesh=mesh)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _settle(module: nn.Module) -> None:
    """Name the root: else FSDP takes for it what is called first, and the trunk of a shared critic is called without it."""
    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    state._lazy_init()


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Their weights are whole on each process inside, for passes without gradient in any number and order; one that is not
    sharded is whole anyway. All processes enter and leave together."""
    units = [part for model in models for part in model.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, put together where it is sharded: by all processes at once."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().cpu().contiguous()


def take_part(state: Any) -> None:
    """Do this process's part where another calls `whole` of each tensor in the same nested dicts and lists, in their order."""
    if isinstance(state, DTensor):
        state.full_tensor()
    elif isinstance(state, (dict, list)):
        for item in state.values() if isinstance(state, dict) else state:
            take_part(item)


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all have whole, where `like` is sharded; shards are copied."""
    if not isinstance(like, DTensor):
        return tensor
    if not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.detach().clone()
