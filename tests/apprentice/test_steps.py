"""Per-step negatives: values of steps against enumeration, advantages, the pit."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apprentice import steps
from apprentice.compute import CPU
from apprentice.method_sections import PerStepConfig
from apprentice.sampling import Request, Rollout
from apprentice.steps import (
    Attempt,
    Completed,
    attempts_of,
    best_of,
    complete,
    first_pit,
    rollout_values,
    separator_ids,
    step_advantages,
    step_ends,
    verdict_values,
)
from apprentice.tokens import collate, train_word_tokenizer
from tests.apprentice.toys import (
    END,
    LIMIT,
    SMALL,
    enumerate_responses,
    naive_logps,
    tiny_llama,
)

CUT = frozenset({1})  # in the enumerable world a step ends after token 1
PROMPTS = {"a": [0, 2], "b": [2, 0]}
numbers = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=9)


def odd(key: str, ids: Sequence[int]) -> bool:
    """Right: an odd sum, for prompt b an even one."""
    return sum(ids) % 2 == (key == "a")


def section(**changes: Any) -> PerStepConfig:
    config = PerStepConfig(
        loss="sigmoid_norm",
        gamma=0.5,
        epochs=1,
        batch_size=4,
        learning_rate=1e-3,
        warmup_share=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        variant="practical",
        values="rollouts",
        separator=";",
        prompts=1,
        negatives=1,
        completions=5,
        best_of=1,
        temperature=1.0,
        max_new_tokens=LIMIT,
        beta=0.5,
        max_weight=5.0,
    )
    return replace(config, **changes)


def tried(response: Sequence[int], key: str = "a") -> Attempt:
    """A response of the enumerable world as an attempt; it ended unless it is as long as the limit allows."""
    done = len(response) < LIMIT
    return Attempt(PROMPTS[key], key, list(response), step_ends(response, CUT), done and odd(key, response), done)


def of_sizes(sizes: Sequence[int], first: int, right: bool = False, key: str = "a", ended: bool = True) -> Attempt:
    """An attempt of steps of the given sizes, its tokens numbered from `first`."""
    ends = list(itertools.accumulate(sizes))
    return Attempt([7, 8], key, list(range(first, first + ends[-1])), ends, right, ended)


def complete_all(attempts: Sequence[Attempt], **changes: Any) -> dict[Any, Completed]:
    options = {"end": END, "seed": "0", "compute": CPU, "model": tiny_llama(0), "verify": odd}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    return complete(options.pop("model"), attempts, options.pop("verify"), section(**changes), **options)


@cache
def chances(key: str) -> list[tuple[list[int], bool, float]]:
    """Every response of the enumerable world, the end token left out, whether it ended, and its probability."""
    return [
        (ids[:-1] if done else ids, done, math.exp(sum(naive_logps(tiny_llama(0), PROMPTS[key], ids))))
        for ids, done in enumerate_responses()
    ]


def exact_value(key: str, so_far: Sequence[int]) -> float:
    """Chance that a response that begins like this is right, over all 40."""
    begun = [(ids, done, p) for ids, done, p in chances(key) if ids[: len(so_far)] == list(so_far)]
    return sum(p for ids, done, p in begun if done and odd(key, ids)) / sum(p for _, _, p in begun)


# --- steps of a response


@pytest.mark.parametrize(
    ("response", "ends"),
    [
        ([0, 2, 2], [3]),  # no separator: one step
        ([0, 1, 2, 1, 1, 2], [2, 4, 5, 6]),
        ([0, 1, 2, 1], [2, 4]),  # one at the end opens no further step
        ([1], [1]),
        ([1, 0], [1, 2]),
        ([0, 5, 1, 0], [2, 3, 4]),  # two separators that differ
    ],
)
def test_a_step_ends_with_its_separator(response: list[int], ends: list[int]) -> None:
    assert step_ends(response, frozenset({1, 5})) == ends


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_steps_make_up_the_response(response: list[int]) -> None:
    ends = step_ends(response, CUT)
    parts = [response[a:b] for a, b in itertools.pairwise([0, *ends])]
    assert all(parts) and list(itertools.chain(*parts)) == response
    assert all(part[-1] == 1 for part in parts[:-1])
    assert not any(1 in part[:-1] for part in parts)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens as byte-level checkpoints have them, where a line break (Ċ) is part of several; two dots make no break."""
    vocabulary = ["<eos>", "a", "Ċ", ".Ċ", "ĊĊ", ".", "Ċa", "Ġ"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_every_token_that_contains_the_separator_ends_a_step() -> None:
    assert separator_ids(bytes_tokenizer(), "\n") == {2, 3, 4, 6}
    words = train_word_tokenizer(["tom has 3; ; a"], 9)
    vocabulary = words.get_vocab()
    assert separator_ids(words, ";") == {vocabulary["3;"], vocabulary[";"]}
    assert separator_ids(words, "\n") == frozenset()  # words are split at whitespace
    assert step_ends([1, 3, 1, 4, 2, 1], separator_ids(bytes_tokenizer(), "\n")) == [2, 4, 5, 6]


# --- from a rollout to attempts


def test_attempts_are_split_verified_and_without_the_empty_ones() -> None:
    responses = [[0, 1, 0, END], [END], [1, 2, 0], [2, END], [1, END]]
    keys, asked = ["a", "a", "a", "b", "b"], []

    def verify(key: str, ids: list[int]) -> bool:
        asked.append((key, list(ids)))
        return odd(key, ids)

    batch = collate([PROMPTS["a"]] * 3 + [[2, 0, 1]] * 2, responses, END)
    rollout = Rollout(batch, torch.zeros(5, 4), torch.tensor([True, True, False, True, True]), keys)
    assert attempts_of(rollout, CUT, verify) == [
        Attempt([0, 2], "a", [0, 1, 0], [2, 3], True, True),
        Attempt([0, 2], "a", [1, 2, 0], [1, 3], False, False),  # its sum is odd, but it never ended
        Attempt([2, 0, 1], "b", [2], [1], True, True),
        Attempt([2, 0, 1], "b", [1], [1], False, True),
    ]
    assert asked == [("a", [0, 1, 0]), ("b", [2]), ("b", [1])]


def test_prefixes_are_the_prompt_and_all_steps_but_the_last() -> None:
    attempt = of_sizes([2, 1, 3], 20)
    assert attempt.prefixes() == [("a", ()), ("a", (20, 21)), ("a", (20, 21, 22))]
    assert attempt.prefix(3) == ("a", (20, 21, 22, 23, 24, 25))


# --- values by completions


def test_I1_completions_agree_with_enumeration() -> None:
    attempts = [tried(ids, key) for key in "ab" for ids in ([1, 0], [0, 1, 2], [2, 1, 1], [1, 1])]
    draws, odds = 2000, []
    found = complete_all(attempts, completions=draws)
    assert set(found) == {(key, ids) for key in "ab" for ids in ((), (1,), (0, 1), (2, 1))}
    for (key, so_far), completed in found.items():
        value = exact_value(key, so_far)
        odds.append(value)
        assert abs(completed.rate - value) <= 4 * math.sqrt(value * (1 - value) / draws), (key, so_far)  # 4 sigma
    assert max(odds) - min(odds) > 0.3  # so that one value for all would not do


def test_I1_a_completion_may_not_be_longer_than_the_response_could_have_been() -> None:
    # after two of three tokens only the end token is left: with room for three more the value would be another
    so_far, draws = [0, 1], 3000
    found = complete_all([tried([*so_far, 2])], completions=draws)["a", (0, 1)]
    assert set(map(tuple, found.right)) == {()}
    end_now = math.exp(naive_logps(tiny_llama(0), [*PROMPTS["a"], *so_far], [END])[0])
    loose = sum(
        math.exp(sum(naive_logps(tiny_llama(0), [*PROMPTS["a"], *so_far], ids)))
        for ids, done in enumerate_responses()
        if done and odd("a", [*so_far, *ids[:-1]])
    )
    sigma = math.sqrt(end_now * (1 - end_now) / draws)
    assert abs(found.rate - end_now) < 4 * sigma
    assert abs(loose - end_now) > 12 * sigma


def test_the_right_completions_are_those_kept() -> None:
    found = complete_all([tried([1, 0]), tried([2, 1, 1])], completions=40)
    for (key, so_far), completed in found.items():
        assert completed.rate == len(completed.right) / 40
        assert all(odd(key, [*so_far, *ids]) and END not in ids for ids in completed.right)
    assert sum(len(completed.right) for completed in found.values()) > 20
    assert {c.rate for c in complete_all([tried([1, 0])], verify=lambda key, ids: False).values()} == {0.0}


@given(st.floats(0, 1, allow_subnormal=False), st.integers(1, 6))
def test_I1_best_of_counts_the_outcomes_with_a_right_one(rate: float, count: int) -> None:
    outcomes = itertools.product([True, False], repeat=count)
    wanted = sum(math.prod(rate if right else 1 - rate for right in outcome) for outcome in outcomes if any(outcome))
    assert best_of(rate, count) == pytest.approx(wanted, abs=1e-12)


def test_I1_best_of_five_as_published() -> None:
    assert best_of(0.2, 5) == pytest.approx(0.67232)
    assert best_of(0.5, 5) == pytest.approx(0.96875)
    assert (best_of(0.3, 1), best_of(0.0, 5), best_of(1.0, 5)) == (pytest.approx(0.3), 0.0, 1.0)


def test_the_request_of_each_prefix_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[Request]] = []
    real = steps.sample

    def counted(model: Any, requests: list[Request], **options: Any) -> Rollout:
        calls.append(requests)
        return real(model, requests, **options)

    monkeypatch.setattr(steps, "sample", counted)
    # of prompt a the prefixes (), (1) and (0, 1); of prompt b (), (1)
    complete_all([tried([1, 0]), tried([1, 2, 0]), tried([0, 1, 1]), tried([1, 0]), tried([1, 0], "b")], completions=4)
    (requests,) = calls
    prefixes = [[0, 2], [0, 2, 1], [0, 2, 0, 1], [2, 0], [2, 0, 1]]
    assert Counter(tuple(request.prompt) for request in requests) == {tuple(ids): 4 for ids in prefixes}
    assert len({(request.key, request.sample) for request in requests}) == len(requests) == 20
    assert len({request.key for request in requests}) == 5


