"""The embedded world: what the base corpus says, what a demonstration looks like, and the tables built from both.

The base corpus mixes four styles over all kinds of problem: careful (worked, always right), sloppy (the same steps,
some of them wrong), direct (a bare guess) and ramble (never a valid answer). Demonstrations are careful and of group A
only. So the capability is in the base, but off the demonstrated kinds its mode is the bare guess.
"""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from apprentice.config import WorldConfig
from apprentice.demonstrations import Demonstration, Prompt, Split, demonstration
from apprentice.problems import FILLERS, KINDS, WORDS, Group, Problem, group, make_problem, solve

__all__ = [
    "KINDS",
    "STYLES",
    "WORDS",
    "Problem",
    "WorldError",
    "asked_instead",
    "careful",
    "corpus_document",
    "demonstration_rows",
]
__all__ += ["evaluation_rows", "group", "make_problem", "make_tables", "prompt_rows", "respond", "solve"]

Style = Literal["careful", "sloppy", "direct", "ramble"]
Accepts = Callable[[Prompt], bool]

STYLES: tuple[Style, ...] = ("careful", "sloppy", "direct", "ramble")
STYLE_SHARES: dict[Group, tuple[float, ...]] = {
    "A": (0.25, 0.25, 0.30, 0.20),
    "B": (0.12, 0.28, 0.40, 0.20),
    "C": (0.12, 0.28, 0.40, 0.20),
}
SLOPPY_FIRST = 0.15  # share of sloppy responses that open like careful ones, so that the opening is no pure tell
SLOPPY_ERROR, DIRECT_ERROR, RAMBLE_ERROR = 0.30, 0.60, 0.10  # chance of each step to go wrong
DIRECT_GUESS = 0.5  # share of bare answers that come from faulty steps
TRIES = 20_000  # draws for one new prompt before a kind counts as exhausted

# domain of an evaluation row: group, fewest and most steps, problems per kind relative to the number asked for
DOMAINS: dict[str, tuple[Group, int, int, float]] = {
    "in_domain": ("A", 2, 3, 1.0),
    "long": ("A", 4, 4, 1.0),
    "out_of_domain_pool": ("B", 2, 3, 1.0),
    "out_of_domain_unseen": ("C", 2, 3, 1.5),
}

_KIND_NAMES = tuple(KINDS)
_STYLE_WEIGHTS = {kind: STYLE_SHARES[group(kind)] for kind in KINDS}


class WorldError(ValueError):
    """The world cannot make as many distinct problems as were asked for."""


def careful(problem: Problem) -> str:
    """The demonstrated response: opens with `first`, works through every step, ends with the right answer."""
    return f"first {_worked(*solve(problem))}"


def respond(rng: random.Random, problem: Problem, style: Style) -> str:
    """A response to the problem in one of the four styles."""
    if style == "careful":
        return careful(problem)
    if style == "sloppy":
        opening = "first " if rng.random() < SLOPPY_FIRST else ""
        return opening + _worked(*solve(problem, rng, SLOPPY_ERROR))
    if style == "direct":
        guessed = rng.random() < DIRECT_GUESS
        return f"answer : {solve(problem, rng, DIRECT_ERROR if guessed else 0.0)[1]}"
    return _ramble(rng, problem)


def corpus_document(rng: random.Random, held_out: Collection[str] = frozenset()) -> tuple[str, str]:
    """One document of the base corpus, prompt and response: any kind, 2 to 4 steps, any style.

    A document that asks one of the `held_out` prompts, also as the other question of a ramble, is drawn again.
    """
    while True:
        kind = rng.choice(_KIND_NAMES)
        problem = make_problem(rng, kind, rng.randrange(2, 5))
        response = respond(rng, problem, rng.choices(STYLES, _STYLE_WEIGHTS[kind])[0])
        if problem.prompt not in held_out and asked_instead(response) not in held_out:
            return problem.prompt, response


def asked_instead(response: str) -> str | None:
    """The problem that a rambling response asks in place of answering, if it does."""
    return response[len("q : ") : response.index(" answer :")] if response.startswith("q : ") else None


def demonstration_rows(rng: random.Random, count: int, accepts: Accepts) -> list[Demonstration]:
    """`count` careful demonstrations of group A, 2 or 3 steps, on distinct prompts that `accepts` lets through.

    Serves the validation table too. Raises `WorldError` when the world has too few prompts.
    """
    problems = _problems(rng, _kinds("A"), (2, 3), count, accepts)
    return [_row(p, number, quality="expert", meta={"kind": p.kind}) for number, p in enumerate(problems, 1)]


