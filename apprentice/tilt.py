"""Decoding from two models at once: token by token from target^(1 + w) baseline^(-w), normalised, without training.

The token-wise form of the tilt that Self-Rewarding PPO converges to (with w = 1 / beta); a control for what training adds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from apprentice.compute import CPU, Compute
from apprentice.demonstrations import atomic_write
from apprentice.layers import hold_as_cast
from apprentice.policy import freeze, load_policy

FILE = "tilt.json"  # in a model folder: the two models, relative to it, and the weight


class Tilt(nn.Module):
    """Two frozen models as one policy: logits are (1 + w) log target - w log baseline."""

    def __init__(self, target: PreTrainedModel, baseline: PreTrainedModel, weight: float) -> None:
        super().__init__()
        self.target, self.baseline, self.weight = freeze(target), freeze(baseline), weight
        self.config = target.config
        self.eval()

    def new_cache(self, make: Any) -> tuple[Any, Any]:
        """One cache for each model; `make` makes that of a model."""
        return make(self.target), make(self.baseline)

    def forward(self, past_key_values: tuple[Any, Any] = (None, None), **inputs: Any) -> SimpleNamespace:
        """The arguments of a causal language model; returns an object with `logits` [B, L, V]."""
        target, baseline = (
            model(**inputs, past_key_values=cache).logits.float().log_softmax(-1)
            for model, cache in zip((self.target, self.baseline), past_key_values, strict=True)
        )
        return SimpleNamespace(logits=(1 + self.weight) * target - self.weight * baseline)


def write_tilt(folder: Path, target: Path, baseline: Path, weight: float, hashes: Mapping[str, str]) -> None:
    """Write a model folder that names two others, siblings of it, with `hashes` of their weights, and the weight."""
    with atomic_write(folder / FILE) as file:
        json.dump({"target": target.name, "baseline": baseline.name, "weight": weight, "made_from": dict(hashes)}, file)


def read_tilt(folder: Path) -> dict[str, Any]:
    """What `write_tilt` wrote: target, baseline, weight, made_from."""
    said: dict[str, Any] = json.loads((folder / FILE).read_text())
    return said


def load_tilt(folder: Path, compute: Compute = CPU) -> Tilt:
    """Load both models and tilt them."""
    said = read_tilt(folder)
    target, baseline = (
        hold_as_cast(load_policy(folder.parent / said[name], compute), compute) for name in ("target", "baseline")
    )
    return Tilt(target, baseline, said["weight"])
