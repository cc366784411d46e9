"""The shapes of the benchmark of one device: models of random weights, random texts, and what of them is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config


@dataclass(frozen=True)
class Shape:
    """Entries of a Qwen2 configuration, and how much one measurement takes: rows of `prompt` and `response` tokens.
    forward_tokens: of ours in one pass, as in the presets. adapters: what is trained is adapters of rank 16 on every linear
    layer."""

    entries: dict[str, Any]
    rows: int
    prompt: int
    response: int
    forward_tokens: int
    adapters: bool = False

    @property
    def read(self) -> int:
        """Tokens of all rows."""
        return self.rows * (self.prompt + self.response)

    @property
    def drawn(self) -> int:
        """Tokens of their responses."""
        return self.rows * self.response

    @property
    def train(self) -> int:
        """FLOP a parameter and trained token."""
        return 4 if self.adapters else 6

    @property
    def config(self) -> Qwen2Config:
        """What transformers builds."""
        return Qwen2Config(**self.entries, max_position_embeddings=4096)


def qwen2(hidden: int, inner: int, layers: int, heads: int, key_heads: int, words: int, tied: bool) -> dict[str, Any]:
    """The entries by the names that transformers has for them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }


TINY = qwen2(16, 32, 2, 2, 1, 64, True)
SHAPES = {
    "0.5b": Shape(qwen2(896, 4864, 24, 14, 2, 151_936, True), 64, 128, 256, 8192),
    "7b": Shape(qwen2(3584, 18_944, 28, 28, 4, 152_064, False), 32, 128, 128, 4096, adapters=True),
    "tiny": Shape(TINY, 4, 6, 5, 44),
    "tiny_adapters": Shape(TINY, 4, 6, 5, 44, adapters=True),
}


@dataclass(frozen=True)
class Work:
    """One kind of work. prepare: makes its models, and gives what is timed. tokens: by which its speed is told. flop: model
    FLOP a parameter."""

    prepare: Callable[[], Callable[[], object]]
    tokens: int
    flop: float


def build(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The model, made on the device, of the same random weights each time."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(shape.config, dtype=dtype).eval()


def parameters(shape: Shape) -> int:
    """How many numbers the model has; none of them is made."""
    return sum(parameter.numel() for parameter in build(shape, torch.device("meta")).parameters())


def texts(shape: Shape) -> Tensor:
    """Random prompts and responses, all of one length, in rows."""
    size = (shape.rows, shape.prompt + shape.response)
    return torch.randint(shape.entries["vocab_size"], size, generator=torch.Generator().manual_seed(0))
