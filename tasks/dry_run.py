"""What a preset would need: memory, disk and time of each stage of the main line, before anything is downloaded or changed.

Memory and disk are those that each stage says before it begins (`apprentice.footprint`). Of data and checkpoints that are not
here the preset itself tells size and shape, in its block `dry_run`: rows, prompt_tokens, response_tokens, config.
"""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from apprentice.config import Params, ParamsError
from tasks import needs
from tasks.helpers import UNSHARED
from tasks.room import memory_of, size
from tasks.workload import DataSize, Work, main_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from apprentice.compute import Compute
    from apprentice.footprint import Shape

SECONDS = 1.0  # that the rate of this machine is measured for
SIDE = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # of the matrices it is measured with


class Need(NamedTuple):
    """Of one stage. memory, outputs, snapshots: bytes. flops: operations."""

    stage: str
    memory: int
    outputs: int
    snapshots: int
    flops: float


def dry_run(params: Params, facts: dict[str, Any], rate: float | None) -> str:
    """The table and what it is based on. `rate`: operations a second of the machine meant, else this one's is measured.

    Raises ParamsError where the preset does not tell what it must.
    """
    from apprentice.compute import devices, resolve
    from apprentice.footprint import shape_of
    from apprentice.lora import adapter_shape

    compute, config = resolve(params.compute), _config(params, facts)
    shape, data = shape_of(config), _data_size(params, facts)
    here = compute.device.type in devices()
    given, rate = rate is not None, rate or (_measured(compute, params.compute.threads) if here else None)
    adapter = adapter_shape(config, params.lora) if params.lora.rank else None
    found = list(_needs(params, shape, adapter, main_line(params, data), compute))
    download = _download(params, config, shape.parameters)
    lines = [
        f"base: {params.pretrain.checkpoint or 'the tiny one, trained here'}, {shape.parameters:,} parameters",
        f"data: {data.demonstrations:,} demonstrations, {data.validation:,} held out, {data.evaluation:,} to evaluate on; "
        f"{data.prompt:.0f} + {data.response:.0f} tokens a row",
        f"to download: about {size(download)} of weights, and the data" if download else "to download: nothing",
        f"on {compute.device.type} in {str(compute.dtype).removeprefix('torch.')}; " + _rate_line(rate, given, compute),
        *([f"models spread over {params.compute.processes} processes: memory is that of one"] if compute.sharding else []),
        "",
        *_table(found, rate),
        "",
        f"in all: {size(max(need.memory for need in found))} of memory for the largest stage, "
        f"{size(_disk(found) + download)} of disk, {_work(sum(need.flops for need in found), rate)}",
    ]
    if here:
        lines.append(f"this machine: {size(memory_of(compute)[1])} of memory on {compute.device.type}")
    return "\n".join(lines)


def _config(params: Params, facts: dict[str, Any]) -> "PretrainedConfig":
    """The base's: the tiny one's, a folder's, or as the preset has it."""
    from transformers import AutoConfig

    checkpoint = params.pretrain.checkpoint
    if checkpoint is None:
        from apprentice.pretrain import base_config
        from apprentice.tokens import train_word_tokenizer
        from apprentice.world import WORDS

        return base_config(params.pretrain, train_word_tokenizer([], params.tokenizer.max_words, WORDS))
    if Path(checkpoint).is_dir():
        from apprentice.foreign_checkpoint import inspect_checkpoint

        inspect_checkpoint(Path(checkpoint))
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    _expect(facts, "config", "the checkpoint's config.json")
    return AutoConfig.for_model(**facts["config"])


def _data_size(params: Params, facts: dict[str, Any]) -> DataSize:
    """Counted in the embedded world, whose tokens are words; told by the preset of any other source."""
    ingest = params.ingest
    if ingest.source.kind == "world":
        from apprentice.demonstrations import split_of
        from apprentice.world import make_tables

        shares = (ingest.validation_share, ingest.evaluation_share)
        tables = make_tables(params.seed, ingest.world, lambda prompt: split_of(prompt, *shares))
        rows = tables["demonstrations"]
        prompt = 3 + fmean(len(str(row.prompt).split()) for row in rows)  # the template's three
        response = 1 + fmean(len(str(row.response).split()) for row in rows)
        return DataSize(len(rows), len(tables["validation"]), len(tables["evaluation"]), prompt, response)
    for name in ("rows", "prompt_tokens", "response_tokens"):
        _expect(facts, name, "a number, of the source")
    rows = facts["rows"]
    validation, evaluation = (round(rows * share) for share in (ingest.validation_share, ingest.evaluation_share))
    lengths = facts["prompt_tokens"], facts["response_tokens"]
    return DataSize(rows - validation - evaluation, validation, evaluation, *lengths)


