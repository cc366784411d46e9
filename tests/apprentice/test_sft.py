"""Supervised fine-tuning: its gradient, the epoch it keeps, resuming; and the gate by hand."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.policy import weights
from apprentice.recorder import Recorder
from apprentice.rewards import sequence_rewards
from apprentice.sampling import Request, sample
from apprentice.sft import fine_tune, gate, held_out_loss, train_step
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import (
    END,
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
    result = fine_tune(model, TRAIN, HELD_OUT, sft_config(**changes), seed=seed, compute=CPU, recorder=recorder)
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


@pytest.mark.parametrize("budget", [1, 25, 60])
def test_G4_the_gradient_does_not_depend_on_the_split_or_the_order(budget: int) -> None:
    found = []
    for rows, compute in (
        (list(range(10)), CPU),
        (list(range(10)), Compute(CPU.device, CPU.dtype, budget)),
        (list(range(9, -1, -1)), Compute(CPU.device, CPU.dtype, budget)),
    ):
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
    result = fine_tune(model, TRAIN, HELD_OUT, config, seed=0, compute=CPU, recorder=recorder)
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
    result = fine_tune(model, TRAIN, HELD_OUT, config, seed=0, compute=CPU, recorder=recorder)
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

    def spy(model: LlamaForCausalLM, batch: Batch, compute: Compute) -> float:
        seen.extend(row[:n] for row, n in zip(batch.ids.tolist(), batch.lengths(), strict=True))
        return train_step(model, batch, compute)

    monkeypatch.setattr("apprentice.sft.train_step", spy)
    run(Recorder(), epochs=2)
    wanted = sorted(row[:n] for row, n in zip(TRAIN.ids.tolist(), TRAIN.lengths(), strict=True))
    assert sorted(seen[:10]) == sorted(seen[10:]) == wanted
    assert seen[:10] != seen[10:]


def test_G6_the_seed_decides_the_weights() -> None:
    hashes = [hash_of(run(Recorder(), seed)[0]) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


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
    options = {"samples": 3, "seed": 0, "end": END, "max_new_tokens": 5, "compute": CPU}
    assert gate(policy, base, held_out, ["a", "b", "c"], **options) == [0.5, 0.0, 0.0]
    # a base that never says 1 after 0 makes its own text worth more than any other, and one that always does, less
    assert sequence_rewards(policy, base, held_out.rows([0]), CPU).tolist() == pytest.approx([ln(6)], abs=1e-4)


def test_a_gate_share_counts_wins_over_the_models_own_samples() -> None:
    # policy: 1 or 2 with equal chance, then the end; base: 1 with 3/4, 2 with 1/4. Rewards: ln(2/3) for 1, ln 2 for 2
    never, ln = -60.0, math.log
    policy = markov([[never, 0, 0, never], [never, never, never, 0], [never, never, never, 0], [0.0] * 4])
    base = markov([[never, ln(3), 0, never], [never, never, never, 0], [never, never, never, 0], [0.0] * 4])
    held_out = collate([[0]] * 2, [[1, END], [2, END]], 0)
    low, high = gate(policy, base, held_out, ["same", "same"], samples=400, seed=0, end=END, max_new_tokens=5, compute=CPU)
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
    shares = gate(policy, base, held_out, [*keys, "long"], samples=1, seed=0, end=END, max_new_tokens=12, compute=CPU)
    assert shares[:12] == [0.5] * 12


def test_fine_tuning_trains_every_weight() -> None:
    before = {name: tensor.clone() for name, tensor in weights(tiny_llama(0)).items()}
    model, _ = run(Recorder())
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(model).items())
