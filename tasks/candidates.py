"""The scored candidates of a prompt, as `pairs` and `rescore` write them."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from apprentice.demonstrations import read_jsonl
from tasks.stage import Stage, StageError

Candidate = dict[str, Any]  # prompt, prompt_id, response, reward, ended
TIE = 1e-3  # the same response, scored in another batch, differs by roundings


def by_prompt(rows: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates that stand prompt by prompt, as one list a prompt."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]


def prompt_groups(stage: Stage, source: str) -> list[list[Candidate]]:
    """The candidates of data/<source>/candidates.jsonl, prompt by prompt."""
    return by_prompt(read_jsonl(stage.data / source / "candidates.jsonl"))


def scores(group: Sequence[Candidate]) -> list[float]:
    """The rewards of a prompt's candidates; -inf for one cut off before its end token, which may not be taken."""
    return [row["reward"] if row["ended"] else float("-inf") for row in group]


def check_rewards(stage: Stage, groups: Sequence[Sequence[Candidate]]) -> None:
    """Raise StageError for a reward that is NaN or infinite; a bad sign is where the candidates of no prompt differ in it."""
    rows = [row for group in groups for row in group]
    if broken := [row for row in rows if not math.isfinite(row["reward"])]:
        raise StageError(
            f"{stage.name}: the rewards of {len(broken)} of {len(rows)} candidates are NaN or infinite, the first for "
            f"{broken[0]['response']!r}: a model behind the reward is broken; run the stage that made it again"
        )
    rewards = [[row["reward"] for row in group] for group in groups]
    if all(max(found) - min(found) < TIE for found in rewards):
        stage.bad_sign(
            "the reward tells no two candidates of any prompt apart, so what follows learns from coin flips; look at the "
            "models or the verifier behind it"
        )


def tell_where_cut_off(tell: Callable[[str], None], ended: Sequence[bool], entry: str) -> None:
    """Tell it where most responses were cut off before their end token by the limit in params.yaml's `entry`."""
    if 2 * sum(ended) < len(ended):
        tell(f"{len(ended) - sum(ended)} of {len(ended)} responses were cut off before their end; raise {entry}")
