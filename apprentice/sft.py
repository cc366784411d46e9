"""Supervised fine-tuning on demonstrations, and the label-free gate that says whether its self-reward can be trusted.

The loss is token-weighted over the response, its one end token included, and does not depend on how a batch is split into
micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.epochs import EpochEnd, Figures, train_epochs
from apprentice.losses import Loss, weighted_next_token_loss
from apprentice.masking import check_shape
from apprentice.policy import response_scores, score
from apprentice.recorder import Recorder
from apprentice.rewards import sequence_rewards
from apprentice.sampling import Request, sample
from apprentice.sections import FineTuningConfig
from apprentice.tokens import Batch

GATE_FLOOR = 0.5  # below it the self-reward prefers the model's own text to the demonstrations
_TIE = 1e-3  # nats; the same response scored in another batch differs by roundings


@dataclass(frozen=True)
class HeldOut:
    """Held-out demonstrations. gate: the mean of `gate` for the model at hand, where the stage's rule needs it."""

    batch: Batch
    gate: Callable[[], float] | None = None


def fine_tune(
    model: PreTrainedModel,
    train: Batch,
    held_out: HeldOut,
    config: FineTuningConfig,
    *,
    seed: str,
    compute: Compute,
    recorder: Recorder,
    weights: Tensor | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` in place; returns held_out_loss (nats per response token) after each epoch and the epoch kept.

    `weights`: [N, T] of the response tokens (C-RLFT, per-step advantages); the loss is divided by their sum over the batch,
    so a common factor changes nothing. Rows: held_out_loss and, where chosen by it, gate (at an epoch's end), loss, grad_norm,
    learning_rate, epoch. Raises ValueError for weights of another shape, or the rule `gate` without a gate.
    """
    if config.select == "gate" and held_out.gate is None:
        raise ValueError("select: `gate` needs a gate measured on held-out demonstrations; give one or choose another rule")
    if weights is not None:
        check_shape("weights", weights, *train.mask.shape)

    def step(rows: list[int]) -> Figures:
        return {"loss": train_step(model, train.rows(rows), compute, None if weights is None else weights[rows])}

    def measure() -> Figures:
        found = {"held_out_loss": held_out_loss(model, held_out.batch, compute)}
        return {**found, "gate": held_out.gate()} if held_out.gate else found

    names = ("held_out_loss", "gate") if held_out.gate else ("held_out_loss",)
    after = EpochEnd(names, measure, _RULES[config.select])
    trained = train_epochs(model, len(train.ids), step, config, seed=seed, recorder=recorder, after=after, team=compute.team)
    losses = [row["held_out_loss"] for row in trained.measured]
    return {"held_out_loss": losses[trained.kept - 1], "epoch": trained.kept, "held_out_loss_by_epoch": losses}


def _lowest_loss(measured: list[Figures]) -> bool:
    losses = [row["held_out_loss"] for row in measured]
    return losses.index(min(losses)) == len(losses) - 1


def _gate_holds(measured: list[Figures]) -> bool:
    """The first epoch in any case, then each one up to which the gate held without a break."""
    return len(measured) == 1 or all(row["gate"] >= GATE_FLOOR for row in measured)


_RULES: dict[str, Callable[[list[Figures]], bool]] = {
    "last": lambda measured: False,
    "held_out_loss": _lowest_loss,
    "gate": _gate_holds,
}


def train_step(model: PreTrainedModel, batch: Batch, compute: Compute, weights: Tensor | None = None) -> float:
    """Gather the gradient of the token-weighted loss over the batch, micro-batch by micro-batch; returns the loss."""
    weights = batch.mask if weights is None else weights[:, : batch.mask.size(1)] * batch.mask
    count = float(weights.sum())

    def one(rows: list[int]) -> Loss:
        part = batch.rows(rows)
        logps = response_scores(model, part, compute).logps
        return weighted_next_token_loss(logps, part.mask, weights[rows, : logps.size(1)], count)

    return compute.gather(compute.micro_batches(batch.lengths()), one)["loss"]


def held_out_loss(model: PreTrainedModel, batch: Batch, compute: Compute) -> float:
    """Nats per response token of held-out demonstrations."""
    return -float(score(model, batch, compute).sum() / batch.response_lengths.sum())


@dataclass(frozen=True)
class GateQuestions:
    """What the gate compares: held-out demonstrations, the prompt id of each, how many of the policy's own `samples` to each
    (at most `max_new_tokens`, ended by `end`), drawn under `seed`."""

    held_out: Batch
    keys: Sequence[str]
    samples: int
    max_new_tokens: int
    end: int
    seed: str


def gate(policy: PreTrainedModel, base: PreTrainedModel, questions: GateQuestions, compute: Compute) -> list[float]:
    """For each held-out demonstration, the share of the policy's own samples it beats in self-reward (a tie counts half).

    Below one half on average the reward prefers the policy's own text to the demonstrations: raising it cannot help. No
    label is used.
    """
    held_out = questions.held_out
    prompts = [held_out.ids[i, :n].tolist() for i, n in enumerate(held_out.prompt_lengths.tolist())]
    requests = [
        Request(prompt, key, n) for prompt, key in zip(prompts, questions.keys, strict=True) for n in range(questions.samples)
    ]
    own = sample(
        policy,
        requests,
        seed=questions.seed,
        end=questions.end,
        max_new_tokens=questions.max_new_tokens,
        compute=compute,
    ).batch
    demonstrated = sequence_rewards(policy, base, held_out, compute)[:, None]
    sampled = sequence_rewards(policy, base, own, compute).view(-1, questions.samples)
    gap = demonstrated - sampled
    wins = (gap > _TIE).float() + 0.5 * (gap.abs() <= _TIE).float()
    shares: list[float] = wins.mean(1).tolist()
    return shares
