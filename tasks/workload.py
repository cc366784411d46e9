"""How many tokens each stage of the main line puts through its models, counted from params and the data's size."""

from dataclasses import dataclass
from typing import NamedTuple

from apprentice.config import Params
from apprentice.sections import GatedConfig


@dataclass(frozen=True)
class DataSize:
    """Rows of the clean tables, and the mean tokens of a prompt and of a response."""

    demonstrations: int
    validation: int
    evaluation: int
    prompt: float
    response: float

    @property
    def row(self) -> float:
        """Tokens of a demonstration."""
        return self.prompt + self.response


class Work(NamedTuple):
    """Tokens. trained: through a model and back. passed: through a model, scored or sampled."""

    trained: float
    passed: float

    def flops(self, parameters: int, again: bool, adapters: bool) -> float:
        """Operations: 2 a parameter and token for a pass and 4 for the way back (2001.08361, section 2.1), 2 more where
        activations are computed again, 2 fewer where the weights are frozen under adapters, whose own are left out."""
        return parameters * ((6 + 2 * again - 2 * adapters) * self.trained + 2 * self.passed)


def main_line(params: Params, data: DataSize) -> dict[str, Work]:
    """The work of each torch stage, by label. Every response that is sampled counts as long as `max_new_tokens` allows."""
    pretrain = params.pretrain
    documents = 0 if pretrain.checkpoint else pretrain.steps * pretrain.batch_size
    stages = {
        "pretrain": Work(documents * data.row, 0),
        "sft": _fine_tuning(params.sft, data),
        "sft_tuned": _fine_tuning(params.sft_tuned, data),
        "srppo": _ppo(params, data),
        "pairs": _pairs(params, data),
        "rso": _preferring(params, data),
    }
    return stages | {f"evaluate@{model}": _evaluation(params, data) for model in params.evaluate.models}


def _fine_tuning(config: GatedConfig, data: DataSize) -> Work:
    """Each epoch over the demonstrations, then the held-out loss; the gate samples, and scores all by two models."""
    asked = min(config.gate_prompts, data.validation)
    gate = asked * (3 * config.gate_samples + 2) * data.row * (config.epochs if config.select == "gate" else 1)
    return Work(config.epochs * data.demonstrations * data.row, config.epochs * data.validation * data.row + gate)


def _ppo(params: Params, data: DataSize) -> Work:
    """Rollouts sampled, scored by reward and anchor, valued and scored by the policy; policy and critic trained on them, in
    one pass where they share a trunk."""
    config = params.srppo
    tokens = config.iterations * config.batch_size * (data.prompt + config.max_new_tokens)
    scorers = {config.reward_target, config.reward_baseline, config.kl_anchor}
    passes = 2 if config.critic == "separate" else 1
    return Work(passes * config.epochs * tokens, (3 + len(scorers)) * tokens)


def _pairs(params: Params, data: DataSize) -> Work:
    """Candidates sampled, and scored by two models."""
    config = params.pairs
    return Work(0, 3 * config.prompts * config.candidates * (data.prompt + config.max_new_tokens))


def _preferring(params: Params, data: DataSize) -> Work:
    """Both sides of each pair under the reference once, then trained on."""
    config = params.pairs
    pairs = config.prompts * (config.accepted // 2 if config.pairing == "first_round" else config.accepted - 1)
    tokens = 2 * pairs * (data.prompt + config.max_new_tokens)
    return Work(params.rso.epochs * tokens, tokens)


def _evaluation(params: Params, data: DataSize) -> Work:
    """Greedy and sampled responses, some more at the best temperature; samples scored by three models; held-out losses."""
    config = params.evaluate
    draws = 1 + config.samples + max(1, config.samples // 2) + 3 * config.samples
    losses = data.evaluation + data.validation * (len(config.temperatures) + 1)
    return Work(0, data.evaluation * draws * (data.prompt + config.max_new_tokens) + losses * data.row)
