"""Everything learns, in seconds, in a tiny world: the demonstrated response to a pair of letters is the second of them."""

import copy
import math
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from apprentice.compute import CPU
from apprentice.policy import freeze
from apprentice.ppo import Prompts
from apprentice.preference import optimise_preferences, preference_step, with_reference
from apprentice.recorder import Recorder
from apprentice.rejection import make_pairs, rejection_sample
from apprentice.rewards import sequence_rewards
from apprentice.sampling import Request, sample
from apprentice.sft import HeldOut, fine_tune, held_out_loss
from apprentice.srppo import SelfRewardingPPO
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import END, rso_config, sft_config, srppo_config, tiny_llama

VOCAB = 8
LETTERS = [token for token in range(VOCAB) if token != END]
PAIRS = random.Random(0).sample([[a, b] for a in LETTERS for b in LETTERS], 49)
TRAIN, HELD_OUT, POOL = PAIRS[:16], PAIRS[16:30], PAIRS[30:] + PAIRS[:16]


def demonstrated(prompts: Sequence[list[int]]) -> Batch:
    return collate(prompts, [[second, END] for _, second in prompts], END)


def sampled(model: LlamaForCausalLM, prompts: Sequence[list[int]], count: int) -> Batch:
    requests = [Request(prompt, str(prompt), n) for prompt in prompts for n in range(count)]
    return sample(model, requests, seed="learning", end=END, max_new_tokens=6).batch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return freeze(tiny_llama(0, vocab=VOCAB, hidden_size=32, initializer_range=0.1))


@pytest.fixture(scope="module")
def sft(base: LlamaForCausalLM) -> LlamaForCausalLM:
    model = copy.deepcopy(base).requires_grad_(True)
    config = sft_config(epochs=3, learning_rate=3e-3)
    fine_tune(
        model, demonstrated(TRAIN), HeldOut(demonstrated(HELD_OUT)), config, seed="0/sft", compute=CPU, recorder=Recorder()
    )
    return freeze(model)


def mean_and_error(rewards: torch.Tensor) -> tuple[float, float]:
    return float(rewards.mean()), float(rewards.std()) / math.sqrt(len(rewards))


def assert_higher(after: torch.Tensor, before: torch.Tensor) -> None:
    """The mean rose by more than 4 standard errors."""
    (high, one), (low, other) = mean_and_error(after), mean_and_error(before)
    assert high - low > 4 * math.hypot(one, other)


def test_sft_lowers_the_held_out_loss(base: LlamaForCausalLM, sft: LlamaForCausalLM) -> None:
    before, after = (held_out_loss(model, demonstrated(HELD_OUT), CPU) for model in (base, sft))
    assert after < 0.8 * before


def test_srppo_raises_the_mean_self_reward(base: LlamaForCausalLM, sft: LlamaForCausalLM) -> None:
    policy = copy.deepcopy(sft).requires_grad_(True)
    prompts = Prompts(POOL, [str(p) for p in POOL], END, torch.zeros(VOCAB, dtype=torch.long), ("all",))
    config = srppo_config(iterations=20, batch_size=64, minibatch_size=32, max_new_tokens=6, learning_rate=3e-3, kl_coef=0.1)
    SelfRewardingPPO(policy, {"sft": sft, "base": base}, prompts, config, seed="0/srppo", compute=CPU).train(Recorder())
    before, after = (sequence_rewards(sft, base, sampled(model, HELD_OUT, 32), CPU) for model in (sft, policy))
    assert_higher(after, before)


def chosen_and_rejected(sft: LlamaForCausalLM, base: LlamaForCausalLM, prompts: Sequence[list[int]]) -> tuple[Batch, Batch]:
    """Pairs from the rejection sampler, labelled by the self-reward; identical texts make no pair."""
    batch = sampled(sft, prompts, 16)
    rewards, rng = sequence_rewards(sft, base, batch, CPU).tolist(), random.Random(0)
    sides: tuple[list[int], list[int]] = ([], [])
    for start in range(0, len(rewards), 16):
        own = rewards[start : start + 16]
        for chosen, rejected in make_pairs(rejection_sample(own, 8, 2.0, rng).positions, own, "first_round", rng):
            if not torch.equal(batch.responses[start + chosen], batch.responses[start + rejected]):
                sides[0].append(start + chosen)
                sides[1].append(start + rejected)
    return batch.rows(sides[0]), batch.rows(sides[1])


def test_rso_raises_the_margin_and_the_self_reward(base: LlamaForCausalLM, sft: LlamaForCausalLM) -> None:
    policy = copy.deepcopy(sft).requires_grad_(True)
    config = rso_config(batch_size=16, epochs=6, learning_rate=2e-3)
    pairs, unseen = (with_reference(sft, *chosen_and_rejected(sft, base, p), CPU) for p in (POOL, HELD_OUT))
    everything = list(range(len(unseen.chosen.ids)))
    before = preference_step(policy, unseen, everything, config, CPU)
    policy.zero_grad()
    result = optimise_preferences(policy, pairs, config, seed="0/rso", compute=CPU, recorder=Recorder())
    after = preference_step(policy, unseen, everything, config, CPU)
    assert before["margin"] == pytest.approx(0, abs=1e-5)
    assert result["margin"] > 0.3
    assert after["margin"] > 0.2
    assert after["accuracy"] > 0.6
    assert_higher(*(sequence_rewards(sft, base, sampled(model, HELD_OUT, 32), CPU) for model in (policy, sft)))
