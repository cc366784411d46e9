"""The report of every method, on the main line's few rows and those of three further methods."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice.config import Params
from tasks.dvcstage import StageInfo
from tasks.report_evidence import Evidence, collect_main
from tasks.report_figures import color, training_figures
from tasks.report_form import CURVES
from tasks.report_html import page
from tasks.report_markdown import comparison_table, document, training_notes
from tasks.report_methods import collect_methods
from tasks.stage import StageError
from tests.evaluations import MODELS, write_csv, write_evaluation

FURTHER = ["rft", "crlft", "bt_ppo"]


def stage(name: str, file: str, upstream: str, deps: str = "", model: bool = True) -> StageInfo:
    outs = (f"data/models/{name}", f"data/reports/{name}/metrics.json") if model else (f"data/reports/{name}/metrics.json",)
    return StageInfo(
        name, file, tuple(upstream.split()), (*(f"data/models/{n}" for n in upstream.split()), *deps.split()), outs
    )


STAGES = [
    *(stage(name, "dvc.yaml", need) for name, need in zip(MODELS, ["", "base", "base", "sft"], strict=True)),
    stage("rft", "methods/dvc.yaml", "sft", "data/clean/answers.jsonl"),
    stage("crlft", "methods/dvc.yaml", "base", "data/clean/demonstrations.jsonl"),
    stage("bt_reward", "methods/dvc.yaml", "sft", "data/clean/preferences.jsonl"),
    stage("calibration", "methods/dvc.yaml", "bt_reward", model=False),
    stage("bt_ppo", "methods/dvc.yaml", "bt_reward"),
    stage("report_methods", "methods/dvc.yaml", "bt_ppo", model=False),
]


@pytest.fixture
def methods_params(params: Callable[..., Params]) -> Callable[..., Params]:
    return lambda *models: params(
        **{"evaluate.models": MODELS, "evaluate_methods.models": list(models), "report.samples": 1, "bt_ppo.kl_stop": None}
    )


@pytest.fixture
def methods_folder(reports_folder: Path) -> Path:
    for model in FURTHER:
        write_evaluation(reports_folder / "evaluate_methods" / model, model)
    histories: dict[str, list[dict[str, Any]]] = {
        "rft": [{"step": 1, "loss": 2.0, "held_out_loss": ""}, {"step": 2, "loss": 1.0, "held_out_loss": 1.5}],
        "bt_reward": [{"step": 1, "loss": 0.7, "accuracy": 0.5, "margin": 0.0, "flip_rate": 0.25}],
        "bt_ppo": [{"step": 1, "reward": 0.5, "reward_std": 0.1, "kl_to_sft": 0.0}],
    }
    for name, rows in histories.items():
        write_csv(reports_folder / name / "history.csv", rows)
    metrics: dict[str, dict[str, Any]] = {
        "rft": {"epoch": 2, "held_out_loss": 0.08125},
        "bt_ppo": {"iterations": 16, "stopped_by": "iterations", "kl_to_anchor": 0.82},
        "calibration": {"judge_error": 0.11},
    }
    for name, values in metrics.items():
        (reports_folder / name).mkdir(exist_ok=True)
        (reports_folder / name / "metrics.json").write_text(json.dumps(values))
    return reports_folder


@pytest.fixture
def methods(methods_folder: Path, methods_params: Callable[..., Params]) -> Evidence:
    return collect_methods(methods_folder, methods_params(*FURTHER), STAGES)


def test_the_main_line_and_the_further_methods_stand_in_one_table_with_their_labels(methods: Evidence) -> None:
    assert list(methods.report) == ["seed", "labels", "models", "differences"]
    assert list(methods.report["models"]) == [*MODELS, *FURTHER]
    assert methods.report["labels"] == {
        **dict.fromkeys(MODELS, "none"),
        "rft": "verifier",
        "crlft": "none",
        "bt_ppo": "preferences",
    }
    header, _rule, *rows = comparison_table(methods.report).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["model", "labels", "in greedy %"]
    shown = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]] for row in rows}
    assert shown["rft"] == ["verifier", "100 [34, 100]"] and shown["crlft"] == [
        "none",
        "50 [9, 91]",
    ]  # Wilson, 2 of 2 and 1 of 2
    html = page(methods)
    assert "<th>labels</th>" in html and "<td>verifier</td>" in html and "<td>preferences</td>" in html
    pairs = {(one["model"], one["baseline"]) for one in methods.report["differences"]}
    assert pairs == {(m, b) for m in [*MODELS, *FURTHER] for b in ("sft", "sft_tuned") if m != b}


def test_every_model_has_its_colour_and_neighbours_differ(methods: Evidence) -> None:
    assert [color(methods, model) for model in (*MODELS, *FURTHER)] == [f"var(--m{i})" for i in range(7)]


def test_the_same_figures_as_in_the_report_of_the_main_line(
    methods: Evidence, methods_folder: Path, methods_params: Callable[..., Params]
) -> None:
    main = collect_main(methods_folder, methods_params(*FURTHER)).report
    assert {model: methods.report["models"][model] for model in MODELS} == main["models"]
    assert [one for one in methods.report["differences"] if one["model"] in MODELS] == main["differences"]


def test_the_report_of_the_main_line_says_nothing_of_methods(
    methods_folder: Path, methods_params: Callable[..., Params], report_params: Params
) -> None:
    with_methods = collect_main(methods_folder, methods_params(*FURTHER))
    alone = collect_main(methods_folder, report_params)
    assert page(with_methods) == page(alone) and document(with_methods) == document(alone)
    assert with_methods.report == alone.report and "labels" not in alone.report
    assert not any(name in page(alone) for name in (*FURTHER, "labels", "bt_reward"))


def test_a_model_that_leaves_the_list_leaves_the_report(methods_folder: Path, methods_params: Callable[..., Params]) -> None:
    evidence = collect_methods(methods_folder, methods_params("rft"), STAGES)
    assert list(evidence.report["models"]) == [*MODELS, "rft"]
    assert not any(word in page(evidence).split("<pre>seed")[0] for word in ("crlft", "bt_ppo", "bt_reward"))
    assert "crlft" not in document(evidence) and "bt_reward" not in document(evidence)


def test_curves_of_what_was_trained_for_the_models_shown(methods: Evidence) -> None:
    titles = [title for title, _chart, _caption in training_figures(methods)]
    assert titles == [
        "rft: loss",
        "bt_reward: loss",
        "bt_reward: accuracy",
        "bt_reward: margin",
        "bt_reward: verdicts that flip with the order",
        "bt_ppo: reward",
        "bt_ppo: KL, nats per response",
    ]
    assert len({what for what, _columns in CURVES}) == len(CURVES)


def test_figures_of_single_stages_are_told_in_words(methods: Evidence) -> None:
    ppo, rft, calibration = training_notes(methods)
    assert ppo == "`bt_ppo` ended after 16 of 16 iterations, 0.82 nats per response from its anchor (no KL stop)."
    assert rft == "`rft`: epoch 2, held out loss 0.08125." and calibration == "`calibration`: judge error 0.11."


def test_a_sweep_is_drawn_over_its_coefficient(methods_folder: Path, methods_params: Callable[..., Params]) -> None:
    rows = [{"step": 1, "coefficient": 0.25, "accuracy": 0.5}, {"step": 2, "coefficient": 1.25, "accuracy": 0.75}]
    write_csv(methods_folder / "rft" / "history.csv", rows)
    evidence = collect_methods(methods_folder, methods_params("rft"), STAGES)
    ((title, chart, caption),) = training_figures(evidence)
    assert title == "rft: accuracy" and ">coefficient<" in chart and caption == ""


def test_the_pages_are_whole_and_the_same_twice(
    methods: Evidence, methods_folder: Path, methods_params: Callable[..., Params]
) -> None:
    again = collect_methods(methods_folder, methods_params(*FURTHER), STAGES)
    assert page(methods) == page(again) and document(methods) == document(again)
    assert document(methods).startswith("# Apprentice: every method, seed 0\n") and "Labels: what a model learned" in document(
        methods
    )
    assert "evaluate_methods:\n  models:\n  - rft" in page(methods) and "greedy of crlft" in page(methods)
    assert "<script" not in page(methods) + document(methods)


def test_a_missing_evaluation_a_double_and_an_unmade_model_are_clear_errors(
    methods_folder: Path, methods_params: Callable[..., Params]
) -> None:
    with pytest.raises(StageError, match=r"evaluate_methods\.models: srppo is in evaluate\.models already"):
        collect_methods(methods_folder, methods_params("rft", "srppo"), STAGES)
    with pytest.raises(StageError, match="no stage writes data/models/copg"):
        collect_methods(methods_folder, methods_params("copg"), STAGES)
    (methods_folder / "evaluate_methods" / "rft" / "prompts.csv").unlink()
    with pytest.raises(StageError, match=r"`dvc repro methods/dvc\.yaml:evaluate_methods@rft` writes it"):
        collect_methods(methods_folder, methods_params("rft"), STAGES)
