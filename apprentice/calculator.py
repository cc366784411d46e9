"""A step verifier for solutions with calculator annotations, `<<48/2=24>>`, as GSM8K writes them: exact rational arithmetic."""

import operator
import re
from collections.abc import Callable
from fractions import Fraction

_ANNOTATION = re.compile(r"<<(.*?)>>")
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)|(?P<sign>[-+*/()%]))\s*")
_RESULT = re.compile(r"\s*[-+]?[\d,]*(?:\.(?P<decimals>\d*))?(?P<percent>%?)\s*")
_LEVELS: tuple[dict[str, Callable[[Fraction, Fraction], Fraction]], ...] = (
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.truediv},
)
_DEEPEST = 50  # nested brackets and signs


def calculator_steps(solution: str) -> list[bool]:
    """Per line of a solution, whether each of its annotations `<<expression=result>>` is right; a line without one is.

    A result may be rounded or cut to the decimals it is written with; a malformed annotation, or a
    result that is no plain number, is wrong.
    """
    return [all(map(_holds, _ANNOTATION.findall(line))) for line in solution.splitlines()]


def _holds(annotation: str) -> bool:
    expression, _, result = annotation.rpartition("=")
    try:
        exact, written = evaluate(expression), evaluate(result)
    except (ValueError, ZeroDivisionError):
        return False
    shape = _RESULT.fullmatch(result)
    if exact == written or shape is None or not shape["decimals"]:
        return exact == written and shape is not None
    unit = Fraction(1, 10 ** len(shape["decimals"]) * (100 if shape["percent"] else 1))
    cut = exact * written >= 0 and 0 <= abs(exact) - abs(written) < unit
    return cut or abs(exact - written) <= unit / 2


def evaluate(text: str) -> Fraction:
    """The value of an expression of + - * / ( ) %, decimals and thousands commas. Raises ValueError if it is malformed."""
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"no arithmetic at {place} of {text!r}")
        tokens.append(match["number"] or match["sign"])
        place = match.end()
    value, rest = _level(tokens, 0, 0)
    if rest:
        raise ValueError(f"nothing should follow in {text!r}, but {rest[0]!r} does")
    return value


def _level(tokens: list[str], level: int, depth: int) -> tuple[Fraction, list[str]]:
    """Value of the longest expression of this level that the tokens begin with, and the tokens after it."""
    if level == len(_LEVELS):
        return _factor(tokens, depth)
    value, tokens = _level(tokens, level + 1, depth)
    while tokens and tokens[0] in _LEVELS[level]:
        sign = tokens[0]
        other, tokens = _level(tokens[1:], level + 1, depth)
        value = _LEVELS[level][sign](value, other)
    return value, tokens


def _factor(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    """A number, a signed factor or a bracket, each possibly a percentage."""
    if not tokens or depth > _DEEPEST:
        raise ValueError("expected a number" if not tokens else "too deeply nested")
    first, rest = tokens[0], tokens[1:]
    if first in "+-":
        value, rest = _factor(rest, depth + 1)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = _level(rest, 0, depth + 1)
        if not rest or rest[0] != ")":
            raise ValueError("a bracket is not closed")
        rest = rest[1:]
    elif first[0].isdigit() or first[0] == ".":
        value = Fraction(first.replace(",", ""))
    else:
        raise ValueError(f"expected a number, got {first!r}")
    return (value / 100, rest[1:]) if rest[:1] == ["%"] else (value, rest)
