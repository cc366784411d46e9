"""Verifiers: whether a response gives the right answer.

Read by `evaluate`, and by those methods that are not demonstrations-only: never by a method that says it is.
"""

import re
from collections.abc import Callable
from decimal import Decimal

_NUMBER = re.compile(r"([+-]?)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def world_answer(text: str) -> str | None:
    """What follows the one `answer :` of a response; None without one, with several, or after another question."""
    parts = text.split("answer :")
    if len(parts) != 2 or "q :" in parts[0]:
        return None
    return parts[1].strip() or None


def gsm8k_answer(text: str) -> str | None:
    """The number after the last `####`, normalised ($1,072.0 is 1072); None where not one number alone stands there."""
    _, marker, tail = text.rpartition("####")
    return _normal_number(tail) if marker else None


def plain_number(value: Decimal) -> str:
    """Every digit of a finite number and no more: 72 for 72.0, 0 for -0.00, no exponent, nothing rounded."""
    whole, _, fraction = format(value, "f").partition(".")
    return (f"{whole}.{fraction}".rstrip("0").rstrip(".") if fraction else whole) if value else "0"


def _normal_number(text: str) -> str | None:
    found = _NUMBER.fullmatch(text.replace(",", "").replace("$", " ").strip())
    return plain_number(Decimal("".join(found.groups()))) if found else None


def _gsm8k(response: str, answer: str) -> bool:
    wanted = gsm8k_answer(answer) if "####" in answer else _normal_number(answer)
    if wanted is None:
        raise ValueError(f"the gsm8k verifier needs a number as the answer, got {answer!r}")
    return gsm8k_answer(response) == wanted


# How each verifier finds the answer in a reference response.
ANSWERS: dict[str, Callable[[str], str | None]] = {
    "world": world_answer,
    "gsm8k": gsm8k_answer,
    "exact": lambda text: text.strip() or None,
}

# How a bare answer is written so that its verifier accepts it.
BARE: dict[str, Callable[[str], str]] = {
    "world": lambda answer: f"answer : {answer}",
    "gsm8k": lambda answer: f"#### {answer}",
    "exact": lambda answer: answer,
}

VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "world": lambda response, answer: world_answer(response) == answer.strip(),
    "gsm8k": _gsm8k,
    "exact": lambda response, answer: response.strip() == answer.strip(),
}


def verify(name: str, response: str, answer: str) -> bool:
    """Whether a finished response (end token left off) gives the answer, by the named verifier.

    Raises ValueError for a verifier that does not exist.
    """
    if name not in VERIFIERS:
        raise ValueError(f"no verifier {name!r}: expected one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name](response, answer)
