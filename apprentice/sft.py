"""Supervised fine-tuning on demonstrations, and the label-free gate that says whether its self-reward can be trusted.

The loss is token-weighted over the response, its one end token included, and does not depend on how a batch is split into
micro-batches.
"""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.config import SFTConfig
from apprentice.losses import next_token_loss
from apprentice.optimise import Optimiser, linear_decay
from apprentice.policy import response_scores, score, weights
from apprentice.recorder import Recorder, State
from apprentice.rewards import sequence_rewards
from apprentice.sampling import Request, sample
from apprentice.tokens import Batch

_TIE = 1e-3  # nats; the same response scored in another batch differs by roundings


def fine_tune(
    model: PreTrainedModel,
    train: Batch,
    held_out: Batch,
    config: SFTConfig,
    *,
    seed: int,
    compute: Compute,
    recorder: Recorder,
) -> dict[str, Any]:
    """Fine-tune `model` in place; returns held_out_loss (nats per response token) after each epoch and the epoch kept.

    Rows: loss, held_out_loss (at an epoch's end), learning_rate, grad_norm, epoch.
    """
    batches = -(-len(train.ids) // config.batch_size)
    total = config.epochs * batches
    optimiser = Optimiser(
        model.parameters(),
        config.learning_rate,
        config.max_grad_norm,
        linear_decay(total, config.warmup_share),
        config.weight_decay,
    )
    losses: list[float] = []
    best: dict[str, Any] = {}
    start = 0
    if saved := recorder.resume():
        model.load_state_dict(saved["model"], strict=False)
        optimiser.restore(saved["optimiser"])
        start, losses, best = saved["step"], saved["losses"], saved["best"]

    def state() -> State:
        return {
            "model": weights(model),
            "optimiser": optimiser.state(),
            "step": step + 1,
            "losses": losses,
            "best": best,
        }

    for step in range(start, total):
        epoch, place = divmod(step, batches)
        order = random.Random(f"{seed}/sft/{epoch}").sample(range(len(train.ids)), len(train.ids))
        rows = order[place * config.batch_size : (place + 1) * config.batch_size]
        row = {"loss": train_step(model, train.rows(rows), compute), **optimiser.step(), "epoch": epoch + 1}
        measured = None
        if place == batches - 1:
            measured = held_out_loss(model, held_out, compute)
            losses.append(measured)
            if config.select == "held_out_loss" and losses.index(min(losses)) == epoch:
                best = {name: tensor.clone() for name, tensor in weights(model).items()}
        recorder.step(step + 1, total, {"held_out_loss": measured, **row}, state)
    if best:
        model.load_state_dict(best, strict=False)
    kept = losses.index(min(losses)) + 1 if best else config.epochs
    return {"held_out_loss": losses[kept - 1], "epoch": kept, "held_out_loss_by_epoch": losses}


def train_step(model: PreTrainedModel, batch: Batch, compute: Compute) -> float:
    """Gather the gradient of the token-weighted loss over the batch, micro-batch by micro-batch; returns the loss."""
    count, total = float(batch.response_lengths.sum()), 0.0
    for rows in compute.micro_batches(batch.lengths()):
        part = batch.rows(rows)
        loss, metrics = next_token_loss(response_scores(model, part, compute).logps, part.mask, count)
        loss.backward()
        total += float(metrics["loss"])
    return total


def held_out_loss(model: PreTrainedModel, batch: Batch, compute: Compute) -> float:
    """Nats per response token of held-out demonstrations."""
    return -float(score(model, batch, compute).sum() / batch.response_lengths.sum())


def gate(
    policy: PreTrainedModel,
    base: PreTrainedModel,
    held_out: Batch,
    keys: Sequence[str],
    *,
    samples: int,
    seed: int,
    end: int,
    max_new_tokens: int,
    compute: Compute,
) -> list[float]:
    """For each held-out demonstration, the share of the policy's own samples it beats in self-reward (a tie counts half).

    Below one half on average the reward prefers the policy's own text to the demonstrations: raising it cannot help. No
    label is used. `keys`: the prompt ids of the rows of `held_out`.
    """
    prompts = [held_out.ids[i, :n].tolist() for i, n in enumerate(held_out.prompt_lengths.tolist())]
    requests = [Request(p, key, s) for p, key in zip(prompts, keys, strict=True) for s in range(samples)]
    own = sample(policy, requests, seed=f"{seed}/gate", end=end, max_new_tokens=max_new_tokens, compute=compute).batch
    demonstrated = sequence_rewards(policy, base, held_out, compute)[:, None]
    sampled = sequence_rewards(policy, base, own, compute).view(-1, samples)
    gap = demonstrated - sampled
    wins = (gap > _TIE).float() + 0.5 * (gap.abs() <= _TIE).float()
    shares: list[float] = wins.mean(1).tolist()
    return shares
