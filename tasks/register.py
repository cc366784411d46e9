"""MLflow mirrors the workspace: a run per stage, a model version per checkpoint, aliases by method, and a champion.

Safe to repeat. By hand after `dvc pull`, or when the store is gone: python -m tasks.register
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.locked import LockedStage, git_commit, locked_stages
from tasks.registry import Registry
from tasks.runs import Runs, figures_of
from tasks.stage import ROOT, Stage, StageError, run, stores_root, write_json
from tasks.store import alone, numbers, open_store, store_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

STAMP = "ok\n"  # never changes: pipelines.dvc depends on its hash
Measured = dict[str, dict[str, Any]]  # report.json's `models`


def main(stage: Stage) -> None:
    """Bring MLflow up to date, then write what is registered and the stamp."""
    stages = [found for found in locked_stages() if found.name != stage.label]
    with alone("register"):
        _mirror(stage, stages)
    hashes = {found.name: found.model.md5 for found in stages if _registers(found) and found.model}
    write_json(stage.data / "reports" / "registry.json", hashes)
    (stage.data / "reports" / "complete").write_text(STAMP)
    stage.say("next: data/reports/report.html in a browser, `make ui` for MLflow and Prefect")


def _registers(stage: LockedStage) -> bool:
    return stage.model is not None and "register" in stage.meta


def _mirror(stage: Stage, stages: list[LockedStage]) -> None:
    """Runs for all stages, versions with metrics for the checkpoints; then, outside `dvc exp run`, the aliases."""
    experiment = experiment_name()
    client, group = open_store(stage.config.experiment)
    origin = {"seed": str(stage.params.seed), "git_commit": git_commit(), "experiment": experiment}
    runs = Runs(client, group, {key: value for key, value in origin.items() if value})
    registry = Registry(stage.config.model, runs)
    stage.say(f"MLflow: {store_uri()}" + (f"; experiment {experiment}: aliases stay" if experiment else ""))
    measured = _measured(stage, stages)
    versions: dict[str, ModelVersion] = {}
    for found in stages:
        if not found.pulled:
            stage.warn(f"{found.name}: its data is not here, left out; `dvc pull` fetches it")
        elif _registers(found):
            versions[found.meta["register"]] = _version(stage, registry, found, measured, experiment)
        elif found.metrics:
            runs.of(found)
    if not experiment:
        for alias, version in versions.items():
            registry.point(alias, version)
        _choose_champion(stage, registry, versions, measured)


def _version(
    stage: Stage, registry: Registry, found: LockedStage, measured: Measured | None, experiment: str | None
) -> "ModelVersion":
    """The version of a stage's checkpoint, made when there is none; one that an experiment finds there stays as it is."""
    out = found.model
    assert out is not None
    record = registry.runs.of(found)
    known = registry.find(found, out)
    version = known or registry.make(found, out, record)
    if known:
        registry.restore_files(known, out)
    if measured is not None and not (known and experiment):
        registry.describe(version, found, figures_of(found) | numbers(measured.get(Path(out.path).name, {})), record)
    state = "known" if known else "new"
    stage.say(f"{registry.model} version {version.version}  {found.meta['register']:<12} {out.md5[:8]}  {state}")
    return version


def _measured(stage: Stage, stages: list[LockedStage]) -> Measured | None:
    """What report.json says of the models; None when it was made from other models than there are now."""
    report = next((found for found in stages if found.name == "report"), None)
    behind = [found.name for found in stages if found.stale and found.name.split("@")[0] in ("evaluate", "report")]
    if report is None or report.metrics is None or not report.pulled or behind:
        stage.warn(
            f"no report of these models ({', '.join(behind) or 'report'} behind): metrics and champion stay; `dvc repro`"
        )
        return None
    models: Measured = report.metrics.json()["models"]
    return models


def _choose_champion(stage: Stage, registry: Registry, versions: dict[str, "ModelVersion"], measured: Measured | None) -> None:
    """Point `champion` at the best version by the metric named in params; the first of equals wins."""
    metric, mode = stage.config.champion_metric, stage.config.champion_mode
    if measured is None:
        return
    known = sorted({name for figures in measured.values() for name in figures})
    if metric not in known:
        raise StageError(f"register.champion_metric: report.json has no {metric!r}; it has {', '.join(known)}")
    means = {name: measured[name][metric]["mean"] for name in versions if metric in measured.get(name, {})}
    if not means:
        return
    best = (min if mode == "min" else max)(means, key=lambda name: means[name])
    registry.crown(versions[best], f"{metric} ({mode})")
    stage.say(f"models:/{registry.model}@champion is {best}: {mode} of {metric}, {means[best]:.4g}")


def experiment_name() -> str | None:
    """The name of the `dvc exp run` this is part of; its versions are added, and no alias moves."""
    elsewhere = ROOT.name if stores_root().resolve() != ROOT else None
    return os.environ.get("DVC_EXP_NAME") or elsewhere


run(__name__, main, __doc__)
