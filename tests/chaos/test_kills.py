"""The runner of kills: its schedule, its judgement, and each way to kill once, on a small stage."""

import random
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tasks.telemetry import Execution
from tests.chaos import kills
from tests.chaos.kills import Killed, Run, chaos, draw, kill_run, schedule, table
from tests.chaos.victim import Blow, Hit, Victim, Way, went_on
from tests.conftest import Project
from tests.toy import environment, knobs, make_toy, run

TRAINING = '''
"""Stands for a training: four pieces, then six steps, each saved."""
import json, pathlib, shutil, time
from apprentice.compute import CPU
from tasks.kept import keeping
from tasks.resume import StageRecorder
from tasks.stage import run
from tasks.unfinished import take


def main(stage):
    knobs = json.loads(pathlib.Path("knobs.json").read_text())
    if "last" in knobs.get("forgets", ()):
        shutil.rmtree(take(stage) / "last", ignore_errors=True)
    compute, recorder = keeping(stage, CPU), StageRecorder(stage)
    pieces = [compute.keep(lambda number=number: number) for number in range(4)]
    saved = recorder.resume()
    total = saved["total"] if saved else 0
    for step in range(len(recorder.rows) + 1, 7):
        time.sleep(knobs.get("step_seconds", 0.1))
        total += step * pieces[step % 4]
        recorder.step(step, 6, {"loss": total}, lambda: {"total": total})
    recorder.over(lambda: {"total": total})
    model = stage.data / "models" / "sft"
    model.mkdir(parents=True)
    (model / "weights").write_text(f"{total} {bool(saved and knobs.get('differs'))}")
    stage.metrics({"loss": total})


run(__name__, main, __doc__)
'''


def said(*events: dict[str, Any]) -> Execution:
    return Execution(({"event": "started", "time": 0.0}, *events))


def saved(unit: str, done: int) -> dict[str, Any]:
    return {"event": "saved", "unit": unit, "step": done, "time": 1.0}


def resumed(unit: str, done: int) -> dict[str, Any]:
    return {"event": "resumed", "unit": unit, "resumed_at": done, "time": 1.0}


def killed(before: dict[str, int], *later: Execution, **more: Any) -> Killed:
    hit = Hit("SIGKILL", 2.0, before, 0.5, more.pop("finished", False))
    about = {"run": 0, "stage": "judge", "way": "python", "of": 19, "same": True, **more}
    return Killed(**about, hit=hit, resumed=went_on(later))


def test_pieces_and_steps_are_counted_apart() -> None:
    before = {"piece": 16, "step": 3}
    assert killed(before, said(resumed("piece", 16), resumed("step", 3), saved("step", 4))).good
    assert not killed(before, said(resumed("piece", 16), saved("step", 1))).good  # the training from zero
    assert not killed(before, said(resumed("step", 3), saved("piece", 1))).good
    assert not killed(before, said(resumed("piece", 16), resumed("step", 2))).good
    assert killed({"piece": 7}, said(resumed("piece", 8), saved("piece", 9), saved("step", 1))).good


def test_from_zero_is_right_only_where_nothing_was_saved() -> None:
    assert killed({}, said(saved("step", 1))).good
    assert not killed({"step": 1}, said(saved("step", 1))).good
    assert not killed({}, said(saved("step", 1)), same=False).good


def test_a_run_killed_before_it_said_anything_is_judged_by_the_next() -> None:
    assert killed({"step": 3}, said(), said(resumed("step", 3))).good
    assert not killed({"step": 3}, said(saved("step", 1)), said(resumed("step", 5))).good


def test_a_stage_that_was_finished_may_stay_as_it_is_but_not_begin_anew() -> None:
    assert killed({"step": 3}, finished=True).good and killed({"step": 3}, said(), finished=True).good
    assert killed({"step": 3}, said(resumed("step", 3)), finished=True).good
    assert not killed({"step": 3}, said(saved("step", 1)), finished=True).good


def test_the_schedule_has_more_kills_than_runs_and_every_stage_and_way() -> None:
    labels = [f"stage{n}" for n in range(40)]
    plan, again, other = ([next(runs) for _ in range(100)] for runs in (schedule(labels, s) for s in (0, 0, 1)))
    told = [[(run.label, run.way, run.kills, run.rng.random()) for run in runs] for runs in (plan, again, other)]
    assert told[0] == told[1] != told[2]
    assert sum(run.kills for run in plan) == 120 and {run.kills for run in plan} == {1, 2}
    assert {run.label for run in plan} == set(labels)
    ways = [run.way for run in plan]
    assert ways.count("python") == 80 and min(ways.count("dvc"), ways.count("dvc alone")) >= 5


