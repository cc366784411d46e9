"""The self-reward: its properties in expectation, and where it is paid."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apprentice.advantages import gae
from apprentice.compute import CPU
from apprentice.masking import length_mask
from apprentice.policy import freeze
from apprentice.rewards import (
    kl_penalty,
    last_token,
    length_slope,
    place,
    place_total,
    ranker_reward,
    self_reward,
    sequence_rewards,
    split_by_class,
    token_rewards,
)
from tests.apprentice.toys import VOCAB, Tabular, demonstrations, naive_logps, tiny_llama

MASK = length_mask(torch.tensor([1, 2, 4, 3]), 4).double()
PARTS = torch.tensor([[5.0, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 4], [1, 1, 4, 9]]).double() * MASK
ALL = torch.ones(4).bool()


def kl(p: Tabular, q: Tabular) -> float:
    """KL(p || q) by the chain rule: the divergence at each prefix, weighted by how often p comes there."""
    a, b = p.logits.detach().softmax(-1), q.logits.detach().softmax(-1)
    here = [sum(float(a[row, v] * (a[row, v] / b[row, v]).log()) for v in range(VOCAB)) for row in range(len(a))]
    # rows are in the order (), (0), (1), (2), (0,0), (0,1), ...: row 1 + i follows row 0, row 4 + 3 i + j follows 1 + i
    reach = [1.0] + [float(a[0, i]) for i in range(3)] + [float(a[0, i] * a[1 + i, j]) for i in range(3) for j in range(3)]
    return sum(r * h for r, h in zip(reach, here, strict=True))


def test_last_token_by_hand() -> None:
    assert last_token(MASK).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


def test_a_reward_by_hand() -> None:
    # target (-1, -2), baseline (-3, -2.5), weight 0.5: -1 + 1.5 and -2 + 1.25; the padding earns nothing
    parts = token_rewards(
        torch.tensor([[-1.0, -2.0, 7.0]]), torch.tensor([[-3.0, -2.5, 7.0]]), torch.tensor([[1.0, 1, 0]]), 0.5
    )
    assert parts.tolist() == [[0.5, -0.75, 0.0]]


def test_spans_by_hand() -> None:
    assert self_reward(PARTS, MASK).tolist() == [5, 3, 10, 6]
    assert self_reward(PARTS, MASK, "mean").tolist() == [5, 1.5, 2.5, 2]
    assert self_reward(PARTS, MASK, "eos_token").tolist() == [5, 2, 4, 4]


def test_S1_equal_models_earn_exactly_nothing() -> None:
    logps = Tabular(0).frozen()
    assert (token_rewards(logps, logps.clone(), Tabular(0).mask) == 0).all()


def test_S2_swapping_the_models_negates_every_reward() -> None:
    sft, base, mask = Tabular(0).frozen(), Tabular(1).frozen(), Tabular(0).mask
    assert torch.equal(token_rewards(sft, base, mask), -token_rewards(base, sft, mask))
    for span in ("sum", "mean", "eos_token"):
        there, back = (self_reward(token_rewards(a, b, mask), mask, span) for a, b in ((sft, base), (base, sft)))
        assert torch.equal(there, -back)
        assert there.abs().max() > 0.1


def test_S3_expected_reward_is_kl() -> None:
    sft, base = Tabular(0), Tabular(1)
    reward = self_reward(token_rewards(sft.frozen(), base.frozen(), sft.mask), sft.mask)
    under_sft = float((sft.frozen().sum(1).exp() * reward).sum())
    under_base = float((base.frozen().sum(1).exp() * reward).sum())
    assert under_sft == pytest.approx(kl(sft, base), abs=1e-9)
    assert under_base == pytest.approx(-kl(base, sft), abs=1e-9)
    assert under_sft > 0.1 > -0.1 > under_base


@pytest.mark.parametrize("span", ["sum", "mean", "eos_token"])
def test_P5_the_reward_sits_on_the_last_token(span: str) -> None:
    placed = place(PARTS, MASK, ALL, "eos", span, -7.0)
    wanted = {"sum": [5, 3, 10, 6], "mean": [5, 1.5, 2.5, 2], "eos_token": [5, 2, 4, 4]}[span]
    for row, last in enumerate([0, 1, 3, 2]):
        assert placed[row].tolist() == [wanted[row] if t == last else 0 for t in range(4)]


def test_P5_a_cut_off_response_is_paid_at_its_last_token() -> None:
    for how in ("eos", "dense"):
        placed = place(PARTS, MASK, torch.tensor([True, True, False, False]), how, "sum", -7.0)
        assert placed[2].tolist() == [0, 0, 0, -7]
        assert placed[3].tolist() == [0, 0, -7, 0]
        assert float(placed[1].sum()) == 3


def test_P5_a_total_of_any_source_sits_on_the_last_token() -> None:
    totals = torch.tensor([0.5, -2.0, 3.0, 9.0]).double()
    done = torch.tensor([True, True, True, False])
    assert place_total(totals, MASK, done, -1.25).tolist() == [[0.5, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 3], [0, 0, -1.25, 0]]
    assert torch.equal(place_total(self_reward(PARTS, MASK), MASK, done, -1.25), place(PARTS, MASK, done, "eos", "sum", -1.25))


def test_dense_placement_by_hand() -> None:
    assert torch.equal(place(PARTS, MASK, ALL, "dense", "sum", -7.0), PARTS)
    assert place(PARTS, MASK, ALL, "dense", "mean", -7.0)[2].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert place(PARTS, MASK, ALL, "dense", "eos_token", -7.0)[2].tolist() == [0, 0, 0, 4]


@pytest.mark.parametrize("span", ["sum", "mean", "eos_token"])
def test_dense_and_end_payment_add_up_to_the_same(span: str) -> None:
    eos, dense = (place(PARTS, MASK, ALL, how, span, -7.0).sum(1) for how in ("eos", "dense"))
    assert torch.allclose(eos, dense, atol=1e-12)
    assert torch.allclose(eos, self_reward(PARTS, MASK, span), atol=1e-12)


@pytest.mark.parametrize("how", ["eos", "dense"])
def test_S8_a_response_without_end_earns_the_configured_value_whatever_its_parts(how: str) -> None:
    for parts in (PARTS, -3 * PARTS, torch.zeros_like(PARTS)):
        placed = place(parts, MASK, ~ALL, how, "sum", -1.25)
        assert placed.sum(1).tolist() == [-1.25] * 4


def test_S7_gamma_below_1_discounts_the_end_payment_by_the_length() -> None:
    for gamma in (1.0, 0.9, 0.5):
        parts = MASK / MASK.sum(1, keepdim=True)  # every response earns 1 in all
        returns = gae(place(parts, MASK, ALL, "eos", "sum", -7.0), torch.zeros_like(PARTS), MASK, gamma, 1.0)[1]
        assert returns[:, 0].tolist() == pytest.approx([1, gamma, gamma**3, gamma**2], abs=1e-9)


def test_P6_k1_averages_to_the_true_kl() -> None:
    policy, anchor = Tabular(2), Tabular(3)
    p = policy.frozen().sum(1).exp()
    k1 = kl_penalty(policy.frozen(), anchor.frozen(), policy.mask)
    k3 = kl_penalty(policy.frozen(), anchor.frozen(), policy.mask, "k3")
    assert float((p * k1.sum(1)).sum()) == pytest.approx(kl(policy, anchor), abs=1e-9)
    assert float((p * k3.sum(1)).sum()) == pytest.approx(kl(policy, anchor), abs=1e-9)  # on-policy k3 has the same mean
    assert (k1 < 0).any()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_P6_k3_is_never_negative_and_zero_for_equal_policies_only(ours: list[float], theirs: list[float]) -> None:
    a, b = torch.tensor([ours]).double(), torch.tensor([theirs[: len(ours)]]).double()
    mask = torch.ones_like(a)
    k3 = kl_penalty(a, b, mask, "k3")
    assert (k3 >= 0).all()
    assert (kl_penalty(a, a, mask, "k3") == 0).all()
    assert (k3[(a - b).abs() > 1e-3] > 0).all()


def test_the_penalty_is_nothing_in_the_padding() -> None:
    a, b = torch.full((4, 4), 2.0), torch.zeros(4, 4)
    for estimator in ("k1", "k3"):
        assert (kl_penalty(a, b, MASK, estimator)[MASK == 0] == 0).all()


def test_length_slope_by_hand() -> None:
    # lengths 1 2 3, rewards 0 2 1: centred -1 0 1: (0 * -1 + 1 * 1) / 2
    assert length_slope(torch.tensor([0.0, 2, 1]), torch.tensor([1, 2, 3])) == pytest.approx(0.5)
    assert length_slope(torch.tensor([0.0, 2, 1]), torch.tensor([2, 2, 2])) == 0.0


def test_split_by_class_by_hand() -> None:
    # class 1 stands at (row 1, token 0) with part 1 and (row 2, token 3) with part 4: 5 over 4 responses
    classes = torch.zeros(4, 4, dtype=torch.long)
    classes[1, 0] = classes[2, 3] = classes[0, 3] = 1  # the last one is padding
    shares = split_by_class(PARTS, MASK, classes, 3)
    assert shares == pytest.approx([(24 - 5) / 4, 5 / 4, 0.0])
    assert sum(shares) == pytest.approx(float(self_reward(PARTS, MASK).mean()))


def test_sequence_rewards_match_a_loop() -> None:
    sft, base = freeze(tiny_llama(0)), freeze(tiny_llama(1))
    batch = demonstrations(6, seed=1)
    found = sequence_rewards(sft, base, batch, CPU, baseline_weight=0.5).tolist()
    for row, (ids, n) in enumerate(zip(batch.ids.tolist(), batch.lengths(), strict=True)):
        p = int(batch.prompt_lengths[row])
        target, baseline = (sum(naive_logps(model, ids[:p], ids[p:n])) for model in (sft, base))
        assert found[row] == pytest.approx(target - 0.5 * baseline, abs=1e-4)
    assert (sequence_rewards(sft, copy.deepcopy(sft), batch, CPU) == 0).all()


def both_orders(response: Tensor, baseline: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """Logits of a toy ranker that scores texts by a number and likes whatever stands first."""
    return response - baseline + bias, baseline - response + bias


def test_R10_the_baseline_has_reward_0_and_a_position_bias_cancels() -> None:
    torch.manual_seed(0)
    scores, baseline = torch.randn(5).double(), torch.randn(5).double()
    for bias in (0.0, 3.7, -20.0):
        assert (ranker_reward(*both_orders(baseline, baseline, bias)) == 0).all()
        assert torch.allclose(ranker_reward(*both_orders(scores, baseline, bias)), scores - baseline, atol=1e-9)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="baseline_logps: expected shape"):
        token_rewards(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="mask: expected shape"):
        token_rewards(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="ended: expected shape"):
        place(PARTS, MASK, torch.ones(3).bool(), "eos", "sum", -1.0)
    with pytest.raises(ValueError, match="ended: expected shape"):
        place_total(torch.zeros(1), MASK, ALL, -1.0)
    with pytest.raises(ValueError, match="second_logits: expected shape"):
        ranker_reward(torch.zeros(2), torch.zeros(3))
