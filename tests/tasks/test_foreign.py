"""The donor of another initialisation: killed in either of its trainings, it goes on from there."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tasks.resume import StageRecorder
from tasks.stage import Stage
from tests.main_line import run_here
from tests.tasks.test_roles import SMALL, bytes_under

SETTINGS = {
    **SMALL,
    "runtime.checkpoint_steps": 1,
    "compute.device": "cpu",
    "foreign.steps": 3,
    "foreign.epochs": 1,
    "foreign.batch_size": 8,  # of 24 rows: three steps
}


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_in_either_training_it_goes_on_and_ends_with_the_same_bytes(
    stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    whole_step = StageRecorder.step

    def step(self: StageRecorder, *given: Any) -> None:
        if len(taken) in kills:
            kills.remove(len(taken))
            raise Killed
        whole_step(self, *given)
        taken.append(f"{self.unit} {given[0]}")

    monkeypatch.setattr(StageRecorder, "step", step)
    kills: list[int] = []
    for name in ("ingest", "tokenizer"):
        run_here(stage_of(name, **SETTINGS))
    models = stage_of("foreign", **SETTINGS).data / "models"

    def run() -> dict[str, bytes]:
        stage = stage_of("foreign", **SETTINGS)
        for name in ("foreign", "foreign_base"):  # as DVC does
            shutil.rmtree(models / name, ignore_errors=True)
        run_here(stage)
        return {name: data for name, data in bytes_under(models).items() if name.startswith("foreign")} | {
            str(path): path.read_bytes() for path in stage.reports.iterdir()
        }

    undisturbed, steps = run(), list(taken)
    assert steps == [f"{unit} {n}" for unit in ("step", "tuning step") for n in (1, 2, 3)]
    taken.clear()
    kills += [2, 5]
    for _ in range(2):
        with pytest.raises(Killed):
            run()
    assert run() == undisturbed and taken == steps  # nothing that was saved is done again
