"""Supervised fine-tuning: its gradient, the epoch it keeps, resuming; and the gate by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.policy import weights
from apprentice.recorder import Recorder
from apprentice.rewards import sequence_rewards
from apprentice.sampling import Request, sample
from apprentice.sft import GateQuestions, HeldOut, fine_tune, gate, held_out_loss, train_step
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import (
    END,
    LAYOUTS,
    Interrupted,
    Keeping,
    demonstrations,
    gradient,
    hash_of,
    markov,
    naive_logps,
    relative_error,
    sft_config,
    tiny_llama,
)

TRAIN, HELD_OUT = demonstrations(10, seed=0), demonstrations(6, seed=1)


def run(recorder: Recorder, seed: int = 0, first_weights: int = 0, **changes: object) -> tuple[LlamaForCausalLM, dict]:
    model = tiny_llama(first_weights)
    result = fine_tune(model, TRAIN, HeldOut(HELD_OUT), sft_config(**changes), seed=f"{seed}", compute=CPU, recorder=recorder)
    return model, result


def naive_loss(model: LlamaForCausalLM, batch: Batch) -> float:
    """Nats per response token, row by row."""
    total = count = 0.0
    for ids, p, r in zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True):
        total, count = total - sum(naive_logps(model, ids[:p], ids[p : p + r])), count + r
    return total / count


def test_losses_match_a_loop_over_rows() -> None:
    model = tiny_llama(0)
    assert held_out_loss(model, HELD_OUT, CPU) == pytest.approx(naive_loss(model, HELD_OUT), abs=1e-5)
    assert train_step(model, TRAIN, CPU) == pytest.approx(naive_loss(model, TRAIN), abs=1e-5)


@pytest.mark.parametrize("other", [*(Compute(CPU.device, CPU.dtype, n) for n in (25, 60)), *LAYOUTS.values()])
def test_G4_the_gradient_does_not_depend_on_the_split_or_the_order(other: Compute) -> None:
    found = []
    for rows, compute in ((list(range(10)), CPU), (list(range(10)), other), (list(range(9, -1, -1)), other)):
        model = tiny_llama(0).double()
        loss = train_step(model, TRAIN.rows(rows), compute)
        found.append((loss, gradient(model)))
    for loss, grad in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert relative_error(grad, found[0][1]) < 1e-6


def test_G4_a_mean_of_means_would_be_another_gradient() -> None:
    whole, means = tiny_llama(0).double(), tiny_llama(0).double()
    train_step(whole, TRAIN, CPU)
    for row in range(10):
        train_step(means, TRAIN.rows([row]), CPU)
    assert relative_error(gradient(means) / 10, gradient(whole)) > 0.01


@pytest.mark.parametrize("select", ["last", "held_out_loss"])
@pytest.mark.parametrize("stop", [1, 4, 6, 9])  # three steps an epoch: inside one, at the end of one, at the end of all
def test_an_interrupted_run_ends_in_the_same_weights(select: str, stop: int) -> None:
    whole, broken = Keeping(), Keeping(keep_at=stop)
    wanted, result = run(whole, select=select)
    with pytest.raises(Interrupted):
        run(broken, select=select)
    resumed = Keeping(saved=broken.saved)
    model, again = run(resumed, first_weights=99, select=select)
    assert hash_of(model) == hash_of(wanted)
    assert again == result
    assert resumed.rows == whole.rows


class Epochs(Recorder):
    """Keeps the weights at the end of each epoch."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.weights = model, list[str]()

    def step(self, done, total, row, state):
        super().step(done, total, row, state)
        if row["held_out_loss"] is not None:
            self.weights.append(hash_of(self.model))


@pytest.mark.parametrize("select", ["last", "held_out_loss"])
def test_the_kept_epoch_is_the_one_asked_for(select: str) -> None:
    # a rate so high that the held-out loss rises again: the lowest is neither the first nor the last epoch
    model = tiny_llama(0)
    recorder = Epochs(model)
    config = sft_config(epochs=8, select=select, learning_rate=2e-2)
    result = fine_tune(model, TRAIN, HeldOut(HELD_OUT), config, seed=f"{0}", compute=CPU, recorder=recorder)
    losses = result["held_out_loss_by_epoch"]
    best = min(range(8), key=losses.__getitem__)
    assert 0 < best < 7
    kept = 7 if select == "last" else best
    assert result["epoch"] == kept + 1
    assert result["held_out_loss"] == losses[kept]
    assert hash_of(model) == recorder.weights[kept]
    assert held_out_loss(model, HELD_OUT, CPU) == pytest.approx(losses[kept], abs=1e-6)


