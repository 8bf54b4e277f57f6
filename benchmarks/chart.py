"""Draws results as bars: batches per second of each loader, and the ladder of the U-Net.

python benchmarks/chart.py benchmarks/results/<date>-<hardware>.json        # writes the .svg beside
it
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, BAR, GAP, LABEL, NUMBER = 860, 18, 6, 200, 90  # pixels
OURS, OTHERS, LIMIT = "#1a7f64", "#8a94a6", "#c9ced8"
STYLE = "font-family:system-ui,sans-serif;font-size:13px;fill:#1f2430"


def panels(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """List title and rows of each panel; only what was measured."""
    parts = found["benchmarks"]
    loader = parts.get("loader", {}).get("rows", [])
    unet = parts.get("unet", {}).get("rows", [])
    chosen = [
        (
            f"Batches, {label}: images/s",
            [
                row
                for row in loader
                if row.get("size") == size and not row["name"].startswith("pack")
            ],
        )
        for size, label in (("256", "256-pixel shards"), ("original", "original-size shards"))
    ]
    chosen.append(
        (
            "U-Net forward, 256×256: images/s",
            [row for row in unet if not row["name"].startswith("train-")],
        )
    )
    chosen.append(
        ("U-Net training step: images/s", [row for row in unet if row["name"].startswith("train-")])
    )
    measured = [
        (title, [row for row in rows if row.get("images_per_second")]) for title, rows in chosen
    ]
    return [(title, rows) for title, rows in measured if rows]


def draw(found: dict[str, Any]) -> str:
    """Draw the chart as SVG text."""
    shapes: list[str] = []
    y = 14
    for title, rows in panels(found):
        y += 18
        shapes.append(
            f'<text x="12" y="{y}" style="{STYLE};font-weight:600">{escape(title)}</text>'
        )
        y += 10
        longest = max(row["high"] for row in rows)
        for row in rows:
            shapes += _bar(row, y, (WIDTH - LABEL - NUMBER - 24) / longest)
            y += BAR + GAP
        y += 10
    machine = found["machine"]
    hardware = ", ".join([f"{machine['cpu']}, {machine['cores']} cores", *machine["gpus"]])
    y += 14
    caption = (
        f"{hardware}; commit {found['commit']}; {found['date'][:10]}; "
        "median, line from lowest to highest"
    )
    shapes.append(f'<text x="12" y="{y}" style="{STYLE};font-size:11px">{escape(caption)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 12}" '
        f'viewBox="0 0 {WIDTH} {y + 12}">'
    )
    return (
        "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *shapes, "</svg>"])
        + "\n"
    )


def _bar(row: dict[str, Any], y: float, scale: float) -> list[str]:
    name, value = row["name"], row["images_per_second"]
    ours = name.startswith("portrait_dist") or name in (
        "merged",
        "compiled-frozen",
        "max-autotune",
        "best",
        "train-best",
    )
    colour = LIMIT if name == "ceiling" else OURS if ours else OTHERS
    middle, start = y + BAR / 2, LABEL + 12
    low, high, base = start + row["low"] * scale, start + row["high"] * scale, middle + 4.5
    return [
        f'<text x="{LABEL}" y="{base}" text-anchor="end" style="{STYLE}">{escape(name)}</text>',
        f'<rect x="{start}" y="{y}" width="{max(1.0, value * scale):.1f}" height="{BAR}" rx="2" '
        f'fill="{colour}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="#1f2430"/>',
        f'<text x="{high + 8:.1f}" y="{base}" style="{STYLE}">{value:,.4g}</text>',
    ]


def main() -> None:
    """Draw the results named on the command line."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.with_suffix(".svg").write_text(draw(json.loads(path.read_text())))
        print(path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
