"""The loop of every training from a table: each row once an epoch, resumed anywhere, the weights it ends with."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from apprentice.epochs import EpochEnd, Figures, Trained, train_epochs
from apprentice.finite import NumbersError
from apprentice.optimise import Optimiser, linear_decay
from apprentice.recorder import Recorder, State
from tests.apprentice.toys import Interrupted, Keeping, hash_of, rso_config, sft_config

INPUTS, WANTED = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
WEIGHT = 0.05


def never(measured: list[Figures]) -> bool:
    return False


class Run:
    """Least squares on ten rows, three batches an epoch: the model, the rows each step took, the weights after each epoch."""

    def __init__(self, start: int = 0, size: int = 10) -> None:
        torch.manual_seed(start)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        self.size, self.taken, self.after_epochs = size, list[list[int]](), list[str]()

    def step(self, rows: list[int]) -> Figures:
        self.taken.append(rows)
        loss = ((self.model(INPUTS[rows]) - WANTED[rows]) ** 2).mean()
        loss.backward()
        return {"loss": float(loss.detach()), "first": float(rows[0])}

    def measure(self) -> Figures:
        self.after_epochs.append(hash_of(self.model))
        with torch.no_grad():
            return {"whole_loss": float(((self.model(INPUTS) - WANTED) ** 2).mean())}

    def train(
        self,
        recorder: Recorder | None = None,
        keep: Callable[[list[Figures]], bool] | None = None,
        seed: str = "0",
        **changes: object,
    ) -> Trained:
        after = EpochEnd(("whole_loss",), self.measure, keep) if keep else None
        config = sft_config(**changes)
        return train_epochs(self.model, self.size, self.step, config, seed=seed, recorder=recorder or Recorder(), after=after)


@pytest.mark.parametrize(("size", "batch", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1])])
def test_every_row_comes_once_an_epoch(size: int, batch: int, sizes: list[int]) -> None:
    run = Run(size=size)
    run.train(epochs=3, batch_size=batch)
    assert [len(rows) for rows in run.taken] == sizes * 3
    for epoch in range(3):
        taken = run.taken[epoch * len(sizes) : (epoch + 1) * len(sizes)]
        assert sorted(row for rows in taken for row in rows) == list(range(size))


def test_the_order_is_fresh_each_epoch_and_the_seed_decides_it() -> None:
    orders = []
    for seed in ("0", "0", "1"):
        run = Run()
        run.train(seed=seed)
        orders.append([row for rows in run.taken for row in rows])
    first = orders[0]
    assert orders[1] == first != orders[2]
    assert len({tuple(first[i : i + 10]) for i in (0, 10, 20)}) == 3
    assert all(first[i : i + 10] != list(range(10)) for i in (0, 10, 20))


def test_the_weights_are_those_of_the_steps_written_out() -> None:
    run = Run()
    run.train(epochs=2, learning_rate=2e-2, max_grad_norm=0.3, warmup_share=0.5)
    slow = Run()
    adam = torch.optim.AdamW(slow.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for i, rows in enumerate(run.taken):
        adam.param_groups[0]["lr"] = 2e-2 * min(1, (i + 1) / 3) * max(0.1, 1 - i / 6)  # 6 steps, 3 of warm-up
        adam.zero_grad()
        slow.step(rows)
        nn.utils.clip_grad_norm_(slow.model.parameters(), 0.3)
        adam.step()
    for found, wanted in zip(run.model.parameters(), slow.model.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@dataclass(frozen=True)
class Decaying:
    """A section with weight decay, one step."""

    epochs: int = 1
    batch_size: int = 10
    learning_rate: float = 0.5
    warmup_share: float = 0.0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.2


def after_one_idle_step(config: object) -> Tensor:
    """What a weight of 1 becomes when its gradient is 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def step(rows: list[int]) -> Figures:
        model.weight.grad = torch.zeros_like(model.weight)
        return {"loss": 0.0}

    train_epochs(model, 10, step, config, seed="0", recorder=Recorder())
    return model.weight.detach().squeeze()


def test_weight_decay_is_the_configs() -> None:
    assert float(after_one_idle_step(Decaying())) == pytest.approx(1 - 0.5 * 0.2)
    assert float(after_one_idle_step(Decaying(weight_decay=0.0))) == 1
    assert float(after_one_idle_step(sft_config(weight_decay=0.5, learning_rate=0.1, epochs=1, batch_size=10))) < 1
    assert float(after_one_idle_step(rso_config(epochs=1, batch_size=10))) == 1


def test_means_are_those_of_the_last_epoch_alone() -> None:
    run, recorder = Run(), Recorder()
    trained = run.train(recorder, epochs=3)
    for name in ("loss", "first"):
        assert trained.means[name] == pytest.approx(sum(row[name] for row in recorder.rows[-3:]) / 3)
        assert trained.means[name] != pytest.approx(sum(row[name] for row in recorder.rows) / 9)
    assert trained.means.keys() == {"loss", "first"}
    assert (trained.measured, trained.kept) == ([], 3)