def test_of_equal_losses_the_first_epoch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.0])
    monkeypatch.setattr("apprentice.sft.held_out_loss", lambda *_: next(losses))
    model = tiny_llama(0)
    recorder = Epochs(model)
    config = sft_config(select="held_out_loss")
    result = fine_tune(model, TRAIN, HeldOut(HELD_OUT), config, seed=f"{0}", compute=CPU, recorder=recorder)
    assert result["epoch"] == 2
    assert hash_of(model) == recorder.weights[1]


def test_rows_of_the_history() -> None:
    recorder = Recorder()
    run(recorder)
    assert [row["step"] for row in recorder.rows] == list(range(1, 10))  # 10 demonstrations in batches of 4, 3 epochs
    assert [row["epoch"] for row in recorder.rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [row["held_out_loss"] is not None for row in recorder.rows] == [False, False, True] * 3


def test_an_epoch_takes_every_demonstration_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def spy(model: LlamaForCausalLM, batch: Batch, compute: Compute, weights: None) -> float:
        seen.extend(row[:n] for row, n in zip(batch.ids.tolist(), batch.lengths(), strict=True))
        return train_step(model, batch, compute, weights)

    monkeypatch.setattr("apprentice.sft.train_step", spy)
    run(Recorder(), epochs=2)
    wanted = sorted(row[:n] for row, n in zip(TRAIN.ids.tolist(), TRAIN.lengths(), strict=True))
    assert sorted(seen[:10]) == sorted(seen[10:]) == wanted
    assert seen[:10] != seen[10:]


def test_G6_the_seed_decides_the_weights() -> None:
    hashes = [hash_of(run(Recorder(), seed)[0]) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


# --- weights of tokens ---


def token_weights(batch: Batch = TRAIN) -> Tensor:
    """Weights between 1/2 and 3/2 on every response token, 99 in the padding."""
    drawn = 0.5 + torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(5))
    return torch.where(batch.mask > 0, drawn, 99.0)


def tuned(given: Tensor | None, train: Batch = TRAIN, **changes: Any) -> tuple[LlamaForCausalLM, list[Any]]:
    """A model fine-tuned with weights, and the rows of its history."""
    model, recorder = tiny_llama(0), Recorder()
    config = sft_config(**changes)
    fine_tune(model, train, HeldOut(HELD_OUT), config, seed="0", compute=CPU, recorder=recorder, weights=given)
    return model, recorder.rows


def largest_difference(one: LlamaForCausalLM, other: LlamaForCausalLM) -> float:
    mine, others = weights(one), weights(other)
    return max(float((mine[name] - others[name]).abs().max()) for name in mine)


@pytest.mark.parametrize("budget", [1, 25, 16384])
def test_a_weighted_step_matches_a_loop_over_tokens(budget: int) -> None:
    rows, given = [7, 0, 3, 8], token_weights()
    model = tiny_llama(0).double()
    compute = Compute(CPU.device, CPU.dtype, budget)
    loss = train_step(model, TRAIN.rows(rows), compute, given[rows])
    slow, total, count = tiny_llama(0).double(), torch.zeros(()).double(), 0.0
    for row in rows:
        ids, p = TRAIN.ids[row].tolist(), int(TRAIN.prompt_lengths[row])
        for t in range(int(TRAIN.response_lengths[row])):
            logits = slow(torch.tensor([ids[: p + t]])).logits[0, -1]
            total = total - float(given[row, t]) * logits.softmax(-1)[ids[p + t]].log()
            count += float(given[row, t])
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert relative_error(gradient(model), gradient(slow)) < 1e-5


def test_weights_of_1_are_plain_fine_tuning_to_the_bit() -> None:
    plain, rows = tuned(None)
    weighted, same_rows = tuned(torch.where(TRAIN.mask > 0, 1.0, 99.0))
    assert hash_of(plain) == hash_of(weighted)
    assert rows == same_rows
    assert hash_of(tuned(token_weights())[0]) != hash_of(plain)


@pytest.mark.parametrize("factor", [2.0**-7, 4.0, 0.3])
def test_C2_a_common_factor_of_the_weights_changes_nothing_from_end_to_end(factor: float) -> None:
    (here, rows), (there, other_rows) = tuned(token_weights()), tuned(factor * token_weights())
    if math.log2(factor).is_integer():  # exact in floats
        assert hash_of(here) == hash_of(there)
        assert rows == other_rows
    assert largest_difference(here, there) < 1e-4
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in other_rows], abs=1e-5)
    assert largest_difference(here, tiny_llama(0)) > 1e-2


