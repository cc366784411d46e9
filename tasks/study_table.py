"""The table of results in README.md, between two markers, made from study/figures.json."""

from collections.abc import Sequence
from pathlib import Path

from tasks.dvcstage import StageInfo
from tasks.intervals import Interval, t_interval
from tasks.lineage import labels_of, maker_of
from tasks.report_markdown import table
from tasks.report_metrics import number
from tasks.stage import ROOT
from tasks.study_claims import is_share
from tasks.study_figures import Figures
from tasks.study_plan import MAIN, StudyError, seeds_of

README = ROOT / "README.md"
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
COLUMNS = {  # metric: heading
    "in_domain/greedy_accuracy": "in greedy",
    "out_of_domain/greedy_accuracy": "out greedy",
    "in_domain/sampled_accuracy": "in sampled",
    "out_of_domain/sampled_accuracy": "out sampled",
    "in_domain/best_temperature_accuracy": "in best T",
    "out_of_domain/best_temperature_accuracy": "out best T",
    "validation/held_out_loss": "held-out loss",
    "in_domain/kl_to_sft": "KL to SFT",
}
READING = (
    "Means over {seeds} with 95% intervals (Student's t over seeds). In and out: in-domain and out-of-domain accuracy in per "
    "cent; greedy, sampled, and sampled at the temperature of lowest validation loss (best T). Loss and in-domain KL in nats. "
    "Learns from: what beside demonstrations."
)


def learned_from(models: Sequence[str], stages: Sequence[StageInfo]) -> dict[str, str]:
    """What each model learned from beside demonstrations: none, verifier or preferences."""
    labels = labels_of(stages)
    return {model: labels[maker_of(model, stages).name] for model in models}


def over_seeds(figures: Figures, run: str, model: str, metric: str, seeds: int) -> Interval | None:
    """Mean and interval of a figure over the seeds that have it; shares end at 0 and 1."""
    values = [
        names[model][metric]
        for seed, names in figures.get(run, {}).items()
        if int(seed) in seeds_of(seeds) and metric in names.get(model, {})
    ]
    if not values:
        return None
    found = t_interval(values)
    if not is_share(metric):
        return found
    return {end: None if value is None else min(1.0, max(0.0, value)) for end, value in found.items()}


def results(figures: Figures, labels: dict[str, str], seeds: int) -> str:
    """The table with how to read it: every model of the main run, a row each, mean over seeds with its interval.

    Raises StudyError without figures of the main run.
    """
    count = sum(int(seed) in seeds_of(seeds) for seed in figures.get(MAIN, {}))
    if not count:
        raise StudyError("the table of results needs the main run, and study/figures.json has none of it")
    rows = []
    for model, label in labels.items():
        cells = [_cell(metric, over_seeds(figures, MAIN, model, metric, seeds)) for metric in COLUMNS]
        rows.append([f"`{model}`", label, *cells])
    reading = READING.format(seeds=f"{count} seed{'s' * (count != 1)}")
    return f"{reading}\n\n{table(['model', 'learns from', *COLUMNS.values()], rows)}"


def _cell(metric: str, interval: Interval | None) -> str:
    if interval is None or interval["mean"] is None:
        return ""
    middle = number(metric, interval["mean"])
    if interval["low"] is None or interval["high"] is None:
        return middle
    return f"{middle} [{number(metric, interval['low'])}, {number(metric, interval['high'])}]"


def put(text: str, content: str) -> str:
    """A text with what stands between the two markers replaced. Raises StudyError unless each stands there once, in order."""
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or begin > end:
        raise StudyError(
            f"README.md: expected the line {BEGIN} and below it the line {END}, once each; put them where the "
            "table of results belongs"
        )
    return f"{text[:begin]}{BEGIN}\n\n{content}\n\n{text[end:]}"


def renew_readme(content: str, path: Path = README) -> None:
    """Put the table into README.md."""
    path.write_text(put(path.read_text(encoding="utf-8"), content), encoding="utf-8")
