"""A causal language model as a policy: load, save, freeze; log-probabilities of responses; the critic."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from apprentice.compute import CPU, Compute
from apprentice.demonstrations import atomic_folder
from apprentice.foreign_checkpoint import inspect_checkpoint
from apprentice.layers import set_layers
from apprentice.logps import token_entropy, token_logps
from apprentice.packing import Layout, alone, packed
from apprentice.sharding import fill, form_of, gathered, is_sharded, shard, spread
from apprentice.tokens import Batch

disable_progress_bar()  # loading bars would drown the stages' own lines
PINNED = "pinned.json"  # in a model folder: the checkpoint stands elsewhere, named by revision and hashes


@dataclass(frozen=True)
class ResponseScores:
    """logps: [B, T] log-probabilities of the response tokens, fp32, 0 in the padding. entropy: [B, T] nats, or None.
    hidden: what the trunk ends with, [R, W, width] where `layout` says, or None."""

    logps: Tensor
    entropy: Tensor | None
    hidden: Tensor | None
    layout: Layout


def checkpoint_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model folder, pinned ones resolved.

    Raises ValueError for a folder that `inspect_checkpoint` refuses, or if a pinned file changed. What is pinned by its
    commit on the hub was inspected then, and cannot change.
    """
    pinned = folder / PINNED
    if not pinned.exists():
        inspect_checkpoint(folder)
        return {"pretrained_model_name_or_path": str(folder)}
    origin = json.loads(pinned.read_text())
    place = Path(origin["checkpoint"])
    if place.is_dir():
        inspect_checkpoint(place)
        if file_hashes(place) != origin["files"]:
            raise ValueError(f"{place} has changed since it was pinned; run `dvc repro --force pretrain`")
    return {"pretrained_model_name_or_path": origin["checkpoint"], "revision": origin["revision"]}


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint folder, by name; of its folders only further chat templates are ever read."""
    hashes = {}
    for path in sorted(p for p in [*folder.iterdir(), *folder.glob("*/*.jinja")] if p.is_file()):
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def load_policy(folder: Path, compute: Compute = CPU) -> PreTrainedModel:
    """Load a checkpoint: safetensors only, no code of its own, float32 weights, dropout off, layers and sharding as `compute`.

    Raises ValueError for a folder that is refused, or an architecture that cannot compute so.
    """
    model = AutoModelForCausalLM.from_pretrained(
        **checkpoint_arguments(folder), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return shard(set_layers(model.to(compute.device).eval(), compute), compute)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that stands beside a checkpoint."""
    return AutoTokenizer.from_pretrained(**checkpoint_arguments(folder), trust_remote_code=False)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make a scorer of a model: dropout off, no gradients."""
    return model.eval().requires_grad_(False)


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face checkpoint with tokenizer, chat template, generation config and model card; of a sharded model the
    `tensors` of its state, whole.

    The folder appears under its name only when it is whole.
    """
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial, **({"state_dict": dict(tensors)} if tensors else {}))
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)


def layout(batch: Batch, compute: Compute) -> Layout:
    """How a model reads a batch: a row for each of its own, or packed."""
    if not compute.packing:
        return alone(batch.ids)
    lengths = batch.lengths()
    return packed(batch.ids, lengths, sum(lengths) if compute.one_row else max(lengths))


def response_scores(
    model: PreTrainedModel,
    batch: Batch,
    compute: Compute = CPU,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
) -> ResponseScores:
    """Score the response tokens of a batch in one forward pass, with gradient where the model takes one.

    The logits of token t come from the position before it; positions before the shortest prompt's end, packed those of any
    prompt's, are never projected to the vocabulary. The entropy carries no gradient. Raises ValueError for a model in
    training mode, whose dropout would make equal models differ.
    """
    if model.training:
        raise ValueError("response_scores: the model is in training mode; call .eval(), gradients flow all the same")
    laid, mask, columns = layout(batch, compute), batch.mask, batch.response_positions() - 1
    kept = laid.kept(columns, mask)
    with compute.autocast():
        found = model(**laid.inputs, use_cache=False, logits_to_keep=kept, output_hidden_states=hidden)
    logits = found.logits / temperature if temperature != 1.0 else found.logits
    logps = laid.take(token_logps(logits, laid.ids[:, kept + 1]), columns, kept) * mask
    nats = laid.take(token_entropy(logits), columns, kept) * mask if entropy else None
    return ResponseScores(logps, nats, found.hidden_states[-1] if hidden else None, laid)


