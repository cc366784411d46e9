"""Which models a stage trains, which it has frozen beside them, and whether it samples: its room follows from that."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from apprentice.footprint import Shape


class Needs(NamedTuple):
    """Names of models of the pipeline, the frozen ones each once; samples: whether one of them is sampled from."""

    trained: list[str]
    frozen: list[str]
    samples: bool


def fine_tuned(config: Any, init: str) -> Needs:
    """Of fine-tuning from `init`; a section with gate prompts measures the gate."""
    gated = bool(getattr(config, "gate_prompts", 0))
    return Needs([init], ["base"] if gated else [], gated)


def by_ppo(config: Any, roles: Sequence[str]) -> Needs:
    """Of PPO with a reward by models of these names."""
    critic = [config.critic_init] if config.critic == "separate" else []
    frozen = dict.fromkeys(("sft", "base", *roles, config.kl_anchor, *critic))
    return Needs([config.init, *critic], list(frozen), True)


def paired(config: Any) -> Needs:
    """Of candidates and their self-reward."""
    return Needs([], list(dict.fromkeys(("sft", config.reward_target, config.reward_baseline))), True)


PREFERRED = Needs(["sft"], ["sft"], False)  # of preference optimisation: the policy, and the reference it begins as


def measured_beside(parts: Sequence[str]) -> Needs:
    """Of the evaluation of a model that is loaded from these."""
    return Needs([], list(dict.fromkeys((*parts, "sft", "base"))), True)


def on_trunks(
    trained: Sequence[str],
    frozen: Sequence[str],
    trunk_of: Callable[[str], str],
    whole: "Callable[[str], Shape]",
    adapter: "Callable[[str], Shape]",
) -> "tuple[list[Shape], list[Shape]]":
    """Shapes of what is trained and of what is frozen where only adapters are trained: each trunk once, and the adapters.

    `trunk_of` names the model that one stands on, itself where it is no adapter; `whole` and `adapter` give the shapes of a
    trunk and of an adapter on it.
    """
    trunks = {name: trunk_of(name) for name in [*trained, *frozen]}
    below = [whole(trunk) for trunk in dict.fromkeys(trunks.values())]
    held = [adapter(trunks[name]) for name in dict.fromkeys(frozen) if trunks[name] != name]
    return [adapter(trunks[name]) for name in trained], [*below, *held]
