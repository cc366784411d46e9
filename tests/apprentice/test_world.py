"""The embedded world: its arithmetic by hand, its texts read by a second solver, its shares and its tables."""

import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from apprentice.config import WorldConfig
from apprentice.demonstrations import split_of
from apprentice.verifiers import verify
from apprentice.world import (
    KINDS,
    STYLES,
    WORDS,
    Problem,
    WorldError,
    asked_instead,
    careful,
    corpus_document,
    demonstration_rows,
    evaluation_rows,
    group,
    make_problem,
    make_tables,
    prompt_rows,
    respond,
    solve,
)

BY_HAND = {
    "chain": ((7, 5, -3), "first 7 + 5 = 12 ; 12 - 3 = 9 ; answer : 9"),
    "max": ((3, 9, 4), "first 3 , 9 -> 9 ; 9 , 4 -> 9 ; answer : 9"),
    "rev": ((3, 17, 0), "first take 0 ; take 17 ; take 3 ; answer : 0 17 3"),
    "sum": ((2, 6, 1), "first 2 + 6 = 8 ; 8 + 1 = 9 ; answer : 9"),
    "min": ((3, 9, 1), "first 3 , 9 -> 3 ; 3 , 1 -> 1 ; answer : 1"),
    "clock": ((11, 3, 10), "first 11 h 3 = 2 ; 2 h 10 = 0 ; answer : 0"),
    "machine": ((3, 0, 4), "first 3 * 2 = 6 ; 6 + 4 = 10 ; answer : 10"),
    "sort": ((9, 2, 14), "first pick 2 ; pick 9 ; pick 14 ; answer : 2 9 14"),
    "weeks": ((1, 3, 4), "first 1 * 7 = 7 ; 7 + 3 = 10 ; 10 + 4 = 14 ; answer : 14"),
    "parity": ((3, 4), "first 3 + 4 = 7 ; 7 is odd ; answer : no"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_careful_response_by_hand(kind: str) -> None:
    data, expected = BY_HAND[kind]
    assert careful(Problem(kind, "", data)) == expected


def read_and_solve(prompt: str) -> str:
    """A second solver, which knows the problem's words only."""
    numbers = [int(word) for word in re.findall(r"\d+", prompt)]
    if "gets" in prompt or "loses" in prompt:
        signs = [1 if word == "gets" else -1 for word in re.findall("gets|loses", prompt)]
        return str(numbers[0] + sum(sign * n for sign, n in zip(signs, numbers[1:], strict=True)))
    if "even" in prompt:
        return "no" if sum(numbers) % 2 else "yes"
    if "weeks" in prompt:
        return str(7 * numbers[0] + sum(numbers[1:]))
    if "clock" in prompt:
        return str(sum(numbers) % 12)
    if prompt.startswith(("start", "number")):
        value, orders = numbers[0], re.findall(r"double|plus \d+", prompt)
        for order in orders:
            value = value * 2 if order == "double" else value + int(order.split()[1])
        return str(value)
    for word, answer in (("largest", max), ("smallest", min), ("total", sum)):
        if word in prompt:
            return str(answer(numbers))
    return " ".join(map(str, numbers[::-1] if "reverse" in prompt else sorted(numbers)))


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_says_what_the_careful_response_answers(kind: str) -> None:
    rng = random.Random(3)
    wordings = set()
    for steps in (2, 3, 4):
        for _ in range(200):
            problem = make_problem(rng, kind, steps)
            answer = read_and_solve(problem.prompt)
            assert solve(problem)[1] == answer, problem.prompt
            assert verify("world", careful(problem), answer)
            assert len(solve(problem)[0]) == steps
            wordings.add(problem.prompt.split()[0] in ("list", "number", "how", "the"))
    assert len(wordings) == 2


def test_words_are_exactly_those_of_the_corpus() -> None:
    rng = random.Random(0)
    said = {word for _ in range(8000) for text in corpus_document(rng) for word in text.split(" ")}
    assert len(WORDS) == len(set(WORDS))
    assert said == set(WORDS)


def test_styles_differ_as_described() -> None:
    rng = random.Random(1)
    right: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    for _ in range(1500):
        problem = make_problem(rng, rng.choice(list(KINDS)), 3)
        for style in STYLES:
            response = respond(rng, problem, style)
            right[style] += verify("world", response, solve(problem)[1])
            opened[style] += response.startswith("first ")
    assert right["careful"] == opened["careful"] == 1500
    assert right["ramble"] == opened["ramble"] == opened["direct"] == 0
    assert 0.12 < opened["sloppy"] / 1500 < 0.18
    assert 0.35 < right["sloppy"] / 1500 < 0.55
    assert 0.5 < right["direct"] / 1500 < 0.7


def test_shares_of_the_base_corpus() -> None:
    rng = random.Random(2)
    bare: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    kinds = {"gets": "A", "loses": "A", "largest": "A", "clock": "B", "smallest": "B", "weeks": "C", "even": "C"}
    for _ in range(12000):
        prompt, response = corpus_document(rng)
        for letter in {kinds[word] for word in prompt.split() if word in kinds}:
            documents[letter] += 1
            bare[letter] += response.startswith("answer :")
    shares = {letter: bare[letter] / documents[letter] for letter in "ABC"}
    assert shares["A"] == pytest.approx(0.30, abs=0.03)
    assert shares["B"] == pytest.approx(0.40, abs=0.03)
    assert shares["C"] == pytest.approx(0.40, abs=0.03)


def test_held_out_prompts_stay_out_of_the_corpus_in_either_place() -> None:
    rng = random.Random(5)
    drawn = [corpus_document(rng) for _ in range(3000)]
    held_out = {prompt for prompt, _ in drawn[::3]} | {asked_instead(response) or "" for _, response in drawn[::3]}
    assert any(asked_instead(response) for _, response in drawn)
    rng = random.Random(5)
    for prompt, response in [corpus_document(rng, held_out) for _ in range(3000)]:
        assert prompt not in held_out
        assert asked_instead(response) not in held_out


SIZES = WorldConfig(demonstrations=128, validation=96, prompts=1000, evaluation=60)


def split(prompt: object) -> str:
    return split_of(prompt, 0.1, 0.2)


def test_tables_have_their_kinds_sizes_and_splits() -> None:
    tables = make_tables(0, SIZES, split)
    parts = {"demonstrations": "train", "validation": "validation", "prompts": "train", "evaluation": "evaluation"}
    for name, rows in tables.items():
        assert {split(row.prompt) for row in rows} == {parts[name]}
        assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)
    assert [len(tables[name]) for name in parts] == [128, 96, 1000, 900]
    assert {group(row.meta["kind"]) for row in tables["demonstrations"] + tables["validation"]} == {"A"}
    assert {group(row.meta["kind"]) for row in tables["prompts"]} == {"A", "B"}
    assert all(row.response is None and row.answer is None for row in tables["prompts"])


def test_evaluation_domains() -> None:
    rows = evaluation_rows(random.Random(0), 60, lambda prompt: split(prompt) == "evaluation")
    counts = Counter((row.meta["domain"], group(row.meta["kind"])) for row in rows)
    assert counts == {
        ("in_domain", "A"): 240,
        ("long", "A"): 240,
        ("out_of_domain_pool", "B"): 240,
        ("out_of_domain_unseen", "C"): 180,
    }
    for row in rows:
        assert verify(row.meta["verifier"], row.response or "", row.answer or "")
        assert row.answer == read_and_solve(str(row.prompt))


def test_a_longer_table_begins_like_a_shorter_one() -> None:
    def everything(prompt: object) -> bool:
        return True

    assert demonstration_rows(random.Random(1), 20, everything) == demonstration_rows(random.Random(1), 50, everything)[:20]
    assert prompt_rows(random.Random(1), 20, everything) == prompt_rows(random.Random(1), 50, everything)[:20]
    small, large = (make_tables(0, WorldConfig(n, 8, 8, 2), split) for n in (8, 40))
    assert small["evaluation"] == large["evaluation"] and small["prompts"] == large["prompts"]


def test_too_few_problems_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(WorldError, match=r"ran out of new 'chain' problems.*ingest\.world"):
        demonstration_rows(random.Random(0), 1, lambda prompt: False)


def test_other_processes_and_hash_seeds_make_the_same_tables() -> None:
    script = (
        "from apprentice.config import WorldConfig; from apprentice.world import make_tables\n"
        "from apprentice.demonstrations import digest, split_of\n"
        "tables = make_tables(7, WorldConfig(8, 8, 40, 4), lambda prompt: split_of(prompt, 0.1, 0.2))\n"
        "print(digest([[name, [row.id for row in rows]] for name, rows in tables.items()]))"
    )
    printed = {
        subprocess.check_output([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "12"
    }
    assert len(printed) == 1
