"""One frozen dataclass per section of params.yaml: names, types and ranges, no defaults.

Every value is written once, in params.yaml. `parse` turns the whole file into a `Params` and refuses a wrong key, type or
value by its full name, with what was expected, what came and, for a misspelt key, what was probably meant.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

ModelName = Literal["base", "sft", "sft_tuned"]


class ParamsError(ValueError):
    """A params entry is wrong; the message names the key, what was expected and what came."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, the ends included unless `open_low`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies inside."""
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"between {self.low:g}{' (not included)' if self.open_low else ''} and {self.high:g}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class ComputeConfig:
    """How tensors are computed; part of the inputs of every torch stage."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16"]
    threads: Count
    forward_tokens: Count


@dataclass(frozen=True)
class RuntimeConfig:
    """What never changes a result: no stage depends on it."""

    progress_seconds: NotNegative
    checkpoint_seconds: NotNegative
    resume_folders: CountOrZero
    retries: CountOrZero
    parallel_stages: Count | None


@dataclass(frozen=True)
class SourceConfig:
    """Where demonstrations come from."""

    kind: Literal["world", "jsonl", "csv", "parquet", "hub"]
    path: str
    name: str | None
    subset: str | None
    revision: str | None
    split: str


@dataclass(frozen=True)
class WorldConfig:
    """How many rows the embedded world makes."""

    demonstrations: Count
    validation: Count
    prompts: Count
    evaluation: Count


@dataclass(frozen=True)
class IngestConfig:
    """Source, field mapping, cleaning and splitting."""

    source: SourceConfig
    fields: dict[str, str]
    verifier: Literal["auto", "none", "world", "gsm8k", "exact"]
    same_prompt: Literal["keep", "first"]
    max_characters: Count
    max_rejected_share: Share
    validation_share: Share
    evaluation_share: Share
    world: WorldConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """The tiny word tokenizer; a real checkpoint brings its own."""

    max_words: Count


@dataclass(frozen=True)
class ValidateConfig:
    """Bounds of the Great Expectations suite."""

    max_tokens: Count
    max_unknown_share: Share
    max_class_share: Share


@dataclass(frozen=True)
class PretrainConfig:
    """The base: a tiny model trained here, or a real checkpoint."""

    checkpoint: str | None
    revision: str | None
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    max_positions: Count
    steps: Count
    batch_size: Count
    learning_rate: Positive
    weight_decay: NotNegative
    warmup_steps: CountOrZero


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning; `select` keeps the last epoch or the one of lowest held-out loss."""

    epochs: Count
    select: Literal["last", "held_out_loss"]
    batch_size: Count
    learning_rate: Positive
    warmup_share: Share
    weight_decay: NotNegative
    max_grad_norm: Positive
    gate_prompts: CountOrZero
    gate_samples: Count


@dataclass(frozen=True)
class SFTTunedConfig(SFTConfig):
    """The same entries as `sft`, with the settings a practitioner would ship."""


@dataclass(frozen=True)
class SRPPOConfig:
    """Self-Rewarding PPO (2510.21090); each question the paper leaves open is an entry."""

    reward_target: ModelName
    reward_baseline: ModelName
    kl_anchor: ModelName
    baseline_weight: NotNegative
    placement: Literal["eos", "dense"]
    span: Literal["sum", "mean", "eos_token"]
    missing_eos_reward: float
    kl_coef: NotNegative
    kl_estimator: Literal["k1", "k3"]
    kl_stop: Positive | None
    iterations: Count
    batch_size: Count
    epochs: Count
    minibatch_size: Count
    temperature: Positive
    max_new_tokens: Count
    critic_init: ModelName
    gamma: Share
    gae_lambda: Share
    whiten: bool
    reward_std_floor: Positive
    clip_range: Positive
    value_clip_range: Positive | None
    old_logps: Literal["auto", "recorded", "recomputed"]
    learning_rate: Positive
    critic_learning_rate: Positive
    max_grad_norm: Positive


@dataclass(frozen=True)
class PairsConfig:
    """Candidates, self-reward and statistical rejection sampling (RSO, 2309.06657)."""

    reward_target: ModelName
    reward_baseline: ModelName
    baseline_weight: NotNegative
    prompts: Count
    candidates: Annotated[int, Range(2)]
    temperature: Positive
    max_new_tokens: Count
    accepted: Annotated[int, Range(2)]
    beta: NotNegative
    pairing: Literal["first_round", "tournament"]


