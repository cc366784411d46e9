"""How attention is computed: by which kernel, and while sampling by products where each row has one token more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from apprentice.compute import FLASH, Compute

ONE_TOKEN = "one_token"  # its name in transformers
WHOLE_MASKS = ("gpt2", "llama", "qwen2")  # types of models, tested


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Have a model take the kernel of that name. Raises ValueError where its architecture cannot."""
    refused: Exception | None = None
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        refused = error
    if refused or model.config._attn_implementation != name:
        raise ValueError(f"compute.attention: {type(model).__name__} cannot take {name}; auto takes what it can") from refused


@contextmanager
def attention_to_slots(model: Any, compute: Compute) -> Iterator[None]:
    """Inside, a model attends to slots of a cache, some not in use: by PyTorch's attention where it has flash attention, which
    cannot mask them without asking the device how many they are, and by `one_token` in place of PyTorch's where that pays."""
    parts = [part for part in getattr(model, "whole", model).modules() if isinstance(part, PreTrainedModel)]
    kept = [(part.config, part.config._attn_implementation) for part in parts]
    try:
        for part in parts:
            if part.config._attn_implementation == FLASH:
                part.config._attn_implementation = "sdpa" if part._supports_sdpa else "eager"
            if compute.device.type == "cpu" and compute.dtype == torch.float32 and takes_whole_masks(part):
                part.config._attn_implementation = ONE_TOKEN
        yield
    finally:
        for config, name in kept:
            config._attn_implementation = name


def takes_whole_masks(model: Any) -> bool:
    """Whether one mask for all layers and heads, of what is attended to, is what transformers would make of it at each step."""
    config = model.config
    alike = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return alike and config.model_type in WHOLE_MASKS and config._attn_implementation in ("sdpa", ONE_TOKEN)


def step_mask(model: Any, attended: Tensor) -> Tensor:
    """What a model takes as the mask of a step, [B, W] bool the slots in use."""
    if not takes_whole_masks(model):
        return attended
    whole = attended[:, None, None]
    return torch.where(whole, 0.0, float("-inf")) if model.config._attn_implementation == ONE_TOKEN else whole


def one_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one token for each row: query [B, H, 1, D], key and value [B, G, W, D], the mask of `step_mask`, to
    [B, 1, H, D]. Heads that share keys are the rows of one product. With any other mask, PyTorch's attention."""
    if attention_mask is None or not attention_mask.is_floating_point():
        by_torch: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return by_torch
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.size(1), -1, size)
    scores = torch.add(attention_mask, grouped @ key.transpose(2, 3), alpha=scaling)
    return (scores.softmax(-1) @ value).reshape(rows, 1, heads, size), None


AttentionInterface.register(ONE_TOKEN, one_token)
AttentionMaskInterface.register(ONE_TOKEN, sdpa_mask)
