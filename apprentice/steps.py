"""Per-step negatives (RL on incorrect synthetic data, 2406.14532): where a wrong response goes wrong, and what to learn there.

A response is a sequence of steps; only its end is rewarded and nothing else is random, so the value of a prefix is the chance
that a completion of it is right (eq. 3). The first step of the lowest value is the pit: there the response went wrong.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apprentice.compute import Compute
from apprentice.method_sections import PerStepConfig
from apprentice.sampling import Request, Rollout, sample

Ids = list[int]
Prefix = tuple[str, tuple[int, ...]]  # prompt key, response tokens so far
Verify = Callable[[str, Ids], bool]  # (prompt key, response without end token) -> right or wrong


@dataclass(frozen=True)
class Attempt:
    """A sampled response. response: its tokens, the end token left out. ends: where each step ends, in tokens. right: the
    verifier's word, False for one that never `ended`."""

    prompt: Ids
    key: str
    response: Ids
    ends: list[int]
    right: bool
    ended: bool

    def prefix(self, step: int) -> Prefix:
        """The response up to the end of a step, from 1; step 0 is the bare prompt."""
        return self.key, tuple(self.response[: self.ends[step - 1]] if step else ())

    def prefixes(self) -> list[Prefix]:
        """Those whose value must be estimated: all but the whole response."""
        return [self.prefix(step) for step in range(len(self.ends))]


@dataclass(frozen=True)
class Completed:
    """What came of a prefix: the share of its completions that were right, and those, end token left out."""

    rate: float
    right: list[Ids] = field(default_factory=list)


@dataclass(frozen=True)
class StepPairs:
    """Chosen against rejected continuations of prompts, lists of token ids for `collate`; a rejected one has no end token."""

    prompts: list[Ids]
    chosen: list[Ids]
    rejected: list[Ids]


@dataclass(frozen=True)
class StepWeights:
    """Responses with the weight of each of their tokens, lists of the same lengths."""

    prompts: list[Ids]
    responses: list[Ids]
    weights: list[list[float]]

    def padded(self, device: torch.device) -> Tensor:
        """[N, T] weights, as the mask of the collated batch is laid out."""
        rows = [torch.tensor(row, device=device) for row in self.weights]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def separator_ids(tokenizer: PreTrainedTokenizerBase, separator: str) -> frozenset[int]:
    """Tokens whose text contains the separator: a step ends after such a token."""
    return frozenset(token for token in range(len(tokenizer)) if separator in tokenizer.decode([token]))


def step_ends(response: Sequence[int], separators: frozenset[int]) -> list[int]:
    """Where each step ends, in tokens. Without a separator the response is one step; one at the very end opens none."""
    ends = [place + 1 for place, token in enumerate(response) if token in separators]
    return ends if ends and ends[-1] == len(response) else [*ends, len(response)]


def attempts_of(rollout: Rollout, separators: frozenset[int], verify: Verify) -> list[Attempt]:
    """The responses of a rollout, split and verified; one without any token is left out."""
    prompts = [ids[:n] for ids, n in zip(rollout.batch.ids.tolist(), rollout.batch.prompt_lengths.tolist(), strict=True)]
    rows = zip(prompts, rollout.keys, rollout.response_ids(), rollout.ended.tolist(), strict=True)
    return [
        Attempt(prompt, key, ids, step_ends(ids, separators), ended and verify(key, ids), ended)
        for prompt, key, ids, ended in rows
        if ids
    ]


def complete(
    policy: PreTrainedModel,
    attempts: Sequence[Attempt],
    verify: Verify,
    config: PerStepConfig,
    *,
    end: int,
    seed: str,
    compute: Compute,
) -> dict[Prefix, Completed]:
    """Sample `config.completions` completions of every prefix of the attempts, equal prefixes once, in one call.

    One that takes the response past `config.max_new_tokens` never ended, as a response of that length would not have.
    """
    if not attempts:
        return {}
    prompts = {attempt.key: attempt.prompt for attempt in attempts}
    prefixes = list(dict.fromkeys(prefix for attempt in attempts for prefix in attempt.prefixes()))
    requests = [
        Request([*prompts[key], *so_far], _request_key(key, so_far), n)
        for key, so_far in prefixes
        for n in range(config.completions)
    ]
    rollout = sample(
        policy,
        requests,
        seed=seed,
        end=end,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        compute=compute,
    )
    found = rollout.response_ids()
    result = {}
    for place, (key, so_far) in enumerate(prefixes):
        own = found[place * config.completions : (place + 1) * config.completions]
        room = config.max_new_tokens - len(so_far)  # a completion that ended in time is shorter: its end token counts
        right = [ids for ids in own if len(ids) < room and verify(key, [*so_far, *ids])]
        result[key, so_far] = Completed(len(right) / config.completions, right)
    return result


