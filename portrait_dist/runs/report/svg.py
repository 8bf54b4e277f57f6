"""Line charts and histograms as inline SVG. Colours come from the page's style sheet.

By hand, because matplotlib gives no tooltips under the pointer and no dark mode by style sheet,
makes files ten times as large (a chart here is 10 kB), and would be a dependency of the package for
this alone.

Every chart is drawn 440 units wide and scales with its box.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MOST_POINTS = 240
"""Points drawn for each series; more are averaged in groups of neighbours."""
SMALLEST_RANGE = 1e-300
"""A smaller range of values counts as none: its ticks would be denormal numbers or zero."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line; its position in the list picks the colour."""

    name: str
    points: Sequence[Point]


class Axes:
    """A drawing area with ticks on both sides; each method draws something into ``body``.

    Args:
        x_ticks: values with a label on the horizontal axis.
        y_ticks: values with a label and a line on the vertical axis.
        x_range: lowest and highest value of the horizontal axis.
        y_range: likewise of the vertical axis.
        label: of the horizontal axis.
    """

    def __init__(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_range: Point,
        y_range: Point,
        label: str,
    ) -> None:
        self._x_range, self._y_range = x_range, y_range
        self.body: list[str] = []
        self._draw_ticks(x_ticks, y_ticks, label)

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        return _scaled(value, self._x_range, LEFT, WIDTH - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical position of a value; SVG counts from the top."""
        return _scaled(value, self._y_range, HEIGHT - BOTTOM, TOP)

    def _draw_ticks(self, x_ticks: Sequence[float], y_ticks: Sequence[float], label: str) -> None:
        right, base = WIDTH - RIGHT, HEIGHT - BOTTOM
        for tick in y_ticks:
            y = self.y(tick)
            self._line("grid", (LEFT, y), (right, y))
            self._text((LEFT - 7, y + 4), _number(tick), "end")
        self._line("axis", (LEFT, base), (right, base))
        for tick in x_ticks:
            if LEFT - 1 <= self.x(tick) <= right + 1:
                self._text((self.x(tick), base + 15), _number(tick), "middle")
        self._text((right, HEIGHT - 4), label, "end", 'class="label" ')

    def _line(self, kind: str, start: Point, end: Point) -> None:
        (x1, y1), (x2, y2) = start, end
        self.body.append(
            f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
        )

    def _text(self, at: Point, text: str, anchor: str, attributes: str = "") -> None:
        self.body.append(
            f'<text {attributes}x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def _circle(self, kind: str, at: Point, radius: float) -> None:
        x, y = self.x(at[0]), self.y(at[1])
        self.body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')

    def draw_series(self, number: int, points: Sequence[Point]) -> None:
        """Draw a line, or a dot where there is one point."""
        if len(points) == 1:
            self._circle(f"dot s{number}", points[0], 4)
            return
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.body.append(f'<polyline class="line s{number}" points="{path}"/>')

    def draw_marks(self, points: Sequence[Point]) -> None:
        """Draw a ring around each point."""
        for point in points:
            self._circle("mark", point, 4.5)

    def draw_restarts(self, xs: Sequence[float]) -> None:
        """Draw a vertical dashed line at each value."""
        for x in xs:
            self._line("restart", (self.x(x), TOP), (self.x(x), HEIGHT - BOTTOM))

    def draw_bar(self, left: float, right: float, height: float, tooltip: str) -> None:
        """Draw a bar of a histogram between two values, with a gap to its neighbours."""
        x, y = self.x(left) + 1, self.y(height)
        width = max(1.0, self.x(right) - 1 - x)
        self.body.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{max(0.0, HEIGHT - BOTTOM - y):.1f}"><title>{escape(tooltip)}</title></rect>'
        )

    def draw_tooltips(self, series: Sequence[Series], x_label: str) -> None:
        """Draw for each x a strip that shows a line and the values while the pointer is on it."""
        xs = sorted({x for each in series for x, _ in each.points})
        at = [self.x(x) for x in xs]
        # A strip reaches half-way to its neighbours, so that the pointer always meets one.
        middles = [(before + after) / 2 for before, after in itertools.pairwise(at)]
        edges = [float(LEFT), *middles, float(WIDTH - RIGHT)]
        for number, x in enumerate(xs):
            left, right = edges[number], edges[number + 1]
            text = "\n".join([f"{x_label} {_number(round(x, 3))}", *_values_at(series, x)])
            self.body.append(
                f'<g class="at"><rect x="{left:.1f}" y="{TOP}" width="{max(0.5, right - left):.1f}"'
                f' height="{HEIGHT - TOP - BOTTOM}"/>'
                f'<line x1="{at[number]:.1f}" x2="{at[number]:.1f}" y1="{TOP}" '
                f'y2="{HEIGHT - BOTTOM}"/><title>{escape(text)}</title></g>'
            )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "epoch",
    marks: Sequence[Point] = (),
    restarts: Sequence[float] = (),
    floor: float | None = None,
    ceiling: float | None = None,
) -> str:
    """Draw a ``<figure>`` with one vertical axis; empty where there is no point.

    Args:
        title: what is shown.
        series: one or two lines; points that are not finite are left out.
        unit: of the values, for the heading.
        x_label: of the horizontal axis.
        marks: points to ring.
        restarts: x values of vertical dashed lines.
        floor: the axis reaches at least so low; the values' own range when None.
        ceiling: likewise upwards.
    """
    drawn = [Series(each.name, thin(_finite(each.points))) for each in series]
    drawn = [each for each in drawn if each.points]
    if not drawn:
        return ""
    axes = _axes_around(drawn, [bound for bound in (floor, ceiling) if bound is not None], x_label)
    axes.draw_restarts(restarts)
    for number, each in enumerate(drawn, start=1):
        axes.draw_series(number, each.points)
    axes.draw_marks(marks)
    axes.draw_tooltips(drawn, x_label)
    ends = ", ".join(
        f"{each.name} from {each.points[0][1]:.4g} to {each.points[-1][1]:.4g}" for each in drawn
    )
    return _figure(title, unit, [each.name for each in drawn], axes.body, f"{title}: {ends}")


def _axes_around(drawn: Sequence[Series], bounds: Sequence[float], x_label: str) -> Axes:
    """Make axes that hold every point, and the bounds on the vertical one."""
    xs = [x for each in drawn for x, _ in each.points]
    ys = [*(y for each in drawn for _, y in each.points), *bounds]
    y_ticks = ticks(min(ys), max(ys))
    y_range = (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))
    return Axes(ticks(min(xs), max(xs)), y_ticks, (min(xs), max(xs)), y_range, x_label)


def histogram(
    title: str, values: Sequence[float], bins: int = 20, x_label: str = "", y_label: str = "samples"
) -> str:
    """Draw a ``<figure>`` with the number of values in each bin; empty without values."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    edges = ticks(min(values), max(values), wanted=bins)
    start, step = edges[0], edges[1] - edges[0]
    counts = [0] * max(1, len(edges) - 1)
    for value in values:
        # 1e-9: a value on an edge belongs to the bin above it, whatever the rounding did
        counts[min(len(counts) - 1, int((value - start) / step + 1e-9))] += 1
    end = start + len(counts) * step
    y_ticks = [tick for tick in ticks(0, max(counts)) if tick == int(tick)]
    y_range = (0, max(y_ticks[-1], *counts))
    axes = Axes(ticks(start, end), y_ticks, (start, end), y_range, x_label)
    for number, count in enumerate(counts):
        left, right = start + number * step, start + (number + 1) * step
        axes.draw_bar(left, right, count, f"{left:.4g} to {right:.4g}: {count} {y_label}")
    summary = f"{title}: {len(values)} {y_label} from {min(values):.4g} to {max(values):.4g}"
    return _figure(title, y_label, [], axes.body, summary)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most ``most`` points: where there are more, the means of groups of neighbours."""
    if len(points) <= most:
        return list(points)
    bounds = [number * len(points) // most for number in range(most + 1)]
    groups = [points[begin:end] for begin, end in itertools.pairwise(bounds)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about ``wanted`` round numbers from at most ``low`` to at least ``high``.

    They are 1, 2 or 5 times a power of ten apart.
    """
    if not high - low > SMALLEST_RANGE:
        spread = max(abs(low), abs(high)) * 0.1
        spread = spread if spread > SMALLEST_RANGE else 1.0
        return ticks(low - spread, high + spread, wanted)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _scaled(value: float, values: Point, start: float, end: float) -> float:
    """Map a range of values linearly to [start, end]; to the middle where the range is empty."""
    low, high = values
    if high <= low:
        return (start + end) / 2
    return start + (value - low) / (high - low) * (end - start)


def _values_at(series: Sequence[Series], x: float) -> list[str]:
    """Return ``name value`` of each series that has a point at x."""
    found = []
    for each in series:
        number = bisect.bisect_left(each.points, x, key=lambda point: point[0])
        if number < len(each.points) and each.points[number][0] == x:
            found.append(f"{each.name} {each.points[number][1]:.5g}")
    return found


def _figure(title: str, unit: str, names: Sequence[str], body: Sequence[str], summary: str) -> str:
    keys = "".join(
        f'<span class="key k{number}">{escape(name)}</span>'
        for number, name in enumerate(names, start=1)
    )
    legend = f'<span class="keys">{keys}</span>' if len(names) > 1 else ""
    heading = f"<strong>{escape(title)}</strong>{f' <small>{escape(unit)}</small>' if unit else ''}"
    return (
        f'<figure class="chart"><figcaption><span>{heading}</span>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(body)}</svg></figure>"
    )


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
