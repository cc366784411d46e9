"""The claims of study/claims.yaml put to the figures: effect, interval over seeds, verdict; study/claims.json and claims.md.

A claim's effect is computed for each seed and its interval is Student's t over the seeds, so the seed is the unit: base, data
and sampling all vary with it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.intervals import t_interval
from tasks.report_markdown import table
from tasks.report_metrics import metric_of
from tasks.study_figures import Figures
from tasks.study_plan import Claim, Study, split

HOLDS, FAILS, OPEN = "holds", "does not hold", "not settled"
PLACES = 6  # decimals of what is published; verdicts go by these
TITLES = {
    "2510.21090": "Self-Rewarding PPO",
    "2309.06657": "Statistical rejection sampling (RSO)",
    "2406.14532": "Per-step negatives",
    "2504.04950": "Pairwise-RL",
    "2509.01363": "Reasoning vectors",
    "2309.11235": "C-RLFT (OpenChat)",
    "2406.19185": "Contrastive policy gradient (CoPG)",
}


def judge(claim: Claim, study: Study, figures: Figures, seeds: int) -> dict[str, Any]:
    """One entry of claims.json: the claim, its effect over the seeds that its runs take, and the verdict."""
    taken = list(min((study.runs[split(name)[0]].seeds_of(seeds) for name in claim.effect), key=len))
    missing = sorted({gap for seed in taken for gap in _gaps(claim, figures, seed)})
    by_seed = [] if missing else [effect_of(claim, figures, seed) for seed in taken]
    interval = t_interval(by_seed) if by_seed else {"mean": None, "low": None, "high": None}
    effect, low, high = (
        None if interval[end] is None else round(interval[end], PLACES) + 0.0 for end in ("mean", "low", "high")
    )
    found = {
        "paper": claim.paper,
        "claim": claim.claim,
        "published": claim.published,
        "metric": f"{_sum(claim.metric)} of {_sum(claim.effect)}",
        "effect": effect,
        "low": low,
        "high": high,
        "verdict": verdict(claim, low, high),
        "seeds": taken,
        "command": command(seeds),
        "test": f"{claim.test} {claim.margin:g}",
        "by_seed": [round(value, PLACES) + 0.0 for value in by_seed],
        "post_hoc": claim.post_hoc,
    }
    gap = f"no figures: {', '.join(missing)}" if missing else "an interval takes two seeds" if len(taken) < 2 else ""
    if notes := list(filter(None, (gap, claim.note))):
        found["note"] = "; ".join(notes)
    return found


def _sum(factors: Mapping[str, float]) -> str:
    """A sum as a reader writes it: {"a": 1, "b": -0.5} is `a - 0.5 b`."""
    words = [
        f"{'-' if factor < 0 else '+'} {'' if abs(factor) == 1 else f'{abs(factor):g} '}{name}"
        for name, factor in factors.items()
    ]
    return " ".join(words).removeprefix("+ ")


def effect_of(claim: Claim, figures: Figures, seed: int) -> float:
    """Sum of factor x factor x figure over the claim's names and metrics, for one seed.

    Summed exactly and cut at nine decimals: what is equal on both sides is 0 and not a rounding error.
    """
    terms = []
    for name, sign in claim.effect.items():
        run, model = split(name)
        own = figures[run][str(seed)][model]
        terms += [sign * factor * own[metric] for metric, factor in claim.metric.items()]
    return round(math.fsum(terms), 9) + 0.0


def verdict(claim: Claim, low: float | None, high: float | None) -> str:
    """By the interval: `above m` and `within m` as claims.yaml says; without an interval nothing is settled."""
    if low is None or high is None:
        return OPEN
    if claim.test == "above":
        return HOLDS if low > claim.margin else FAILS if high <= claim.margin else OPEN
    if -claim.margin < low and high < claim.margin:
        return HOLDS
    return FAILS if low >= claim.margin or high <= -claim.margin else OPEN


def command(seeds: int) -> str:
    """What makes the figures again."""
    return f"python -m flows.study --seeds {seeds}"


def _gaps(claim: Claim, figures: Figures, seed: int) -> list[str]:
    """What the claim needs and the figures of a seed lack."""
    gaps = []
    for name in claim.effect:
        run, model = split(name)
        own = figures.get(run, {}).get(str(seed))
        if own is None:
            gaps.append(f"{run} of seed {seed}")
        else:
            absent = [metric for metric in claim.metric if metric not in own.get(model, {})]
            gaps += [f"{metric} of {name}, seed {seed}" for metric in absent]
    return gaps


def document(judged: Sequence[tuple[Claim, dict[str, Any]]], seeds: int, claims_at: str) -> str:
    """The whole of claims.md; `claims_at` says which claims.yaml was tested, and since when there is one."""
    counts = [f"{word} {sum(one['verdict'] == word for _, one in judged)}" for word in (HOLDS, FAILS, OPEN)]
    parts = [
        "# Claims of the papers, tested here",
        f"{len(judged)} claims: {', '.join(counts)}.",
        f"`{command(seeds)}`; claims, tests and runs were written down before the runs, in `study/claims.yaml` ({claims_at}), "
        "but for those marked *post hoc*, which were written down after their figures were seen. The published figures are on "
        "other tasks and models: only the direction is tested. Effects are in points, of rewards in nats, with 95% intervals, "
        "Student's t over seeds.",
    ]
    for paper in dict.fromkeys(claim.paper for claim, _ in judged):
        own = [(claim, one) for claim, one in judged if claim.paper == paper]
        rows = [[claim.claim, claim.published, effect_cell(claim, one), _verdict_cell(one)] for claim, one in own]
        parts.append(f"## {TITLES.get(paper, paper)} ({paper})")
        parts.append(table(["claim", "published", "effect", "verdict"], rows))
    return "\n\n".join(parts) + "\n"


def effect_cell(claim: Claim, one: Mapping[str, Any]) -> str:
    """An effect with its interval for readers, e.g. `+12.1 [+8.0, +16.2], 5 seeds`."""
    if one["effect"] is None:
        return ""
    units = set(map(unit_of, claim.metric))
    share, unit = units == {"%"}, f" {units.pop()}".rstrip() if len(units) == 1 else ""

    def number(value: float) -> str:
        text = f"{100 * value:+.1f}" if share else f"{value:+.3f}"
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")

    ends = "" if one["low"] is None else f" [{number(one['low'])}, {number(one['high'])}]"
    count = len(one["seeds"])
    return f"{number(one['effect'])}{ends}{'' if share else unit}, {count} seed{'s' * (count != 1)}"


def unit_of(metric: str) -> str:
    """The unit of a metric, `%` for a share: of an evaluation by METRICS, of a stage's own by its name."""
    if "/" in metric:
        return metric_of(metric).unit
    if metric.startswith("accuracy_at_") or metric.endswith(("accuracy", "_rate", "_error", "gate", "_share", "_advantage")):
        return "%"
    return "" if metric.endswith("prompt_gap") else "nats"  # a gap of rewards has the unit of the scores they learnt


def is_share(metric: str) -> bool:
    """Whether a metric is a share."""
    return unit_of(metric) == "%"


def _verdict_cell(one: Mapping[str, Any]) -> str:
    word = one["verdict"] if one["verdict"] == OPEN else f"**{one['verdict']}**"
    word += " (*post hoc*)" if one["post_hoc"] else ""
    return f"{word}: {one['note']}" if "note" in one else word