def _request_key(key: str, so_far: Sequence[int]) -> str:
    return f"{key}/{hashlib.blake2b(repr(tuple(so_far)).encode(), digest_size=8).hexdigest()}"


def best_of(rate: float, count: int) -> float:
    """Chance that at least one of `count` completions is right, from the chance of one: the value under best-of-K."""
    return 1 - (1 - rate) ** count


def rollout_values(attempt: Attempt, completed: Mapping[Prefix, Completed], count: int) -> list[float]:
    """Q_0 (the bare prompt) to Q_n of an attempt of n steps; the last is the verifier's 0 or 1."""
    return [*(best_of(completed[prefix].rate, count) for prefix in attempt.prefixes()), float(attempt.right)]


def verdict_values(verdicts: Sequence[bool], right: bool) -> list[float]:
    """Values from a step verifier in place of completions: 1 up to the first wrong step, 0 from it on; the last is `right`."""
    first = next((place for place, fine in enumerate(verdicts) if not fine), len(verdicts))
    return [1.0, *(float(place < first) for place in range(len(verdicts) - 1)), float(right)]


def step_advantages(values: Sequence[float]) -> list[float]:
    """A_i = Q_i - Q_(i-1) of steps 1 to n (eq. 3)."""
    return [after - before for before, after in pairwise(values)]


def first_pit(values: Sequence[float]) -> int:
    """The first step, from 1, of the lowest value among the steps."""
    steps = list(values[1:])
    return steps.index(min(steps)) + 1


def practical_pairs(attempts: Sequence[Attempt], values: Sequence[Sequence[float]], end: int) -> tuple[StepPairs, Counter[str]]:
    """A whole right response over the wrong one up to its pit; right ones of the same prompt are taken in turn.

    Counts the wrong attempts left out for want of a right one.
    """
    right: dict[str, list[Ids]] = {}
    for attempt in attempts:
        if attempt.right:
            right.setdefault(attempt.key, []).append([*attempt.response, end])
    pairs, dropped, used = StepPairs([], [], []), Counter[str](), Counter[str]()
    for attempt, row in zip(attempts, values, strict=True):
        if attempt.right:
            continue
        if attempt.key not in right:
            dropped["no_right_response"] += 1
            continue
        known = right[attempt.key]
        pairs.prompts.append(attempt.prompt)
        pairs.chosen.append(known[used[attempt.key] % len(known)])
        pairs.rejected.append(attempt.response[: attempt.ends[first_pit(row) - 1]])
        used[attempt.key] += 1
    return pairs, dropped


def shared_prefix_pairs(
    attempts: Sequence[Attempt],
    values: Sequence[Sequence[float]],
    completed: Mapping[Prefix, Completed],
    separators: frozenset[int],
    end: int,
) -> tuple[StepPairs, Counter[str]]:
    """The first step of a right completion over the pit step, after the same prefix, which stands in the prompt of both.

    Counts the wrong attempts left out because no completion of that prefix was right, or all such took the pit step too.
    """
    pairs, dropped = StepPairs([], [], []), Counter[str]()
    for attempt, row in zip(attempts, values, strict=True):
        if attempt.right:
            continue
        pit = first_pit(row)
        before = attempt.prefix(pit - 1)
        rejected = attempt.response[len(before[1]) : attempt.ends[pit - 1]]
        steps = [_first_step(ids, separators, end) for ids in completed[before].right]
        chosen = next((step for step in steps if step != rejected), None)
        if chosen is None:
            dropped["same_step" if steps else "no_right_completion"] += 1
            continue
        pairs.prompts.append([*attempt.prompt, *before[1]])
        pairs.chosen.append(chosen)
        pairs.rejected.append(rejected)
    return pairs, dropped


def _first_step(response: Ids, separators: frozenset[int], end: int) -> Ids:
    """The tokens of the first step, the end token included where it is the last."""
    stop = step_ends(response, separators)[0]
    return response[:stop] if stop < len(response) else [*response, end]


def advantage_weights(
    attempts: Sequence[Attempt], values: Sequence[Sequence[float]], beta: float, max_weight: float, end: int
) -> StepWeights:
    """Every attempt, each step's tokens weighted by exp(A_i / beta), at most `max_weight`; the end token with the last step."""
    result, limit = StepWeights([], [], []), math.log(max_weight)
    for attempt, row in zip(attempts, values, strict=True):
        steps = [math.exp(min(advantage / beta, limit)) for advantage in step_advantages(row)]
        sizes = [stop - start for start, stop in zip([0, *attempt.ends], attempt.ends, strict=False)]
        weights = [weight for weight, size in zip(steps, sizes, strict=True) for _ in range(size)]
        result.prompts.append(attempt.prompt)
        result.responses.append([*attempt.response, end] if attempt.ended else attempt.response)
        result.weights.append([*weights, steps[-1]] if attempt.ended else weights)
    return result