def test_the_seed_and_the_prefix_decide_the_completions() -> None:
    attempts = [tried([1, 0]), tried([0, 1, 2]), tried([1, 0], "b")]
    found = complete_all(attempts, completions=12)
    assert complete_all(attempts, completions=12) == found
    assert complete_all(attempts, completions=12, compute=SMALL) == found
    for attempt in attempts:  # whoever is asked about beside it
        alone = complete_all([attempt], completions=12)
        assert alone == {prefix: found[prefix] for prefix in attempt.prefixes()}
    assert complete_all(attempts, completions=12, seed="1") != found


def test_without_attempts_nothing_is_sampled() -> None:
    assert complete_all([]) == {}


# --- advantages


def test_values_and_advantages_by_hand() -> None:
    wrong, right = of_sizes([1, 1, 1], 20), of_sizes([1, 1, 1], 20, right=True)
    rates = {prefix: Completed(rate) for prefix, rate in zip(wrong.prefixes(), (0.5, 0.75, 0.25), strict=True)}
    assert rollout_values(wrong, rates, 1) == [0.5, 0.75, 0.25, 0.0]
    assert rollout_values(right, rates, 2) == [0.75, 0.9375, 0.4375, 1.0]  # the last is no best of two
    assert step_advantages([0.5, 0.75, 0.25, 0.0]) == [0.25, -0.5, -0.25]


