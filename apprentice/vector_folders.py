"""Task arithmetic on checkpoint folders, one tensor at a time: no model is built in memory, nothing is unpickled.

Only safetensors are read, in one file or in shards. The numbers are those of `apprentice.vectors`, bit for bit.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from apprentice.demonstrations import atomic_folder
from apprentice.foreign_checkpoint import INDEX, SINGLE, weight_places
from apprentice.policy import PINNED, checkpoint_arguments, load_tokenizer
from apprentice.vectors import (
    Facts,
    Form,
    Layout,
    Tally,
    check_configs,
    check_tokenizers,
    common_names,
    noise_like,
    stepped,
    subtract,
)

SHARD_BYTES = 2 * 2**30  # what is held in memory before it is written
COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # config, tokenizer, chat template
LEFT = {PINNED, "trainer_state.json"}


class Checkpoint:
    """A local checkpoint folder: config, tokenizer, and its tensors, each read when asked for.

    Raises ValueError for a folder that is no whole safetensors checkpoint of a causal language model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = place_of(folder)
        self.config = self._config()
        self._handles: dict[Path, Any] = {}
        self.files = weight_places(self.folder)
        for name, first in _tied(self.config).items():
            if name in self.files and first in self.files and torch.equal(self.tensor(name), self.tensor(first)):
                del self.files[name]  # stored twice: the loader ties it again

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights."""
        with _told(f"{self.folder}: no tokenizer that can be read"):
            return load_tokenizer(self.folder)

    @cached_property
    def layout(self) -> Layout:
        """Shape and kind of number of each tensor, tied ones once."""
        found = {}
        for name, file in self.files.items():
            part = self._handle(file).get_slice(name)
            dtype = part.get_dtype()
            found[name] = Form(tuple(part.get_shape()), dtype.startswith("F") or dtype == "BF16")
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored."""
        found: Tensor = self._handle(self.files[name]).get_tensor(name)
        return found

    def weight_files(self) -> list[Path]:
        """The files the tensors stand in."""
        return sorted(set(self.files.values()))

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def _config(self) -> PreTrainedConfig:
        with _told(f"{self.folder}: no config.json that can be read"):
            return AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)


@dataclass(frozen=True)
class FolderVector:
    """plus - minus of two folders, never whole in memory. random_seed: noise of the same norms instead, the control."""

    plus: Checkpoint
    minus: Checkpoint
    names: tuple[str, ...]
    exclude: tuple[str, ...]
    random_seed: int | None

    def tensor(self, name: str) -> Tensor:
        """One tensor of the vector, float32."""
        delta = subtract(name, self.plus.tensor(name), self.minus.tensor(name), torch.float32)
        return delta if self.random_seed is None else noise_like(name, delta, self.random_seed)

    def facts(self, lineage: str) -> Facts:
        """Facts of the vector, held against minus."""
        tally = Tally()
        for name in self.names:
            tally.add(name, self.tensor(name), self.minus.tensor(name))
        return tally.facts(lineage)


def folder_difference(
    plus: Checkpoint, minus: Checkpoint, exclude: Sequence[str] = (), random_seed: int | None = None
) -> FolderVector:
    """The vector plus - minus. Raises ValueError as `difference` does, and when the tokenizers differ."""
    names, _ = check_alike({"plus": plus, "minus": minus}, exclude)
    return FolderVector(plus, minus, tuple(names), tuple(exclude), random_seed)


def check_alike(checkpoints: Mapping[str, Checkpoint], exclude: Sequence[str]) -> tuple[list[str], list[str]]:
    """Refuse checkpoints of different tensors, heads or tokenizers (ValueError).

    Returns the names of the tensors that take part, and notes on what differs and may.
    """
    names = common_names({role: checkpoint.layout for role, checkpoint in checkpoints.items()}, exclude)
    notes = check_configs({role: checkpoint.config.to_dict() for role, checkpoint in checkpoints.items()})
    return names, notes + check_tokenizers({role: checkpoint.tokenizer for role, checkpoint in checkpoints.items()})


def add_to_folder(
    target: Checkpoint, vector: FolderVector, coefficient: float, out: Path, card: Callable[[float | None], str]
) -> float | None:
    """Write target + coefficient * vector as a whole checkpoint folder, beside it the target's own config and tokenizer.

    The folder appears under its name only when it is whole. Returns the share of the elements to be moved that the
    target's dtype rounds back to where they were, None where none is to be moved; `card` makes the README.md of it. Raises
    ValueError when the target does not fit, a sum is not finite, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    taking = set(check_alike({"target": target, "plus": vector.plus}, vector.exclude)[0])
    moved = rounded = 0

    def result(name: str) -> Tensor:
        nonlocal moved, rounded
        own = target.tensor(name)
        if name not in taking:
            return own
        delta = vector.tensor(name)
        new = stepped(name, own, delta, coefficient)
        moves = coefficient * delta != 0
        moved, rounded = moved + int(moves.sum()), rounded + int((moves & (new == own)).sum())
        return new

    with atomic_folder(out) as partial:
        _write_tensors(partial, ((name, result(name)) for name in target.files))
        for path in [*target.folder.iterdir(), *target.folder.glob("additional_chat_templates/*.jinja")]:
            if _travels(path):
                place = partial / path.relative_to(target.folder)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
        share = rounded / moved if moved else None
        (partial / "README.md").write_text(card(share))
    return share


def place_of(folder: Path) -> Path:
    """The folder itself, or the one it pins, inspected. Raises ValueError where there is none, or it is refused."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; download a hub checkpoint first (`hf download NAME`)")
    place = Path(checkpoint_arguments(folder)["pretrained_model_name_or_path"])
    if not place.is_dir():
        raise ValueError(f"{folder} pins {place}, which is no local folder; download it and name the folder it is in")
    return place


def _tied(config: PreTrainedConfig) -> dict[str, str]:
    """Names that the architecture ties, each with the first name of what it is tied to; no weight is allocated."""
    with _told("not a causal language model that transformers knows"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: source for name, source in names.items() if name != source}


def _travels(path: Path) -> bool:
    """Whether a file of the target belongs beside the new weights."""
    if not path.is_file() or path.name in LEFT or path.name.endswith(".index.json") or path.name.startswith("adapter_"):
        return False
    return path.suffix in COPIED or path.name.split(".")[0] in ("LICENSE", "NOTICE")


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors in shards of about SHARD_BYTES, with an index when there are several, as transformers reads them."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        total, size = total + tensor.nbytes, size + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say in one line what could not be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{what} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})") from error
