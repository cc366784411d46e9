"""Figures and tokens, worked by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apprentice.config import Params
from tasks import study_figures
from tasks.dvcstage import StageInfo
from tasks.study_figures import figures_of, read_figures, record, write_figures
from tasks.study_plan import Job, Run, StudyError
from tasks.study_tokens import stage_tokens, trained_behind

EPOCHS = [{"step": "1", "epoch": "1"}, {"step": "2", "epoch": "2"}]
PROMPTS = """id,domain,greedy_accuracy,length,held_out_loss
a,in_domain,1,10,
b,in_domain,0,14,
c,out_of_domain_pool,1,,
d,out_of_domain_unseen,0,,
e,out_of_domain_unseen,0,,
f,long,1,,
g,validation,,,0.5
"""


def stage(name: str, deps: list[str], outs: list[str]) -> StageInfo:
    reports = [f"data/reports/{name}/{file}" for file in ("metrics.json", "history.csv")]
    return StageInfo(name, "dvc.yaml", (), tuple(deps), (*outs, *reports))


STAGES = [
    stage("pretrain", [], ["data/models/base"]),
    stage("sft", ["data/models/base"], ["data/models/sft"]),
    stage("pairs", ["data/models/sft"], ["data/pairs"]),
    stage("srppo", ["data/models/sft"], ["data/models/srppo"]),
    stage("rso", ["data/pairs", "data/models/sft", "data/reports/srppo/history.csv"], ["data/models/rso"]),
]


class Fakes:
    """What Files does, from a dict."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def text(self, path: str) -> str:
        return self.files[path]

    def history(self, stage: StageInfo) -> list[dict[str, str]]:
        return EPOCHS


def experiment(params: Params) -> Any:
    files = {f"data/reports/evaluate/{model}/prompts.csv": PROMPTS for model in params.evaluate.models}
    files |= {f"data/reports/{one.name}/metrics.json": "{}" for one in STAGES}
    files["data/reports/sft/metrics.json"] = '{"rows": 5, "gate": {"mean": 0.75, "low": 0.5, "high": 1.0}, "kept": true}'
    files["data/reports/rso/metrics.json"] = '{"pairs": 3}'
    files["data/reports/calibration/metrics.json"] = '{"judge_accuracy": 0.5, "note": "text"}'
    return Fakes(files)


@pytest.fixture
def own(params: Callable[..., Params]) -> Params:
    models = {"evaluate.models": ["base", "sft", "rso"], "evaluate_methods.models": []}
    return params(**models, **{"report.baselines": ["sft"], "pairs.prompts": 7, "pairs.candidates": 2, "pairs.accepted": 2})


def test_figures_are_means_over_prompts_with_the_stages_own(own: Params) -> None:
    found = figures_of(Job(Run("a", {}, ("sft",), None), 1), own, STAGES, experiment(own))
    assert found == {
        "sft": {
            "in_domain/greedy_accuracy": 0.5,
            "in_domain/length": 12.0,
            "out_of_domain/greedy_accuracy": 0.333333,
            "validation/held_out_loss": 0.5,
            "rows": 5.0,
            "gate": 0.75,
        }
    }


def test_the_main_run_has_every_stage_and_what_models_cost(own: Params) -> None:
    stages = [*STAGES, stage("calibration", ["data/models/rso"], [])]
    found = figures_of(Job(Run("main", {}, None, None), 1), own, stages, experiment(own))
    assert found["calibration"] == {"judge_accuracy": 0.5}
    # L = 12; sft: 2 epochs x 5 rows; pairs: 7 x 2 draws; rso: 2 epochs x 2 x 3 pairs; srppo only lent its history
    assert [found[model].get("tokens") for model in ("base", "sft", "rso")] == [None, 120.0, 12.0 * (10 + 14 + 12)]


def test_a_run_that_measures_a_stage_has_its_metrics(own: Params) -> None:
    stages = [*STAGES, stage("calibration", ["data/models/rso"], [])]
    job = Job(Run("a", {}, ("rso", "calibration"), None), 1)
    found = figures_of(job, own, stages, experiment(own))
    assert list(found) == ["rso", "calibration"] and found["calibration"] == {"judge_accuracy": 0.5}
    assert found["rso"]["pairs"] == 3.0 and found["rso"]["in_domain/greedy_accuracy"] == 0.5
    stages[-1] = replace(stages[-1], outs=())  # without metrics there is nothing to read
    assert list(figures_of(job, own, stages, experiment(own))) == ["rso"]


def test_made_from_goes_by_models_and_pairs() -> None:
    assert trained_behind("rso", STAGES) == ["pairs", "pretrain", "rso", "sft"]


