"""Processes that do one training together: each computes its share of the micro-batches, and sums and exchanges join them.

All run the same program on the same rows with the same draws, so their weights stay equal and the results are those of one
process with the same global batch, up to the order in which gradients are added. Nothing is pickled.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

Part = TypeVar("Part")
_BUCKET = 2**25  # most numbers added at once


@dataclass(frozen=True)
class Team:
    """`size` processes, of which this is number `rank`. Each calls the same methods in the same order."""

    rank: int = 0
    size: int = 1

    def mine(self, parts: Sequence[Part]) -> Sequence[Part]:
        """This process's share of the parts: every `size`-th, from its own number on."""
        return parts[self.rank :: self.size]

    def rounds(self, parts: Sequence[Part]) -> list[tuple[Part, bool]]:
        """The same, as many on each process: one that has fewer repeats the last part, which does not count (False)."""
        own = [(part, True) for part in self.mine(parts)]
        return own if len(own) == -(-len(parts) // self.size) else [*own, (parts[-1], False)]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of the gradients; a process without one adds zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            joined = torch.cat([grad.reshape(-1) for grad in bucket])
            with _heard():
                dist.all_reduce(joined)
            for grad, part in zip(bucket, joined.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))

    def add(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The sum of each figure over the processes that have it, in the order of their numbers."""
        if self.size == 1:
            return dict(figures)
        total: dict[str, float] = {}
        for said in self._exchange(json.dumps(figures).encode()):
            for name, value in json.loads(said).items():
                total[name] = total.get(name, 0.0) + value
        return total

    def first(self, value: int) -> int:
        """What the first process says."""
        said = torch.tensor([value], device=_device())
        with _heard():
            dist.broadcast(said, 0)
        return int(said)

    def share(self, own: Sequence[Tensor]) -> list[list[Tensor]]:
        """What each process gives, in the order of their numbers, on the CPU."""
        mine = {f"{place:06}": tensor.detach().cpu().contiguous() for place, tensor in enumerate(own)}
        return [[tensor for _, tensor in sorted(load(said).items())] for said in self._exchange(save(mine))]

    def _exchange(self, own: bytes) -> list[bytes]:
        device = _device()
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        with _heard():
            dist.all_gather(sizes, torch.tensor([len(own)], device=device))
        room = int(max(sizes))
        padded = torch.frombuffer(bytearray(own.ljust(room, b"\0")), dtype=torch.uint8).to(device)
        found = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in range(self.size)]
        with _heard():
            dist.all_gather(found, padded)
        return [bytes(part[: int(size)].cpu().numpy()) for part, size in zip(found, sizes, strict=True)]


def _device() -> torch.device:
    """Where the processes exchange."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype together, each group of at most `_BUCKET` numbers, or of one tensor."""
    found: list[list[Tensor]] = []
    room, kind = 0, None
    for tensor in tensors:
        if tensor.numel() > room or tensor.dtype != kind:
            found.append([])
            room, kind = _BUCKET, tensor.dtype
        found[-1].append(tensor)
        room -= tensor.numel()
    return found


ALONE = Team()


class TeamError(RuntimeError):
    """Another process of the team is gone."""


@contextmanager
def _heard() -> Iterator[None]:
    """Say that another process is gone, some seconds after it was noticed: who started that one may know why."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(5.0)
        raise TeamError(f"another process of the team is gone: {' '.join(str(error).split())[:200]}") from error


def join(rank: int, size: int, meeting: str, device: torch.device, seconds: float) -> Team:
    """Meet the others at `meeting` (`file:///path`, or `env://` as torchrun sets it); one that is waited for longer than
    `seconds` ends the others. On one machine they keep to its loopback interface; on CUDA each takes the device of its number.

    Raises RuntimeError when the others do not come.
    """
    if meeting.startswith("file:"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    return Team(rank, size)


def leave() -> None:
    """Part from the others."""
    dist.destroy_process_group()