def test_C3_rows_of_weight_0_are_rows_deleted() -> None:
    kept = [0, 2, 3, 6, 9]
    given = token_weights()
    some = torch.zeros_like(given)
    some[kept] = given[kept]
    one, rows = tuned(some, batch_size=10, epochs=4)  # one batch an epoch, so that both see the same one
    other, fewer = tuned(given[kept], TRAIN.rows(kept), batch_size=10, epochs=4)
    assert largest_difference(one, other) < 1e-4
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in fewer], abs=1e-5)
    assert largest_difference(one, tuned(given, batch_size=10, epochs=4)[0]) > 1e-2


def test_C3_a_token_of_weight_0_teaches_nothing() -> None:
    batch = collate([[1], [2]], [[0, 1, END], [2, END]], END)
    given = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    losses = []
    for logit in (0.0, 5.0):  # how likely 1 is after 0, which the weights leave out
        model = markov([[0.0, logit, 0.0, 0.0], [0.0] * 4, [0.0] * 4, [0.0] * 4])
        losses.append((train_step(model, batch, CPU, given), train_step(model, batch, CPU)))
    # the other tokens are one in four each; unweighted, that of logit 5 is one of five tokens
    assert [weighted for weighted, _ in losses] == pytest.approx([math.log(4)] * 2, abs=1e-5)
    assert losses[0][1] - losses[1][1] == pytest.approx((math.log(4) - math.log(1 + 3 * math.exp(-5))) / 5, abs=1e-5)


def test_a_batch_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="leave rows of weight 0 out"):
        train_step(tiny_llama(0), TRAIN, CPU, torch.zeros_like(TRAIN.mask))


def test_weights_need_the_shape_of_the_responses() -> None:
    for wrong in (torch.ones(10), torch.ones(9, TRAIN.mask.size(1)), torch.ones(10, TRAIN.mask.size(1) + 1)):
        with pytest.raises(ValueError, match=r"weights: expected shape \(10, "):
            tuned(wrong)


# --- the rule that keeps an epoch by its gate ---


@pytest.mark.parametrize(
    ("gates", "kept"),
    [
        ([0.9, 0.8, 0.7, 0.6], 4),
        ([0.9, 0.5, 0.499, 0.9], 2),  # one half is enough; a later recovery does not count
        ([0.7, 0.2, 0.9, 0.9], 1),
        ([0.1, 0.9, 0.9, 0.9], 1),  # the first epoch is kept even when it fails
        ([0.1, 0.1, 0.1, 0.1], 1),
    ],
)
def test_the_last_epoch_up_to_which_the_gate_held_is_kept(gates: list[float], kept: int) -> None:
    model, given = tiny_llama(0), iter(gates)
    recorder = Epochs(model)
    held_out = HeldOut(HELD_OUT, lambda: next(given))
    config = sft_config(epochs=4, select="gate")
    result = fine_tune(model, TRAIN, held_out, config, seed="0", compute=CPU, recorder=recorder)
    assert result["epoch"] == kept
    assert hash_of(model) == recorder.weights[kept - 1]
    assert result["held_out_loss"] == result["held_out_loss_by_epoch"][kept - 1]
    assert [row["gate"] for row in recorder.rows] == [value for gate in gates for value in (None, None, gate)]


