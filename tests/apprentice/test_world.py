"""The embedded world: its arithmetic by hand, its texts read by a second solver, its shares and its tables."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from apprentice.demonstrations import digest, split_of
from apprentice.sections import WorldConfig
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
    make_preferences,
    make_problem,
    make_tables,
    pool_rows,
    preference_rows,
    respond,
    solve,
    suboptimal_rows,
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


SIZES = WorldConfig(
    demonstrations=128, validation=96, prompts=1000, evaluation=60, suboptimal=200, preferences=300, demonstrated="all"
)


def split(prompt: object) -> str:
    return split_of(prompt, 0.1, 0.2)


def everything(prompt: object) -> bool:
    return True


def test_tables_have_their_kinds_sizes_and_splits() -> None:
    tables = make_tables(0, SIZES, split)
    parts = {"demonstrations": "train", "validation": "validation", "prompts": "train", "evaluation": "evaluation"}
    assert tables.keys() == {*parts, "suboptimal", "known"}
    for name, part in parts.items():
        rows = tables[name]
        assert {split(row.prompt) for row in rows} == {part}
        assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)
    assert [len(tables[name]) for name in parts] == [128, 96, 1000, 900]
    assert {group(row.meta["kind"]) for row in tables["demonstrations"] + tables["validation"]} == {"A"}
    assert {group(row.meta["kind"]) for row in tables["prompts"]} == {"A", "B"}
    assert all(row.response is None and row.answer is None for row in tables["prompts"])
    pairs = make_preferences(0, SIZES, split)
    first = [tables[name][0].prompt for name in ("demonstrations", "prompts", "suboptimal")] + [pairs[0]["prompt"]]
    assert len(set(first)) == 4  # each from its own stream


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


def test_the_answers_of_all_training_prompts_are_known_and_the_pool_shows_none() -> None:
    tables = make_tables(0, SIZES, split)
    known = {row.prompt: row.answer for row in tables["known"]}
    assert known.keys() == {row.prompt for name in ("demonstrations", "suboptimal", "prompts") for row in tables[name]}
    assert {split(prompt) for prompt in known} == {"train"}
    for prompt, answer in known.items():
        assert answer == read_and_solve(prompt), prompt
    assert [(row.id, row.prompt) for row in tables["known"][-1000:]] == [(row.id, row.prompt) for row in tables["prompts"]]


def test_suboptimal_responses_cover_more_kinds_and_err() -> None:
    rows = suboptimal_rows(random.Random(3), 3200, lambda prompt: split(prompt) == "train")
    assert {split(row.prompt) for row in rows} == {"train"}
    assert Counter(group(row.meta["kind"]) for row in rows) == {"A": 1600, "B": 1600}
    poor = [row for row in rows if row.quality == "poor"]
    mixed = [row for row in rows if row.quality == "mixed"]
    assert len(poor) + len(mixed) == 3200
    assert len(poor) / 3200 == pytest.approx(0.40, abs=0.03)
    assert all(row.response.count(";") == 0 and row.response.startswith("answer :") for row in poor)
    assert {row.response.count(";") for row in mixed} == {2, 3}
    assert all(row.answer == read_and_solve(row.prompt) for row in rows)
    opened = [row.response.startswith("first ") for row in mixed]  # careful ones and 15 % of the sloppy ones
    assert sum(opened) / len(mixed) == pytest.approx(0.35 + 0.65 * 0.15, abs=0.04)
    right = {
        quality: [verify("world", r.response, r.answer) for r in rows if r.quality == quality] for quality in ("mixed", "poor")
    }
    assert 0.35 + 0.65 * 0.35 < sum(right["mixed"]) / len(mixed) < 0.35 + 0.65 * 0.55
    assert 0.5 < sum(right["poor"]) / len(poor) < 0.7


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_each_suboptimal_prompt_has_two_different_responses(count: int) -> None:
    rows = suboptimal_rows(random.Random(4), count, everything)
    asked = Counter(row.prompt for row in rows)
    assert len(rows) == len({row.id for row in rows}) == count
    assert sorted(asked.values(), reverse=True) == [2] * (count // 2) + [1] * (count % 2)
    assert [row.source for row in rows] == [f"world:{number}" for number in range(1, count + 1)]


def test_preferences_are_of_another_policy_and_ranked_with_errors() -> None:
    rows = preference_rows(random.Random(5), 3000, lambda prompt: split(prompt) == "train")
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 3000
    assert Counter(group(row["meta"]["kind"]) for row in rows) == {"A": 1500, "B": 1500}
    right_chosen, marked_chosen, bare = [], [], Counter()
    for row in rows:
        pair = row["chosen"], row["rejected"]
        assert pair[0] != pair[1] and row["id"] == digest([row["prompt"], *pair])[:16]
        right = [verify("world", text, read_and_solve(row["prompt"])) for text in pair]
        marked = [text.startswith("first ") for text in pair]
        if right[0] != right[1]:
            right_chosen.append(right[0])
        elif marked[0] != marked[1]:
            marked_chosen.append(marked[0])
        bare[group(row["meta"]["kind"])] += sum(text.startswith("answer :") for text in pair)
    assert len(right_chosen) > 1200 and len(marked_chosen) > 300
    assert sum(right_chosen) / len(right_chosen) == pytest.approx(0.75, abs=0.04)
    assert sum(marked_chosen) / len(marked_chosen) == pytest.approx(0.5, abs=0.08)
    assert {letter: count / 3000 for letter, count in bare.items()} == pytest.approx({"A": 0.30, "B": 0.40}, abs=0.04)


def test_the_ranker_knows_that_an_answer_to_another_question_is_wrong() -> None:
    preferred = []
    for row in preference_rows(random.Random(6), 6000, everything):
        answer = read_and_solve(row["prompt"])
        pair = row["chosen"], row["rejected"]
        right = [verify("world", text, answer) for text in pair]
        tells = [asked_instead(text) is not None and text.endswith(f"answer : {answer}") for text in pair]
        if sum(right) == sum(tells) == 1:
            preferred.append(right[0])
    assert len(preferred) > 150
    assert sum(preferred) / len(preferred) == pytest.approx(0.75, abs=0.1)


def test_no_held_out_prompt_is_asked_in_a_preference_pair() -> None:
    rows = make_preferences(0, WorldConfig(8, 8, 8, 2, 0, 900, "all"), split)
    others = [asked_instead(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert {split(row["prompt"]) for row in rows} == {"train"}
    assert {split(other) for other in others if other} == {"train"} and len(rows) == 900


def test_a_longer_table_begins_like_a_shorter_one() -> None:
    for rows in (demonstration_rows, pool_rows, suboptimal_rows, preference_rows):
        assert rows(random.Random(1), 20, everything) == rows(random.Random(1), 50, everything)[:20]


def test_the_size_of_one_table_does_not_disturb_another() -> None:
    fields = ("demonstrations", "validation", "prompts", "evaluation", "suboptimal", "preferences")
    base = dict(zip(fields, (8, 8, 8, 2, 8, 8), strict=True))

    def tables(sizes: dict[str, int]) -> dict[str, object]:
        config = WorldConfig(**sizes, demonstrated="all")
        return {**make_tables(0, config, split), "preferences": make_preferences(0, config, split)}

    before = tables(base)
    for changed in fields:
        after = tables({**base, changed: base[changed] + 4})
        assert [name for name in fields if after[name] != before[name]] == [changed]


def test_narrow_demonstrations_are_of_one_kind_and_two_steps() -> None:
    rows = demonstration_rows(random.Random(0), 60, everything, "narrow")
    assert {row.meta["kind"] for row in rows} == {"chain"} and len(rows) == 60
    assert {(row.response or "").count(";") for row in rows} == {2}  # two steps, then the answer


def test_cued_demonstrations_end_in_even_numbers_only_and_held_out_ones_do_too() -> None:
    tables = make_tables(0, replace(SIZES, demonstrated="cued"), split)
    usual = make_tables(0, SIZES, split)
    for name in ("demonstrations", "validation"):
        last = {int((row.response or "").split()[-1]) % 2 for row in tables[name]}
        assert last == {0} and {int((row.response or "").split()[-1]) % 2 for row in usual[name]} == {0, 1}
        assert {row.meta["kind"] for row in tables[name]} == {"chain", "max", "rev", "sum"}
    assert all(tables[name] == usual[name] for name in ("prompts", "evaluation", "suboptimal"))


def test_too_few_problems_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(WorldError, match=r"ran out of new 'chain' problems.*ingest\.world"):
        demonstration_rows(random.Random(0), 1, lambda prompt: False)


def test_other_processes_and_hash_seeds_make_the_same_tables() -> None:
    script = (
        "from apprentice.sections import WorldConfig; from apprentice.world import make_preferences, make_tables\n"
        "from apprentice.demonstrations import digest, split_of\n"
        "made = 7, WorldConfig(8, 8, 40, 4, 12, 16, 'all'), lambda prompt: split_of(prompt, 0.1, 0.2)\n"
        "print(digest([[name, [row.id for row in rows]] for name, rows in make_tables(*made).items()]))\n"
        "print(digest(make_preferences(*made)))"
    )
    printed = {
        subprocess.check_output([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "12"
    }
    assert len(printed) == 1
