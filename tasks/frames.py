"""The columns that `validate` checks, made of so many rows at a time; what takes all rows to know comes first."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Any

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
PIECE = 20_000  # rows in memory at once
Row = dict[str, Any]
Tables = Mapping[str, Iterable[Row]]  # each is gone through more than once


@dataclass(frozen=True)
class Overview:
    """What is known of all rows. rows: of each table. again: ids that come more than once in a table, and how often. questions:
    of the prompts that are named by their id. splits: those that a question stands in, over all tables."""

    rows: dict[str, int] = field(default_factory=dict)
    again: dict[str, Counter[str]] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    splits: dict[str, frozenset[str]] = field(default_factory=dict)

    def columns(self, table: str, row: Row) -> Row:
        """Of a row: how many rows of its table have its id, and the number of splits that its question stands in."""
        own = str(row.get("prompt_id", row.get("id")))
        return {
            "rows_of_id": self.again[table].get(own, 1),
            "splits_of_prompt": len(self.splits[_question_of(row, self.questions)]),
        }


def overview_of(tables: Tables) -> Overview:
    """Go through all tables: once for the prompts that others name by id, and once for all else."""
    from apprentice.demonstrations import prompt_id

    found, shared = Overview(), dict[frozenset[str], frozenset[str]]()
    named = {str(row["prompt_id"]) for rows in tables.values() for row in rows if "prompt_id" in row}
    for row in (row for rows in tables.values() for row in rows if named and "prompt" in row):
        if (key := prompt_id(row["prompt"])) in named:
            found.questions[key] = _question_key(row["prompt"])
    for table, rows in tables.items():
        seen, again = set[str](), Counter[str]()
        found.rows[table] = 0
        for row in rows:
            found.rows[table] += 1
            own, question = str(row.get("prompt_id", row.get("id"))), _question_of(row, found.questions)
            if own in seen:
                again[own] += 1
            seen.add(own)
            splits = found.splits.get(question, frozenset()) | {TABLES[table]}
            found.splits[question] = shared.setdefault(splits, splits)
        found.again[table] = Counter({own: more + 1 for own, more in again.items()})
    return found


@dataclass
class Totals:
    """Of a table's rows so far: tokens of the longest, unknown tokens, all tokens."""

    longest: int = 0
    unknown: int = 0
    tokens: int = 0

    def add(self, frame: list[Row]) -> None:
        """Count a piece."""
        self.longest = max([self.longest, *(row["tokens"] or 0 for row in frame)])
        self.unknown += sum(row["unknown"] for row in frame)
        self.tokens += sum(row["all_tokens"] for row in frame)


def frames_of(tables: Tables, overview: Overview, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, list[Row]]]:
    """The tables that are not skipped, in pieces of `PIECE` rows; in the end `tables`, with a row for each that holds texts."""
    totals, classes = dict[str, Totals](), Counter[str]()
    for table, rows in tables.items():
        if not overview.rows[table] and table in OPTIONAL:
            continue
        for some in _pieces(rows):
            frame = [{**_KINDS.get(table, _checked)(row), **overview.columns(table, row)} for row in some]
            if table != "answers":
                _count_tokens(frame, some, tokenizer, SIDES if table == "preferences" else ("response",))
                totals.setdefault(table, Totals()).add(frame)
            if table in ("demonstrations", "suboptimal"):
                classes.update(row["quality"] for row in frame if row["quality"] is not None)
            yield table, frame
    yield "tables", [_summary(table, overview.rows[table], total, classes) for table, total in totals.items()]


def count_pieces(overview: Overview) -> int:
    """How many frames `frames_of` makes, the last one over all tables included."""
    return 1 + sum(max(1, ceil(rows / PIECE)) for table, rows in overview.rows.items() if rows or table not in OPTIONAL)


def _pieces(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """At least one, which may be empty."""
    source = iter(rows)
    piece = list(islice(source, PIECE))
    yield piece
    while piece := list(islice(source, PIECE)):
        yield piece


def _question_of(row: Row, questions: Mapping[str, str]) -> str:
    """The question of a row's prompt; of a prompt known by its id only, and in no table, the id."""
    own = str(row.get("prompt_id"))
    return questions.get(own, own) if "prompt_id" in row else _question_key(row.get("prompt"))


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


def _summary(table: str, rows: int, total: Totals, classes: Counter[str]) -> Row:
    """One table; the classes are those of all training rows, so the row of the demonstrations alone bears their balance."""
    largest = max(classes.values(), default=0) / max(classes.total(), 1)
    return {
        "id": table,
        "rows": rows,
        "longest_tokens": total.longest,
        "unknown_share": total.unknown / max(total.tokens, 1),
        "largest_class_share": largest if table == "demonstrations" else None,
    }


_KINDS: dict[str, Callable[[Row], Row]] = {"preferences": _checked_pair, "answers": _checked_answer}