def _logps(model: PreTrainedModel, batch: Batch, rows: list[int], compute: Compute, temperature: float) -> list[Tensor]:
    return [response_scores(model, batch.rows(rows), compute, temperature).logps]


@torch.no_grad()
def score(model: PreTrainedModel, batch: Batch, compute: Compute = CPU, temperature: float = 1.0) -> Tensor:
    """[B, T] log-probabilities under a frozen model, in micro-batches of similar length; equal rows are scored once."""
    rows, places = batch.distinct()
    lengths, device = batch.lengths(), batch.ids.device
    logps = torch.zeros(len(rows), batch.mask.size(1), device=device)
    groups = list(compute.micro_batches([lengths[row] for row in rows]))
    makes = [partial(_logps, model, batch, [rows[i] for i in group], compute, temperature) for group in groups]
    with gathered(model):
        for group, (part,) in zip(groups, compute.pieces(makes), strict=True):
            logps[group, : part.size(1)] = part.to(device)
    return logps[torch.tensor(places, device=device)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, tied ones once; of a sharded model this process's part."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def put_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put back what `weights` gave, or the same with its tensors whole."""
    own = weights(model)
    model.load_state_dict({name: spread(tensor, own[name]) for name, tensor in saved.items()}, strict=False)


class Critic(nn.Module):
    """Values of response positions: a scalar head that starts at zero on a copy of a model's trunk; `shared`, on that trunk."""

    def __init__(self, model: PreTrainedModel, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.roots = (model,) if shared else (self,)  # what is gathered for its values
        bare = is_sharded(model) and not shared
        if shared:
            self.trunk = model.base_model
        else:
            self.trunk = (form_of(model).base_model if bare else copy.deepcopy(model.base_model)).requires_grad_(True)
        self.head = nn.Linear(model.config.hidden_size, 1, device="meta" if bare else model.device)
        if bare:
            head = {f"head.{name}": torch.zeros(own.shape) for name, own in self.head.named_parameters()}
            fill(self, head | {f"trunk.{name}": own for name, own in weights(model.base_model).items()}, model)
        else:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def own(self) -> nn.Module:
        """What is the critic's alone: all of it, or the head."""
        return self.head if self.shared else self

    def forward(self, batch: Batch, compute: Compute = CPU) -> Tensor:
        """[B, T] values, each read at the position before its token is produced; 0 in the padding."""
        laid = layout(batch, compute)
        with compute.autocast():
            hidden = self.trunk(**laid.inputs, use_cache=False).last_hidden_state
        return self.read(hidden, laid, batch)

    def read(self, hidden: Tensor, laid: Layout, batch: Batch) -> Tensor:
        """The same from what the trunk ends with, [R, W, width]."""
        values: Tensor = self.head(hidden.float()).squeeze(-1)
        return laid.take(values, batch.response_positions() - 1) * batch.mask


@torch.no_grad()
def values_of(critic: Critic, batch: Batch, compute: Compute = CPU) -> Tensor:
    """[B, T] values in micro-batches of similar length."""
    values = torch.zeros(batch.mask.shape, device=batch.ids.device)
    groups = list(compute.micro_batches(batch.lengths()))
    makes = [partial(_values, critic, batch, rows, compute) for rows in groups]
    with gathered(*critic.roots):
        for rows, (part,) in zip(groups, compute.pieces(makes), strict=True):
            values[rows, : part.size(1)] = part.to(values.device)
    return values


def _values(critic: Critic, batch: Batch, rows: list[int], compute: Compute) -> list[Tensor]:
    return [critic(batch.rows(rows), compute)]


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Sequence[int]]) -> list[str]:
    """Texts of responses, special tokens left out."""
    texts: list[str] = tokenizer.batch_decode([list(ids) for ids in responses], skip_special_tokens=True)
    return texts
