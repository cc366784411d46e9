"""Signs that a training goes wrong though every number is finite, read from its rows: each with cause and remedy."""

from collections.abc import Mapping, Sequence

from apprentice.recorder import Row
from apprentice.sections import PPOConfig

FAR_NATS = 10.0  # per response: text that one model finds e^10 times likelier than the other does
CUT_SHARE = 0.5  # of responses without an end token


def signs(figures: Mapping[str, float], before: Sequence[Row], config: PPOConfig) -> list[str]:
    """What goes wrong in an iteration and went wrong in none `before`; rows of skipped iterations tell nothing."""
    known = [{name: value or 0.0 for name, value in past.items()} for past in before if past["reward"] is not None]
    start = [*known, figures][0]
    told = {name for past in known for name in _found(past, start, config)}
    return [text for name, text in _found(figures, start, config).items() if name not in told]


def displaced(figures: Mapping[str, float], before: Sequence[Row]) -> str | None:
    """Off-policy, where no KL is measured: that the text learnt from lost far more likelihood than in any row `before`."""
    if not _far(figures) or any(map(_far, before)):
        return None
    return (
        f"the responses learnt from lost {figures['displacement']:.3g} nats each against the reference: the policy runs away "
        "from them to text that nobody rated. Lower learning_rate or epochs, or hold it closer: a higher gamma or beta"
    )


def _far(figures: Mapping[str, float | None]) -> bool:
    return (figures.get("displacement") or 0.0) > FAR_NATS


def _found(figures: Mapping[str, float], start: Mapping[str, float], config: PPOConfig) -> dict[str, str]:
    found = {}
    if figures["reward_std"] < config.reward_std_floor:
        found["flat reward"] = (
            f"reward std {figures['reward_std']:.2g} is below reward_std_floor {config.reward_std_floor:g}: the reward hardly "
            "tells responses apart; advantages stay unwhitened. Look at the models or the verifier behind the reward"
        )
    if figures["kl_to_anchor"] > FAR_NATS:
        found["far"] = (
            f"{figures['kl_to_anchor']:.3g} nats per response from the KL anchor {config.kl_anchor!r}, and kl_stop is "
            f"{config.kl_stop}: the policy runs away from it. Set kl_stop, raise kl_coef or lower learning_rate"
        )
    if not figures["eos_rate"]:
        found["cut off"] = (
            f"no response ended within {config.max_new_tokens} tokens, so each earns missing_eos_reward "
            f"{config.missing_eos_reward:g}; raise max_new_tokens"
        )
    elif figures["eos_rate"] < min(1 - CUT_SHARE, start["eos_rate"]):
        found["long"] = (
            f"{figures['eos_rate']:.0%} of responses end within {config.max_new_tokens} tokens, {start['eos_rate']:.0%} did at "
            f"first; mean length {figures['length']:.3g}, {start['length']:.3g} at first, reward per further token "
            f"{figures['reward_length_slope']:+.2g}: they run away in length. Raise kl_coef or lower missing_eos_reward"
        )
    return found
