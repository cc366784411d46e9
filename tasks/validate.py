"""Great Expectations over the clean tables: a broken one stops the pipeline and is named with its first rows."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.stage import Stage, StageError, run, stores_root, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TABLES = {
    "demonstrations": "train",
    "validation": "validation",
    "prompts": "train",
    "evaluation": "evaluation",
    "suboptimal": "train",
    "preferences": "train",
    "answers": "train",
}
OPTIONAL = ("suboptimal", "preferences", "answers")  # these may be empty, and are then not checked
FIELDS = ("answer", "id", "meta", "prompt", "quality", "response", "source")
PAIR_FIELDS = ("chosen", "id", "meta", "prompt", "rejected", "source")
SIDES = ("chosen", "rejected")
ANSWER_FIELDS = ("answer", "prompt_id", "verifier")
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
    from apprentice.demonstrations import read_jsonl
    from tasks.checkpoints import tokenizer_of
    from tasks.expectations import run_suites, suite_of

    tables = {name: read_jsonl(stage.data / "clean" / f"{name}.jsonl") for name in TABLES}
    tokenizer = tokenizer_of(stage, "tokenizer")
    frames = make_frames(tables, tokenizer)
    suites = {name: suite_of(name, stage.config, stage.params.ingest.max_characters) for name in frames}
    docs = stores_root() / ".telemetry" / "data_docs"
    shutil.rmtree(docs, ignore_errors=True)
    outcomes, docs_error = run_suites(frames, suites, docs)
    skipped = [name for name in OPTIONAL if name not in frames]
    write_json(stage.reports / "validation.json", outcomes + [_skipped(name) for name in skipped])
    failed = [outcome for outcome in outcomes if not outcome["success"]]
    stage.metrics(
        {
            "expectations": len(outcomes),
            "failed": len(failed),
            "rows": {name: len(rows) for name, rows in tables.items()},
            "longest_tokens": {row["id"]: row["longest_tokens"] for row in frames["tables"]},
            "unknown_share": {row["id"]: round(row["unknown_share"], 6) for row in frames["tables"]},
            "skipped": skipped,
        }
    )
    if docs_error:
        stage.warn(f"the Data Docs were not built ({docs_error}); the checks themselves are not touched by that")
    _stop_at(failed)
    (stage.reports / "passed").write_text("every expectation holds\n")  # whatever the tables: other counts retrain no base
    stage.say(f"{len(outcomes)} expectations hold; page: {'not built' if docs_error else docs / 'index.html'}")


def make_frames(tables: dict[str, list[Row]], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[Row]]:
    """The columns that the suites check: a frame for each table that is not skipped, and `tables` with a row for each text."""
    from apprentice.demonstrations import prompt_id

    prompts = [row.get("prompt") for rows in tables.values() for row in rows]
    keys = {prompt_id(prompt): _question_key(prompt) for prompt in prompts}
    splits: dict[str, set[str]] = {}
    for name, rows in tables.items():
        for row in rows:
            splits.setdefault(_prompt_key(row, keys), set()).add(TABLES[name])
    kinds = {"preferences": _checked_pair, "answers": _checked_answer}
    checked = {name: rows for name, rows in tables.items() if rows or name not in OPTIONAL}
    frames = {
        name: [{**kinds.get(name, _checked)(row), "splits_of_prompt": len(splits[_prompt_key(row, keys)])} for row in rows]
        for name, rows in checked.items()
    }
    texts = [name for name in frames if name != "answers"]
    for name in texts:
        _count_tokens(frames[name], checked[name], tokenizer, SIDES if name == "preferences" else ("response",))
    trained = [row["quality"] for name in ("demonstrations", "suboptimal") for row in frames.get(name, [])]
    classes = Counter(quality for quality in trained if quality is not None)
    frames["tables"] = [_summary(name, frames[name], classes) for name in texts]
    return frames


def _prompt_key(row: Row, keys: dict[str, str]) -> str:
    """The question of a row's prompt; of a prompt known by its id only, and in no table, the id."""
    return keys.get(str(row["prompt_id"]), str(row["prompt_id"])) if "prompt_id" in row else _question_key(row.get("prompt"))


def _question_key(prompt: Any) -> str:
    """The same for every writing of one question, whatever stands in the prompt's place."""
    from apprentice.demonstrations import prompt_id, question

    return prompt_id(prompt if _text(prompt) is None else question(prompt))


