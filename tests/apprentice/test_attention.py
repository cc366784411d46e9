"""Attention by another kernel: the same numbers, refusals in a line; while sampling, one token for each row by products."""

import dataclasses
import math

import pytest
import torch
from transformers import PreTrainedModel

from apprentice import attention
from apprentice.attention import attention_to_slots, one_token, step_mask
from apprentice.compute import CPU, Compute
from apprentice.layers import set_layers
from apprentice.policy import score
from apprentice.sampling import Request, Rollout, sample
from apprentice.tilt import Tilt
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.toys import END, demonstrations

BF16 = dataclasses.replace(CPU, dtype=torch.bfloat16)
PROMPTS = [[1, 5, 7], [1], [2, 2, 2, 4, 9, 11, 12, 13], [8, 1]]


def by(name: str) -> Compute:
    return dataclasses.replace(CPU, attention=name)


def drawn(model: PreTrainedModel, compute: Compute = CPU) -> Rollout:
    asked = [Request(PROMPTS[n % 4], f"key {n % 4}", n // 4) for n in range(30)]
    return sample(model, asked, seed="0", end=END, max_new_tokens=12, compute=compute)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3", "gpt2"])
def test_either_attention_gives_the_same_scores(family: str) -> None:
    batch = demonstrations(9, seed=1, vocab=40)
    eager, sdpa = (set_layers(tiny(family), by(name)) for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    assert torch.allclose(score(eager, batch), score(sdpa, batch), atol=1e-4)


def test_an_attention_that_a_model_cannot_take_is_refused() -> None:
    """PyTorch's fused attention has no soft cap."""
    with pytest.raises(ValueError, match=r"compute\.attention: Gemma2ForCausalLM cannot take sdpa; auto takes what it can"):
        set_layers(tiny("gemma2"), by("sdpa"))
    assert set_layers(tiny("gemma2"), by("eager")).config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sampling_takes_another_kernel_than_flash_attention(family: str) -> None:
    """Which is not to be had here: a pass by it would fail."""
    asked = [Request([1, 2, 5], "k", n) for n in range(8)]
    model, both = tiny(family), Tilt(tiny(family), tiny(family, seed=1), 1.0)
    for sampled, parts in ((model, [model]), (both, [both.target, both.baseline])):
        wanted = sample(sampled, asked, seed="0", end=END, max_new_tokens=6)
        for part in parts:
            part.config._attn_implementation = "flash_attention_2"
        found = sample(sampled, asked, seed="0", end=END, max_new_tokens=6)
        assert torch.equal(found.logps, wanted.logps)
        assert all(part.config._attn_implementation == "flash_attention_2" for part in parts)
        with pytest.raises(Exception, match=r"kernels|flash"):
            score(parts[0], found.batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_made_for_all_layers_is_the_one_that_transformers_makes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mixed precision, by the same kernel; else by products, which round differently."""
    model = tiny(family)
    rounded, exact = drawn(model, BF16), drawn(model)
    monkeypatch.setattr(attention, "WHOLE_MASKS", ())
    found = drawn(model, BF16)
    assert torch.equal(found.batch.ids, rounded.batch.ids) and torch.equal(found.logps, rounded.logps)
    found = drawn(model)
    assert torch.equal(found.batch.ids, exact.batch.ids) and torch.allclose(found.logps, exact.logps, atol=1e-5)


def test_windows_and_kernels_with_masks_of_their_own_get_theirs() -> None:
    attended = torch.ones(2, 3, dtype=torch.bool)
    takes = {family: step_mask(tiny(family), attended).dim() == 4 for family in FAMILIES}
    assert takes == {"qwen2": True, "llama": True, "gemma2": False, "gemma3": False, "gpt2": True}
    windowed, eager = tiny("qwen2"), tiny("llama")
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    eager.config._attn_implementation = "eager"
    assert step_mask(windowed, attended) is attended and step_mask(eager, attended) is attended


def test_products_are_taken_on_a_cpu_in_full_precision_and_left_behind() -> None:
    cuda = dataclasses.replace(CPU, device=torch.device("cuda"))
    for compute, name in ((CPU, "one_token"), (BF16, "sdpa"), (cuda, "sdpa")):
        model, capped = tiny("llama"), tiny("gemma2")
        with pytest.raises(KeyError), attention_to_slots(model, compute), attention_to_slots(capped, compute):
            assert model.config._attn_implementation == name and capped.config._attn_implementation == "eager"
            raise KeyError
        assert model.config._attn_implementation == "sdpa"


def test_one_token_attends_to_what_is_in_use_alone() -> None:
    """Four heads, two to each key, against sums over slots one by one."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=random) for shape in ((2, 4, 1, 3), (2, 2, 5, 3), (2, 2, 5, 3)))
    attended = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    model = tiny("llama")
    with attention_to_slots(model, CPU):
        mask = step_mask(model, attended)
    found, _ = one_token(None, query, key, value, mask, 0.7)
    assert found.shape == (2, 1, 4, 3)
    for row in range(2):
        for head in range(4):
            slots = [slot for slot in range(5) if attended[row, slot]]
            weights = [math.exp(0.7 * float(query[row, head, 0] @ key[row, head // 2, slot])) for slot in slots]
            for place in range(3):
                values = [float(value[row, head // 2, slot, place]) for slot in slots]
                wanted = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
                assert float(found[row, 0, head, place]) == pytest.approx(wanted, abs=1e-5)


def test_one_token_prompts_without_padding_are_read_too() -> None:
    model = tiny("llama")
    found = sample(model, [Request([n], f"{n}") for n in range(1, 5)], seed="0", end=END, max_new_tokens=6)
    assert torch.allclose(found.logps, score(model, found.batch), atol=1e-4)