@dataclass(frozen=True)
class RSOConfig:
    """Preference optimisation on the pairs; `gamma` is the slope of the classifier (TRL's beta)."""

    loss: Literal["sigmoid_norm", "hinge_norm", "hinge", "ipo"]
    gamma: Positive
    epochs: Count
    batch_size: Count
    learning_rate: Positive
    warmup_share: Share
    max_grad_norm: Positive


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, on which models."""

    models: list[str]
    samples: Count
    temperature: Positive
    max_new_tokens: Count


@dataclass(frozen=True)
class ReportConfig:
    """What the report compares and shows."""

    baselines: list[str]
    samples: CountOrZero


@dataclass(frozen=True)
class RegisterConfig:
    """Names in MLflow and the rule for the champion."""

    model: str
    experiment: str
    champion_metric: str
    champion_mode: Literal["min", "max"]


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml, in the order of the stages."""

    seed: CountOrZero
    compute: ComputeConfig
    runtime: RuntimeConfig
    ingest: IngestConfig
    tokenizer: TokenizerConfig
    validate: ValidateConfig
    pretrain: PretrainConfig
    sft: SFTConfig
    sft_tuned: SFTTunedConfig
    srppo: SRPPOConfig
    pairs: PairsConfig
    rso: RSOConfig
    evaluate: EvaluateConfig
    report: ReportConfig
    register: RegisterConfig


def parse(raw: Any) -> Params:
    """Check the parsed params.yaml (nested dicts) and return it typed.

    Raises `ParamsError` at the first entry that is unknown, missing, of the wrong type or out of range.
    """
    params: Params = _read(Params, raw, "params.yaml")
    _check_together(params)
    return params


def _check_together(params: Params) -> None:
    """Rules that tie several entries."""
    source, pretrain, pairs, evaluate = params.ingest.source, params.pretrain, params.pairs, params.evaluate
    if source.kind == "hub" and not (source.name and source.revision):
        raise ParamsError(
            "ingest.source: kind 'hub' needs `name` (the data set) and `revision` (a commit, so that the data cannot change)"
        )
    if source.kind == "hub" and not re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        raise ParamsError(
            f"ingest.source.revision: expected a commit (40 hexadecimal digits), for a branch can move; got {source.revision!r}"
        )
    for name in params.ingest.fields:
        _read(Literal["prompt", "response", "answer", "quality", "source"], name, "ingest.fields")
    held_out = params.ingest.validation_share + params.ingest.evaluation_share
    if held_out >= 1:
        raise ParamsError(
            f"ingest.validation_share + ingest.evaluation_share: expected less than 1, so that rows are left to train on; "
            f"got {held_out:g}"
        )
    if pretrain.hidden_size % pretrain.heads:
        raise ParamsError(
            f"pretrain.hidden_size: expected a multiple of pretrain.heads ({pretrain.heads}), got {pretrain.hidden_size}"
        )
    if pairs.accepted > pairs.candidates:
        raise ParamsError(f"pairs.accepted: expected at most pairs.candidates ({pairs.candidates}), got {pairs.accepted}")
    for name in ("base", "sft"):
        if name not in evaluate.models:
            raise ParamsError(f"evaluate.models: expected {name!r} among them, got {evaluate.models}")
    for name in params.report.baselines:
        if name not in evaluate.models:
            raise ParamsError(f"report.baselines: {name!r} is not in evaluate.models ({', '.join(evaluate.models)})")


def _read(kind: Any, value: Any, key: str) -> Any:
    """Turn a plain value into `kind`, or say which key is wrong."""
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, key)
    origin = typing.get_origin(kind)
    if origin is Annotated:
        base, bounds = typing.get_args(kind)
        number = _read(base, value, key)
        if not bounds.holds(number):
            raise ParamsError(f"{key}: expected a number {bounds}, got {value!r}")
        return number
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ParamsError(f"{key}: expected one of {', '.join(map(str, choices))}; got {value!r}{_suggest(value, choices)}")
        return value
    if origin in (types.UnionType, typing.Union):
        (inner,) = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return None if value is None else _read(inner, value, key)
    if origin is list:
        _expect(isinstance(value, list), key, "a list", value)
        return [_read(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), key, "a mapping", value)
        return {str(name): _read(typing.get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    return _read_scalar(kind, value, key)


def _read_section(kind: Any, value: Any, key: str) -> Any:
    _expect(isinstance(value, dict), key, "a mapping", value)
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = "" if key == "params.yaml" else f"{key}."
    for name in value:
        if name not in hints:
            meant = _suggest(name, hints) or f"; it has {', '.join(hints)}"
            raise ParamsError(f"{prefix}{name}: no such entry in {key}{meant}")
    for name in hints:
        if name not in value:
            raise ParamsError(f"{prefix}{name}: missing from {key}")
    return kind(**{name: _read(hint, value[name], f"{prefix}{name}") for name, hint in hints.items()})


def _read_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    _expect(type(value) is kind and not (isinstance(value, float) and not math.isfinite(value)), key, words, value)
    return value


def _expect(fine: bool, key: str, wanted: str, value: Any) -> None:
    if not fine:
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and "number" in wanted else ""
        raise ParamsError(f"{key}: expected {wanted}, got {type(value).__name__} {value!r}{hint}")


def _suggest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(choice) for choice in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
