"""Linear layers by oneDNN: the same function and gradients as PyTorch's own, only where it pays."""

import copy

import pytest
import torch
from torch import Tensor, nn

from apprentice import linear
from apprentice.compute import CPU, Compute
from apprentice.layers import set_layers
from apprentice.linear import FEWEST, STEP, half_unused, use_onednn
from tests.apprentice.toys import tiny_llama

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN")


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    return plain, ours


def gradients(layer: nn.Linear, given: Tensor, above: Tensor) -> list[Tensor]:
    x = given.detach().clone().requires_grad_()
    (layer(x) * above).sum().backward()
    assert x.grad is not None
    return [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [FEWEST, FEWEST + 1, 1000])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (7, 7)])
def test_outputs_and_gradients_are_those_of_a_linear_layer(inputs: int, outputs: int, rows: int, bias: bool) -> None:
    plain, ours = pair(inputs, outputs, bias)
    given, above = torch.randn(3, rows, inputs), torch.randn(3, rows, outputs)
    with torch.no_grad():
        assert torch.allclose(ours(given), given @ plain.weight.T + (plain.bias if bias else 0.0), atol=1e-5)
    for found, expected in zip(gradients(ours, given, above), gradients(plain, given, above), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_strided_inputs_and_gradients_are_taken_as_any_other() -> None:
    plain, ours = pair(16, 16, True)
    given, above = torch.randn(16, 2 * FEWEST).t()[::2], torch.randn(16, FEWEST).t()
    for found, expected in zip(gradients(ours, given, above), gradients(plain, given, above), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on() -> None:
    _, ours = pair(16, 8, True)
    ours.requires_grad_(False)
    (of_x,) = gradients(ours, torch.randn(FEWEST, 16), torch.ones(FEWEST, 8))
    assert torch.allclose(of_x, ours.weight.sum(0).expand(FEWEST, 16), atol=1e-5)
    assert ours.weight.grad is None


def numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that oneDNN is given from here on."""
    rows: list[int] = []
    onednn = linear._onednn
    monkeypatch.setattr(linear, "_onednn", lambda x, *rest: rows.append(len(x)) or onednn(x, *rest))
    return rows


def test_few_rows_take_pytorchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    (plain, ours), rows = pair(16, 8, True), numbers_of_rows(monkeypatch)
    with torch.no_grad():
        assert torch.equal(ours(torch.ones(FEWEST - 1, 16)), plain(torch.ones(FEWEST - 1, 16)))
        ours(torch.ones(FEWEST, 16))
    assert rows == [FEWEST]


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 8), (8, 16)])
def test_onednn_meets_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int) -> None:
    (_, ours), rows = pair(inputs, outputs, False), numbers_of_rows(monkeypatch)
    with torch.no_grad():
        for number in range(FEWEST, 4096, 13):
            ours(torch.ones(number, inputs))
    assert {number % STEP for number in rows} == {0}
    assert len(set(rows)) <= 2 * 8 + 8, "16 up to 2,048, and 8 more each time that doubles"


def test_copies_keep_it_and_a_checkpoint_shows_nothing_of_it(tmp_path) -> None:
    model = tiny_llama(0)
    plain = copy.deepcopy(model)
    use_onednn(model)
    kinds = {type(module).__name__ for module in copy.deepcopy(model).modules()}
    assert "_OneDNNLinear" in kinds
    assert "Linear" not in kinds
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.arange(FEWEST * 2).view(2, -1) % model.config.vocab_size
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"cpu_name": "AMD EPYC 9654", "avx512_f": True}, True),
        ({"cpu_name": "AMD Ryzen 7 5800X", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, about: dict[str, object], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about)
    assert half_unused.__wrapped__() is expected


@pytest.mark.parametrize(("compute", "expected"), [(CPU, True), (Compute(torch.device("cpu"), torch.bfloat16), False)])
def test_models_in_float32_on_the_processor_get_it(monkeypatch: pytest.MonkeyPatch, compute: Compute, expected: bool) -> None:
    monkeypatch.setattr("apprentice.layers.half_unused", lambda: True)
    model = set_layers(tiny_llama(0), compute)
    assert any(type(module) is not nn.Linear and isinstance(module, nn.Linear) for module in model.modules()) is expected
