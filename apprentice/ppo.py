"""PPO (1707.06347) on a language model with a KL penalty to an anchor; what is rewarded is given by the caller.

Each iteration: sample responses, score them, place the reward, penalise KL to the anchor, estimate advantages, take clipped
steps on policy and critic.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apprentice.advantages import explained_variance, gae, importance_weights, mean_per_response
from apprentice.compute import Compute
from apprentice.health import signs
from apprentice.losses import Loss, clipped_policy_loss, value_loss
from apprentice.masking import masked_mean, whiten
from apprentice.optimise import Optimiser
from apprentice.policy import Critic, put_weights, response_scores, score, values_of, weights
from apprentice.recorder import Recorder, Row, State
from apprentice.rewards import kl_penalty, length_slope, place_total
from apprentice.sampling import Request, Rollout, sample
from apprentice.sections import PPOConfig
from apprentice.sharding import gathered
from apprentice.tokens import Batch

WEIGHT_CAP = 2.0  # of a token that another program sampled
LEARNT = ("policy_loss", "approx_kl", "clip_fraction", "value_loss", "entropy", "grad_norm")  # of a row, from the updates


@dataclass(frozen=True)
class Prompts:
    """The on-policy pool. ids: token ids of each prompt. keys: prompt ids. end: the end token. classes: [V] class of each
    token, with `class_names`, by which the reward is split in the diagnostics."""

    ids: Sequence[Sequence[int]]
    keys: Sequence[str]
    end: int
    classes: Tensor
    class_names: Sequence[str]


@dataclass(frozen=True)
class Rewarded:
    """placed: [B, T] rewards of the response tokens. totals: [B] reward of each response, before any rule on missing end
    tokens. figures: what else the row of the iteration shall hold."""

    placed: Tensor
    totals: Tensor
    figures: Mapping[str, float]


class Reward(Protocol):
    """Rewards a rollout, given the [B, T] log-probabilities of its tokens under each frozen scorer, at temperature 1."""

    def __call__(self, rollout: Rollout, logps: Mapping[str, Tensor]) -> Rewarded: ...  # noqa: D102


class TerminalReward:
    """Pays each response on its last token what `rate` gives for the rollout: rewards [B], and figures for the row."""

    def __init__(self, rate: Callable[[Rollout], tuple[Tensor, Mapping[str, float]]], missing_eos_reward: float) -> None:
        self.rate, self.missing_eos_reward = rate, missing_eos_reward

    def __call__(self, rollout: Rollout, logps: Mapping[str, Tensor]) -> Rewarded:
        """The rewards; one that never ended earns `missing_eos_reward` instead."""
        totals, figures = self.rate(rollout)
        return Rewarded(place_total(totals, rollout.batch.mask, rollout.ended, self.missing_eos_reward), totals, figures)


@dataclass(frozen=True)
class Experience:
    """What the updates of one iteration learn from; all but the batch are [B, T] and carry no gradient."""

    batch: Batch
    mask: Tensor
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, rows: list[int]) -> "Experience":
        """Some rows, no wider than the longest of their responses."""
        batch = self.batch.rows(rows)
        width = batch.mask.size(1)
        own = (self.old_logps, self.old_values, self.advantages, self.returns)
        return Experience(batch, batch.mask, *(tensor[rows, :width] for tensor in own))


class PPO:
    """The state of one run: policy, critic, their optimisers, the scale of the values, and the iteration reached.

    `scorers` holds the frozen models by name; `sft`, `base` and the config's KL anchor must be among them, and critic_init
    where the critic is separate.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        scorers: Mapping[str, PreTrainedModel],
        prompts: Prompts,
        reward: Reward,
        config: PPOConfig,
        *,
        seed: str,
        compute: Compute,
    ) -> None:
        self.policy, self.scorers, self.prompts, self.reward, self.config = policy, scorers, prompts, reward, config
        self.seed, self.compute = seed, compute
        shared = config.critic == "shared"
        self.critic = Critic(policy if shared else scorers[config.critic_init], shared)
        self.policy_optimiser = Optimiser(policy.parameters(), config.learning_rate, config.max_grad_norm, team=compute.team)
        self.critic_optimiser = Optimiser(
            self.critic.own.parameters(), config.critic_learning_rate, config.max_grad_norm, team=compute.team
        )
        self.value_scale: float | None = None
        self.iteration, self.kl_to_anchor = 0, 0.0

    def train(self, recorder: Recorder) -> dict[str, Any]:
        """Run to the last iteration or until the KL stop; returns how far it came, why it stopped and the last KL.

        What is not finite is skipped or stops the run, by the recorder's rule: a whole iteration for its rewards, values or KL,
        one step of it, on policy and critic, for its losses and gradients. Each sign of `health` is told once, before the
        updates of its iteration.
        """
        if saved := recorder.resume():
            self.restore(saved)
        stopped = "iterations"
        while self.iteration < self.config.iterations:
            scale, rollout = self.value_scale, self.sample()
            figures, experience = self.evaluate(rollout)
            row: Row = dict.fromkeys([*figures, *LEARNT])
            if recorder.skips(self._where(), figures):
                self.value_scale = scale
            else:
                self.kl_to_anchor = figures["kl_to_anchor"]
                if self.config.kl_stop is not None and self.kl_to_anchor > self.config.kl_stop:
                    stopped = "kl_stop"
                    break
                for sign in signs(figures, recorder.rows, self.config):
                    recorder.bad_sign(f"{self._where()}: {sign}")
                row = {**figures, **self.update(experience, recorder)}
            self.iteration += 1
            recorder.step(self.iteration, self.config.iterations, row, self.state)
        recorder.over(self.state)
        return {"iterations": self.iteration, "stopped_by": stopped, "kl_to_anchor": self.kl_to_anchor}

    def _where(self) -> str:
        return f"iteration {self.iteration + 1} of {self.config.iterations}"

    def sample(self) -> Rollout:
        """Draw prompts from the pool and one response to each from the policy."""
        rng = random.Random(f"{self.seed}/{self.iteration}")
        size, pool = self.config.batch_size, range(len(self.prompts.ids))
        chosen = rng.sample(pool, size) if size <= len(pool) else rng.choices(pool, k=size)
        requests = [Request(self.prompts.ids[i], self.prompts.keys[i], n) for n, i in enumerate(chosen)]
        return sample(
            self.policy,
            requests,
            seed=f"{self.seed}/{self.iteration}",
            end=self.prompts.end,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            compute=self.compute,
        )

    def evaluate(self, rollout: Rollout) -> tuple[dict[str, float], Experience]:
        """Score a rollout: reward, KL penalty, values, advantages; with the diagnostics of the iteration."""
        config, batch, mask = self.config, rollout.batch, rollout.batch.mask
        old_logps = self._old_logps(rollout)
        logps = {name: score(model, batch, self.compute) for name, model in self.scorers.items()}
        tempered = logps  # the reward always at temperature 1; ratio and KL at the sampling temperature
        if config.temperature != 1.0:
            tempered = {n: score(model, batch, self.compute, config.temperature) for n, model in self.scorers.items()}
        anchor = tempered[config.kl_anchor]
        rewarded = self.reward(rollout, logps)
        raw = rewarded.totals
        rewards = rewarded.placed - config.kl_coef * kl_penalty(old_logps, anchor, mask, config.kl_estimator)
        if self.value_scale is None:
            self.value_scale = max(config.reward_std_floor, float(rewards.sum(1).std(correction=0)))
        values = values_of(self.critic, batch, self.compute) * self.value_scale
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        trusted = float(raw.std(correction=0)) >= config.reward_std_floor
        advantages = whiten(advantages, mask) if config.whiten and trusted else advantages / self.value_scale
        by_sampler = {}
        if rollout.sampler_logps is not None:
            advantages = advantages * importance_weights(old_logps, rollout.sampler_logps, mask, WEIGHT_CAP)
            difference = (rollout.sampler_logps - old_logps) * mask
            by_sampler = {"sampler_kl": mean_per_response(difference, mask), "sampler_gap": float(difference.abs().max())}
        row = {
            "reward": float(raw.mean()),
            "reward_std": float(raw.std(correction=0)),
            "reward_length_slope": length_slope(raw, batch.response_lengths),
            **rewarded.figures,
            "kl_to_sft": mean_per_response(old_logps - tempered["sft"], mask),
            "kl_to_base": mean_per_response(old_logps - tempered["base"], mask),
            "kl_to_anchor": mean_per_response(old_logps - anchor, mask),
            "explained_variance": explained_variance(values, returns, mask),
            "length": float(batch.response_lengths.float().mean()),
            "eos_rate": float(rollout.ended.float().mean()),
            **by_sampler,
        }
        scale = self.value_scale
        return row, Experience(batch, mask, old_logps, values / scale, advantages, returns / scale)

    def update(self, experience: Experience, recorder: Recorder) -> Row:
        """The clipped steps of one iteration on policy and critic; returns the means of `LEARNT` over those taken."""
        steps: list[dict[str, float]] = []
        for epoch in range(self.config.epochs):
            for number, rows in enumerate(self._minibatches(len(experience.batch.ids), epoch), 1):
                figures = self._gather(experience, rows)
                norms = {"grad_norm": self.policy_optimiser.clip(), "critic_grad_norm": self.critic_optimiser.clip()}
                taken = recorder.takes(f"{self._where()}, epoch {epoch + 1}, minibatch {number}", figures | norms)
                for optimiser in (self.policy_optimiser, self.critic_optimiser):
                    optimiser.step() if taken else optimiser.drop()
                if taken:
                    steps.append(figures | norms)
        return {name: sum(step[name] for step in steps) / len(steps) if steps else None for name in LEARNT}

    def _gather(self, experience: Experience, rows: list[int]) -> dict[str, float]:
        """Gather the gradients of a minibatch, on the policy and then on a critic of its own, micro-batch by micro-batch;
        returns its metrics."""
        count, micro_batches = float(experience.mask[rows].sum()), self._micro_batches(experience.batch, rows)
        figures = self.compute.gather(micro_batches, lambda micro: self._policy_loss(experience.rows(micro), count))
        if not self.critic.shared:
            figures |= self.compute.gather(micro_batches, lambda micro: self._critic_loss(experience.rows(micro), count))
        return figures

    def _policy_loss(self, part: Experience, count: float) -> Loss:
        """Of a micro-batch; with a shared critic, which reads what the same pass ends with, the value loss too."""
        config = self.config
        scores = response_scores(
            self.policy, part.batch, self.compute, config.temperature, entropy=True, hidden=self.critic.shared
        )
        loss, figures = clipped_policy_loss(scores.logps, part.old_logps, part.advantages, part.mask, config.clip_range, count)
        assert scores.entropy is not None
        figures["entropy"] = masked_mean(scores.entropy, part.mask, count)
        if scores.hidden is not None:
            of_values, critic = self._value_loss(self.critic.read(scores.hidden, scores.layout, part.batch), part, count)
            loss, figures = loss + config.value_coef * of_values, figures | critic
        return loss, figures

    def _critic_loss(self, part: Experience, count: float) -> Loss:
        return self._value_loss(self.critic(part.batch, self.compute), part, count)

    def _value_loss(self, values: Tensor, part: Experience, count: float) -> Loss:
        return value_loss(values, part.old_values, part.returns, part.mask, self.config.value_clip_range, count)

    def _minibatches(self, size: int, epoch: int) -> list[list[int]]:
        """A fresh permutation of the rollout's rows each epoch, cut into minibatches."""
        order = random.Random(f"{self.seed}/{self.iteration}/{epoch}").sample(range(size), size)
        return [order[i : i + self.config.minibatch_size] for i in range(0, size, self.config.minibatch_size)]

    def _micro_batches(self, batch: Batch, rows: list[int]) -> list[list[int]]:
        lengths = batch.lengths()
        return [[rows[i] for i in group] for group in self.compute.micro_batches([lengths[row] for row in rows])]

    def _old_logps(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of the behaviour policy: recorded while sampling, or computed again at the shapes of the first
        epoch's micro-batches, where bfloat16 would otherwise move the ratio away from 1."""
        recorded = self.compute.dtype == torch.float32
        if self.config.old_logps != "auto":
            recorded = self.config.old_logps == "recorded"
        if recorded:
            return rollout.logps
        logps = torch.zeros_like(rollout.logps)
        with torch.no_grad(), gathered(self.policy):
            for rows in self._minibatches(len(rollout.batch.ids), 0):
                for micro in self._micro_batches(rollout.batch, rows):
                    part = response_scores(self.policy, rollout.batch.rows(micro), self.compute, self.config.temperature)
                    logps[micro, : part.logps.size(1)] = part.logps
        return logps

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {
            "policy": weights(self.policy),
            "critic": weights(self.critic.own),
            "policy_optimiser": self.policy_optimiser.state(),
            "critic_optimiser": self.critic_optimiser.state(),
            "value_scale": self.value_scale,
            "iteration": self.iteration,
            "kl_to_anchor": self.kl_to_anchor,
        }

    def restore(self, state: State) -> None:
        """Put a saved state back."""
        put_weights(self.policy, state["policy"])
        put_weights(self.critic.own, state["critic"])
        self.policy_optimiser.restore(state["policy_optimiser"])
        self.critic_optimiser.restore(state["critic_optimiser"])
        self.value_scale = state["value_scale"]
        self.iteration, self.kl_to_anchor = state["iteration"], state["kl_to_anchor"]
