"""A run in MLflow for every stage that dvc.lock records: params, curve, final metrics, times, device."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.locked import LockedStage
from tasks.stage import stores_root
from tasks.store import BATCH, find_run, log_params, numbers
from tasks.telemetry import Execution, execution_of
from tasks.tracking import log_rows, read_history, rows_to_add

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run


class Runs:
    """The runs of one MLflow experiment; `origin` is tagged on new ones (seed, commit, `dvc exp run` name)."""

    def __init__(self, client: "MlflowClient", group: str, origin: dict[str, str]) -> None:
        self.client, self.group, self.origin = client, group, origin

    def of(self, stage: LockedStage) -> "Run":
        """The stage's run, complete: the one that has its hash, else a live one of the same inputs, else a new one."""
        md5 = stage.model.md5 if stage.model else digest({out.path: out.md5 for out in stage.outs})
        known = find_run(self.client, self.group, {"dvc.stage": stage.name, "dvc.inputs": stage.key})
        for run in known:
            if run.data.tags.get("dvc.md5") == md5:
                return run
        rows = read_history(stage.history.only_file()) if stage.history else []
        execution = _execution(stage)
        for run in known:
            if "dvc.md5" not in run.data.tags:
                missing = rows_to_add(self.client, run, rows)
                if missing is not None:
                    return self._complete(run, stage, md5, missing, execution)
        return self._complete(self._new(stage, execution), stage, md5, rows, execution)

    def _new(self, stage: LockedStage, execution: Execution | None) -> "Run":
        start = int(1000 * execution.began) if execution else None
        tags = {"dvc.stage": stage.name, "dvc.inputs": stage.key}
        return self.client.create_run(self.group, start, tags, f"{stage.name} {stage.key[:6]}")

    def _complete(
        self, run: "Run", stage: LockedStage, md5: str, rows: list[dict[str, float]], execution: Execution | None
    ) -> "Run":
        """Add what the run lacks; the hash of its output goes last, as the mark that all is there."""
        run_id = run.info.run_id
        log_params(self.client, run_id, stage.params, run.data.params)
        self.client.log_inputs(run_id, _datasets(stage))
        log_rows(self.client, run_id, rows, (execution.began, execution.ended) if execution else None)
        self.set_metrics(run_id, figures_of(stage) | (execution.figures() if execution else {}))
        for out in stage.outs:
            if Path(out.path).suffix in (".html", ".md"):  # in DVC's cache a file is called by its hash
                self.client.log_text(run_id, out.only_file().read_text(encoding="utf-8"), Path(out.path).name)
        for key, value in {**self.origin, **(execution.tags() if execution else {})}.items():
            self.client.set_tag(run_id, key, value)
        end = run.info.end_time or (int(1000 * execution.ended) if execution else None)
        self.client.set_terminated(run_id, "FINISHED", end)
        self.client.set_tag(run_id, "dvc.md5", md5)
        return self.client.get_run(run_id)

    def set_metrics(self, run_id: str, values: dict[str, float]) -> None:
        """Make these the run's latest values; only what differs is logged."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now, known = get_current_time_millis(), self.client.get_run(run_id).data.metrics
        metrics = [Metric(key, value, now, 0) for key, value in values.items() if known.get(key) != value]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics[start : start + BATCH])


def _datasets(stage: LockedStage) -> "list[DatasetInput]":
    """The tables a stage read, under DVC's own hashes."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    used = [InputTag("mlflow.data.context", "training" if stage.model else "input")]
    return [
        DatasetInput(Dataset(path, md5, "dvc", json.dumps({"path": path, "md5": md5})), used)
        for path, md5 in stage.tables.items()
    ]


def _execution(stage: LockedStage) -> Execution | None:
    kept = stage.metrics or stage.outs[0]
    path = next(iter((kept.files or {}).values()), None)
    return execution_of(stores_root(), stage.name, path.stat().st_mtime) if path else None


def figures_of(stage: LockedStage) -> dict[str, float]:
    """A stage's own metrics; of the report the means of its models."""
    values = stage.metrics.json() if stage.metrics else {}
    return means_of(numbers({"report": values["models"]} if "models" in values else values))


def means_of(figures: dict[str, float]) -> dict[str, float]:
    """Figures without the bounds of their intervals: a run draws a chart for each, a model's page lists them all."""
    bounds = {f"{key}{end}" for key in figures for end in ("_low", "_high")}
    return {key: value for key, value in figures.items() if key not in bounds}


def digest(value: Any) -> str:
    """Hex md5 of a JSON value."""
    return hashlib.md5(json.dumps(value, sort_keys=True, default=str).encode(), usedforsecurity=False).hexdigest()
