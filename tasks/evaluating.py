"""An evaluation: the models it takes, measured, and what is written of it."""

from collections.abc import Sequence

from apprentice.compute import Compute
from apprentice.demonstrations import write_jsonl
from apprentice.tilt import FILE as TILT
from apprentice.tilt import load_tilt, read_tilt
from tasks.checkpoints import compute_of, model_folder, table, tokenizer_of
from tasks.kept import keeping
from tasks.measuring import Measured, headline, held_out_rows, measure, write_rows
from tasks.needs import measured_beside
from tasks.roles import frozen_roles, preflight
from tasks.stage import Stage


def evaluate_stage(stage: Stage) -> None:
    """Measure `stage.item` on the held-out sets; write prompts.csv, samples.jsonl and metrics.json."""
    compute = keeping(stage, compute_of(stage))
    assert stage.item is not None
    _preflight(stage, stage.item, compute)
    found = measured(stage, list(dict.fromkeys((stage.item, "sft", "base"))), compute)
    models = {"model": found[stage.item], "sft": found["sft"], "base": found["base"]}
    evaluation, validation = table(stage, "evaluation"), table(stage, "validation")
    stage.say(f"{len(evaluation)} held-out prompts, greedy and {stage.params.evaluate.samples} samples each")
    rows, samples, temperature = measure(models, evaluation, validation, stage, compute)
    rows += held_out_rows(models["model"], validation, compute)
    write_rows(stage.reports / "prompts.csv", rows)
    write_jsonl(stage.reports / "samples.jsonl", samples)
    means = {**headline(rows), "temperature": temperature}
    stage.metrics(means)
    stage.say(", ".join(f"{name} {value:.3f}" for name, value in means.items()))


def measured(stage: Stage, names: Sequence[str], compute: Compute) -> dict[str, Measured]:
    """Models of the pipeline by name, frozen, as they are measured."""
    parts = {name: _parts(stage, name) for name in names}
    roles = frozen_roles(stage, [name for name in names if not parts[name]], compute)
    models = {name: load_tilt(model_folder(stage, name), compute) if parts[name] else roles[name] for name in names}
    return {name: Measured(models[name], tokenizer_of(stage, (parts[name] or [name])[0])) for name in names}


def _preflight(stage: Stage, name: str, compute: Compute) -> None:
    whole = _parts(stage, name)
    preflight(stage, compute, *measured_beside([] if whole else [name]), whole=whole)


def _parts(stage: Stage, name: str) -> list[str]:
    """Of two models decoded as one: the target and the baseline, which are both loaded whole; of another model none."""
    folder = model_folder(stage, name)
    return [read_tilt(folder)[part] for part in ("target", "baseline")] if (folder / TILT).exists() else []
