"""Great Expectations over the clean tables: a broken one stops the pipeline and is named with its first rows."""

import shutil
from typing import Any

from tasks.stage import Stage, StageError, run, stores_root, write_json

ADVICE = {
    "unknown_share": "the tokenizer does not know these words: name a real checkpoint in pretrain.checkpoint, "
    "or raise tokenizer.max_words",
    "not_encoded": "leave these rows out of the source, or write them otherwise (a chat template may refuse a role, as system)",
    "tokens": "shorten the rows, or raise validate.max_tokens (and the lengths of the model and of sampling with it)",
    "largest_class_share": "balance the classes of `quality`, or raise validate.max_class_share",
}
Row = dict[str, Any]


def main(stage: Stage) -> None:
    """Check every table, write the outcomes, and stop at what does not hold."""
    from apprentice.demonstrations import JsonLines
    from tasks.checkpoints import tokenizer_of
    from tasks.expectations import Checks, suite_of
    from tasks.frames import OPTIONAL, TABLES, count_pieces, frames_of, overview_of

    tables = {name: JsonLines(stage.data / "clean" / f"{name}.jsonl") for name in TABLES}
    overview = overview_of(tables)
    skipped = [name for name in OPTIONAL if not overview.rows[name]]
    checked = [name for name in TABLES if name not in skipped]
    suites = {name: suite_of(name, stage.config, stage.params.ingest.max_characters) for name in [*checked, "tables"]}
    docs = stores_root() / ".telemetry" / "data_docs"
    shutil.rmtree(docs, ignore_errors=True)
    checks, pieces = Checks(suites), count_pieces(overview)
    stage.start_clock()
    for done, (table, frame) in enumerate(frames_of(tables, overview, tokenizer_of(stage, "tokenizer")), 1):
        checks.check(table, frame)
        stage.progress(done, pieces)
    outcomes, docs_error, summaries = checks.outcomes(), checks.build_docs(docs), frame  # the last frame is of all tables
    write_json(stage.reports / "validation.json", outcomes + [_skipped(name) for name in skipped])
    failed = [outcome for outcome in outcomes if not outcome["success"]]
    stage.metrics(
        {
            "expectations": len(outcomes),
            "failed": len(failed),
            "rows": overview.rows,
            "longest_tokens": {row["id"]: row["longest_tokens"] for row in summaries},
            "unknown_share": {row["id"]: round(row["unknown_share"], 6) for row in summaries},
            "skipped": skipped,
        }
    )
    if docs_error:
        stage.warn(f"the Data Docs were not built ({docs_error}); the checks themselves are not touched by that")
    _stop_at(failed)
    (stage.reports / "passed").write_text("every expectation holds\n")  # whatever the tables: other counts retrain no base
    stage.say(f"{len(outcomes)} expectations hold; page: {'not built' if docs_error else docs / 'index.html'}")


def _skipped(table: str) -> Row:
    """What stands in validation.json for a table that was not checked, since it is empty and may be."""
    return {
        "table": table,
        "expectation": "skipped_as_empty",
        "column": None,
        "success": True,
        "checked": 0,
        "unexpected": 0,
        "first_rows": [],
    }


def _stop_at(failed: list[Row]) -> None:
    if not failed:
        return
    lines = []
    for outcome in failed:
        rows = "; ".join(f"{row['id']}: {str(row['value'])[:200]!r}" for row in outcome["first_rows"])
        name = f"{outcome['table']}: {outcome['expectation']}({outcome['column']})"
        lines.append(f"  {name} does not hold for {outcome['unexpected']} of {outcome['checked']} rows. First: {rows}")
        if outcome["column"] in ADVICE:
            lines.append(f"    {ADVICE[outcome['column']]}")
    raise StageError(
        f"{len(failed)} of the clean tables' expectations broken (all in data/reports/validate/validation.json):\n"
        + "\n".join(lines)
    )


run(__name__, main, __doc__)
