"""The report as one page that opens anywhere, offline: report.html."""

from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from typing import Any

from apprentice.demonstrations import prompt_text
from tasks.report_evidence import Evidence
from tasks.report_figures import (
    MOST_DOTS,
    Figure,
    color,
    difference_figures,
    kl_figures,
    length_figures,
    training_figures,
)
from tasks.report_markdown import chosen_samples, comparisons, shortened, training_notes
from tasks.report_metrics import ABOUT_DOMAINS, DOMAINS, METRICS, cell, headline, label, metric_of, number
from tasks.report_style import CSS

WORDS = {"better": "Better in", "worse": "Worse in", "open": "Not told apart in"}


def page(evidence: Evidence) -> str:
    """The whole of report.html."""
    parts = [
        ("models", "Models", evidence.form.reading, _comparison(evidence)),
        ("findings", "What the numbers say", "Differences of accuracies are in points.", _findings(evidence)),
        (
            "differences",
            "Differences",
            "Paired over the same prompts, with 95% intervals. A hollow dot: zero lies inside.",
            _figures(difference_figures(evidence), "wide"),
        ),
        ("training", "Training", "", _notes(evidence) + _figures(training_figures(evidence))),
        (
            "length",
            "Reward against length",
            f"One dot per held-out in-domain prompt (at most {MOST_DOTS}), mean of its draws. A reward that rises with length "
            "where accuracy does not is length hacking.",
            _figures(length_figures(evidence), "narrow"),
        ),
        (
            "kl",
            "Gain against KL",
            "What each model gained for how far it moved from the SFT model.",
            _figures(kl_figures(evidence), "wide"),
        ),
        ("samples", "Samples side by side", "The first prompts of each domain, not picked.", _samples(evidence)),
        ("metrics", "Every metric", "", _every_metric(evidence.report) + _glossary(evidence.report)),
    ]
    shown = [part for part in parts if part[3]]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{title}</h2><p class="note">{escape(note)}</p>{content}</section>'
        for anchor, title, note, content in shown
    )
    return _frame(evidence, links, body)


def _frame(evidence: Evidence, links: str, body: str) -> str:
    form, seed, models = evidence.form, evidence.report["seed"], evidence.report["models"]
    names = ", ".join(escape(name) for name in models)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Apprentice: {form.heading} {seed}</title><style>{CSS}{form.style}</style></head>\n<body><main>"
        f'<header><p class="over">Apprentice · seed {seed}</p><h1>{form.title}</h1>'
        f'<p class="lead">{len(models)} models on the same held-out prompts: {names}.</p><nav>{links}</nav></header>\n'
        f"{body}\n{_params(evidence)}"
        "<footer>Made from the files under <code>data/reports</code>; equal inputs give this very file.</footer>"
        "</main></body></html>\n"
    )


def _comparison(evidence: Evidence) -> str:
    models, keys, labels = evidence.report["models"], headline(evidence.report), evidence.report.get("labels")
    head = ("<th>labels</th>" if labels else "") + "".join(f"<th>{_header(key)}</th>" for key in keys)
    rows = "".join(
        f'<tr style="--c:{color(evidence, name)}"><td class="model">{escape(name)}</td>'
        + (f"<td>{escape(labels[name])}</td>" if labels else "")
        + "".join(f"<td>{_cell(key, values, _top(models, key))}</td>" for key in keys)
        + "</tr>"
        for name, values in models.items()
    )
    return f'<div class="scroll"><table class="big"><tr><th>model</th>{head}</tr>{rows}</table></div>'


def _header(key: str) -> str:
    return f"{escape(label(key))}, {escape(metric_of(key).unit)}"


def _top(models: dict[str, Any], key: str) -> float:
    """Where the small bars end: 1 for shares, else the largest value of any model."""
    if metric_of(key).unit == "%":
        return 1.0
    return max((values[key]["high"] or values[key]["mean"] for values in models.values() if key in values), default=1.0)


def _cell(key: str, values: dict[str, Any], top: float) -> str:
    if key not in values:
        return ""
    one = values[key]
    low, high = (one["mean"] if one[end] is None else one[end] for end in ("low", "high"))
    x, width, middle = (max(0.0, min(120.0, 120 * value / top)) for value in (low, high - low, one["mean"]))
    ends = cell(key, one).split(" ", 1)[1].strip("[]").replace(", ", " to ")
    return (
        f'<span class="value">{number(key, one["mean"])}</span><span class="ends">{ends}</span>'
        f'<svg class="track" viewBox="0 0 120 5" aria-hidden="true"><rect class="range" x="{x:.1f}" width="{width:.1f}" '
        f'height="5" rx="2"/><rect x="{max(0.0, middle - 1.5):.1f}" width="3" height="5" rx="1"/></svg>'
    )


