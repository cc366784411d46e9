"""What a method costs: response tokens drawn from a model or trained on, from the base to the method's model.

Counted from what stages wrote (history.csv, metrics.json) and their params; prompts and frozen scorers are left out. PPO's
history has the lengths of its draws; elsewhere a response counts L, the mean length of the SFT model's draws in domain:

    PPO             sum of lengths x batch_size, drawn once and trained on `epochs` times
    fine-tuning     epochs x rows x L
    preferences     epochs x 2 pairs x L
    reward models   epochs x 2 pairs x L (judge: in both orders, so 4), and a draw for each pair if `labels: prompts`
    copg            epochs x groups x group x L
    pairs           prompts x candidates x L
    perstep         as preferences or fine-tuning; drawn: responses x L, and completions of prefixes x L / 2

A stage of another kind that writes no history trains nothing, and costs nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from apprentice import method_sections as methods
from apprentice import sections
from tasks.dvcstage import StageInfo
from tasks.lineage import maker_of
from tasks.study_plan import StudyError

MADE = ("data/models/", "data/pairs", "data/rescored")  # what training writes for the stages after it
FREE = (  # bases, and what trains nothing
    *(sections.TokenizerConfig, sections.PretrainConfig, methods.ForeignConfig),
    *(methods.TiltConfig, methods.VectorsConfig, methods.RescoreConfig),
)
FINE_TUNING = (sections.FineTuningConfig, methods.ContinuedSFTConfig)
BY_EPOCH = (*FINE_TUNING, sections.PreferenceConfig, methods.RewardModelConfig, methods.CoPGConfig)


def stage_tokens(
    name: str, config: Any, metrics: Mapping[str, float], history: Sequence[Mapping[str, str]], length: float
) -> float | None:
    """Tokens that one stage drew and trained on; `length` is L.

    None when its metrics or history lack a figure that the table above needs; StudyError for a stage with a history
    that is not in it.
    """
    try:
        if isinstance(config, FREE):
            return 0.0
        if isinstance(config, sections.PPOConfig):
            return sum(float(row["length"] or 0) for row in history) * config.batch_size * (1 + config.epochs)
        if isinstance(config, sections.PairsConfig):
            return config.prompts * config.candidates * length
        if not history and not isinstance(config, BY_EPOCH):
            return 0.0
        return (float(history[-1]["epoch"]) * _responses(name, config, metrics) + _drawn(config, metrics)) * length
    except (KeyError, IndexError):
        return None


def _responses(name: str, config: Any, metrics: Mapping[str, float]) -> float:
    """Responses trained on in one epoch."""
    if isinstance(config, FINE_TUNING) or (isinstance(config, methods.PerStepConfig) and "rows" in metrics):
        return metrics["rows"]
    if isinstance(config, sections.PreferenceConfig):
        return 2 * metrics["pairs"]
    if isinstance(config, methods.RewardModelConfig):
        return metrics["pairs"] * (4 if name == "judge" else 2)
    if isinstance(config, methods.CoPGConfig):
        return metrics["groups"] * config.group
    raise StudyError(f"tokens of {name}: {type(config).__name__} is not in the table of tasks/study_tokens.py; add it there")


def _drawn(config: Any, metrics: Mapping[str, float]) -> float:
    """Responses drawn before training."""
    if isinstance(config, methods.PerStepConfig):
        return metrics["responses"] + metrics["completions"] / 2
    if isinstance(config, methods.RewardModelConfig) and config.labels == "prompts":
        return metrics["pairs"]
    return 0.0


def trained_behind(model: str, stages: Sequence[StageInfo]) -> list[str]:
    """The stage that made a model and those whose models, pairs or candidates it was made from, directly or through others."""
    makers = {out: stage for stage in stages for out in stage.outs if out.startswith(MADE)}
    found: dict[str, StageInfo] = {}
    waiting = [maker_of(model, stages)]
    while waiting:
        stage = waiting.pop()
        found[stage.name] = stage
        waiting += [makers[dep] for dep in stage.deps if dep in makers and makers[dep].name not in found]
    return sorted(found)
