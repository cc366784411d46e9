"""What study/claims.yaml asks for: runs, claims and plots, checked against params.yaml and the stages before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apprentice.config import Params, ParamsError, parse
from tasks.dvcstage import StageInfo
from tasks.stage import METHODS, ROOT, StageError, address_of

MAIN = "main"  # the run that takes every stage; a name without a run in front means this one
CLAIMS = Path("study") / "claims.yaml"
FIRST_SEED = 1  # settings were developed on seed 0, so it tests nothing


class StudyError(StageError):
    """The study cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One set of changes to params.yaml and what it is measured on (None: all): models, and stages with metrics of their own.
    `seeds` caps how many seeds it takes, from `first_seed` on: later ones put to the test what the first have suggested."""

    name: str
    changes: dict[str, Any]
    measure: tuple[str, ...] | None
    seeds: int | None
    first_seed: int = FIRST_SEED

    def seeds_of(self, count: int) -> range:
        """The seeds it takes of a study of `count`."""
        return range(self.first_seed, self.first_seed + min(count, self.seeds or count))


@dataclass(frozen=True)
class Claim:
    """An effect and what is claimed of it: `test` is "above" or "within", `margin` its number. post_hoc: written down after its
    figures were seen. note: what a reader must know to weigh it, or empty."""

    paper: str
    claim: str
    published: str
    effect: dict[str, float]
    metric: dict[str, float]
    test: str
    margin: float
    post_hoc: bool = False
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure: of one run against a metric (`x` its name), or of several runs, `x` then a number for each."""

    name: str
    runs: tuple[str, ...]
    x: str | tuple[float, ...]
    y: tuple[str, ...]
    models: tuple[str, ...] | None


@dataclass(frozen=True)
class Study:
    """The whole of claims.yaml, in its order."""

    runs: dict[str, Run]
    claims: tuple[Claim, ...]
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Job:
    """One run with one seed: a DVC experiment."""

    run: Run
    seed: int

    @property
    def name(self) -> str:
        """What the experiment is called."""
        return f"study-{self.run.name}-{self.seed}"

    @property
    def values(self) -> dict[str, Any]:
        """Entries of params.yaml that it sets."""
        return {"seed": self.seed, **self.run.changes}


def run_of(name: str) -> str:
    """The run of a job of that name."""
    return name.removeprefix("study-").rpartition("-")[0]


def read_study(path: Path = ROOT / CLAIMS) -> Study:
    """Read claims.yaml. Raises StudyError for what is missing, unknown or named but not there."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{path} cannot be read: {error}") from error
    _expect(raw, "claims.yaml", {"metrics", "runs", "claims", "plots"})
    runs = {name: _run(name, one) for name, one in raw["runs"].items()}
    if runs.get(MAIN) != Run(MAIN, {}, None, None):
        raise StudyError(f"{path.name}: expected a run `{MAIN}: {{set: {{}}, measure: all}}`, got {runs.get(MAIN)}")
    study = Study(runs, tuple(map(_claim, raw["claims"])), tuple(_plot(name, one) for name, one in raw["plots"].items()))
    named = {name: f"plot {plot.name}" for plot in study.plots for name in plot.runs}
    named |= {split(name)[0]: f"claim {claim.claim!r}" for claim in study.claims for name in claim.effect}
    for name, where in named.items():
        if name not in runs:
            raise StudyError(f"{path.name}: {where} names the run {name!r}; there are {', '.join(runs)}")
    compared = {f"claim {claim.claim!r}": {split(name)[0] for name in claim.effect} for claim in study.claims}
    compared |= {f"plot {plot.name}": {MAIN, *plot.runs} for plot in study.plots}
    for where, names in compared.items():
        if len(begun := {runs[name].first_seed for name in names}) > 1:
            raise StudyError(
                f"{path.name}: {where} needs runs of the same seeds; theirs begin at {', '.join(map(str, sorted(begun)))}"
            )
    return study


def split(name: str) -> tuple[str, str]:
    """`panel_a:rso` as run and model; `rso` is of the main run."""
    run, colon, model = name.partition(":")
    return (run, model) if colon else (MAIN, name)


def check_named(study: Study, params: Params, stages: Iterable[StageInfo]) -> None:
    """Raise StudyError for a run that measures what is neither a model of params.yaml nor a stage with metrics, and for a claim
    or plot that asks a run for what it does not measure; the main run has all of them."""
    everything = {*main_models(params), *(stage.name for stage in stages if metrics_of(stage))}
    for name, run in study.runs.items():
        for unknown in sorted(set(measured(run, params)) - everything):
            raise StudyError(
                f"claims.yaml: the run {name} measures {unknown!r}, which is neither a measured model (params.yaml: "
                "evaluate, evaluate_methods) nor a stage with metrics"
            )
    asked = [(f"claim {claim.claim!r}", *split(name)) for claim in study.claims for name in claim.effect]
    asked += [(f"plot {plot.name}", run, model) for plot in study.plots for run in plot.runs for model in plot.models or ()]
    known = {name: set(measured(run, params)) for name, run in study.runs.items()}
    known[MAIN] = everything
    for where, run, model in asked:
        if model not in known[run]:
            raise StudyError(f"claims.yaml: {where} needs {model!r} of the run {run}, which does not measure it")


def _expect(raw: Any, what: str, keys: set[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(raw, dict) or not keys <= set(raw) <= keys | set(optional):
        found = sorted(raw) if isinstance(raw, dict) else raw
        raise StudyError(f"claims.yaml, {what}: expected the keys {', '.join(sorted(keys))}, got {found}")


def _run(name: str, raw: Any) -> Run:
    _expect(raw, f"run {name}", {"set", "measure"}, ["seeds", "first_seed"])
    measure = None if raw["measure"] == "all" else tuple(raw["measure"])
    return Run(name, dict(raw["set"]), measure, raw.get("seeds"), raw.get("first_seed", FIRST_SEED))


def _claim(raw: Any) -> Claim:
    what = f"claim {raw.get('claim')!r}" if isinstance(raw, dict) else "a claim"
    test = next((key for key in ("above", "within") if isinstance(raw, dict) and key in raw), "above")
    _expect(raw, what, {"paper", "claim", "published", "effect", "metric", test}, ["post_hoc", "note"])
    published = {True: "yes", False: "no"}.get(raw["published"], raw["published"])  # YAML's words for true and false
    margin, more = float(raw[test]), {key: raw[key] for key in ("post_hoc", "note") if key in raw}
    return Claim(raw["paper"], raw["claim"], published, raw["effect"], raw["metric"], test, margin, **more)


def _plot(name: str, raw: Any) -> Plot:
    many = isinstance(raw, dict) and "runs" in raw
    _expect(raw, f"plot {name}", {"x", "y", "models", "runs" if many else "run"})
    x: str | tuple[float, ...] = tuple(map(float, raw["x"])) if many else raw["x"]
    runs = tuple(raw["runs"]) if many else (raw["run"],)
    if many and len(x) != len(runs):
        raise StudyError(f"claims.yaml, plot {name}: expected an x for each of {len(runs)} runs, got {len(x)}")
    y = tuple(raw["y"]) if isinstance(raw["y"], list) else (raw["y"],)
    return Plot(name, runs, x, y, None if raw["models"] == "all" else tuple(raw["models"]))


def measured(run: Run, params: Params) -> tuple[str, ...]:
    """The models and stages a run is measured on."""
    return run.measure or main_models(params)


def main_models(params: Params) -> tuple[str, ...]:
    """Every model that is measured, in the order of params.yaml."""
    return (*params.evaluate.models, *params.evaluate_methods.models)


def targets_of(run: Run, params: Params) -> list[str]:
    """What `dvc exp run` is asked for: all, or of what the run measures the models' evaluations and the stages themselves."""
    return ["-P"] if run.measure is None else [_target(name, params) for name in run.measure]


def _target(name: str, params: Params) -> str:
    if name in params.evaluate.models:
        return f"evaluate@{name}"
    return f"{METHODS}:evaluate_methods@{name}" if name in params.evaluate_methods.models else address_of(name)


def metrics_of(stage: StageInfo) -> str | None:
    """The metrics.json that a stage writes, as a path from the project's root; None where it writes none."""
    path = f"data/reports/{stage.name}/metrics.json"
    return path if path in stage.outs else None


def seeds_of(count: int) -> range:
    """The first `count` seeds of the study."""
    return range(FIRST_SEED, FIRST_SEED + count)


def jobs_of(study: Study, seeds: int, only: Sequence[str] = ()) -> list[Job]:
    """Every run with its first `seeds` seeds: the main run with all of them, then the others seed by seed.

    `only` names runs to take; the others are left out.
    """
    for name in only:
        if name not in study.runs:
            raise StudyError(f"no run {name!r} in {CLAIMS}; there are {', '.join(study.runs)}")
    runs = [run for run in study.runs.values() if not only or run.name in only]
    jobs = [Job(run, seed) for run in runs for seed in run.seeds_of(seeds)]
    return sorted(jobs, key=lambda job: (job.run.name != MAIN, job.seed))


def with_changes(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of parsed params with entries such as {"crlft.weights.mixed": 1.0} set; one that is not there is refused."""
    params = dict(raw)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place: Any = params
        for name in sections:
            if not isinstance(place.get(name), dict):
                raise StudyError(f"claims.yaml sets {key!r}, which params.yaml does not have")
            place[name] = dict(place[name])
            place = place[name]
        if last not in place:
            raise StudyError(f"claims.yaml sets {key!r}, which params.yaml does not have")
        place[last] = value
    return params


def params_of(job: Job, raw: Mapping[str, Any]) -> Params:
    """The params of a job, checked; `raw` is params.yaml parsed."""
    try:
        return parse(with_changes(raw, job.values))
    except (ParamsError, StudyError) as error:
        raise StudyError(f"{job.name}: {error}") from error


def written(value: Any) -> str:
    """A value as `--set-param` takes it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return text
