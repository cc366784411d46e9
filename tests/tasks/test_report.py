"""The report on a few rows whose numbers are worked by hand."""

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from apprentice.config import Params
from tasks.report_evidence import Evidence, collect
from tasks.report_figures import difference_figures, kl_figures, length_figures, training_figures
from tasks.report_html import SECTIONS, page
from tasks.report_markdown import chosen_samples, comparison_table, document, findings, training_notes
from tasks.report_metrics import METRICS, TRAINING, cell, label, metric_of, number, verdict
from tasks.report_plots import Series, line_chart, slope, span, thin, ticks
from tasks.stage import StageError

MODELS = ["base", "sft", "sft_tuned", "srppo"]
NASTY = '<script>alert("x")</script> | **bold** & more'
GREEDY = {  # of four prompts: in-domain a and b, out-of-domain c (pool) and d (unseen)
    "base": [0, 0, 0, 0],
    "sft": [1, 0, 1, 0],
    "sft_tuned": [1, 1, 1, 1],
    "srppo": [0, 0, 1, 1],
}
HISTORIES = {
    "pretrain": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}],
    "sft": [{"step": 1, "loss": 2.0, "held_out_loss": ""}, {"step": 2, "loss": 1.0, "held_out_loss": 1.5}],
    "srppo": [
        {"step": 1, "reward": 0.5, "reward_std": 0.1, "kl_to_sft": 0.0, "length": 9.0, "reward_length_slope": 0.01},
        {"step": 2, "reward": 0.7, "reward_std": 0.2, "kl_to_sft": 0.1, "length": 9.5, "reward_length_slope": 0.02},
    ],
    "rso": [{"step": 1, "loss": 0.7, "margin": 0.0, "accuracy": 0.5}],
}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_evaluation(folder: Path, model: str, verified: bool = True) -> None:
    domains = ["in_domain", "in_domain", "out_of_domain_pool", "out_of_domain_unseen"]
    empty = dict.fromkeys(["greedy_accuracy", "pass_at_8", "self_reward", "kl_to_sft", "length", "held_out_loss"], "")
    rows, samples = [], []
    for i, (domain, right) in enumerate(zip(domains, GREEDY[model], strict=True)):
        known = {"greedy_accuracy": right, "pass_at_8": 1} if verified else {}
        moved = 0.0 if model == "sft" else 0.25
        found = {**known, "self_reward": i + right, "kl_to_sft": moved, "length": 10 + i}
        rows.append({"id": "abcd"[i], "domain": domain, **empty, **found})
        text = {"prompt": f"prompt {i} {NASTY}", "answer": "7", "greedy": f"greedy of {model}", "sample": NASTY}
        samples.append({"id": "abcd"[i], "domain": domain, **text, "greedy_correct": bool(right) if verified else None})
    rows += [{**rows[0], **empty, "id": f"v{i}", "domain": "validation", "held_out_loss": 0.5 + i} for i in range(2)]
    write_csv(folder / "prompts.csv", rows)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))


