"""PPO: its optimum on worlds small enough to enumerate, its updates, resuming; with the self-reward and with any other."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from apprentice.advantages import gae
from apprentice.compute import CPU, Compute
from apprentice.finite import BadSignError, NumbersError
from apprentice.health import signs
from apprentice.losses import clipped_policy_loss
from apprentice.policy import freeze, response_scores, score, values_of, weights
from apprentice.ppo import LEARNT, PPO, Experience, Prompts, Rewarded, TerminalReward
from apprentice.recorder import Recorder
from apprentice.rewards import kl_penalty, place, self_reward, sequence_rewards, token_rewards
from apprentice.sampling import Rollout
from apprentice.srppo import SelfRewardingPPO
from tests.apprentice.toys import (
    END,
    LAYOUTS,
    ONE_ROW,
    PACKED,
    SMALL,
    Interrupted,
    Keeping,
    Stopping,
    Tabular,
    as_rollout,
    ended,
    enumerate_responses,
    enumerated,
    gradient,
    hash_of,
    markov,
    naive_logps,
    pool,
    relative_error,
    srppo_config,
    tilt,
    tiny_llama,
    total_variation,
)

SFT, BASE, OTHER = 1, 2, 3  # seeds of tiny models
ALL = torch.ones(40, dtype=torch.bool)


def trainer(
    policy: int = SFT, sft: int = SFT, base: int = BASE, compute: Compute = CPU, seed: int = 0, **changes: Any
) -> SelfRewardingPPO:
    scorers = {"sft": freeze(tiny_llama(sft)), "base": freeze(tiny_llama(base))}
    return SelfRewardingPPO(tiny_llama(policy), scorers, pool(), srppo_config(**changes), seed=f"{seed}/srppo", compute=compute)


def every_response(policy: int, done: Tensor = ALL) -> Rollout:
    """All responses to one prompt, as if sampled from a tiny model."""
    batch = enumerated()
    return as_rollout(batch, score(freeze(tiny_llama(policy)), batch), done)


def gradient_of_update(ppo: SelfRewardingPPO, experience: Experience) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Gradients on policy and critic of one update that is one step, not taken."""
    found: dict[str, Tensor] = {}

    def keep(name: str, model: nn.Module) -> float:
        found[name] = gradient(model)
        return float(found[name].norm())

    ppo.policy_optimiser.clip = lambda: keep("policy", ppo.policy)
    ppo.critic_optimiser.clip = lambda: keep("critic", ppo.critic)
    ppo.policy_optimiser.step = ppo.critic_optimiser.step = lambda: None
    metrics = ppo.update(experience, Recorder())
    return found["policy"], found["critic"], metrics


# --- the objective, exactly: every response weighted by its probability ---


def expected_loss(policy: Tabular, parts: Tensor, anchor: Tensor, beta: float, how: Any, done: Tensor = ALL) -> Tensor:
    """Expectation over all responses of the loss PPO samples, in float64."""
    logps = policy.logps()
    old, mask = logps.detach(), policy.mask
    rewards = place(parts, mask, done, how, "sum", -1.0) - beta * kl_penalty(old, anchor, mask)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    probabilities = old.sum(1, keepdim=True).exp()
    return clipped_policy_loss(logps, old, advantages * probabilities, mask, 0.2, count=1.0)[0]


def slope(*arguments: Any) -> Tensor:
    """Gradient of the expected loss on the policy's logits."""
    (found,) = torch.autograd.grad(expected_loss(*arguments), arguments[0].logits)
    return found


@pytest.mark.parametrize("how", ["eos", "dense"])
def test_S1_equal_models_give_exactly_no_policy_gradient(how: str) -> None:
    sft = Tabular(SFT)
    parts = token_rewards(sft.frozen(), sft.frozen(), sft.mask)
    assert (slope(sft, parts, sft.frozen(), 0.0, how) == 0).all()


@pytest.mark.parametrize("how", ["eos", "dense"])
def test_S4_with_kl_to_the_base_and_beta_1_the_sft_policy_stays(how: str) -> None:
    sft, base = Tabular(SFT), Tabular(BASE)
    parts = token_rewards(sft.frozen(), base.frozen(), sft.mask)
    assert slope(sft, parts, base.frozen(), 1.0, how).abs().max() < 1e-9
    assert slope(sft, parts, base.frozen(), 0.9, how).abs().max() > 1e-3


def test_S6_end_and_dense_payment_have_the_same_expected_gradient() -> None:
    policy, sft, base = Tabular(OTHER), Tabular(SFT), Tabular(BASE)
    parts = token_rewards(sft.frozen(), base.frozen(), sft.mask)
    eos, dense = (slope(policy, parts, sft.frozen(), 0.5, how) for how in ("eos", "dense"))
    assert torch.allclose(eos, dense, atol=1e-9)
    assert eos.abs().max() > 1e-3


def ascend(policy: Tabular, steps: int, *arguments: Any) -> Tensor:
    """Follow the exact gradient; returns the probabilities of all responses."""
    adam = torch.optim.Adam([policy.logits], lr=0.05)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        adam.zero_grad()
        expected_loss(policy, *arguments).backward()
        adam.step()
    return policy.frozen().sum(1).exp()


