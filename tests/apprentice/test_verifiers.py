"""Verifiers: right and wrong responses, number by number."""

import pytest

from apprentice.verifiers import ANSWERS, BARE, VERIFIERS, gsm8k_answer, verify


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("first 7 + 5 = 12 ; answer : 12", True),
        ("answer : 12", True),
        ("answer : 12 ", True),
        ("answer : 1 2", False),
        ("answer : 12 . hmm", False),
        ("answer : 3 ; answer : 12", False),
        ("answer : 12 ; answer : 12", False),
        ("q : total of 6 6 ? answer : 12", False),
        ("so maybe 12 i guess", False),
        ("answer :", False),
        ("", False),
    ],
)
def test_world(response: str, right: bool) -> None:
    assert verify("world", response, "12") is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 70 + 2 left.\n#### 72", "72"),
        ("#### 5 no\n#### 72", "72"),
        ("#### 72 clips", None),
        ("#### 1,072", "1072"),
        ("#### $1,072.00", "1072"),
        ("#### 72.", "72"),
        ("#### 0.50", "0.5"),
        ("#### .5", "0.5"),
        ("#### -3", "-3"),
        ("#### -0.0", "0"),
        ("#### 1000000", "1000000"),
        ("####   72 ", "72"),
        ("####   7 2 ", None),
        ("#### 3 4", None),
        ("#### 3\n4", None),
        ("#### 3 , 4", None),
        ("#### 3$4", None),
        ("#### -$ 3 ", "-3"),
        ("#### 3 $", "3"),
        ("#### +007", "7"),
        ("#### -.50", "-0.5"),
        ("#### 1200", "1200"),
        ("#### 10000000000000000000000000001", "10000000000000000000000000001"),
        ("#### 0.10000000000000000000000000000010", "0.1000000000000000000000000000001"),
        ("####", None),
        ("72", None),
        ("#### seventy", None),
        ("#### 1e3", None),
    ],
)
def test_gsm8k_answer(text: str, answer: str | None) -> None:
    assert gsm8k_answer(text) == answer


def test_gsm8k_compares_numbers_and_not_texts() -> None:
    assert verify("gsm8k", "so #### 1,072.0", "1072")
    assert verify("gsm8k", "so #### 1072", "worked out\n#### $1,072")
    assert not verify("gsm8k", "so #### 1073", "1072")
    assert not verify("gsm8k", "it is 1072", "1072")
    assert not verify("gsm8k", f"#### {10**28 + 1}", str(10**28))
    assert verify("gsm8k", f"#### {10**28}.0", str(10**28))
    with pytest.raises(ValueError, match="needs a number as the answer, got 'many'"):
        verify("gsm8k", "#### 1", "many")


def test_exact_ignores_the_ends_only() -> None:
    assert verify("exact", " Paris\n", "Paris")
    assert not verify("exact", "paris", "Paris")
    assert not verify("exact", "Par is", "Paris")


def test_unknown_verifier_is_named() -> None:
    with pytest.raises(ValueError, match="no verifier 'gsm': expected one of world, gsm8k, exact"):
        verify("gsm", "", "")


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_accepts_a_bare_answer_and_no_other(name: str) -> None:
    for answer, other in (("12", "21"), ("-3", "3"), ("0.50", "0.05"), ("1,072", "1,073")):
        assert verify(name, BARE[name](answer), answer)
        assert not verify(name, BARE[name](other), answer)
    assert BARE.keys() == VERIFIERS.keys()


def test_bare_answers_as_they_are_written() -> None:
    assert {name: write("0 17 3") for name, write in BARE.items()} == {
        "world": "answer : 0 17 3",
        "gsm8k": "#### 0 17 3",
        "exact": "0 17 3",
    }


def test_every_verifier_accepts_the_answer_it_finds_in_a_reference() -> None:
    references = {"world": "first 1 + 1 = 2 ; answer : 2", "gsm8k": "1+1\n#### 2.0", "exact": "2 "}
    for name in VERIFIERS:
        answer = ANSWERS[name](references[name])
        assert answer is not None and verify(name, references[name], answer)
