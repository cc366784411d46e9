"""Registered model versions in MLflow: one per checkpoint content, its tags, metrics and aliases.

A version is found again by its stage and the hash of its output, so registering twice changes nothing and a deleted store
comes back in full. It is made last: an attempt that is killed leaves a model without a version, and the next clears it away.
"""

import json
from typing import TYPE_CHECKING

from tasks.flavor import write_model
from tasks.locked import LockedOut, LockedStage
from tasks.runs import Runs, digest, means_of
from tasks.store import BATCH, flat

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

ABOUT = (
    "Checkpoints of dvc.yaml and methods/dvc.yaml. Aliases name the method that made them, the tag `labels` what it learned "
    "from beside demonstrations; `champion` is the best of the main line."
)
SHOWN = "mlflow.modelVersions"  # the tag by which MLflow's page of models finds their versions


class Registry:
    """One registered model of one MLflow store."""

    def __init__(self, model: str, runs: Runs) -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(runs.client.tracking_uri)  # where MLflow looks up the model of a new version
        self.model, self.runs, self.client = model, runs, runs.client
        try:
            self.client.create_registered_model(model, description=ABOUT)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def find(self, stage: LockedStage, out: LockedOut) -> "ModelVersion | None":
        """The version with this checkpoint's content."""
        wanted = f"name = '{self.model}' and tags.`dvc.md5` = '{out.md5}' and tags.`dvc.stage` = '{stage.name}'"
        return next(iter(self.client.search_model_versions(wanted)), None)

    def complete(self, version: "ModelVersion", out: LockedOut) -> None:
        """Add what a version lacks: files that were lost, and what an attempt that broke off had not come to."""
        model = self.client.get_logged_model(model_id_of(version))
        write_model(self.client, model, out, version.run_id)
        if SHOWN not in (model.tags or {}):
            self.client.set_logged_model_tags(
                model.model_id, {SHOWN: json.dumps([{"name": self.model, "version": version.version}])}
            )

    def make(self, stage: LockedStage, out: LockedOut, run: "Run") -> "ModelVersion":
        """A new version of this checkpoint, to be completed."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        method, run_id = stage.meta["register"], run.info.run_id
        tags = {"method": method, "dvc.stage": stage.name, "dvc.md5": out.md5, "params_md5": digest(stage.params)}
        tags |= {"labels": stage.labels} | self.runs.origin
        name = f"{self.model}-{method}"
        for left in self.client.search_logged_models([self.runs.group], f"name = '{name}'"):
            if (left.tags or {}).get("dvc.md5") == out.md5:
                self.client.delete_logged_model(left.model_id)
        params = {key: str(value)[:250] for key, value in flat(stage.params, ".").items()}
        model = self.client.create_logged_model(self.runs.group, name, run_id, tags, params)
        write_model(self.client, model, out, run_id)
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return self.client.create_model_version(
            self.model,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            model_id=model.model_id,
            tags=tags,
            description=stage.description or None,
        )

    def describe(self, version: "ModelVersion", stage: LockedStage, sources: "list[tuple[Run, dict[str, float]]]") -> None:
        """Replace a version's metrics and its tags about them.

        `sources` are runs with the figures each found: first the run that made the checkpoint, which gets the means of all.
        """
        metrics = {key: value for _run, figures in sources for key, value in figures.items()}
        self.runs.set_metrics(sources[0][0].info.run_id, means_of(metrics))
        self._replace_metrics(self.client.get_logged_model(model_id_of(version)), sources)
        about = {"labels": stage.labels, "params_md5": digest(stage.params), "metrics_md5": digest(metrics)}
        for key, value in about.items():
            if version.tags.get(key) != value:
                self.client.set_model_version_tag(self.model, version.version, key, value)

    def _replace_metrics(self, model: "LoggedModel", sources: "list[tuple[Run, dict[str, float]]]") -> None:
        """Log a model's metrics where they are new or have changed.

        MLflow can only add. Where the store is a database the old ones go by SQL; on a server they stay, older than the new.
        """
        from mlflow.entities import Metric
        from mlflow.store.tracking.dbmodels.models import SqlLoggedModelMetric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        known = {metric.key: metric.value for metric in sorted(model.metrics or [], key=lambda metric: metric.timestamp)}
        wanted = {key: value for _run, figures in sources for key, value in figures.items()}
        outdated = [key for key, value in known.items() if wanted.get(key) != value]
        store = self.client._tracking_client.store
        if outdated and hasattr(store, "ManagedSessionMaker"):
            with store.ManagedSessionMaker() as session:
                rows = session.query(SqlLoggedModelMetric).filter(SqlLoggedModelMetric.model_id == model.model_id)
                rows.filter(SqlLoggedModelMetric.metric_name.in_(outdated)).delete()
        for run, figures in sources:
            new = {key: value for key, value in figures.items() if known.get(key) != value}
            logged = [Metric(key, value, now, 0, model_id=model.model_id, run_id=run.info.run_id) for key, value in new.items()]
            for start in range(0, len(logged), BATCH):
                self.client.log_batch(run.info.run_id, logged[start : start + BATCH])

    def aliases(self) -> dict[str, str]:
        """Alias to version."""
        return {key: str(value) for key, value in self.client.get_registered_model(self.model).aliases.items()}

    def point(self, alias: str, version: "ModelVersion") -> None:
        """Set an alias, unless it is there already."""
        if self.aliases().get(alias) != str(version.version):
            self.client.set_registered_model_alias(self.model, alias, version.version)

    def crown(self, version: "ModelVersion", rule: str) -> None:
        """Make a version the champion, tagged with the rule that chose it; the one before loses the tag."""
        before = self.aliases().get("champion")
        if before not in (None, str(version.version)):
            self.client.delete_model_version_tag(self.model, before, "selected_by")
        self.point("champion", version)
        if version.tags.get("selected_by") != rule:
            self.client.set_model_version_tag(self.model, version.version, "selected_by", rule)


def model_id_of(version: "ModelVersion") -> str:
    """The logged model behind a version; the database store forgets `model_id`, its source names it."""
    return str(version.model_id or version.source.removeprefix("models:/"))
