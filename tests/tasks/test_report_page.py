"""report.html and its charts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from apprentice.config import Params
from tasks.report_evidence import Evidence, collect_main
from tasks.report_figures import difference_figures, kl_figures, length_figures, training_figures
from tasks.report_form import MAIN, Form, methods_form
from tasks.report_html import page
from tasks.report_markdown import document
from tasks.report_plots import Series, line_chart, slope, span, thin, ticks
from tests.evaluations import MODELS


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


def test_two_runs_give_identical_bytes(reports_folder: Path, report_params: Params) -> None:
    first, second = collect_main(reports_folder, report_params), collect_main(reports_folder, report_params)
    assert page(first) == page(second) and document(first) == document(second)
    assert json.dumps(first.report) == json.dumps(second.report)
    assert str(reports_folder) not in page(first) + document(first)


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


@pytest.mark.parametrize(("form", "file"), [(MAIN, "dvc.yaml"), (methods_form([]), "methods/dvc.yaml")])
def test_the_params_shown_are_dependencies_of_the_stage(form: Form, file: str) -> None:
    stages = yaml.safe_load((Path(__file__).parents[2] / file).read_text())["stages"]
    assert set(form.sections) <= set(stages["report" if form is MAIN else "report_methods"]["params"])
