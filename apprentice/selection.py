"""Which of a prompt's candidates to fine-tune on: RAFT (2304.06767), ReST (2308.08998), RFT (2308.01825), the top share."""

import math
from collections.abc import Sequence

from apprentice.rejection import finite_positions


def best(rewards: Sequence[float]) -> list[int]:
    """RAFT: the position of the highest reward, the first of equals; none when no reward is finite."""
    pool = finite_positions(rewards)
    return [max(pool, key=lambda i: (rewards[i], -i))] if pool else []


def top_share(rewards: Sequence[float], share: float) -> list[int]:
    """Positions of the highest rewards: `share` of all candidates, rounded up, in their order; the first of equals."""
    pool = sorted(finite_positions(rewards), key=lambda i: (-rewards[i], i))
    count = math.ceil(round(share * len(rewards), 9))  # 0.28 of 25 is 7, in floats a little more
    return sorted(pool[:count])


def above(rewards: Sequence[float], level: float) -> list[int]:
    """ReST: positions whose reward, brought to [0, 1] over the prompt's candidates, is above `level`; all equal: none."""
    pool = finite_positions(rewards)
    low, high = min((rewards[i] for i in pool), default=0.0), max((rewards[i] for i in pool), default=0.0)
    return [i for i in pool if high > low and (rewards[i] - low) / (high - low) > level]
