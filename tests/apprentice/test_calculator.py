"""The calculator of GSM8K's annotations: values by hand, and the committed sample."""

import random
from fractions import Fraction
from pathlib import Path

import pytest

from apprentice.calculator import calculator_steps, evaluate
from apprentice.demonstrations import read_jsonl

SAMPLE = Path(__file__).parents[2] / "data" / "raw" / "gsm8k.jsonl"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", 24),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-4-3", 3),
        ("12/4/3", 1),
        ("1,200*2", 2400),
        (".5+1.", Fraction(3, 2)),
        ("50%*30", 15),
        ("(20+5)%", Fraction(1, 4)),
        ("-3+5", 2),
        ("2*-3", -6),
        ("+3+3", 6),
        ("3*+6", 18),
        (" 7 ", 7),
    ],
)
def test_values_by_hand(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text", ["", "2+", "*3", "(2", "2)", "2 3", "1,20", "a+1", "2**3", "__import__('os')", "(" * 99 + "1" + ")" * 99]
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        evaluate(text)


def test_random_expressions_agree_with_python() -> None:
    rng = random.Random(0)
    for _ in range(300):
        words = [str(rng.randint(1, 9))]
        for _ in range(rng.randint(0, 5)):
            words += [rng.choice("+-*/"), str(rng.randint(1, 9))]
        exact = eval("".join(f"Fraction({w})" if w.isdigit() else w for w in words), {"Fraction": Fraction})
        assert evaluate("".join(words)) == exact


def test_each_line_is_a_step() -> None:
    solution = "He sold 48/2=<<48/2=24>>24.\nNo sum here.\nIn all <<48+24=73>>73, or <<1+1=2>>2.\n#### 73"
    assert calculator_steps(solution) == [True, True, False, True]


@pytest.mark.parametrize(
    ("annotation", "fine"),
    [
        ("100/3=33.33", True),
        ("200/3=66.67", True),
        ("200/3=66.66", True),
        ("100/3=33.4", False),
        ("100/3=33", False),
        ("3-8.5=-5.5", True),
        ("3-8.5=5.5", False),
        ("-1/3=-.33", True),
        ("-1/3=.33", False),
        ("7/2=3.", False),
        ("1/3=33.3%", True),
        ("0.3399=33.3%", False),
        ("10=15-5", False),
        ("1/0=1", False),
        ("12", False),
        ("=3", False),
        ("3=", False),
    ],
)
def test_rounded_results_count_and_malformed_ones_do_not(annotation: str, fine: bool) -> None:
    assert calculator_steps(f"<<{annotation}>>") == [fine]


def test_most_published_solutions_pass() -> None:
    solutions = [row["answer"] for row in read_jsonl(SAMPLE)]
    right = [all(calculator_steps(solution)) for solution in solutions]
    assert len(right) == 120 and sum(right) >= 114
