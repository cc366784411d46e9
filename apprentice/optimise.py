"""One optimiser step: AdamW under a schedule, gradients clipped by norm."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from apprentice.sharding import spread
from apprentice.team import ALONE, Team

Schedule = Callable[[int], float]


def linear_decay(total: int, warmup_share: float, floor: float = 0.1) -> Schedule:
    """Factor of the learning rate at a step: up over the first `warmup_share` of `total`, then linearly down to `floor`."""
    warmup = max(1.0, warmup_share * total)
    return lambda step: min(1.0, (step + 1) / warmup) * max(floor, 1 - step / total)


def flat_then_decay(total: int, warmup_steps: int, flat_share: float = 0.4, floor: float = 0.03) -> Schedule:
    """Warm up, hold until `flat_share` of the steps, then fall linearly towards zero, not below `floor`."""

    def factor(step: int) -> float:
        progress = step / total
        decay = 1.0 if progress < flat_share else max(floor, (1 - progress) / (1 - flat_share))
        return min(1.0, (step + 1) / max(1, warmup_steps)) * decay

    return factor


def constant(step: int) -> float:
    """No schedule."""
    return 1.0


class Optimiser:
    """AdamW (betas .9, .95) with a schedule and gradient clipping; its state can be saved and put back."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        max_grad_norm: float,
        schedule: Schedule = constant,
        weight_decay: float = 0.0,
        team: Team = ALONE,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.learning_rate, self.max_grad_norm, self.schedule, self.team = learning_rate, max_grad_norm, schedule, team
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        self.steps = 0

    def clip(self) -> float:
        """Add up the team's gradients, but sharded ones, which are sums, and clip them; returns the norm of all before: not
        finite when one of them is not."""
        self.team.add_gradients([parameter for parameter in self.parameters if not isinstance(parameter, DTensor)])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.learning_rate * self.schedule(self.steps)

    def step(self) -> None:
        """Step on the gradients gathered and clipped, and clear them."""
        for group in self.adamw.param_groups:
            group["lr"] = self.rate
        self.adamw.step()
        self.steps += 1
        self.drop()

    def drop(self) -> None:
        """Clear the gradients: moments, schedule and parameters stay as if there had been none."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        moments = {str(i): values for i, values in self.adamw.state_dict()["state"].items()}
        return {"steps": self.steps, "moments": moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a saved state back, its tensors whole: each process takes its part where the parameters are sharded."""
        self.steps = state["steps"]
        whole = self.adamw.state_dict()
        whole["state"] = {
            int(i): {name: spread(value, self.parameters[int(i)]) if value.dim() else value for name, value in values.items()}
            for i, values in state["moments"].items()
        }
        self.adamw.load_state_dict(whole)
