"""The whole of params.yaml, typed: `parse` checks every section, then the rules that tie several of them.

Every value is written once, in params.yaml; no default stands in the code.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from apprentice.method_sections import MethodSections
from apprentice.schema import ParamsError, read
from apprentice.sections import IngestConfig, MainSections

__all__ = ["Params", "ParamsError", "parse"]


@dataclass(frozen=True)
class Params(MethodSections, MainSections):
    """The whole of params.yaml: the main line's sections, then the further methods'."""


def parse(raw: Any) -> Params:
    """Check the parsed params.yaml (nested dicts) and return it typed.

    Raises `ParamsError` at the first entry that is unknown, missing, of the wrong type or out of range.
    """
    params: Params = read(Params, raw, "params.yaml")
    _check_together(params)
    return params


def _check_together(params: Params) -> None:
    """Rules that tie several entries."""
    pretrain, pairs, evaluate = params.pretrain, params.pairs, params.evaluate
    _check_ingest(params.ingest)
    _check_methods(params)
    if params.compute.sharding and params.compute.processes == 1:
        raise ParamsError("compute.sharding: expected compute.processes above 1, over which models are spread; got 1")
    if params.compute.sharding and params.lora.rank:
        raise ParamsError(
            f"compute.sharding: expected lora.rank 0, for the trunk under adapters is not spread; got {params.lora.rank}"
        )
    if params.compute.sampler == "vllm" and params.compute.sharding:
        raise ParamsError("compute.sampler: expected compute.sharding false with vllm, which takes whole models; got true")
    if pretrain.hidden_size % pretrain.heads:
        raise ParamsError(
            f"pretrain.hidden_size: expected a multiple of pretrain.heads ({pretrain.heads}), got {pretrain.hidden_size}"
        )
    if pairs.accepted > pairs.candidates:
        raise ParamsError(f"pairs.accepted: expected at most pairs.candidates ({pairs.candidates}), got {pairs.accepted}")
    for name in ("base", "sft"):
        if name not in evaluate.models:
            raise ParamsError(f"evaluate.models: expected {name!r} among them, got {evaluate.models}")
    for field in dataclasses.fields(params):
        section = getattr(params, field.name)
        if getattr(section, "select", None) == "gate" and not getattr(section, "gate_prompts", 0):
            raise ParamsError(
                f"{field.name}.select: 'gate' needs {field.name}.gate_prompts above 0; choose last or held_out_loss"
            )
    if not evaluate.temperatures:
        raise ParamsError("evaluate.temperatures: expected at least one temperature, got none")
    for name in params.report.baselines:
        if name not in evaluate.models:
            raise ParamsError(f"report.baselines: {name!r} is not in evaluate.models ({', '.join(evaluate.models)})")


def _check_methods(params: MethodSections) -> None:
    if params.perstep.values == "calculator" and params.perstep.variant == "shared_prefix":
        raise ParamsError("perstep.variant: shared_prefix takes its right steps from completions; set perstep.values: rollouts")
    if params.bt_reward.objective == "pairs" and params.bt_reward.prompt_offset:
        raise ParamsError(
            "bt_reward.prompt_offset: expected 0 with bt_reward.objective: pairs, for it cancels between two responses to one "
            f"prompt; got {params.bt_reward.prompt_offset:g}"
        )
    if params.rescore.reward == "verifier" and params.rescore.labels != "answers":
        raise ParamsError(
            "rescore.reward: the verifier needs rescore.labels: answers; the run is then no longer demonstrations-only"
        )


def _check_ingest(config: IngestConfig) -> None:
    source = config.source
    if source.kind == "hub" and not (source.name and source.revision):
        raise ParamsError(
            "ingest.source: kind 'hub' needs `name` (the data set) and `revision` (a commit, so that the data cannot change)"
        )
    if source.kind == "hub" and not re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        raise ParamsError(
            f"ingest.source.revision: expected a commit (40 hexadecimal digits), for a branch can move; got {source.revision!r}"
        )
    for name in config.fields:
        read(Literal["prompt", "response", "answer", "quality", "source"], name, "ingest.fields")
    held_out = config.validation_share + config.evaluation_share
    if held_out >= 1:
        raise ParamsError(
            f"ingest.validation_share + ingest.evaluation_share: expected less than 1, so that rows are left to train on; "
            f"got {held_out:g}"
        )
