"""Which charts the report shows, from the evidence: differences, training, reward and length, accuracy and KL."""

from typing import Any

from apprentice.sections import PPOConfig
from tasks.report_evidence import Evidence
from tasks.report_forest import Mean, cross_chart, forest_chart
from tasks.report_metrics import TRAINING, cell, clear_of_zero, headline, label, metric_of
from tasks.report_plots import Series, line_chart, scatter_chart, slope, span

COLORS = 8  # model colours that the style sheet has
MOST_DOTS = 300  # of one cloud: the first prompts in the order of the files

Figure = tuple[str, str, str]  # title, chart, caption


def color(evidence: Evidence, model: str) -> str:
    """The model's colour, the same in every chart."""
    models = list(evidence.report["models"])
    return f"var(--m{(models.index(model) if model in models else len(models)) % COLORS})"


def difference_figures(evidence: Evidence) -> list[Figure]:
    """A forest plot for each headline metric that has a better side; shares have one range in common."""
    rows = [one for one in evidence.report["differences"] if one["model"] != "base" and one["low"] is not None]
    keys = [key for key in headline(evidence.report) if metric_of(key).better]
    shares = [one for one in rows if metric_of(one["metric"]).unit == "%" and one["metric"] in keys]
    figures = []
    for key in keys:
        mine, share = [one for one in rows if one["metric"] == key], metric_of(key).unit == "%"
        named = {
            one: [_mean(evidence, row) for row in mine if row["baseline"] == one] for one in evidence.params.report.baselines
        }
        groups = {baseline: means for baseline, means in named.items() if means}
        if groups:
            better = "to the right is better" if metric_of(key).better > 0 else "to the left is better"
            unit = "points" if share else metric_of(key).unit
            chart = forest_chart(label(key), groups, _around_zero(shares if share else mine), 100 if share else 1)
            figures.append((label(key), chart, f"{unit}; {better}"))
    return figures


def _around_zero(rows: list[dict[str, Any]]) -> tuple[float, float]:
    return span([0.0, *(one[end] for one in rows for end in ("low", "high"))])


def _mean(evidence: Evidence, one: dict[str, Any]) -> Mean:
    text = cell(one["metric"], one, "+")
    shade = color(evidence, one["model"])
    return Mean(one["model"], shade, one["difference"], one["low"], one["high"], text, clear_of_zero(one))


def training_figures(evidence: Evidence) -> list[Figure]:
    """Curves of every training stage that left a history."""
    figures = [_training(evidence, *one) for one in evidence.form.curves]
    return [figure for figure in figures if figure]


def _training(evidence: Evidence, stage: str, title: str, columns: tuple[str, ...]) -> Figure | None:
    rows = evidence.histories[stage]
    shade = color(evidence, "base" if stage == "pretrain" else stage)
    few = len(columns) <= 2  # two columns share the model's colour, the second dashed; more have colours of their own
    series = [
        Series(
            name=name.replace("_", " "),
            color=shade if few else f"var(--m{place + 1})",
            points=[(row.get("coefficient", row.get("step", i)), row[name]) for i, row in enumerate(rows) if name in row],
            dashed=few and place > 0,
            band=[row["reward_std"] for row in rows if "reward_std" in row] if name == "reward" else [],
        )
        for place, name in enumerate(columns)
    ]
    if not any(one.points for one in series):
        return None
    drawn = [one for one in series if one.points]
    if any("coefficient" in row for row in rows):  # a sweep, no training
        return title, line_chart(title, series, "coefficient"), ""
    unit = "iteration" if isinstance(getattr(evidence.params, stage), PPOConfig) else "step"
    return title, line_chart(title, series, unit), _caption(drawn, columns[0])


def _caption(series: list[Series], column: str) -> str:
    """A legend for several lines; what it means for one line that is not plain."""
    if len(series) > 1:
        return " · ".join(f'<i class="{"dash" if one.dashed else ""}" style="--c:{one.color}"></i>{one.name}' for one in series)
    if series[0].band:
        return "band: one standard deviation over rollouts"
    return TRAINING.get(column, "") if column not in ("loss", "length") else ""


def length_figures(evidence: Evidence) -> list[Figure]:
    """Self-reward against length, a dot per held-out prompt, one cloud per model on the same axes."""
    clouds = {}
    for model, values in evidence.values.items():
        found = [
            (values["in_domain/length"][key], reward)
            for key, reward in values.get("in_domain/self_reward", {}).items()
            if key in values.get("in_domain/length", {})
        ]
        if len(found) > 1:
            clouds[model] = found[:MOST_DOTS]
    if not clouds:
        return []
    x, y = (span([point[i] for cloud in clouds.values() for point in cloud]) for i in (0, 1))
    figures = []
    for model, cloud in clouds.items():
        steepness = slope(cloud)
        caption = "one length only" if steepness is None else f"{steepness:+.3f} nats per token".replace("-", "−")
        drawn = scatter_chart(model, Series(model, color(evidence, model), cloud), x, y, ("tokens", "self-reward, nats"))
        figures.append((model, drawn, caption))
    return figures


def kl_figures(evidence: Evidence) -> list[Figure]:
    """What each model gained for how far it moved: accuracy (or self-reward) against KL to SFT."""
    figures = []
    for domain in ("in_domain", "out_of_domain"):
        for name in ("greedy_accuracy", "sampled_accuracy", "self_reward"):
            x_key, y_key = f"{domain}/kl_to_sft", f"{domain}/{name}"
            pairs = [
                (_point(evidence, model, x_key), _point(evidence, model, y_key))
                for model, values in evidence.report["models"].items()
                if all(key in values and values[key]["low"] is not None for key in (x_key, y_key))
            ]
            if pairs:
                chart = cross_chart(label(y_key), pairs, "KL to SFT, nats per response", metric_of(y_key).unit)
                figures.append((label(y_key), chart, ""))
    accuracies = [figure for figure in figures if "accuracy" in figure[0]]
    return accuracies or figures


def _point(evidence: Evidence, model: str, key: str) -> Mean:
    interval, share = evidence.report["models"][model][key], 100 if metric_of(key).unit == "%" else 1
    text = f"{label(key)} {cell(key, interval)}"
    ends = [interval[end] * share for end in ("mean", "low", "high")]
    return Mean(model, color(evidence, model), *ends, text)