def test_the_gate_is_asked_about_the_weights_of_its_epoch() -> None:
    model, asked = tiny_llama(0), list[str]()
    recorder = Epochs(model)

    def holds() -> float:
        asked.append(hash_of(model))
        return 1.0

    config = sft_config(select="gate")
    fine_tune(model, TRAIN, HeldOut(HELD_OUT, holds), config, seed="0", compute=CPU, recorder=recorder)
    assert asked == recorder.weights
    assert len(set(asked)) == 3


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_interrupted_by_the_gates_rule_ends_in_the_same_weights(stop: int) -> None:
    def gated(recorder: Recorder, gates: list[float], first_weights: int = 0) -> tuple[str, dict[str, Any]]:
        given, model = iter(gates), tiny_llama(first_weights)
        held_out = HeldOut(HELD_OUT, lambda: next(given))
        config = sft_config(select="gate")
        found = fine_tune(model, TRAIN, held_out, config, seed="0", compute=CPU, recorder=recorder)
        return hash_of(model), found

    gates, broken, whole = [0.9, 0.6, 0.1], Keeping(keep_at=stop), Keeping()
    wanted = gated(whole, gates)
    with pytest.raises(Interrupted):
        gated(broken, gates)
    resumed = Keeping(saved=broken.saved)
    assert gated(resumed, gates[stop // 3 :], first_weights=99) == wanted
    assert resumed.rows == whole.rows
    assert wanted[1]["epoch"] == 2


def test_the_gates_rule_needs_a_gate() -> None:
    with pytest.raises(ValueError, match="select: `gate` needs a gate"):
        run(Recorder(), select="gate")


def test_the_gate_by_hand() -> None:
    # after the prompt 0 the policy says 1, then ends, for sure; the base gives 1, 2 and the end a third each after 0
    # and ends with 1/2 after 1 and with 1/2 after 2
    never, ln = -60.0, math.log
    half = [never, ln(1 / 4), ln(1 / 4), ln(1 / 2)]
    base = markov([[never, 0, 0, 0], half, half, [0.0] * 4])
    policy = markov([[never, 0, never, never], [never, never, never, 0], [never, -1.0, never, 0], [0.0] * 4])
    # self-rewards: its own text "1 end": 0 - ln(1/3 1/2) = ln 6 = 1.79
    # "1 end" ties; "2 end": about -60 loses; "1 1 end": about -60 loses
    held_out = collate([[0], [0], [0]], [[1, END], [2, END], [1, 1, END]], 0)
    questions = GateQuestions(held_out, ["a", "b", "c"], 3, 5, END, "0/gate")
    assert gate(policy, base, questions, CPU) == [0.5, 0.0, 0.0]
    # a base that never says 1 after 0 makes its own text worth more than any other, and one that always does, less
    assert sequence_rewards(policy, base, held_out.rows([0]), CPU).tolist() == pytest.approx([ln(6)], abs=1e-4)


def test_a_gate_share_counts_wins_over_the_models_own_samples() -> None:
    # policy: 1 or 2 with equal chance, then the end; base: 1 with 3/4, 2 with 1/4. Rewards: ln(2/3) for 1, ln 2 for 2
    never, ln = -60.0, math.log
    policy = markov([[never, 0, 0, never], [never, never, never, 0], [never, never, never, 0], [0.0] * 4])
    base = markov([[never, ln(3), 0, never], [never, never, never, 0], [never, never, never, 0], [0.0] * 4])
    held_out = collate([[0]] * 2, [[1, END], [2, END]], 0)
    low, high = gate(policy, base, GateQuestions(held_out, ["same", "same"], 400, 5, END, "0/gate"), CPU)
    # with n of the 400 samples a 1: "1" ties with n and beats none, "2" beats n and ties with the rest
    n = 2 * low * 400
    assert abs(n - 200) < 4 * 10  # 4 sigma of a fair coin
    assert high == pytest.approx((n + 0.5 * (400 - n)) / 400, abs=1e-6)


def test_a_tie_is_a_tie_whatever_the_shape_of_the_batch() -> None:
    # the demonstrations are the model's own samples: scored beside others, their rewards differ by roundings
    policy, base = tiny_llama(0, vocab=12, hidden_size=64), tiny_llama(1, vocab=12, hidden_size=64)
    keys = [f"k{i}" for i in range(12)]
    requests = [Request([0, 1, 2][: 1 + i % 3], key) for i, key in enumerate(keys)]
    own = sample(policy, requests, seed="0/gate", end=END, max_new_tokens=12).batch
    prompts, answers = (
        [ids[a:b] for ids, a, b in zip(own.ids.tolist(), start, stop, strict=True)]
        for start, stop in (([0] * 12, own.prompt_lengths.tolist()), (own.prompt_lengths.tolist(), own.lengths()))
    )
    held_out = collate([*prompts, [4]], [*answers, [5] * 40 + [END]], END)
    shares = gate(policy, base, GateQuestions(held_out, [*keys, "long"], 1, 12, END, "0/gate"), CPU)
    assert shares[:12] == [0.5] * 12


def test_fine_tuning_trains_every_weight() -> None:
    before = {name: tensor.clone() for name, tensor in weights(tiny_llama(0)).items()}
    model, _ = run(Recorder())
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(model).items())
