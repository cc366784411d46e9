"""The run that follows a training, in a real MLflow database of its own."""

import pkgutil
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import store, tracking
from tasks.locked import LockedOut, LockedStage
from tasks.runs import Runs
from tasks.tracking import LiveRun, followed, missing_rows, read_history
from tests.toy import empty_store, wait_for

KEY = "0123456789abcdef"


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a history.csv; store and key are the test's own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "POLL", 0.05)
    monkeypatch.setattr("tasks.dvcstage.current_inputs", lambda stage: (KEY, {"seed": 3, "sft": {"epochs": 2}}))
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    return tmp_path / "history.csv"


def write(path: Path, *losses: float, tail: str = "") -> None:
    rows = [f"{step},{loss}\n" for step, loss in enumerate(losses, 1)]
    path.write_text("step,loss\n" + "".join(rows) + tail)


def live(path: Path, warn: Callable[[str], None] = pytest.fail) -> LiveRun:
    thread = LiveRun("sft", path, warn)
    thread.start()
    return thread


def runs() -> list[Any]:
    client, group = store.open_store("apprentice")
    return store.find_run(client, group, {"dvc.stage": "sft", "dvc.inputs": KEY})


def curve(run_id: str) -> list[tuple[int, float]]:
    client, _group = store.open_store("apprentice")
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "curve/loss")]


def test_a_row_that_is_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    assert read_history(path) == []
    write(path, 2.0, 1.5, tail="3,1")
    assert read_history(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_empty_cells_are_no_figures(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("step,loss,held_out\n1,2.0,\n2,1.0,3.0\n")
    assert read_history(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "held_out": 3.0}]


def test_figures_are_flat_and_finite() -> None:
    values = {"in_domain": {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6}, "worst": float("nan")}, "note": "text", "n": 3}
    expected = {"in_domain/accuracy": 0.5, "in_domain/accuracy_low": 0.4, "in_domain/accuracy_high": 0.6, "n": 3.0}
    assert store.numbers(values) == expected


def test_the_chart_grows_while_the_stage_runs(history: Path) -> None:
    thread = live(history)
    write(history, 2.0)
    wait_for(runs)
    run_id = runs()[0].info.run_id
    wait_for(lambda: curve(run_id) == [(1, 2.0)])
    assert runs()[0].info.status == "RUNNING"
    write(history, 2.0, 1.0, 0.5)
    wait_for(lambda: len(curve(run_id)) == 3)
    thread.finish("FINISHED")
    (run,) = runs()
    assert run.info.status == "FINISHED" and curve(run_id) == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert run.data.params == {"seed": "3", "sft.epochs": "2"}


def test_rows_written_just_before_the_end_are_not_lost(history: Path) -> None:
    thread = LiveRun("sft", history, pytest.fail)
    write(history, 2.0, 1.0)
    thread.done.set()
    thread.start()
    thread.finish("FINISHED")
    assert len(curve(runs()[0].info.run_id)) == 2


def test_a_stage_that_goes_on_after_a_kill_goes_on_in_its_run_without_doubles(history: Path) -> None:
    write(history, 2.0, 1.0)
    live(history).finish("KILLED")
    assert runs()[0].info.status == "KILLED"
    write(history, 2.0)  # resumed at its last snapshot, one step earlier
    thread = live(history)
    wait_for(lambda: runs()[0].info.status == "RUNNING")
    write(history, 2.0, 1.0, 0.5)
    thread.finish("FINISHED")
    assert curve(runs()[0].info.run_id) == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert len(runs()) == 1


def test_a_training_that_went_differently_gets_another_run(history: Path) -> None:
    write(history, 2.0, 1.0)
    live(history).finish("KILLED")
    write(history, 2.0, 1.1)
    live(history).finish("FINISHED")
    assert [len(curve(run.info.run_id)) for run in runs()] == [2, 2]


def test_missing_rows(history: Path) -> None:
    write(history, 2.0, 1.0)
    live(history).finish("FINISHED")
    client, _group = store.open_store("apprentice")
    run_id = runs()[0].info.run_id
    rows = read_history(history)
    assert missing_rows(client, run_id, rows) == []
    assert missing_rows(client, run_id, [*rows, {"step": 3, "loss": 0.1}]) == [{"step": 3, "loss": 0.1}]
    assert missing_rows(client, run_id, [{"step": 1, "loss": 7.0}]) is None


