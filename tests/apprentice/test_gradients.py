"""Gradients added where they stand: those of PyTorch, without a second tensor, and only where it is asked for."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apprentice import gradients
from apprentice.compute import CPU
from apprentice.gradients import LARGE, add_rows_in_place, added_in_place, takes_in_place
from apprentice.layers import set_layers
from apprentice.linear import FEWEST, use_onednn
from apprentice.sft import train_step
from tests.apprentice.toys import demonstrations, tiny_llama

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN")


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGE", 1)


class Operations(TorchDispatchMode):
    """The names of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def rows_of(padding: int | None = None) -> nn.Embedding:
    layer = nn.Embedding(4, 2, padding_idx=padding)
    add_rows_in_place(layer)
    return layer


def gather(layer: nn.Embedding, ids: list[int], above: list[list[float]]) -> None:
    (layer(torch.tensor(ids)) * torch.tensor(above)).sum().backward()


@pytest.mark.parametrize(("padding", "of_padding"), [(None, [9.0, 90.0]), (3, [0.0, 0.0])])
def test_rows_are_added_up_by_hand(padding: int | None, of_padding: list[float]) -> None:
    layer = rows_of(padding)
    with added_in_place():
        gather(layer, [1, 3], [[1.0, 10.0], [4.0, 40.0]])
        assert layer.weight.grad is not None
        place = layer.weight.grad.data_ptr()
        with Operations() as second:
            gather(layer, [1, 3, 1], [[2.0, 20.0], [5.0, 50.0], [3.0, 30.0]])
    assert layer.weight.grad.tolist() == [[0.0, 0.0], [6.0, 60.0], [0.0, 0.0], of_padding]
    assert layer.weight.grad.data_ptr() == place
    assert "embedding_dense_backward" not in second.names and "index_add_" in second.names


def test_elsewhere_a_gradient_is_passed_on_and_what_was_gathered_stays() -> None:
    layer = rows_of()
    gather(layer, [0], [[1.0, 2.0]])
    (found,) = torch.autograd.grad(layer(torch.tensor([2, 2])).sum(), [layer.weight])
    assert found.tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    assert layer.weight.grad is not None and layer.weight.grad[0].tolist() == [1.0, 2.0] and float(layer.weight.grad.sum()) == 3


def test_it_is_over_after_an_error() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(KeyError), added_in_place():
        assert takes_in_place(weight)
        raise KeyError
    assert not takes_in_place(weight)


def test_only_a_large_weight_that_has_a_gradient_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGE", LARGE)
    large, small = nn.Parameter(torch.zeros(LARGE)), nn.Parameter(torch.zeros(LARGE - 1))
    with added_in_place():
        assert not takes_in_place(large)
        large.grad, small.grad = torch.zeros(LARGE), torch.zeros(LARGE - 1)
        assert takes_in_place(large) and not takes_in_place(small)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_of_another_kind_stays_as_it_is(options: dict[str, Any]) -> None:
    layer = nn.Embedding(4, 2, **options)
    add_rows_in_place(layer)
    assert type(layer) is nn.Embedding


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, gradients._Embedding), (torch.bfloat16, nn.Embedding)])
def test_a_model_is_set_so_in_float32(dtype: torch.dtype, kind: type) -> None:
    assert type(set_layers(tiny_llama(0), replace(CPU, dtype=dtype)).model.embed_tokens) is kind


def test_a_small_embedding_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGE", 10)
    both = nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(5, 2)])
    add_rows_in_place(both)
    assert [type(layer) is nn.Embedding for layer in both] == [True, False]


@onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_adds_its_products_where_they_stand(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 24, bias=bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    given, above = torch.randn(3, FEWEST, 8), torch.randn(3, FEWEST, 24)
    places = set()
    with added_in_place(), Operations() as made:
        for x, weight in zip(given, above, strict=True):
            for layer in (plain, ours):
                (layer(x) * weight).sum().backward()
            assert ours.weight.grad is not None
            places.add(ours.weight.grad.data_ptr())
    expected = torch.einsum("nbo,nbi->oi", above.double(), given.double())
    assert len(places) == 1 and made.names.count("addmm_") == 2  # of three passes the first gives the gradient its place
    assert torch.allclose(ours.weight.grad.double(), expected, atol=1e-3)
    for found, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and other.grad is not None and torch.allclose(found.grad, other.grad, atol=1e-3)


@onednn
@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradients_are_those_of_one_without(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """Of several micro-batches, with head and embedding one weight or two."""
    monkeypatch.setattr("apprentice.linear.FEWEST", 8)
    monkeypatch.setattr("apprentice.linear.STEP", 8)
    batch, plain = demonstrations(9, seed=0), tiny_llama(0)
    if tied:
        plain.lm_head.weight = plain.model.embed_tokens.weight
    ours = copy.deepcopy(plain)
    add_rows_in_place(ours)
    use_onednn(ours)
    small = replace(CPU, forward_tokens=24)
    assert len(list(small.micro_batches(batch.lengths()))) > 2
    with Operations() as made:
        losses = [train_step(model, batch, small) for model in (plain, ours)]
    assert "index_add_" in made.names and losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, found), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and other.grad is not None, name
        assert torch.allclose(found.grad, other.grad, rtol=1e-4, atol=1e-6), name
