"""The loop of every training from a fixed table: epochs over shuffled rows, one optimiser step a batch, resumable anywhere."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from apprentice.finite import NumbersError, all_finite, listed
from apprentice.health import displaced
from apprentice.optimise import Optimiser, linear_decay
from apprentice.policy import put_weights, weights
from apprentice.recorder import Recorder, Row, State
from apprentice.sections import EpochsConfig
from apprentice.team import ALONE, Team

Figures = dict[str, float]


@dataclass(frozen=True)
class EpochEnd:
    """names: figures that `measure` returns after each epoch. keep: from the figures of all epochs so far, whether the weights
    of the last one are those to end with; if it never says so, the last epoch's stay."""

    names: tuple[str, ...]
    measure: Callable[[], Figures]
    keep: Callable[[list[Figures]], bool]


@dataclass(frozen=True)
class Trained:
    """means: the steps' figures averaged over the last epoch, or over as many steps where some of it were skipped. measured:
    the figures after each epoch. kept: the epoch whose weights the model has, from 1."""

    means: Figures
    measured: list[Figures]
    kept: int


def train_epochs(
    model: nn.Module,
    size: int,
    step: Callable[[list[int]], Figures],
    config: EpochsConfig,
    *,
    seed: str,
    recorder: Recorder,
    after: EpochEnd | None = None,
    team: Team = ALONE,
) -> Trained:
    """Train `model` in place on `size` rows; `step` gathers the gradient of a batch of row numbers and returns its figures: of
    a team each process gathers a share, and the figures are the sums. A sign in them is told before the step is taken.

    Rows of the recorder: what `after` measures (at an epoch's end), the step's figures, grad_norm, learning_rate, epoch.
    Raises ValueError for no rows; NumbersError at a figure or gradient that is not finite, by the recorder's rule, and at a
    measurement that is not: the weights themselves are broken then.
    """
    if size < 1:
        raise ValueError(f"train_epochs: expected at least one row to train on, got {size}")
    batches = -(-size // config.batch_size)
    total = config.epochs * batches
    schedule = linear_decay(total, config.warmup_share)
    optimiser = Optimiser(model.parameters(), config.learning_rate, config.max_grad_norm, schedule, config.weight_decay, team)
    start, kept = 0, config.epochs
    tail, measured, best = list[Figures](), list[Figures](), dict[str, Any]()
    if saved := recorder.resume():
        put_weights(model, saved["model"])
        optimiser.restore(saved["optimiser"])
        start, kept, tail, measured, best = (saved[name] for name in ("step", "kept", "tail", "measured", "best"))

    def state() -> State:
        progress = {"step": done + 1, "kept": kept, "tail": tail, "measured": measured, "best": best}
        return {"model": weights(model), "optimiser": optimiser.state(), **progress}

    for done in range(start, total):
        epoch, place = divmod(done, batches)
        order = random.Random(f"{seed}/{epoch}").sample(range(size), size)
        figures = step(order[place * config.batch_size : (place + 1) * config.batch_size])
        row: Row = {**figures, "grad_norm": optimiser.clip(), "learning_rate": optimiser.rate}
        where = f"step {done + 1} of {total}"
        if recorder.takes(where, row):
            if sign := displaced(figures, recorder.rows):
                recorder.bad_sign(f"{where}: {sign}")
            optimiser.step()
            tail = [*tail, figures][-batches:]
        else:
            optimiser.drop()
            row = dict.fromkeys(row)
        row["epoch"] = epoch + 1
        if after:
            found: dict[str, Any] = dict.fromkeys(after.names)
            if place == batches - 1:
                measured = [*measured, found := _measured(after, f"after epoch {epoch + 1} of {config.epochs}")]
                if after.keep(measured):
                    kept, best = epoch + 1, {name: tensor.clone() for name, tensor in weights(model).items()}
            row = {**found, **row}
        recorder.step(done + 1, total, row, state)
    recorder.over(state)
    if best:
        put_weights(model, best)
    means = {name: sum(row[name] for row in tail) / len(tail) for name in tail[0]}
    return Trained(means, measured, kept)


def _measured(after: EpochEnd, where: str) -> Figures:
    found = after.measure()
    if not all_finite(found):
        raise NumbersError(f"{where}: {listed(found)}")
    return found