@pytest.mark.parametrize(("beta", "how"), [(1.0, "eos"), (0.5, "dense"), (3.0, "eos")])
def test_S5_with_kl_to_sft_the_optimum_is_the_tilt(beta: float, how: str) -> None:
    policy, sft, base = Tabular(SFT), Tabular(SFT), Tabular(BASE)
    parts = token_rewards(sft.frozen(), base.frozen(), sft.mask)
    # sft^(1 + 1/beta) base^(-1/beta), written out
    target = ((1 + 1 / beta) * sft.frozen().sum(1) - base.frozen().sum(1) / beta).softmax(0)
    assert total_variation(sft.frozen().sum(1).exp(), target) > 0.1
    assert total_variation(ascend(policy, 1000, parts, sft.frozen(), beta, how), target) < 1e-3


def test_S5_cut_off_responses_are_tilted_by_the_value_they_earn() -> None:
    policy, sft, base = Tabular(SFT), Tabular(SFT), Tabular(BASE)
    parts = token_rewards(sft.frozen(), base.frozen(), sft.mask)
    earned = torch.where(ended(), self_reward(parts, sft.mask), -1.0)
    target = tilt(sft.frozen().sum(1), earned, 1.0)
    assert total_variation(ascend(policy, 600, parts, sft.frozen(), 1.0, "eos", ended()), target) < 1e-3


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_P8_a_bandit_converges_to_the_tilt(beta: float) -> None:
    logits = torch.tensor([0.2, -0.4], dtype=torch.float64, requires_grad=True)
    anchor, mask = logits.detach().log_softmax(0)[:, None], torch.ones(2, 1).double()
    reward = torch.tensor([[0.0], [1.0]]).double()
    adam = torch.optim.Adam([logits], lr=0.1)
    for step in range(800):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 800)
        logps = logits.log_softmax(0)[:, None]
        old = logps.detach()
        advantages, _ = gae(reward - beta * kl_penalty(old, anchor, mask), torch.zeros(2, 1).double(), mask, 1.0, 1.0)
        adam.zero_grad()
        clipped_policy_loss(logps, old, advantages * old.exp(), mask, 0.2, count=1.0)[0].backward()
        adam.step()
    # two arms: the log-odds move by the difference of rewards over beta
    wanted = 1 / (1 + math.exp(0.6 - 1 / beta))
    assert float(logits.detach().softmax(0)[1]) == pytest.approx(wanted, abs=1e-4)


def test_P8_the_trainer_itself_brings_a_bandit_to_the_tilt() -> None:
    # prompt 0, arms 1 and 2, then the end; sft (0.6, 0.4), base (0.45, 0.55), beta 1: odds (0.6 / 0.4)^2 / (0.45 / 0.55)
    never = -30.0

    def arms(p: float) -> LlamaForCausalLM:
        end = [never, never, never, 0.0]
        return markov([[never, math.log(p), math.log(1 - p), never], end, end, end])

    prompts = Prompts([[0]], ["0"], END, torch.tensor([0, 0, 0, 1]), ("content", "eos"))
    config = srppo_config(
        kl_coef=1.0, iterations=80, batch_size=128, minibatch_size=128, learning_rate=4e-3, critic_learning_rate=1e-2, epochs=1
    )
    scorers = {"sft": freeze(arms(0.6)), "base": freeze(arms(0.45))}
    policy = arms(0.6)
    seen: list[float] = []

    class Probability(Recorder):
        def step(self, *arguments: Any) -> None:
            with torch.no_grad():
                seen.append(float(policy(torch.tensor([[0]])).logits[0, -1].softmax(-1)[1]))

    SelfRewardingPPO(policy, scorers, prompts, config, seed="0/srppo", compute=CPU).train(Probability())
    odds = (0.6 / 0.4) ** 2 / (0.45 / 0.55)
    assert sum(seen[40:]) / 40 == pytest.approx(odds / (1 + odds), abs=0.03)


# --- one iteration against loops written out ---


@cache
def slow_logps(seed: int, response: tuple[int, ...]) -> list[float]:
    return naive_logps(tiny_llama(seed), [0, 2], response)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("placement", "estimator"), [("eos", "k1"), ("dense", "k1"), ("eos", "k3")])
def test_evaluate_matches_a_loop_over_responses(placement: str, estimator: str, whiten: bool) -> None:
    ppo = trainer(OTHER, placement=placement, kl_estimator=estimator, whiten=whiten, gamma=0.9, baseline_weight=0.8)
    nn.init.normal_(ppo.critic.head.weight)
    rollout = every_response(OTHER, ended())
    raw_values = values_of(ppo.critic, rollout.batch).double().tolist()
    row, experience = ppo.evaluate(rollout)

    rewards, totals, raw, kls = [], [], [], []
    for ids, done in enumerate_responses():
        target, baseline, own = (slow_logps(seed, tuple(ids)) for seed in (SFT, BASE, OTHER))
        parts = [t - 0.8 * b for t, b in zip(target, baseline, strict=True)]
        k1 = [o - t for o, t in zip(own, target, strict=True)]
        penalty = k1 if estimator == "k1" else [math.exp(-k) - 1 + k for k in k1]
        paid = [0.0] * (len(ids) - 1) + [sum(parts) if done else -1.0]
        if placement == "dense" and done:
            paid = parts
        rewards.append([p - 0.5 * k for p, k in zip(paid, penalty, strict=True)])
        totals.append(sum(rewards[-1]))
        raw.append(sum(parts))
        kls.append(sum(k1))
    centre = sum(totals) / 40
    scale = math.sqrt(sum((t - centre) ** 2 for t in totals) / 40)
    advantages = []
    for given, values in zip(rewards, raw_values, strict=True):
        following, found = 0.0, []
        for t in reversed(range(len(given))):
            after = values[t + 1] * scale if t + 1 < len(given) else 0.0
            following = given[t] + 0.9 * after - values[t] * scale + 0.9 * 0.95 * following
            found.append(following)
        advantages.append(found[::-1])
    flat = [a for found in advantages for a in found]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    for i, found in enumerate(advantages):
        wanted = [(a - mean) / std if whiten else a / scale for a in found]
        assert experience.advantages[i, : len(wanted)].tolist() == pytest.approx(wanted, abs=1e-4)
        owed = [a / scale + v for a, v in zip(found, raw_values[i], strict=False)]
        assert experience.returns[i, : len(wanted)].tolist() == pytest.approx(owed, abs=1e-4)
        assert (experience.advantages[i, len(wanted) :] == 0).all()
    assert ppo.value_scale == pytest.approx(scale, rel=1e-5)
    assert row["reward"] == pytest.approx(sum(raw) / 40, abs=1e-5)
    assert row["kl_to_sft"] == row["kl_to_anchor"] == pytest.approx(sum(kls) / 40, abs=1e-5)
    assert row["reward_content"] + row["reward_eos"] == pytest.approx(row["reward"], abs=1e-5)
    assert row["eos_rate"] == pytest.approx(13 / 40)
    assert row["length"] == pytest.approx((1 + 3 * 2 + 9 * 3 + 27 * 3) / 40)


def test_S1_equal_models_train_nothing_and_say_so() -> None:
    ppo = trainer(sft=SFT, base=SFT, kl_coef=0.0, missing_eos_reward=0.0, iterations=2)
    before, recorder = hash_of(ppo.policy), Keeping()
    ppo.train(recorder)
    assert hash_of(ppo.policy) == before
    for row in recorder.rows:
        assert (row["reward"], row["reward_std"], row["grad_norm"]) == (0, 0, 0)
        assert all(math.isfinite(value) for value in row.values() if value is not None)
    (said,) = [text for text in recorder.warnings if "reward_std_floor" in text]  # once, not at every iteration
    assert said.startswith("iteration 1 of 2: reward std 0 is below reward_std_floor 0.001")


def test_a_reward_that_is_not_finite_stops_before_anything_is_trained_on_it() -> None:
    ppo = trainer(iterations=3)
    fine, before = ppo.reward, hash_of(ppo.policy)

    def broken(rollout: Rollout, logps: Mapping[str, torch.Tensor]) -> Rewarded:
        found = fine(rollout, logps)
        return replace(found, totals=found.totals * math.inf) if ppo.iteration == 1 else found

    ppo.reward, recorder = broken, Keeping()
    with pytest.raises(NumbersError, match=r"iteration 2 of 3: reward (inf|-inf|nan), reward_std nan"):
        ppo.train(recorder)
    assert [row["step"] for row in recorder.rows] == [1] and hash_of(ppo.policy) != before


def test_where_no_response_ends_a_warning_says_what_to_turn() -> None:
    ppo, recorder = trainer(iterations=2, max_new_tokens=1, missing_eos_reward=-2.0), Keeping()
    rollout = ppo.sample()
    ppo.sample = lambda: replace(rollout, ended=torch.zeros_like(rollout.ended))
    ppo.train(recorder)
    (said,) = [text for text in recorder.warnings if "no response ended" in text]
    assert (
        "iteration 1 of 2: no response ended within 1 tokens" in said and "missing_eos_reward -2; raise max_new_tokens" in said
    )


def test_S1_a_reward_that_is_all_rounding_is_not_blown_up_by_whitening() -> None:
    ppo = trainer(kl_coef=0.0)
    with torch.no_grad():
        for name, parameter in ppo.scorers["base"].named_parameters():
            parameter.copy_(ppo.scorers["sft"].get_parameter(name) * (1 + 1e-6))
    row, experience = ppo.evaluate(every_response(SFT))
    assert 0 < row["reward_std"] < 1e-4
    assert experience.advantages.abs().max() < 0.1


def test_S2_swapping_target_and_baseline_negates_the_reward() -> None:
    rollout = every_response(OTHER)
    there, _ = trainer(OTHER).evaluate(rollout)
    back, _ = trainer(OTHER, reward_target="base", reward_baseline="sft").evaluate(rollout)
    for name in ("reward", "reward_content", "reward_eos", "reward_length_slope"):
        assert there[name] == pytest.approx(-back[name], abs=1e-6)
    assert abs(there["reward"]) > 0.1


def test_S3_the_first_mean_reward_estimates_the_kl_of_sft_to_base() -> None:
    batch = enumerated()
    sft, base = (score(tiny_llama(seed), batch).double() for seed in (SFT, BASE))
    kl = float((sft.sum(1).exp() * (sft - base).sum(1)).sum())
    ppo = trainer(batch_size=600)
    ppo.prompts = Prompts([[0, 2]], ["0-2"], END, ppo.prompts.classes, ppo.prompts.class_names)
    row, _ = ppo.evaluate(ppo.sample())
    assert abs(row["reward"] - kl) < 4 * row["reward_std"] / math.sqrt(600)  # 4 sigma
    assert row["kl_to_sft"] == pytest.approx(0, abs=1e-4)
    assert row["kl_to_base"] == pytest.approx(row["reward"], abs=1e-4)