def _findings(evidence: Evidence) -> str:
    cards = []
    for model, baseline, sides in comparisons(evidence):
        lines = "".join(
            f'<p class="{side}">{WORDS[side]}</p>{"".join(_figure_line(*one) for one in found)}'
            for side, found in sides.items()
            if found
        )
        title = f"<b>{escape(model)}</b> against <b>{escape(baseline)}</b>"
        cards.append(f'<li style="--c:{color(evidence, model)}">{title}{lines}</li>')
    return f'<ul class="findings">{"".join(cards)}</ul>' if cards else ""


def _figure_line(metric: str, figures: str) -> str:
    middle, ends = figures.split(" ", 1)
    return f"<div><span>{escape(metric)}</span><b>{escape(middle)}</b><small>{escape(ends)}</small></div>"


def _notes(evidence: Evidence) -> str:
    notes = training_notes(evidence)
    lines = "".join(f'<li class="{"warning" if "**" in note else ""}">{_plain(note)}</li>' for note in notes)
    return f'<ul class="notes">{lines}</ul>' if notes else ""


def _plain(markdown: str) -> str:
    return escape(markdown.replace("**", "").replace("`", ""))


def _figures(figures: Iterable[Figure], kind: str = "") -> str:
    drawn = "".join(
        f"<figure><h3>{escape(title)}</h3>{caption and f'<figcaption>{caption}</figcaption>'}{chart}</figure>"
        for title, chart, caption in figures
    )
    return f'<div class="grid {kind}">{drawn}</div>' if drawn else ""


def _samples(evidence: Evidence) -> str:
    parts = []
    for domain, prompts in chosen_samples(evidence).items():
        for by_model in prompts:
            first = next(iter(by_model.values()))
            answer = f" · answer {escape(str(first['answer']))}" if first.get("answer") is not None else ""
            place = f"{escape(DOMAINS.get(domain, domain))} · <code>{escape(first['id'])}</code>{answer}"
            answers = "".join(_answer(evidence, model, row) for model, row in by_model.items())
            parts.append(
                f'<div class="prompt"><p class="id">{place}</p><p>{escape(prompt_text(first["prompt"]))}</p>'
                f'<div class="answers">{answers}</div></div>'
            )
    return "".join(parts)


def _answer(evidence: Evidence, model: str, row: dict[str, Any]) -> str:
    marks = {True: '<span class="right">✓ right</span>', False: '<span class="wrong">✗ wrong</span>', None: ""}
    return (
        f'<div><h4 class="model" style="--c:{color(evidence, model)}">{escape(model)}{marks[row["greedy_correct"]]}</h4>'
        f"<pre>{escape(shortened(row['greedy']))}</pre>"
        f'<pre class="drawn"><small>drawn</small>\n{escape(shortened(row["sample"]))}</pre></div>'
    )


def _every_metric(report: dict[str, Any]) -> str:
    models = report["models"]
    keys = dict.fromkeys(key for values in models.values() for key in values)
    head = "".join(f"<th>{escape(name)}</th>" for name in models)
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td>{cell(key, values[key]) if key in values else ''}</td>" for values in models.values())
        + "</tr>"
        for key in keys
    )
    return f'<div class="scroll"><table class="small"><tr><th>metric</th>{head}</tr>{rows}</table></div>'


def _glossary(report: dict[str, Any]) -> str:
    present = {key.split("/")[0] for values in report["models"].values() for key in values}
    entries = [(key, metric.about) for key, metric in METRICS.items()]
    entries += [(key, about) for key, about in ABOUT_DOMAINS.items() if key in present]
    rows = "".join(f"<tr><td><code>{key}</code></td><td>{escape(about)}</td></tr>" for key, about in entries)
    return f'<details><summary>What they mean</summary><table class="small wrap">{rows}</table></details>'


def _params(evidence: Evidence) -> str:
    import yaml

    params = asdict(evidence.params)
    text = yaml.safe_dump({name: params[name] for name in evidence.form.sections}, sort_keys=False, allow_unicode=True)
    return f"<details><summary>Params</summary><pre>{escape(text)}</pre></details>"
