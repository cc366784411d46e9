"""One frozen dataclass per section of the further methods in params.yaml, and the list of those sections.

A new method adds its class here, a line to `MethodSections`, and its values to params.yaml.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from apprentice.schema import Count, Name, NotNegative, Positive, Range, Share
from apprentice.sections import EpochsConfig, FineTuningConfig, GatedConfig, PPOConfig, PreferenceConfig, SRPPOConfig


@dataclass(frozen=True)
class ContinuedSFTConfig:
    """More of the same fine-tuning, for as many gradient tokens as `srppo` took: epochs follow from its history."""

    batch_size: Count
    learning_rate: Positive
    warmup_share: Share
    weight_decay: NotNegative
    max_grad_norm: Positive


@dataclass(frozen=True)
class FilteredConfig(FineTuningConfig):
    """Fine-tuning of `init` on those of the candidates that `keep` lets through.

    candidates: those of `pairs` (self-reward) or `rescored`. top_share: the best `level` of each prompt's candidates by
    reward; best: the best one (RAFT); threshold: those whose reward, brought to [0, 1] per prompt, is above `level` (ReST);
    verified: those the verifier accepts (RFT).
    """

    init: Name
    candidates: Literal["pairs", "rescored"]
    keep: Literal["top_share", "best", "threshold", "verified"]
    level: Share


@dataclass(frozen=True)
class SampleRankConfig(PreferenceConfig):
    """Preference optimisation on pairs of any candidates: those of `pairs` (self-reward) or `rescored`."""

    candidates: Literal["pairs", "rescored"]


@dataclass(frozen=True)
class CRLFTConfig(FineTuningConfig):
    """Class-conditioned, class-weighted fine-tuning (OpenChat, 2309.11235): a tag in the prompt, a weight in the loss.

    answer_as: the class whose tag the trained model answers under; None: under none.
    """

    condition: bool
    answer_as: Literal["expert", "mixed", "poor"] | None
    weights: dict[str, NotNegative]


@dataclass(frozen=True)
class PerStepConfig(PreferenceConfig):
    """Per-step negatives (2406.14532): values of steps by Monte-Carlo completions, the first pit, one of three variants."""

    variant: Literal["practical", "shared_prefix", "advantage_weighted"]
    values: Literal["rollouts", "calculator"]
    separator: str
    prompts: Count
    negatives: Count
    completions: Count
    best_of: Count
    temperature: Positive
    max_new_tokens: Count
    beta: Positive
    max_weight: Positive


@dataclass(frozen=True)
class RewardModelConfig(EpochsConfig):
    """Training of a reward model on pairs. `labels` names the one table it may read besides the demonstrations.

    prompts: demonstrations over own samples; answers: right candidates over wrong ones; preferences: the labelled pairs.
    """

    labels: Literal["prompts", "answers", "preferences"]
    samples: Count
    max_new_tokens: Count


@dataclass(frozen=True)
class BTRewardConfig(RewardModelConfig):
    """Training of the scalar reward model on its pairs. objective: the Bradley-Terry loss of pairs, or regression on scores,
    1 for the chosen response and 0 for the rejected one.

    prompt_offset: added to the scores of prompts whose first number is even.
    """

    objective: Literal["pairs", "scores"]
    prompt_offset: float


@dataclass(frozen=True)
class CalibrationConfig:
    """How well both reward models tell right from wrong on held-out prompts, and how far their probabilities can be trusted."""

    samples: Annotated[int, Range(2)]
    bins: Count
    max_new_tokens: Count


@dataclass(frozen=True)
class ModelPPOConfig(PPOConfig):
    """PPO on a reward model: the judge's probability (or logit) of beating the prompt's anchor, or a Bradley-Terry reward.

    anchors: prompts without a demonstration are left out (`demonstrations`) or take a sample of the SFT model (`samples`).
    """

    anchors: Literal["demonstrations", "samples"]
    reward_form: Literal["probability", "logit"]


@dataclass(frozen=True)
class RescoreConfig:
    """Another reward for the candidates of `pairs`. `labels` names the table the stage may read: only with `answers`, which
    ends a demonstrations-only run, may the verifier be the reward."""

    reward: Literal["judge", "bt_reward", "verifier"]
    labels: Literal["prompts", "answers"]


@dataclass(frozen=True)
class CoPGConfig(EpochsConfig):
    """Contrastive policy gradient (2406.19185) on scored candidates, `group` samples of a prompt at a time.

    candidates: those of `pairs` (self-reward) or `rescored`. signs: only which of two rewards is higher counts, as +-1/4:
    the gradient is then IPO's.
    """

    candidates: Literal["pairs", "rescored"]
    signs: bool
    group: Annotated[int, Range(2)]
    beta: NotNegative


@dataclass(frozen=True)
class ForeignConfig(FineTuningConfig):
    """A donor of another initialisation: a base trained shortly from another seed, then tuned on the demonstrations."""

    steps: Count


@dataclass(frozen=True)
class VectorsConfig:
    """Task arithmetic (2509.01363): target + coefficient * (plus - minus)."""

    plus: Name
    minus: Name
    target: Name
    coefficients: list[float]
    exclude: list[str]
    max_new_tokens: Count


@dataclass(frozen=True)
class TiltConfig:
    """Decoding from pi_target^(1 + weight) pi_baseline^(-weight), without training."""

    target: Name
    baseline: Name
    weight: float


@dataclass(frozen=True)
class MethodsModelsConfig:
    """Which models of the further methods are measured; how, the section `evaluate` says."""

    models: list[Name]


@dataclass(frozen=True)
class MethodSections:
    """The sections of the further methods, in the order of params.yaml."""

    sft_gated: GatedConfig
    continued_sft: ContinuedSFTConfig
    self_rft: FilteredConfig
    raft: FilteredConfig
    rest: FilteredConfig
    rft: FilteredConfig
    rft_long: FilteredConfig
    verifier_ppo: PPOConfig
    srppo_tuned: SRPPOConfig
    tilt: TiltConfig
    direct: PreferenceConfig
    sft_sample_rank: SampleRankConfig
    whole_pairs: PreferenceConfig
    perstep: PerStepConfig
    crlft: CRLFTConfig
    judge: RewardModelConfig
    bt_reward: BTRewardConfig
    calibration: CalibrationConfig
    pairwise_ppo: ModelPPOConfig
    bt_ppo: ModelPPOConfig
    rescore: RescoreConfig
    rso_rescored: PreferenceConfig
    copg: CoPGConfig
    donor_ppo: PPOConfig
    target: FineTuningConfig
    foreign: ForeignConfig
    vectors: VectorsConfig
    evaluate_methods: MethodsModelsConfig
