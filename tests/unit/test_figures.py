"""Every measured number of README and docs is what the results say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

figures: Any = importlib.import_module("benchmarks.figures")

MEASURED = re.compile(
    r"\d[\d,.]* (?:×(?! \d)|images/s|pairs/s|% of|ms a\b|hours|minutes of|times as)"
    r"|IoU of \d|\b0\.\d{3,}\b"
)
"""Numbers as measurements are written here: rates, ratios, durations, scores of three decimals."""
LIMITS = ("IoU 0.999", "IoU is below 0.999", "80 % of the time")
"""Limits that a test holds, which look like measurements."""


def test_readme_and_docs_show_the_numbers_of_the_results() -> None:
    known = figures.figures()
    differing = [
        difference
        for page in figures.pages()
        for difference in figures.differences(page.read_text(), known, page.name)
    ]
    assert differing == [], "python -m benchmarks.figures --write"


def test_every_figure_stands_in_a_page() -> None:
    shown = {
        match[1] for page in figures.pages() for match in figures.MARKER.findall(page.read_text())
    }
    assert figures.figures().keys() - shown == set()


@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: page.name)
def test_no_measured_number_stands_outside_of_the_results(page: Path) -> None:
    text = figures.MARKER.sub("", page.read_text())
    for limit in LIMITS:
        text = text.replace(limit, "")
    assert MEASURED.findall(text) == []


def test_a_number_that_differs_is_named_and_written_anew() -> None:
    known = {"loader.rate": "4,036"}
    text = "so many: <!--=loader.rate-->4,000<!--/--> images/s"
    (difference,) = figures.differences(text, known, "README.md")
    assert (difference.name, difference.found, difference.expected) == (
        "loader.rate",
        "4,000",
        "4,036",
    )
    assert figures.filled(text, known) == "so many: <!--=loader.rate-->4,036<!--/--> images/s"
    assert figures.differences(figures.filled(text, known), known) == []


def test_a_marker_without_results_is_refused() -> None:
    with pytest.raises(KeyError, match="no-such"):
        figures.differences("<!--=no-such-->1<!--/-->", {})
