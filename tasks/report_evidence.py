"""What the report is made of: the files of data/reports, read, and the numbers of report.json computed from them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.config import Params
from apprentice.demonstrations import OUT_OF_DOMAIN, read_jsonl
from tasks.history import rows_of
from tasks.intervals import Interval, mean_interval, paired_difference, t_interval
from tasks.report_form import MAIN, Form
from tasks.report_metrics import metric_of, place
from tasks.stage import StageError, address_of

Values = dict[str, dict[str, float]]  # "<domain>/<metric>" -> prompt id -> value


@dataclass(frozen=True)
class Evidence:
    """All that the pages show: the numbers of report.json and the files behind them."""

    form: Form
    params: Params
    report: dict[str, Any]
    values: dict[str, Values]  # by model
    samples: dict[str, list[dict[str, Any]]]  # by model, rows of samples.jsonl
    histories: dict[str, list[dict[str, float]]]  # by stage, rows of history.csv without their empty cells
    metrics: dict[str, dict[str, Any]]  # by stage, its metrics.json


def collect_main(folder: Path, params: Params) -> Evidence:
    """Read what data/reports has of the main line and compute the numbers."""
    return collect(folder, params, MAIN, {model: folder / "evaluate" / model for model in params.evaluate.models})


def collect(
    folder: Path, params: Params, form: Form, evaluated: dict[str, Path], labels: dict[str, str] | None = None
) -> Evidence:
    """Read data/reports and compute the numbers of a report of this form.

    `evaluated` is the folder of each model's evaluation, in the order of the table; `labels` what each model learned from.
    """
    values = {model: read_values(place / "prompts.csv") for model, place in evaluated.items()}
    return Evidence(
        form=form,
        params=params,
        report={
            "seed": params.seed,
            **({"labels": labels} if labels is not None else {}),
            "models": {model: summary(values[model]) for model in evaluated},
            "differences": differences(values, params.report.baselines),
        },
        values=values,
        samples={model: _read_samples(place / "samples.jsonl") for model, place in evaluated.items()},
        histories={name: _read_history(folder / name / "history.csv") for name in form.trained},
        metrics={name: _read_metrics(folder / name / "metrics.json") for name in form.measured},
    )


def read_values(path: Path) -> Values:
    """The per-prompt values of one model; empty cells are left out, `out_of_domain` is added."""
    if not path.is_file():
        label = f"{path.parent.parent.name}@{path.parent.name}"
        raise StageError(f"{path} is missing: `dvc repro {address_of(label)}` writes it")
    found: Values = {}
    for row in rows_of(path):
        domains = [row["domain"], *(["out_of_domain"] if row["domain"] in OUT_OF_DOMAIN else [])]
        for name, text in row.items():
            if name not in ("id", "domain") and text:
                for domain in domains:
                    found.setdefault(f"{domain}/{name}", {})[row["id"]] = float(text)
    return {key: found[key] for key in sorted(found, key=place)}


def summary(values: Values) -> dict[str, Interval]:
    """Mean and interval of each metric."""
    return {key: _rounded(_interval(key, list(by_id.values()))) for key, by_id in values.items()}


def _interval(key: str, values: list[float]) -> Interval:
    """Only shares may take Wilson's interval (a KL that is always 0 is exact), and they end at 0 and 1."""
    if metric_of(key).unit != "%":
        return t_interval(values)
    found = mean_interval(values)
    return {end: None if value is None else min(1.0, max(0.0, value)) for end, value in found.items()}


def differences(values: dict[str, Values], baselines: list[str]) -> list[dict[str, Any]]:
    """Every model against every baseline but itself, paired over the prompts where both have the metric."""
    return [
        {"model": model, "baseline": baseline, "metric": key} | _rounded(paired_difference(by_id, values[baseline][key]))
        for model in values
        for baseline in baselines
        if model != baseline
        for key, by_id in values[model].items()
        if by_id.keys() & values[baseline].get(key, {}).keys()
    ]


def _rounded(interval: Interval) -> Interval:
    """Six decimals, and no negative zero, so that equal numbers are equal text."""
    return {key: None if value is None else round(value, 6) + 0.0 for key, value in interval.items()}


def _read_history(path: Path) -> list[dict[str, float]]:
    rows = rows_of(path) if path.is_file() else ()
    return [{key: float(text) for key, text in row.items() if text} for row in rows]


def _read_metrics(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _read_samples(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []
