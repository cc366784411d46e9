"""The contrastive policy gradient: its loss against loops and theory, its training on groups of samples."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from apprentice.compute import CPU
from apprentice.copg import Groups, contrast_step, optimise_contrast, with_rewards
from apprentice.losses import contrastive_loss, preference_loss, sign_rewards
from apprentice.method_sections import CoPGConfig
from apprentice.policy import freeze, response_scores
from apprentice.recorder import Recorder
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import (
    END,
    LAYOUTS,
    SMALL,
    Interrupted,
    Keeping,
    Tabular,
    demonstrations,
    enumerated,
    gradient,
    hash_of,
    naive_logps,
    relative_error,
    tilt,
    tiny_llama,
    total_variation,
)

BETA, SIZE, REFERENCE = 0.6, 3, 3  # beta and k of the groups; seed of their reference
COUNT = 7  # groups

# --- the loss ---


def draw(rows: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random logps, reference_logps and rewards [rows, k] in float64."""
    generator = torch.Generator().manual_seed(seed)
    logps, reference, rewards = torch.randn(3, rows, k, generator=generator, dtype=torch.float64)
    return 2 * logps - 5, 2 * reference - 5, rewards


def slope(logps: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Gradient of the loss by logps."""
    logps = logps.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(contrastive_loss(logps, reference, rewards, beta)[0], logps)
    return found


def test_the_loss_by_hand() -> None:
    # h = (1, -1) - 2, R = (3, 2), beta 0.5: D = 1, d = 2, -(1 * 2 - 0.25 * 4) = -1; (1 - 0.5 * 2)^2 / 2 = 0; 1^2 / 2
    logps, reference, rewards = (torch.tensor([row]).double() for row in ([-2.0, -5.0], [-1.0, -2.0], [3.0, 2.0]))
    loss, metrics = contrastive_loss(logps, reference, rewards, 0.5)
    assert float(loss) == pytest.approx(-1, abs=1e-9)
    wanted = {"loss": -1, "residual_variance": 0, "reward_variance": 0.5, "logps": -3.5, "displacement": 2}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_metrics_are_a_regression_of_rewards_on_log_ratios(k: int) -> None:
    logps, reference, rewards = draw(4, k)
    _, metrics = contrastive_loss(logps, reference, rewards, BETA)
    pairs = [(b, i, j) for b in range(4) for i, j in itertools.combinations(range(k), 2)]
    h = (logps - reference).tolist()
    left = sum((float(rewards[b, i] - rewards[b, j]) - BETA * (h[b][i] - h[b][j])) ** 2 for b, i, j in pairs)
    whole = sum(float(rewards[b, i] - rewards[b, j]) ** 2 for b, i, j in pairs)
    assert float(metrics["residual_variance"]) == pytest.approx(left / len(pairs) / 2, abs=1e-9)
    assert float(metrics["reward_variance"]) == pytest.approx(whole / len(pairs) / 2, abs=1e-9)
    assert float(metrics["logps"]) == pytest.approx(sum(map(sum, logps.tolist())) / (4 * k), abs=1e-9)
    assert float(metrics["displacement"]) == pytest.approx(-sum(map(sum, h)) / (4 * k), abs=1e-9)
    _, start = contrastive_loss(reference, reference, rewards, BETA)
    assert float(start["residual_variance"]) == pytest.approx(float(start["reward_variance"]), abs=1e-9)
    _, end = contrastive_loss(reference + rewards / BETA + 7, reference, rewards, BETA)
    assert float(end["residual_variance"]) == pytest.approx(0, abs=1e-9)


def test_K1_the_detached_form_with_beta_has_the_same_gradient() -> None:
    logps, reference, rewards = draw(6, 2)
    free = logps.clone().requires_grad_(True)
    log_ratio = free - reference
    bracket = (rewards - BETA * log_ratio).detach()  # beta, where the loss has beta / 2
    paper = (bracket[:, 0] - bracket[:, 1]) * log_ratio[:, 0] + (bracket[:, 1] - bracket[:, 0]) * log_ratio[:, 1]
    (wanted,) = torch.autograd.grad(-paper.mean(), free)
    assert torch.allclose(slope(logps, reference, rewards, BETA), wanted, atol=1e-9)


@pytest.mark.parametrize("beta", [0.05, 0.6, 2.0])
def test_K2_rewards_of_a_quarter_give_the_gradient_of_ipo(beta: float) -> None:
    logps, reference, _ = draw(6, 2)
    free = logps.clone().requires_grad_(True)
    ipo, _ = preference_loss(free[:, 0], free[:, 1], reference[:, 0], reference[:, 1], "ipo", beta)
    (wanted,) = torch.autograd.grad(beta / 2 * ipo, free)
    quarters = torch.tensor([[0.25, -0.25]]).double().expand(6, 2)
    assert torch.allclose(slope(logps, reference, quarters, beta), wanted, atol=1e-9)
    assert wanted.abs().max() > 1e-3


def test_K2_signs_are_quarters_for_two_samples_and_0_for_a_tie() -> None:
    rewards = torch.tensor([[7.0, -3.0], [0.1, 0.2], [4.0, 4.0]])
    assert sign_rewards(rewards).tolist() == [[0.25, -0.25], [-0.25, 0.25], [0, 0]]


@pytest.mark.parametrize("k", [3, 5])
def test_K2_signs_of_more_samples_give_ipo_averaged_over_their_pairs(k: int) -> None:
    logps, reference, rewards = draw(4, k)
    free = logps.clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for b, (i, j) in itertools.product(range(4), itertools.permutations(range(k), 2)):
        if rewards[b, i] > rewards[b, j]:
            total = total + preference_loss(*(t[b, [n]] for t in (free, reference) for n in (i, j)), "ipo", BETA)[0]
    (wanted,) = torch.autograd.grad(BETA / 2 * total / (4 * math.comb(k, 2)), free)
    assert torch.allclose(slope(logps, reference, sign_rewards(rewards), BETA), wanted, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_K3_the_gradient_is_that_of_rloo(k: int) -> None:
    logps, reference, rewards = draw(4, k)
    regularised = (rewards - BETA * (logps - reference)).tolist()
    wanted = []
    for row in regularised:
        advantages = [r - sum(row[:i] + row[i + 1 :]) / (k - 1) for i, r in enumerate(row)]
        wanted.append([-2 / k * a / 4 for a in advantages])  # for k = 2 the advantage itself, over 4 rows
    assert torch.allclose(slope(logps, reference, rewards, BETA), torch.tensor(wanted).double(), atol=1e-9)


def test_K5_a_constant_in_the_rewards_and_the_order_of_the_samples_change_nothing() -> None:
    logps, reference, rewards = draw(5, 4)
    here = slope(logps, reference, rewards, BETA)
    offset = 10 * torch.randn(5, 1).double()
    assert torch.allclose(slope(logps, reference, rewards + offset, BETA), here, atol=1e-9)
    assert torch.allclose(slope(logps + offset, reference, rewards, BETA), here, atol=1e-9)
    order = [2, 0, 3, 1]
    assert torch.allclose(slope(*(t[:, order] for t in (logps, reference, rewards)), BETA), here[:, order], atol=1e-9)
    one, other = (contrastive_loss(*(t[:, o] for t in (logps, reference, rewards)), BETA)[0] for o in (order, [0, 1, 2, 3]))
    assert float(one) == pytest.approx(float(other), abs=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_K6_on_policy_the_expected_gradient_is_twice_the_policy_gradient(k: int) -> None:
    policy, reference = Tabular(1), Tabular(2).frozen().sum(1)
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logps = policy.logps().sum(1)
    groups = torch.cartesian_prod(*[torch.arange(40)] * k)  # every group there is
    shares = logps.detach()[groups].sum(1).exp()
    by_sample = slope(logps.detach()[groups], reference[groups], rewards[groups], BETA) * len(groups) * shares[:, None]
    expected = torch.zeros(40).double().index_add(0, groups.flatten(), by_sample.flatten())
    (found,) = torch.autograd.grad(logps, policy.logits, expected, retain_graph=True)
    value = (logps.exp() * (rewards - BETA * (logps - reference))).sum()
    (wanted,) = torch.autograd.grad(-2 * value, policy.logits)
    assert torch.allclose(found, wanted, atol=1e-9)
    assert wanted.abs().max() > 1e-2


def test_K7_without_beta_only_the_product_of_gaps_is_left() -> None:
    logps, reference, rewards = draw(6, 2)
    wanted = torch.stack([rewards[:, 1] - rewards[:, 0], rewards[:, 0] - rewards[:, 1]], 1) / 6
    assert torch.allclose(slope(logps, reference, rewards, 0.0), wanted, atol=1e-9)


def test_pairs_of_equal_reward_pull_their_log_ratios_together() -> None:
    reference, rewards = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    found = slope(torch.tensor([[0.5, -0.5]]).double(), reference, rewards, BETA)
    assert found.tolist()[0] == pytest.approx([BETA, -BETA])  # -(D - beta d) times (1, -1) with D = 0, d = 1
    _, metrics = contrastive_loss(reference, reference, rewards, BETA)
    assert float(metrics["reward_variance"]) == 0


def test_a_single_sample_and_wrong_shapes_raise() -> None:
    two = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"expected at least 2 samples of each prompt to contrast, got shape \(4, 1\)"):
        contrastive_loss(two[:, :1], two[:, :1], two[:, :1], 0.1)
    with pytest.raises(ValueError, match="reference_logps"):
        contrastive_loss(two, two[:3], two, 0.1)
    with pytest.raises(ValueError, match="rewards"):
        contrastive_loss(two, two, two[:, 0], 0.1)
    with pytest.raises(ValueError, match="logps"):
        contrastive_loss(two[0], two[0], two[0], 0.1)
    with pytest.raises(ValueError, match="rewards"):
        sign_rewards(two[0])


# --- training ---


def copg_config(**changes: Any) -> CoPGConfig:
    config = CoPGConfig(
        candidates="pairs",
        signs=False,
        group=SIZE,
        beta=BETA,
        epochs=3,
        batch_size=3,
        learning_rate=5e-3,
        warmup_share=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    return dataclasses.replace(config, **changes)


def samples(count: int = COUNT, size: int = SIZE) -> Batch:
    """`size` random responses to each of `count` prompts, of many lengths."""
    parts = [demonstrations(count, seed) for seed in range(size)]
    prompts, responses = [], []
    for row in range(count):
        prompt = parts[0].ids[row, : parts[0].prompt_lengths[row]].tolist()
        for part in parts:
            p, n = int(part.prompt_lengths[row]), part.lengths()[row]
            prompts.append(prompt)
            responses.append(part.ids[row, p:n].tolist())
    return collate(prompts, responses, END)


@pytest.fixture(scope="module")
def groups() -> Groups:
    rewards = 2 * torch.randn(COUNT, SIZE, generator=torch.Generator().manual_seed(0))
    return with_rewards(freeze(tiny_llama(REFERENCE)), samples(), rewards, CPU)


def slow_logps(model: LlamaForCausalLM, batch: Batch, row: int) -> float:
    ids, p, n = batch.ids[row].tolist(), int(batch.prompt_lengths[row]), batch.lengths()[row]
    return sum(naive_logps(model, ids[:p], ids[p:n]))


def run(groups: Groups, recorder: Recorder, seed: str = "0", first_weights: int = 0) -> tuple[LlamaForCausalLM, dict]:
    model = tiny_llama(first_weights)
    return model, optimise_contrast(model, groups, copg_config(), seed=seed, compute=CPU, recorder=recorder)


def test_a_step_matches_a_loop_over_pairs(groups: Groups) -> None:
    model, rows = tiny_llama(0), [1, 4, 6]
    found = contrast_step(model, groups, rows, BETA, CPU)
    losses, logps = [], []
    for group in rows:
        own, reference = (
            [slow_logps(m, groups.batch, SIZE * group + i) for i in range(SIZE)] for m in (model, tiny_llama(REFERENCE))
        )
        logps += own
        for i, j in itertools.combinations(range(SIZE), 2):
            d = own[i] - reference[i] - own[j] + reference[j]
            losses.append(BETA / 2 * d**2 - float(groups.rewards[group, i] - groups.rewards[group, j]) * d)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["logps"] == pytest.approx(sum(logps) / len(logps), rel=1e-4)


def test_samples_that_lost_ten_nats_are_told_of_once(groups: Groups) -> None:
    for rise, told in ((0.0, []), (20.0, ["step 1 of 9"])):
        start = contrast_step(tiny_llama(0), groups, list(range(COUNT)), BETA, CPU)["displacement"]
        recorder = Keeping()
        run(dataclasses.replace(groups, reference_logps=groups.reference_logps - start + rise), recorder)
        assert [text.partition(":")[0] for text in recorder.warnings] == told
        assert recorder.rows[0]["displacement"] == pytest.approx(rise, abs=9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_G4_the_gradient_does_not_depend_on_the_split_or_the_order(groups: Groups, layout: str) -> None:
    found = []
    for rows, compute in (
        (list(range(COUNT)), CPU),
        (list(range(COUNT))[::-1], dataclasses.replace(LAYOUTS[layout], forward_tokens=120)),
    ):
        model = tiny_llama(0).double()
        found.append((contrast_step(model, groups, rows, BETA, compute), gradient(model)))
    (metrics, grad), (others, other) = found
    assert relative_error(other, grad) < 1e-6
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_at_the_reference_no_reward_is_taken_up_yet(groups: Groups) -> None:
    metrics = contrast_step(tiny_llama(REFERENCE), groups, list(range(COUNT)), BETA, SMALL)
    assert metrics["loss"] == pytest.approx(0, abs=1e-4)
    assert metrics["reward_variance"] == pytest.approx(float(groups.rewards.double().var(1).mean()), rel=1e-5)
    assert metrics["residual_variance"] == pytest.approx(metrics["reward_variance"], rel=1e-4)


def test_training_on_every_response_reaches_the_tilt() -> None:
    # a group of all 40 responses: the whole support, each as often as any other
    batch, model = enumerated(), tiny_llama(REFERENCE)
    generator = torch.Generator().manual_seed(0)
    world = with_rewards(freeze(tiny_llama(REFERENCE)), batch, torch.randn(1, 40, generator=generator), CPU)
    config = copg_config(epochs=250, batch_size=1, learning_rate=1e-2)
    figures = optimise_contrast(model, world, config, seed="0", compute=CPU, recorder=Recorder())
    target = tilt(world.reference_logps[0], world.rewards[0], BETA)
    reached = response_scores(model, batch).logps.sum(1).detach().exp()
    assert total_variation(world.reference_logps[0].exp(), target) > 0.2
    assert total_variation(reached, target) < 0.02
    assert figures["residual_variance"] < 0.01 * figures["reward_variance"]


def test_signs_train_on_the_order_of_the_rewards_alone(groups: Groups) -> None:
    config = copg_config(signs=True, epochs=1)
    found = []
    for rewards in (groups.rewards, groups.rewards.exp(), sign_rewards(groups.rewards)):
        model = tiny_llama(0)
        changed = dataclasses.replace(groups, rewards=rewards)
        optimise_contrast(model, changed, config, seed="0", compute=CPU, recorder=Recorder())
        found.append(hash_of(model))
    plain = tiny_llama(0)
    changed = dataclasses.replace(groups, rewards=sign_rewards(groups.rewards))
    optimise_contrast(plain, changed, copg_config(epochs=1), seed="0", compute=CPU, recorder=Recorder())
    assert found == [hash_of(plain)] * 3


@pytest.mark.parametrize("stop", [1, 3, 5, 8])  # three steps an epoch
def test_an_interrupted_run_ends_in_the_same_weights(groups: Groups, stop: int) -> None:
    whole, broken = Keeping(), Keeping(keep_at=stop)
    wanted, result = run(groups, whole)
    with pytest.raises(Interrupted):
        run(groups, broken)
    resumed = Keeping(saved=broken.saved)
    model, again = run(groups, resumed, first_weights=99)
    assert hash_of(model) == hash_of(wanted)
    assert again == result
    assert resumed.rows == whole.rows


def test_the_result_is_the_mean_over_the_last_epoch(groups: Groups) -> None:
    recorder = Recorder()
    _, result = run(groups, recorder)
    assert [row["epoch"] for row in recorder.rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert set(result) == {"loss", "residual_variance", "reward_variance", "logps", "displacement"}
    for name, value in result.items():
        assert value == pytest.approx(sum(row[name] for row in recorder.rows[-3:]) / 3)


def test_G6_the_seed_decides_the_weights(groups: Groups) -> None:
    hashes = [hash_of(run(groups, Recorder(), seed)[0]) for seed in ("0", "0", "1")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_groups_score_their_own_samples_under_the_reference(groups: Groups) -> None:
    assert groups.reference_logps.shape == (COUNT, SIZE)
    for group, i in ((0, 0), (2, 1), (6, 2)):
        wanted = slow_logps(tiny_llama(REFERENCE), groups.batch, SIZE * group + i)
        assert float(groups.reference_logps[group, i]) == pytest.approx(wanted, abs=1e-4)
    assert not groups.reference_logps.requires_grad
    widths = groups.batch.lengths()
    assert groups.lengths() == [SIZE * max(widths[SIZE * g : SIZE * g + SIZE]) for g in range(COUNT)]


def test_groups_that_are_none_raise(groups: Groups) -> None:
    batch, logps = groups.batch, groups.reference_logps
    by_sample = [SIZE * g + i for i in range(SIZE) for g in range(COUNT)]
    with pytest.raises(ValueError, match="expected the samples prompt by prompt, got different prompts in group 0"):
        Groups(batch.rows(by_sample), logps, groups.rewards)
    longer = collate([[0], [0, 0]], [[0, END], [END]], END)  # the same ids, cut elsewhere
    with pytest.raises(ValueError, match="different prompts in group 0"):
        Groups(longer, torch.zeros(1, 2), torch.zeros(1, 2))
    for odd in (math.nan, -math.inf):
        rewards = groups.rewards.clone()
        rewards[4, 1] = odd
        with pytest.raises(ValueError, match=f"rewards: expected finite numbers, got {odd} for sample 1 of group 4"):
            Groups(batch, logps, rewards)
    with pytest.raises(ValueError, match=r"batch.ids: expected shape \(18"):
        Groups(batch, logps[1:], groups.rewards[1:])
    with pytest.raises(ValueError, match="reference_logps"):
        Groups(batch, logps.flatten(), groups.rewards)
    with pytest.raises(ValueError, match=r"batch.ids: expected shape \(18"):
        with_rewards(freeze(tiny_llama(REFERENCE)), batch, groups.rewards[1:], CPU)
