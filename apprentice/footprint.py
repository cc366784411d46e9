"""What work on models takes of memory and disk, from their configurations alone: estimated before anything is loaded.

Weights, gradients and Adam's two moments are float32 here, 16 bytes a trained parameter and 4 a frozen one, of which mixed
precision leaves 2 of each in a layer (of a trunk under adapters where its checkpoint is in that precision); with LoRA adapters
alone are trained, and what they stand on is counted once. In a pass with gradient, and while sampling, there are weights as
cast too. Activations are those that a Llama's layer keeps for the way back, after Korthikanti et al. (2205.05198, section 4),
without the attention term, which fused attention does not store: mixed precision keeps norms and what goes around the layers
in float32. With gradient checkpointing all of that is kept of one layer at a time, and of the others their input.

Of models spread over processes each holds a part, in float32. Beside it, in a training pass, the embeddings and two layers are
whole, with their gradients and the copy in which those travel. A model that is sampled from or scores is whole meanwhile, one
at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from apprentice.compute import Compute
from apprentice.logps import ROOM

TRAINED, FROZEN, SNAPSHOT = 16, 4, 12  # bytes a parameter: in memory, in memory, of weights and moments in a snapshot
PASSING = 12  # the same of a layer that is put together in a training pass


@dataclass(frozen=True)
class Shape:
    """What the estimates need of a model. parameters: tied ones once, of an adapter its own. inner: width between the products
    of a layer's MLP. cache_width: numbers that the cache of a layer has a token. trunk: parameters that an adapter is merged
    into when it is written. rest: parameters that are in no layer."""

    parameters: int
    layers: int
    width: int
    inner: int
    vocabulary: int
    cache_width: int
    trunk: int = 0
    rest: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes. certain: of the models themselves. memory: of the device, with passes and cache, on a CPU with the copy that a
    snapshot takes. outputs: what is written, and once more in DVC's cache. snapshots: two, the previous one staying until the
    new one is whole."""

    certain: int
    memory: int
    outputs: int
    snapshots: int

    @property
    def disk(self) -> int:
        """What has to be free on the disk."""
        return self.outputs + self.snapshots


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of a causal language model; its weights are made nowhere."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    rest = parameters - sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    return Shape(parameters, text.num_hidden_layers, text.hidden_size, inner, text.vocab_size, 2 * heads * head, rest=rest)


def footprint(
    trained: Sequence[Shape],
    frozen: Sequence[Shape],
    compute: Compute,
    samples: bool,
    written: int = 0,
    processes: int = 1,
) -> Footprint:
    """What training some models (or none) beside frozen ones takes; `samples`: whether one of them is sampled from.

    `written`: how many models of the largest frozen shape are written beside what was trained. `processes`: over how many the
    models are spread; the memory is then that of one.
    """
    own = sum(shape.parameters for shape in trained)
    plain = processes > 1 or written  # what is written stands in float32 throughout
    held = sum(FROZEN * shape.parameters if plain else _frozen(shape, compute) for shape in frozen)
    certain = -(-(TRAINED * own + held) // processes)
    numbers = max(shape.layers * shape.cache_width for shape in [*trained, *frozen]) * compute.cache_tokens
    cache = numbers * compute.dtype.itemsize if samples else 0
    if samples and compute.sampler == "vllm":  # which keeps its copy and its cache throughout
        certain += cache + compute.dtype.itemsize * max(shape.parameters + shape.trunk for shape in [*trained, *frozen])
        cache = 0
    work = _sharded(trained, frozen, compute, cache) if processes > 1 else _whole(trained, frozen, compute, cache)
    outputs = 2 * FROZEN * max((shape.parameters + shape.trunk for shape in trained), default=0)
    outputs += 2 * FROZEN * written * max((shape.parameters for shape in frozen), default=0)
    copy = SNAPSHOT * own // processes if compute.device.type == "cpu" else 0  # the first process has it, for all
    return Footprint(certain, certain + work + copy, outputs, 2 * SNAPSHOT * own)


def _frozen(shape: Shape, compute: Compute) -> int:
    """Bytes of a frozen model."""
    return FROZEN * shape.rest + compute.dtype.itemsize * (shape.parameters - shape.rest)


def _cast(shape: Shape, compute: Compute) -> int:
    """Bytes of weights as cast, beside those in float32."""
    return 0 if compute.dtype == torch.float32 else compute.dtype.itemsize * shape.parameters


def _whole(trained: Sequence[Shape], frozen: Sequence[Shape], compute: Compute, cache: int) -> int:
    """Bytes of passes and cache where each process has all models whole."""
    cast = max((_cast(shape, compute) for shape in trained), default=0)
    return cast + max(cache, *(_pass(shape, compute, bool(trained)) for shape in [*trained, *frozen]))


def _sharded(trained: Sequence[Shape], frozen: Sequence[Shape], compute: Compute, cache: int) -> int:
    """The same, and what is put together for them, where each process has a part of each."""
    training = [
        _pass(shape, compute, True)
        + PASSING * (shape.rest + 2 * (shape.parameters - shape.rest) // shape.layers)
        + (0 if compute.gradient_checkpointing else _cast(shape, compute))
        for shape in trained
    ]
    scoring = [FROZEN * shape.parameters + max(cache, _pass(shape, compute, False)) for shape in [*trained, *frozen]]
    return max(training + scoring)


def _pass(shape: Shape, compute: Compute, training: bool) -> int:
    """Bytes of one forward pass: logits, a piece of them in float32 with two of its size, and what the way back needs."""
    numbers = compute.forward_tokens * shape.vocabulary
    logits = numbers * compute.dtype.itemsize * (2 if training else 1) + 3 * 4 * min(numbers, ROOM[compute.device.type])
    width = 36 if compute.dtype == torch.float32 else 26  # bytes: norms and products in one type, or norms in float32
    layer = compute.forward_tokens * (width * shape.width + 4 * compute.dtype.itemsize * shape.inner)
    if training and compute.gradient_checkpointing:
        return logits + layer + 4 * compute.forward_tokens * shape.width * shape.layers
    return logits + layer * (shape.layers if training else 1)