def expected_gradient(ppo: SelfRewardingPPO, rollout: Rollout) -> Tensor:
    """Policy gradient over all responses, weighted by probability, in the reward's own units."""
    _, experience = ppo.evaluate(rollout)
    assert ppo.value_scale is not None
    weighted = experience.advantages * ppo.value_scale * rollout.logps.sum(1, keepdim=True).exp()
    logps = response_scores(ppo.policy, rollout.batch).logps
    ppo.policy.zero_grad()
    clipped_policy_loss(logps, rollout.logps, weighted, experience.mask, 0.2, count=1.0)[0].backward()
    return gradient(ppo.policy)


def test_S4_the_trainers_own_advantages_leave_the_sft_policy_in_place() -> None:
    options = {"kl_anchor": "base", "whiten": False, "gae_lambda": 1.0}
    still, moved = (expected_gradient(trainer(SFT, kl_coef=c, **options), every_response(SFT)) for c in (1.0, 0.5))
    assert still.norm() < 1e-4 * moved.norm()


def test_S8_cut_off_responses_return_the_configured_value() -> None:
    for seed in (BASE, OTHER):
        ppo = trainer(base=seed, kl_coef=0.0, gae_lambda=1.0, missing_eos_reward=-1.25)
        _, experience = ppo.evaluate(every_response(SFT, ended()))
        returns = experience.returns[~ended()] * ppo.value_scale
        assert torch.allclose(returns, torch.full_like(returns, -1.25), atol=1e-5)


@pytest.mark.parametrize("critic_init", ["sft", "base"])
def test_S9_training_leaves_the_frozen_models_alone(critic_init: str) -> None:
    ppo = trainer(critic_init=critic_init, iterations=2)
    before = {name: hash_of(model) for name, model in ppo.scorers.items()}
    policy, critic = hash_of(ppo.policy), hash_of(ppo.critic)
    ppo.train(Recorder())
    assert {name: hash_of(model) for name, model in ppo.scorers.items()} == before
    assert all(p.grad is None and not p.requires_grad for model in ppo.scorers.values() for p in model.parameters())
    assert hash_of(ppo.policy) != policy
    assert hash_of(ppo.critic) != critic