@given(numbers)
def test_I2_advantages_telescope(values: list[float]) -> None:
    found = step_advantages(values)
    assert len(found) == len(values) - 1
    assert sum(found) == values[-1] - values[0]  # quarters: exact


def test_I2_the_last_value_is_the_verifiers_and_the_sum_reaches_it() -> None:
    attempts = [tried(ids, key) for key in "ab" for ids in ([1, 0], [0, 1, 2], [1, 1], [2], [0, 2, 2])]
    found = complete_all(attempts, completions=8)
    assert {attempt.right for attempt in attempts} == {True, False}
    for attempt in attempts:
        values = rollout_values(attempt, found, 5)
        assert len(values) == len(attempt.ends) + 1
        assert values[-1] == (1.0 if len(attempt.response) < LIMIT and odd(attempt.key, attempt.response) else 0.0)
        start = 1 - (1 - found[attempt.key, ()].rate) ** 5
        assert sum(step_advantages(values)) == pytest.approx(values[-1] - start, abs=1e-12)


# --- the pit


@pytest.mark.parametrize(
    ("values", "pit"),
    [
        ([0.0, 0.5, 0.25, 0.25], 2),  # not the bare prompt; of a tie the first
        ([0.5, 0.0, 0.0, 0.0], 1),
        ([0.5, 0.75, 0.5, 0.0], 3),
        ([0.25, 0.0], 1),
        ([0.5, 0.25, 0.5, 0.25, 0.5], 1),
    ],
)
def test_I3_the_first_pit_by_hand(values: list[float], pit: int) -> None:
    assert first_pit(values) == pit


@given(numbers)
def test_I3_the_first_pit_is_the_first_lowest(values: list[float]) -> None:
    pit = first_pit(values)
    assert all(values[pit] < values[step] for step in range(1, pit))
    assert all(values[pit] <= values[step] for step in range(pit, len(values)))


def test_the_first_wrong_step_is_the_pit_by_verdicts() -> None:
    assert verdict_values([True, False, True], right=False) == [1.0, 1.0, 0.0, 0.0]
    assert verdict_values([True, False, True], right=True) == [1.0, 1.0, 0.0, 1.0]
    assert verdict_values([True, True], right=True) == [1.0, 1.0, 1.0]
    assert verdict_values([False], right=False) == [1.0, 0.0]
    assert verdict_values([False, True], right=False) == [1.0, 0.0, 0.0]


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.booleans())
def test_I3_the_pit_by_verdicts_is_the_first_wrong_step_or_the_last(verdicts: list[bool], right: bool) -> None:
    values = verdict_values(verdicts, right)
    assert len(values) == len(verdicts) + 1
    assert values[-1] == right
    if not right:
        assert first_pit(values) == (verdicts.index(False) + 1 if False in verdicts else len(verdicts))
