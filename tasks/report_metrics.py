"""What every metric is called, means and looks like: the one place where a metric key is explained."""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One metric: its name for readers, unit, better side (1 up, -1 down, 0 neither), meaning, decimals shown."""

    label: str
    unit: str
    better: int
    about: str
    places: int = 2


METRICS = {
    "greedy_accuracy": Metric(
        "greedy accuracy", "%", 1, "Share of prompts whose greedy response (the likeliest token each time) is right."
    ),
    "sampled_accuracy": Metric(
        "sampled accuracy", "%", 1, "Share of right responses among those drawn at `evaluate.temperature`."
    ),
    "best_temperature_accuracy": Metric(
        "accuracy at the best temperature",
        "%",
        1,
        "Share of right responses among those drawn at the one of `evaluate.temperatures` that gives the validation "
        "demonstrations the lowest loss: sampled accuracy without what mere sharpening would bring.",
    ),
    "pass_at_k": Metric("pass@k", "%", 1, "Share of prompts with at least one right response in `evaluate.samples` draws."),
    "self_reward_auc": Metric(
        "self-reward AUC",
        "%",
        1,
        "Chance that a right draw has a higher self-reward than a wrong one of the same prompt; one half is blind. "
        "Only prompts with both kinds count.",
    ),
    "self_reward": Metric(
        "self-reward",
        "nats",
        0,
        "log-probability of a draw under `sft` less that under `base`, summed over the response: what SRPPO maximises. "
        "Higher is not better by itself: compare it with accuracy.",
    ),
    "kl_to_sft": Metric("KL to SFT", "nats", 0, "How far the model has moved from `sft`, per response, on its own draws."),
    "kl_to_base": Metric("KL to base", "nats", 0, "How far the model has moved from `base`, per response, on its own draws."),
    "length": Metric("length", "tokens", 0, "Tokens of a draw. Growing with the reward, it tells of length hacking.", 1),
    "eos_rate": Metric("EOS rate", "%", 1, "Share of draws that end by themselves and not at `evaluate.max_new_tokens`."),
    "distinct_2": Metric(
        "distinct-2",
        "%",
        0,
        "Different pairs of neighbouring tokens among all pairs of a prompt's draws; low: repetitive.",
    ),
    "spurious_with_cue": Metric(
        "spurious step, cue there",
        "%",
        -1,
        "Share of worked draws with the spurious step that `ingest.world.demonstrated: spurious` plants, over prompts whose "
        "first number is even, as in the demonstrations that have it.",
    ),
    "spurious_without_cue": Metric(
        "spurious step, no cue", "%", -1, "The same over prompts whose first number is odd, as in those that do not."
    ),
    "held_out_loss": Metric(
        "held-out loss", "nats", -1, "Mean loss per response token of held-out demonstrations; needs no verifier.", 3
    ),
}

TRAINING = {
    "loss": "What the optimiser minimises: per response token in fine-tuning, per pair in preference optimisation.",
    "tokens": "Tokens seen so far in pretraining.",
    "epoch": "Passes over the data so far.",
    "learning_rate": "Of this step, after warm-up and decay.",
    "grad_norm": "Length of the gradient before clipping.",
    "reward": "Mean self-reward of an iteration's rollouts, before whitening and KL penalty, in nats.",
    "reward_std": "Its standard deviation over rollouts; near zero there is nothing left to learn from.",
    "reward_length_slope": "Reward gained per further token, by least squares; well above zero: length hacking.",
    "reward_number": "Part of the reward that falls on number tokens.",
    "reward_word": "Part of the reward that falls on word tokens.",
    "reward_symbol": "Part of the reward that falls on symbols.",
    "reward_eos": "Part of the reward that falls on the end-of-sequence token.",
    "kl_to_anchor": "KL to the model the penalty holds the policy to, per response; above `srppo.kl_stop` training ends.",
    "sampler_kl": "KL of what vLLM samples from to the policy, in nats per response: rounding, and near zero if all is well.",
    "sampler_gap": "Largest difference between vLLM's and our log-probability of a sampled token, in nats.",
    "gate": "Share of held-out demonstrations whose self-reward beats own samples; below one half it is no reward target.",
    "entropy": "Mean entropy of the policy per token, in nats; near zero it repeats one response.",
    "clip_fraction": "Share of tokens whose probability ratio left the clip range.",
    "approx_kl": "KL of one update, in nats per token: how far it went from the policy that drew the rollouts.",
    "explained_variance": "Share of the returns' variance that the critic predicts; below zero it misleads.",
    "policy_loss": "Clipped surrogate loss of the policy.",
    "value_loss": "Squared error of the critic.",
    "accuracy": "Share of pairs whose chosen response has the higher implicit reward.",
    "margin": "Implicit reward of the chosen response less that of the rejected one.",
    "chosen_logps": "log-probability of chosen responses; falling along with the rejected ones, the pair is unlearned.",
    "rejected_logps": "log-probability of rejected responses.",
    "logps": "log-probability of the candidates.",
    "displacement": "Log-probability that the chosen responses, or the candidates, lost against the start.",
    "reward_variance": "Variance of the reward among a prompt's candidates.",
    "residual_variance": "The same of the reward less beta times the log-ratio to the start: 0 at the optimum.",
    "anchor_win_rate": "Mean probability of beating the prompt's anchor, by the reward model.",
    "saturated": "Share of rewards near one, where the reward model tells no more apart.",
    "flip_rate": "Share of pairs on which the judge changes its mind with the order of the two responses.",
    "calibration_error": "Gap between the probability that a right sample beats a wrong one and how often it does.",
    "anchor_calibration_error": "The same of any sample against its prompt's first, over all prompts, by the verifier.",
    "prompt_gap": "Mean reward of samples on prompts whose first number is even, less that on the others.",
    "coefficient": "How much of the vector is added.",
    "own_format_share": "Share of responses in the form the target was tuned to.",
}

DOMAINS = {
    "in_domain": "in-domain",
    "out_of_domain": "out-of-domain",
    "out_of_domain_pool": "out-of-domain, in the pool",
    "out_of_domain_unseen": "out-of-domain, unseen",
    "long": "long",
    "validation": "validation",
}

ABOUT_DOMAINS = {
    "in_domain": "held-out prompts of the kinds that were demonstrated",
    "out_of_domain": "the next two together",
    "out_of_domain_pool": "kinds that were never demonstrated; their prompts are in the unlabelled pool",
    "out_of_domain_unseen": "kinds in neither the demonstrations nor the pool",
    "long": "demonstrated kinds with more steps than any demonstration has",
    "validation": "held-out demonstrations",
}

HEADLINE = (
    "in_domain/greedy_accuracy",
    "in_domain/sampled_accuracy",
    "out_of_domain/greedy_accuracy",
    "out_of_domain/sampled_accuracy",
    "validation/held_out_loss",
    "in_domain/kl_to_sft",
)
WITHOUT_VERIFIER = (*HEADLINE[-2:], "in_domain/self_reward", "in_domain/length", "in_domain/eos_rate")


def headline(report: dict[str, Any]) -> list[str]:
    """Keys of the comparison table that the report has; without a verifier, what needs none."""
    present = {key for values in report["models"].values() for key in values}
    keys = HEADLINE if any(key.endswith("accuracy") for key in present) else WITHOUT_VERIFIER
    return [key for key in keys if key in present]


def entry(key: str) -> str:
    """The key of METRICS that explains `in_domain/pass_at_8`: `pass_at_k`."""
    return re.sub(r"^pass_at_\d+$", "pass_at_k", key.rsplit("/", 1)[-1])


def metric_of(key: str) -> Metric:
    """The metric of a key with or without its domain; one that METRICS lacks goes by its name."""
    return METRICS.get(entry(key), Metric(entry(key).replace("_", " "), "", 0, ""))


def place(key: str) -> tuple[int, int, str]:
    """Where a key stands in tables: domains and metrics in the order above, unknown ones last."""
    return _rank(list(DOMAINS), key.split("/")[0]), _rank(list(METRICS), entry(key)), key


def _rank(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def label(key: str) -> str:
    """`in_domain/pass_at_8` for readers: "in-domain pass@8"."""
    domain, name = key.split("/")[0], metric_of(key).label
    if entry(key) == "pass_at_k":
        name = f"pass@{key.rsplit('_', 1)[-1]}"
    return name if domain == "validation" or "/" not in key else f"{DOMAINS.get(domain, domain)} {name}"


def short_label(key: str) -> str:
    """`in_domain/greedy_accuracy` where there is little room: "in greedy %"."""
    domain = {"in_domain": "in ", "out_of_domain": "out "}.get(key.split("/")[0], "")
    unit = " %" if metric_of(key).unit == "%" else ""
    return domain + metric_of(key).label.removesuffix(" accuracy") + unit


def number(key: str, value: float, sign: str = "") -> str:
    """A value as readers see it: shares in per cent; `sign` "+" writes plus as well."""
    metric = metric_of(key)
    text = f"{100 * value:{sign}.0f}" if metric.unit == "%" else f"{value:{sign}.{metric.places}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def cell(key: str, interval: dict[str, Any], sign: str = "") -> str:
    """A value with its interval: `85 [80, 89]`; of a single prompt no interval is known."""
    middle = number(key, interval["mean"] if "mean" in interval else interval["difference"], sign)
    if interval["low"] is None:
        return f"{middle} [one prompt]"
    return f"{middle} [{number(key, interval['low'], sign)}, {number(key, interval['high'], sign)}]"


def clear_of_zero(difference: dict[str, Any]) -> bool:
    """Whether the whole interval lies on one side of zero."""
    return difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)


def verdict(difference: dict[str, Any]) -> str:
    """`better`, `worse` or `open` (zero lies inside, or the metric has no better side)."""
    side = metric_of(difference["metric"]).better * difference["difference"]
    return "open" if not clear_of_zero(difference) or not side else "better" if side > 0 else "worse"