def _expect(facts: dict[str, Any], name: str, what: str) -> None:
    if name not in facts:
        raise ParamsError(f"dry_run.{name}: missing from the preset ({what}), and nothing is fetched to find out")


def _needs(
    params: Params, shape: "Shape", adapter: "Shape | None", work: dict[str, Work], compute: "Compute"
) -> Iterator[Need]:
    """Every model has the base's shape. A pinned base is loaded to be counted, and written nowhere."""
    from apprentice.footprint import FROZEN, footprint

    srppo = params.srppo
    pinned = params.pretrain.checkpoint is not None
    models = {
        "pretrain": needs.Needs([], ["base"], False) if pinned else needs.Needs(["base"], [], False),
        "sft": needs.fine_tuned(params.sft, "base"),
        "sft_tuned": needs.fine_tuned(params.sft_tuned, "base"),
        "srppo": needs.by_ppo(srppo, (srppo.reward_target, srppo.reward_baseline)),
        "pairs": needs.paired(params.pairs),
        "rso": needs.PREFERRED,
    }
    for stage, tokens in work.items():
        one = models.get(stage) or needs.measured_beside([stage.partition("@")[2]])
        adapted = adapter is not None and stage != "pretrain"
        if adapted:
            shapes = needs.on_trunks(one.trained, one.frozen, lambda _: "base", lambda _: shape, lambda _: adapter)
        else:
            shapes = [shape] * len(one.trained), [shape] * len(one.frozen)
        spread = params.compute.processes if compute.sharding and stage not in UNSHARED else 1
        room = footprint(*shapes, compute, one.samples, processes=spread)
        memory = FROZEN * shape.parameters if pinned and stage == "pretrain" else room.memory
        flops = tokens.flops(shape.parameters, compute.gradient_checkpointing, adapted)
        yield Need(stage, memory, room.outputs, room.snapshots, flops)


def _download(params: Params, config: "PretrainedConfig", parameters: int) -> int:
    """Bytes of the weights of a hub's checkpoint."""
    checkpoint = params.pretrain.checkpoint
    if checkpoint is None or Path(checkpoint).is_dir():
        return 0
    return int(parameters * (config.dtype.itemsize if config.dtype else 4))


def _disk(found: list[Need]) -> int:
    """Every output stays; of the snapshots those of one stage at a time."""
    return sum(need.outputs for need in found) + max(need.snapshots for need in found)


def _table(found: list[Need], rate: float | None) -> Iterator[str]:
    yield f"{'stage':<20} {'memory':>10} {'disk':>10}  work"
    for need in found:
        disk = size(need.outputs + need.snapshots)
        yield f"{need.stage:<20} {size(need.memory):>10} {disk:>10}  {_work(need.flops, rate)}"


def _work(flops: float, rate: float | None) -> str:
    time_taken = f", {timedelta(seconds=round(flops / rate))}" if rate else ""
    return f"{flops:.2g} FLOP{time_taken}"


def _rate_line(rate: float | None, given: bool, compute: "Compute") -> str:
    if rate is None:
        return f"no {compute.device.type} here to measure: give --flops, the FLOP/s that it keeps up, for times"
    origin = "as given" if given else "of matrix products, as measured here"
    return f"times at {rate:.2g} FLOP/s {origin}: estimates, sampling token by token reaches less"


def _measured(compute: "Compute", threads: int) -> float:
    """FLOP/s of matrix products on the device, in its precision."""
    import torch

    torch.set_num_threads(threads)
    side = SIDE[compute.device.type]
    matrix = torch.ones(side, side, device=compute.device, dtype=compute.dtype)
    float((matrix @ matrix)[0, 0])  # the first one sets up
    begun, products = time.monotonic(), 0
    while (taken := time.monotonic() - begun) < SECONDS:
        float((matrix @ matrix)[0, 0])  # and waits for the device
        products += 1
    return products * 2 * side**3 / taken
