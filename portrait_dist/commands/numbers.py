"""Numbers on the command line: plain digits within bounds, and one line for everything else.

``int`` and ``float`` take more than a person means by a number (``"٦٤"``, ``1_000``, ``inf``,
``nan``, a million digits); these types do not.
"""

from __future__ import annotations

import re
from typing import Any

import click

LARGEST_SEED = 2**63 - 1
MOST_WORKERS = 1024
"""Threads or processes; more cores than that are in no machine that this was made for."""


class Integer(click.ParamType):
    """A whole number within bounds.

    Args:
        minimum: the smallest.
        maximum: the largest.
    """

    name = "integer"

    def __init__(self, minimum: int, maximum: int) -> None:
        self.minimum, self.maximum = minimum, maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse one argument; click shows the message of what it refuses."""
        if isinstance(value, str):
            if not re.fullmatch(r"[+-]?[0-9]{1,20}", value):
                self.fail(f"'{value[:40]}' is not a whole number", param, ctx)
            value = int(value)
        if not self.minimum <= value <= self.maximum:
            self.fail(f"{value} is not from {self.minimum} to {self.maximum}", param, ctx)
        return int(value)


class Fraction(click.ParamType):
    """A number that is at least 0 and below 1."""

    name = "fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse one argument; click shows the message of what it refuses."""
        if isinstance(value, str):
            if not re.fullmatch(r"[0-9]{0,20}(\.[0-9]{0,40})?(e-?[0-9]{1,3})?", value.lower()):
                self.fail(f"'{value[:40]}' is not a number from 0 to 1", param, ctx)
            try:
                value = float(value)
            except ValueError:
                self.fail(f"'{value[:40]}' is not a number from 0 to 1", param, ctx)
        if not 0 <= value < 1:
            self.fail(f"{value} is not at least 0 and below 1", param, ctx)
        return float(value)