def test_a_shared_critic_is_a_head_on_the_policys_trunk() -> None:
    ppo = trainer(critic="shared", critic_init="none such", iterations=2, kl_coef=0.05)
    assert ppo.critic.trunk is ppo.policy.base_model
    assert [len(o.parameters) for o in (ppo.policy_optimiser, ppo.critic_optimiser)] == [len(weights(ppo.policy)), 2]
    policy, head = hash_of(ppo.policy), hash_of(ppo.critic.head)
    ppo.train(Recorder())
    assert hash_of(ppo.policy) != policy and hash_of(ppo.critic.head) != head
    assert ppo.state()["critic"].keys() == {"weight", "bias"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_trunk_takes_the_gradient_of_both_losses(layout: str) -> None:
    """Against two passes of their own through one model, the losses added by hand."""
    changes = {"batch_size": 16, "minibatch_size": 16, "value_coef": 0.3}
    ppo = trainer(OTHER, compute=LAYOUTS[layout], critic="shared", **changes)
    torch.nn.init.normal_(ppo.critic.head.weight, generator=torch.Generator().manual_seed(0))
    _, experience = ppo.evaluate(ppo.sample())
    batch, mask = experience.batch, experience.mask
    logps = response_scores(ppo.policy, batch).logps
    loss, _ = clipped_policy_loss(logps, experience.old_logps, experience.advantages, mask, ppo.config.clip_range)
    hidden = ppo.policy.base_model(input_ids=batch.ids).last_hidden_state
    values = ppo.critic.head(hidden).squeeze(-1).gather(1, batch.response_positions() - 1)
    of_values = 0.5 * ((values - experience.returns) ** 2 * mask).sum() / mask.sum()
    (loss + 0.3 * of_values).backward()
    wanted, wanted_head = gradient(ppo.policy), gradient(ppo.critic.head)
    ppo.critic.zero_grad()
    ppo.policy.zero_grad()
    found, of_critic, figures = gradient_of_update(ppo, experience)
    assert figures["value_loss"] == pytest.approx(of_values.item(), rel=1e-4)
    assert relative_error(found, wanted) < 1e-4 and relative_error(of_critic[-len(wanted_head) :], wanted_head) < 1e-4
    assert wanted_head.norm() > 0


def test_S10_the_sampling_temperature_moves_the_ratio_and_the_kl_but_not_the_reward() -> None:
    rows = [trainer(OTHER, temperature=t).evaluate(every_response(OTHER))[0] for t in (1.0, 0.6)]
    for name in ("reward", "reward_std", "reward_content"):
        assert rows[0][name] == rows[1][name]
    assert rows[0]["kl_to_anchor"] != rows[1]["kl_to_anchor"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_any_temperature_the_sft_policy_starts_at_kl_0(temperature: float) -> None:
    ppo = trainer(temperature=temperature, batch_size=32)
    row, _ = ppo.evaluate(ppo.sample())
    assert row["kl_to_anchor"] == pytest.approx(0, abs=1e-4)


def test_each_role_is_an_entry_of_its_own() -> None:
    row, _ = trainer(OTHER, kl_anchor="base").evaluate(every_response(OTHER))
    assert row["kl_to_anchor"] == row["kl_to_base"] != row["kl_to_sft"]
    assert hash_of(trainer(critic_init="base").critic.trunk) == hash_of(tiny_llama(BASE).model)
    assert hash_of(trainer(critic_init="sft").critic.trunk) == hash_of(tiny_llama(SFT).model)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_P3_the_first_step_is_the_plain_policy_gradient(temperature: float) -> None:
    ppo = trainer(OTHER, batch_size=32, minibatch_size=32, temperature=temperature)
    _, experience = ppo.evaluate(ppo.sample())
    found, _, metrics = gradient_of_update(ppo, experience)
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-7)
    ppo.policy.zero_grad()
    logps = response_scores(ppo.policy, experience.batch, temperature=temperature).logps
    (-(experience.advantages * logps).sum() / experience.mask.sum()).backward()
    assert relative_error(found, gradient(ppo.policy)) < 1e-4


def test_P3_in_bfloat16_recomputed_logps_keep_the_first_ratio_at_exactly_1() -> None:
    """Whatever a machine rounds while it samples: here the recorded ones are off by more than any does."""
    compute = Compute(CPU.device, torch.bfloat16, forward_tokens=60)
    found = []
    for how in ("auto", "recorded"):
        models = [tiny_llama(seed, hidden_size=64) for seed in (SFT, SFT, BASE)]
        config = srppo_config(batch_size=32, minibatch_size=16, max_new_tokens=12, old_logps=how)
        scorers = {"sft": freeze(models[1]), "base": freeze(models[2])}
        ppo = SelfRewardingPPO(models[0], scorers, pool(), config, seed="0/srppo", compute=compute)
        rollout = ppo.sample()
        _, experience = ppo.evaluate(replace(rollout, logps=rollout.logps - 0.1 * rollout.batch.mask))
        ppo.policy_optimiser.step = ppo.policy_optimiser.drop  # stay, for both minibatches
        found.append(ppo.update(experience, Recorder())["approx_kl"])
    assert found[0] == 0
    assert found[1] == pytest.approx(math.exp(0.1) - 1 - 0.1, rel=0.1)


def test_what_another_program_sampled_is_weighed_by_policy_over_sampler() -> None:
    """A sampler whose log-probabilities are off by t/10 at token t, and by a lot at one: the weights by their definition."""
    rollout = trainer(OTHER, batch_size=32).sample()
    mask, off = rollout.batch.mask, 0.1 * torch.arange(rollout.logps.size(1)).repeat(32, 1)
    off[3, 0] = -5.0
    (_, plain), (figures, found) = (
        trainer(OTHER, batch_size=32).evaluate(each)
        for each in (rollout, replace(rollout, sampler_logps=(rollout.logps + off) * mask))
    )
    expected = torch.tensor([[min(math.exp(-x), 2.0) for x in row] for row in off.tolist()])
    assert torch.allclose(found.advantages, plain.advantages * expected, atol=1e-6)
    assert torch.equal(found.returns, plain.returns) and torch.equal(found.old_logps, plain.old_logps)
    assert figures["sampler_kl"] == pytest.approx(float(off[mask.bool()].sum()) / 32, abs=1e-5)
    assert figures["sampler_gap"] == pytest.approx(5.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_and_recomputed_logps_agree_in_float32(temperature: float) -> None:
    rollout = trainer(OTHER, batch_size=32, temperature=temperature).sample()
    one, other = (
        trainer(OTHER, batch_size=32, temperature=temperature, old_logps=how).evaluate(rollout)[1].old_logps
        for how in ("recorded", "recomputed")
    )
    assert torch.equal(one, rollout.logps)
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.equal(one, other)


def test_G4_gradients_do_not_depend_on_micro_batches_or_row_order() -> None:
    _, experience = trainer(OTHER).evaluate(every_response(OTHER, ended()))
    found = []
    for compute, seed in ((CPU, 0), (SMALL, 0), (Compute(CPU.device, CPU.dtype, 30), 1), (PACKED, 0), (ONE_ROW, 1)):
        ppo = trainer(BASE, compute=compute, seed=seed, minibatch_size=40)  # another policy: ratios far from 1
        ppo.policy.double()
        nn.init.constant_(ppo.critic.double().head.weight, 0.1)
        ppo.critic.head.float()
        found.append(gradient_of_update(ppo, experience))
    policy, critic, metrics = found[0]
    assert metrics["clip_fraction"] > 0.2
    for other_policy, other_critic, other_metrics in found[1:]:
        assert relative_error(other_policy, policy) < 1e-6
        assert relative_error(other_critic, critic) < 1e-6
        assert other_metrics == pytest.approx(metrics, rel=1e-5)


def test_every_epoch_takes_each_response_once_in_a_fresh_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = trainer(epochs=3, batch_size=8, minibatch_size=3)
    _, experience = ppo.evaluate(ppo.sample())
    taken: list[list[int]] = []
    monkeypatch.setattr(ppo, "_gather", lambda _, rows: taken.append(rows) or dict.fromkeys(LEARNT, 0.0))
    ppo.update(experience, Recorder())
    assert [len(rows) for rows in taken] == [3, 3, 2] * 3
    epochs = [[row for rows in taken[i : i + 3] for row in rows] for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(8)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_prompts_are_drawn_without_repeating_while_the_pool_lasts() -> None:
    def prompts(ppo: SelfRewardingPPO) -> list[tuple[int, ...]]:
        batch = ppo.sample().batch
        return [tuple(ids[:n]) for ids, n in zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]

    ppo = trainer(batch_size=8)
    assert len(set(prompts(ppo))) == 8
    first = prompts(ppo)
    ppo.iteration = 1
    assert prompts(ppo) != first
    assert len(prompts(trainer(batch_size=30))) == 30  # the pool has nine


def test_the_same_prompt_drawn_again_gets_a_sample_of_its_own() -> None:
    ppo = trainer(batch_size=50)
    ppo.prompts = Prompts([[0, 2]], ["0-2"], END, ppo.prompts.classes, ppo.prompts.class_names)
    assert len({tuple(ids) for ids in ppo.sample().response_ids()}) > 5


def test_the_scale_of_the_values_is_set_once() -> None:
    ppo = trainer(OTHER)
    ppo.evaluate(every_response(OTHER))
    first = ppo.value_scale
    ppo.evaluate(every_response(OTHER, ended()))
    assert ppo.value_scale == first


def test_training_stops_at_the_kl_limit_before_it_learns_more() -> None:
    ppo = trainer(OTHER, kl_stop=1e-6, batch_size=32)
    before = hash_of(ppo.policy)
    row, _ = ppo.evaluate(ppo.sample())
    assert row["kl_to_anchor"] > 0.1
    assert ppo.train(Recorder()) == {"iterations": 0, "stopped_by": "kl_stop", "kl_to_anchor": row["kl_to_anchor"]}
    assert hash_of(ppo.policy) == before


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_run_ends_in_the_same_weights(stop: int, critic: str) -> None:
    whole, broken = Keeping(), Keeping(keep_at=stop)
    undisturbed = trainer(epochs=2, critic=critic)
    result = undisturbed.train(whole)
    with pytest.raises(Interrupted):
        trainer(epochs=2, critic=critic).train(broken)
    resumed, ppo = Keeping(saved=broken.saved), trainer(policy=99, epochs=2, critic=critic)
    assert ppo.train(resumed) == result
    assert hash_of(ppo.policy) == hash_of(undisturbed.policy)
    assert hash_of(ppo.critic) == hash_of(undisturbed.critic)
    assert resumed.rows == whole.rows


def test_G6_the_seed_decides_the_weights() -> None:
    hashes = []
    for seed in (0, 0, 1):
        ppo = trainer(seed=seed, iterations=2)
        ppo.train(Recorder())
        hashes.append(hash_of(ppo.policy))
    assert hashes[0] == hashes[1] != hashes[2]


# --- another reward ---


def rewarded_by(reward: Any, policy: int = SFT, **changes: Any) -> PPO:
    """The trainer with a reward of its own."""
    scorers = {"sft": freeze(tiny_llama(SFT)), "base": freeze(tiny_llama(BASE))}
    return PPO(tiny_llama(policy), scorers, pool(), reward, srppo_config(**changes), seed="0/srppo", compute=CPU)


def test_a_terminal_reward_pays_on_the_last_token_and_by_the_rule_for_missing_ends() -> None:
    rollout, given = every_response(SFT, ended()), list[Rollout]()
    totals = torch.arange(40.0) - 7

    def rate(asked: Rollout) -> tuple[Tensor, dict[str, float]]:
        given.append(asked)
        return totals, {"win_rate": 0.25}

    found = TerminalReward(rate, -1.5)(rollout, {})
    assert given == [rollout]
    assert torch.equal(found.totals, totals)  # before any rule
    assert found.figures == {"win_rate": 0.25}
    for row, (ids, done) in enumerate(enumerate_responses()):
        wanted = [0.0] * 3
        wanted[len(ids) - 1] = row - 7.0 if done else -1.5
        assert found.placed[row].tolist() == wanted


def test_a_terminal_reward_that_is_the_self_reward_trains_the_same_policy() -> None:
    ours = trainer(epochs=2)
    ours.train(Recorder())
    scorers = ours.scorers

    def rate(rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        return sequence_rewards(scorers["sft"], scorers["base"], rollout.batch, CPU), {}

    other, recorder = rewarded_by(TerminalReward(rate, -1.0), epochs=2), Recorder()
    other.train(recorder)
    assert hash_of(other.policy) == hash_of(ours.policy)
    assert hash_of(other.critic) == hash_of(ours.critic)
    assert not {"reward_content", "reward_eos"} & recorder.rows[0].keys()
    blind = rewarded_by(TerminalReward(lambda rollout: (torch.zeros(len(rollout.keys)), {}), 0.0), epochs=2)
    blind.train(Recorder())
    assert hash_of(blind.policy) != hash_of(ours.policy)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_reward_sees_every_scorer_at_temperature_1_and_decides_where_it_is_paid(temperature: float) -> None:
    rollout, seen = every_response(OTHER, ended()), dict[str, Tensor]()
    batch = rollout.batch

    def reward(asked: Rollout, logps: Any) -> Rewarded:
        seen.update(logps)
        return Rewarded(0.5 * asked.batch.mask, torch.arange(40.0), {"own": 7.0})

    ppo = rewarded_by(reward, OTHER, temperature=temperature, kl_coef=0.0, gae_lambda=1.0, whiten=False)
    row, experience = ppo.evaluate(rollout)
    assert seen.keys() == {"sft", "base"}
    for name, seed in (("sft", SFT), ("base", BASE)):
        assert torch.allclose(seen[name], score(freeze(tiny_llama(seed)), batch), atol=1e-5)
    assert (row["reward"], row["own"]) == (19.5, 7.0)
    returns = experience.returns * ppo.value_scale  # what is still to come, one half a token
    for i, (ids, _) in enumerate(enumerate_responses()):
        assert returns[i, : len(ids)].tolist() == pytest.approx([0.5 * (len(ids) - t) for t in range(len(ids))], abs=1e-5)


# --- numbers that go wrong


def spoilt(iterations: tuple[int, ...], **changes: Any) -> SelfRewardingPPO:
    """A trainer whose reward in these iterations, from 1, pays NaN or infinity on some token."""
    ppo = trainer(epochs=2, **changes)
    fine = ppo.reward

    def reward(rollout: Rollout, logps: Mapping[str, Tensor]) -> Rewarded:
        found = fine(rollout, logps)
        if ppo.iteration + 1 in iterations:
            found.placed[1, 0] = math.inf if ppo.iteration % 2 else math.nan
        return found

    ppo.reward = reward
    return ppo


def iterations_of(ppo: SelfRewardingPPO, numbers: tuple[int, ...]) -> SelfRewardingPPO:
    """The trainer after these iterations, from 1, and no others."""
    for number in numbers:
        ppo.iteration = number - 1
        ppo.update(ppo.evaluate(ppo.sample())[1], Recorder())
    return ppo


@pytest.mark.parametrize(("broken", "left"), [((1,), (2, 3, 4)), ((2, 3), (1, 4)), ((4,), (1, 2, 3))])
def test_an_iteration_with_a_reward_that_is_not_finite_is_as_if_it_had_not_been_there(
    broken: tuple[int, ...], left: tuple[int, ...]
) -> None:
    ppo, recorder = spoilt(broken, batch_size=32), Keeping(skip_steps=2)
    result, wanted = ppo.train(recorder), iterations_of(trainer(epochs=2, batch_size=32), left)
    assert hash_of(ppo.policy) == hash_of(wanted.policy) and hash_of(ppo.critic) == hash_of(wanted.critic)
    assert ppo.value_scale == wanted.value_scale > 0.1  # of the first batch that was learnt from
    assert (result["iterations"], result["stopped_by"]) == (4, "iterations") and math.isfinite(result["kl_to_anchor"])
    assert recorder.skipped == len(broken)
    skipped = [text for text in recorder.warnings if "skipped" in text]
    assert [text.split(":")[0] for text in skipped] == [f"iteration {n} of 4" for n in broken]
    columns = list(recorder.rows[left[0] - 1])
    for number, row in enumerate(recorder.rows, 1):
        assert list(row) == columns
        assert [value is None for value in row.values()] == [False] + [number in broken] * (len(columns) - 1)
    with pytest.raises(NumbersError, match=rf"iteration {broken[0]} of 4: reward .*explained_variance nan"):
        spoilt(broken, batch_size=32).train(Recorder())


def break_gradient(ppo: SelfRewardingPPO, model: str, calls: tuple[int, ...]) -> None:
    """Make a gradient of `policy` or `critic` infinite in these of its minibatches, from 1."""
    optimiser, count = getattr(ppo, f"{model}_optimiser"), iter(range(1, 99))
    clip = optimiser.clip

    def broken() -> float:
        if next(count) in calls:
            optimiser.parameters[0].grad[0] = math.inf
        found: float = clip()
        return found

    optimiser.clip = broken


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_a_minibatch_with_a_gradient_that_is_not_finite_moves_neither_policy_nor_critic(model: str) -> None:
    ppo, recorder = trainer(iterations=1, epochs=2), Keeping(skip_steps=1)
    break_gradient(ppo, model, (2,))
    ppo.train(recorder)
    wanted = trainer(iterations=1, epochs=2)
    _, experience = wanted.evaluate(wanted.sample())
    for epoch in (0, 1):
        for number, rows in enumerate(wanted._minibatches(8, epoch)):
            if (epoch, number) != (0, 1):
                wanted._gather(experience, rows)
                for optimiser in (wanted.policy_optimiser, wanted.critic_optimiser):
                    optimiser.clip()
                    optimiser.step()
    assert hash_of(ppo.policy) == hash_of(wanted.policy) and hash_of(ppo.critic) == hash_of(wanted.critic)
    assert (recorder.skipped, recorder.taken) == (1, 3)
    assert recorder.warnings[0].startswith("iteration 1 of 1, epoch 1, minibatch 2: policy_loss")
    assert all(value is not None and math.isfinite(value) for value in recorder.rows[0].values())
    again = trainer(iterations=1, epochs=2)
    break_gradient(again, model, (2,))
    name = "grad_norm" if model == "policy" else "critic_grad_norm"
    with pytest.raises(NumbersError, match=rf"epoch 1, minibatch 2: .*{name} (inf|nan)"):
        again.train(Recorder())


def test_minibatches_skipped_one_after_another_count_over_iterations() -> None:
    ppo, recorder = trainer(iterations=4), Keeping(skip_steps=3)
    break_gradient(ppo, "critic", (3, 4, 5, 6))  # both of the second and of the third iteration
    with pytest.raises(NumbersError, match=r"iteration 3 of 4, epoch 1, minibatch 2: .*after 3 skipped in a row"):
        ppo.train(recorder)
    assert [row["grad_norm"] is None for row in recorder.rows] == [False, True]
    assert recorder.rows[1]["reward"] is not None


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_with_skipped_iterations_ends_in_the_same_weights(stop: int) -> None:
    whole, broken = Keeping(skip_steps=1), Keeping(keep_at=stop, skip_steps=1)
    undisturbed = spoilt((1, 3))
    result = undisturbed.train(whole)
    with pytest.raises(Interrupted):
        spoilt((1, 3)).train(broken)
    resumed, ppo = Keeping(saved=broken.saved, skip_steps=1), spoilt((1, 3), policy=99)
    assert ppo.train(resumed) == result
    assert hash_of(ppo.policy) == hash_of(undisturbed.policy) and hash_of(ppo.critic) == hash_of(undisturbed.critic)
    assert (resumed.rows, resumed.skipped) == (whole.rows, 2)
    assert [text for text in resumed.warnings if "skipped" in text] == whole.warnings[-1:] * (stop < 3)


def test_a_policy_that_runs_away_from_the_anchor_is_told_of_once() -> None:
    sure = [[9.0, 0.0, 0.0, 0.0] for _ in range(4)]  # always 0; the anchor never, three tokens of 9 nats
    ppo, recorder = trainer(iterations=3, kl_coef=0.0), Keeping()
    ppo.policy = markov(sure)
    ppo.scorers = {name: freeze(markov([[0.0, 9.0, 9.0, 9.0]] * 4)) for name in ("sft", "base")}
    ppo.train(recorder)
    (said,) = [text for text in recorder.warnings if "kl_stop" in text]
    assert said.startswith("iteration 1 of 3: ") and "nats per response from the KL anchor 'sft', and kl_stop is None" in said
    assert all(row["kl_to_anchor"] > 10 for row in recorder.rows)


def test_who_stops_at_a_bad_sign_has_trained_nothing_on_it() -> None:
    ppo, recorder = trainer(iterations=3), Stopping()
    ppo.scorers = {name: freeze(markov([[0.0] * 4] * 4)) for name in ("sft", "base")}  # one tells nothing from the other
    policy, critic = hash_of(ppo.policy), hash_of(ppo.critic)
    with pytest.raises(BadSignError, match=r"iteration 1 of 3: reward std 0 is below"):
        ppo.train(recorder)
    assert recorder.rows == [] and (hash_of(ppo.policy), hash_of(ppo.critic)) == (policy, critic)


def test_responses_that_run_away_in_length_are_told_of_once() -> None:
    def longer(rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        return rollout.batch.response_lengths.float(), {}

    changes = {"kl_coef": 0.0, "iterations": 12, "batch_size": 64, "minibatch_size": 64, "learning_rate": 2e-2}
    scorers = {name: freeze(markov([[0.0] * 4] * 4)) for name in ("sft", "base")}  # the end token with chance 1/4
    config = srppo_config(max_new_tokens=6, **changes)
    ppo = PPO(markov([[0.0] * 4] * 4), scorers, pool(), TerminalReward(longer, 9.0), config, seed="0", compute=CPU)
    recorder = Keeping()
    ppo.train(recorder)
    rates = [row["eos_rate"] for row in recorder.rows]
    assert rates[0] > 0.5 > 0.25 > rates[-1]  # what is trained for
    first = next(i for i, rate in enumerate(rates) if rate < 0.5) + 1
    (said,) = [text for text in recorder.warnings if "run away in length" in text]
    assert said.startswith(f"iteration {first} of 12: ") and "of responses end within 6 tokens" in said
    assert not signs(recorder.rows[-1], [], ppo.config)  # a model that was so from the start runs nowhere


def test_a_reward_that_goes_flat_is_told_of_once_after_resuming_too() -> None:
    def flat_from(iteration: int) -> PPO:
        def rate(rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
            given = torch.arange(float(len(rollout.keys)))
            return (given if ppo.iteration + 1 < iteration else 0 * given), {}

        ppo = rewarded_by(TerminalReward(rate, 0.0))
        return ppo

    whole, broken = Keeping(), Keeping(keep_at=3)
    flat_from(2).train(whole)
    (said,) = [text for text in whole.warnings if "reward_std_floor" in text]
    assert said.startswith("iteration 2 of 4: reward std 0")
    with pytest.raises(Interrupted):
        flat_from(2).train(broken)
    resumed = Keeping(saved=broken.saved)
    flat_from(2).train(resumed)
    assert not [text for text in resumed.warnings if "reward_std_floor" in text]
    assert resumed.rows == whole.rows
