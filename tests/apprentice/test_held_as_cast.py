"""Weights that stand as mixed precision casts them: the numbers of weights that are cast for each product."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from apprentice import layers
from apprentice.compute import CPU, Compute
from apprentice.layers import hold_as_cast, weights_as_cast
from apprentice.lora import Trunk
from apprentice.policy import freeze, score
from apprentice.sampling import Request, Rollout, sample
from apprentice.sections import LoRAConfig
from apprentice.tilt import load_tilt, write_tilt
from tasks import checkpoints
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.toys import END, demonstrations

HALF = Compute(CPU.device, torch.bfloat16)
LORA = LoRAConfig(rank=2, alpha=4, targets="all-linear")
BATCH = demonstrations(12, seed=0, vocab=40)


def drawn(model: Any) -> Rollout:
    asked = [Request([1, 5, 7, 8][: 1 + n % 4], f"{n}") for n in range(20)]
    return sample(model, asked, seed="0", end=END, max_new_tokens=20, compute=HALF)


def adapted(trunk: Any) -> Any:
    """A role whose adapter changes what the trunk says."""
    role = Trunk(trunk, LORA, seed="0", origin={"path": ""}).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return role


def weights(model: PreTrainedModel) -> list[tuple[int, torch.dtype]]:
    return [(id(parameter), parameter.dtype) for parameter in model.parameters()]


def half_of(model: PreTrainedModel) -> PreTrainedModel:
    """As read from a checkpoint in bfloat16."""
    return model.to(torch.bfloat16).float()


@pytest.mark.parametrize(
    "make", [lambda: tiny("llama"), lambda: tiny("gpt2"), lambda: tiny("gemma3"), lambda: adapted(tiny("qwen2"))]
)
def test_samples_are_those_of_weights_cast_for_each_product(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    found = drawn(model)
    monkeypatch.setattr(layers, "_to_cast", lambda *_: [])
    wanted = drawn(model)
    assert torch.equal(found.batch.ids, wanted.batch.ids) and torch.equal(found.logps, wanted.logps)


def test_weights_are_cast_inside_only_where_precision_is_mixed() -> None:
    model = tiny("qwen2")
    before = weights(model)
    with weights_as_cast(model, CPU):
        assert weights(model) == before
    with pytest.raises(KeyError), weights_as_cast(model, HALF):
        assert model.lm_head.weight.dtype == model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
        assert model.model.embed_tokens.weight.dtype == torch.float32
        raise KeyError
    assert weights(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scorer_gives_the_same_scores_from_less_memory(family: str) -> None:
    model = freeze(tiny(family))
    wanted, before = score(model, BATCH, HALF), model.get_memory_footprint()
    assert hold_as_cast(model, HALF) is model
    assert torch.equal(score(model, BATCH, HALF), wanted)
    assert model.get_memory_footprint() < before or model.config.tie_word_embeddings  # a tied head is a copy then
    assert (
        {parameter.dtype for parameter in model.model.parameters()} >= {torch.bfloat16, torch.float32}
        if family == "llama"
        else True
    )


def test_nothing_changes_in_float32_or_where_models_are_spread() -> None:
    model = tiny("llama")
    before = weights(model)
    hold_as_cast(model, CPU)
    hold_as_cast(model, Compute(CPU.device, torch.bfloat16, sharding=True))
    assert weights(model) == before


def test_a_trunk_trains_and_is_merged_as_if_it_stood_in_float32(tmp_path: Path) -> None:
    gradients, sizes = [], []
    for hold in (False, True):
        trunk = half_of(tiny("llama"))
        if hold:
            hold_as_cast(trunk, HALF, lossless=True)
            assert trunk.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        role = adapted(trunk)
        assert {parameter.dtype for parameter in role.parameters()} == {torch.float32}
        with HALF.autocast():
            loss = role(input_ids=BATCH.ids).logits.float().square().mean()
        gradients.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(role.parameters()))]))
        sizes.append(role.get_memory_footprint())
        role.save_pretrained(tmp_path / str(hold))
    assert torch.equal(*gradients)
    assert sizes[0] == sizes[1]  # of what is written
    files = [(tmp_path / str(hold) / "model.safetensors").read_bytes() for hold in (False, True)]
    assert files[0] == files[1]


def test_what_a_trunk_would_lose_or_what_is_an_embedding_too_stays() -> None:
    model = half_of(tiny("qwen2"))
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach() * (1 + 2**-12))
    hold_as_cast(model, HALF, lossless=True)
    assert up.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_stages_hold_scorers_so_and_the_two_of_a_tilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "policy_of", lambda *_: tiny("llama"))
    monkeypatch.setattr("apprentice.tilt.load_policy", lambda *_: tiny("llama"))
    write_tilt(tmp_path / "tilt", tmp_path / "sft", tmp_path / "base", 1.0, {})
    scorer, tilted = checkpoints.scorers_of(cast(Any, None), ["sft"], HALF)["sft"], load_tilt(tmp_path / "tilt", HALF)
    for model in (scorer, tilted.target, tilted.baseline):
        assert model.lm_head.weight.dtype == torch.bfloat16 and not model.lm_head.weight.requires_grad
