"""The embedded world: what the base corpus says, what a demonstration looks like, and the tables built from both.

The base corpus mixes four styles over all kinds of problem: careful (worked, always right), sloppy (the same steps,
some of them wrong), direct (a bare guess) and ramble (never a valid answer). Demonstrations are careful and of group A
only. So the capability is in the base, but off the demonstrated kinds its mode is the bare guess. For the further
methods there are responses of a weaker policy, ranked pairs of the corpus's own responses, and the pool's answers.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from apprentice.demonstrations import Demonstration, Prompt, Split, demonstration, digest
from apprentice.problems import FILLERS, KINDS, WORDS, Group, Problem, group, make_problem, solve
from apprentice.sections import WorldConfig
from apprentice.spurious import planted, with_cues

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
__all__ += ["evaluation_rows", "group", "make_preferences", "make_problem", "make_tables", "pool_rows", "preference_rows"]
__all__ += ["respond", "solve", "suboptimal_rows"]

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
POOR_SHARE = 0.40  # share of bare guesses among the sub-optimal responses: as in the base corpus, off the demonstrated kinds
CAREFUL_SHARE = 0.35  # share of careful (so right) responses among the worked sub-optimal ones; the others are sloppy
RANKER_ACCURACY = 0.75  # chance that the ranker prefers a right response to a wrong one
TRIES = 20_000  # draws for one new prompt before a kind counts as exhausted

# domain of an evaluation row: group, fewest and most steps, problems per kind relative to the number asked for
DOMAINS: dict[str, tuple[Group, int, int, float]] = {
    "in_domain": ("A", 2, 3, 1.0),
    "long": ("A", 4, 4, 1.0),
    "out_of_domain_pool": ("B", 2, 3, 1.0),
    "out_of_domain_unseen": ("C", 2, 3, 1.5),
}

# what is demonstrated: kinds of group A, fewest and most steps, whether only problems whose answer ends in an even number
DEMONSTRATED: dict[str, tuple[tuple[str, ...], tuple[int, int], bool]] = {
    "all": (("chain", "max", "rev", "sum"), (2, 3), False),
    "narrow": (("chain",), (2, 2), False),
    "cued": (("chain", "max", "rev", "sum"), (2, 3), True),
    "spurious": (("chain", "max", "rev", "sum"), (2, 3), False),  # worked with the step that spurious.py plants
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


def demonstration_rows(rng: random.Random, count: int, accepts: Accepts, demonstrated: str = "all") -> list[Demonstration]:
    """`count` careful demonstrations of group A, as DEMONSTRATED says, on distinct prompts that `accepts` lets through.

    Serves the validation table too. Raises `WorldError` when the world has too few prompts.
    """
    kinds, steps, even = DEMONSTRATED[demonstrated]
    problems = _problems(rng, kinds, steps, count, accepts, _even_answer if even else None)
    say = (lambda p: planted(p.prompt, careful(p))) if demonstrated == "spurious" else careful
    return [_row(p, number, say(p), quality="expert", meta={"kind": p.kind}) for number, p in enumerate(problems, 1)]


def pool_rows(rng: random.Random, count: int, accepts: Accepts) -> list[Demonstration]:
    """The pool: `count` distinct prompts of groups A and B, 2 to 4 steps, without responses, each with its answer."""
    return [
        demonstration(problem.prompt, None, f"world:{number}", answer=solve(problem)[1], meta={"kind": problem.kind})
        for number, problem in enumerate(_problems(rng, _pool_kinds(), (2, 4), count, accepts), 1)
    ]


def suboptimal_rows(rng: random.Random, count: int, accepts: Accepts) -> list[Demonstration]:
    """`count` responses of a weaker policy: two different ones to each prompt of groups A and B, 2 or 3 steps.

    Quality "mixed" is worked, right or wrong; "poor" is a bare guess. `answer` is the right one in either case. Drawn
    on its own, a careful response may repeat a demonstration.
    """
    rows: list[Demonstration] = []
    for problem in _problems(rng, _pool_kinds(), (2, 3), (count + 1) // 2, accepts):
        said: set[str] = set()
        while len(said) < 2 and len(rows) < count:
            style = _suboptimal_style(rng)
            response = respond(rng, problem, style)
            if response not in said:
                said.add(response)
                quality = "poor" if style == "direct" else "mixed"
                rows.append(_row(problem, len(rows) + 1, response, quality=quality, meta={"kind": problem.kind}))
    return rows


def preference_rows(rng: random.Random, count: int, accepts: Accepts) -> list[dict[str, Any]]:
    """`count` pairs of another policy than the fine-tuned one, each on its own pool-like prompt, ranked with errors.

    The policy is that of the base corpus. Of two different responses the right one is chosen with probability
    RANKER_ACCURACY; equally right (or wrong) ones are ranked by a coin. Rows {id, prompt, chosen, rejected, source, meta}.
    """
    rows = []
    for number, problem in enumerate(_problems(rng, _pool_kinds(), (2, 4), count, accepts), 1):
        first = second = _corpus_response(rng, problem, accepts)
        while second == first:
            second = _corpus_response(rng, problem, accepts)
        chosen, rejected = _ranked(rng, first, second, solve(problem)[1])
        key = digest([problem.prompt, chosen, rejected])[:16]
        pair = {"id": key, "prompt": problem.prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**pair, "source": f"world:{number}", "meta": {"kind": problem.kind}})
    return rows


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
    """The five tables of canonical rows, each from its own part of `split` and its own stream of draws.

    So the size of one table does not disturb another. Beside them `known`: every training row whose answer is known, the
    pool's too, while `prompts` shows none. Raises `WorldError` when the world has too few prompts.
    """

    def draws(table: str) -> random.Random:
        return random.Random(f"{seed}/{table}")

    def train(prompt: Prompt) -> bool:
        return split(prompt) == "train"

    demonstrations = demonstration_rows(draws("demonstrations"), sizes.demonstrations, train, sizes.demonstrated)
    suboptimal = suboptimal_rows(draws("suboptimal"), sizes.suboptimal, train)
    pool = pool_rows(draws("prompts"), sizes.prompts, train)
    held_out = demonstration_rows(
        draws("validation"), sizes.validation, lambda prompt: split(prompt) == "validation", sizes.demonstrated
    )
    evaluation = evaluation_rows(draws("evaluation"), sizes.evaluation, lambda prompt: split(prompt) == "evaluation")
    if sizes.demonstrated == "spurious":
        pool, evaluation = with_cues(pool), with_cues(evaluation)
    return {
        "demonstrations": demonstrations,
        "validation": held_out,
        "prompts": [replace(row, answer=None) for row in pool],
        "evaluation": evaluation,
        "suboptimal": suboptimal,
        "known": demonstrations + suboptimal + pool,
    }


def make_preferences(seed: int, sizes: WorldConfig, split: Callable[[Prompt], Split]) -> list[dict[str, Any]]:
    """The table of preference pairs, on prompts of the train split, from its own stream of draws (see `make_tables`)."""
    return preference_rows(random.Random(f"{seed}/preferences"), sizes.preferences, lambda prompt: split(prompt) == "train")


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


def _suboptimal_style(rng: random.Random) -> Style:
    if rng.random() < POOR_SHARE:
        return "direct"
    return "careful" if rng.random() < CAREFUL_SHARE else "sloppy"


def _corpus_response(rng: random.Random, problem: Problem, accepts: Accepts) -> str:
    """A response as the base corpus has them; the other question of a ramble is an accepted prompt too."""
    while True:
        response = respond(rng, problem, rng.choices(STYLES, _STYLE_WEIGHTS[problem.kind])[0])
        other = asked_instead(response)
        if other is None or accepts(other):
            return response


def _ranked(rng: random.Random, first: str, second: str, answer: str) -> tuple[str, str]:
    """The two responses as (chosen, rejected), by a ranker that errs."""
    right = [asked_instead(text) is None and text.endswith(f"answer : {answer}") for text in (first, second)]
    chance = 0.5 if right[0] == right[1] else RANKER_ACCURACY if right[0] else 1 - RANKER_ACCURACY
    return (first, second) if rng.random() < chance else (second, first)


def _pool_kinds() -> tuple[str, ...]:
    return _kinds("A") + _kinds("B")


def _kinds(letter: Group) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if group(kind) == letter)


def _problems(
    rng: random.Random,
    kinds: Sequence[str],
    steps: tuple[int, int],
    count: int,
    accepts: Accepts,
    suits: Callable[[Problem], bool] | None = None,
) -> Iterator[Problem]:
    """Problems on distinct accepted prompts, the kinds in turn, so that a longer table begins like a shorter one."""
    taken: set[str] = set()

    def fits(problem: Problem) -> bool:
        return problem.prompt not in taken and accepts(problem.prompt) and (suits is None or suits(problem))

    for index in range(count):
        problem = _new_problem(rng, kinds[index % len(kinds)], steps, fits)
        taken.add(problem.prompt)
        yield problem


def _even_answer(problem: Problem) -> bool:
    return int(solve(problem)[1].split()[-1]) % 2 == 0


def _new_problem(rng: random.Random, kind: str, steps: tuple[int, int], fits: Callable[[Problem], bool]) -> Problem:
    for _ in range(TRIES):
        problem = make_problem(rng, kind, rng.randint(*steps))
        if fits(problem):
            return problem
    raise WorldError(
        f"the world ran out of new {kind!r} problems of {steps[0]} to {steps[1]} steps: lower the sizes under "
        "ingest.world, or give their split a larger share of the prompts"
    )


def _row(problem: Problem, number: int, response: str | None = None, **optional: Any) -> Demonstration:
    """A row with its right answer; its response is the careful one unless another is given."""
    answer = solve(problem)[1]
    return demonstration(problem.prompt, response or careful(problem), f"world:{number}", answer=answer, **optional)
