"""Our side of the benchmark of one device: weights to train are float32, computing is in bfloat16 and deterministic.

Fine-tuning (forward and backward), scoring, rollouts that end at no token, and an update of Self-Rewarding PPO from rollout to
step, its critic a head on the policy. The three models of an update stand on one trunk where the shape has adapters.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from apprentice.compute import Compute, set_up
from apprentice.config import Params, parse
from apprentice.layers import hold_as_cast
from apprentice.policy import freeze, score
from apprentice.ppo import Prompts
from apprentice.recorder import Recorder
from apprentice.sampling import Request, sample
from apprentice.sections import LoRAConfig
from apprentice.sft import train_step
from apprentice.srppo import SelfRewardingPPO
from apprentice.tokens import Batch, collate
from benchmarks.gpu_shapes import Shape, Work, build, texts

PARAMS = Path(__file__).parents[1] / "params.yaml"
EPOCHS = 2


def computing(device: str) -> Compute:
    """As stages compute, deterministic algorithms included."""
    return set_up(replace(_params().compute, device=device, dtype="bfloat16", threads=1))


def _params() -> Params:
    return parse(yaml.safe_load(PARAMS.read_text(encoding="utf-8")))


def works(shape: Shape, compute: Compute) -> dict[str, Work]:
    """The four kinds of work."""
    torch.use_deterministic_algorithms(True)
    compute = replace(compute, forward_tokens=shape.forward_tokens)
    read, train = shape.read, shape.train * shape.read
    scored = 2 * 4 * read  # both frozen models, the policy and the critic
    return {
        "sft": Work(partial(_sft, shape, compute), read, train),
        "scoring": Work(partial(_scoring, shape, compute), read, 2 * read),
        "rollouts": Work(partial(_rollouts, shape, compute), shape.drawn, 2 * read),
        "ppo": Work(partial(_ppo, shape, compute), shape.drawn, 2 * read + scored + EPOCHS * train),
    }


def _sft(shape: Shape, compute: Compute) -> Callable[[], object]:
    policy, batch = _policy(shape, compute), _batch(shape, compute)

    def fine_tune() -> object:
        policy.zero_grad()
        return train_step(policy, batch, compute)

    return fine_tune


def _scoring(shape: Shape, compute: Compute) -> Callable[[], object]:
    return partial(score, hold_as_cast(freeze(build(shape, compute.device)), compute), _batch(shape, compute), compute)


def _rollouts(shape: Shape, compute: Compute) -> Callable[[], object]:
    requests = [Request(prompt, str(row)) for row, prompt in enumerate(_prompts(shape))]
    return partial(sample, _policy(shape, compute), requests, seed="0", end=-1, max_new_tokens=shape.response, compute=compute)


def _ppo(shape: Shape, compute: Compute) -> Callable[[], object]:
    drawn: dict[str, Any] = {"batch_size": shape.rows, "minibatch_size": shape.rows, "max_new_tokens": shape.response}
    update = replace(_params().srppo, **drawn, epochs=EPOCHS, kl_stop=None, critic="shared")
    policy, keys = _policy(shape, compute), [str(row) for row in range(shape.rows)]
    pool = Prompts(_prompts(shape), keys, -1, torch.zeros(shape.entries["vocab_size"]).long(), ("all",))
    ppo = SelfRewardingPPO(policy, _frozen(shape, policy, compute), pool, update, seed="0", compute=compute)

    def one_update() -> object:
        ppo.config = replace(update, iterations=ppo.iteration + 1)
        return ppo.train(Recorder())

    return one_update


def _policy(shape: Shape, compute: Compute) -> Any:
    model = build(shape, compute.device)
    if not shape.adapters:
        return model
    from apprentice.lora import Trunk

    trunk = hold_as_cast(model, compute)
    return Trunk(trunk, LoRAConfig(rank=16, alpha=32, targets="all-linear"), seed="0", origin={}).train()


def _frozen(shape: Shape, policy: Any, compute: Compute) -> dict[str, Any]:
    if shape.adapters:
        return {"sft": freeze(policy.trunk.train()), "base": policy.trunk.role()}
    return {name: hold_as_cast(freeze(build(shape, policy.device)), compute) for name in ("sft", "base")}


def _prompts(shape: Shape) -> list[list[int]]:
    return texts(shape)[:, : shape.prompt].tolist()


def _batch(shape: Shape, compute: Compute) -> Batch:
    return collate(_prompts(shape), texts(shape)[:, shape.prompt :].tolist(), 0).to(compute.device)
