"""Great Expectations over the clean tables: a broken one stops the pipeline and is named with its first rows."""

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from tasks.stage import Stage, StageError, run, stores_root, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TABLES = {"demonstrations": "train", "validation": "validation", "prompts": "train", "evaluation": "evaluation"}
FIELDS = ("answer", "id", "meta", "prompt", "quality", "response", "source")
ADVICE = {
    "unknown_share": "the tokenizer does not know these words: name a real checkpoint in pretrain.checkpoint, "
    "or raise tokenizer.max_words",
    "tokens": "shorten the rows, or raise validate.max_tokens (and the lengths of the model and of sampling with it)",
    "largest_class_share": "balance the classes of `quality`, or raise validate.max_class_share",
}
Row = dict[str, Any]


def main(stage: Stage) -> None:
    """Check every table, write the outcomes, and stop at what does not hold."""
    from transformers import AutoTokenizer

    from apprentice.demonstrations import read_jsonl
    from tasks.expectations import run_suites, suite_of

    tables = {name: read_jsonl(stage.data / "clean" / f"{name}.jsonl") for name in TABLES}
    tokenizer = AutoTokenizer.from_pretrained(stage.data / "models" / "tokenizer")
    frames = make_frames(tables, tokenizer)
    suites = {name: suite_of(name, stage.config, stage.params.ingest.max_characters) for name in frames}
    docs = stores_root() / ".telemetry" / "data_docs"
    shutil.rmtree(docs, ignore_errors=True)
    outcomes, docs_error = run_suites(frames, suites, docs)
    write_json(stage.reports / "validation.json", outcomes)
    failed = [outcome for outcome in outcomes if not outcome["success"]]
    stage.metrics(
        {
            "expectations": len(outcomes),
            "failed": len(failed),
            "rows": {name: len(rows) for name, rows in tables.items()},
            "longest_tokens": {name: max((row["tokens"] for row in frames[name]), default=0) for name in TABLES},
            "unknown_share": {row["id"]: round(row["unknown_share"], 6) for row in frames["tables"]},
        }
    )
    if docs_error:
        stage.warn(f"the Data Docs were not built ({docs_error}); the checks themselves are not touched by that")
    _stop_at(failed)
    stage.say(f"{len(outcomes)} expectations hold; page: {'not built' if docs_error else docs / 'index.html'}")


def make_frames(tables: dict[str, list[Row]], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[Row]]:
    """The columns that the suites check: one frame per table, and `tables` with one row for each of them."""
    from apprentice.demonstrations import digest

    splits: dict[str, set[str]] = {}
    for name, rows in tables.items():
        for row in rows:
            splits.setdefault(digest(row.get("prompt")), set()).add(TABLES[name])
    frames = {name: [_checked(row, splits) for row in rows] for name, rows in tables.items()}
    for name, rows in tables.items():
        _count_tokens(frames[name], rows, tokenizer)
    frames["tables"] = [_summary(name, rows) for name, rows in frames.items()]
    return frames


def _checked(row: Row, splits: dict[str, set[str]]) -> Row:
    from apprentice.demonstrations import digest

    prompt, response, meta = row.get("prompt"), row.get("response"), row.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    return {
        "id": _scalar(row.get("id")),
        "fields": " ".join(sorted(row)),
        **{f"{name}_type": type(row.get(name)).__name__ for name in FIELDS},
        "id_is_hash": row.get("id") == digest([prompt, response])[:16],
        "splits_of_prompt": len(splits[digest(prompt)]),
        "prompt": _text(prompt),
        "response": response if isinstance(response, str) else None,
        "quality": _scalar(row.get("quality")),
        "answer": _scalar(row.get("answer")),
        "domain": _scalar(meta.get("domain")),
        "verifier": _scalar(meta.get("verifier")),
    }


def _scalar(value: Any) -> str | None:
    """A value that can be looked up in a set, whatever stood there."""
    return value if value is None or isinstance(value, str) else repr(value)


def _text(prompt: Any) -> str | None:
    from apprentice.demonstrations import prompt_text

    return prompt_text(prompt) if isinstance(prompt, str) or _is_chat(prompt) else None


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )


def _count_tokens(frame: list[Row], rows: list[Row], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add the columns `tokens` (prompt with its chat frame, and response) and `unknown` to a frame."""
    from apprentice.tokens import encode_prompts, encode_responses

    usable = ["" if row["prompt"] is None else raw["prompt"] for row, raw in zip(frame, rows, strict=True)]
    prompts = encode_prompts(tokenizer, usable)
    responses = encode_responses(tokenizer, [row["response"] or "" for row in frame])
    for row, prompt, response in zip(frame, prompts, responses, strict=True):
        ids = prompt + (response if row["response"] is not None else [])
        row["tokens"] = len(ids)
        row["unknown"] = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)


def _summary(name: str, rows: list[Row]) -> Row:
    classes = Counter(row["quality"] for row in rows if row["quality"] is not None)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "id": name,
        "rows": len(rows),
        "unknown_share": sum(row["unknown"] for row in rows) / max(tokens, 1),
        "largest_class_share": max(classes.values(), default=0) / max(classes.total(), 1),
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
