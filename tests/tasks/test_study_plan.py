"""claims.yaml as it is and as it must not be; the jobs and targets that follow from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.config import Params, parse
from tasks.dvcstage import StageInfo, read_stages
from tasks.report_metrics import METRICS, entry
from tasks.study_claims import TITLES
from tasks.study_plan import (
    MAIN,
    Job,
    Run,
    StudyError,
    check_named,
    jobs_of,
    params_of,
    read_study,
    seeds_of,
    split,
    targets_of,
    with_changes,
    written,
)
from tasks.study_tokens import stage_tokens, trained_behind
from tests.conftest import ROOT

RAW = {
    "metrics": {},
    "runs": {
        "main": {"set": {}, "measure": "all"},
        "a": {"set": {"rso.loss": "hinge"}, "measure": ["rso", "crlft"]},
        "b": {"set": {"sft.epochs": 1}, "measure": ["sft"], "seeds": 2},
    },
    "claims": [{"paper": "p", "claim": "c", "published": True, "effect": {"a:rso": 1}, "metric": {"x": 1}, "within": 0.5}],
    "plots": {"y_against_x": {"runs": ["b", "main"], "x": [1, 3], "y": "gate", "models": ["sft"]}},
}


def study_of(folder: Path, raw: dict[str, Any]) -> Any:
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return read_study(path)


def raw_params() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "params.yaml").read_text()))


def test_the_claims_of_this_project_can_be_carried_out() -> None:
    study, params = read_study(), parse(raw_params())
    check_named(study, params, read_stages())
    for job in jobs_of(study, 1):
        assert params_of(job, raw_params()).seed == job.seed > 0 and targets_of(job.run, params)
    assert study.runs[MAIN].measure is None


def test_every_paper_has_claims_that_name_known_figures() -> None:
    study = read_study()
    papers = [claim.paper for claim in study.claims]
    assert set(papers) == set(TITLES) and min(map(papers.count, TITLES)) >= 2
    calibration = {"judge_accuracy", "bt_reward_accuracy", "judge_calibration_error", "bt_reward_calibration_error"}
    calibration |= {"bt_reward_prompt_gap", "judge_prompt_gap"}
    own = {"calibration": calibration | {"judge_flip_rate"}, "sft": {"gate"}}  # metrics of a stage instead of a model
    swept = {f"accuracy_at_{value:g}" for value in study.runs["sweep"].changes["vectors.coefficients"]}
    own["vectors"] = {"own_format_share", "target_own_format_share", "target_accuracy"} | swept
    own["perstep"] = {"spurious_advantage", "other_advantage"}
    for claim in study.claims:
        assert all(isinstance(factor, int | float) for factors in (claim.effect, claim.metric) for factor in factors.values())
        for name in claim.effect:
            unknown = {metric for metric in claim.metric if entry(metric) not in METRICS or "/" not in metric}
            assert unknown <= own.get(split(name)[1], set()), claim.claim


def test_a_claims_file_is_read_whole(tmp_path: Path) -> None:
    study = study_of(tmp_path, RAW)
    assert study.runs["a"] == Run("a", {"rso.loss": "hinge"}, ("rso", "crlft"), None)
    (claim,), (plot,) = study.claims, study.plots
    assert (claim.test, claim.margin, claim.published) == ("within", 0.5, "yes")
    assert (claim.post_hoc, claim.note) == (False, "")
    assert (plot.runs, plot.x, plot.y, plot.models) == (("b", "main"), (1.0, 3.0), ("gate",), ("sft",))


def test_a_claim_says_when_it_was_made_and_what_to_know(tmp_path: Path) -> None:
    claim = {**RAW["claims"][0], "post_hoc": True, "note": "few steps"}
    (read,) = study_of(tmp_path, {**RAW, "claims": [claim]}).claims
    assert (read.post_hoc, read.note) == (True, "few steps")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": {"main": {"set": {"seed": 1}, "measure": "all"}}}, "expected a run"),
        ({"runs": {**RAW["runs"], "a": {"set": {}}}}, "run a"),
        ({"claims": [{**RAW["claims"][0], "effect": {"none:rso": 1}}]}, "'none'"),
        ({"claims": [{**RAW["claims"][0], "above": 0.0}]}, "claim 'c'"),
        ({"plots": {"y_against_x": {**RAW["plots"]["y_against_x"], "x": [1]}}}, "an x for each of 2 runs"),
        ({"more": 1}, "expected the keys"),
        (
            {"runs": {**RAW["runs"], "b": {**RAW["runs"]["b"], "first_seed": 6}}},
            "plot y_against_x needs runs of the same seeds",
        ),
        (
            {
                "runs": {**RAW["runs"], "c": {**RAW["runs"]["a"], "first_seed": 6}},
                "claims": [{**RAW["claims"][0], "effect": {"a:rso": 1, "c:rso": -1}}],
            },
            "claim 'c' needs runs of the same seeds; theirs begin at 1, 6",
        ),
    ],
)
def test_what_is_wrong_in_a_claims_file_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(tmp_path, {**RAW, **change})


def test_a_claim_on_a_model_that_its_run_does_not_measure_is_refused(tmp_path: Path, params: Callable[..., Params]) -> None:
    study = study_of(tmp_path, {**RAW, "claims": [{**RAW["claims"][0], "effect": {"b:rso": 1}}]})
    with pytest.raises(StudyError, match="needs 'rso' of the run b"):
        check_named(study, params(), [])


def test_targets_are_the_evaluations_where_dvc_has_them(params: Callable[..., Params]) -> None:
    assert targets_of(Run("a", {}, ("rso", "crlft"), None), params()) == [
        "evaluate@rso",
        "methods/dvc.yaml:evaluate_methods@crlft",
    ]
    assert targets_of(Run(MAIN, {}, None, None), params()) == ["-P"]


def stage(name: str, file: str) -> StageInfo:
    return StageInfo(name, "methods/dvc.yaml", (), (), (f"data/reports/{name}/{file}",))


def test_a_run_may_measure_a_stage_with_metrics(tmp_path: Path, params: Callable[..., Params]) -> None:
    stages = [stage("calibration", "metrics.json"), stage("judge", "history.csv")]
    runs = {**RAW["runs"], "a": {**RAW["runs"]["a"], "measure": ["sft", "calibration", "crlft"]}}
    claims = [{**RAW["claims"][0], "effect": {"a:calibration": 1, "calibration": -1}}]
    study = study_of(tmp_path, {**RAW, "runs": runs, "claims": claims})
    check_named(study, params(), stages)
    wanted = ["evaluate@sft", "methods/dvc.yaml:calibration", "methods/dvc.yaml:evaluate_methods@crlft"]
    assert targets_of(study.runs["a"], params()) == wanted
    assert targets_of(Run("a", {}, ("ingest",), None), params()) == ["ingest"]
    for name, known in (("judge", stages), ("calibration", stages[1:]), ("nothing", stages)):
        runs["a"]["measure"] = ["crlft", name]
        with pytest.raises(StudyError, match=f"the run a measures '{name}', which is neither a measured model"):
            check_named(study_of(tmp_path, {**RAW, "runs": runs, "claims": []}), params(), known)


def test_the_main_run_has_the_stages_with_metrics_alone(tmp_path: Path, params: Callable[..., Params]) -> None:
    study = study_of(tmp_path, {**RAW, "claims": [{**RAW["claims"][0], "effect": {"judge": 1}}]})
    check_named(study, params(), [stage("judge", "metrics.json")])
    with pytest.raises(StudyError, match="needs 'judge' of the run main"):
        check_named(study, params(), [stage("judge", "history.csv")])


def test_jobs_come_main_first_then_seed_by_seed(tmp_path: Path) -> None:
    study = study_of(tmp_path, RAW)
    names = [job.name for job in jobs_of(study, 3)]
    assert names == [f"study-{one}" for one in ("main-1", "main-2", "main-3", "a-1", "b-1", "a-2", "b-2", "a-3")]
    assert [job.name for job in jobs_of(study, 2, ["b"])] == ["study-b-1", "study-b-2"]
    with pytest.raises(StudyError, match="no run 'c'"):
        jobs_of(study, 1, ["c"])


def test_the_seed_that_settings_were_developed_on_is_no_seed_of_the_study() -> None:
    assert raw_params()["seed"] == 0 and list(seeds_of(3)) == [1, 2, 3]
    assert {job.seed for job in jobs_of(read_study(), 5)} == set(range(1, 11))


def test_a_run_may_take_later_seeds(tmp_path: Path) -> None:
    """Those it shares with no other are asked for too."""
    runs = {**RAW["runs"], "c": {"set": {}, "measure": ["sft"], "first_seed": 6, "seeds": 2}}
    study = study_of(tmp_path, {**RAW, "runs": runs})
    assert [job.name for job in jobs_of(study, 3, ["b", "c"])] == [f"study-{one}" for one in ("b-1", "b-2", "c-6", "c-7")]
    assert [list(study.runs["c"].seeds_of(count)) for count in (1, 2, 5)] == [[6], [6, 7], [6, 7]]


def test_changes_reach_only_the_entries_named() -> None:
    raw = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    assert with_changes(raw, {"a.b.c": 5, "e": 4}) == {"a": {"b": {"c": 5, "d": 2}}, "e": 4}
    assert raw == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    for key in ("a.x", "x", "e.f", "x.y"):
        with pytest.raises(StudyError, match=repr(key)):
            with_changes(raw, {key: 1})


def test_a_value_out_of_range_is_refused_before_anything_runs() -> None:
    with pytest.raises(StudyError, match=r"study-a-1.*epochs"):
        params_of(Job(Run("a", {"sft.epochs": 0}, ("sft",), None), 1), raw_params())


def test_values_are_written_as_the_command_line_takes_them() -> None:
    assert [written(value) for value in (1.0, 16, True, "hinge", None)] == ["1.0", "16", "true", "hinge", "null"]


def test_the_tokens_of_every_measured_model_can_be_told(params: Callable[..., Params]) -> None:
    own, stages = params(), read_stages()
    metrics = dict.fromkeys(("rows", "pairs", "groups", "responses", "completions"), 2.0)
    history = [{"epoch": "1", "length": "10"}]
    for model in (*own.evaluate.models, *own.evaluate_methods.models):
        counts = {
            name: stage_tokens(name, getattr(own, name), metrics, history, 10.0) for name in trained_behind(model, stages)
        }
        assert None not in counts.values(), model
        assert (sum(filter(None, counts.values())) > 0) == (model != "base"), model
