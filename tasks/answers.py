"""The answers of training prompts, for the methods that are not demonstrations-only; nothing else reads them."""

import json
from collections.abc import Callable
from functools import cache

from apprentice.demonstrations import read_jsonl
from apprentice.verifiers import verify
from tasks.stage import Stage, StageError

Check = Callable[[str, str], bool | None]  # (prompt id, response text) -> right, wrong, or None without an answer


def check_of(stage: Stage) -> Check:
    """Whether a response to a training prompt is right, by the data's verifier; None for a prompt without an answer.

    Raises StageError when no prompt has one.
    """
    rows = {row["prompt_id"]: row for row in read_jsonl(stage.data / "clean" / "answers.jsonl")}
    if not rows:
        raise StageError(
            f"{stage.label}: data/clean/answers.jsonl is empty, so nothing can be verified. Set ingest.verifier and give "
            "rows an answer, or leave this method out"
        )

    @cache
    def check(prompt: str, response: str) -> bool | None:
        row = rows.get(prompt)
        return None if row is None else verify(row["verifier"], response, row["answer"])

    return check


def verifier_name(stage: Stage) -> str | None:
    """The verifier of the data at hand, as `ingest` chose it; None without one."""
    name = json.loads((stage.data / "reports" / "ingest" / "metrics.json").read_text())["verifier"]
    return None if name == "none" else str(name)
