"""The scalar Bradley-Terry reward model, to compare the judge with: P(a beats b | x) = sigmoid(r(x, a) - r(x, b)).

A sequence classifier with one output on a language model's trunk; the reward is read at the last token of the response,
found by lengths and never by the id of the padding. It may be trained on a score of each response by itself instead of pairs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from apprentice.calibration import pair_accuracy
from apprentice.compute import CPU, Compute
from apprentice.epochs import Figures, Trained, train_epochs
from apprentice.judge import PreferencePair, in_micro_batches, ranking_loss
from apprentice.masking import check_shape
from apprentice.policy import checkpoint_arguments
from apprentice.recorder import Recorder
from apprentice.sections import EpochsConfig
from apprentice.sharding import gathered, shard
from apprentice.spurious import first_is_even
from apprentice.tokens import Batch, collate, encode_prompts, encode_responses, pad_id

_HEAD = "score.weight"


def new_reward_model(folder: Path, compute: Compute = CPU) -> PreTrainedModel:
    """A reward model on the trunk of the causal language model in `folder`; its head starts at zero, and so does every reward.

    Raises ValueError for a folder that holds something else, or an architecture without such a classifier.
    """
    model, missing = _load(folder, compute)
    if missing != {_HEAD}:
        raise ValueError(f"{folder}: expected a causal language model, which lacks {_HEAD}; lacking is {sorted(missing)}")
    nn.init.zeros_(model.score.weight)
    return model


def load_reward_model(folder: Path, compute: Compute = CPU) -> PreTrainedModel:
    """Load a reward model that `save_policy` wrote: float32 weights, dropout off. Raises ValueError for any other model."""
    model, missing = _load(folder, compute)
    if missing:
        raise ValueError(f"{folder}: expected a trained reward model, but {sorted(missing)} is lacking; train one first")
    return shard(model, compute)


def _load(folder: Path, compute: Compute) -> tuple[PreTrainedModel, set[str]]:
    """The classifier of a checkpoint, and the names of weights that the checkpoint lacks."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the library would report a fresh head as a fault; the callers check it
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            **checkpoint_arguments(folder),
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    return model.to(compute.device).eval(), set(found["missing_keys"])


def bt_rewards(model: PreTrainedModel, batch: Batch, compute: Compute = CPU) -> Tensor:
    """[N] rewards of the batch's responses, with gradient where the model takes one.

    Raises ValueError for a model in training mode.
    """
    if model.training:
        raise ValueError("bt_rewards: the model is in training mode; call .eval(), gradients flow all the same")

    def forward(rows: list[int]) -> Tensor:
        part = batch.rows(rows)
        last = part.prompt_lengths + part.response_lengths - 1
        with compute.autocast():
            hidden = model.base_model(input_ids=part.ids, use_cache=False).last_hidden_state
        at_last = hidden[torch.arange(len(rows), device=hidden.device), last]
        rewards: Tensor = model.score(at_last.to(model.score.weight.dtype)).squeeze(-1)
        return rewards

    with gathered(model):
        return in_micro_batches(forward, batch.lengths(), compute)


@torch.no_grad()
def bt_win_logits(model: PreTrainedModel, responses: Batch, anchors: Batch, compute: Compute = CPU) -> Tensor:
    """[N] logits of P(response beats anchor), row by row: the difference of their rewards."""
    return bt_rewards(model, responses, compute) - bt_rewards(model, anchors, compute)


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair]) -> tuple[Batch, Batch]:
    """The chosen and the rejected responses of pairs, each after its prompt, row by row."""
    prompts, pad = encode_prompts(tokenizer, [pair.prompt for pair in pairs]), pad_id(tokenizer)
    chosen = encode_responses(tokenizer, [pair.chosen for pair in pairs])
    rejected = encode_responses(tokenizer, [pair.rejected for pair in pairs])
    return collate(prompts, chosen, pad), collate(prompts, rejected, pad)


def pair_scores(pairs: Sequence[PreferencePair], prompt_offset: float) -> Tensor:
    """[N, 2] scores of the chosen and the rejected response of each pair: 1 and 0.

    `prompt_offset` is added to both where the first number of the prompt is even: a rater's mood, which belongs to the prompt
    and not to the response.
    """
    offsets = torch.tensor([prompt_offset * bool(first_is_even(pair.prompt)) for pair in pairs])
    return torch.stack([1 + offsets, offsets], dim=1)


def train_reward_model(
    model: PreTrainedModel,
    chosen: Batch,
    rejected: Batch,
    config: EpochsConfig,
    *,
    seed: str,
    compute: Compute,
    recorder: Recorder,
    scores: Tensor | None = None,
) -> Trained:
    """Train a reward model in place on pairs, row by row of `chosen` and `rejected`, or on the `scores` [N, 2] of both.

    Figures of a step: loss, accuracy, margin (mean difference of rewards).
    """

    def step(rows: list[int]) -> Figures:
        return bt_step(model, chosen.rows(rows), rejected.rows(rows), compute, None if scores is None else scores[rows])

    return train_epochs(model, len(chosen.ids), step, config, seed=seed, recorder=recorder)


def bt_step(model: PreTrainedModel, chosen: Batch, rejected: Batch, compute: Compute, scores: Tensor | None = None) -> Figures:
    """Gather the gradient of the mean of -log sigmoid(r_chosen - r_rejected) over some pairs, micro-batch by micro-batch; with
    `scores` [N, 2] that of the mean squared error of the rewards.

    Returns its figures.
    """
    size = len(chosen.ids)
    margins, total = torch.zeros(size, device=chosen.ids.device), 0.0
    lengths = [a + b for a, b in zip(chosen.lengths(), rejected.lengths(), strict=True)]
    for rows in compute.padded_batches(lengths):
        better, worse = bt_rewards(model, chosen.rows(rows), compute), bt_rewards(model, rejected.rows(rows), compute)
        part = better - worse
        if scores is None:
            loss = ranking_loss(part, size)
        else:
            loss = score_loss(torch.stack([better, worse], dim=1), scores[rows], 2 * size)
        loss.backward()
        margins[rows] = part.detach().float()
        total += float(loss.detach())
    return {"loss": total, "accuracy": pair_accuracy(margins), "margin": float(margins.mean())}


def score_loss(rewards: Tensor, scores: Tensor, count: float) -> Tensor:
    """(reward - score)^2, summed over rewards [N, 2] and divided by the `count` of the whole batch.

    Raises ValueError for scores of another shape.
    """
    check_shape("scores", scores, *rewards.shape)
    return (rewards - scores).square().sum() / count
