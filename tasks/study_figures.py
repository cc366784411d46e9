"""The figures of the study: study/figures.json, read from the experiments; claims, plots and table are made from it alone.

{run: {seed: {model or stage: {metric: value}}}}: of a model the means over the held-out prompts, `<domain>/<metric>` as in the
report, and of the stage of its name, as of one that is measured itself, the numbers of metrics.json; of the main run also those
of every other stage, and the `tokens` that each model cost. study/made.json has the key of each run's code, params and targets:
as long as it is the key of now, the figures stand, also in another clone, where the experiment itself is not.
"""

import csv
import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from apprentice.config import Params
from apprentice.demonstrations import atomic_write
from tasks.dvcstage import StageInfo, read_stages
from tasks.report_evidence import read_values
from tasks.stage import ROOT, write_json
from tasks.study_plan import MAIN, Job, StudyError, main_models, measured, metrics_of, params_of, run_of
from tasks.study_runs import Experiments
from tasks.study_tokens import stage_tokens, trained_behind

PATH, MADE = ROOT / "study" / "figures.json", ROOT / "study" / "made.json"
DOMAINS = ("in_domain", "out_of_domain", "validation")
Metrics = dict[str, float]
Figures = dict[str, dict[str, dict[str, Metrics]]]


class Files:
    """The files of one experiment, from git and DVC's cache."""

    def __init__(self, name: str, commit: str) -> None:
        from dvc.api import DVCFileSystem

        self.name, self.system = name, DVCFileSystem(str(ROOT), rev=commit)

    def text(self, path: str) -> str:
        """A file's content. Raises StudyError when it is in neither git nor DVC's cache."""
        try:
            content: str = self.system.read_text(path, encoding="utf-8")
        except Exception as error:  # missing in git, in dvc.lock, in the cache: each of another kind
            raise StudyError(
                f"{self.name}: {path} is no longer there ({error}); `dvc exp remove {self.name}`, then run the study again"
            ) from error
        return content

    def history(self, stage: StageInfo) -> list[dict[str, str]]:
        """The rows of a stage's history.csv; none when it writes none."""
        path = f"data/reports/{stage.name}/history.csv"
        return list(csv.DictReader(self.text(path).splitlines())) if path in stage.outs else []


def collect(jobs: Sequence[Job], experiments: Experiments, say: Callable[[str], None]) -> Figures:
    """The figures of every job whose experiment or record stands."""
    stages = read_stages()
    found: Figures = {job.run.name: {} for job in jobs}
    for job in jobs:
        if experiment := experiments.standing(job):
            say(f"reading the figures of {job.name}")
            files, params = Files(job.name, experiment.commit), params_of(job, experiments.raw)
            found[job.run.name][str(job.seed)] = figures_of(job, params, stages, files)
        elif recorded(job, experiments):
            found[job.run.name][str(job.seed)] = read_figures()[job.run.name][str(job.seed)]
    return {run: seeds for run, seeds in found.items() if seeds}


def recorded(job: Job, experiments: Experiments) -> bool:
    """Whether figures.json has the job's figures, made from the code, params and targets of now."""
    return _made().get(job.name) == experiments.key(job)


def _made() -> dict[str, str]:
    made: dict[str, str] = json.loads(MADE.read_text(encoding="utf-8")) if MADE.is_file() else {}
    return made


def record(jobs: Sequence[Job], runs: Collection[str], experiments: Experiments, say: Callable[[str], None]) -> None:
    """Write figures.json and made.json: of all jobs that stand, run now or before; where `runs` are named, of theirs, and what
    is on record of others stays."""
    figures = collect([job for job in jobs if not runs or job.run.name in runs], experiments, say)
    done = [job for job in jobs if str(job.seed) in figures.get(job.run.name, {})]
    made = {job.name: experiments.key(job) for job in done}
    if runs and PATH.is_file():
        figures = {run: seeds for run, seeds in read_figures(PATH).items() if run not in runs} | figures
        made = {name: key for name, key in _made().items() if run_of(name) not in runs} | made
    order = dict.fromkeys([*(job.run.name for job in jobs), *figures])  # as in the study; what it names no more comes last
    write_figures({run: figures[run] for run in order if run in figures}, PATH)
    write_json(MADE, made)


def figures_of(job: Job, params: Params, stages: Sequence[StageInfo], files: Files) -> dict[str, Metrics]:
    """The figures of one experiment by model or stage."""
    names, main = measured(job.run, params), job.run.name == MAIN
    models = [name for name in names if name in main_models(params)]
    found = {model: _means(files, model, params) for model in models}
    for stage in stages:
        if (main or stage.name in names) and (path := metrics_of(stage)):
            found.setdefault(stage.name, {}).update(_numbers(json.loads(files.text(path))))
    if main:
        for model, tokens in _tokens(models, found, params, stages, files).items():
            found[model]["tokens"] = tokens
    return found


def _tokens(
    models: Sequence[str], found: dict[str, Metrics], params: Params, stages: Sequence[StageInfo], files: Files
) -> Metrics:
    """What each model but the base cost (tasks/study_tokens.py), where that can be told."""
    by_name = {stage.name: stage for stage in stages}
    behind = {model: trained_behind(model, stages) for model in models}
    length = found["sft"]["in_domain/length"]
    spent = {
        name: stage_tokens(name, getattr(params, name), found.get(name, {}), files.history(by_name[name]), length)
        for name in {name for names in behind.values() for name in names}
    }
    counts = {model: [spent[name] for name in names] for model, names in behind.items()}
    return {model: float(round(sum(filter(None, own)))) for model, own in counts.items() if None not in own and any(own)}


def _means(files: Files, model: str, params: Params) -> Metrics:
    """Means over the held-out prompts of an evaluation."""
    folder = "evaluate" if model in params.evaluate.models else "evaluate_methods"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "prompts.csv"
        path.write_text(files.text(f"data/reports/{folder}/{model}/prompts.csv"), encoding="utf-8")
        values = read_values(path)
    return {key: _rounded(fmean(by_id.values())) for key, by_id in values.items() if key.split("/")[0] in DOMAINS}


def _numbers(metrics: dict[str, Any]) -> Metrics:
    """The numbers of a metrics.json; of one with an interval the mean."""
    plain = {name: value.get("mean") if isinstance(value, dict) else value for name, value in metrics.items()}
    found = {name: value for name, value in plain.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0  # no negative zero


def write_figures(figures: Figures, path: Path = PATH) -> None:
    """Write figures.json: runs, seeds and names sorted as they are, one line for each name."""
    lines = [
        f'"{run}": {{\n' + ",\n".join(f' "{seed}": {{\n{_block(names)}\n }}' for seed, names in seeds.items()) + "\n}"
        for run, seeds in figures.items()
    ]
    with atomic_write(path) as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _block(names: dict[str, Metrics]) -> str:
    return ",\n".join(f'  "{name}": {json.dumps(metrics)}' for name, metrics in names.items())


def read_figures(path: Path = PATH) -> Figures:
    """Read figures.json. Raises StudyError when there is none."""
    if not path.is_file():
        raise StudyError(f"{path} is missing: `python -m flows.study` runs the study and writes it")
    found: Figures = json.loads(path.read_text(encoding="utf-8"))
    return found
