"""Task arithmetic on models of one architecture: target + coefficient * (plus - minus) (reasoning vectors, 2509.01363).

The step of a tuned model is tiny beside its weights, so it is taken and added in float32 and cast once, at the end. Models
whose tensors, heads or tokenizers differ are refused. `apprentice.vector_folders` does the same on checkpoint folders.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apprentice.demonstrations import digest
from apprentice.policy import weights

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 5  # of many differences, so many are named in an error
_HEADS = ("model_type", "num_attention_heads", "num_key_value_heads")  # equal shapes do not make these equal
_BOOKKEEPING = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
_BOOKKEEPING |= {"bos_token_id", "eos_token_id", "pad_token_id"}


class Form(NamedTuple):
    """What two tensors of one name must share."""

    shape: tuple[int, ...]
    floating: bool

    def __str__(self) -> str:
        return f"{list(self.shape)}{'' if self.floating else ' of whole numbers'}"


Layout = Mapping[str, Form]


@dataclass(frozen=True)
class Vector:
    """plus - minus. tensors: by parameter name, tied ones once, float32 unless asked otherwise. exclude: patterns of the
    names left out. config: the donors' configuration, which a target must match."""

    tensors: Mapping[str, Tensor]
    exclude: tuple[str, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """How large a vector is. norm: L2. relative_norm: over the norm of the same tensors of the model it is held against,
    None where those are 0. changed: share of elements that are not 0. groups: (norm, relative norm) by name, layers
    together. vanishing: by half-precision dtype, the share of the changed elements that the model plus the vector would
    lose when stored so; None where none changed. lineage: whether the donors are parallel or a chain, as far as told."""

    lineage: str
    tensors: int
    elements: int
    changed: float
    norm: float
    relative_norm: float | None
    groups: dict[str, tuple[float, float | None]]
    vanishing: dict[str, float | None]


def difference(
    plus: PreTrainedModel, minus: PreTrainedModel, exclude: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> Vector:
    """The vector plus - minus over the parameters whose names match no pattern of `exclude` (as in "*norm*").

    Raises ValueError when names, shapes, heads or kinds of number differ, a pattern matches nothing, or a difference is
    not finite. Compare the tokenizers by `check_tokenizers`: a model does not carry its own.
    """
    above, below = parameters_of(plus), parameters_of(minus)
    names = common_names({"plus": layout(above), "minus": layout(below)}, exclude)
    check_configs({"plus": plus.config.to_dict(), "minus": minus.config.to_dict()})
    tensors = {name: subtract(name, above[name], below[name], dtype) for name in names}
    return Vector(tensors, tuple(exclude), minus.config.to_dict())


@torch.no_grad()
def add(target: PreTrainedModel, vector: Vector, coefficient: float) -> PreTrainedModel:
    """target + coefficient * vector, in place; returns the target. Excluded parameters and all buffers stay as they are.

    Raises ValueError, the target unchanged, when the two do not fit or a sum is not finite in the target's dtype.
    """
    own = parameters_of(target)
    names = common_names({"the vector": layout(vector.tensors), "the target": layout(own)}, vector.exclude)
    check_configs({"the vector": vector.config, "the target": target.config.to_dict()})
    sums = {name: stepped(name, own[name], vector.tensors[name], coefficient) for name in names}
    for name, tensor in sums.items():
        own[name].copy_(tensor)
    return target


def random_vector(vector: Vector, seed: int) -> Vector:
    """The control: Gaussian noise, each tensor with the norm of the vector's own."""
    return Vector({name: noise_like(name, t, seed) for name, t in vector.tensors.items()}, vector.exclude, vector.config)


def with_norms_of(vector: Vector, control: Vector) -> Vector:
    """The control, each tensor scaled to the norm of the vector's own (one that is 0 stays so): only its direction counts."""
    names = common_names({"the vector": layout(vector.tensors), "the control": layout(control.tensors)}, ())
    return Vector({n: scaled(control.tensors[n], vector.tensors[n]) for n in names}, control.exclude, control.config)


def facts(vector: Vector, model: PreTrainedModel, lineage: str) -> Facts:
    """Facts of a vector held against a model, most usefully its `minus`. lineage: "parallel", "chain" or what is known."""
    own = parameters_of(model)
    tally = Tally()
    for name in common_names({"the vector": layout(vector.tensors), "the model": layout(own)}, vector.exclude):
        tally.add(name, vector.tensors[name], own[name])
    return tally.facts(lineage)


def cosine(a: Vector, b: Vector) -> float:
    """Cosine of two vectors over the same tensors. Raises ValueError when these differ or a vector is 0."""
    dots = [0.0, 0.0, 0.0]
    for name in common_names({"the first vector": layout(a.tensors), "the second": layout(b.tensors)}, ()):
        x, y = a.tensors[name].flatten().double(), b.tensors[name].flatten().double()
        dots = [total + float(p @ q) for total, p, q in zip(dots, (x, x, y), (y, x, y), strict=True)]
    if not dots[1] or not dots[2]:
        raise ValueError("cosine: a vector is 0, so it has no direction")
    return dots[0] / math.sqrt(dots[1] * dots[2])


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, those that share their memory once, under the first of their names."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in weights(model).items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            found[name] = tensor
        seen.add(place)
    return found


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Shape and kind of number of each tensor."""
    return {name: Form(tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in tensors.items()}


def common_names(layouts: Mapping[str, Layout], exclude: Sequence[str]) -> list[str]:
    """Names of the tensors that take part, in the order of the first layout: floating-point, matching no pattern.

    Raises ValueError when the layouts differ in one of them, naming which; when a pattern matches nothing; when none is left.
    """
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for names in layouts.values() for name in names):
            known = list(next(iter(layouts.values())))[:SHOWN]
            raise ValueError(f"exclude: no tensor name matches {pattern!r}; names are like {', '.join(known)}")
    kept = {
        role: {name: form for name, form in names.items() if not any(fnmatchcase(name, pattern) for pattern in exclude)}
        for role, names in layouts.items()
    }
    wrong = []
    for name in dict.fromkeys(name for names in kept.values() for name in names):
        forms = {role: names.get(name) for role, names in kept.items()}
        if any(form and form.floating for form in forms.values()) and len(set(forms.values())) > 1:
            wrong.append(f"{name} is " + ", ".join(f"{form or 'absent'} in {role}" for role, form in forms.items()))
    if wrong:
        raise ValueError(f"not of one architecture, {len(wrong)} tensors differ: {_some(wrong)}")
    names = [name for name, form in next(iter(kept.values())).items() if form.floating]
    if not names:
        raise ValueError(f"exclude: {', '.join(exclude)} leave no tensor to take part")
    return names


def _some(texts: Sequence[str]) -> str:
    return "; ".join(texts[:SHOWN]) + (f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def subtract(name: str, plus: Tensor, minus: Tensor, dtype: torch.dtype) -> Tensor:
    """plus - minus in `dtype`. Raises ValueError when it is not finite."""
    delta = plus.to(dtype) - minus.to(dtype)
    if not delta.isfinite().all():
        raise ValueError(f"{name}: plus - minus is not finite; a checkpoint holds inf or nan")
    return delta


def stepped(name: str, target: Tensor, delta: Tensor, coefficient: float) -> Tensor:
    """target + coefficient * delta in the wider of their dtypes, cast to the target's. Raises ValueError if not finite."""
    wide = torch.promote_types(target.dtype, delta.dtype)
    result = (target.to(wide) + coefficient * delta.to(target.device, wide)).to(target.dtype)
    if not result.isfinite().all():
        raise ValueError(f"{name}: the target plus {coefficient:g} times the vector is not finite in {target.dtype}")
    return result


def noise_like(name: str, delta: Tensor, seed: int) -> Tensor:
    """Gaussian noise with the shape, dtype, device and norm of `delta`, drawn from seed and name alone."""
    generator = torch.Generator().manual_seed(int(digest([seed, name])[:15], 16))
    noise = torch.randn(delta.shape, generator=generator, dtype=delta.dtype)
    return scaled(noise, delta).to(delta.device)


def scaled(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the norm of `like`; one that is 0 stays so."""
    norm = math.sqrt(_square(tensor))
    return tensor * (math.sqrt(_square(like)) / norm) if norm else tensor


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


class Tally:
    """Gathers the facts of a vector one tensor at a time."""

    def __init__(self) -> None:
        self.tensors = self.elements = self.changed = 0
        self.groups: dict[str, tuple[float, float]] = {}  # squared norms of the vector and of the model
        self.lost = dict.fromkeys(HALVES, 0)

    def add(self, name: str, delta: Tensor, own: Tensor) -> None:
        """Count in one tensor of the vector, and the model's tensor of that name."""
        group = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        vector, model = self.groups.get(group, (0.0, 0.0))
        self.groups[group] = (vector + _square(delta), model + _square(own))
        self.tensors += 1
        self.elements += delta.numel()
        moves = delta != 0
        self.changed += int(moves.sum())
        own = own.to(delta)
        for half, dtype in HALVES.items():
            self.lost[half] += int(((own + delta).to(dtype).eq(own.to(dtype)) & moves).sum())

    def facts(self, lineage: str) -> Facts:
        """The facts of all tensors counted in."""
        whole = [sum(squares) for squares in zip(*self.groups.values(), strict=True)]
        return Facts(
            lineage=lineage,
            tensors=self.tensors,
            elements=self.elements,
            changed=self.changed / self.elements,
            norm=whole[0] ** 0.5,
            relative_norm=_ratio(*whole),
            groups={name: (vector**0.5, _ratio(vector, model)) for name, (vector, model) in self.groups.items()},
            vanishing={half: lost / self.changed if self.changed else None for half, lost in self.lost.items()},
        )


def _ratio(vector: float, model: float) -> float | None:
    return (vector / model) ** 0.5 if model else None


def check_configs(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Refuse quantised models and models of different type or heads (ValueError); returns notes on other differences."""
    for role, config in configs.items():
        if config.get("quantization_config"):
            raise ValueError(f"{role} is quantised: its numbers are not its weights; take the checkpoint it was made from")
    notes = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = {role: config.get(key) for role, config in configs.items()}
        if key in _BOOKKEEPING or len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) == 1:
            continue
        text = f"{key} is " + ", ".join(f"{value!r} in {role}" for role, value in values.items())
        if key in _HEADS:
            raise ValueError(f"not of one architecture: {text}")
        notes.append(f"config: {text}")
    return notes


def check_tokenizers(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[str]:
    """Refuse tokenizers that encode text differently (ValueError): vocabulary with special tokens, merges or scores,
    normalisation, pre-tokenisation. Returns notes on chat templates and the roles of special tokens, which may differ."""
    (first, known), *others = tokenizers.items()
    notes = []
    for role, other in others:
        ours, theirs = known.get_vocab(), other.get_vocab()
        if ours != theirs:
            wrong = sorted({token for token, _ in ours.items() ^ theirs.items()})
            raise ValueError(
                f"the tokenizers of {first} and {role} differ in {len(wrong)} tokens: {_some(list(map(repr, wrong)))}"
            )
        mine, yours = _encoding(known), _encoding(other)
        if wrong := [part for part in mine.keys() | yours.keys() if mine.get(part) != yours.get(part)]:
            raise ValueError(f"the tokenizers of {first} and {role} differ in their {', '.join(sorted(wrong))}")
        if known.special_tokens_map != other.special_tokens_map:
            notes.append(f"special tokens: {known.special_tokens_map} in {first}, {other.special_tokens_map} in {role}")
        if known.chat_template != other.chat_template:
            notes.append(f"chat templates of {first} and {role} differ")
    return notes


def _encoding(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides, beside the vocabulary, how a text is encoded."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__}
    content = json.loads(backend.to_str())
    return {
        "merges or scores": content["model"],
        "normalizer": content["normalizer"],
        "pre_tokenizer": content["pre_tokenizer"],
    }
