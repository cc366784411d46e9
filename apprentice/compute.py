"""Where and how tensors are computed: device, precision, threads, determinism, and the budget of one forward pass."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from apprentice.gradients import added_in_place
from apprentice.packing import Shelf
from apprentice.sections import ComputeConfig
from apprentice.team import ALONE, Team

FLASH = "flash_attention_2"
VLLM_PYTHON = "APPRENTICE_VLLM_PYTHON"  # the environment variable that names a Python with vLLM
OWN_VLLM = Path(__file__).parents[1] / ".vllm" / "bin" / "python"  # the one that `make vllm` makes
Piece = TypeVar("Piece")
Part = TypeVar("Part")


def keep_nothing(make: Callable[[], Piece]) -> Piece:
    """Make a piece of work; the `keep` of those who do not continue interrupted work."""
    return make()


@dataclass(frozen=True)
class Compute:
    """A resolved device and dtype; `forward_tokens` bounds rows times width of one forward pass, `cache_tokens` that of the
    cache while sampling; sampler, attention, gradient checkpointing and packing as in params. `keep` makes each piece of
    sampling and scoring, or gives what an interrupted run made of it, then on the CPU: only for work that makes the same pieces
    in the same order again, so never while a model is trained. `team`: the processes that share each batch and all pieces.
    `sharding`: each holds a part of every model."""

    device: torch.device
    dtype: torch.dtype
    forward_tokens: int = 1024
    cache_tokens: int = 65536
    keep: Callable[[Callable[[], Piece]], Piece] = keep_nothing
    sampler: str = "own"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    packing: bool = False
    team: Team = ALONE
    sharding: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision where `dtype` asks for it: weights stay float32, matrix products are cast; weights that come and go
        are not kept as cast."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=not self.sharding)

    def pieces(self, makes: Sequence[Callable[[], list[Tensor]]]) -> Iterator[list[Tensor]]:
        """The pieces in their order: kept ones, and of the rest each process of the team makes its share and has them all, then
        on the CPU."""
        for start in range(0, len(makes), self.team.size):
            part = makes[start : start + self.team.size]
            if self.team.size == 1:
                yield self.keep(part[0])
            else:
                made = cache(partial(self._together, part))
                yield from (self.keep(partial(_place, made, number)) for number in range(len(part)))

    def _together(self, makes: Sequence[Callable[[], list[Tensor]]]) -> list[list[Tensor]]:
        """A piece of each process that has one to make."""
        return self.team.share([tensor for make in self.team.mine(makes) for tensor in make()])

    def gather(self, parts: Iterable[Part], one: Callable[[Part], tuple[Tensor, Mapping[str, Any]]]) -> dict[str, float]:
        """Gather the gradient of a training step: this process computes its share of the micro-batches, `one` the loss and the
        figures of each; returns the sums of the figures over the team.

        With sharding the processes make equally many passes, for which some add a pass that counts 0.
        """
        every, totals = list(parts), dict[str, float]()
        mine = self.team.rounds(every) if self.sharding else [(part, True) for part in self.team.mine(every)]
        with added_in_place():
            for part, counts in mine:
                loss, figures = one(part)
                (loss if counts else 0.0 * loss).backward()
                for name, value in figures.items() if counts else ():
                    totals[name] = totals.get(name, 0.0) + float(value)
        return self.team.add(totals)

    def micro_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Split row numbers into groups of similar length, each within `forward_tokens` once laid out; longest group first."""
        if not self.packing:
            return self.padded_batches(lengths)
        return _packed(lengths, self.forward_tokens, width=self.forward_tokens if self.one_row else 0)

    def padded_batches(self, lengths: Sequence[int], budget: int | None = None) -> Iterator[list[int]]:
        """The same of rows that are padded and never packed, within `budget` tokens (None: `forward_tokens`)."""
        rows = _longest_first(lengths)
        while rows:
            most = max(1, (budget or self.forward_tokens) // lengths[rows[0]])
            yield rows[:most]
            rows = rows[most:]

    def sampling_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The same of rows to sample from, within `cache_tokens`; where no piece is kept, so many that the whole team is at
        work to the end. Kept ones are the same for any number of processes."""
        groups = list(self.padded_batches(lengths, self.cache_tokens))
        if self.team.size == 1 or self.keep is not keep_nothing:
            return groups
        most = -(-len(groups) // self.team.size) * self.team.size
        budgets = range(min(max(lengths), self.cache_tokens), self.cache_tokens)
        above = bisect_left(budgets, True, key=lambda budget: len(list(self.padded_batches(lengths, budget))) <= most)
        return list(self.padded_batches(lengths, budgets.start + above))

    @property
    def one_row(self) -> bool:
        """Whether packed sequences all stand in one row: flash attention keeps them apart there only, and at no cost."""
        return self.attention == FLASH


def _packed(lengths: Sequence[int], budget: int, width: int) -> Iterator[list[int]]:
    """Each group is laid on a shelf as wide as its longest row, or as `width`."""
    group, shelf = list[int](), Shelf(1)
    for row in _longest_first(lengths):
        if group and not shelf.fits(lengths[row], budget // shelf.width):
            yield group
            group = []
        if not group:
            shelf = Shelf(max(width, lengths[row]))
        shelf.place(lengths[row])
        group.append(row)
    if group:
        yield group


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def _place(made: Callable[[], list[Piece]], number: int) -> Piece:
    return made()[number]


def set_up(config: ComputeConfig) -> Compute:
    """Resolve `auto`, set the threads, turn deterministic algorithms on for this process, and large pages for large tensors.

    Raises ValueError when a named device is not there, or what flash attention or vLLM needs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when PyTorch first asks for memory
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads what is not written
    torch.backends.cuda.matmul.allow_tf32 = True
    found, compute = devices(), resolve(config)
    if compute.device.type not in found:
        raise ValueError(f"compute.device: expected a device of this machine ({', '.join(found)}), got {compute.device.type!r}")
    if compute.attention == FLASH:
        _check_flash(compute)
    if compute.sampler == "vllm":
        vllm_python()
    return compute


def devices() -> list[str]:
    """The kinds of device of this machine, the one that `auto` takes first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, found in there.items() if found]


def resolve(config: ComputeConfig) -> Compute:
    """What the section comes to on its device, which need not be here; `auto` is one of this machine."""
    kind = devices()[0] if config.device == "auto" else config.device
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and kind == "cuda")
    return Compute(
        torch.device(kind),
        torch.bfloat16 if bf16 else torch.float32,
        config.forward_tokens or (1024 if kind == "cpu" else 16384),
        config.cache_tokens,
        sampler=config.sampler,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        packing=config.packing,
        sharding=config.sharding,
    )


def _check_flash(compute: Compute) -> None:
    """Without its package transformers would take a kernel from the hub, or fail at the first batch."""
    wanted = {
        "a CUDA device": compute.device.type == "cuda",
        "bfloat16": compute.dtype == torch.bfloat16,
        "the package flash-attn, 2.3.3 or newer": is_flash_attn_2_available(),
    }
    if missing := [name for name, found in wanted.items() if not found]:
        raise ValueError(
            f"compute.attention: {FLASH} needs {', '.join(missing)}; take auto or sdpa, which has PyTorch's own flash kernels"
        )


def vllm_python() -> Path:
    """A Python that has vLLM. Raises ValueError where there is none."""
    named = Path(os.environ.get(VLLM_PYTHON) or OWN_VLLM)
    if not named.is_file():
        raise ValueError(
            f"compute.sampler: vllm needs a Python that has vLLM, and {named} is not there; run `make vllm`, or name one in "
            f"{VLLM_PYTHON}"
        )
    return named


CPU = Compute(torch.device("cpu"), torch.float32)