def test_rows_hold_what_was_measured_at_the_ends_of_epochs_only() -> None:
    run, recorder = Run(), Recorder()
    trained = run.train(recorder, keep=never, epochs=2)
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in recorder.rows] == [1, 1, 1, 2, 2, 2]
    measured = [figures["whole_loss"] for figures in trained.measured]
    assert [row["whole_loss"] for row in recorder.rows] == [None, None, measured[0], None, None, measured[1]]
    assert measured[0] != measured[1]
    columns = ["step", "whole_loss", "loss", "first", "grad_norm", "learning_rate", "epoch"]
    assert [list(row) for row in recorder.rows] == [columns] * 6  # a table has one header


@pytest.mark.parametrize(
    ("keeps", "kept"),
    [([0, 0, 0, 0], 4), ([1, 0, 0, 0], 1), ([1, 0, 1, 0], 3), ([0, 1, 0, 0], 2), ([0, 0, 0, 1], 4)],
)
def test_the_last_epoch_that_keep_picked_gives_the_weights(keeps: list[int], kept: int) -> None:
    run, asked = Run(), list[int]()

    def keep(measured: list[Figures]) -> bool:
        asked.append(len(measured))
        return bool(keeps[len(measured) - 1])

    trained = run.train(keep=keep, epochs=4)
    assert trained.kept == kept
    assert hash_of(run.model) == run.after_epochs[kept - 1]
    assert len(set(run.after_epochs)) == 4
    assert asked == [1, 2, 3, 4]  # the figures of all epochs so far
    assert len(trained.measured) == 4


def test_keep_sees_the_figures_in_order() -> None:
    run, seen = Run(), list[list[Figures]]()
    trained = run.train(keep=lambda measured: bool(seen.append(list(measured))))
    assert seen == [trained.measured[:1], trained.measured[:2], trained.measured]


def second(measured: list[Figures]) -> bool:
    return len(measured) == 2


@pytest.mark.parametrize("keep", [None, never, second])
@pytest.mark.parametrize("stop", range(1, 10))  # three steps an epoch, three epochs: inside, at the end of one, of all
def test_a_run_resumed_anywhere_is_bit_identical(keep: Callable[[list[Figures]], bool] | None, stop: int) -> None:
    options = {"keep": keep, "learning_rate": 3e-2, "weight_decay": 0.1}
    whole, broken = Keeping(), Keeping(keep_at=stop)
    undisturbed = Run()
    wanted = undisturbed.train(whole, **options)
    with pytest.raises(Interrupted):
        Run().train(broken, **options)
    resumed, again = Keeping(saved=broken.saved), Run(start=9)
    assert again.train(resumed, **options) == wanted
    assert hash_of(again.model) == hash_of(undisturbed.model)
    assert resumed.rows == whole.rows
    assert len(again.taken) == 9 - stop  # nothing is done twice


def test_what_a_snapshot_holds() -> None:
    states, moved = list[State](), list[bool]()

    class Snapshots(Recorder):
        def step(self, done, total, row, state):
            states.append(state())
            best, now = states[-1]["best"], states[-1]["model"]
            moved.append(any(not torch.equal(best[name], now[name]) for name in best))

    Run().train(Snapshots(), keep=second)
    assert [state["step"] for state in states] == list(range(1, 10))
    assert [len(state["measured"]) for state in states] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [len(state["tail"]) for state in states] == [1, 2, 3, 3, 3, 3, 3, 3, 3]  # an epoch's figures, not all of them
    assert [state["kept"] for state in states] == [3] * 5 + [2] * 4
    assert [bool(state["best"]) for state in states] == [False] * 5 + [True] * 4
    assert moved == [False] * 6 + [True] * 3  # the weights kept are a copy


def test_frozen_weights_stay() -> None:
    run = Run()
    run.model[0].requires_grad_(False)
    before = [hash_of(part) for part in (run.model[0], run.model[2])]
    run.train()
    assert hash_of(run.model[0]) == before[0]
    assert hash_of(run.model[2]) != before[1]


def test_the_rate_follows_the_schedule_over_all_epochs() -> None:
    recorder = Recorder()
    Run().train(recorder, epochs=2, learning_rate=1e-2, warmup_share=0.5)
    schedule = linear_decay(6, 0.5)
    assert [row["learning_rate"] for row in recorder.rows] == pytest.approx([1e-2 * schedule(i) for i in range(6)])


def test_an_empty_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Optimiser, "step", lambda _: pytest.fail("there is nothing to learn from"))
    with pytest.raises(ValueError, match="at least one row to train on, got 0"):
        Run(size=0).train()