def test_a_third_of_the_kills_falls_at_any_moment_and_the_rest_after_saves() -> None:
    victim: Any = SimpleNamespace(saves=[("step", n) for n in range(1, 6)], seconds=lambda way: 10.0)
    blows = [draw(victim, "python", random.Random(n)) for n in range(900)]
    free = [blow.wait for blow in blows if blow.save is None]
    assert 250 < len(free) < 350 and all(sum(low <= wait < low + 1 for wait in free) > 10 for low in range(10))
    assert {blow.save for blow in blows} == {None, 0, 1, 2, 3, 4}
    assert all(0 <= blow.wait <= 0.1 for blow in blows if blow.save is not None)
    victim.saves = []
    assert all(draw(victim, "dvc", random.Random(n)).save is None for n in range(20))


def test_only_runs_that_were_killed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([[], [killed({})], [], [killed({}), killed({})], [killed({})]])
    monkeypatch.setattr(kills, "Victim", lambda *_: None)
    monkeypatch.setattr(kills, "kill_run", lambda *_: next(found))
    assert len(list(chaos(Project(kills.ROOT), 2, 0, {}, ["a", "b"]))) == 3 and len(next(found)) == 1


def test_the_table_tells_kills_and_runs_apart() -> None:
    went = said(resumed("step", 3))
    records = [
        killed({"step": 3}, went, run=0),
        killed({}, went, run=0, way="dvc"),
        killed({"step": 3}, said(saved("step", 1)), same=False, run=1, stage="sft"),
        killed({"step": 3}, finished=True, run=2, stage="sft"),
    ]
    head, kept, *_, judge, sft = table(records, 7).splitlines()
    assert head.startswith("Seed 7: 4 kills (3 by hand, 1 of DVC and its stage, 0 of DVC alone) in 3 runs.")
    assert head.endswith("2 of 3 identical.") and kept.startswith("3 kills fell after a save; after 2 of them ")
    kinds = "2 (SIGKILL by hand, SIGKILL of DVC and its stage)"
    assert judge == f"| judge | {kinds} | 1 | 1 | step 3; - | 19 | step 3; step 3 | 0.50 |"
    assert sft == "| sft | 2 (SIGKILL by hand, SIGKILL by hand) | 2 | 1 | step 3; step 3, finished | 19 | step 0; - | 0.50 |"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A toy whose stage `sft` is that training, built."""
    toy = make_toy(tmp_path_factory.mktemp("chaos") / "toy")
    toy.set(runtime__checkpoint_steps=1)
    pipeline = yaml.safe_load(toy.path("dvc.yaml").read_text())
    pipeline["stages"]["sft"]["cmd"] = "python -m tasks.sft"
    toy.path("dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    toy.path("tasks/sft.py").write_text(TRAINING)
    built = run(toy, "-m", "dvc", "repro", "sft")
    assert built.returncode == 0, built.stdout
    return toy


def strike(toy: Project, monkeypatch: pytest.MonkeyPatch, way: Way, blow: Blow) -> tuple[Victim, Killed]:
    monkeypatch.setattr(kills, "draw", lambda *_: blow)
    victim = Victim(toy, "sft", environment(toy))
    (record,) = kill_run(0, victim, Run("sft", way, 1, random.Random(0)))
    return victim, record


@pytest.mark.slow
@pytest.mark.parametrize("way", ["python", "dvc", "dvc alone"])
def test_a_stage_killed_after_a_save_goes_on(toy: Project, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    knobs(toy, step_seconds=1.0)  # left alone by DVC the stage finds that out within a second, before it has ended
    lock = toy.path("dvc.lock").read_bytes()
    victim, record = strike(toy, monkeypatch, way, Blow(signal.SIGKILL, 5, 0.0))
    assert victim.saves == [("piece", n) for n in range(1, 5)] + [("step", n) for n in range(1, 7)]
    assert record.good and record.hit.saved["step"] >= 2 and not record.hit.finished, record
    assert record.resumed["piece"] == 4 and record.resumed["step"] >= record.hit.saved["step"]
    assert toy.path("dvc.lock").read_bytes() == lock


@pytest.mark.slow
def test_a_training_begun_anew_is_found_out_though_its_bytes_are_right(toy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs(toy, forgets=["last"])
    _, record = strike(toy, monkeypatch, "python", Blow(signal.SIGKILL, 5, 0.0))
    assert record.same and not record.kept and record.resumed == {"piece": 4, "step": 0}


@pytest.mark.slow
def test_other_bytes_are_found_out_though_the_stage_went_on(toy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs(toy, differs=True)
    _, record = strike(toy, monkeypatch, "python", Blow(signal.SIGKILL, 5, 0.0))
    assert record.kept and not record.same and not record.good
    knobs(toy)
    Victim(toy, "sft", environment(toy)).finish("python")


@pytest.mark.slow
def test_a_kill_before_the_first_save_may_begin_anew_and_the_time_is_measured_once(
    toy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs(toy)
    victim, record = strike(toy, monkeypatch, "dvc", Blow(signal.SIGKILL, None, 0.05))
    assert record.good and record.hit.saved == {} and record.resumed == {"piece": 0, "step": 0}
    took, runs = victim.seconds("python"), len(victim.executions())
    assert took > 0.6 and victim.seconds("python") == took and len(victim.executions()) == runs
