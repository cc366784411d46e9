"""MLflow's side: the store, curves of history.csv as step metrics, and the run that follows a stage while it trains.

Stages write files and know no server; what is here reads those files. Trouble with tracking never ends a training.
"""

import csv
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.stage import ROOT, read_params, stores_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUNNING_LINE = "Running stage '"  # DVC prints it once the old outputs are gone and the command starts
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's UI shows its pages for agents
POLL = 2.0  # seconds between two looks at a growing file
BATCH = 1000  # metrics MLflow takes at once
_opening = threading.Lock()


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, or the database at the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{stores_root() / 'mlflow.db'}"


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold a lock file of the project, so that one process at a time does this."""
    path = stores_root() / ".telemetry" / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_store(experiment: str) -> tuple["MlflowClient", str]:
    """A client and the experiment's id; makes both database and experiment when they are not there yet.

    Two processes that first open a database together would race in its migration, hence the lock.
    """
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = store_uri()
    with _opening, alone("mlflow"):
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return client, client.create_experiment(experiment, artifact_location=_artifacts(uri, experiment), tags=KIND)
        if found.lifecycle_stage != "active":
            client.restore_experiment(found.experiment_id)
    return client, str(found.experiment_id)


def _artifacts(uri: str, experiment: str) -> str | None:
    """Beside a database that is a file; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlruns" / experiment).as_uri()


def find_run(client: "MlflowClient", experiment_id: str, tags: dict[str, str]) -> "list[Run]":
    """Runs that carry these tags, the newest first."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"]))


def flat(values: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one; {"mean", "low", "high"} becomes `name`, `name_low`, `name_high`."""
    if "mean" in values and set(values) >= {"low", "high"} and prefix:
        return {prefix: values["mean"], f"{prefix}_low": values["low"], f"{prefix}_high": values["high"]}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        found |= flat(value, separator, name) if isinstance(value, dict) else {name: value}
    return found


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The figures among nested values, as MLflow takes them: flat, finite."""
    found = {key: value for key, value in flat(values, "/").items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in found.items() if abs(value) < float("inf")}


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
    """Log rows as step metrics `training/<column>`; `span` gives the times (s) of the first and the last one."""
    from mlflow.entities import Metric

    begin, end = span or (time.time(), time.time())
    metrics = []
    for i, row in enumerate(rows):
        at = int(1000 * (begin + (end - begin) * (i + 1) / len(rows)))
        values = {f"training/{key}": value for key, value in row.items() if key != "step"}
        metrics += [Metric(key, value, at, int(row["step"])) for key, value in values.items() if abs(value) < float("inf")]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics[start : start + BATCH])


def missing_rows(client: "MlflowClient", run_id: str, rows: list[dict[str, float]]) -> list[dict[str, float]] | None:
    """The rows a run has not got yet; None when it has others in their place, so that it went differently."""
    column = next((key for row in rows[:1] for key in row if key != "step"), None)
    if column is None:
        return rows
    logged = {metric.step: metric.value for metric in client.get_metric_history(run_id, f"training/{column}")}
    if any(logged.get(row["step"], row.get(column)) != row.get(column) for row in rows):
        return None
    return [row for row in rows if row["step"] not in logged]


class LiveRun(threading.Thread):
    """Follows a history.csv into a run tagged with the stage's key, which `register` adopts."""

    def __init__(self, stage: str, history: Path, warn: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name=f"tracking {stage}")
        self.stage, self.history, self.warn = stage, history, warn
        self.status = "FINISHED"
        self.done = threading.Event()

    def run(self) -> None:
        """Log rows as they appear, until `finish`."""
        try:
            self._follow()
        except Exception as error:
            self.warn(f"no live charts for {self.stage}: {type(error).__name__}: {error}; `register` will add them")

    def _follow(self) -> None:
        while not (rows := read_history(self.history)) and not self.done.wait(POLL):
            pass
        if not rows:
            return
        client, run_id = self._open(rows)
        count, last = 0, False
        while not last:
            last = self.done.is_set()  # asked before reading, so that the last rows are read after the end
            rows = read_history(self.history)
            if rows[count:]:
                log_rows(client, run_id, [row for row in rows[count:] if row["step"] not in self.logged])
                count = len(rows)
            if not last:
                self.done.wait(POLL)
        client.set_terminated(run_id, self.status)

    def _open(self, rows: list[dict[str, float]]) -> tuple["MlflowClient", str]:
        """The unfinished run of an earlier try when it agrees with the rows so far, else a new one."""
        from tasks.dvcstage import current_inputs

        key, params = current_inputs(self.stage)
        client, experiment = open_store(read_params(ROOT / "params.yaml").register.experiment)
        tags = {"dvc.stage": self.stage, "dvc.inputs": key}
        self.logged: set[float] = set()
        for run in find_run(client, experiment, tags):
            if "dvc.md5" not in run.data.tags and missing_rows(client, run.info.run_id, rows) is not None:
                self.logged = steps_of(client, run)
                client.update_run(run.info.run_id, "RUNNING")
                return client, run.info.run_id
        run = client.create_run(experiment, tags=tags, run_name=f"{self.stage} {key[:6]}")
        log_params(client, run.info.run_id, params)
        return client, run.info.run_id

    def finish(self, status: str, patience: float = 60.0) -> None:
        """Log what is left and close the run; waits no longer than `patience` seconds for MLflow."""
        self.status = status
        self.done.set()
        self.join(patience)


def steps_of(client: "MlflowClient", run: "Run") -> set[float]:
    """Steps of the training curve that a run has."""
    name = next((name for name in sorted(run.data.metrics) if name.startswith("training/")), None)
    return {metric.step for metric in client.get_metric_history(run.info.run_id, name)} if name else set()


def log_params(client: "MlflowClient", run_id: str, params: dict[str, Any]) -> None:
    """Log nested params under dotted names."""
    from mlflow.entities import Param

    found = [Param(key, str(value)[:6000]) for key, value in flat(params, ".").items()]
    for start in range(0, len(found), 100):
        client.log_batch(run_id, params=found[start : start + 100])


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
