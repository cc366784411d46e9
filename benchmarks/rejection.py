"""Statistical rejection sampling against the listing in RSO's paper (2309.06657, algorithm 1), over the same rewards."""

import random
from collections.abc import Callable

from apprentice.rejection import rejection_sample
from benchmarks.measure import Side, alternate
from benchmarks.results import Results
from benchmarks.worker import Figures, Prepare

PROMPTS, CANDIDATES, ACCEPTED, BETA = 3000, 64, 8, 0.5  # 64 and 8 are the paper's


def family(results: Results, runs: int) -> None:
    """One size, the paper's."""
    sides = {
        "ours": Side("benchmarks.rejection:ours"),
        "paper_listing": Side("benchmarks.rejection:paper_listing"),
    }
    results.compare("rejection", alternate(sides, runs))


def rewards() -> list[list[float]]:
    """Rewards of each prompt's candidates."""
    rng = random.Random(0)
    return [[rng.gauss(0, 1) for _ in range(CANDIDATES)] for _ in range(PROMPTS)]


def ours() -> Prepare:
    """Ours, on positions."""
    given = rewards()

    def prepare(repeat: int) -> Callable[[], Figures]:
        rng = random.Random(repeat)

        def work() -> Figures:
            return _mean([[row[i] for i in rejection_sample(row, ACCEPTED, BETA, rng).positions] for row in given])

        return work

    return prepare


def paper_listing() -> Prepare:
    """The paper's: a dictionary from text to reward, a uniform of NumPy for each test."""
    import numpy

    given = [{f"candidate {i}": reward for i, reward in enumerate(row)} for row in rewards()]

    def accept(candidates: dict[str, float]) -> list[float]:
        left, accepted = dict(candidates), list[float]()
        while len(accepted) < ACCEPTED:
            highest = max(left.values())
            taken = []
            for text, reward in left.items():
                if numpy.random.uniform() >= numpy.exp((reward - highest) / BETA):
                    continue
                accepted.append(reward)
                taken.append(text)
                if len(accepted) == ACCEPTED:
                    break
            for text in taken:
                left.pop(text)
        return accepted

    def prepare(repeat: int) -> Callable[[], Figures]:
        numpy.random.seed(repeat)
        return lambda: _mean([accept(row) for row in given])

    return prepare


def _mean(accepted: list[list[float]]) -> Figures:
    """Mean reward of those accepted: the same on both sides but for chance."""
    return {"reward": sum(map(sum, accepted)) / sum(map(len, accepted))}
