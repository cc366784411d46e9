"""Preference optimisation on pairs against a frozen reference (RSO, 2309.06657; DPO, SLiC and IPO as losses)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.epochs import Figures, train_epochs
from apprentice.losses import Loss, preference_loss
from apprentice.masking import masked_sum
from apprentice.policy import response_scores, score
from apprentice.recorder import Recorder
from apprentice.sections import PreferenceConfig
from apprentice.tokens import Batch


@dataclass(frozen=True)
class Pairs:
    """Preference pairs: row i of `chosen` and of `rejected` answer the same prompt; reference log-probabilities [N] are
    sums over response tokens, computed once."""

    chosen: Batch
    rejected: Batch
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor


def with_reference(reference: PreTrainedModel, chosen: Batch, rejected: Batch, compute: Compute) -> Pairs:
    """Score both sides under the reference, by the same code and precision as training."""
    return Pairs(
        chosen,
        rejected,
        score(reference, chosen, compute).sum(1),
        score(reference, rejected, compute).sum(1),
    )


def optimise_preferences(
    policy: PreTrainedModel, pairs: Pairs, config: PreferenceConfig, *, seed: str, compute: Compute, recorder: Recorder
) -> dict[str, Any]:
    """Train `policy` in place; returns loss, accuracy and margin averaged over the last epoch.

    Rows: the metrics of `preference_loss`, grad_norm, learning_rate, epoch. Expect chosen_logps to fall too: the loss only asks
    for the gap. Where they fall far it is told once, before the step.
    """

    def step(rows: list[int]) -> Figures:
        return preference_step(policy, pairs, rows, config, compute)

    trained = train_epochs(policy, len(pairs.chosen.ids), step, config, seed=seed, recorder=recorder, team=compute.team)
    return {name: trained.means[name] for name in ("loss", "accuracy", "margin")}


def preference_step(
    policy: PreTrainedModel, pairs: Pairs, rows: list[int], config: PreferenceConfig, compute: Compute
) -> dict[str, float]:
    """Gather the gradient of the mean loss over the pairs in `rows`, micro-batch by micro-batch; returns its metrics."""
    chosen, rejected = pairs.chosen.lengths(), pairs.rejected.lengths()

    def one(group: list[int]) -> Loss:
        index = torch.tensor([rows[i] for i in group])
        return preference_loss(
            _summed_logps(policy, pairs.chosen.rows(index), compute),
            _summed_logps(policy, pairs.rejected.rows(index), compute),
            pairs.reference_chosen_logps[index],
            pairs.reference_rejected_logps[index],
            config.loss,
            config.gamma,
            count=len(rows),
        )

    return compute.gather(compute.micro_batches([chosen[row] + rejected[row] for row in rows]), one)


def _summed_logps(policy: PreTrainedModel, batch: Batch, compute: Compute) -> Tensor:
    scores = response_scores(policy, batch, compute)
    return masked_sum(scores.logps, batch.mask)
