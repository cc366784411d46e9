"""MLflow mirrors the workspace, one pipeline file at a time: what `register` and `register_methods` share."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.lineage import NO_LABELS
from tasks.locked import LockedOut, LockedStage, git_commit, locked_stages
from tasks.registry import Registry
from tasks.runs import Runs, figures_of
from tasks.stage import MAIN_LINE, METHODS, ROOT, Stage, StageError, stores_root, write_json
from tasks.store import StoreError, alone, masked, numbers, open_store, store_uri, told_by_store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

STAMP = "ok\n"  # never changes: pipelines.dvc depends on its hash
PAUSES = (3.0, 10.0)  # seconds before MLflow is tried again
BROKEN_OFF = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")  # MLflow's codes for no answer, or a broken one


@dataclass(frozen=True)
class Line:
    """One pipeline file and what its last stages are called; `based_on` are stages elsewhere that its report reads too."""

    file: str
    evaluate: str
    report: str
    registry: str
    stamp: str
    page: str
    crowns: bool
    based_on: tuple[str, ...] = ()


MAIN = Line(MAIN_LINE, "evaluate", "report", "registry.json", "complete", "report.html", crowns=True)
FURTHER = Line(
    METHODS,
    "evaluate_methods",
    "report_methods",
    "registry_methods.json",
    "complete_methods",
    "methods.html",
    crowns=False,  # the champion is one of the main line, whichever of the two ran last
    based_on=("evaluate",),
)


def mirror(stage: Stage, line: Line) -> None:
    """Bring MLflow up to date with one pipeline file, then write what is registered and the stamp."""
    every = locked_stages()
    with alone("register"), told_by_store():
        open_store(stage.config.experiment)  # raises at once when nobody answers
        _insist(lambda: Mirror(stage, line, every).update(), stage.warn)
    own = [found for found in every if found.file == line.file]
    hashes = {found.name: found.model.md5 for found in own if found.model and "register" in found.meta}
    write_json(stage.data / "reports" / line.registry, hashes)
    (stage.data / "reports" / line.stamp).write_text(STAMP)
    stage.say(f"next: data/reports/{line.page} in a browser, `make ui` for MLflow and Prefect")


def _insist(update: Callable[[], None], warn: Callable[[str], None]) -> None:
    """Update, again from the start when MLflow breaks off: all that is there is found, so nothing is doubled.

    Raises StoreError when it does not answer after some time either.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    for pause in (*PAUSES, None):
        try:
            return update()
        except (MlflowException, StoreError, RequestException) as error:
            if isinstance(error, MlflowException) and error.error_code not in BROKEN_OFF:
                raise
            said = masked(f"MLflow broke off: {error}")
        if pause is None:
            raise StoreError(f"{said}. What is registered stays: when it answers, the same command adds the rest")
        warn(f"{said}; again in {pause:.0f} s")
        time.sleep(pause)


def experiment_name() -> str | None:
    """The name of the `dvc exp run` this is part of: its versions are added, and no alias moves."""
    elsewhere = ROOT.name if stores_root().resolve() != ROOT else None
    return os.environ.get("DVC_EXP_NAME") or elsewhere


class Mirror:
    """One pass over what the dvc.lock of one pipeline file records."""

    def __init__(self, stage: Stage, line: Line, every: list[LockedStage]) -> None:
        self.say, self.warn, self.config = stage.say, stage.warn, stage.config
        self.line, self.every, self.experiment = line, every, experiment_name()
        self.stages = [found for found in every if found.file == line.file and found.name != stage.label]
        client, group = open_store(self.config.experiment)
        origin = {"seed": str(stage.params.seed), "git_commit": git_commit(), "experiment": self.experiment}
        self.runs = Runs(client, group, {key: value for key, value in origin.items() if value})
        self.registry = Registry(self.config.model, self.runs)
        self.say(
            f"MLflow: {masked(store_uri())}" + (f"; experiment {self.experiment}: aliases stay" if self.experiment else "")
        )

    def update(self) -> None:
        """Runs for all stages, versions with metrics for the checkpoints; outside `dvc exp run` the aliases too."""
        for absent in (found for found in self.stages if not found.pulled):
            self.warn(f"{absent.name}: its data is not here, left out; `dvc pull` fetches it")
        here = [found for found in self.stages if found.pulled]
        self.records = {found.name: self.runs.of(found) for found in here if found.metrics or found.model}
        self.measured = self._measured()
        versions = {
            found.meta["register"]: self._version(found, found.model)
            for found in here
            if found.model and "register" in found.meta
        }
        if not self.experiment:
            for alias, version in versions.items():
                self.registry.point(alias, version)
            if self.line.crowns:
                unlabelled = {found.meta.get("register") for found in here if found.labels == NO_LABELS}
                self._choose_champion({alias: version for alias, version in versions.items() if alias in unlabelled})

    def _measured(self) -> dict[str, dict[str, Any]] | None:
        """What the report says of the models; None when it was made from other models than there are now."""
        report = next((found for found in self.stages if found.name == self.line.report and found.pulled), None)
        read = (self.line.evaluate, self.line.report, *self.line.based_on)
        behind = [found.name for found in self.every if found.stale and found.name.split("@")[0] in read]
        if report is None or report.metrics is None or behind:
            what = ", ".join(behind) or self.line.report
            stay = "champion and figures stay as they are" if self.line.crowns else "figures stay as they are"
            self.warn(f"no report on these models ({what} behind): {stay}; see `dvc repro{'' if self.line.crowns else ' -P'}`")
            return None
        models: dict[str, dict[str, Any]] = report.metrics.json()["models"]
        return models

    def _version(self, stage: LockedStage, out: LockedOut) -> "ModelVersion":
        """The version of a checkpoint, made when there is none; an experiment leaves one that it finds as it is."""
        record = self.records[stage.name]
        known = self.registry.find(stage, out)
        version = known or self.registry.make(stage, out, record)
        self.registry.complete(version, out)
        if self.measured is not None and not (known and self.experiment):
            name = Path(out.path).name
            evaluation = self.records.get(f"{self.line.evaluate}@{name}", record)
            sources = [(record, figures_of(stage)), (evaluation, numbers(self.measured.get(name, {})))]
            self.registry.describe(version, stage, sources)
        state = "known" if known else "new"
        self.say(f"{self.config.model} version {version.version}  {stage.meta['register']:<12} {out.md5[:8]}  {state}")
        return version

    def _choose_champion(self, versions: "dict[str, ModelVersion]") -> None:
        """Point `champion` at the best version by the metric named in params; the first of equals wins."""
        metric, mode = self.config.champion_metric, self.config.champion_mode
        if self.measured is None:
            return
        known = sorted({name for figures in self.measured.values() for name in figures})
        if metric not in known:
            raise StageError(f"register.champion_metric: report.json has no {metric!r}; it has {', '.join(known)}")
        figures = {name: self.measured[name][metric] for name in versions if metric in self.measured.get(name, {})}
        if not figures:
            return
        best = (min if mode == "min" else max)(figures, key=lambda name: figures[name]["mean"])
        self.registry.crown(versions[best], f"{metric} ({mode})")
        self.say(f"models:/{self.config.model}@champion is {best}: {mode} of {metric}, {figures[best]['mean']:.4g}")
