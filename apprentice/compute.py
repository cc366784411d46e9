"""Where and how tensors are computed: device, precision, threads, determinism, and the budget of one forward pass."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from apprentice.sections import ComputeConfig

Piece = TypeVar("Piece")


def keep_nothing(make: Callable[[], Piece]) -> Piece:
    """Make a piece of work; the `keep` of those who do not continue interrupted work."""
    return make()


@dataclass(frozen=True)
class Compute:
    """A resolved device and dtype; `forward_tokens` bounds rows times width of one forward pass, `cache_tokens` that of the
    cache while sampling. `keep` makes each piece of sampling and scoring, or gives what an interrupted run made of it, then
    on the CPU: only for work that makes the same pieces in the same order again, so never while a model is trained."""

    device: torch.device
    dtype: torch.dtype
    forward_tokens: int = 1024
    cache_tokens: int = 65536
    keep: Callable[[Callable[[], Piece]], Piece] = keep_nothing

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision where `dtype` asks for it: weights stay float32, matrix products are cast."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def micro_batches(self, lengths: Sequence[int], budget: int | None = None) -> Iterator[list[int]]:
        """Split row numbers into groups of similar length, each within `budget` tokens once padded (None: `forward_tokens`);
        longest group first."""
        budget = budget or self.forward_tokens
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        group: list[int] = []
        for row in order:
            if group and (len(group) + 1) * lengths[group[0]] > budget:
                yield group
                group = []
            group.append(row)
        if group:
            yield group


def set_up(config: ComputeConfig) -> Compute:
    """Resolve `auto`, set the threads, and turn deterministic algorithms on for this process.

    Raises ValueError when a named device is not there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, found in there.items() if found) if config.device == "auto" else config.device
    if not there[kind]:
        found = ", ".join(name for name, yes in there.items() if yes)
        raise ValueError(f"compute.device: expected a device of this machine ({found}), got {kind!r}")
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and kind == "cuda")
    forward_tokens = config.forward_tokens or (1024 if kind == "cpu" else 16384)
    return Compute(torch.device(kind), torch.bfloat16 if bf16 else torch.float32, forward_tokens, config.cache_tokens)


CPU = Compute(torch.device("cpu"), torch.float32)