@pytest.fixture
def small(params: Callable[..., Params]) -> Params:
    return params(**{"evaluate.models": MODELS, "report.samples": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for model in MODELS:
        write_evaluation(tmp_path / "evaluate" / model, model)
    for stage, rows in HISTORIES.items():
        write_csv(tmp_path / stage / "history.csv", rows)
    metrics = {
        "sft": {"gate": {"mean": 0.71, "low": 0.62, "high": 0.79}},
        "sft_tuned": {"gate": {"mean": 0.3, "low": 0.2, "high": 0.4}},
        "srppo": {"iterations": 2, "stopped_by": "kl_stop", "kl_to_anchor": 0.41},
        "pairs": {"pairs": 620, "acceptance_rate": 0.31},
    }
    for stage, values in metrics.items():
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / "metrics.json").write_text(json.dumps(values))
    return tmp_path


@pytest.fixture
def evidence(folder: Path, small: Params) -> Evidence:
    return collect(folder, small)


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


def test_a_single_prompt_gives_no_interval(folder: Path, small: Params) -> None:
    for model in MODELS:
        path = folder / "evaluate" / model / "prompts.csv"
        rows = list(csv.DictReader(path.open()))
        write_csv(path, [row for row in rows if row["id"] not in "bv1"])
    evidence = collect(folder, small)
    assert evidence.report["models"]["sft"]["in_domain/self_reward"] == {"mean": 1.0, "low": None, "high": None}
    assert "[one prompt]" in document(evidence)
    assert page(evidence)


def test_a_missing_evaluation_names_the_command(folder: Path, small: Params) -> None:
    (folder / "evaluate" / "srppo" / "prompts.csv").unlink()
    with pytest.raises(StageError, match="dvc repro evaluate@srppo"):
        collect(folder, small)


def test_the_first_table_is_the_comparison(evidence: Evidence) -> None:
    text = document(evidence)
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert first and first[0].strip() == comparison_table(evidence.report)
    assert len(first[0].splitlines()) == 2 + len(MODELS)
    assert "| sft | 50 [9, 91] |" in first[0]


def test_gains_and_losses_are_said_plainly(folder: Path, small: Params) -> None:
    for model, right in (("sft", 0), ("sft_tuned", 1), ("srppo", 0)):  # equal differences: clear of zero
        path = folder / "evaluate" / model / "prompts.csv"
        rows = list(csv.DictReader(path.open()))
        write_csv(path, [{**row, "greedy_accuracy": row["greedy_accuracy"] and right} for row in rows])
    against_sft, against_tuned = findings(collect(folder, small))
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


def test_the_gate_of_a_reward_target_below_one_half_warns(folder: Path, small: Params) -> None:
    (folder / "sft" / "metrics.json").write_text(json.dumps({"gate": {"mean": 0.49, "low": 0.4, "high": 0.58}}))
    evidence = collect(folder, small)
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


def test_text_of_models_is_escaped(evidence: Evidence) -> None:
    html, markdown = page(evidence), document(evidence)
    assert "<script" not in html and "<script" not in markdown
    assert "&lt;script&gt;" in html and "&lt;script&gt;" in markdown
    assert "\\| **bold** &amp; more |" in markdown


class Checker(HTMLParser):
    """Tags that open and close in order, and every address on the page."""

    void = frozenset({"meta", "rect", "line", "circle", "polyline", "polygon", "path", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.void

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_network(evidence: Evidence) -> None:
    html, checker = page(evidence), Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.addresses and all(address.startswith("#") for address in checker.addresses)
    assert not re.search(r"https?:|//\w+\.|@import|url\(", html)


def test_the_page_shows_curves_samples_marks_params_and_seed(evidence: Evidence) -> None:
    html = page(evidence)
    for part in ("seed 0", "kl_coef: 0.5", "SRPPO: self-reward", "✓ right", "✗ wrong", "greedy of srppo", "RSO: margin"):
        assert part in html, part
    assert len(training_figures(evidence)) == 9
    assert [title for title, _, _ in length_figures(evidence)] == MODELS
    assert len(difference_figures(evidence)) == 3 and len(kl_figures(evidence)) == 2


def test_two_runs_give_identical_bytes(folder: Path, small: Params) -> None:
    first, second = collect(folder, small), collect(folder, small)
    assert page(first) == page(second) and document(first) == document(second)
    assert json.dumps(first.report) == json.dumps(second.report)
    assert str(folder) not in page(first) + document(first)


def test_without_verifier_and_with_little_training_there_is_still_a_report(
    tmp_path: Path, params: Callable[..., Params]
) -> None:
    for model in ("base", "sft"):
        write_evaluation(tmp_path / "evaluate" / model, model, verified=False)
    evidence = collect(tmp_path, params(**{"evaluate.models": ["base", "sft"], "report.baselines": ["sft"]}))
    assert comparison_table(evidence.report).splitlines()[0] == (
        "| model | held-out loss | in-domain KL to SFT | in-domain self-reward | in-domain length |"
    )
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
    assert number("in_domain/greedy_accuracy", 0.846) == "85"
    assert number("in_domain/greedy_accuracy", -0.004, "+") == "0"
    assert number("in_domain/kl_to_sft", -0.336, "+") == "−0.34"
    assert number("validation/held_out_loss", 0.0734) == "0.073"
    assert cell("in_domain/length", {"mean": 12.34, "low": 11.0, "high": 13.68}) == "12.3 [11.0, 13.7]"
    assert metric_of("in_domain/new_one").label == "new one"


def test_ticks_are_round_and_inside() -> None:
    assert ticks((0.0, 1.0)) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks((-0.45, 0.43)) == [-0.4, -0.2, 0.0, 0.2, 0.4]
    assert ticks((3.0, 41.0)) == [10.0, 20.0, 30.0, 40.0]


def test_a_long_history_is_averaged_not_cut() -> None:
    assert thin([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0)], most=2) == [(0.5, 2.0), (2.5, 6.0)]
    assert thin([(0.0, 1.0)], most=2) == [(0.0, 1.0)]


def test_slope_by_hand_and_without_spread() -> None:
    assert slope([(0, 0), (1, 2), (2, 1)]) == pytest.approx(0.5)  # covariance 1, variance 2
    assert slope([(3, 0), (3, 2)]) is None


def test_a_constant_series_still_has_a_range() -> None:
    assert span([2.0, 2.0]) == (1.8, 2.2) and span([0.0]) == (-1.0, 1.0)
    assert "<polyline" in line_chart("flat", [Series("flat", "red", [(1, 2.0), (2, 2.0)])])
    assert "<polyline" in line_chart("one", [Series("one", "red", [(1, 2.0)])])


def test_the_params_shown_are_dependencies_of_the_stage() -> None:
    import yaml

    stage = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"]["report"]
    assert set(SECTIONS) <= set(stage["params"])
