"""From a source of demonstrations to clean, hashed, split tables in data/clean."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from apprentice.demonstrations import Prompt, Split, atomic_write, split_of, write_demonstrations, write_jsonl
from apprentice.world import WorldError, make_preferences, make_tables
from tasks.cleaning import Tables, add_answers, answer_rows, choose_verifier, clean, split_tables
from tasks.sources import SHOWN, Raw, read_source, recognise
from tasks.stage import Stage, StageError, run

DEPTH = 20  # of nesting in a rejected row, as it is shown
TABLES = ("demonstrations", "validation", "prompts", "evaluation")
Rows = list[dict[str, Any]]


def main(stage: Stage) -> None:
    """Read, clean and split the source; write eight tables and the counts."""
    clean_folder = stage.data / "clean"
    preferences: Rows = []
    if stage.config.source.kind == "world":
        tables, preferences, figures = _world_tables(stage)
        _write_rejected(clean_folder / "rejected.jsonl", [], [])
    else:
        tables, figures = _source_tables(stage, clean_folder / "rejected.jsonl")
    answers, disputed = answer_rows(tables["known"], figures["verifier"])
    for name in (*TABLES, "suboptimal"):
        write_demonstrations(clean_folder / f"{name}.jsonl", tables[name])
    write_jsonl(clean_folder / "preferences.jsonl", preferences)
    write_jsonl(clean_folder / "answers.jsonl", answers)
    sizes = {name: len(tables[name]) for name in (*TABLES, "suboptimal")}
    sizes |= {"preferences": len(preferences), "answers": len(answers)}
    stage.metrics({**figures, **sizes, "answers_disputed": disputed})
    stage.say(", ".join(f"{size} {name}" for name, size in sizes.items()) + f"; verifier: {figures['verifier']}")
    if disputed:
        stage.say(f"{disputed} prompts have several answers: the first one counts")
    _check_sizes({name: sizes[name] for name in TABLES})
    stage.say("next: `dvc repro validate` checks the tables")


def _world_tables(stage: Stage) -> tuple[Tables, Rows, dict[str, Any]]:
    config = stage.config
    if config.verifier not in ("auto", "none", "world"):
        raise StageError(f"ingest.verifier: the world is checked by `world` (or auto, or none), not {config.verifier!r}")

    def split(prompt: Prompt) -> Split:
        return split_of(prompt, config.validation_share, config.evaluation_share)

    try:
        tables = make_tables(stage.params.seed, config.world, split)
        preferences = make_preferences(stage.params.seed, config.world, split)
    except WorldError as error:
        raise StageError(str(error)) from error
    if config.verifier == "none":
        tables["evaluation"] = [replace(row, meta={**row.meta, "verifier": None}) for row in tables["evaluation"]]
    rows = sum(len(tables[name]) for name in (*TABLES, "suboptimal"))
    counts = {"rows_read": rows, "rows_kept": rows, "rows_rejected": 0, "rejected": {}, "unused": 0}
    return tables, preferences, {**counts, "shape": "world", "verifier": "none" if config.verifier == "none" else "world"}


def _source_tables(stage: Stage, rejected: Path) -> tuple[Tables, dict[str, Any]]:
    config = stage.config
    origin = config.source.name if config.source.kind == "hub" else config.source.path
    if config.source.kind != "hub":
        stage.expect_inside(stage.data.parent / config.source.path, "ingest.source.path")
    if next(read_source(config.source, stage.data.parent), None) is None:
        raise StageError(f"{origin}: no rows in it")
    shape = recognise(_rows(stage, "read"), config.fields)
    stage.say(f"{config.source.kind} {origin}: shape {shape.name} (columns {', '.join(shape.columns)})")
    cleaned = clean(_rows(stage, "cleaned"), shape.read, config, origin)
    verifier = choose_verifier(cleaned.rows, config.verifier)
    if verifier:
        cleaned = add_answers(cleaned, verifier)
    _write_rejected(rejected, cleaned.rejected, _rows(stage, "looked through for rejected ones"))
    figures = {
        "rows_read": len(cleaned.kept) + len(cleaned.rejected),
        "rows_kept": len(cleaned.rows),
        "rows_rejected": len(cleaned.rejected),
        "rejected": cleaned.reasons(),
    }
    _check_rejected(stage, figures)
    tables = split_tables(cleaned.rows, config, verifier)
    return tables, {**figures, "unused": len(tables["unused"]), "shape": shape.name, "verifier": verifier or "none"}


def _rows(stage: Stage, done: str) -> Iterator[Raw]:
    """The rows of the source, read once more: it is never held whole. Says how many are `done`."""
    said = time.monotonic()
    for number, raw in enumerate(read_source(stage.config.source, stage.data.parent), 1):
        yield raw
        if number % 10_000 == 0 and time.monotonic() - said >= stage.params.runtime.progress_seconds:
            said = time.monotonic()
            stage.say(f"{number:,} rows {done}")


def _write_rejected(path: Path, rejected: Rows, raws: Iterable[Raw]) -> None:
    """Escaped to ASCII, since the text of a rejected row may hold what UTF-8 cannot."""
    reasons = {row["line"]: row["reason"] for row in rejected}
    with atomic_write(path) as file:
        for raw in raws if reasons else ():
            if reason := reasons.get(raw.line):
                row = {"line": raw.line, "reason": reason, "row": raw.row}
                file.write(json.dumps(_shown(row), ensure_ascii=True, allow_nan=False) + "\n")


def _shown(value: Any, depth: int = 0) -> Any:
    """A value of a rejected row as strict JSON: long texts cut, what JSON cannot say or is nested deeply as text."""
    if isinstance(value, dict | list | tuple) and depth > DEPTH:
        return "..."
    if isinstance(value, dict):
        return {str(key): _shown(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item, depth + 1) for item in value]
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _check_rejected(stage: Stage, figures: dict[str, Any]) -> None:
    """Say what was rejected; stop when it is too much."""
    read, rejected = figures["rows_read"], figures["rows_rejected"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in figures["rejected"].items())
    stage.say(f"{read} rows read, {figures['rows_kept']} kept, {rejected} rejected" + (f" ({reasons})" if reasons else ""))
    if rejected > stage.config.max_rejected_share * read:
        raise StageError(
            f"{rejected} of {read} rows were rejected ({reasons}), more than ingest.max_rejected_share "
            f"({stage.config.max_rejected_share:g}) allows. data/clean/rejected.jsonl has each with line and reason"
        )


def _check_sizes(sizes: dict[str, int]) -> None:
    """The main line needs each of these tables."""
    empty = [table for table, size in sizes.items() if not size]
    if empty:
        raise StageError(
            f"no row with a response fell into {', '.join(empty)}: give more rows, map the response column in "
            "ingest.fields, or change ingest.validation_share and ingest.evaluation_share"
        )


run(__name__, main, __doc__)