@pytest.mark.parametrize(
    ("name", "metrics", "tokens"),
    [
        ("sft", {"rows": 5}, 2 * 5 * 10),
        ("continued_sft", {"rows": 5}, 2 * 5 * 10),
        ("rso", {"pairs": 3}, 2 * 2 * 3 * 10),
        ("judge", {"pairs": 3}, (2 * 4 * 3 + 3) * 10),
        ("bt_reward", {"pairs": 3}, (2 * 2 * 3 + 3) * 10),
        ("copg", {"groups": 3}, 2 * 3 * 4 * 10),
        ("perstep", {"pairs": 3, "responses": 8, "completions": 6}, (2 * 2 * 3 + 8 + 3) * 10),
        ("perstep", {"rows": 3, "responses": 8, "completions": 6}, (2 * 3 + 8 + 3) * 10),
        ("tilt", {}, 0),
        ("sft", {}, None),
    ],
)
def test_tokens_of_a_stage_by_hand(params: Callable[..., Params], name: str, metrics: dict[str, float], tokens: float) -> None:
    own = params(**{"copg.group": 4, "judge.labels": "prompts", "bt_reward.labels": "prompts"})
    assert stage_tokens(name, getattr(own, name), metrics, EPOCHS, 10.0) == tokens


def test_tokens_of_ppo_are_drawn_once_and_trained_on_by_epoch(params: Callable[..., Params]) -> None:
    own = params(**{"srppo.batch_size": 8, "srppo.epochs": 2})
    assert stage_tokens("srppo", own.srppo, {}, [{"length": "10"}, {"length": "12.5"}], 99.0) == 22.5 * 8 * 3


def test_tokens_of_an_unknown_kind_are_refused(params: Callable[..., Params]) -> None:
    with pytest.raises(StudyError, match="EvaluateConfig is not in the table"):
        stage_tokens("evaluate", params().evaluate, {}, EPOCHS, 1.0)


def test_what_is_of_an_unknown_kind_and_trains_nothing_costs_nothing(params: Callable[..., Params]) -> None:
    assert stage_tokens("evaluate", params().evaluate, {}, [], 1.0) == 0.0
    assert stage_tokens("sft", params().sft, {"rows": 5}, [], 1.0) is None  # of a known kind, its history is lacking


def test_figures_are_read_back_as_written(tmp_path: Path) -> None:
    figures = {
        "main": {"1": {"sft": {"a": 0.5, "b": 1.0}, "rso": {}}, "2": {"sft": {"a": 0.25}}},
        "x": {"1": {"sft": {"a": 1e-6}}},
    }
    write_figures(figures, tmp_path / "figures.json")
    assert read_figures(tmp_path / "figures.json") == figures
    assert '\n  "sft": {"a": 0.25}\n' in (tmp_path / "figures.json").read_text()
    with pytest.raises(StudyError, match=r"flows\.study"):
        read_figures(tmp_path / "none.json")


class Keys:
    def key(self, job: Job) -> str:
        return f"now-{job.name}"


def test_named_runs_are_recorded_beside_what_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `b` seed 2 stands no more; `main` and a run that the study names no more stay as they are, unless nothing is named."""
    monkeypatch.setattr(study_figures, "PATH", tmp_path / "figures.json")
    monkeypatch.setattr(study_figures, "MADE", tmp_path / "made.json")
    jobs = [Job(Run(name, {}, ("sft",), None), seed) for name in ("main", "b", "c") for seed in (1, 2)]
    stands = {"main": {"1": {"sft": {"x": 9.0}}}, "b": {"1": {"sft": {"x": 2.0}}}, "c": {"1": {"sft": {"x": 3.0}}}}

    def collect(asked: list[Job], *_: Any) -> Any:
        names = {job.run.name for job in asked}
        return {run: seeds for run, seeds in stands.items() if run in names}

    monkeypatch.setattr(study_figures, "collect", collect)
    old: Any = {"gone": {"1": {}}, "main": {"1": {"sft": {"x": 1.0}}}, "b": {"1": {}, "2": {}}}
    write_figures(old, study_figures.PATH)
    study_figures.write_json(study_figures.MADE, {f"study-{run}-{seed}": "then" for run in old for seed in old[run]})
    record(jobs, ["b", "c"], Keys(), print)
    found = read_figures(study_figures.PATH)
    assert found == {"main": old["main"], "b": stands["b"], "c": stands["c"], "gone": {"1": {}}}
    assert list(found) == ["main", "b", "c", "gone"]
    made = study_figures._made()
    assert made["study-main-1"] == made["study-gone-1"] == "then" and "study-b-2" not in made
    assert made["study-b-1"] == "now-study-b-1" and made["study-c-1"] == "now-study-c-1"
    record(jobs, [], Keys(), print)
    assert read_figures(study_figures.PATH) == stands and set(study_figures._made()) == {f"study-{run}-1" for run in stands}
