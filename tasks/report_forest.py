"""Charts of means with intervals: forest plots of differences, and one metric against another."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tasks.report_plots import Frame, Point, axes, number, span, svg, ticks

LETTER = 7.2  # pixels of a letter of a name, about
ROW = 25  # pixels a row of a forest plot
HEAD = 26  # pixels above the first row of a group
FEW = 8  # crosses that a small chart has room for


@dataclass(frozen=True)
class Mean:
    """A mean with its interval; `text` is what a reader sees, `clear` whether zero lies outside."""

    name: str
    color: str
    middle: float
    low: float
    high: float
    text: str = ""
    clear: bool = True


def forest_chart(title: str, groups: dict[str, list[Mean]], ends: tuple[float, float], scale: float = 1.0) -> str:
    """Differences around zero, one group of rows per baseline; a hollow dot when zero lies inside the interval.

    `ends` is the range shown, shared by charts to be compared; ticks are multiplied by `scale` (100 for points).
    """
    names = [mean.name for group in groups.values() for mean in group]
    height = 34 + len(names) * ROW + len(groups) * HEAD
    left = max(84, 16 + round(LETTER * max(map(len, names))))
    frame = Frame(ends, (0, 1), width=470, height=height, margin=(6, 152, 28, left))
    parts = [_scale(frame, scale)]
    y = frame.margin[0]
    for name, group in groups.items():
        parts.append(f'<text class="group" x="6" y="{y + 17}">against {escape(name)}</text>')
        y += HEAD
        for mean in group:
            parts.append(_row(frame, mean, y + ROW / 2))
            y += ROW
    return svg(frame, "".join(parts), title)


def _scale(frame: Frame, scale: float) -> str:
    top, bottom = frame.margin[0], frame.height - frame.margin[2]
    parts = []
    for value in ticks((frame.x[0] * scale, frame.x[1] * scale)):
        x = f"{frame.px(value / scale):.1f}"
        kind = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    return "".join(parts)


def _row(frame: Frame, mean: Mean, y: float) -> str:
    low, middle, high = (f"{frame.px(value):.1f}" for value in (mean.low, mean.middle, mean.high))
    kind, name, text = "clear" if mean.clear else "unclear", escape(mean.name), escape(mean.text)
    return (
        f'<g class="{kind}" style="--c:{mean.color}"><title>{name}: {text}</title>'
        f'<text class="name" x="{frame.margin[3] - 10}" y="{y:g}" dy=".32em" text-anchor="end">{name}</text>'
        f'<line class="whisker" x1="{low}" x2="{high}" y1="{y:g}" y2="{y:g}"/>'
        f'<circle class="mean" cx="{middle}" cy="{y:g}" r="4.6"/>'
        f'<text class="value" x="{frame.width - 2}" y="{y:g}" dy=".32em" text-anchor="end">{text}</text></g>'
    )


def cross_chart(title: str, pairs: Sequence[tuple[Mean, Mean]], x_label: str, y_label: str) -> str:
    """One cross per model: its mean and interval in two metrics at once, the name beside it; a larger chart for many."""
    many = len(pairs) > FEW
    frame = Frame(
        span([end for x, _ in pairs for end in (x.low, x.high, 0.0)], 0.12),
        span([end for _, y in pairs for end in (y.low, y.high)], 0.12),
        width=980 if many else 470,
        height=440 if many else 250,
        margin=(22, 14, 40, 46),
    )
    dots = [(frame.px(x.middle), frame.py(y.middle)) for x, y in pairs]
    parts = [axes(frame, x_label, y_label)]
    for (x, y), dot, name in zip(pairs, dots, _labels(frame, [x.name for x, _ in pairs], dots), strict=True):
        cx, cy = f"{dot[0]:.1f}", f"{dot[1]:.1f}"
        parts.append(
            f'<g style="--c:{x.color}"><title>{escape(x.name)}: {escape(y.text)}, {escape(x.text)}</title>'
            f'<line class="whisker" x1="{frame.px(x.low):.1f}" x2="{frame.px(x.high):.1f}" y1="{cy}" y2="{cy}"/>'
            f'<line class="whisker" x1="{cx}" x2="{cx}" y1="{frame.py(y.low):.1f}" y2="{frame.py(y.high):.1f}"/>'
            f'<circle class="mean" cx="{cx}" cy="{cy}" r="4.6"/>'
            f'<text class="name" x="{name[0]:.1f}" y="{name[1]:.1f}">{escape(x.name)}</text></g>'
        )
    return svg(frame, "".join(parts), title)


def _labels(frame: Frame, names: Sequence[str], dots: Sequence[Point]) -> list[Point]:
    """Where each name starts: the first place around its dot that is free of dots and of names already placed."""
    placed: list[tuple[float, float, float]] = []  # left, right, baseline
    for name, (x, y) in zip(names, dots, strict=True):
        width = LETTER * len(name)
        places = [(x + side, y + rise) for rise in (-8.0, 16.0, -20.0, 28.0) for side in (8.0, -8.0 - width)]
        inside = [place for place in places if frame.margin[3] <= place[0] <= frame.width - width]
        free = [place for place in inside if not _taken(place, width, placed, dots)]
        left, base = (free or inside or places)[0]
        placed.append((left, left + width, base))
    return [(left, base) for left, _, base in placed]


def _taken(place: Point, width: float, placed: Sequence[tuple[float, float, float]], dots: Sequence[Point]) -> bool:
    left, base = place
    names = any(left < right and begin < left + width and abs(base - other) < 12 for begin, right, other in placed)
    return names or any(left - 6 < x < left + width + 6 and base - 15 < y < base + 6 for x, y in dots)
