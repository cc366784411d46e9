"""Model folders and token batches, as the training stages read and write them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apprentice.compute import Compute, set_up
from apprentice.config import ParamsError
from apprentice.demonstrations import Demonstration, digest, partial_of, prompt_id, read_demonstrations
from apprentice.layers import hold_as_cast
from apprentice.policy import freeze, load_policy, load_tokenizer, save_policy
from apprentice.sharding import is_sharded, whole
from apprentice.tokens import Batch, collate, encode_prompts, encode_responses, pad_id
from tasks.helpers import team_of
from tasks.room import writing
from tasks.stage import Stage, StageError


def compute_of(stage: Stage) -> Compute:
    """The stage's device and precision, noted in its telemetry."""
    try:
        compute = set_up(stage.params.compute)
    except ValueError as error:
        raise ParamsError(str(error)) from error
    stage.telemetry(event="device", device=str(compute.device), dtype=str(compute.dtype))
    team = team_of(stage, compute.device)
    sharding = compute.sharding and team.size > 1
    if sharding:
        stage.agree = team.first
    return replace(compute, team=team, sharding=sharding)


def model_folder(stage: Stage, name: str) -> Path:
    """Where a model of the pipeline stands."""
    return stage.data / "models" / name


@contextmanager
def refused_in_a_line() -> Iterator[None]:
    """A folder that is refused stops the stage with the reason alone."""
    try:
        yield
    except ValueError as error:
        raise StageError(str(error)) from error


def tokenizer_of(stage: Stage, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    with refused_in_a_line():
        return load_tokenizer(model_folder(stage, name))


def policy_of(stage: Stage, name: str, compute: Compute) -> PreTrainedModel:
    """A model of the pipeline, to train."""
    with refused_in_a_line():
        return load_policy(model_folder(stage, name), compute)


def scorers_of(stage: Stage, names: Sequence[str], compute: Compute) -> dict[str, PreTrainedModel]:
    """Frozen models by name, each loaded once."""
    return {name: hold_as_cast(freeze(policy_of(stage, name, compute)), compute) for name in dict.fromkeys(names)}


def table(stage: Stage, name: str) -> list[Demonstration]:
    """A clean table: demonstrations, suboptimal, validation, prompts or evaluation."""
    return read_demonstrations(stage.data / "clean" / f"{name}.jsonl")


def batch_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Demonstration], compute: Compute) -> Batch:
    """Demonstrations as one batch. Raises StageError for a text that cannot be encoded, which `validate` has not seen."""
    with refused_in_a_line():
        prompts = encode_prompts(tokenizer, [row.prompt for row in rows])
        responses = encode_responses(tokenizer, [row.response or "" for row in rows])
    return collate(prompts, responses, pad_id(tokenizer)).to(compute.device)


def prompt_keys(rows: Sequence[Demonstration]) -> list[str]:
    """Prompt ids, by which draws are keyed."""
    return [prompt_id(row.prompt) for row in rows]


def save_model(
    stage: Stage,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parents: Sequence[str],
    metrics: dict[str, Any],
) -> None:
    """Write a model folder with its card: what made it, from what, with which settings and figures.

    Raises StageError for weights that are not finite.
    """
    tensors, broken = _tensors_of(stage, model)
    if broken:
        raise StageError(
            f"{stage.name}: {len(broken)} tensors of {name} hold NaN or infinite numbers after the last step, first "
            f"{broken[0]}; the last snapshot stays under .resume/. Lower the learning rate (section `{stage.name}`)"
        )
    if stage.helper:
        return
    folder = model_folder(stage, name)
    settings = {**asdict(stage.config), **getattr(model, "settings", {})}
    with writing(partial_of(folder), model.get_memory_footprint(), "the last snapshot stays"):
        save_policy(model, tokenizer, folder, _card(stage, name, parents, settings, stage.counted(metrics)), tensors)
    stage.say(f"wrote {folder.relative_to(stage.data.parent)}")


def _tensors_of(stage: Stage, model: PreTrainedModel) -> tuple[dict[str, Tensor], list[str]]:
    """Of a sharded model its tensors, whole, on the CPU of the process that writes; names of those that are not finite."""
    named, sharded = model.state_dict(keep_vars=True), is_sharded(model)
    kept, finite = dict[int, Tensor](), dict[int, bool]()  # tied ones once
    for tensor in named.values():
        if id(tensor) not in finite:
            values = whole(tensor) if sharded else tensor
            finite[id(tensor)] = bool(values.isfinite().all())
            if sharded and not stage.helper:
                kept[id(tensor)] = values
    return (
        {name: kept[id(tensor)] for name, tensor in named.items() if id(tensor) in kept},
        [name for name, tensor in named.items() if not finite[id(tensor)]],
    )


def lineage(folder: Path) -> str:
    """A short hash of a model folder's weights or pin, for the cards of its descendants."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.json"))
    total = hashlib.blake2b(digest_size=8)
    for path in files:
        total.update(path.read_bytes())
    return total.hexdigest()


def _card(stage: Stage, name: str, parents: Sequence[str], settings: dict[str, Any], metrics: dict[str, Any]) -> str:
    origin = "".join(f"- `{parent}` {lineage(model_folder(stage, parent))}\n" for parent in parents)
    origin = origin or "- nothing: trained from scratch\n"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [apprentice, {stage.name}]\n---\n\n"
        f"# {name}\n\nMade by the stage `{stage.name}` of Apprentice from demonstrations, seed {stage.params.seed}.\n\n"
        f"## Made from\n\n{origin}\n"
        f"## Settings\n\n```json\n{json.dumps(settings, indent=2)}\n```\n\n"
        f"Settings hash: {digest(settings)}\n\n"
        f"## Figures\n\n```json\n{json.dumps(metrics, indent=2)}\n```\n"
    )