@pytest.mark.parametrize("figure", ["loss", "first"])
def test_a_figure_that_is_not_finite_stops_before_its_step(figure: str) -> None:
    run, recorder, hashes = Run(), Recorder(), list[str]()
    fine = run.step

    def step(rows: list[int]) -> Figures:
        hashes.append(hash_of(run.model))
        return fine(rows) | ({figure: float("nan")} if len(hashes) == 5 else {})

    run.step = step  # type: ignore[method-assign]
    with pytest.raises(NumbersError, match=rf"step 5 of 9: .*{figure} nan"):
        run.train(recorder, epochs=3)
    assert len(recorder.rows) == 4 and hash_of(run.model) == hashes[-1] != hashes[-2]


class Broken(Run):
    """The same with steps, by their number from 1, whose loss is NaN or one of whose gradients is infinite."""

    def __init__(self, broken: dict[int, str], **more: int) -> None:
        super().__init__(**more)
        self.broken = {tuple(batch): broken[n] for n, batch in enumerate(BATCHES, 1) if n in broken}

    def step(self, rows: list[int]) -> Figures:
        figures, how = super().step(rows), self.broken.get(tuple(rows))
        if how == "gradient":
            next(self.model.parameters()).grad[0] = float("inf")  # type: ignore[index]
        return {**figures, "loss": float("nan")} if how == "loss" else figures


def batches_of_three_epochs() -> list[list[int]]:
    run = Run()
    run.train()
    return run.taken


BATCHES = batches_of_three_epochs()
SKIPPED = {2: "loss", 3: "gradient", 7: "gradient", 9: "loss"}  # inside an epoch, at the end of one, of all
OPTIONS = {"learning_rate": 3e-2, "weight_decay": 0.1, "warmup_share": 0.5}


def test_a_skipped_step_is_as_if_its_batch_had_not_been_there() -> None:
    run, recorder = Broken(SKIPPED), Keeping(skip_steps=2)
    trained = run.train(recorder, keep=never, **OPTIONS)
    without = Run()
    optimiser = Optimiser(without.model.parameters(), 3e-2, 1.0, linear_decay(9, 0.5), 0.1)
    figures = []
    for n, rows in enumerate(BATCHES, 1):
        if n not in SKIPPED:
            figures.append(without.step(rows))
            optimiser.clip()
            optimiser.step()
    assert hash_of(run.model) == hash_of(without.model)
    assert trained.means["loss"] == pytest.approx(sum(row["loss"] for row in figures[-3:]) / 3)
    assert (recorder.skipped, recorder.taken) == (4, 5)
    blank = {"loss": None, "first": None, "grad_norm": None, "learning_rate": None}
    for n, row in enumerate(recorder.rows, 1):
        assert list(row) == ["step", "whole_loss", "loss", "first", "grad_norm", "learning_rate", "epoch"]
        assert (row["epoch"], row["whole_loss"] is None) == ((n + 2) // 3, n % 3 > 0)
        assert (blank.items() <= row.items()) == (n in SKIPPED)
    assert [text.split(":")[0] for text in recorder.warnings] == [f"step {n} of 9" for n in SKIPPED]
    assert "loss nan" in recorder.warnings[0] and "grad_norm inf" in recorder.warnings[1]


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_run_with_skipped_steps_resumed_anywhere_is_bit_identical(stop: int) -> None:
    whole, broken = Keeping(skip_steps=2), Keeping(keep_at=stop, skip_steps=2)
    undisturbed = Broken(SKIPPED)
    wanted = undisturbed.train(whole, keep=second, **OPTIONS)
    with pytest.raises(Interrupted):
        Broken(SKIPPED).train(broken, keep=second, **OPTIONS)
    resumed, again = Keeping(saved=broken.saved, skip_steps=2), Broken(SKIPPED, start=9)
    assert again.train(resumed, keep=second, **OPTIONS) == wanted
    assert hash_of(again.model) == hash_of(undisturbed.model)
    assert (resumed.rows, resumed.skipped) == (whole.rows, 4)


def test_one_more_in_a_row_than_may_be_skipped_stops() -> None:
    recorder = Keeping(skip_steps=2)
    with pytest.raises(NumbersError, match=r"step 6 of 9: .*grad_norm inf.*, after 2 skipped in a row"):
        Broken({2: "loss", 4: "loss", 5: "gradient", 6: "gradient"}).train(recorder)
    assert len(recorder.rows) == 5


def test_a_measurement_that_is_not_finite_stops_whatever_the_rule() -> None:
    run, recorder = Run(), Recorder(skip_steps=9)
    run.measure = lambda: {"whole_loss": float("nan")}  # type: ignore[method-assign]
    with pytest.raises(NumbersError, match="after epoch 1 of 3: whole_loss nan"):
        run.train(recorder, keep=never)
    assert len(recorder.rows) == 2