def _checked(row: Row) -> Row:
    """A row of the canonical schema."""
    from apprentice.demonstrations import digest

    prompt, response, meta = row.get("prompt"), row.get("response"), row.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    return {
        **_form(row, FIELDS),
        "id": _scalar(row.get("id")),
        "id_is_hash": row.get("id") == digest([prompt, response])[:16],
        "prompt": _text(prompt),
        "response": response if isinstance(response, str) else None,
        "quality": _scalar(row.get("quality")),
        "answer": _scalar(row.get("answer")),
        "domain": _scalar(meta.get("domain")),
        "verifier": _scalar(meta.get("verifier")),
    }


def _checked_pair(row: Row) -> Row:
    """A row of the preference pairs."""
    from apprentice.demonstrations import digest

    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    return {
        **_form(row, PAIR_FIELDS),
        "id": _scalar(row.get("id")),
        "id_is_hash": row.get("id") == digest([prompt, chosen, rejected])[:16],
        "prompt": _text(prompt),
        "chosen": chosen if isinstance(chosen, str) else None,
        "rejected": rejected if isinstance(rejected, str) else None,
        "responses_differ": chosen != rejected,
    }


def _checked_answer(row: Row) -> Row:
    """A row of the answers; one that its verifier does not accept, written bare, could never be given."""
    from apprentice.verifiers import BARE, verify

    answer, verifier, accepted = row.get("answer"), _scalar(row.get("verifier")), False
    if isinstance(answer, str) and verifier in BARE:
        with suppress(ValueError):
            accepted = verify(verifier, BARE[verifier](answer), answer)
    return {
        **_form(row, ANSWER_FIELDS),
        "id": _scalar(row.get("prompt_id")),
        "verifier": verifier,
        "answer_is_accepted": accepted,
    }


def _form(row: Row, fields: tuple[str, ...]) -> Row:
    """Which fields a row has, and of which types they are."""
    return {"fields": " ".join(sorted(row)), **{f"{name}_type": type(row.get(name)).__name__ for name in fields}}


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


def _count_tokens(frame: list[Row], rows: list[Row], tokenizer: "PreTrainedTokenizerBase", responses: tuple[str, ...]) -> None:
    """Add to a frame: `tokens` of prompt (with its chat frame) and response, the longer one of a pair; `all_tokens` of both
    sides of a pair; how many of those are `unknown`; and `not_encoded`, why a text of the row cannot be encoded, else None."""
    from apprentice.tokens import encode_prompts, encode_responses

    usable = ["" if row["prompt"] is None else raw["prompt"] for row, raw in zip(frame, rows, strict=True)]
    faults: dict[int, str] = {}
    prompts = _encoded(partial(encode_prompts, tokenizer), usable, faults)
    sides = [_encoded(partial(encode_responses, tokenizer), [row[side] or "" for row in frame], faults) for side in responses]
    for number, (row, prompt, *said) in enumerate(zip(frame, prompts, *sides, strict=True)):
        row["not_encoded"] = faults.get(number)
        texts = [prompt + (ids if row[column] is not None else []) for column, ids in zip(responses, said, strict=True)]
        row["tokens"], row["all_tokens"] = None if number in faults else max(map(len, texts)), sum(map(len, texts))
        unknown = tokenizer.unk_token_id
        row["unknown"] = 0 if unknown is None else sum(ids.count(unknown) for ids in texts)


def _encoded(
    encode: Callable[[Sequence[Any]], list[list[int]]], texts: Sequence[Any], faults: dict[int, str]
) -> list[list[int]]:
    """Token ids of texts; of one that cannot be encoded none, and the reason is put among the faults of its row."""
    with suppress(ValueError):
        return encode(texts)
    found = []
    for number, text in enumerate(texts):  # one by one, for its row
        try:
            found += encode([text])
        except ValueError as error:
            found.append([])
            faults.setdefault(number, str(error))
    return found


def _summary(name: str, rows: list[Row], classes: Counter[str]) -> Row:
    """One table; the classes are those of all training rows, so the row of the demonstrations alone bears their balance."""
    largest = max(classes.values(), default=0) / max(classes.total(), 1)
    return {
        "id": name,
        "rows": len(rows),
        "longest_tokens": max((row["tokens"] or 0 for row in rows), default=0),
        "unknown_share": sum(row["unknown"] for row in rows) / max(sum(row["all_tokens"] for row in rows), 1),
        "largest_class_share": largest if name == "demonstrations" else None,
    }


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