def test_trouble_with_tracking_is_a_warning(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://there")
    write(history, 2.0)
    said: list[str] = []
    live(history, said.append).finish("FINISHED")
    assert len(said) == 1 and "no live charts for sft" in said[0]


def test_a_server_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(store.StoreError, match="does not answer at http"):
        store.open_store("apprentice")


@pytest.mark.parametrize("address", ["http://ann:s3cret@127.0.0.1:9", "nonsense://ann:s3cret@there/x"])
def test_a_password_in_the_stores_address_is_never_printed(
    history: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    write(history, 2.0)
    said: list[str] = []
    live(history, said.append).finish("FINISHED")
    assert len(said) == 1 and "s3cret" not in said[0]


def test_what_is_masked_keeps_the_rest() -> None:
    assert (
        store.masked("at postgresql://ann:pw@host:5432/db, sqlite:///a@b.db")
        == "at postgresql://***@host:5432/db, sqlite:///a@b.db"
    )


def test_an_mlflow_that_hangs_holds_nobody_up(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "open_store", lambda name: time.sleep(5))
    write(history, 2.0)
    said: list[str] = []
    live(history, said.append).finish("FINISHED", patience=0.2)
    assert len(said) == 1 and "does not answer" in said[0]


def test_a_server_that_accepts_and_never_answers_holds_nobody_up(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        write(history, 2.0)
        said: list[str] = []
        thread = live(history, said.append)
        began = time.monotonic()
        thread.finish("FINISHED", patience=0.5)
        assert time.monotonic() - began < 5 and len(said) == 1 and "`register` will add what is missing" in said[0]
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("arrived", [True, False])
def test_charts_go_on_when_mlflow_comes_back_and_no_point_is_doubled(
    history: Path, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    """A connection that breaks tells nobody whether the points arrived."""
    whole, broken = tracking.log_rows, threading.Event()

    def log_rows(client: Any, run_id: str, rows: list[dict[str, float]]) -> None:
        if rows[0]["step"] == 2 and not broken.is_set():
            if arrived:
                whole(client, run_id, rows)
            broken.set()
            raise ConnectionError("reset")
        whole(client, run_id, rows)

    monkeypatch.setattr(tracking, "log_rows", log_rows)
    said: list[str] = []
    write(history, 2.0)
    thread = live(history, said.append)
    wait_for(lambda: runs() and curve(runs()[0].info.run_id))
    write(history, 2.0, 1.0)
    wait_for(broken.is_set)
    write(history, 2.0, 1.0, 0.5)
    (run,) = runs()
    wait_for(lambda: len(curve(run.info.run_id)) == 3)  # before the end
    thread.finish("FINISHED")
    assert curve(run.info.run_id) == [(1, 2.0), (2, 1.0), (3, 0.5)] and len(runs()) == 1
    assert len(said) == 1 and "reset" in said[0] and runs()[0].info.status == "FINISHED"


@pytest.mark.parametrize("at", ["tasks.tracking.open_store", "mlflow.MlflowClient.create_run"])
def test_what_was_given_up_writes_nothing_later(history: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """`register` may be at the same run by then."""
    whole, go = pkgutil.resolve_name(at), threading.Event()
    monkeypatch.setattr(at, lambda *what: (go.wait(60), whole(*what))[1])
    write(history, 2.0)
    said: list[str] = []
    thread = live(history, said.append)
    thread.finish("FINISHED", patience=0.2)
    go.set()
    thread.join(30)
    assert not thread.is_alive() and runs() == []


def test_points_under_way_when_it_was_given_up_are_not_doubled(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They arrive after `register` has looked which there are."""
    whole, asked, go = tracking.log_rows, threading.Event(), threading.Event()

    def late(*what: Any) -> None:
        asked.set()
        go.wait(60)
        whole(*what)

    write(history, 2.0, 1.0)
    monkeypatch.setattr(tracking, "log_rows", late)
    said: list[str] = []
    thread = live(history, said.append)
    assert asked.wait(60)
    thread.finish("FINISHED", patience=0.2)
    monkeypatch.setattr(tracking, "log_rows", whole)
    client, group = store.open_store("apprentice")
    registered = Runs(client, group, {}).of(locked(history))
    go.set()
    thread.join(30)
    assert not thread.is_alive() and [run.info.run_id for run in runs()] == [registered.info.run_id]
    assert curve(registered.info.run_id) == [(1, 2.0), (2, 1.0)] and registered.info.status == "FINISHED"


def locked(history: Path) -> LockedStage:
    """The stage as dvc.lock has it once it has ended."""
    out = LockedOut("data/reports/sft/history.csv", "ab", False, {"": history})
    return LockedStage("sft", "dvc.yaml", "none", "", {}, KEY, {"seed": 3}, {}, (out,), False)


def test_a_batch_ends_with_a_whole_row(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "BATCH", 5)
    sent: list[list[tuple[str, int]]] = []

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            sent.append([(metric.key[6:], metric.step) for metric in metrics])

    tracking.log_rows(Client(), "run", [{"step": step, "a": 1.0, "b": 2.0} for step in (1, 2, 3)])
    assert sent == [[("a", 1), ("b", 1), ("a", 2), ("b", 2)], [("a", 3), ("b", 3)]]


def test_only_a_stage_that_really_runs_is_followed(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ROOT", history.parent)
    write(history, 2.0)
    with followed("sft", ("history.csv",), pytest.fail) as listen:
        listen("Stage 'sft' didn't change, skipping")
    assert runs() == []
    with pytest.raises(RuntimeError), followed("sft", ("history.csv",), pytest.fail) as listen:
        listen("Running stage 'sft':")
        raise RuntimeError
    assert runs()[0].info.status == "FAILED"


def test_the_experiment_is_one_of_model_training(history: Path) -> None:
    (history.parent / "mlflow.db").unlink()
    client, group = store.open_store("apprentice")
    assert client.get_experiment(group).tags["mlflow.experimentKind"] == "custom_model_development"
    assert (history.parent / "mlflow.db").exists()
