"""Statistical rejection sampling over scored candidates, and the pairs made of those accepted (RSO, 2309.06657, algorithm 1).

Works on positions, never on texts: equal texts stay separate draws. Departure from the paper's code: a pool that runs dry
returns fewer and says so.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Pairing = Literal["first_round", "tournament"]


@dataclass(frozen=True)
class Accepted:
    """positions: candidates accepted, in order of acceptance. rounds: passes over the pool. trials, hits: acceptance tests
    made and passed in the first round, whose rate estimates E[exp((r - r_max) / beta)]."""

    positions: list[int]
    rounds: int
    trials: int
    hits: int


def finite_positions(rewards: Sequence[float]) -> list[int]:
    """Positions of the candidates that may be taken: an infinite or undefined reward marks one that may not."""
    return [i for i, reward in enumerate(rewards) if math.isfinite(reward)]


def rejection_sample(rewards: Sequence[float], count: int, beta: float, rng: random.Random) -> Accepted:
    """Accept up to `count` candidates with probability exp((r - r_max) / beta), r_max over those left, round by round.

    beta = 0 takes the best, ties at random; candidates whose reward is not finite are never accepted. A pool smaller than
    `count` returns all it has.
    """
    pool = finite_positions(rewards)
    rng.shuffle(pool)  # the early stop favours those visited first, so candidates may come in any order
    if beta == 0:
        best = sorted(pool, key=lambda i: -rewards[i])[:count]
        return Accepted(best, min(1, len(best)), len(pool), len(best))
    accepted: list[int] = []
    rounds = trials = hits = 0
    while pool and len(accepted) < count:
        rounds += 1
        highest = max(rewards[i] for i in pool)
        left = []
        for place, i in enumerate(pool):
            if len(accepted) == count:
                left += pool[place:]
                break
            taken = rng.random() < math.exp((rewards[i] - highest) / beta)
            (accepted if taken else left).append(i)
            if rounds == 1:
                trials, hits = trials + 1, hits + taken
        pool = left
    return Accepted(accepted, rounds, trials, hits)


def any_sample(rewards: Sequence[float], count: int, rng: random.Random) -> Accepted:
    """The paper's `sft-sample-rank`: up to `count` candidates whatever their reward, as the policy drew them."""
    pool = finite_positions(rewards)
    taken = rng.sample(pool, min(count, len(pool)))
    return Accepted(taken, min(1, len(taken)), len(taken), len(taken))


def make_pairs(
    positions: Sequence[int], rewards: Sequence[float], pairing: Pairing, rng: random.Random
) -> list[tuple[int, int]]:
    """Pair accepted candidates as (chosen, rejected) by reward, after a shuffle; an equal reward is a coin flip.

    first_round: n // 2 disjoint pairs. tournament: winners play on until one is left, n - 1 pairs, a bye for odd counts.
    """
    players = list(positions)
    rng.shuffle(players)
    pairs: list[tuple[int, int]] = []
    while len(players) > 1:
        winners = []
        for a, b in zip(players[::2], players[1::2], strict=False):
            first = rng.random() < 0.5 if rewards[a] == rewards[b] else rewards[a] > rewards[b]
            pairs.append((a, b) if first else (b, a))
            winners.append(pairs[-1][0])
        if pairing == "first_round":
            break
        players = winners + players[len(players) - len(players) % 2 :]
    return pairs
