"""From raw rows to the canonical schema: what is kept, and what is rejected why."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from apprentice.config import IngestConfig
from apprentice.demonstrations import Demonstration, Message, Prompt, demonstration, prompt_id, prompt_text, split_of
from apprentice.verifiers import ANSWERS
from tasks.sources import Raw, Row

ROLES = ("system", "user", "assistant")
Tables = dict[str, list[Demonstration]]


class Reject(ValueError):
    """This row is rejected; the message is the reason, as `what` or `what: details`."""


@dataclass
class Cleaned:
    """Rows kept, each with the raw row it came from, and rows rejected as {"line", "reason", "row"}."""

    kept: list[tuple[Raw, Demonstration]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[Demonstration]:
        """The rows kept, in their order."""
        return [row for _, row in self.kept]

    def reject(self, raw: Raw, reason: str) -> None:
        """Put a row aside."""
        self.rejected.append({"line": raw.line, "reason": reason, "row": raw.row})

    def reasons(self) -> dict[str, int]:
        """How many rows were rejected for which reason, details left out."""
        return dict(sorted(Counter(row["reason"].split(":")[0] for row in self.rejected).items()))


def clean(raws: Iterable[Raw], read: Callable[[Row], Row], config: IngestConfig, origin: str) -> Cleaned:
    """Normalise each row, reject what cannot be used, drop what was there before."""
    cleaned = Cleaned()
    ids: set[str] = set()
    prompts: set[str] = set()
    for raw in raws:
        try:
            row = _canonical(raw, read, config.max_characters, origin)
            if row.id in ids:
                raise Reject("exact duplicate")
            prompt = prompt_id(row.prompt)
            if config.same_prompt == "first" and row.response is not None and prompt in prompts:
                raise Reject("prompt seen before with another response")
        except Reject as error:
            cleaned.reject(raw, str(error))
            continue
        ids.add(row.id)
        if row.response is not None:
            prompts.add(prompt)
        cleaned.kept.append((raw, row))
    return cleaned


def add_answers(cleaned: Cleaned, verifier: str) -> Cleaned:
    """Give each row with a response the answer its verifier compares with; a row without one is rejected."""
    answered = Cleaned(rejected=cleaned.rejected.copy())
    for raw, row in cleaned.kept:
        answer = _answer(row, verifier)
        if answer is None and row.response is not None:
            answered.reject(raw, f"no answer: the verifier {verifier} finds none")
        else:
            answered.kept.append((raw, replace(row, answer=answer)))
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
    answer = fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return demonstration(
        prompt,
        response,
        _optional("source", fields.get("source")) or f"{origin}:{raw.line}",
        quality=_optional("quality", fields.get("quality")),
        answer=_optional("answer", answer),
    )


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
    for position, character in enumerate(text):
        if character == "\ufffd" or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"):
            raise Reject(f"control characters: U+{ord(character):04X} in {name} at {position}")
    if not any(map(str.isalnum, text)):
        raise Reject(f"no words: {name} has neither letter nor digit")
    return text


def choose_verifier(rows: list[Demonstration], wanted: str) -> str | None:
    """The verifier's name; `auto` takes gsm8k when every response ends in `#### number`, else none."""
    if wanted != "auto":
        return None if wanted == "none" else wanted
    responses = [row.response for row in rows if row.response is not None]
    return "gsm8k" if responses and all(ANSWERS["gsm8k"](response) for response in responses) else None


def _answer(row: Demonstration, verifier: str) -> str | None:
    """The row's own answer in the verifier's form, else the one its response gives."""
    if row.answer is None:
        return None if row.response is None else ANSWERS[verifier](row.response)
    if verifier == "gsm8k" and "####" not in row.answer:
        return ANSWERS[verifier](f"#### {row.answer}")
    return row.answer if verifier == "world" else ANSWERS[verifier](row.answer)


def split_tables(rows: list[Demonstration], config: IngestConfig, verifier: str | None) -> Tables:
    """Each row to the table of its prompt's split; `prompts` are the distinct prompts of the train split.

    Held-out prompts without a response serve no table: they are returned under `unused`.
    """
    tables: Tables = {"demonstrations": [], "validation": [], "prompts": [], "evaluation": [], "unused": []}
    pool: dict[str, Demonstration] = {}
    for row in rows:
        split = split_of(row.prompt, config.validation_share, config.evaluation_share)
        if split == "train":
            pool.setdefault(prompt_id(row.prompt), demonstration(row.prompt, None, row.source))
        if row.response is None:
            tables["unused"] += [row] if split != "train" else []
        elif split == "evaluation":
            tables[split].append(replace(row, meta={**row.meta, "domain": "in_domain", "verifier": verifier}))
        else:
            tables["demonstrations" if split == "train" else split].append(row)
    tables["prompts"] = list(pool.values())
    return tables
