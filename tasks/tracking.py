"""The run in MLflow that follows a stage while it trains: rows of history.csv become step metrics.

Stages write files and know no server; what is here reads those files. Trouble with tracking neither ends nor holds up a
training: once MLflow answers again, it is asked what it has, and gets the rest.
"""

import csv
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.stage import ROOT, read_params
from tasks.store import BATCH, find_run, log_params, masked, open_store, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUNNING_LINE = "Running stage '"  # DVC prints it once the old outputs are gone and the command starts
POLL = 2.0  # seconds between two looks at a growing file
PAUSE = 30.0  # the most seconds between two tries of an MLflow that does not answer


def prepare_store() -> tuple[str, str]:
    """Make database and experiment before several processes come at once; the store's address, the experiment's id."""
    _client, experiment = open_store(read_params().register.experiment)
    return store_uri(), experiment


def read_history(path: Path) -> list[dict[str, float]]:
    """Complete rows of a history.csv that may still be growing."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    whole = text[: text.rfind("\n") + 1].splitlines()
    rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole)]
    return [{"step": i, **row} for i, row in enumerate(rows)]


def log_rows(
    client: "MlflowClient", run_id: str, rows: list[dict[str, float]], span: tuple[float, float] | None = None
) -> None:
    """Log rows as step metrics `curve/<column>` (a name that comes first); `span` is when they came, in seconds."""
    from mlflow.entities import Metric

    begin, end = span or (time.time(), time.time())
    batch: list[Metric] = []
    for i, row in enumerate(rows):
        at = int(1000 * (begin + (end - begin) * (i + 1) / len(rows)))
        values = {f"curve/{key}": value for key, value in row.items() if key != "step" and abs(value) < float("inf")}
        if len(batch) + len(values) > BATCH:  # whole rows at once: `missing_rows` looks at one column
            client.log_batch(run_id, batch)
            batch = []
        batch += [Metric(key, value, at, int(row["step"])) for key, value in values.items()]
    if batch:
        client.log_batch(run_id, batch)


def missing_rows(client: "MlflowClient", run_id: str, rows: list[dict[str, float]]) -> list[dict[str, float]] | None:
    """The rows a run has not got yet; None when it has others in their place, so that it went differently."""
    column = next((key for row in rows for key in row if key != "step"), None)
    if column is None:
        return rows
    logged = {metric.step: metric.value for metric in client.get_metric_history(run_id, f"curve/{column}")}
    if any(logged.get(row["step"], row.get(column)) != row.get(column) for row in rows):
        return None
    return [row for row in rows if row["step"] not in logged]


def rows_to_add(client: "MlflowClient", run: "Run", rows: list[dict[str, float]]) -> list[dict[str, float]] | None:
    """What an unfinished run lacks; None when it cannot be gone on with.

    One that was never closed is deleted: who followed the stage gave up or was killed, and what it sent may arrive yet.
    """
    if run.info.status == "RUNNING":
        client.delete_run(run.info.run_id)
        return None
    return missing_rows(client, run.info.run_id, rows)


class LiveRun(threading.Thread):
    """Follows a history.csv into a run tagged with the stage's key, which `register` adopts."""

    def __init__(self, stage: str, history: Path, warn: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name=f"tracking {stage}")
        self.stage, self.history, self.warn = stage, history, warn
        self.began, self.status = int(1000 * time.time()), "FINISHED"
        self.done = threading.Event()
        self.warned, self.left = False, False
        self.logged: set[float] = set()
        self._inputs: tuple[str, dict[str, Any]] | None = None
        self._open_run: tuple[MlflowClient, str] | None = None
        self._own: str | None = None  # id of the run, also after trouble

    def run(self) -> None:
        """Log rows as they appear, until `finish`; after trouble begin again with what MLflow has."""
        failures, last = 0, False
        while not last and not self.left:
            last = self.done.is_set()  # asked before reading, so that the last rows are read after the end
            try:
                self._look(last)
                failures = 0
            except Exception as error:
                self._open_run = None
                if not self.warned:
                    self._warn(f"no live charts for {self.stage}: {type(error).__name__}: {error}")
                failures += 1
            if not last:
                self.done.wait(min(POLL * 2**failures, PAUSE) if failures else POLL)

    def _look(self, last: bool) -> None:
        """Send the rows that MLflow has not got; the last time close the run too."""
        rows = read_history(self.history)
        if not rows:
            return
        client, run_id = self._open_run = self._open_run or self._open(rows)
        new = [row for row in rows if row["step"] not in self.logged]
        if new and not self.left:
            log_rows(client, run_id, new)
            self.logged.update(row["step"] for row in new)
        if last and not self.left:
            client.set_terminated(run_id, self.status)

    def _warn(self, what: str) -> None:
        self.warned = True
        self.warn(masked(f"{what}; training goes on, `register` will add what is missing"))

    def _open(self, rows: list[dict[str, float]]) -> tuple["MlflowClient", str]:
        """The run of an earlier try when it was closed and agrees with the rows so far, or our own; else a new one."""
        from tasks.dvcstage import current_inputs

        key, params = self._inputs = self._inputs or current_inputs(self.stage)
        client, experiment = open_store(read_params().register.experiment)
        if self.left:
            raise TimeoutError("answered too late")
        tags = {"dvc.stage": self.stage, "dvc.inputs": key}
        self.logged = set()
        for run in find_run(client, experiment, tags):
            if "dvc.md5" in run.data.tags:
                continue
            if run.info.run_id == self._own or rows_to_add(client, run, rows) is not None:
                self._own, self.logged = run.info.run_id, steps_of(client, run)
                client.update_run(run.info.run_id, "RUNNING")
                log_params(client, run.info.run_id, params, run.data.params)
                return client, run.info.run_id
        run = client.create_run(experiment, self.began, tags, f"{self.stage} {key[:6]}")
        self._own = run.info.run_id
        if self.left:
            client.delete_run(self._own)
            raise TimeoutError("answered too late")
        log_params(client, run.info.run_id, params)
        return client, run.info.run_id

    def finish(self, status: str, patience: float = 10.0) -> None:
        """Log what is left and close the run; waits no longer than `patience` seconds for MLflow, then sends nothing more."""
        self.status = status
        self.done.set()
        self.join(patience)
        if self.is_alive():
            self.left = True
            self._warn(f"MLflow does not answer, so the charts of {self.stage} may stop here")


def steps_of(client: "MlflowClient", run: "Run") -> set[float]:
    """Steps of the training curve that a run has."""
    name = next((name for name in sorted(run.data.metrics) if name.startswith("curve/")), None)
    return {metric.step for metric in client.get_metric_history(run.info.run_id, name)} if name else set()


@contextmanager
def followed(stage: str, outs: tuple[str, ...], warn: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Give a listener for DVC's lines; a stage with a history.csv that starts to run is followed into MLflow."""
    history = next((ROOT / out for out in outs if Path(out).name == "history.csv"), None)
    live: list[LiveRun] = []

    def listen(line: str) -> None:
        if history and not live and line.startswith(RUNNING_LINE):
            live.append(LiveRun(stage, history, warn))
            live[0].start()

    try:
        yield listen
    except BaseException as error:
        for run in live:
            run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    for run in live:
        run.finish("FINISHED")
