"""The commands: one module each, named as the command.

They import only the standard library and click at the top, so that ``portrait-dist --help`` answers
at once; heavy imports stand inside the functions.

A command is a function that takes its options and returns its result, a dataclass: printed as one
JSON object with ``--json``, else handed to ``summary``. Everything it prints on the way goes to
stderr.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click


def command(
    name: str,
    *,
    summary: Callable[[Any], str],
    epilog: str | None = None,
    passes_on: bool = False,
) -> Callable[[Callable[..., object]], click.Command]:
    """Make a click command with ``--json`` and ``--debug`` out of a function.

    The function returns its result, a dataclass, or None where another rank prints it.
    ``portrait_dist.cli`` prints errors, as JSON too.

    Args:
        name: the command's name on the command line.
        summary: makes the lines that a person reads on stdout out of the result.
        epilog: examples and exit codes, below the help text.
        passes_on: take unknown options as arguments, for another command.
    """

    def decorate(function: Callable[..., object]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **options: object) -> None:
            with _StdoutForJson(as_json) as write_json:
                result = function(**options)
                if result is None:
                    return
                if as_json:
                    write_json(to_json(result) + "\n")
                elif text := summary(result):
                    click.echo(text)

        settings = {"ignore_unknown_options": True} if passes_on else {}
        return click.command(name, epilog=epilog, context_settings=settings)(_with_options(run))

    return decorate


def _with_options(run: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command; the one that is added last is listed first."""
    debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."
    )
    return as_json(debug(run))


def to_json(result: object, **more: object) -> str:
    """Make one line of JSON out of a result.

    Args:
        result: a dataclass or a mapping of plain values; paths become strings, and numbers that
            JSON does not know (NaN, infinities) become null.
        more: values to add.
    """
    plain = _plain(result)
    if more and isinstance(plain, dict):
        plain |= more
    return json.dumps(plain, allow_nan=False)


def _plain(value: object) -> object:
    """Turn a result into what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


MAX_SIDE = 16384
"""Pixels; the largest height and width on the command line."""


class Size(click.ParamType):
    """A size in pixels, ``HEIGHTxWIDTH`` or one number for a square, as (H, W).

    Where ``original`` is allowed it becomes None.
    """

    def __init__(self, original: bool = False) -> None:
        self.original = original
        self.name = "HEIGHTxWIDTH|original" if original else "HEIGHTxWIDTH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int] | None:
        """Parse one argument; click shows the message of what it refuses."""
        if not isinstance(value, str):
            return value
        if self.original and value == "original":
            return None
        height, x, width = value.lower().partition("x")
        sides = (height, width if x else height)
        # str.isdecimal and int would also take the digits of other scripts.
        if not all(
            re.fullmatch("[0-9]{1,5}", side) and 0 < int(side) <= MAX_SIDE for side in sides
        ):
            either = ", or original" if self.original else ""
            self.fail(
                f"'{value[:40]}' is not a size; give HEIGHTxWIDTH in pixels, such as 256x256"
                f"{either}",
                param,
                ctx,
            )
        return int(sides[0]), int(sides[1])


class Part(click.ParamType):
    """A part of work that several processes share: ``I/N`` (I from 0 to N - 1), or ``auto``."""

    name = "I/N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse one argument; ``auto`` asks SLURM's and torchrun's environment."""
        if not isinstance(value, str):
            return tuple(value)
        if value == "auto":
            from portrait_dist.distributed import job_part

            return job_part()
        found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", value)
        if not found or int(found[1]) >= int(found[2]):
            self.fail(
                f"'{value[:40]}' is not a part; give I/N with I from 0 to N - 1, such as 0/4",
                param,
                ctx,
            )
        return int(found[1]), int(found[2])


class _StdoutForJson:
    """Make file descriptor 1 stderr during a command, also for libraries and child processes."""

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
