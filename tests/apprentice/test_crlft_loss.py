"""C1 to C5: the weighted loss of C-RLFT against deletion, plain fine-tuning and the optima it aims at."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apprentice.losses import next_token_loss, weighted_next_token_loss
from apprentice.policy import response_scores
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import (
    END,
    Tabular,
    demonstrations,
    ended,
    gradient,
    relative_error,
    tilt,
    tiny_llama,
    total_variation,
)

EXPERT, SUBOPTIMAL = 4, 5  # tokens that stand before the prompt: the class tags
CLASSES = [EXPERT, SUBOPTIMAL, SUBOPTIMAL, EXPERT, SUBOPTIMAL, SUBOPTIMAL, EXPERT]
Loss = Callable[[Tensor, Tensor], Tensor]


def tagged(tags: list[int]) -> Batch:
    """Random demonstrations, each prompt after the tag of its class; 0 for none."""
    plain = demonstrations(len(tags), seed=0)
    prompts, responses = [], []
    for tag, ids, p, n in zip(tags, plain.ids.tolist(), plain.prompt_lengths.tolist(), plain.lengths(), strict=True):
        prompts.append([tag] * (tag > 0) + ids[:p])
        responses.append(ids[p:n])
    return collate(prompts, responses, END)


def trained_on(batch: Batch, loss: Loss) -> tuple[float, Tensor]:
    """Loss of a tiny model and its gradient."""
    model = tiny_llama(0, vocab=6).double()
    found = loss(response_scores(model, batch).logps, batch.mask)
    found.backward()
    return float(found.detach()), gradient(model)


def weighted(weights: Tensor) -> Loss:
    return lambda logps, mask: weighted_next_token_loss(logps, mask, weights)[0]


def by_class(expert: float, suboptimal: float) -> Tensor:
    return torch.tensor([expert if tag == EXPERT else suboptimal for tag in CLASSES])


def same(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> bool:
    return one[0] == pytest.approx(other[0], rel=1e-6) and relative_error(one[1], other[1]) < 1e-6


@pytest.mark.parametrize("tags", [CLASSES, [0] * len(CLASSES)], ids=["conditioned", "untagged"])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_C1_equal_weights_are_plain_fine_tuning(tags: list[int], weight: float) -> None:
    batch = tagged(tags)
    plain = trained_on(batch, lambda logps, mask: next_token_loss(logps, mask)[0])
    assert same(trained_on(batch, weighted(by_class(weight, weight))), plain)
    assert same(trained_on(batch, weighted(weight * torch.ones_like(batch.mask))), plain)
    assert not same(trained_on(batch, weighted(by_class(1.0, 0.1))), plain)


@pytest.mark.parametrize("constant", [1e-4, 0.3, 50.0])
def test_C2_a_constant_factor_of_all_weights_changes_nothing(constant: float) -> None:
    batch = tagged(CLASSES)
    here = trained_on(batch, weighted(by_class(1.0, 0.1)))
    assert same(trained_on(batch, weighted(constant * by_class(1.0, 0.1))), here)
    count = constant * float((by_class(1.0, 0.1) * batch.response_lengths).sum())
    told = trained_on(batch, lambda logps, mask: weighted_next_token_loss(logps, mask, constant * by_class(1.0, 0.1), count)[0])
    assert same(told, here)


def test_C3_weight_0_is_deletion() -> None:
    batch = tagged(CLASSES)
    experts = batch.rows([row for row, tag in enumerate(CLASSES) if tag == EXPERT])
    plain = trained_on(experts, lambda logps, mask: next_token_loss(logps, mask)[0])
    assert same(trained_on(batch, weighted(by_class(0.7, 0.0))), plain)


def test_weights_of_all_0_raise() -> None:
    batch = tagged(CLASSES)
    with pytest.raises(ValueError, match="expected a positive sum over response tokens, got 0; leave rows of weight 0 out"):
        trained_on(batch, weighted(by_class(0.0, 0.0)))
    nothing, _ = weighted_next_token_loss(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2), count=5.0)
    assert float(nothing) == 0  # a micro-batch of a batch that has weights elsewhere


# --- optima, by exact weights instead of samples ---

POLICIES = {"expert": 1, "suboptimal": 2}  # seeds of the tables that wrote the data
AMOUNTS = {"expert": 0.2, "suboptimal": 0.8}  # shares of the data


def optimum(*shares: Tensor) -> list[Tensor]:
    """Probabilities of all responses where the loss is least, for one table a class or one for all.

    shares: [40] for each table, the share of each response in the data times its weight. One loss trains all tables.
    """
    tables = [Tabular(5) for _ in shares]
    mask = torch.cat([table.mask for table in tables])
    logits = [table.logits for table in tables]
    optimiser = torch.optim.LBFGS(
        logits, max_iter=600, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss, _ = weighted_next_token_loss(torch.cat([table.logps() for table in tables]), mask, torch.cat(shares))
        loss.backward()
        return loss

    optimiser.step(closure)
    return [table.frozen().sum(1).exp() for table in tables]


def written_by(name: str) -> Tensor:
    return Tabular(POLICIES[name]).frozen().sum(1).exp()


@pytest.mark.parametrize("weights", [(1.0, 0.1), (1.0, 1.0), (0.3, 5.0)])
def test_C4_weights_move_the_unconditioned_optimum_and_not_the_conditioned_one(weights: tuple[float, float]) -> None:
    shares = [w * AMOUNTS[name] * written_by(name) for name, w in zip(POLICIES, weights, strict=True)]
    for reached, name in zip(optimum(*shares), POLICIES, strict=True):
        assert total_variation(reached, written_by(name)) < 1e-4
    total = shares[0] + shares[1]
    (mixture,) = optimum(total)
    assert total_variation(mixture, total / total.sum()) < 1e-4
    unweighted = sum(AMOUNTS[name] * written_by(name) for name in POLICIES)
    assert (total_variation(mixture, unweighted) > 0.05) == (weights[0] != weights[1])


@pytest.mark.parametrize(
    ("weights", "gap"), [((1.0, 0.1), math.log(10)), ((2.0, 0.5), math.log(4)), ((0.2, 1.0), -math.log(5))]
)
def test_C5_the_weights_ratio_is_exp_of_the_reward_gap_over_beta(weights: tuple[float, float], gap: float) -> None:
    # a response tells who wrote it: an expert's ended, another's was cut off; beta 0.5
    data = written_by("expert")
    rewards = torch.where(ended(), 0.5 * gap, 0.0)
    (reached,) = optimum(torch.where(ended(), *weights) * data)
    assert total_variation(reached, tilt(data.log(), rewards, 0.5)) < 1e-4
    assert total_variation(reached, data) > 0.05
    logps = torch.zeros(2, 1, requires_grad=True)
    weighted_next_token_loss(logps, torch.ones(2, 1), torch.tensor(weights))[0].backward()
    assert math.log(float(logps.grad[0] / logps.grad[1])) == pytest.approx(gap, abs=1e-6)


def test_G4_the_gradient_does_not_depend_on_the_split() -> None:
    batch, weights = tagged(CLASSES), by_class(1.0, 0.1)
    whole, wanted = trained_on(batch, weighted(weights))
    model, total, count = tiny_llama(0, vocab=6).double(), 0.0, float((weights * batch.response_lengths).sum())
    for rows in ([0, 1, 2], [5], [6, 4, 3]):
        part = batch.rows(rows)
        loss, metrics = weighted_next_token_loss(response_scores(model, part).logps, part.mask, weights[rows], count)
        loss.backward()
        total += float(metrics["loss"])
    assert total == pytest.approx(whole, rel=1e-6)
    assert relative_error(gradient(model), wanted) < 1e-6