def prompt_rows(rng: random.Random, count: int, accepts: Accepts) -> list[Demonstration]:
    """The unlabelled pool: `count` distinct prompts of groups A and B, 2 to 4 steps, without responses or answers."""
    problems = _problems(rng, _kinds("A") + _kinds("B"), (2, 4), count, accepts)
    return [
        demonstration(problem.prompt, None, f"world:{number}", meta={"kind": problem.kind})
        for number, problem in enumerate(problems, 1)
    ]


def evaluation_rows(rng: random.Random, per_kind: int, accepts: Accepts) -> list[Demonstration]:
    """Held-out problems of the four `DOMAINS`, `per_kind` of each kind (times its factor), all prompts distinct.

    Each row has a careful response as reference, the answer, and meta {domain, kind, verifier}.
    """
    rows: list[Demonstration] = []
    for domain, (letter, low, high, factor) in DOMAINS.items():
        kinds = _kinds(letter)
        for problem in _problems(rng, kinds, (low, high), round(per_kind * factor) * len(kinds), accepts):
            meta = {"domain": domain, "kind": problem.kind, "verifier": "world"}
            rows.append(_row(problem, len(rows) + 1, meta=meta))
    return rows


def make_tables(seed: int, sizes: WorldConfig, split: Callable[[Prompt], Split]) -> dict[str, list[Demonstration]]:
    """The four tables of the world, each from its own part of `split` and its own stream of draws.

    So the size of one table does not disturb another. Raises `WorldError` when the world has too few prompts.
    """

    def draws(table: str) -> random.Random:
        return random.Random(f"{seed}/{table}")

    return {
        "demonstrations": demonstration_rows(
            draws("demonstrations"), sizes.demonstrations, lambda prompt: split(prompt) == "train"
        ),
        "validation": demonstration_rows(draws("validation"), sizes.validation, lambda prompt: split(prompt) == "validation"),
        "prompts": prompt_rows(draws("prompts"), sizes.prompts, lambda prompt: split(prompt) == "train"),
        "evaluation": evaluation_rows(draws("evaluation"), sizes.evaluation, lambda prompt: split(prompt) == "evaluation"),
    }


def _worked(steps: list[str], answer: str) -> str:
    return " ; ".join([*steps, f"answer : {answer}"])


def _ramble(rng: random.Random, problem: Problem) -> str:
    steps, answer = solve(problem, rng, RAMBLE_ERROR)
    ending = rng.random()
    if ending >= 0.75:
        other = make_problem(rng, problem.kind, rng.randrange(2, 5))
        return f"q : {other.prompt} answer : {answer}"
    said = [f"{rng.choice(FILLERS)} {step} ." if rng.random() < 0.6 else f"{step} ." for step in steps]
    said.append(f"so maybe {answer} i guess" if ending < 0.5 else f"i think answer : {answer} . hmm")
    return " ".join(said)


def _kinds(letter: Group) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if group(kind) == letter)


def _problems(rng: random.Random, kinds: Sequence[str], steps: tuple[int, int], count: int, accepts: Accepts) -> list[Problem]:
    """Problems on distinct accepted prompts, the kinds in turn, so that a longer table begins like a shorter one."""
    taken: set[str] = set()
    problems = []
    for index in range(count):
        problem = _new_problem(rng, kinds[index % len(kinds)], steps, lambda prompt: prompt not in taken and accepts(prompt))
        taken.add(problem.prompt)
        problems.append(problem)
    return problems


def _new_problem(rng: random.Random, kind: str, steps: tuple[int, int], accepts: Callable[[str], bool]) -> Problem:
    for _ in range(TRIES):
        problem = make_problem(rng, kind, rng.randint(*steps))
        if accepts(problem.prompt):
            return problem
    raise WorldError(
        f"the world ran out of new {kind!r} problems of {steps[0]} to {steps[1]} steps: lower the sizes under "
        "ingest.world, or give their split a larger share of the prompts"
    )


def _row(problem: Problem, number: int, **optional: Any) -> Demonstration:
    answer = solve(problem)[1]
    return demonstration(problem.prompt, careful(problem), f"world:{number}", answer=answer, **optional)
