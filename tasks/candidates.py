"""The scored candidates of a prompt, as `pairs` and `rescore` write them."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from apprentice.demonstrations import read_jsonl
from tasks.stage import Stage

Candidate = dict[str, Any]  # prompt, prompt_id, response, reward, ended


def by_prompt(rows: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates that stand prompt by prompt, as one list a prompt."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]


def prompt_groups(stage: Stage, source: str) -> list[list[Candidate]]:
    """The candidates of data/<source>/candidates.jsonl, prompt by prompt."""
    return by_prompt(read_jsonl(stage.data / source / "candidates.jsonl"))


def scores(group: Sequence[Candidate]) -> list[float]:
    """The rewards of a prompt's candidates; -inf for one cut off before its end token, which may not be taken."""
    return [row["reward"] if row["ended"] else float("-inf") for row in group]
