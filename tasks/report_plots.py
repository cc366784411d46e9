"""Charts as inline SVG, written by hand: no library, no clock, so equal numbers give equal bytes.

Colours are CSS variables of the page, so that charts follow its light and dark scheme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
MOST_POINTS = 240  # of one line; longer histories are averaged in buckets


@dataclass(frozen=True)
class Series:
    """One line or cloud: `color` a CSS colour, `band` the half-widths around a line."""

    name: str
    color: str
    points: Sequence[Point]
    dashed: bool = False
    band: Sequence[float] = ()


@dataclass(frozen=True)
class Frame:
    """Maps values to pixels inside the axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 340
    height: int = 212
    margin: tuple[int, int, int, int] = field(default=(12, 14, 40, 46))  # top, right, bottom, left

    def px(self, value: float) -> float:
        """Pixels from the left."""
        return self.margin[3] + _share(value, self.x) * (self.width - self.margin[1] - self.margin[3])

    def py(self, value: float) -> float:
        """Pixels from the top."""
        return self.height - self.margin[2] - _share(value, self.y) * (self.height - self.margin[0] - self.margin[2])

    def at(self, point: Point) -> str:
        """A point as SVG coordinates."""
        return f"{self.px(point[0]):.1f},{self.py(point[1]):.1f}"


def _share(value: float, ends: tuple[float, float]) -> float:
    return (value - ends[0]) / (ends[1] - ends[0])


def span(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """The range of the values with a little room; never of zero width."""
    low, high = min(values), max(values)
    gap = (high - low) * room if high > low else abs(high) * 0.1 or 1.0
    return low - gap, high + gap


def ticks(ends: tuple[float, float], most: int = 5) -> list[float]:
    """Round numbers inside a range: steps of 1, 2 or 5 times a power of ten."""
    raw = (ends[1] - ends[0]) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(ends[0] / step - 1e-9), math.floor(ends[1] / step + 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Averages of consecutive points, so that a long history stays a short line."""
    size = math.ceil(len(points) / most) or 1
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in bucket) / len(bucket), sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


def number(value: float) -> str:
    """An axis label."""
    return f"{value:g}".replace("-", "−")


def axes(frame: Frame, x_label: str, y_label: str) -> str:
    """Grid, ticks and labels."""
    top, right, bottom, left = frame.margin
    parts = []
    for value in ticks(frame.y):
        y = f"{frame.py(value):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{frame.width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{y}" dy=".32em" text-anchor="end">{number(value)}</text>')
    floor = frame.height - bottom
    for value in ticks(frame.x, 6):
        x = f"{frame.px(value):.1f}"
        parts.append(f'<text class="tick" x="{x}" y="{floor + 16}" text-anchor="middle">{number(value)}</text>')
    if frame.y[0] < 0 < frame.y[1]:
        zero = f"{frame.py(0):.1f}"
        parts.append(f'<line class="zero" x1="{left}" x2="{frame.width - right}" y1="{zero}" y2="{zero}"/>')
    middle = (left + frame.width - right) / 2
    parts.append(f'<text class="axis" x="{middle:g}" y="{frame.height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="{left}" y="{top - 4}" text-anchor="start">{escape(y_label)}</text>')
    return "".join(parts)


def svg(frame: Frame, body: str, title: str) -> str:
    """The picture, with its title for those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(title)}" '
        f'preserveAspectRatio="xMidYMid meet">{body}</svg>'
    )


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", y_label: str = "") -> str:
    """Lines over steps, each with an optional band."""
    drawn = [(one, thin(one.points)) for one in series if one.points]
    heights = [y for _, points in drawn for _, y in points]
    heights += [
        y + sign * half for one, _ in drawn for (_, y), half in zip(one.points, one.band, strict=False) for sign in (1, -1)
    ]
    frame = Frame(span([x for _, points in drawn for x, _ in points], 0.0), span(heights), margin=(22, 14, 40, 46))
    parts = [axes(frame, x_label, y_label)]
    for one, points in drawn:
        if one.band and len(one.band) == len(one.points):
            upper = [(x, y + half) for (x, y), half in zip(one.points, one.band, strict=True)]
            lower = [(x, y - half) for (x, y), half in zip(one.points, one.band, strict=True)]
            corners = " ".join(map(frame.at, thin(upper) + thin(lower)[::-1]))
            parts.append(f'<polygon class="band" style="fill:{one.color}" points="{corners}"/>')
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        path = " ".join(map(frame.at, points))
        parts.append(f'<polyline class="line" style="stroke:{one.color}"{dash} points="{path}"/>')
        last = frame.at(points[-1]).split(",")
        parts.append(f'<circle style="fill:{one.color}" cx="{last[0]}" cy="{last[1]}" r="2.6"/>')
    return svg(frame, "".join(parts), title)


def scatter_chart(title: str, one: Series, x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str]) -> str:
    """A cloud with its least-squares line, inside given ranges so that neighbours compare."""
    frame = Frame(x, y, width=236, height=190, margin=(22, 6, 38, 26))
    dots = "".join(
        f'<circle class="dot" style="fill:{one.color}" cx="{frame.px(a):.1f}" cy="{frame.py(b):.1f}" r="2.4"/>'
        for a, b in one.points
    )
    return svg(frame, axes(frame, *labels) + dots + _fit(frame, one.points), title)


def slope(points: Sequence[Point]) -> float | None:
    """Least-squares slope; None where x does not vary."""
    middle_x, middle_y = (sum(point[i] for point in points) / len(points) for i in (0, 1))
    spread = math.fsum((x - middle_x) ** 2 for x, _ in points)
    return math.fsum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread > 0 else None


def _fit(frame: Frame, points: Sequence[Point]) -> str:
    steepness = slope(points)
    if steepness is None:
        return ""
    middle_x, middle_y = (sum(point[i] for point in points) / len(points) for i in (0, 1))
    ends = [min(x for x, _ in points), max(x for x, _ in points)]
    (x1, y1), (x2, y2) = [frame.at((x, middle_y + steepness * (x - middle_x))).split(",") for x in ends]
    return f'<line class="fit" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
