"""Worked solutions of the embedded world's problems, with or without slips on the way.

Each function takes a problem's numbers and returns its reasoning steps and its answer, all text. A slip in one step is
carried on through the rest.
"""

import random
from collections.abc import Callable, Iterable

Numbers = tuple[int, ...]
Solution = tuple[list[str], str]
Step = Callable[[int, int], tuple[str, int]]  # running value and next number -> what is written, its right result

NUMBERS = 20  # every number of the world is below it


class Slips:
    """Errors of a solver: each step's result is wrong with probability `rate` (0: never, and nothing is drawn)."""

    def __init__(self, rng: random.Random | None = None, rate: float = 0.0) -> None:
        self._random = rng
        self._rate = rate

    def happens(self) -> bool:
        """Whether this step goes wrong."""
        return self._random is not None and self._random.random() < self._rate

    def number(self, right: int) -> int:
        """The step's result: the right number brought into range, or one up to 4 away from it."""
        right = max(0, min(NUMBERS - 1, right))
        if self._random is None or not self.happens():
            return right
        while True:
            wrong = right + self._random.choice((-4, -3, -2, -1, 1, 2, 3, 4))
            if 0 <= wrong < NUMBERS:
                return wrong


def _running(value: int, numbers: Numbers, step: Step, slips: Slips) -> list[str]:
    """Steps `<text> = <result>`, each from the result before; the last word is the final result."""
    lines = []
    for number in numbers:
        text, result = step(value, number)
        value = slips.number(result)
        lines.append(f"{text} = {value}")
    return lines


def _last(lines: list[str]) -> Solution:
    return lines, lines[-1].rsplit(" ", 1)[1]


def add(value: int, number: int) -> tuple[str, int]:
    """A gain or a (negative) loss."""
    return (f"{value} + {number}", value + number) if number > 0 else (f"{value} - {-number}", value + number)


def double_or_add(value: int, number: int) -> tuple[str, int]:
    """A step of the machine; 0 doubles."""
    return add(value, number) if number else (f"{value} * 2", value * 2)


def turn(value: int, number: int) -> tuple[str, int]:
    """Hours on a clock of twelve."""
    return f"{value} h {number}", (value + number) % 12


def solve_running(step: Step, data: Numbers, slips: Slips) -> Solution:
    """Fold the numbers one by one: a chain, a sum, a machine, a clock."""
    return _last(_running(data[0], data[1:], step, slips))


def solve_weeks(data: Numbers, slips: Slips) -> Solution:
    """Weeks into days, then the days that are left."""
    value = slips.number(7 * data[0])
    return _last([f"{data[0]} * 7 = {value}", *_running(value, data[1:], add, slips)])


def solve_extreme(pick: Callable[[int, int], int], data: Numbers, slips: Slips) -> Solution:
    """Keep the better (`pick`: max or min) of two, along the list; a slip keeps the other."""
    value, lines = data[0], []
    for number in data[1:]:
        best = pick(value, number)
        if slips.happens():
            best = value + number - best
        lines.append(f"{value} , {number} -> {best}")
        value = best
    return _last(lines)


def solve_order(word: str, order: Callable[[Numbers], Iterable[int]], data: Numbers, slips: Slips) -> Solution:
    """Name the numbers in their new order, one a step."""
    numbers = [slips.number(number) for number in order(data)]
    return [f"{word} {number}" for number in numbers], " ".join(map(str, numbers))


def solve_parity(data: Numbers, slips: Slips) -> Solution:
    """The total, then whether it is even: yes or no."""
    lines, total = solve_running(add, data, slips)
    even = (int(total) % 2 == 0) != slips.happens()
    return [*lines, f"{total} is {'even' if even else 'odd'}"], "yes" if even else "no"
