"""The numbers and the text of the report, on a few rows whose numbers are worked by hand."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice.config import Params
from tasks.report_evidence import Evidence, collect_main
from tasks.report_html import page
from tasks.report_markdown import chosen_samples, comparison_table, document, findings, training_notes
from tasks.report_metrics import METRICS, TRAINING, cell, label, metric_of, number, short_label, verdict
from tasks.stage import StageError
from tests.evaluations import HISTORIES, MODELS, write_csv, write_evaluation


def difference(evidence: Evidence, model: str, baseline: str, metric: str) -> dict[str, Any]:
    (one,) = [
        row
        for row in evidence.report["differences"]
        if (row["model"], row["baseline"], row["metric"]) == (model, baseline, metric)
    ]
    return one


def test_report_json_has_the_agreed_form(evidence: Evidence) -> None:
    report = evidence.report
    assert list(report) == ["seed", "models", "differences"] and report["seed"] == 0
    assert list(report["models"]) == MODELS
    for values in report["models"].values():
        assert all(list(interval) == ["mean", "low", "high"] for interval in values.values())
    for one in report["differences"]:
        assert list(one) == ["model", "baseline", "metric", "difference", "low", "high"]
    json.dumps(report, allow_nan=False)


def test_means_are_those_of_the_prompts_where_the_metric_is_defined(evidence: Evidence) -> None:
    sft = evidence.report["models"]["sft"]
    assert sft["in_domain/greedy_accuracy"]["mean"] == 0.5
    # Wilson, 1 of 2: centre 1/2, half = 1.959964 sqrt(1/8 + 0.960365/4) / (1 + 3.841459/2) = 0.405469
    assert sft["in_domain/greedy_accuracy"]["low"] == pytest.approx(0.094531, abs=2e-6)
    assert sft["in_domain/self_reward"]["mean"] == 1.0  # (0 + 1) and (1 + 0)
    assert sft["validation/held_out_loss"]["mean"] == 1.0  # 0.5 and 1.5
    assert sft["in_domain/kl_to_sft"] == {"mean": 0.0, "low": 0.0, "high": 0.0}  # exact: no Wilson interval
    assert "validation/greedy_accuracy" not in sft and "in_domain/held_out_loss" not in sft


def test_out_of_domain_is_the_union_of_pool_and_unseen(evidence: Evidence) -> None:
    sft = evidence.report["models"]["sft"]
    assert sft["out_of_domain_pool/greedy_accuracy"]["mean"] == 1.0
    assert sft["out_of_domain_unseen/greedy_accuracy"]["mean"] == 0.0
    assert sft["out_of_domain/greedy_accuracy"]["mean"] == 0.5


def test_differences_are_paired_against_every_baseline_but_oneself(evidence: Evidence) -> None:
    pairs = {(one["model"], one["baseline"]) for one in evidence.report["differences"]}
    assert pairs == {(m, b) for m in MODELS for b in ("sft", "sft_tuned") if m != b}
    one = difference(evidence, "srppo", "sft", "out_of_domain/greedy_accuracy")
    # c: 1 - 1, d: 1 - 0: mean 1/2, s = sqrt(1/2), t(1) = 12.706205: half = 12.706205 / 2
    assert one["difference"] == 0.5 and one["high"] == pytest.approx(6.853102, abs=1e-6)


def test_a_single_prompt_gives_no_interval(reports_folder: Path, report_params: Params) -> None:
    for model in MODELS:
        path = reports_folder / "evaluate" / model / "prompts.csv"
        rows = list(csv.DictReader(path.open()))
        write_csv(path, [row for row in rows if row["id"] not in "bv1"])
    evidence = collect_main(reports_folder, report_params)
    assert evidence.report["models"]["sft"]["in_domain/self_reward"] == {"mean": 1.0, "low": None, "high": None}
    assert "[one prompt]" in document(evidence)
    assert page(evidence)


def test_a_missing_evaluation_names_the_command(reports_folder: Path, report_params: Params) -> None:
    (reports_folder / "evaluate" / "srppo" / "prompts.csv").unlink()
    with pytest.raises(StageError, match="dvc repro evaluate@srppo"):
        collect_main(reports_folder, report_params)


def test_the_first_table_is_the_comparison(evidence: Evidence) -> None:
    text = document(evidence)
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert first and first[0].strip() == comparison_table(evidence.report)
    assert len(first[0].splitlines()) == 2 + len(MODELS)
    assert "| sft       | 50 [9, 91]    |" in first[0]
    assert len({len(line) for line in first[0].splitlines()}) == 1, "columns stand under each other"


def test_gains_and_losses_are_said_plainly(reports_folder: Path, report_params: Params) -> None:
    for model, right in (("sft", 0), ("sft_tuned", 1), ("srppo", 0)):  # equal differences: clear of zero
        path = reports_folder / "evaluate" / model / "prompts.csv"
        rows = list(csv.DictReader(path.open()))
        write_csv(path, [{**row, "greedy_accuracy": row["greedy_accuracy"] and right} for row in rows])
    against_sft, against_tuned = findings(collect_main(reports_folder, report_params))
    assert against_sft.startswith("`srppo` against `sft`: not told apart in in-domain greedy accuracy 0 [0, 0]")
    assert "`srppo` against `sft_tuned`: **worse** in in-domain greedy accuracy −100 [−100, −100]" in against_tuned


def test_lower_loss_is_better_and_an_interval_with_zero_is_open() -> None:
    loss = {"metric": "validation/held_out_loss", "difference": -0.1, "low": -0.2, "high": -0.01}
    assert verdict(loss) == "better"
    assert verdict(loss | {"metric": "in_domain/greedy_accuracy"}) == "worse"
    assert verdict(loss | {"high": 0.0}) == "open"
    assert verdict(loss | {"metric": "in_domain/length"}) == "open"
    assert verdict(loss | {"low": None, "high": None}) == "open"


def test_training_notes_tell_gate_kl_stop_and_acceptance(evidence: Evidence) -> None:
    sft, tuned, stop, pairs = training_notes(evidence)
    assert "71 [62, 79] %" in sft and "elow one half" not in sft
    assert "no good reward target" in tuned
    assert stop == (
        "SRPPO stopped by its KL after 2 of 24 iterations, 0.41 nats per response from its anchor (KL stop at 0.4)."
    )
    assert pairs == "Rejection sampling: pairs 620, acceptance rate 0.31."


def test_the_gate_of_a_reward_target_below_one_half_warns(reports_folder: Path, report_params: Params) -> None:
    (reports_folder / "sft" / "metrics.json").write_text(json.dumps({"gate": {"mean": 0.49, "low": 0.4, "high": 0.58}}))
    evidence = collect_main(reports_folder, report_params)
    assert "**Warning, below one half" in training_notes(evidence)[0]
    assert 'class="warning"' in page(evidence)


def test_samples_are_the_first_of_each_domain(evidence: Evidence) -> None:
    chosen = chosen_samples(evidence)
    assert {domain: [one["sft"]["id"] for one in prompts] for domain, prompts in chosen.items()} == {
        "in_domain": ["a"],
        "out_of_domain_pool": ["c"],
        "out_of_domain_unseen": ["d"],
    }
    assert list(chosen["in_domain"][0]) == MODELS


def test_without_verifier_and_with_little_training_there_is_still_a_report(
    tmp_path: Path, params: Callable[..., Params]
) -> None:
    for model in ("base", "sft"):
        write_evaluation(tmp_path / "evaluate" / model, model, verified=False)
    evidence = collect_main(tmp_path, params(**{"evaluate.models": ["base", "sft"], "report.baselines": ["sft"]}))
    header = comparison_table(evidence.report).splitlines()[0]
    assert header.replace(" ", "") == "|model|held-outloss|inKLtoSFT|inself-reward|inlength|"
    assert "✓" not in page(evidence) and "✗" not in page(evidence)
    assert "no method to judge" in document(evidence)


def test_every_column_of_a_history_and_every_metric_is_explained(evidence: Evidence) -> None:
    known = METRICS.keys() | TRAINING.keys() | {"step"}
    assert {name for rows in HISTORIES.values() for row in rows for name in row} <= known
    keys = {key for values in evidence.report["models"].values() for key in values}
    assert all(metric_of(key).about for key in keys)


def test_labels_and_numbers_as_readers_see_them() -> None:
    assert label("in_domain/pass_at_8") == "in-domain pass@8"
    assert label("validation/held_out_loss") == "held-out loss"
    assert short_label("out_of_domain/greedy_accuracy") == "out greedy %"
    assert number("in_domain/greedy_accuracy", 0.846) == "85"
    assert number("in_domain/greedy_accuracy", -0.004, "+") == "0"
    assert number("in_domain/kl_to_sft", -0.336, "+") == "−0.34"
    assert number("validation/held_out_loss", 0.0734) == "0.073"
    assert cell("in_domain/length", {"mean": 12.34, "low": 11.0, "high": 13.68}) == "12.3 [11.0, 13.7]"
    assert metric_of("in_domain/new_one").label == "new one"
