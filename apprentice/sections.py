"""One frozen dataclass per section of the main line in params.yaml: names, types and ranges, no defaults."""

from dataclasses import dataclass
from typing import Annotated, Literal

from apprentice.schema import Count, CountOrZero, Name, NotNegative, Positive, Range, Share


@dataclass(frozen=True)
class ComputeConfig:
    """How tensors are computed; part of the inputs of every torch stage."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16"]
    threads: Count
    processes: Count
    sharding: bool
    forward_tokens: Count | None
    cache_tokens: Count
    sampler: Literal["own", "vllm"]
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    gradient_checkpointing: bool
    packing: bool


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters in place of whole models, in every stage that trains from a checkpoint; rank 0 trains all weights."""

    rank: CountOrZero
    alpha: Positive
    targets: str


@dataclass(frozen=True)
class RuntimeConfig:
    """What never changes a result: no stage depends on it. `skip_steps` and `on_bad_sign` decide whether a run that goes wrong
    has one, never which."""

    progress_seconds: NotNegative
    checkpoint_seconds: NotNegative
    checkpoint_steps: Count | None
    stop_seconds: NotNegative
    resume_folders: CountOrZero
    skip_steps: CountOrZero
    on_bad_sign: Literal["warn", "stop"]
    retries: CountOrZero
    parallel_stages: Count | None
    outside_project: bool


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
    """How many rows the embedded world makes, and what is demonstrated."""

    demonstrations: Count
    validation: Count
    prompts: Count
    evaluation: Count
    suboptimal: CountOrZero
    preferences: CountOrZero
    demonstrated: Literal["all", "narrow", "cued", "spurious"]


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
class EpochsConfig:
    """Any training from a fixed table: how often, how many rows a step, and the optimiser's entries."""

    epochs: Count
    batch_size: Count
    learning_rate: Positive
    warmup_share: Share
    weight_decay: NotNegative
    max_grad_norm: Positive


@dataclass(frozen=True)
class FineTuningConfig(EpochsConfig):
    """Any fine-tuning on responses; `select` keeps the last epoch, the one of lowest held-out loss, or the last one whose gate
    holds (the label-free gate of `sft`, at least one half)."""

    select: Literal["last", "held_out_loss", "gate"]


@dataclass(frozen=True)
class GatedConfig(FineTuningConfig):
    """Supervised fine-tuning of the base with the label-free gate."""

    gate_prompts: CountOrZero
    gate_samples: Count


@dataclass(frozen=True)
class SFTConfig(GatedConfig):
    """Gentle supervised fine-tuning."""


@dataclass(frozen=True)
class SFTTunedConfig(GatedConfig):
    """The same entries as `sft`, with the settings a practitioner would ship."""


@dataclass(frozen=True)
class PPOConfig:
    """What every PPO stage has, whatever its reward."""

    init: Name
    kl_anchor: Name
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
    critic: Literal["separate", "shared"]
    critic_init: Name
    value_coef: Positive
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
class SRPPOConfig(PPOConfig):
    """Self-Rewarding PPO (2510.21090); each question the paper leaves open is an entry."""

    prompts: Literal["pool", "demonstrated", "new"]
    reward_target: Name
    reward_baseline: Name
    baseline_weight: NotNegative
    placement: Literal["eos", "dense"]
    span: Literal["sum", "mean", "eos_token"]


@dataclass(frozen=True)
class PairsConfig:
    """Candidates, their self-reward and the pairs made of them (RSO, 2309.06657)."""

    source: Literal["rso_sample_rank", "sft_sample_rank"]
    reward_target: Name
    reward_baseline: Name
    baseline_weight: NotNegative
    prompts: Count
    candidates: Annotated[int, Range(2)]
    temperature: Positive
    max_new_tokens: Count
    accepted: Annotated[int, Range(2)]
    beta: NotNegative
    pairing: Literal["first_round", "tournament"]


@dataclass(frozen=True)
class PreferenceConfig(EpochsConfig):
    """Preference optimisation on pairs; `gamma` is the slope of the classifier (TRL's beta)."""

    loss: Literal["sigmoid_norm", "hinge_norm", "hinge", "ipo"]
    gamma: Positive


@dataclass(frozen=True)
class RSOConfig(PreferenceConfig):
    """Preference optimisation on the pairs of the main line."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, on which models."""

    models: list[Name]
    samples: Count
    temperature: Positive
    temperatures: list[Positive]
    max_new_tokens: Count


@dataclass(frozen=True)
class ReportConfig:
    """What the report compares and shows."""

    baselines: list[Name]
    samples: CountOrZero


@dataclass(frozen=True)
class RegisterConfig:
    """Names in MLflow and the rule for the champion."""

    model: Name
    experiment: Name
    champion_metric: str
    champion_mode: Literal["min", "max"]


@dataclass(frozen=True)
class MainSections:
    """The sections of the main line. `fine_tuning`, `preference` and `ppo` hold what several stages merge into their own."""

    seed: CountOrZero
    compute: ComputeConfig
    lora: LoRAConfig
    runtime: RuntimeConfig
    ingest: IngestConfig
    tokenizer: TokenizerConfig
    validate: ValidateConfig
    pretrain: PretrainConfig
    fine_tuning: FineTuningConfig
    sft: SFTConfig
    sft_tuned: SFTTunedConfig
    ppo: PPOConfig
    srppo: SRPPOConfig
    pairs: PairsConfig
    preference: PreferenceConfig
    rso: RSOConfig
    evaluate: EvaluateConfig
    report: ReportConfig
    register: RegisterConfig
