"""Line charts and histograms as inline SVG: no script, no font, no file from elsewhere. Colours come from the page's CSS.

Every chart is drawn 440 units wide and scales with its box; hovering a place shows its values as a tooltip.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MOST_POINTS = 240
"""Points drawn for each series; more are averaged in groups of neighbours."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line; its place in the list picks the colour."""

    name: str
    points: Sequence[Point]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "epoch",
    marks: Sequence[Point] = (),
    lines: Sequence[float] = (),
    floor: float | None = None,
    ceiling: float | None = None,
) -> str:
    """A ``<figure>`` with one vertical axis.

    Args:
        title: what is shown.
        series: one or two lines; points that are not finite are left out.
        unit: of the values, for the heading.
        x_label: of the horizontal axis.
        marks: points to ring.
        lines: x values of vertical dashed lines.
        floor, ceiling: the axis reaches at least so far; the values' own range where None.
    """
    drawn = [
        Series(each.name, thin([p for p in each.points if math.isfinite(p[1])])) for each in series
    ]
    drawn = [each for each in drawn if each.points]
    if not drawn:
        return ""
    xs = [x for each in drawn for x, _ in each.points]
    ys = [y for each in drawn for _, y in each.points] + [
        bound for bound in (floor, ceiling) if bound is not None
    ]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_at = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_at = _scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), HEIGHT - BOTTOM, TOP)
    body = _axes(x_ticks, y_ticks, x_at, y_at, x_label)
    body += [
        f'<line class="restart" x1="{x_at(x):.1f}" x2="{x_at(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        for x in lines
    ]
    for number, each in enumerate(drawn, start=1):
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in each.points)
        if len(each.points) == 1:
            body.append(
                f'<circle class="dot s{number}" cx="{x_at(each.points[0][0]):.1f}" cy="{y_at(each.points[0][1]):.1f}" r="4"/>'
            )
        else:
            body.append(f'<polyline class="line s{number}" points="{path}"/>')
    body += [
        f'<circle class="mark" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4.5"/>' for x, y in marks
    ]
    body += _tooltips(drawn, x_at, x_label)
    return _figure(title, unit, [each.name for each in drawn], body, _summary(title, drawn))


def histogram(
    title: str, values: Sequence[float], bins: int = 20, x_label: str = "", y_label: str = "samples"
) -> str:
    """A ``<figure>`` with the number of values in each bin between the lowest and the highest."""
    if not values:
        return ""
    edges = ticks(min(values), max(values), wanted=bins)
    step = edges[1] - edges[0] if len(edges) > 1 else 1.0
    low, high = min(edges[0], min(values)), max(edges[-1], max(values))
    start = edges[0] - step if low < edges[0] else edges[0]
    count = max(1, math.ceil((high - start) / step - 1e-9))
    held = [0] * count
    for value in values:
        held[min(count - 1, int((value - start) / step + 1e-9))] += 1
    y_ticks = [tick for tick in ticks(0, max(held)) if tick == int(tick)]
    end = start + count * step
    x_at, y_at = (
        _scale(start, end, LEFT, WIDTH - RIGHT),
        _scale(0, max(y_ticks[-1], *held), HEIGHT - BOTTOM, TOP),
    )
    body = _axes(ticks(start, end), y_ticks, x_at, y_at, x_label)
    for number, samples in enumerate(held):
        left, right = x_at(start + number * step) + 1, x_at(start + (number + 1) * step) - 1
        says = (
            f"{start + number * step:.4g} to {start + (number + 1) * step:.4g}: {samples} {y_label}"
        )
        body.append(
            f'<rect class="bar" x="{left:.1f}" y="{y_at(samples):.1f}" width="{max(1.0, right - left):.1f}" '
            f'height="{max(0.0, HEIGHT - BOTTOM - y_at(samples)):.1f}"><title>{escape(says)}</title></rect>'
        )
    summary = f"{title}: {len(values)} {y_label} from {min(values):.4g} to {max(values):.4g}"
    return _figure(title, y_label, [], body, summary)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points: where there are more, the mean of each group of neighbours."""
    if len(points) <= most:
        return list(points)
    groups = [
        points[number * len(points) // most : (number + 1) * len(points) // most]
        for number in range(most)
    ]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from about ``low`` to about ``high``; about ``wanted`` of them."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        return ticks(low - spread, low + spread, wanted)
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Linear map of [low, high] to [start, end]; everything to the middle where low and high are one."""
    if high <= low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    label: str,
) -> list[str]:
    body = []
    for tick in y_ticks:
        body.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>'
        )
        body.append(
            f'<text x="{LEFT - 7}" y="{y_at(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    base = HEIGHT - BOTTOM
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        if LEFT - 1 <= x_at(tick) <= WIDTH - RIGHT + 1:
            body.append(
                f'<text x="{x_at(tick):.1f}" y="{base + 15}" text-anchor="middle">{_number(tick)}</text>'
            )
    body.append(
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(label)}</text>'
    )
    return body


def _tooltips(series: Sequence[Series], x_at: Callable[[float], float], x_label: str) -> list[str]:
    """For each x a strip that shows a line and the values while the pointer is over it."""
    places = sorted({x for each in series for x, _ in each.points})
    values = [([x for x, _ in each.points], [y for _, y in each.points]) for each in series]
    strips = []
    for number, x in enumerate(places):
        left = LEFT if number == 0 else (x_at(places[number - 1]) + x_at(x)) / 2
        right = (
            WIDTH - RIGHT if number == len(places) - 1 else (x_at(x) + x_at(places[number + 1])) / 2
        )
        says = [f"{x_label} {_number(round(x, 3))}"]
        for each, (xs, ys) in zip(series, values, strict=True):
            found = bisect.bisect_left(xs, x)
            if found < len(xs) and xs[found] == x:
                says.append(f"{each.name} {ys[found]:.5g}")
        width, height = max(0.5, right - left), HEIGHT - TOP - BOTTOM
        strips.append(
            f'<g class="at"><rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{height}"/>'
            f'<line x1="{x_at(x):.1f}" x2="{x_at(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f"<title>{escape(chr(10).join(says))}</title></g>"
        )
    return strips


def _summary(title: str, series: Sequence[Series]) -> str:
    parts = [
        f"{each.name} from {each.points[0][1]:.4g} to {each.points[-1][1]:.4g}" for each in series
    ]
    return f"{title}: {', '.join(parts)}"


def _figure(title: str, unit: str, names: Sequence[str], body: Sequence[str], summary: str) -> str:
    keys = "".join(
        f'<span class="key k{number}">{escape(name)}</span>'
        for number, name in enumerate(names, start=1)
    )
    legend = f'<span class="keys">{keys}</span>' if len(names) > 1 else ""
    heading = f"<strong>{escape(title)}</strong>{f' <small>{escape(unit)}</small>' if unit else ''}"
    return (
        f'<figure class="chart"><figcaption><span>{heading}</span>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">{"".join(body)}</svg></figure>'
    )


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
