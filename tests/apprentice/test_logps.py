"""Log-probabilities over the vocabulary: by hand, against autograd in float64, in any pieces, in little memory."""

import math

import pytest
import torch

from apprentice import logps as module
from apprentice.logps import token_entropy, token_logps


def test_token_logps_and_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [math.log(9), 0.0]])  # (1/4, 3/4) and (9/10, 1/10)
    assert token_logps(logits, torch.tensor([1, 1])).tolist() == pytest.approx([math.log(0.75), math.log(0.1)], abs=1e-6)
    wanted = [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))]
    assert token_entropy(logits).tolist() == pytest.approx(wanted, abs=1e-6)
    assert token_logps(logits.bfloat16(), torch.tensor([1, 1])).dtype == torch.float32


@pytest.mark.parametrize("room", [1, 20, 2**20])
def test_pieces_of_any_size_give_the_same_bits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, two, all; against the formula on the whole, its gradient by autograd."""
    torch.manual_seed(0)
    ids, weight, found = torch.randint(9, (3, 5)), torch.randn(3, 5), []
    monkeypatch.setitem(module.ROOM, "cpu", room)
    for ours in (True, False):
        logits = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
        plain = logits.log_softmax(-1)
        logps = token_logps(logits, ids) if ours else plain.gather(-1, ids[..., None]).squeeze(-1)
        entropy = token_entropy(logits) if ours else -(plain.exp() * plain).sum(-1)
        (weight * logps).sum().backward()
        assert logits.grad is not None and not (ours and entropy.requires_grad)
        found.append((logps, entropy, logits.grad))
    for mine, wanted in zip(*found, strict=True):
        assert mine.shape == wanted.shape and torch.allclose(mine, wanted, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    logits, ids, weight = torch.randn(4, 6).double(), torch.randint(6, (4,)), torch.randn(4).double()
    own = logits.clone().requires_grad_(True)
    (weight * token_logps(own, ids)).sum().backward()
    assert own.grad is not None and own.grad.dtype == torch.float64
    for row in range(4):
        for word in range(6):
            step = torch.zeros_like(logits)
            step[row, word] = 1e-5
            ends = [float((weight * (logits + s).log_softmax(-1)[range(4), ids]).sum()) for s in (step, -step)]
            assert float(own.grad[row, word]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


def test_in_bfloat16_the_gradient_is_too() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    token_logps(logits, torch.tensor([2])).sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    assert logits.grad.float().tolist()[0] == pytest.approx([-0.0900, -0.2447, 0.3348], abs=2e-3)


def test_nothing_of_the_size_of_the_logits_is_kept_but_they() -> None:
    """Saved for the way back: the logits themselves, and three numbers a row at most."""
    logits, saved = torch.randn(8, 1000, requires_grad=True), list[torch.Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        token_logps(logits, torch.zeros(8, dtype=torch.long))
    own = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()]
    assert len(own) < len(saved) and sum(tensor.numel() for tensor in own) <= 3 * 8
