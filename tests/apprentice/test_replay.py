"""Recorded steps: what they draw is what plain steps draw, to the bit, and a record follows the model's weights."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from apprentice import replay
from apprentice.sampling import Request, Rollout, sample
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.toys import END, tiny_llama

PROMPTS = [[1, 5, 7], [1], [2, 2, 2, 4, 9, 11, 12, 13], [8, 1]]


def drawn(model: Any, rows: int, **options: Any) -> Rollout:
    """Forty steps at most: the cache is widened twice, and finished rows leave."""
    asked = [Request(PROMPTS[n % 4], f"{n}") for n in range(rows)]
    return sample(model, asked, seed="0", end=END, max_new_tokens=40, **options)


def same(one: Rollout, other: Rollout) -> bool:
    return torch.equal(one.batch.ids, other.batch.ids) and torch.equal(one.logps, other.logps)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are traced at once; the number of rows of each trace."""
    made, trace = list[int](), torch.jit.trace

    def counted(step: Any, tensors: Any, **options: Any) -> Any:
        made.append(len(tensors[0]))
        return trace(step, tensors, **options)

    monkeypatch.setattr(replay, "UNTRACED_STEPS", 0)
    monkeypatch.setattr(torch.jit, "trace", counted)
    return made


@contextmanager
def plain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "TRACED", ())
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_one_trace_draws_what_plain_steps_draw_for_any_number_of_rows(family: str, traces: list[int]) -> None:
    model = tiny(family)
    for rows in (30, 7, 2, 200):
        found = drawn(model, rows)
        with plain():
            assert same(found, drawn(model, rows))
    assert len(set(found.batch.response_lengths.tolist())) > 1
    assert len(traces) == 1


def test_each_way_of_drawing_has_a_trace_of_its_own(traces: list[int]) -> None:
    model = tiny("llama")
    for options in ({"temperature": 0.5}, {"temperature": 0.0}, {"temperature": 0.5}):
        found = drawn(model, 20, **options)
        with plain():
            assert same(found, drawn(model, 20, **options))
    assert len(traces) == 2


def test_a_model_is_traced_once_it_has_made_some_steps(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "UNTRACED_STEPS", 50)
    model = tiny("gpt2", vocab=400)  # hardly ever ends
    drawn(model, 8)
    assert traces == []
    drawn(model, 8)
    assert len(traces) == 1


def test_a_trace_follows_weights_that_are_trained_and_weights_that_are_put_in_their_place(traces: list[int]) -> None:
    model = tiny("llama")
    before = drawn(model, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    after = drawn(model, 20)
    assert len(traces) == 1 and not same(before, after)
    with plain():
        assert same(after, drawn(model, 20))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() / 2)
    put = drawn(model, 20)
    assert len(traces) == 2 and not same(put, after)
    with plain():
        assert same(put, drawn(model, 20))


def test_what_is_known_of_a_model_goes_with_it(traces: list[int]) -> None:
    model = tiny("llama")
    drawn(model, 20)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert traces and gone() is None


def test_a_model_whose_steps_may_differ_is_never_traced(traces: list[int]) -> None:
    stretched = tiny_llama(0, vocab=40, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    watched, seen = tiny("llama"), list[int]()
    watched.register_forward_pre_hook(lambda *_: seen.append(1))
    unknown = tiny("llama")
    unknown.config.model_type = "mixtral"
    for model in (stretched, watched, unknown):
        drawn(model, 20)
    assert len(seen) > 2 and traces == []


def test_large_products_and_single_rows_are_not_traced(traces: list[int]) -> None:
    drawn(tiny("llama"), 1000)
    drawn(tiny("llama"), 1)
    assert traces and all(1 < rows < 256 for rows in traces)
