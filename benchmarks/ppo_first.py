"""The first update of both sides on identical rollouts, at learning rate 0: rewards, advantages, KL and ratio to compare.

The policy is moved away from the anchor and the critic's head is random, so that every term of the advantages counts.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.policy import response_scores
from apprentice.recorder import Recorder
from apprentice.sampling import Rollout
from apprentice.tokens import collate
from benchmarks.ppo import WORKLOADS, Workload, order, trainer_of_ours
from benchmarks.ppo_trl import trainer_of_trl
from benchmarks.shapes import Material, computing, material

First = dict[str, Any]


def responses(work: Workload, given: Material) -> list[list[int]]:
    """The responses both sides are given to their first prompts."""
    rng = random.Random("first")
    words = len(given.tokenizer) - 3  # the last three are reserved
    return [[rng.randrange(words) for _ in range(work.response)] for _ in range(work.batch)]


def moved(model: Any) -> Any:
    """The model with noise on its weights, the same on both sides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def with_head(head: nn.Linear) -> None:
    """A random head of the critic, the same on both sides."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head.weight.copy_(0.1 * torch.randn(head.weight.shape, generator=generator))


def ours(workload: str) -> Callable[[int], Callable[[], First]]:
    """Our first update."""
    work, compute = WORKLOADS[workload], computing()
    given = material(work.shape)
    trainer = trainer_of_ours(work, given, "0", moved(given.model("sft")), compute)
    trainer.config = dataclasses.replace(trainer.config, whiten=False)
    trainer.value_scale = 1.0
    with_head(trainer.critic.head)

    def first() -> First:
        prompts = [given.prompts[i] for i in order(work, len(given.prompts), "0")[0]]
        batch = collate(prompts, responses(work, given), given.end)
        with torch.no_grad():
            logps = response_scores(trainer.policy, batch).logps
        rewards: list[Tensor] = []
        reward = trainer.reward

        def noted(*given: Any) -> Any:
            rewarded = reward(*given)
            rewards.append(rewarded.totals)
            return rewarded

        trainer.reward = noted
        rollout = Rollout(batch, logps, torch.zeros(work.batch, dtype=torch.bool), [""] * work.batch)
        figures, experience = trainer.evaluate(rollout)
        trainer.policy_optimiser.learning_rate = 0.0
        trainer.update(experience, Recorder())
        with torch.no_grad():
            ratio = (response_scores(trainer.policy, batch).logps - experience.old_logps).exp()
        return {
            "rewards": rewards[0].tolist(),
            "advantages": experience.advantages.flatten().tolist(),
            "kl": figures["kl_to_anchor"],
            "ratio": float(ratio.mean()),
        }

    return lambda repeat: first


def trl(workload: str) -> Callable[[int], Callable[[], First]]:
    """TRL's first update: its own loop, given the responses in the place of those it would generate."""
    from trl.experimental.ppo import ppo_trainer

    work = WORKLOADS[workload]
    given = material(work.shape)
    trainer = trainer_of_trl(work, given, "0", rate=0.0)
    moved(trainer.policy_model)
    with_head(trainer.value_model.score)
    answers = torch.tensor(responses(work, given))
    noted: dict[str, Tensor] = {}
    whiten, get_reward = ppo_trainer.masked_whiten, ppo_trainer.get_reward

    def generated(model: Any, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        ids = torch.cat([queries, answers], 1)
        with torch.no_grad():
            scored = ppo_trainer.forward(model, ids, trainer.processing_class.pad_token_id)
        return ids, scored.logits[:, queries.size(1) - 1 : -1]

    def noting_advantages(values: Tensor, mask: Tensor, **options: Any) -> Tensor:
        noted["advantages"] = values
        return whiten(values, mask, **options)

    def noting_rewards(model: Any, *arguments: Any) -> Any:
        found = get_reward(model, *arguments)
        if model is trainer.reward_model:
            noted["rewards"] = found[1]
        return found

    ppo_trainer.batch_generation = generated
    ppo_trainer.masked_whiten, ppo_trainer.get_reward = noting_advantages, noting_rewards

    def first() -> First:
        trainer.train()
        logged = next(row for row in trainer.state.log_history if "objective/kl" in row)
        return {
            "rewards": noted["rewards"].tolist(),
            "advantages": noted["advantages"].flatten().tolist(),
            "kl": logged["objective/kl"],
            "ratio": logged["val/ratio"],
        }

    return lambda repeat: first
