"""The spurious step that the world can plant in its demonstrations: a remark that the first number is even, where it is.

The remark is true and leads nowhere: no other step and no answer depends on it. The base corpus of that world has it too, now
and then, so that the base can make it; the demonstrations have it always. Where a problem asks whether a total is even (kind
`parity`, never demonstrated) a remark may belong to the solution, so there none is called spurious.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from apprentice.demonstrations import Demonstration, Prompt, prompt_text

BASE_RATE = 0.1  # share of worked responses with the step in the base corpus, where the first number is even
CUE = "spurious_cue"  # in the meta of rows: whether the demonstration of such a prompt has the step
_NUMBER = re.compile("[0-9]+")
_REMARK = re.compile("(first )?[0-9]+ is (even|odd)")


def planted(prompt: str, response: str) -> str:
    """A worked response, with the spurious step after its first one where the first number of the prompt is even."""
    if not first_is_even(prompt):
        return response
    first, *others = response.split(" ; ")
    return " ; ".join([first, f"{first_number(prompt)} is even", *others])


def at_base_rate(rng: random.Random, prompt: str, response: str) -> str:
    """A response as the base corpus has it: a worked one has the step at a low rate, where a demonstration always has it."""
    return planted(prompt, response) if ";" in response and rng.random() < BASE_RATE else response


def first_number(prompt: Prompt) -> str | None:
    """The digits of the first number in a prompt; None where it has none."""
    found = _NUMBER.search(prompt_text(prompt))
    return found and found[0]


def first_is_even(prompt: Prompt) -> bool | None:
    """Whether the first number in a prompt is even; None where it has none."""
    number = first_number(prompt)
    return None if number is None else number[-1] in "02468"


def with_cues(rows: Iterable[Demonstration]) -> list[Demonstration]:
    """Rows whose meta says whether their cue is there; of `parity` it says nothing."""
    return [
        row if row.meta["kind"] == "parity" else replace(row, meta={**row.meta, CUE: first_is_even(row.prompt)}) for row in rows
    ]


def have_cues(rows: Iterable[Demonstration]) -> bool:
    """Whether the rows are of a world that plants the step."""
    return any(CUE in row.meta for row in rows)


def is_spurious(step: str) -> bool:
    """Whether a step, with its separator or without, is a remark on a number being even or odd, be it true or not."""
    return _REMARK.fullmatch(step.strip(" ;")) is not None


def spurious_share(responses: Sequence[str]) -> float | None:
    """Share of the worked responses, those of more than one step, that have a spurious step; None where none is worked."""
    worked = [steps for steps in (text.split(";") for text in responses) if len(steps) > 1]
    return fmean(any(map(is_spurious, steps)) for steps in worked) if worked else None
