"""Steps of decoding, recorded once and played again: on a CUDA device as a graph, on a CPU, where they are small, as a trace.

Both do what the step itself does, to the bit, and spare what Python does between two products.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.decoding import Draws, Rows, advance
from apprentice.linear import FEWEST
from apprentice.logps import ROOM

TRACED = ("gemma2", "gemma3_text", "gpt2", "llama", "qwen2")  # types of models, tested; experts would not do
UNTRACED_STEPS = 32  # of a model, before it is worth a trace


def stepping(model: Any, rows: Rows, draws: Draws, compute: Compute) -> Callable[[], None]:
    """What makes one step of `rows` after the other, recorded where that pays."""
    if compute.device.type == "cuda" and not compute.sharding:
        return _Graph(model, rows, draws).step
    if compute.device.type == "cpu" and compute.dtype == torch.float32 and _can_be_traced(model):
        return _Trace(model, rows, draws).step
    return partial(advance, model, rows, draws)


class _Graph:
    """A CUDA graph of the step for the tensors that the rows have now; a new one once they have others."""

    def __init__(self, model: Any, rows: Rows, draws: Draws) -> None:
        self.advance = partial(advance, model, rows, draws)
        self.rows, self.places = rows, list[int]()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = False

    def step(self) -> None:
        """The first for some tensors is made as it is, and loads what the device has not met; then it is recorded."""
        places = [tensor.data_ptr() for tensor in self.rows.tensors]
        if places != self.places:
            self.places, self.graph = places, None
            self.advance()
        elif self.graph is None and not self.refused:
            self._record()
            self.step()
        elif self.graph is None:
            self.advance()
        else:
            self.graph.replay()

    def _record(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.advance()
                finally:
                    graph.capture_end()
            self.graph = graph
        except RuntimeError as error:
            self.refused = True
            warnings.warn(f"sampling goes on without a CUDA graph, which cannot be made of this model ({error})", stacklevel=2)


@dataclass
class _Known:
    """What was made of a model: its untraced steps, and its traces by how tokens are drawn, of weights at some places."""

    steps: int
    traces: dict[Draws, Any]
    places: list[int]


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def _can_be_traced(model: Any) -> bool:
    """Of a tested type, with positions that are turned alike at any length, and nobody looking on."""
    if not isinstance(model, PreTrainedModel) or model._forward_pre_hooks or model._forward_hooks:
        return False
    turned = str(getattr(model.config, "rope_parameters", None))
    return model.config.model_type in TRACED and not any(word in turned for word in ("dynamic", "longrope"))


class _Step(nn.Module):
    def __init__(self, model: Any, draws: Draws) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, *tensors: Tensor) -> Tensor:
        rows = Rows.of(tensors)
        advance(self.model, rows, self.draws)
        return rows.token


class _Trace:
    """A trace of a model's step, for any numbers of rows and slots, kept with the model: in one piece, its weights where they
    are. It is played as it is: to optimise it takes longer than it saves."""

    def __init__(self, model: Any, rows: Rows, draws: Draws) -> None:
        self.model, self.rows, self.draws = model, rows, draws
        places = [parameter.data_ptr() for parameter in model.parameters()]
        self.known = _KNOWN.setdefault(model, _Known(0, {}, places))
        if self.known.places != places:
            self.known = _KNOWN[model] = _Known(0, {}, places)

    def step(self) -> None:
        """One step, traced where the model is worth it and the products are small."""
        rows = len(self.rows.token)
        if not 1 < rows < FEWEST or rows * self.model.config.vocab_size > ROOM["cpu"]:
            advance(self.model, self.rows, self.draws)
        elif self.known.steps < UNTRACED_STEPS:
            self.known.steps += 1
            advance(self.model, self.rows, self.draws)
        else:
            if self.draws not in self.known.traces:
                self.known.traces[self.draws] = self._traced()
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                self.known.traces[self.draws](*self.rows.tensors)

    def _traced(self) -> Any:
        copies = tuple(tensor.clone() for tensor in self.rows.tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what depends on sizes is the same for all sizes met here
            made: Any = torch.jit.trace(_Step(self.model, self.draws), copies, check_trace=False)
            return torch.jit.freeze(made.eval(), optimize_numerics=False)
