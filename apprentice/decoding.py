"""One token more for each row of a batch, in tensors that stay where they are, so that a step can be recorded once and played
again: see `apprentice.replay`.

A draw is keyed by (seed, prompt id, sample index, position) and inverts the CDF, so it depends on no batch mate, resume point
or number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from apprentice.attention import step_mask
from apprentice.compute import Compute
from apprentice.foreign_checkpoint import other_layers
from apprentice.logps import by_rows, token_logps


@dataclass(frozen=True)
class Draws:
    """How a token is drawn: temperature 0 is greedy; `end` ends a row."""

    end: int
    temperature: float


@dataclass
class Rows:
    """What decoding B rows has come to. number: [B] which request. uniforms: [B, T] of its draws. token: [B] drawn last.
    position: [B] that it goes to. ended: [B] bool. lengths: [B] of the responses. tokens, logps: [B, T] so far. attended:
    [B, W] bool, slots in use. place: [1] the next slot. step: [1] of the token drawn last. cache: keys and values in turn, each
    [B, H, W, D]."""

    number: Tensor
    uniforms: Tensor
    token: Tensor
    position: Tensor
    ended: Tensor
    lengths: Tensor
    tokens: Tensor
    logps: Tensor
    attended: Tensor
    place: Tensor
    step: Tensor
    cache: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Rows":
        """Of all tensors in the order of the fields."""
        names = [each.name for each in fields(cls)][:-1]
        return cls(**dict(zip(names, tensors, strict=False)), cache=list(tensors[len(names) :]))

    @property
    def tensors(self) -> list[Tensor]:
        """The same order."""
        *own, cache = vars(self).values()
        return [*own, *cache]

    def stay(self, index: Tensor) -> None:
        """Keep some rows."""
        for name, tensor in vars(self).items():
            if name == "cache":
                for number, part in enumerate(tensor):  # in turn, so that one alone is there twice
                    tensor[number] = part[index]
            elif name not in ("place", "step"):
                setattr(self, name, tensor[index])

    def widen(self, slots: int) -> None:
        """Have `slots` slots."""
        more = slots - self.attended.size(1)
        for number, part in enumerate(self.cache):
            self.cache[number] = pad(part, (0, 0, 0, more))
        self.attended = pad(self.attended, (0, more))


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """[B] int64 row keys and [T] positions to [B, T] float64 in [0, 1): splitmix64 of both, the same on every device."""
    x = keys[:, None] + (positions + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() / 2**53


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the CDF: logits [B, V], uniform [B] to token ids [B].

    Probabilities are summed as whole multiples of 2^-31: exact in any order, where CUDA has no deterministic sum of floats.
    """
    return by_rows(_inverted, logits, uniform)


def _inverted(logits: Tensor, uniform: Tensor) -> Tensor:
    cdf = logits.float().softmax(-1).mul_(2**31).long().cumsum_(-1)
    total = cdf[:, -1]
    threshold = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(cdf, threshold[:, None], right=True).squeeze(-1)


def prefill(model: Any, prompts: Sequence[Sequence[int]], room: int, compute: Compute) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Passes over P prompts of similar length each: logits [P, V] of the next token, attended [P, W] bool, and keys and values
    of W slots, as many as the longest prompt has tokens and `room`. The last token of each prompt stands before that.

    Raises ValueError for a model whose layers keep something else than keys and values of each token.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    attended = torch.zeros(len(prompts), longest + room, dtype=torch.bool, device=compute.device)
    logits, cache = list[Tensor](), list[Tensor]()
    order = list[int]()
    for group in compute.padded_batches(lengths):
        width = lengths[group[0]]
        ids = torch.tensor([[0] * (width - lengths[row]) + list(prompts[row]) for row in group], device=compute.device)
        used = torch.tensor([[0] * (width - lengths[row]) + [1] * lengths[row] for row in group], device=compute.device)
        found, parts = _read(model, ids, used)
        if not cache:  # in the type that attention casts it to
            shapes = [(len(prompts), part.size(1), longest + room, part.size(3)) for part in parts]
            cache = [part.new_zeros(shape, dtype=compute.dtype) for part, shape in zip(parts, shapes, strict=True)]
        rows = torch.tensor(group, device=compute.device)
        with _any_order():
            attended[:, longest - width : longest].index_copy_(0, rows, used.bool())
            for slots, part in zip(cache, parts, strict=True):
                slots[:, :, longest - width : longest].index_copy_(0, rows, part.to(slots.dtype))
        logits.append(found)
        order += group
    back = torch.tensor(order, device=compute.device).argsort()
    return torch.cat(logits)[back], attended, cache


def _read(model: Any, ids: Tensor, attended: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The next logits [B, V] after left-padded ids [B, L], and the keys and values of all layers, in turn."""
    caches: list[DynamicCache] = []

    def make(one: Any) -> DynamicCache:
        if others := other_layers(one.config):
            raise ValueError(f"{type(one).__name__}: it has layers that are no attention ({', '.join(others)})")
        caches.append(DynamicCache())
        return caches[-1]

    logits = _next_logits(model, ids, attended, (attended.cumsum(1) - 1).clamp(min=0), make)
    return logits, [part for cache in caches for layer in cache.layers for part in (layer.keys, layer.values)]


def _next_logits(model: Any, ids: Tensor, attended: Tensor, positions: Tensor, make: Callable[[Any], Cache]) -> Tensor:
    """[B, V] after ids [B, L]; `make` makes the cache of a model."""
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=attended,
        position_ids=positions,
        past_key_values=model.new_cache(make) if hasattr(model, "new_cache") else make(model),
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


def record(rows: Rows, logits: Tensor, draws: Draws) -> None:
    """Draw a token from logits [B, V] for each row and write it down at its step; one that has ended stays as it is."""
    scaled = logits.float() if draws.temperature in (0.0, 1.0) else logits.float() / draws.temperature
    uniform = rows.uniforms.index_select(1, rows.step).squeeze(1)
    drawn = draw(scaled, uniform) if draws.temperature else scaled.argmax(-1)
    logps = token_logps(scaled, drawn).masked_fill(rows.ended, 0.0)
    rows.token.copy_(drawn.masked_fill(rows.ended, draws.end))
    with _any_order():
        rows.tokens.index_copy_(1, rows.step, rows.token[:, None])
        rows.logps.index_copy_(1, rows.step, logps[:, None])
    rows.lengths.add_(~rows.ended)
    rows.ended.logical_or_(rows.token == draws.end)


def advance(model: Any, rows: Rows, draws: Draws) -> None:
    """One step: the model reads the tokens drawn last, and the next are drawn."""
    rows.attended.index_fill_(1, rows.place, 1)
    parts = iter(rows.cache)

    def make(one: Any) -> Cache:
        return Cache(
            layers=[_Slots(next(parts), next(parts), rows.place) for _ in range(len(DynamicCache(config=one.config).layers))]
        )

    logits = _next_logits(model, rows.token[:, None], step_mask(model, rows.attended), rows.position[:, None], make)
    for counter in (rows.position, rows.place, rows.step):
        counter.add_(1)
    record(rows, logits, draws)


class _Slots(DynamicLayer):
    """A layer's keys and values where they are, the new ones put at `place`; attention masks the slots that are not in use."""

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        with _any_order():
            self.keys.index_copy_(2, self.place, key_states.to(self.keys.dtype))
            self.values.index_copy_(2, self.place, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.place

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.size(2), 0


@contextmanager
def _any_order() -> Iterator[None]:
    """For what is written once, whatever comes first: CUDA's deterministic way would sort, and copy the whole cache."""
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked)
