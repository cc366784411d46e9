"""Sequences packed in rows: places by hand, the values they have alone, and nothing seen of a neighbour."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apprentice.compute import CPU, Compute
from apprentice.layers import set_layers
from apprentice.packing import Shelf, packed
from apprentice.policy import Critic, response_scores, score, values_of
from apprentice.sampling import Request, sample
from apprentice.tokens import Batch, collate
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.toys import END, ONE_ROW, PACKED, demonstrations, gradient, naive_logps, relative_error

BATCH = demonstrations(14, seed=3, vocab=40)
FLOAT32 = 2e-5  # what another order of sums may change of a log-probability
WIDE = dataclasses.replace(PACKED, forward_tokens=4096)  # the whole batch in one forward pass


def test_a_sequence_goes_where_it_first_fits() -> None:
    shelf = Shelf(6)
    assert [shelf.place(length) for length in (5, 3, 2, 2, 1)] == [(0, 0), (1, 0), (1, 3), (2, 0), (0, 5)]
    assert shelf.used == [6, 5, 2]
    assert shelf.fits(4, rows=3) and not shelf.fits(5, rows=3) and shelf.fits(5, rows=4)


def test_a_layout_by_hand() -> None:
    batch = collate([[1, 2], [5], [7, 8, 9]], [[3], [6], [4, 2]], END)  # of 3, 2 and 5 tokens
    laid = packed(batch.ids, batch.lengths(), 6)
    assert [row[:5] for row in laid.ids.tolist()] == [[7, 8, 9, 4, 2], [1, 2, 3, 5, 6]]
    assert laid.position_ids is not None
    assert laid.position_ids.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 1, 0]]
    assert (laid.rows.tolist(), laid.starts.tolist()) == ([1, 1, 0], [0, 3, 0])
    columns = batch.response_positions() - 1  # [[1, .], [0, .], [2, 3]]
    kept = laid.kept(columns, batch.mask)
    assert kept.tolist() == [1, 2, 3]
    found = laid.take(laid.ids[:, kept + 1], columns, kept) * batch.mask.long()
    assert found.tolist() == [[3, 0], [6, 0], [4, 2]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.booleans())
@settings(max_examples=100, deadline=None)
def test_packed_micro_batches_take_each_row_once_within_the_budget(lengths: list[int], budget: int, one_row: bool) -> None:
    attention = "flash_attention_2" if one_row else "auto"
    compute = Compute(CPU.device, CPU.dtype, budget, packing=True, attention=attention)
    groups = list(compute.micro_batches(lengths))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[row] for row in group]
        ids = torch.ones(len(own), max(own), dtype=torch.long)
        laid = packed(ids, own, sum(own) if one_row else max(own))
        assert len(group) == 1 or laid.ids.numel() <= budget
        spans = sorted(
            (row, start, start + n) for row, start, n in zip(laid.rows.tolist(), laid.starts.tolist(), own, strict=True)
        )
        assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(spans)), "no two overlap"
        assert max(end for _, _, end in spans) <= laid.ids.size(1)
    padded = list(dataclasses.replace(compute, packing=False).micro_batches(lengths))
    assert len(groups) <= len(padded)
    assert list(compute.padded_batches(lengths)) == padded, "a cache is never packed"


@pytest.mark.parametrize("compute", [PACKED, WIDE, ONE_ROW], ids=["packed", "wide", "one_row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_have_the_values_they_have_alone(family: str, compute: Compute) -> None:
    model = tiny(family)
    found = score(model, BATCH, compute)
    for row in (0, 5, 13):
        prompt, size = int(BATCH.prompt_lengths[row]), int(BATCH.response_lengths[row])
        ids = BATCH.ids[row].tolist()
        wanted = naive_logps(model, ids[:prompt], ids[prompt : prompt + size])
        assert found[row, :size].tolist() == pytest.approx(wanted, abs=FLOAT32)
    plain, laid = (response_scores(model, BATCH, c, temperature=0.7, entropy=True) for c in (CPU, compute))
    assert torch.allclose(laid.logps, plain.logps, atol=FLOAT32)
    assert plain.entropy is not None and laid.entropy is not None
    assert torch.allclose(laid.entropy, plain.entropy, atol=FLOAT32)
    critic = Critic(model)
    nn.init.normal_(critic.head.weight)
    assert torch.allclose(values_of(critic, BATCH, compute), values_of(critic, BATCH), atol=FLOAT32)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_have_the_gradients_they_have_alone(family: str) -> None:
    def of(compute: Compute) -> Tensor:
        model = tiny(family)
        critic = Critic(model, shared=True)
        nn.init.ones_(critic.head.weight)
        scores = response_scores(model, BATCH, compute, hidden=True)
        assert scores.hidden is not None
        (scores.logps.sum() + critic.read(scores.hidden, scores.layout, BATCH).sum()).backward()
        return gradient(model)

    assert relative_error(of(WIDE), of(CPU)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_beside_a_sequence_changes_no_bit_of_it(family: str) -> None:
    model, ids = tiny(family), BATCH.ids.clone()
    ids[1:] = (ids[1:] + 7) % 40
    found = [score(model, Batch(i, BATCH.prompt_lengths, BATCH.response_lengths), WIDE) for i in (BATCH.ids, ids)]
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_a_packed_pass_reads_fewer_tokens_and_projects_responses_alone() -> None:
    model, seen = tiny("llama"), list[dict[str, Any]]()
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    for compute in (CPU, WIDE, dataclasses.replace(ONE_ROW, forward_tokens=4096)):
        response_scores(model, BATCH, compute)
    plain, rows, one_row = ((inputs["input_ids"].numel(), inputs["logits_to_keep"].numel()) for inputs in seen)
    assert plain[0] == BATCH.ids.numel() and rows[0] < 0.9 * plain[0] and one_row[0] == sum(BATCH.lengths())
    assert one_row[1] == int(BATCH.response_lengths.sum())


def test_sampling_is_not_packed() -> None:
    asked = [Request([1, 2, 5][:n], f"{n}") for n in (1, 2, 3)]
    plain, other = (sample(tiny("qwen2"), asked, seed="0", end=END, max_new_tokens=6, compute=c) for c in (CPU, WIDE))
    assert torch.equal(plain.batch.ids, other.batch.ids) and torch.equal(plain.logps, other.logps)


class Deaf(nn.Module):
    """A model that takes no notice of position_ids, so that packed sequences see each other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.device = model, torch.device("cpu")

    def forward(self, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        return self.model(**inputs)


class Shifted(Deaf):
    """One that counts positions from elsewhere, so that a packed sequence is not what it is alone."""

    def forward(self, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        assert position_ids is not None
        return self.model(position_ids=position_ids + position_ids.size(1), **inputs)


@pytest.mark.parametrize("kind", [Deaf, Shifted])
def test_a_model_that_does_not_keep_them_apart_is_refused(kind: type[Deaf]) -> None:
    with pytest.raises(ValueError, match=rf"compute\.packing: {kind.__name__} does not keep packed sequences apart"):
        set_layers(kind(tiny("gpt2")), PACKED)
    assert set_layers(kind(tiny("gpt2")), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_keep_them_apart(family: str) -> None:
    model = tiny(family)
    assert set_layers(model, PACKED) is model
