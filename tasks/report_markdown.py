"""The report as text: report.md, its comparison table, and what the numbers say in words."""

from collections.abc import Iterable
from typing import Any

from apprentice.demonstrations import prompt_text
from apprentice.sections import PPOConfig
from tasks.report_evidence import Evidence
from tasks.report_metrics import (
    ABOUT_DOMAINS,
    DOMAINS,
    METRICS,
    cell,
    clear_of_zero,
    headline,
    label,
    metric_of,
    place,
    short_label,
    verdict,
)

SHORT = "In and out: in-domain and out-of-domain; greedy and sampled: accuracy."
WARNING = (
    " **Warning, below one half: its self-reward prefers its own text to the demonstrations, so raising it cannot help.** "
    "To serve as reward target it needs gentler training (fewer epochs, a lower rate)."
)
LONGEST_SAMPLE = 600  # characters of a response shown


def document(evidence: Evidence) -> str:
    """The whole of report.md."""
    report = evidence.report
    parts = [
        f"# Apprentice: {evidence.form.heading} {report['seed']}\n\n{evidence.form.reading} {SHORT}",
        f"## Models\n\n{comparison_table(report)}",
        "## What the numbers say\n\n" + _bullets(findings(evidence)),
        f"## Differences\n\nBold: clear of zero.\n\n{difference_table(report)}",
        "## How training went\n\n" + _bullets(training_notes(evidence)),
        f"## Every metric\n\n{full_table(report)}",
        f"## Samples\n\n{_samples(evidence)}",
        f"## What the metrics mean\n\n{_glossary(report)}",
    ]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table."""
    rule = ["-" * max(3, len(name)) for name in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def comparison_table(report: dict[str, Any]) -> str:
    """Models by headline metrics: the first table of report.md, in columns, as the flow prints it at its end."""
    keys, labels = headline(report), report.get("labels")
    rows = [["model", *(["labels"] if labels else []), *map(short_label, keys)]]
    for name, values in report["models"].items():
        rows.append([name, *([labels[name]] if labels else []), *(_entry(key, values) for key in keys)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *rest = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return table(header, rest)


def _entry(key: str, values: dict[str, Any]) -> str:
    return cell(key, values[key]) if key in values else ""


def difference_table(report: dict[str, Any]) -> str:
    """Every model less each baseline in the headline metrics."""
    keys = headline(report)
    found = {(one["model"], one["baseline"], one["metric"]): one for one in report["differences"]}
    rows = []
    for model, baseline in dict.fromkeys(pair[:2] for pair in found):
        cells = [found.get((model, baseline, key)) for key in keys]
        rows.append([f"{model} - {baseline}", *(_difference(one) if one else "" for one in cells)])
    return table(["difference", *map(short_label, keys)], rows)


def _difference(one: dict[str, Any]) -> str:
    text = cell(one["metric"], one, "+")
    return f"**{text}**" if clear_of_zero(one) else text


def full_table(report: dict[str, Any]) -> str:
    """All metrics by all models."""
    models = report["models"]
    keys = dict.fromkeys(key for values in models.values() for key in values)
    return table(["metric", *models], ([f"`{key}`", *(_entry(key, models[name]) for name in models)] for key in keys))


def findings(evidence: Evidence) -> list[str]:
    """`comparisons` in words."""
    words = {"better": "better in", "worse": "**worse** in", "open": "not told apart in"}
    lines = []
    for model, baseline, sides in comparisons(evidence):
        said = "; ".join(f"{words[side]} {', '.join(map(' '.join, found))}" for side, found in sides.items() if found)
        lines.append(f"`{model}` against `{baseline}`: {said}.")
    return lines or ["Only base and baselines were evaluated: there is no method to judge."]


def comparisons(evidence: Evidence) -> list[tuple[str, str, dict[str, list[tuple[str, str]]]]]:
    """What each trained method adds to or takes from each baseline: model, baseline, verdict -> (metric, figures)."""
    baselines, report = evidence.params.report.baselines, evidence.report
    found: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    for one in report["differences"]:
        model, baseline, key = one["model"], one["baseline"], one["metric"]
        if model != "base" and model not in baselines and key in headline(report) and metric_of(key).better:
            sides = found.setdefault((model, baseline), {"better": [], "worse": [], "open": []})
            sides[verdict(one)].append((label(key), cell(key, one, "+")))
    return [(*pair, sides) for pair, sides in found.items()]


def training_notes(evidence: Evidence) -> list[str]:
    """The label-free gate, the KL stop and the figures of single stages, each in a line."""
    return [*_gates(evidence), *_kl_stops(evidence), *_told(evidence)]


def _gates(evidence: Evidence) -> list[str]:
    targets = {evidence.params.srppo.reward_target, evidence.params.pairs.reward_target}
    lines = []
    for stage, metrics in evidence.metrics.items():
        if gate := metrics.get("gate"):
            line = f"Gate of `{stage}`: held-out demonstrations beat its own samples in self-reward in "
            lines.append(f"{line}{cell('/self_reward_auc', gate)} % of pairs.")
            if gate["mean"] < 0.5:
                lines[-1] += WARNING if stage in targets else " Below one half it would be no good reward target."
    return lines


def _kl_stops(evidence: Evidence) -> list[str]:
    lines = []
    for stage, metrics in evidence.metrics.items():
        config = getattr(evidence.params, stage)
        if isinstance(config, PPOConfig) and metrics:
            limit = "no KL stop" if config.kl_stop is None else f"KL stop at {config.kl_stop:g}"
            how = "stopped by its KL" if metrics.get("stopped_by") == "kl_stop" else "ended"
            moved = f", {metrics['kl_to_anchor']:.2f} nats per response from its anchor" if "kl_to_anchor" in metrics else ""
            name = "SRPPO" if stage == "srppo" else f"`{stage}`"
            lines.append(f"{name} {how} after {metrics.get('iterations')} of {config.iterations} iterations{moved} ({limit}).")
    return lines


def _told(evidence: Evidence) -> list[str]:
    lines = []
    for stage, name in evidence.form.told.items():
        numbers = {key: value for key, value in evidence.metrics[stage].items() if isinstance(value, int | float)}
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
        if shown and not isinstance(getattr(evidence.params, stage), PPOConfig):
            lines.append(f"{name}: {shown}.")
    return lines


def chosen_samples(evidence: Evidence) -> dict[str, list[dict[str, dict[str, Any]]]]:
    """For each domain the first `report.samples` prompts that every model answered: model -> its row."""
    by_model = {name: {row["id"]: row for row in rows} for name, rows in evidence.samples.items()}
    chosen: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for row in next(iter(evidence.samples.values()), []):
        found = chosen.setdefault(row["domain"], [])
        if len(found) < evidence.params.report.samples and all(row["id"] in rows for rows in by_model.values()):
            found.append({name: rows[row["id"]] for name, rows in by_model.items()})
    return {domain: chosen[domain] for domain in sorted(chosen, key=place) if chosen[domain]}


def _samples(evidence: Evidence) -> str:
    parts = [
        "The first prompts of each domain, not picked. Greedy: the likeliest token each time; drawn: one sample at "
        f"temperature {evidence.params.evaluate.temperature:g}. From `data/reports/evaluate/<model>/samples.jsonl`."
    ]
    for domain, prompts in chosen_samples(evidence).items():
        for by_model in prompts:
            first = next(iter(by_model.values()))
            answer = f", answer {_inline(str(first['answer']))}" if first.get("answer") is not None else ""
            rows = [
                [name, mark(row["greedy_correct"]), _inline(row["greedy"]), _inline(row["sample"])]
                for name, row in by_model.items()
            ]
            parts.append(
                f"### {DOMAINS.get(domain, domain)}, `{first['id']}`\n\n> {_inline(prompt_text(first['prompt']))}{answer}"
            )
            parts.append(table(["model", "right", "greedy", "drawn"], rows))
    return "\n\n".join(parts)


def mark(correct: bool | None) -> str:
    """Right, wrong, or no verifier to say."""
    return "" if correct is None else "yes" if correct else "no"


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} …"


def _inline(text: str) -> str:
    """Text of a model inside a table cell: escaped, on one line, not endless."""
    escaped = shortened(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
    return "<br>".join(escaped.splitlines())


def _glossary(report: dict[str, Any]) -> str:
    metrics = [[f"`{key}`", metric.unit, metric.about] for key, metric in METRICS.items()]
    present = {key.split("/")[0] for values in report["models"].values() for key in values}
    domains = [[f"`{key}`", about] for key, about in ABOUT_DOMAINS.items() if key in present]
    return table(["metric", "unit", "meaning"], metrics) + "\n\n" + table(["domain", "prompts"], domains)


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
