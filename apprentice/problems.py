"""The embedded world's problems: ten kinds, how each is drawn, worded and solved step by step.

The kinds form three groups: "A" is demonstrated, "B" appears in the pool of prompts only, "C" in neither. All text is
words separated by single spaces, all from `WORDS`; every number is one word.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from apprentice.solutions import (
    NUMBERS,
    Numbers,
    Slips,
    Solution,
    add,
    double_or_add,
    solve_extreme,
    solve_order,
    solve_parity,
    solve_running,
    solve_weeks,
    turn,
)

Group = Literal["A", "B", "C"]

NAMES = ("tom", "ann", "bob", "sue", "mia", "leo", "sam", "zoe", "kim", "joe")
ITEMS = ("apples", "coins", "cards", "books", "shells")
FILLERS = ("well", "hmm", "ok", "so", "wait", "then")
_OTHER_WORDS = """
    q : answer first ; , . ? + - * = -> h take pick yes no odd even maybe i guess think
    has how many gets loses list of find the largest smallest reverse sort what is total
    clock at after hours and start number now double plus waits waited weeks days
"""
WORDS: list[str] = [*map(str, range(NUMBERS)), *NAMES, *ITEMS, *FILLERS, *_OTHER_WORDS.split()]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; `data` are its numbers.

    chain: start, then gains and (negative) losses; machine: start, then what to add, 0 for doubling; clock: hour, then
    hours; weeks: weeks, then days; the others: the list itself.
    """

    kind: str
    prompt: str
    data: Numbers


class Kind(NamedTuple):
    """How one kind of problem is drawn (its numbers, for so many steps), worded (one of two ways) and solved."""

    group: Group
    draw: Callable[[random.Random, int], Numbers]
    words: Callable[[random.Random, Numbers], str]
    solve: Callable[[Numbers, Slips], Solution]


def make_problem(rng: random.Random, kind: str, steps: int) -> Problem:
    """Draw a problem of `steps` reasoning steps, at least 2."""
    data = KINDS[kind].draw(rng, steps)
    return Problem(kind, KINDS[kind].words(rng, data), data)


def solve(problem: Problem, rng: random.Random | None = None, error_rate: float = 0.0) -> Solution:
    """Reasoning steps and answer; with an error rate each step's result may be wrong, and the error is carried on."""
    return KINDS[problem.kind].solve(problem.data, Slips(rng if error_rate else None, error_rate))


def group(kind: str) -> Group:
    """The group of a kind: "A" demonstrated, "B" in the pool only, "C" unseen."""
    return KINDS[kind].group


def _spaced(data: Iterable[int]) -> str:
    return " ".join(map(str, data))


def _draw_distinct(extra: int, rng: random.Random, steps: int) -> Numbers:
    return tuple(rng.sample(range(NUMBERS), steps + extra))


def _draw_addends(extra: int, high: int, rng: random.Random, steps: int) -> Numbers:
    while True:
        data = tuple([rng.randrange(1, high) for _ in range(steps + extra)])
        if sum(data) < NUMBERS - 4:
            return data


def _draw_chain(rng: random.Random, steps: int) -> Numbers:
    while True:
        data = [rng.randrange(1, 16)]
        value = peak = data[0]
        for _ in range(steps):
            change = rng.randrange(1, 10)
            if value >= change and rng.random() < 0.5:
                change = -change
            value += change
            peak = max(peak, value)
            data.append(change)
        if peak < NUMBERS and value < NUMBERS - 5:
            return tuple(data)


def _draw_machine(rng: random.Random, steps: int) -> Numbers:
    while True:
        data = [rng.randrange(1, 8)]
        value = data[0]
        for _ in range(steps):
            plus = 0 if rng.random() < 0.4 else rng.randrange(1, 8)
            value += plus or value
            data.append(plus)
        if value < NUMBERS - 4:
            return tuple(data)


def _draw_clock(rng: random.Random, steps: int) -> Numbers:
    return (rng.randrange(12), *[rng.randrange(1, 12) for _ in range(steps)])


def _draw_weeks(rng: random.Random, steps: int) -> Numbers:
    while True:
        weeks, days = rng.randrange(1, 5), [rng.randrange(1, 7) for _ in range(steps - 1)]
        if 7 * weeks + sum(days) < NUMBERS - 4:
            return (weeks, *days)


def _words_of_list(question: str, order: str, rng: random.Random, data: Numbers) -> str:
    return question.format(_spaced(data)) if rng.random() < 0.5 else f"list {_spaced(data)} . {order}"


def _words_of_chain(rng: random.Random, data: Numbers) -> str:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    changes = [f"gets {change}" if change > 0 else f"loses {-change}" for change in data[1:]]
    if rng.random() < 0.5:
        return f"{name} has {data[0]} {item} , {' , '.join(changes)} . how many {item} ?"
    return f"how many {item} has {name} ? {name} has {data[0]} then {' then '.join(changes)} ."


def _words_of_machine(rng: random.Random, data: Numbers) -> str:
    orders = [f"plus {plus}" if plus else "double" for plus in data[1:]]
    if rng.random() < 0.5:
        return f"start {data[0]} , {' , '.join(orders)} ?"
    return f"number {data[0]} . now {' then '.join(orders)} ."


def _words_of_clock(rng: random.Random, data: Numbers) -> str:
    if rng.random() < 0.5:
        return f"clock at {data[0]} , " + " , ".join([f"after {hours} hours" for hours in data[1:]]) + " ?"
    return f"the clock is at {data[0]} . " + " and ".join([f"{hours} hours" for hours in data[1:]]) + " after ?"


def _words_of_weeks(rng: random.Random, data: Numbers) -> str:
    name, days = rng.choice(NAMES), [f"{days} days" for days in data[1:]]
    if rng.random() < 0.5:
        return f"{name} waits {data[0]} weeks and {' and '.join(days)} . how many days ?"
    return f"how many days has {name} waited : {data[0]} weeks plus {' plus '.join(days)} ?"


KINDS: dict[str, Kind] = {
    "chain": Kind("A", _draw_chain, _words_of_chain, partial(solve_running, add)),
    "max": Kind(
        "A",
        partial(_draw_distinct, 1),
        partial(_words_of_list, "largest of {} ?", "find the largest ."),
        partial(solve_extreme, max),
    ),
    "rev": Kind(
        "A",
        partial(_draw_distinct, 0),
        partial(_words_of_list, "reverse {} .", "reverse the list ."),
        partial(solve_order, "take", reversed),
    ),
    "sum": Kind(
        "A",
        partial(_draw_addends, 1, 12),
        partial(_words_of_list, "total of {} ?", "what is the total ?"),
        partial(solve_running, add),
    ),
    "min": Kind(
        "B",
        partial(_draw_distinct, 1),
        partial(_words_of_list, "smallest of {} ?", "find the smallest ."),
        partial(solve_extreme, min),
    ),
    "clock": Kind("B", _draw_clock, _words_of_clock, partial(solve_running, turn)),
    "machine": Kind("B", _draw_machine, _words_of_machine, partial(solve_running, double_or_add)),
    "sort": Kind(
        "B",
        partial(_draw_distinct, 0),
        partial(_words_of_list, "sort {} .", "sort the list ."),
        partial(solve_order, "pick", sorted),
    ),
    "weeks": Kind("C", _draw_weeks, _words_of_weeks, solve_weeks),
    "parity": Kind(
        "C",
        partial(_draw_addends, 0, 10),
        partial(_words_of_list, "is the total of {} even ?", "is the total even ?"),
        solve_parity,
    ),
}
