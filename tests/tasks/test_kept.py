"""Pieces of sampling and scoring: an interrupted run makes what is missing and nothing twice, and ends with the same bytes."""

import dataclasses
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apprentice.judge import in_micro_batches
from apprentice.policy import score
from apprentice.sampling import Request, sample
from tasks import stage as stage_module
from tasks.kept import keeping
from tasks.stage import Stage
from tests.apprentice.toys import END, SMALL, tiny_llama


@pytest.fixture
def stage(stage_of: Callable[..., Stage]) -> Stage:
    """A stage whose every piece is saved as soon as it is made."""
    made = stage_of("pairs", **{"runtime.checkpoint_steps": 1})
    made.__dict__["key"] = "0123"
    return made


class Killed(Exception):
    pass


def killing(make: Callable[[Any], Any], after: int) -> tuple[Callable[[Any], Any], list[int]]:
    """A maker that dies when called for the piece of number `after`, and the pieces that it made."""
    made: list[int] = []

    def one(number: int) -> Any:
        if number == after:
            raise Killed
        made.append(number)
        return make(number)

    return one, made


def pieces(stage: Stage, make: Callable[[int], Any], count: int = 6) -> list[Any]:
    keep = keeping(stage, SMALL).keep
    return [keep(lambda number=number: make(number)) for number in range(count)]  # type: ignore[misc]


def test_an_interrupted_run_makes_what_is_missing_only(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def make(number: int) -> Any:
        return [torch.full((2,), number / 3), {"n": number}]

    dying, made = killing(make, 4)
    with pytest.raises(Killed):
        pieces(stage, dying)
    again, more = killing(make, -1)
    found = pieces(stage, again)
    assert made == [0, 1, 2, 3] and more == [4, 5]
    assert all(torch.equal(piece[0], torch.full((2,), n / 3)) and piece[1] == {"n": n} for n, piece in enumerate(found))
    assert "continuing after piece 4" in capsys.readouterr().out
    lines = (stage_module.stores_root() / ".telemetry" / "pairs.jsonl").read_text().splitlines()
    told = [(event["event"], event["unit"], event.get("step"), event.get("resumed_at")) for event in map(json.loads, lines)]
    assert told[:4] == [("saved", "piece", n, None) for n in (1, 2, 3, 4)] and told[4] == ("resumed", "piece", None, 4)


def test_killed_again_and_again_it_comes_to_its_end(stage: Stage) -> None:
    made = []
    for after in (1, 2, 4, 5):
        dying, some = killing(lambda number: torch.tensor(number), after)
        with pytest.raises(Killed):
            pieces(stage, dying)
        made += some
    assert made == [0, 1, 2, 3, 4]
    assert torch.stack(pieces(stage, lambda number: torch.tensor(number))).tolist() == [0, 1, 2, 3, 4, 5]


def test_pieces_made_since_the_last_save_are_made_again(stage: Stage) -> None:
    runtime = dataclasses.replace(stage.params.runtime, checkpoint_steps=3)
    stage.params = dataclasses.replace(stage.params, runtime=runtime)
    dying, _ = killing(lambda number: torch.tensor(number), 5)
    with pytest.raises(Killed):
        pieces(stage, dying)
    again, made = killing(lambda number: torch.tensor(number), -1)
    assert torch.stack(pieces(stage, again)).tolist() == [0, 1, 2, 3, 4, 5] and made == [3, 4, 5]


def test_asked_to_stop_it_saves_what_is_made(stage: Stage) -> None:
    runtime = dataclasses.replace(stage.params.runtime, checkpoint_steps=None)  # none is due for half a minute
    stage.params = dataclasses.replace(stage.params, runtime=runtime)

    def asked(number: int) -> Any:
        if number == 2:
            stage.ask_to_stop(signal.SIGTERM, None)
        return torch.tensor(number)

    with pytest.raises(SystemExit) as stopped:
        pieces(stage, asked)
    assert stopped.value.code == 143
    stage.stop_signal = 0
    again, made = killing(lambda number: torch.tensor(number), -1)
    pieces(stage, again)
    assert made == [3, 4, 5]


def test_the_last_pieces_are_saved_too_and_asked_to_stop_after_them_the_stage_stops(stage: Stage) -> None:
    runtime = dataclasses.replace(stage.params.runtime, checkpoint_steps=None)  # none is due for half a minute
    stage.params = dataclasses.replace(stage.params, runtime=runtime)
    pieces(stage, lambda number: torch.tensor(number))
    stage.ask_to_stop(signal.SIGTERM, None)
    with pytest.raises(SystemExit) as stopped:
        stage.finish()
    assert stopped.value.code == 143
    again, made = killing(lambda number: torch.tensor(number), -1)
    assert torch.stack(pieces(stage, again)).tolist() == [0, 1, 2, 3, 4, 5] and not made


def test_other_work_meets_no_piece_and_a_finished_stage_leaves_none(stage: Stage) -> None:
    pieces(stage, lambda number: torch.tensor(number))
    stage.__dict__["key"] = "4567"
    other, made = killing(lambda number: torch.tensor(number), -1)
    pieces(stage, other)
    assert made == [0, 1, 2, 3, 4, 5]
    stage.finish()
    assert not (stage_module.stores_root() / ".resume" / "pairs" / "4567").exists()


def test_sampling_and_scoring_end_with_the_same_bytes_wherever_they_are_cut(stage: Stage) -> None:
    """Every place in turn; each piece of the model's work is done once."""
    model = tiny_llama(3, vocab=12)
    requests = [Request([0, 5, 7][: 1 + n % 3], str(n)) for n in range(4)]
    calls = {"left": 10**9}

    def counted(*_: object) -> None:
        if not calls["left"]:
            raise Killed
        calls["left"] -= 1

    def work(compute: Any) -> list[torch.Tensor]:
        rollout = sample(model, requests, seed="0", end=END, max_new_tokens=5, compute=compute)
        logps = score(model, rollout.batch, compute)
        sums = in_micro_batches(lambda rows: score(model, rollout.batch.rows(rows)).sum(1), rollout.batch.lengths(), compute)
        return [rollout.batch.ids, rollout.logps, rollout.ended, logps, sums]

    undisturbed = work(SMALL)
    handle = model.register_forward_pre_hook(counted)
    work(SMALL)
    total = 10**9 - calls["left"]
    for cut in range(total):
        stage.__dict__["key"] = str(cut)
        calls["left"] = cut
        with pytest.raises(Killed):
            work(keeping(stage, SMALL))
        calls["left"] = 10**9
        found = work(keeping(stage, SMALL))
        assert all(torch.equal(a, b) for a, b in zip(found, undisturbed, strict=True))
        assert 10**9 - calls["left"] <= total - cut + 5  # the passes of one cut response, at most, are made again
    handle.remove()
