"""Losses against numbers worked by hand, and their properties."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from apprentice.losses import (
    PreferenceLoss,
    clipped_policy_loss,
    contrastive_loss,
    next_token_loss,
    preference_loss,
    value_loss,
    weighted_next_token_loss,
)
from tests.apprentice.toys import Tabular, tilt, total_variation

KINDS: tuple[PreferenceLoss, ...] = ("sigmoid_norm", "hinge_norm", "hinge", "ipo")
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]).double()
WEIGHTS = torch.tensor([0.2, 0.7], dtype=torch.float64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_next_token_loss_is_token_weighted() -> None:
    # 1 + 2 + 3 + 6 over 4 tokens, and not the mean of the rows' means (2 + 6) / 2
    loss, metrics = next_token_loss(-torch.tensor([[1.0, 2, 3], [6, 99, 99]]), MASK)
    assert float(loss) == 3.0
    assert float(metrics["loss"]) == 3.0


def test_weights_that_leave_nothing_to_learn_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a positive sum over response tokens, got 0"):
        weighted_next_token_loss(torch.zeros(2, 3).double(), MASK, torch.zeros(2).double())


def test_weighted_next_token_loss_is_divided_by_the_weights() -> None:
    logps = -torch.tensor([[1.0, 2, 3], [6, 99, 99]]).double()
    loss, metrics = weighted_next_token_loss(logps, MASK, WEIGHTS)
    assert float(loss) == float(metrics["loss"]) == pytest.approx((0.2 * (1 + 2 + 3) + 0.7 * 6) / (3 * 0.2 + 0.7), abs=1e-9)
    by_token = torch.tensor([[0.0, 0.5, 0.1], [0.4, 9.0, 9.0]], dtype=torch.float64)
    assert float(weighted_next_token_loss(logps, MASK, by_token)[0]) == pytest.approx((1 + 0.3 + 2.4) / 1.0, abs=1e-9)


def test_clipped_policy_loss_by_hand() -> None:
    ratios, advantages = [[1.5, 0.5, 1.1], [0.7, 9.0, 9.0]], [[1.0, -2.0, 3.0], [4.0, 99.0, 99.0]]
    # eps 0.2, max(-A r, -A clip(r)): max(-1.5, -1.2) = -1.2; max(1, 1.6) = 1.6; -3.3; max(-2.8, -3.2) = -2.8
    loss, metrics = clipped_policy_loss(
        torch.tensor(ratios, dtype=torch.float64).log(), torch.zeros(2, 3), torch.tensor(advantages), MASK, 0.2
    )
    assert float(loss) == pytest.approx((-1.2 + 1.6 - 3.3 - 2.8) / 4, abs=1e-9)
    assert float(metrics["clip_fraction"]) == pytest.approx(3 / 4)
    k3 = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1, 0.7)) / 4
    assert float(metrics["approx_kl"]) == pytest.approx(k3, abs=1e-9)


@pytest.mark.parametrize(("log_ratio", "advantage", "wanted"), [(30, -1, math.exp(20)), (-30, 1, -math.exp(-20))])
def test_a_ratio_stays_within_e_to_the_20(log_ratio: float, advantage: float, wanted: float) -> None:
    one = torch.ones(1, 1).double()
    loss, _ = clipped_policy_loss(log_ratio * one, 0 * one, advantage * one, one, 0.2)
    assert float(loss) == pytest.approx(wanted, rel=1e-9)


def test_a_clipped_token_has_no_gradient_and_any_other_has() -> None:
    logps = doubles(1.5, 1.5, 0.5, 0.5, 1.1).log()[None].requires_grad_(True)
    advantages = doubles(1, -1, 1, -1, 1)[None]
    clipped_policy_loss(logps, torch.zeros(1, 5), advantages, torch.ones(1, 5), 0.2)[0].backward()
    # d(-A r)/d logp = -A r; clipped only where moving on would gain more: r high and A > 0, r low and A < 0
    assert (5 * logps.grad).tolist()[0] == pytest.approx([0, 1.5, -0.5, 0, -1.1], abs=1e-9)


def test_P3_before_any_step_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    torch.manual_seed(0)
    logps, advantages = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    one, two = logps.clone().requires_grad_(True), logps.clone().requires_grad_(True)
    loss, metrics = clipped_policy_loss(one, logps, advantages, MASK, 0.2)
    loss.backward()
    (-(advantages * two * MASK).sum() / 4).backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-12)
    assert float(metrics["clip_fraction"]) == 0
    assert float(metrics["approx_kl"]) == 0


def test_ratios_that_would_overflow_stay_finite() -> None:
    logps = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss, _ = clipped_policy_loss(logps, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), 0.2)
    loss.backward()
    assert loss.isfinite()
    assert logps.grad.isfinite().all()


def test_value_loss_by_hand() -> None:
    values, old, returns = (torch.tensor([[v, 0.0]]) for v in (2.0, 1.0, 3.0))
    mask = torch.tensor([[1.0, 0.0]])
    assert float(value_loss(values, old, returns, mask, None)[0]) == pytest.approx(0.5 * 1)
    # clipped to 1.5: the larger error (1.5 - 3)^2 = 2.25 counts
    assert float(value_loss(values, old, returns, mask, 0.5)[0]) == pytest.approx(0.5 * 2.25)
    # towards a return of 1 the plain error (2 - 1)^2 is the larger
    assert float(value_loss(values, old, torch.ones(1, 2), mask, 0.5)[0]) == pytest.approx(0.5 * 1)


def test_only_the_new_values_and_logps_carry_gradient() -> None:
    tensors = [torch.ones(2, 3, requires_grad=True) for _ in range(2)]
    _, metrics = clipped_policy_loss(tensors[0], torch.zeros(2, 3), torch.ones(2, 3), MASK, 0.2)
    _, more = value_loss(tensors[1], torch.zeros(2, 3), torch.zeros(2, 3), MASK, 0.2)
    _, yet = preference_loss(tensors[0][:, 0], tensors[0][:, 1], *torch.zeros(2, 2), "ipo", 0.1)
    _, others = contrastive_loss(tensors[0], torch.zeros(2, 3), torch.ones(2, 3), 0.1)
    _, last = weighted_next_token_loss(tensors[0], MASK, torch.ones(2))
    assert not any(value.requires_grad for found in (metrics, more, yet, others, last) for value in found.values())


def test_G4_parts_of_a_batch_add_up_to_it() -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 2, 3).double()
    whole = [
        next_token_loss(a, MASK),
        clipped_policy_loss(a, b, c, MASK, 0.2),
        value_loss(a, b, c, MASK, 0.2),
        contrastive_loss(a, b, c, 0.3),
        weighted_next_token_loss(a, MASK, WEIGHTS),
        *(preference_loss(a[:, 0], a[:, 1], b[:, 0], b[:, 1], kind, 0.3) for kind in KINDS),
    ]
    parts = []
    for row in (slice(0, 1), slice(1, 2)):
        x, y, z, m = a[row], b[row], c[row], MASK[row]
        parts.append(
            [
                next_token_loss(x, m, 4.0),
                clipped_policy_loss(x, y, z, m, 0.2, 4.0),
                value_loss(x, y, z, m, 0.2, 4.0),
                contrastive_loss(x, y, z, 0.3, 2.0),
                weighted_next_token_loss(x, m, WEIGHTS[row], 3 * 0.2 + 0.7),
                *(preference_loss(x[:, 0], x[:, 1], y[:, 0], y[:, 1], kind, 0.3, 2.0) for kind in KINDS),
            ]
        )
    for (loss, metrics), (first, some), (second, others) in zip(whole, *parts, strict=True):
        assert float(loss) == pytest.approx(float(first + second), abs=1e-9)
        for name, value in metrics.items():
            assert float(value) == pytest.approx(float(some[name] + others[name]), abs=1e-6), name


def test_preference_losses_by_hand() -> None:
    # h_chosen = -3 + 5 = 2, h_rejected = -4 + 1 = -3: gap 5, margin 0.1 * 5 = 0.5; without reference -3 + 4 = 1
    inputs = (doubles(-3.0), doubles(-4.0), doubles(-5.0), doubles(-1.0))
    wanted = {"sigmoid_norm": math.log(1 + math.exp(-0.5)), "hinge_norm": 0.5, "hinge": 0.9, "ipo": (5 - 5) ** 2}
    for kind in KINDS:
        loss, metrics = preference_loss(*inputs, kind, 0.1)
        assert float(loss) == pytest.approx(wanted[kind], abs=1e-9)
        assert float(metrics["margin"]) == pytest.approx(0.5)
        assert float(metrics["accuracy"]) == 1
        assert (float(metrics["chosen_logps"]), float(metrics["rejected_logps"])) == (-3, -4)
        assert float(metrics["displacement"]) == -2
    assert float(preference_loss(*inputs, "ipo", 0.25)[0]) == pytest.approx((5 - 2) ** 2)


def test_preference_metrics_are_means_over_pairs() -> None:
    # gaps (-3 + 5) - (-4 + 1) = 5 and (-2 + 4) - (-6 + 8) = 0: of equals neither is preferred
    _, metrics = preference_loss(doubles(-3, -2), doubles(-4, -6), doubles(-5, -4), doubles(-1, -8), "sigmoid_norm", 0.1)
    wanted = {"accuracy": 0.5, "margin": 0.25, "chosen_logps": -2.5, "rejected_logps": -5, "displacement": -2}
    assert {name: float(metrics[name]) for name in wanted} == pytest.approx(wanted, abs=1e-9)


def gradients(kind: PreferenceLoss, gamma: float, policy: Tensor, reference: Tensor) -> tuple[float, Tensor]:
    """Loss and its gradient by (chosen, rejected) log-probability, from pairs of numbers."""
    policy = policy.clone().requires_grad_(True)
    loss, _ = preference_loss(policy[:1], policy[1:], reference[:1], reference[1:], kind, gamma)
    loss.backward()
    assert policy.grad is not None
    return float(loss.detach()), policy.grad


def test_L1_values_and_gradients_at_the_reference() -> None:
    here, gamma = doubles(-2.0, -7.0), 0.3
    # u = d chosen - d rejected = (1, -1)
    for kind, value, slope in (("sigmoid_norm", math.log(2), -gamma / 2), ("hinge_norm", 1.0, -gamma)):
        loss, grad = gradients(kind, gamma, here, here)
        assert loss == pytest.approx(value, abs=1e-9)
        assert grad.tolist() == pytest.approx([slope, -slope], abs=1e-9)
    loss, grad = gradients("ipo", gamma, here, here)
    assert loss == pytest.approx(1 / (4 * gamma**2), abs=1e-9)
    assert grad.tolist() == pytest.approx([-1 / gamma, 1 / gamma], abs=1e-9)


def test_L2_hinge_is_gamma_times_slic() -> None:
    torch.manual_seed(0)
    for gamma in (0.05, 0.5, 2.0):
        chosen, rejected = torch.randn(2, 20).double() * 3
        slic = sum(max(0.0, 1 / gamma - float(c) + float(r)) for c, r in zip(chosen, rejected, strict=True)) / 20
        loss, _ = preference_loss(chosen, rejected, chosen, rejected, "hinge", gamma)
        assert float(loss) == pytest.approx(gamma * slic, abs=1e-9)


def test_L2_hinge_norm_is_hinge_when_the_reference_likes_both_alike() -> None:
    torch.manual_seed(0)
    chosen, rejected, reference = torch.randn(3, 20).double() * 3
    norm, plain = (preference_loss(chosen, rejected, reference, reference, k, 0.5)[0] for k in ("hinge_norm", "hinge"))
    assert float(norm) == pytest.approx(float(plain), abs=1e-9)
    other, _ = preference_loss(chosen, rejected, reference, reference - 1, "hinge_norm", 0.5)
    assert abs(float(other) - float(plain)) > 0.1


def test_L3_hinges_have_no_gradient_beyond_the_margin() -> None:
    reference = doubles(-1.0, -1.0)
    for kind in ("hinge_norm", "hinge"):
        beyond = gradients(kind, 0.5, doubles(-1.0, -3.1), reference)  # 0.5 * 2.1 > 1
        short = gradients(kind, 0.5, doubles(-1.0, -2.9), reference)
        assert beyond[0] == 0
        assert beyond[1].tolist() == [0, 0]
        assert short[0] == pytest.approx(1 - 0.5 * 1.9, abs=1e-9)
        assert short[1].tolist() == [-0.5, 0.5]


def test_L4_swapping_the_responses_negates_the_margin() -> None:
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 6).double()
    for kind in KINDS:
        there, back = preference_loss(a, b, c, d, kind, 0.7)[1], preference_loss(b, a, d, c, kind, 0.7)[1]
        assert float(there["margin"]) == pytest.approx(-float(back["margin"]), abs=1e-9)
        assert float(there["accuracy"]) == pytest.approx(1 - float(back["accuracy"]))


def test_L5_what_depends_on_the_prompt_alone_drops_out() -> None:
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 6).double()
    offset = 10 * torch.randn(6).double()
    for kind in KINDS:
        before, after = preference_loss(a, b, c, d, kind, 0.7)[0], preference_loss(a + offset, b + offset, c, d, kind, 0.7)[0]
        assert float(before) == pytest.approx(float(after), abs=1e-9)


def soft_label_optimum(source: Tensor, reference: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """Probabilities that minimise the sigmoid loss, pairs weighted by `source` and labelled sigmoid(R_1 - R_2)."""
    logits = torch.zeros_like(reference, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    pairs = list(combinations(range(len(reference)), 2))

    def closure() -> Tensor:
        optimiser.zero_grad()
        logps, total = logits.log_softmax(0), torch.zeros((), dtype=torch.float64)
        for i, j in pairs:
            label = torch.sigmoid(rewards[i] - rewards[j])
            for w, r, share in ((i, j, label), (j, i, 1 - label)):
                loss, _ = preference_loss(logps[[w]], logps[[r]], reference[[w]], reference[[r]], "sigmoid_norm", gamma)
                total = total + source[i] * source[j] * share * loss
        total.backward()
        return total

    optimiser.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("where", ["reference", "tilt", "uniform"])
def test_L6_soft_labels_reach_the_tilt_whatever_the_pairs(where: str) -> None:
    torch.manual_seed(0)
    reference, rewards, gamma = torch.randn(6).double().log_softmax(0), torch.randn(6).double(), 0.5
    target = tilt(reference, rewards, gamma)
    source = {"reference": reference.exp(), "tilt": target, "uniform": torch.full((6,), 1 / 6).double()}[where]
    assert total_variation(reference.exp(), target) > 0.2
    assert total_variation(soft_label_optimum(source, reference, rewards, gamma), target) < 1e-4


def test_an_unknown_loss_and_wrong_shapes_raise() -> None:
    one = doubles(1.0)
    with pytest.raises(ValueError, match="kind: expected sigmoid_norm, hinge_norm, hinge or ipo; got 'dpo'"):
        preference_loss(one, one, one, one, "dpo", 0.1)
    with pytest.raises(ValueError, match="reference_rejected_logps"):
        preference_loss(one, one, one, torch.ones(2), "ipo", 0.1)
    with pytest.raises(ValueError, match="old_logps"):
        clipped_policy_loss(MASK, torch.ones(2, 2), MASK, MASK, 0.2)
    with pytest.raises(ValueError, match="mask"):
        next_token_loss(MASK, torch.ones(2, 2))
    with pytest.raises(ValueError, match="returns"):
        value_loss(MASK, MASK, torch.ones(2, 2), MASK, None)
    with pytest.raises(ValueError, match="mask"):
        weighted_next_token_loss(MASK, MASK[:, :2], WEIGHTS)
    for wrong in (torch.ones(3), torch.ones(2, 1), torch.ones(()), torch.ones(2, 3, 1)):
        with pytest.raises(ValueError, match="weights: expected shape"):
            weighted_next_token_loss(MASK, MASK, wrong)


def test_equal_policies_lose_log_2_over_enumerated_responses() -> None:
    s = Tabular(0).frozen().sum(1)
    loss, metrics = preference_loss(s, s.flip(0), s, s.flip(0), "sigmoid_norm", 0.1)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-9)
    assert float(metrics["margin"]) == 0


# --- the same definitions, written as loops over numbers ---

ROWS, WIDTH, CLIP, GAMMA = 8, 5, 0.2, 0.4
SEEDS = range(5)


def numbers(seed: int, count: int) -> list[Tensor]:
    """`count` random tensors [8, 5]."""
    return list(torch.randn(count, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def ragged(seed: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """A mask of responses of 1 to 5 tokens, and the places where it is 1."""
    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=torch.Generator().manual_seed(seed)).tolist()
    mask = torch.tensor([[1.0] * n + [0.0] * (WIDTH - n) for n in lengths]).double()
    return mask, [(b, t) for b, n in enumerate(lengths) for t in range(n)]


@pytest.mark.parametrize("seed", SEEDS)
def test_token_losses_match_loops(seed: int) -> None:
    (mask, places), (new, old, third) = ragged(seed), numbers(seed, 3)
    weights = third.abs()
    plain = nll = weight_sum = policy = far = critic = unclipped = 0.0
    for b, t in places:
        logp, before, other = float(new[b, t]), float(old[b, t]), float(third[b, t])
        plain -= logp
        nll -= abs(other) * logp
        weight_sum += abs(other)
        ratio = math.exp(logp - before)
        policy -= min(other * ratio, other * min(max(ratio, 1 - CLIP), 1 + CLIP))
        far += not 1 - CLIP <= ratio <= 1 + CLIP
        held = min(max(logp, before - CLIP), before + CLIP)  # logp and before stand for values, other for the return
        critic += max((logp - other) ** 2, (held - other) ** 2) / 2
        unclipped += (logp - other) ** 2 / 2
    size = len(places)
    assert float(next_token_loss(new, mask)[0]) == pytest.approx(plain / size, abs=1e-9)
    assert float(weighted_next_token_loss(new, mask, weights)[0]) == pytest.approx(nll / weight_sum, abs=1e-9)
    loss, metrics = clipped_policy_loss(new, old, third, mask, CLIP)
    assert float(loss) == pytest.approx(policy / size, abs=1e-9)
    assert float(metrics["clip_fraction"]) == pytest.approx(far / size)
    assert float(value_loss(new, old, third, mask, CLIP)[0]) == pytest.approx(critic / size, abs=1e-9)
    assert float(value_loss(new, old, third, mask, None)[0]) == pytest.approx(unclipped / size, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_preference_losses_match_loops(seed: int) -> None:
    mask, _ = ragged(seed)
    sides = [4 * (tensor * mask).sum(1) for tensor in numbers(seed, 4)]
    totals = dict.fromkeys(KINDS, 0.0)
    for chosen, rejected, reference_chosen, reference_rejected in torch.stack(sides, 1).tolist():
        gap = chosen - rejected - (reference_chosen - reference_rejected)
        totals["sigmoid_norm"] += math.log1p(math.exp(-GAMMA * gap)) / ROWS
        totals["hinge_norm"] += max(0.0, 1 - GAMMA * gap) / ROWS
        totals["hinge"] += max(0.0, 1 - GAMMA * (chosen - rejected)) / ROWS
        totals["ipo"] += (gap - 1 / (2 * GAMMA)) ** 2 / ROWS  # sums: no division by length
    for kind, wanted in totals.items():
        assert float(preference_loss(*sides, kind, GAMMA)[0]) == pytest.approx(wanted, abs=1e-9), kind


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [2, 3, WIDTH])
def test_contrastive_loss_matches_a_loop(seed: int, k: int) -> None:
    logps, reference, rewards = (tensor[:, :k] for tensor in numbers(seed, 3))
    total = 0.0
    for b in range(ROWS):
        for i, j in combinations(range(k), 2):
            # the paper's own form, with the reward regularised by beta / 2, maximised
            h = [float(logps[b, n] - reference[b, n]) for n in (i, j)]
            first, second = (float(rewards[b, n]) - GAMMA / 2 * x for n, x in zip((i, j), h, strict=True))
            total += ((first - second) * h[0] + (second - first) * h[1]) / math.comb(k, 2) / ROWS
    assert float(contrastive_loss(logps, reference, rewards, GAMMA)[0]) == pytest.approx(-total, abs=1e-9)
