"""What every stage shares: its command line, its errors, its history and metrics."""

import json
from pathlib import Path

import pytest
import yaml

from tasks.history import History, rows_of
from tasks.preset import apply
from tasks.stage import SETTINGS, Stage, read_params
from tests.conftest import Project
from tests.imports import pipelines

STAGES = [name for path in pipelines() for name in yaml.safe_load(path.read_text())["stages"]]


@pytest.mark.parametrize("name", STAGES)
def test_help_helps_and_loads_nothing_heavy(name: str, project: Project) -> None:
    done = project.run("-X", "importtime", "-m", f"tasks.{name}", "--help")
    assert done.returncode == 0 and f"section `{SETTINGS.get(name, name)}`" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tasks.stage" in loaded
    assert not loaded & {"torch", "transformers", "mlflow", "prefect", "great_expectations", "pandas", "dvc", "scipy"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("srppo__kl_coeff", 0.5, "srppo.kl_coeff: no such entry in srppo; did you mean 'kl_coef'?"),
        ("sft__epochs", "three", "sft.epochs: expected a whole number, got str 'three'"),
        ("pairs__beta", -1.0, "pairs.beta: expected a number at least 0, got -1.0"),
    ],
)
def test_bad_params_stop_a_stage_before_any_work(key: str, value: object, said: str, project: Project) -> None:
    project.set(**{key: value})
    kept = project.path("data/clean/kept")
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier result")
    done = project.run("-m", "tasks.ingest")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert kept.exists()


def test_an_unknown_item_is_refused_with_the_known_ones(project: Project) -> None:
    done = project.run("-m", "tasks.evaluate", "nobody")
    assert done.returncode == 2 and "invalid choice: 'nobody'" in done.stderr and "srppo" in done.stderr


def test_what_a_killed_run_wrote_in_part_goes_when_the_stage_begins_again(project: Project) -> None:
    apply("smoke", project.root)
    project.without_git()
    folder = project.path("data/reports/ingest")
    folder.mkdir(parents=True)
    (folder / ".metrics.json.k1ll3d").write_text("{")
    done = project.run("-m", "tasks.ingest")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


def test_history_has_one_header_and_empty_cells_for_what_was_not_measured(tmp_path: Path) -> None:
    history = History(tmp_path / "deep" / "history.csv")
    history.start([{"step": 1, "loss": 0.5, "held_out_loss": None}])
    history.append({"step": 2, "loss": 1 / 3, "held_out_loss": 0.25})
    assert history.path.read_text() == "step,loss,held_out_loss\n1,0.5,\n2,0.333333,0.25\n"
    history.start([])
    assert not history.path.exists()


def test_progress_tells_rate_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tasks import stage as module

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    now = iter([0.0, 0.0, 2.0, 8.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    stage = Stage("sft", read_params())
    stage.start_clock()
    for step in (1, 2, 10):  # at 2, 8 and 20 seconds; a line at most every 5 seconds, and always the last
        stage.progress(step, 10, loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[sft] 2/10 loss 0.25 | 0.25 steps/s, 0:00:32 left",
        "[sft] 10/10 loss 0.25 | 0.5 steps/s, 0:00:00 left",
    ]
    events = [json.loads(line) for line in (tmp_path / ".telemetry" / "sft.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 10]


def test_rows_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,x\n1,\n2,3\n")
    assert list(rows_of(path)) == [{"id": "1", "x": ""}, {"id": "2", "x": "3"}]
