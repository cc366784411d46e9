"""Tiny random models of the families of real checkpoints, with what is special to each: biases and tied embeddings (Qwen2),
grouped heads (Llama), a sliding window, capped logits and scaled embeddings (Gemma), learned absolute positions (GPT-2)."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

FAMILIES = ("qwen2", "llama", "gemma2", "gemma3", "gpt2")


def config_of(family: str, vocab: int, positions: int = 64, **tokens: int | None) -> PreTrainedConfig:
    """The configuration; `tokens`: pad_token_id, bos_token_id, eos_token_id."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": positions,
        "vocab_size": vocab,
        **{f"{name}_token_id": None for name in ("pad", "bos", "eos")},
        **tokens,
    }
    gemma = {**shape, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    if family == "qwen2":
        return Qwen2Config(**shape, tie_word_embeddings=True)
    if family == "llama":
        return LlamaConfig(**shape, tie_word_embeddings=False)
    if family == "gemma2":
        return Gemma2Config(**gemma, attn_logit_softcapping=1.0, final_logit_softcapping=2.0)
    if family == "gemma3":
        return Gemma3TextConfig(**gemma, layer_types=["sliding_attention", "full_attention"])
    own = {name: value for name, value in shape.items() if name.endswith("_token_id")}
    return GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=positions, **own)


def tiny(family: str, vocab: int = 40, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model whose distributions are far from uniform, dropout off."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, vocab, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model.eval()
