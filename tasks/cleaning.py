"""From raw rows to the canonical schema: what is kept, and what is rejected why."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from apprentice.demonstrations import (
    QUALITIES,
    Demonstration,
    Message,
    Prompt,
    Split,
    demonstration,
    prompt_id,
    prompt_text,
    split_of,
)
from apprentice.sections import IngestConfig
from apprentice.verifiers import ANSWERS, plain_number
from tasks.sources import Raw, Row

ROLES = ("system", "user", "assistant")
NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")  # Unicode's Cc but \t and \n, Cs, replacement
SUBOPTIMAL = tuple(quality for quality in QUALITIES if quality != "expert")
Tables = dict[str, list[Demonstration]]


class Reject(ValueError):
    """This row is rejected; the message is the reason, as `what` or `what: details`."""


@dataclass
class Cleaned:
    """Rows kept, each with the line it came from, and rows rejected as {"line", "reason"}: no raw row is held."""

    kept: list[tuple[int, Demonstration]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[Demonstration]:
        """The rows kept, in their order."""
        return [row for _, row in self.kept]

    def reject(self, line: int, reason: str) -> None:
        """Put a row aside."""
        self.rejected.append({"line": line, "reason": reason})

    def reasons(self) -> dict[str, int]:
        """How many rows were rejected for which reason, details left out."""
        return dict(sorted(Counter(row["reason"].split(":")[0] for row in self.rejected).items()))


def clean(raws: Iterable[Raw], read: Callable[[Row], Row], config: IngestConfig, origin: str) -> Cleaned:
    """Normalise each row, reject what cannot be used, and make one row of those with the same prompt and response."""
    cleaned = Cleaned()
    same: dict[str, list[tuple[int, Demonstration]]] = {}
    for raw in raws:
        try:
            row = _canonical(raw, read, config.max_characters, origin)
            same.setdefault(row.id, []).append((raw.line, row))
        except Reject as error:
            cleaned.reject(raw.line, str(error))
    prompts: set[str] = set()
    for copies in same.values():
        line, others = copies[0][0], [other for other, _ in copies[1:]]
        try:
            row = _merged(copies)
        except Reject as error:
            for one in (line, *others):
                cleaned.reject(one, str(error))
            continue
        for other in others:
            cleaned.reject(other, "exact duplicate")
        prompt = prompt_id(row.prompt)
        if config.same_prompt == "first" and row.response is not None and prompt in prompts:
            cleaned.reject(line, "prompt seen before with another response")
            continue
        if row.response is not None:
            prompts.add(prompt)
        cleaned.kept.append((line, row))
    cleaned.rejected.sort(key=lambda rejected: rejected["line"])
    return cleaned


def _merged(copies: list[tuple[int, Demonstration]]) -> Demonstration:
    """The first of rows with the same prompt and response, with the quality and answer that any of them has.

    Rejected where two of them have different ones: which one holds must not depend on their order.
    """
    labels: dict[str, str | None] = {}
    for name in ("quality", "answer"):
        lines = {getattr(row, name): line for line, row in reversed(copies) if getattr(row, name) is not None}
        if len(lines) > 1:
            one, other, *_ = sorted(lines.values())
            raise Reject(f"conflicting duplicates: the same prompt and response in lines {one} and {other}, and another {name}")
        labels[name] = next(iter(lines), None)
    return replace(copies[0][1], **labels)


def add_answers(cleaned: Cleaned, verifier: str) -> Cleaned:
    """Give each demonstration the answer its verifier compares with; one without is rejected.

    A sub-optimal response may be wrong: such a row has no answer but the one that came with it.
    """
    answered = Cleaned(rejected=cleaned.rejected.copy())
    for line, row in cleaned.kept:
        answer = _answer(row, verifier)
        if answer is None and row.response is not None and (row.answer is not None or not _is_suboptimal(row)):
            answered.reject(line, f"no answer: the verifier {verifier} finds none")
        else:
            answered.kept.append((line, replace(row, answer=answer)))
    answered.rejected.sort(key=lambda rejected: rejected["line"])
    return answered


def _canonical(raw: Raw, read: Callable[[Row], Row], max_characters: int, origin: str) -> Demonstration:
    if raw.error or not isinstance(raw.row, dict):
        raise Reject(f"unreadable: {raw.error}")
    fields = read(raw.row)
    prompt = _prompt(fields.get("prompt"))
    response = _response(fields.get("response"))
    for name, text in (("prompt", prompt_text(prompt)), ("response", response or "")):
        if len(text) > max_characters:
            raise Reject(f"too long: {name} of {len(text)} characters")
    return demonstration(
        prompt,
        response,
        _optional("source", fields.get("source")) or f"{origin}:{raw.line}",
        quality=_optional("quality", fields.get("quality")),
        answer=_optional("answer", _number_as_text(fields.get("answer"))),
    )


def _number_as_text(value: Any) -> Any:
    """A number with every digit it has and no exponent, 72 for 72.0; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    number = Decimal(str(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite():
        raise Reject(f"not finite: answer is {value}")
    return plain_number(number)


def _prompt(value: Any) -> Prompt:
    if not isinstance(value, list):
        return _text("prompt", value)
    messages = [_message(item) for item in value]
    if not messages:
        raise Reject("empty prompt")
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"]  # the same prompt as plain text, so it has the same id and the same split
    return messages


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise Reject(f"wrong type: prompt holds a message whose role is none of {', '.join(ROLES)}")
    return {"role": item["role"], "content": _text("prompt", item.get("content"))}


def _response(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return None if value is None else _text("response", value)


def _optional(name: str, value: Any) -> str | None:
    return None if value is None or (isinstance(value, str) and not value.strip()) else _text(name, value)


def _text(name: str, value: Any) -> str:
    """The text with its line ends as \\n and its ends stripped, or a Reject."""
    if not isinstance(value, str):
        raise Reject(f"missing {name}" if value is None else f"wrong type: {name} is {type(value).__name__}, not text")
    text = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise Reject(f"empty {name}")
    if found := NO_TEXT.search(text):
        raise Reject(f"control characters: U+{ord(found[0]):04X} in {name} at {found.start()}")
    if not any(map(str.isalnum, text)):
        raise Reject(f"no words: {name} has neither letter nor digit")
    return text


def choose_verifier(rows: list[Demonstration], wanted: str) -> str | None:
    """The verifier's name; `auto` takes gsm8k when every demonstration ends in `#### number`, else none."""
    if wanted != "auto":
        return None if wanted == "none" else wanted
    responses = [row.response for row in rows if row.response is not None and not _is_suboptimal(row)]
    return "gsm8k" if responses and all(ANSWERS["gsm8k"](response) for response in responses) else None


def split_tables(rows: list[Demonstration], config: IngestConfig, verifier: str | None) -> Tables:
    """Each row to the table of its prompt's split; `prompts` are the distinct prompts of the train split.

    `suboptimal` are the train split's rows of quality mixed or poor. Held-out rows that are no demonstrations (such ones,
    and prompts alone) serve no table: they are returned under `unused`. Training rows with an answer come again as `known`.
    """
    names = ("demonstrations", "validation", "prompts", "evaluation", "suboptimal", "unused", "known")
    tables: Tables = {name: [] for name in names}
    pool: dict[str, Demonstration] = {}
    for row in rows:
        split = split_of(row.prompt, config.validation_share, config.evaluation_share)
        if split == "train":
            pool.setdefault(prompt_id(row.prompt), demonstration(row.prompt, None, row.source))
            tables["known"] += [row] if row.answer is not None else []
        table = _table_of(row, split)
        if table == "evaluation":
            row = replace(row, meta={**row.meta, "domain": "in_domain", "verifier": verifier})
        if table:
            tables[table].append(row)
    tables["prompts"] = list(pool.values())
    return tables


def answer_rows(known: Iterable[Demonstration], verifier: str) -> tuple[list[dict[str, Any]], int]:
    """The table of answers, one row {prompt_id, answer, verifier} a prompt, and how many prompts had different ones.

    The first answer of a prompt counts. Without a verifier ("none") nothing could compare with them: no rows.
    """
    answers: dict[str, str | None] = {}
    disputed: set[str] = set()
    for row in known if verifier != "none" else ():
        key = prompt_id(row.prompt)
        if answers.setdefault(key, row.answer) != row.answer:
            disputed.add(key)
    return [{"prompt_id": key, "answer": answer, "verifier": verifier} for key, answer in answers.items()], len(disputed)


def _answer(row: Demonstration, verifier: str) -> str | None:
    """The row's own answer in the verifier's form, else the one its response gives, if that is a demonstration."""
    if row.answer is None:
        return None if row.response is None or _is_suboptimal(row) else ANSWERS[verifier](row.response)
    if verifier == "gsm8k" and "####" not in row.answer:
        return ANSWERS[verifier](f"#### {row.answer}")
    return row.answer if verifier == "world" else ANSWERS[verifier](row.answer)


def _is_suboptimal(row: Demonstration) -> bool:
    return row.quality in SUBOPTIMAL


def _table_of(row: Demonstration, split: Split) -> str | None:
    """The table of a row; None for one that is in the pool only."""
    if split != "train":
        return "unused" if row.response is None or _is_suboptimal(row) else split
    if row.response is None:
        return None
    return "suboptimal" if _is_suboptimal(row) else "demonstrations"
