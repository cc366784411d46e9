"""Preference optimisation on pairs: its gradient, its start, resuming."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from apprentice.compute import CPU
from apprentice.finite import BadSignError
from apprentice.policy import freeze
from apprentice.preference import Pairs, optimise_preferences, preference_step, with_reference
from apprentice.recorder import Recorder
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import (
    END,
    LAYOUTS,
    SMALL,
    Interrupted,
    Keeping,
    Stopping,
    demonstrations,
    gradient,
    hash_of,
    naive_logps,
    relative_error,
    rso_config,
    tiny_llama,
)

KINDS = ("sigmoid_norm", "hinge_norm", "hinge", "ipo")


def sides(count: int) -> tuple[Batch, Batch]:
    """Two random responses to each of `count` prompts, of different lengths."""
    one, other = demonstrations(count, seed=0), demonstrations(count, seed=7)
    prompts = [ids[:n] for ids, n in zip(one.ids.tolist(), one.prompt_lengths.tolist(), strict=True)]
    answers = [
        [
            ids[p : p + r]
            for ids, p, r in zip(b.ids.tolist(), b.prompt_lengths.tolist(), b.response_lengths.tolist(), strict=True)
        ]
        for b in (one, other)
    ]
    return collate(prompts, answers[0], END), collate(prompts, answers[1], END)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return with_reference(freeze(tiny_llama(3)), *sides(10), CPU)


def run(pairs: Pairs, recorder: Recorder, seed: int = 0, first_weights: int = 0) -> tuple[LlamaForCausalLM, dict]:
    model = tiny_llama(first_weights)
    return model, optimise_preferences(model, pairs, rso_config(), seed=f"{seed}", compute=CPU, recorder=recorder)


def test_reference_logps_are_sums_over_the_response(pairs: Pairs) -> None:
    for batch, found in ((pairs.chosen, pairs.reference_chosen_logps), (pairs.rejected, pairs.reference_rejected_logps)):
        for row in (0, 4, 9):
            ids, p, n = batch.ids[row].tolist(), int(batch.prompt_lengths[row]), batch.lengths()[row]
            assert float(found[row]) == pytest.approx(sum(naive_logps(tiny_llama(3), ids[:p], ids[p:n])), abs=1e-4)


def test_L1_at_the_reference_the_margin_is_0() -> None:
    model = tiny_llama(3)
    for compute in (CPU, SMALL):
        pairs = with_reference(freeze(tiny_llama(3)), *sides(10), compute)
        for kind, value in (("sigmoid_norm", math.log(2)), ("hinge_norm", 1.0), ("ipo", 1.0)):
            metrics = preference_step(model, pairs, list(range(10)), rso_config(loss=kind), compute)
            assert metrics["margin"] == pytest.approx(0, abs=1e-5)
            assert metrics["loss"] == pytest.approx(value, abs=1e-5)  # ipo: 1 / (4 * 0.5^2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_matches_a_loop_over_pairs(pairs: Pairs, kind: str) -> None:
    model, rows, gamma = tiny_llama(0), [1, 5, 8], 0.5
    found = preference_step(model, pairs, rows, rso_config(loss=kind), CPU)
    losses = []
    for row in rows:
        sums = []
        for batch in (pairs.chosen, pairs.rejected):
            ids, p, n = batch.ids[row].tolist(), int(batch.prompt_lengths[row]), batch.lengths()[row]
            sums.append([sum(naive_logps(m, ids[:p], ids[p:n])) for m in (model, tiny_llama(3))])
        (chosen, ref_chosen), (rejected, ref_rejected) = sums
        gap = chosen - ref_chosen - rejected + ref_rejected
        losses.append(
            {
                "sigmoid_norm": math.log(1 + math.exp(-gamma * gap)),
                "hinge_norm": max(0.0, 1 - gamma * gap),
                "hinge": max(0.0, 1 - gamma * (chosen - rejected)),
                "ipo": (gap - 1) ** 2,
            }[kind]
        )
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_G4_the_gradient_does_not_depend_on_the_split_or_the_order(pairs: Pairs, kind: str, layout: str) -> None:
    found = []
    for rows, compute in ((list(range(10)), CPU), (list(range(9, -1, -1)), replace(LAYOUTS[layout], forward_tokens=60))):
        model = tiny_llama(0).double()
        metrics = preference_step(model, pairs, rows, rso_config(loss=kind), compute)
        found.append((metrics, gradient(model)))
    (metrics, grad), (others, other) = found
    assert relative_error(other, grad) < 1e-6
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("rise", "told"), [(0.0, []), (20.0, ["step 1 of 9"])])
def test_chosen_responses_that_lost_ten_nats_are_told_of_once(pairs: Pairs, rise: float, told: list[str]) -> None:
    logps = with_reference(freeze(tiny_llama(0)), *sides(10), CPU).reference_chosen_logps  # of the policy before it learns
    recorder = Keeping()
    run(replace(pairs, reference_chosen_logps=logps + rise), recorder)
    assert [text.partition(":")[0] for text in recorder.warnings] == told
    assert recorder.rows[0]["displacement"] == pytest.approx(rise, abs=1e-4)


def test_who_stops_when_they_have_has_trained_nothing_on_it(pairs: Pairs) -> None:
    model, recorder = tiny_llama(0), Stopping()
    far = replace(pairs, reference_chosen_logps=pairs.reference_chosen_logps + 1000)
    with pytest.raises(BadSignError, match=r"step 1 of 9: the responses learnt from lost 1.*e\+03 nats each"):
        optimise_preferences(model, far, rso_config(), seed="0", compute=CPU, recorder=recorder)
    assert hash_of(model) == hash_of(tiny_llama(0)) and recorder.rows == []


@pytest.mark.parametrize("stop", [1, 3, 5, 9])  # three steps an epoch
def test_an_interrupted_run_ends_in_the_same_weights(pairs: Pairs, stop: int) -> None:
    whole, broken = Keeping(), Keeping(keep_at=stop)
    wanted, result = run(pairs, whole)
    with pytest.raises(Interrupted):
        run(pairs, broken)
    resumed = Keeping(saved=broken.saved)
    model, again = run(pairs, resumed, first_weights=99)
    assert hash_of(model) == hash_of(wanted)
    assert again == result
    assert resumed.rows == whole.rows


def test_the_result_is_the_mean_over_the_last_epoch(pairs: Pairs) -> None:
    recorder = Recorder()
    _, result = run(pairs, recorder)
    assert [row["epoch"] for row in recorder.rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    for name in ("loss", "accuracy", "margin"):
        assert result[name] == pytest.approx(sum(row[name] for row in recorder.rows[-3:]) / 3)


def test_G6_the_seed_decides_the_weights(pairs: Pairs) -> None:
    hashes = [hash_of(run(pairs, Recorder(), seed)[0]) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_reference_takes_no_gradient(pairs: Pairs) -> None:
    assert not pairs.reference_chosen_logps.requires_grad
    assert not torch.equal(pairs.reference_chosen_logps, pairs.reference_rejected_logps)
