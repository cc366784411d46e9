"""The plots of study/claims.yaml as SVG files that stand alone: no library, no clock, so equal figures give equal bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tasks.intervals import t_interval
from tasks.lineage import NO_LABELS
from tasks.report_metrics import label, metric_of
from tasks.report_plots import Frame, Point, number, span, ticks
from tasks.study_claims import is_share
from tasks.study_figures import Figures
from tasks.study_plan import Plot, seeds_of

WIDTH, HEIGHT, MARGIN = 860, 540, (72, 24, 50, 62)  # pixels; margin: top, right, bottom, left
LETTER, LINE = 6.6, 13.0  # size of a name, in pixels, to keep names apart
GROUPS = {
    NO_LABELS: "demonstrations alone",
    "verifier": "with the verifier",
    "preferences": "with preference labels",
    "qualities": "with quality labels",
}
NAMES = ("kl", "rso", "sft", "srppo")  # written in capitals
COLORS = 6
LOG_FROM = 8  # largest x over smallest from which the axis is logarithmic
STYLE = """
svg { background: #fff; font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
text { fill: #5d636e; } .title { fill: #1b1d22; font-size: 16px; font-weight: 600; } .name { fill: #1b1d22; font-size: 12px; }
.grid { stroke: #e5e5e0; } .lead { stroke: #8d939e; stroke-width: .7; }
.c0 { --c: #2f6fd0; } .c1 { --c: #dd5f27; } .c2 { --c: #8a4bc4; } .c3 { --c: #0f9488; } .c4 { --c: #c2356f; }
.c5 { --c: #8f7a12; }
.mean { fill: var(--c); } .seed { fill: var(--c); opacity: .35; }
.whisker { stroke: var(--c); stroke-width: 1.3; opacity: .45; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
@media (prefers-color-scheme: dark) {
  svg { background: #14161a; } text { fill: #a5abb6; } .title, .name { fill: #e8e9ec; } .grid { stroke: #2d3138; }
  .c0 { --c: #6ea3f5; } .c1 { --c: #ff9361; } .c2 { --c: #bd8bf0; } .c3 { --c: #45c4b5; } .c4 { --c: #f0709f; }
  .c5 { --c: #d3bb4a; }
}
"""


@dataclass(frozen=True)
class Mark:
    """The values of the seeds, in the units of the axis."""

    seeds: tuple[float, ...]

    @property
    def middle(self) -> float:
        """Their mean."""
        return math.fsum(self.seeds) / len(self.seeds)

    @property
    def ends(self) -> tuple[float, float]:
        """The 95% interval over seeds; the mean twice where there is none."""
        found = t_interval(self.seeds)
        low, high = found["low"], found["high"]
        return (self.middle, self.middle) if low is None or high is None else (low, high)


@dataclass(frozen=True)
class Spot:
    """A dot: its place on the x axis (a number, or a mark with an interval of its own) and its mark on the y axis."""

    x: Mark
    y: Mark
    name: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis: the range shown and the ticks, in the axis's own units; `log` when equal steps are equal ratios."""

    label: str
    ends: tuple[float, float]
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, to be scaled linearly."""
        return math.log10(value) if self.log else value


def draw(plot: Plot, figures: Figures, labels: dict[str, str], seeds: int) -> str | None:
    """One plot: every model of one run, or a line a model over several runs; None when there is nothing to draw.

    `labels` says what each model learned from; its keys are all models.
    """
    models = plot.models or tuple(labels)
    if isinstance(plot.x, str):
        groups = _groups(plot, plot.x, models, figures, labels, seeds)
    else:
        groups = _lines(plot, plot.x, models, figures, seeds)
    if not any(groups.values()):
        return None
    spots = [spot for group in groups.values() for spot in group]
    title, x_name = (_words(text) for text in (plot.name, plot.name.partition("_against_")[2]))
    x = _x_axis(_titled(plot.x) if isinstance(plot.x, str) else x_name, spots, isinstance(plot.x, str))
    y = _linear(
        _titled(plot.y[0]) if len(plot.y) == 1 else "%", [end for spot in spots for end in (*spot.y.ends, *spot.y.seeds)]
    )
    frame = Frame((x.at(x.ends[0]), x.at(x.ends[1])), y.ends, WIDTH, HEIGHT, MARGIN)
    body = [_axes(frame, x, y), _legend(list(groups))]
    for i, group in enumerate(groups.values()):
        inner = "".join(_spot(frame, x, spot) for spot in group)
        line = " ".join(frame.at((x.at(spot.x.middle), spot.y.middle)) for spot in group)
        joined = "" if isinstance(plot.x, str) else f'<polyline class="line" points="{line}"/>'
        body.append(f'<g class="c{i % COLORS}">{joined}{inner}</g>')
    body.append(_names(frame, x, [spot for spot in spots if spot.name]))
    left_out = [name for name in models if isinstance(plot.x, str) and name not in {spot.name for spot in spots}]
    return _document(title[0].upper() + title[1:], body, left_out)


def _groups(
    plot: Plot, x: str, models: Sequence[str], figures: Figures, labels: dict[str, str], seeds: int
) -> dict[str, list[Spot]]:
    """A spot a model, by what the model learned from."""
    found: dict[str, list[Spot]] = {group: [] for group in GROUPS}
    for model in models:
        marks = [_mark(figures, plot.runs[0], model, metric, seeds) for metric in (x, plot.y[0])]
        if marks[0] and marks[1]:
            found.setdefault(labels[model], []).append(Spot(marks[0], marks[1], model))
    return {GROUPS.get(group, f"with {group}"): spots for group, spots in found.items() if spots}


def _lines(plot: Plot, places: Sequence[float], models: Sequence[str], figures: Figures, seeds: int) -> dict[str, list[Spot]]:
    """A line for each model and metric over the runs."""
    found: dict[str, list[Spot]] = {}
    for model in models:
        for metric in plot.y:
            marks = [(x, _mark(figures, run, model, metric, seeds)) for x, run in zip(places, plot.runs, strict=True)]
            name = model if len(plot.y) == 1 else label(metric) if len(models) == 1 else f"{model}, {label(metric)}"
            found[name] = [Spot(Mark((x,)), mark) for x, mark in marks if mark]
    return found


def _mark(figures: Figures, run: str, model: str, metric: str, seeds: int) -> Mark | None:
    scale = 100 if is_share(metric) else 1
    by_seed = {int(seed): names.get(model, {}).get(metric) for seed, names in figures.get(run, {}).items()}
    values = [scale * value for seed, value in by_seed.items() if value is not None and seed in seeds_of(seeds)]
    return Mark(tuple(values)) if values else None


def _words(name: str) -> str:
    return " ".join(word.upper() if word in NAMES else word for word in name.split("_"))


def _titled(metric: str) -> str:
    unit = "%" if is_share(metric) else metric_of(metric).unit
    return f"{label(metric)}, {unit}" if unit and unit != metric else label(metric)


def _x_axis(title: str, spots: Sequence[Spot], free: bool) -> Axis:
    """Ticks where the runs stand; for a metric (`free`) round numbers. Logarithmic when the values lie far apart.

    It spans the means: a whisker that is longer ends at the frame.
    """
    places = sorted({spot.x.middle for spot in spots})
    log = places[0] > 0 and places[-1] / places[0] >= LOG_FROM
    if not log:
        axis = _linear(title, places)
        return axis if free else Axis(title, axis.ends, tuple(places))
    room = (places[-1] / places[0]) ** 0.06
    ends = (places[0] / room, places[-1] * room)
    powers = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    rounds = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return Axis(title, ends, tuple(value for value in rounds if ends[0] <= value <= ends[1]) if free else tuple(places), True)


def _linear(title: str, values: Sequence[float]) -> Axis:
    ends = span(values)
    return Axis(title, ends, tuple(ticks(ends)))


def _axes(frame: Frame, x: Axis, y: Axis) -> str:
    top, right, bottom, left = frame.margin
    floor, parts = frame.height - bottom, []
    for value in y.ticks:
        at = f"{frame.py(value):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{frame.width - right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 8}" y="{at}" dy=".32em" text-anchor="end">{number(value)}</text>')
    for value in x.ticks:
        at = f"{frame.px(x.at(value)):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{floor}" y2="{floor + 5}"/>')
        parts.append(f'<text x="{at}" y="{floor + 20}" text-anchor="middle">{_short(value)}</text>')
    middle = (left + frame.width - right) / 2
    parts.append(f'<text x="{middle:g}" y="{frame.height - 10}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text x="{left}" y="{top - 8}">{escape(y.label)}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    """A tick's number, thousands and millions by letter."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{number(value / size)}{letter}"
    return number(value)


def _spot(frame: Frame, x: Axis, spot: Spot) -> str:
    """A mean with its whiskers; without an interval of its own on the x axis, the seeds too."""
    px, py = f"{frame.px(x.at(spot.x.middle)):.1f}", f"{frame.py(spot.y.middle):.1f}"
    low, high = (f"{frame.py(end):.1f}" for end in spot.y.ends)
    parts = [f'<line class="whisker" x1="{px}" x2="{px}" y1="{low}" y2="{high}"/>']
    if len(spot.x.seeds) > 1:
        left, right = (f"{frame.px(x.at(min(max(end, x.ends[0]), x.ends[1]))):.1f}" for end in spot.x.ends)
        parts.append(f'<line class="whisker" x1="{left}" x2="{right}" y1="{py}" y2="{py}"/>')
    else:
        parts += [f'<circle class="seed" cx="{px}" cy="{frame.py(value):.1f}" r="2.6"/>' for value in spot.y.seeds]
    parts.append(f'<circle class="mean" cx="{px}" cy="{py}" r="4.4"/>')
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    parts, x = [], float(MARGIN[3])
    for i, name in enumerate(names):
        parts.append(f'<g class="c{i % COLORS}"><circle class="mean" cx="{x + 5:.1f}" cy="38" r="4.4"/></g>')
        parts.append(f'<text class="name" x="{x + 15:.1f}" y="42">{escape(name)}</text>')
        x += 36 + LETTER * len(name)
    return "".join(parts)


def _names(frame: Frame, x: Axis, spots: Sequence[Spot]) -> str:
    """Each name beside its dot, at the nearest place free of dots and other names; a thin line leads there when it is far."""
    dots = [(frame.px(x.at(spot.x.middle)), frame.py(spot.y.middle)) for spot in spots]
    taken: list[tuple[float, float, float]] = []  # left, right, baseline
    parts = []
    for spot, (px, py) in zip(spots, dots, strict=True):
        width = LETTER * len(spot.name)
        left, base = next(
            (place for place in _places(px, py, width) if _free(frame, place, width, taken, dots)), (px + 8, py - 8)
        )
        taken.append((left, left + width, base))
        edge = min(max(px, left), left + width)
        if math.dist((edge, base - 4), (px, py)) > 22:
            parts.append(f'<line class="lead" x1="{px:.1f}" y1="{py:.1f}" x2="{edge:.1f}" y2="{base - 4:.1f}"/>')
        parts.append(f'<text class="name" x="{left:.1f}" y="{base:.1f}">{escape(spot.name)}</text>')
    return "".join(parts)


def _places(px: float, py: float, width: float) -> list[Point]:
    """Where a name may begin, the nearest place first."""
    rises = sorted((4 + LINE * step for step in range(-12, 13)), key=lambda rise: abs(rise - 4))
    near = [(px + side, py + rise) for rise in rises for side in (8.0, -8.0 - width)]
    return near + [(px + side, py + rise) for rise in rises for side in (60.0, -60.0 - width)]


def _free(frame: Frame, place: Point, width: float, taken: Sequence[tuple[float, float, float]], dots: Sequence[Point]) -> bool:
    (left, base), right = place, place[0] + width
    inside = frame.margin[3] <= left and right <= frame.width - 4 and frame.margin[0] < base < frame.height - frame.margin[2]
    names = any(left < end and begin < right and abs(base - other) < LINE for begin, end, other in taken)
    return inside and not names and not any(left - 5 < x < right + 5 and base - 14 < y < base + 5 for x, y in dots)


def _document(title: str, body: Sequence[str], left_out: Sequence[str]) -> str:
    head = escape(f"{title}; no figure: {', '.join(left_out)}" if left_out else title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>\n<text class="title" x="{MARGIN[3]}" y="20">{head}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )
