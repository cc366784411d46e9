"""A folder of reports with a few rows, for the tests of the report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apprentice.config import Params
from tasks.report_evidence import Evidence, collect_main
from tests.evaluations import HISTORIES, MODELS, write_csv, write_evaluation


@pytest.fixture
def report_params(params: Callable[..., Params]) -> Params:
    return params(**{"evaluate.models": MODELS, "report.samples": 1})


@pytest.fixture
def reports_folder(tmp_path: Path) -> Path:
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
def evidence(reports_folder: Path, report_params: Params) -> Evidence:
    return collect_main(reports_folder, report_params)
