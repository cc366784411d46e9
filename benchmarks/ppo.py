"""PPO with the self-reward against TRL 1.12.0, the last release that has PPO: the same work on both sides, checked first.

Both sides: the same starting weights (policy, anchor, critic, the two scorers), the same prompts in the same order, separate
critic, AdamW with the same settings, no clipping of gradients (TRL's loop has none), one optimiser step an epoch. wide_forced
decodes exactly `response` tokens (no end token is there to be drawn), tiny_natural stops at the end token.
"""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from apprentice.compute import Compute
from apprentice.policy import freeze
from apprentice.ppo import PPO, Prompts
from apprentice.recorder import Recorder
from apprentice.sampling import Rollout
from apprentice.sections import SRPPOConfig
from apprentice.srppo import SelfReward
from benchmarks.measure import BenchmarkError, Side, Worker, alternate
from benchmarks.peer_environment import PPO as TRL
from benchmarks.peer_environment import python_with_trl
from benchmarks.results import Results
from benchmarks.shapes import Material, computing, make, material
from benchmarks.worker import Figures, Prepare
from tasks.stage import read_params

FIRST_GAP = 1e-3  # nats; the two sides' first rewards, advantages and ratio may differ by roundings


@dataclass(frozen=True)
class Workload:
    """What one run is: `updates` rollouts of `batch` responses of at most `response` tokens, two epochs of one step each.
    forced: no response ends by itself. micro: rows in a forward pass of TRL's training."""

    shape: str
    forced: bool
    response: int
    batch: int
    updates: int
    micro: int


WORKLOADS = {
    "wide_forced": Workload("wide", True, 32, 64, 1, 8),
    "tiny_natural": Workload("tiny", False, 48, 128, 4, 32),
}
EPOCHS, RATE, KL, CLIP, LAMBDA = 2, 1e-4, 0.05, 0.2, 0.95


def family(results: Results, runs: int) -> None:
    """Check both sides on the same rollouts, then measure them on both workloads."""
    python = python_with_trl(TRL)
    for name, work in WORKLOADS.items():
        make(work.shape)
        sides = {
            "ours": Side("benchmarks.ppo:ours", {"workload": name}, python, tidy=True),
            "trl_as_shipped": Side("benchmarks.ppo_trl:trl", {"workload": name}, python, tidy=True),
            "trl_without_gc": Side("benchmarks.ppo_trl:trl", {"workload": name, "collect": False}, python, tidy=True),
        }
        if work.forced:
            results.gate(f"ppo/{name}", _gate(name, python))
        results.compare(f"ppo/{name}", alternate(sides, runs))


def _gate(workload: str, python: str) -> Figures:
    """Both sides' first update on identical rollouts. Raises BenchmarkError where they differ."""
    found = {}
    for side in ("ours", "trl"):
        with Worker(Side(f"benchmarks.ppo_first:{side}", {"workload": workload}, python)) as worker:
            found[side] = worker.run(0)["figures"]
    ours, trl = found["ours"], found["trl"]
    differences = {
        "rewards": max(abs(a - b) for a, b in zip(ours["rewards"], trl["rewards"], strict=True)),
        "advantages": max(abs(a - b) for a, b in zip(ours["advantages"], trl["advantages"], strict=True)),
        "kl": abs(ours["kl"] - trl["kl"]),
        "our_ratio_from_1": abs(ours["ratio"] - 1),
        "trl_ratio_from_1": abs(trl["ratio"] - 1),
    }
    if max(differences.values()) > FIRST_GAP:
        raise BenchmarkError(f"the two sides do not do the same work: {differences}")
    return differences


def order(work: Workload, pool: int, seed: str) -> list[list[int]]:
    """The prompts that our PPO draws for each update: TRL is given them in this order."""
    return [random.Random(f"{seed}/{n}").sample(range(pool), work.batch) for n in range(work.updates)]


def config(work: Workload) -> SRPPOConfig:
    """Our settings, equal to TRL's in ppo_trl.py; the rest, such as the roles, as in params.yaml."""
    return dataclasses.replace(
        read_params().srppo,
        missing_eos_reward=0.0,
        kl_coef=KL,
        kl_estimator="k1",
        kl_stop=None,
        iterations=work.updates,
        batch_size=work.batch,
        epochs=EPOCHS,
        minibatch_size=work.batch,
        temperature=1.0,
        max_new_tokens=work.response,
        gamma=1.0,
        gae_lambda=LAMBDA,
        whiten=True,
        reward_std_floor=1e-6,
        clip_range=CLIP,
        value_clip_range=CLIP,
        learning_rate=RATE,
        critic_learning_rate=RATE,
        max_grad_norm=1e9,
    )


class EveryResponse(SelfReward):
    """The self-reward paid to every response, ended or not, as TRL pays it."""

    def __call__(self, rollout: Rollout, logps: Any) -> Any:
        return super().__call__(dataclasses.replace(rollout, ended=torch.ones_like(rollout.ended)), logps)


def trainer_of_ours(work: Workload, given: Material, seed: str, policy: Any, compute: Compute) -> PPO:
    end = -1 if work.forced else given.end
    classes = torch.zeros(len(given.tokenizer), dtype=torch.long)
    keys = [str(i) for i in range(len(given.prompts))]
    prompts = Prompts(given.prompts, keys, end, classes, ("all",))
    scorers = {name: freeze(given.model(name)) for name in ("sft", "base")}
    settings = config(work)
    return PPO(policy, scorers, prompts, EveryResponse(settings, prompts), settings, seed=seed, compute=compute)


def ours(workload: str) -> Prepare:
    """Our side: a fresh trainer for each repeat, its training timed."""
    work, compute = WORKLOADS[workload], computing()
    given = material(work.shape)

    def prepare(repeat: int) -> Callable[[], Figures]:
        trainer, recorder = trainer_of_ours(work, given, str(repeat), given.model("sft"), compute), Recorder()

        def train() -> Figures:
            trainer.train(recorder)
            rows = recorder.rows
            tokens = sum((row["length"] or 0) * work.batch for row in rows)
            return figures([row["reward"] for row in rows], [row["kl_to_anchor"] for row in rows], tokens)

        return train

    return prepare


def figures(rewards: list[Any], kls: list[Any], tokens: float) -> Figures:
    """Reward and KL to the anchor (nats a response) of the first and the last rollout; response tokens without padding."""
    return {
        "first_reward": rewards[0],
        "last_reward": rewards[-1],
        "first_kl": kls[0],
        "last_kl": kls[-1],
        "tokens": tokens,
    }
