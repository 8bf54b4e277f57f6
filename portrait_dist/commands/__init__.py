"""One module for each group of commands. They import only the standard library and click at the top, so that
``portrait-dist --help`` answers at once; heavy imports stand inside the functions.

A command is a function that takes its options and returns its result, a dict: printed as one JSON object with ``--json``,
else handed to ``summary``. Everything it prints on the way goes to stderr.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import click

from portrait_dist.errors import PortraitDistError

Result = dict[str, Any] | None


def command(
    name: str, *, summary: Callable[[dict[str, Any]], str], **attributes: Any
) -> Callable[..., click.Command]:
    """Decorator: a click command with ``--json`` and ``--debug``.

    Args:
        name: the command's name on the command line.
        summary: makes the lines a person reads on stdout out of the result.
        attributes: passed to ``click.command`` (``epilog``, ``short_help``, …).

    The decorated function returns the result, or None where another rank prints it. An error that carries a ``result`` gets it
    printed with ``--json`` too, before its exit code.
    """

    def decorate(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **options: Any) -> None:
            with _StdoutForJson(as_json) as write_json:
                try:
                    result = function(**options)
                except PortraitDistError as error:
                    if as_json and error.result is not None:
                        write_json(json.dumps(error.result) + "\n")
                    raise
                if result is None:
                    return
                if as_json:
                    write_json(json.dumps(result) + "\n")
                elif text := summary(result):
                    click.echo(text)

        decorated = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(
            run
        )
        decorated = click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."
        )(decorated)
        return click.command(name, **attributes)(decorated)

    return decorate


class Size(click.ParamType):
    """``HEIGHTxWIDTH`` in pixels, or one number for a square: (H, W). ``original``, where allowed: None."""

    def __init__(self, original: bool = False) -> None:
        self.original = original
        self.name = "HEIGHTxWIDTH|original" if original else "HEIGHTxWIDTH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int] | None:
        if not isinstance(value, str):
            return value
        if self.original and value == "original":
            return None
        height, x, width = value.lower().partition("x")
        sides = (height, width if x else height)
        if not all(side.isdecimal() for side in sides):
            either = ", or original" if self.original else ""
            self.fail(
                f"'{value}' is not a size; give HEIGHTxWIDTH in pixels, such as 256x256{either}",
                param,
                ctx,
            )
        return int(sides[0]), int(sides[1])


class _StdoutForJson:
    """While a command runs with ``--json``, file descriptor 1 is stderr, also for libraries and child processes."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.saved = -1

    def __enter__(self) -> Callable[[str], None]:
        if self.enabled:
            self.saved = os.dup(1)
            os.dup2(2, 1)
        return lambda text: _write_all(self.saved, text.encode())

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            os.dup2(self.saved, 1)
            os.close(self.saved)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
