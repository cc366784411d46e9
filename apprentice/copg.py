"""Contrastive policy gradient on fixed groups of samples against a frozen reference (CoPG, 2406.19185).

A group is k samples of one prompt with their rewards, drawn from any distribution that covers the reference: nothing is
sampled here, and there is neither critic nor clipping. The optimum is pi_ref exp(R / beta) / Z.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.epochs import Figures, train_epochs
from apprentice.losses import Loss, contrastive_loss, sign_rewards
from apprentice.masking import check_shape, masked_sum
from apprentice.method_sections import CoPGConfig
from apprentice.policy import response_scores, score
from apprentice.recorder import Recorder
from apprentice.tokens import Batch


@dataclass(frozen=True)
class Groups:
    """B groups of k samples: rows b * k to b * k + k - 1 of `batch` answer prompt b.

    reference_logps: [B, k] sums over response tokens under the reference. rewards: [B, k]. Raises ValueError for other
    shapes, a reward that is not finite, or a group of different prompts.
    """

    batch: Batch
    reference_logps: Tensor
    rewards: Tensor

    def __post_init__(self) -> None:
        check_shape("rewards", self.rewards, None, None)
        check_shape("reference_logps", self.reference_logps, *self.rewards.shape)
        check_shape("batch.ids", self.batch.ids, self.rewards.numel(), None)
        if not self.rewards.isfinite().all():
            row, column = (~self.rewards.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"rewards: expected finite numbers, got {self.rewards[row, column]} for sample {column} of group {row}"
            )
        lengths = self.batch.prompt_lengths
        tokens = torch.arange(self.batch.ids.size(1), device=lengths.device) < lengths[:, None]
        prompts = torch.cat([self.batch.ids * tokens, lengths[:, None]], 1).view(*self.rewards.shape, -1)
        if mixed := (prompts != prompts[:, :1]).any(2).any(1).nonzero().flatten().tolist():
            raise ValueError(f"batch: expected the samples prompt by prompt, got different prompts in group {mixed[0]}")

    def rows(self, groups: list[int]) -> Tensor:
        """Rows of `batch` that the groups have."""
        size = self.rewards.size(1)
        return (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()

    def lengths(self) -> list[int]:
        """Tokens of each group once its samples are padded."""
        size, lengths = self.rewards.size(1), self.batch.lengths()
        return [size * max(lengths[i : i + size]) for i in range(0, len(lengths), size)]


def with_rewards(reference: PreTrainedModel, batch: Batch, rewards: Tensor, compute: Compute) -> Groups:
    """Score the samples under the reference, by the same code and precision as training: rewards [B, k]."""
    unscored = Groups(batch, torch.zeros_like(rewards), rewards)
    logps = score(reference, batch, compute).sum(1)
    return replace(unscored, reference_logps=logps.view(rewards.shape), rewards=rewards.to(logps))


def optimise_contrast(
    policy: PreTrainedModel, groups: Groups, config: CoPGConfig, *, seed: str, compute: Compute, recorder: Recorder
) -> Figures:
    """Train `policy` in place; returns the metrics of `contrastive_loss` averaged over the last epoch.

    residual_variance / reward_variance is the share of the rewards that the policy has not taken up yet: 1 at the reference.
    Rows: those metrics, grad_norm, learning_rate, epoch. A batch is `config.batch_size` groups. With `config.signs` only the
    order of a group's rewards counts.
    """
    if config.signs:
        groups = replace(groups, rewards=sign_rewards(groups.rewards))

    def step(rows: list[int]) -> Figures:
        return contrast_step(policy, groups, rows, config.beta, compute)

    return train_epochs(policy, len(groups.rewards), step, config, seed=seed, recorder=recorder, team=compute.team).means


def contrast_step(policy: PreTrainedModel, groups: Groups, rows: list[int], beta: float, compute: Compute) -> Figures:
    """Gather the gradient of the mean loss over the groups in `rows`, micro-batch by micro-batch; returns its metrics."""
    lengths = groups.lengths()

    def one(part: list[int]) -> Loss:
        chosen = [rows[i] for i in part]
        batch = groups.batch.rows(groups.rows(chosen))
        logps = masked_sum(response_scores(policy, batch, compute).logps, batch.mask)
        reference, rewards = groups.reference_logps[chosen], groups.rewards[chosen]
        return contrastive_loss(logps.view(rewards.shape), reference, rewards, beta, count=len(rows))

    return compute.gather(compute.micro_batches([lengths[row] for row in rows]), one)
