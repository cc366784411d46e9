"""What the pipeline files tell of a stage, on a few stages by hand."""

import pytest

from tasks.dvcstage import StageInfo
from tasks.lineage import behind, labels_of, maker_of
from tasks.report_methods import shown_stages
from tasks.stage import StageError


def stage(name: str, upstream: str = "", deps: str = "", outs: str = "", file: str = "methods/dvc.yaml") -> StageInfo:
    return StageInfo(name, file, tuple(upstream.split()), tuple(deps.split()), tuple(outs.split()))


STAGES = [
    stage("ingest", deps="data/raw/x.jsonl", outs="data/clean", file="dvc.yaml"),
    stage("validate", "ingest", "data/clean", "data/reports/validate/passed data/reports/validate/metrics.json"),
    stage(
        "sft",
        "ingest validate",
        "data/clean/demonstrations.jsonl data/reports/validate/passed",
        "data/models/sft",
        file="dvc.yaml",
    ),
    stage("tokenizer", "ingest", "data/clean", "data/models/tokenizer", file="dvc.yaml"),
    stage("base", "tokenizer", "data/models/tokenizer", "data/models/base", file="dvc.yaml"),
    stage("rft", "ingest sft", "data/clean/answers.jsonl data/models/sft", "data/models/rft data/reports/rft/history.csv"),
    stage("direct", "ingest sft", "data/clean/preferences.jsonl data/models/sft", "data/models/direct"),
    stage("crlft", "ingest sft", "data/clean/demonstrations.jsonl data/clean/suboptimal.jsonl", "data/models/crlft"),
    stage("heir", "rft", "data/reports/rft", "data/models/heir data/models/heir_minus"),
    stage("both", "direct heir", "data/models/direct data/models/heir", "data/models/both"),
    stage("gated", "validate", "data/reports/validate/metrics.json", "data/models/gated"),
    stage("folder", "ingest", "data/clean", "data/models/folder"),
    stage("alike", "ingest", "data/clean/answers.jsonl.old data/clean/prompts.jsonl", "data/models/alike"),
    stage("measure", "rft", "data/models/rft", "data/reports/measure/metrics.json"),
    stage("evaluate_methods@rft", "rft", "data/models/rft", "data/reports/evaluate_methods/rft/metrics.json"),
]


def test_labels_are_found_directly_through_models_and_through_folders() -> None:
    found = labels_of(STAGES)
    assert found["rft"] == "verifier" and found["direct"] == "preferences" and found["crlft"] == "qualities"
    assert found["heir"] == "verifier", "of a folder that holds what `rft` wrote"
    assert found["both"] == "preferences and verifier"
    assert found["folder"] == "preferences and qualities and verifier", "a folder that holds all three tables"


def test_demonstrations_alone_the_verdict_on_all_tables_and_a_vocabulary_are_no_labels() -> None:
    found = labels_of(STAGES)
    assert found["ingest"] == found["sft"] == found["base"] == found["alike"] == "none"
    assert found["gated"] != "none", "only the verdict itself teaches nothing"


def test_the_stage_that_writes_a_model() -> None:
    assert maker_of("heir_minus", STAGES).name == "heir"
    with pytest.raises(StageError, match=r"no stage writes data/models/nobody"):
        maker_of("nobody", STAGES)


def test_what_stands_behind_a_stage_keeps_its_order() -> None:
    assert [one.name for one in behind(["heir"], STAGES)] == ["ingest", "validate", "sft", "rft", "heir"]


def test_a_report_shows_the_stages_behind_its_models_and_what_only_measures_them() -> None:
    assert shown_stages(["heir"], STAGES) == ["validate", "rft", "heir", "measure"]
    assert shown_stages(["direct"], STAGES) == ["validate", "direct"]
