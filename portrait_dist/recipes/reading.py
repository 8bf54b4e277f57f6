"""Read a recipe.

:func:`read` is the only way in: one mapping of settings, UTF-8, no anchors, no duplicate
keys, bounded in size and depth, so that a hostile file ends in one line and not in a full memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from portrait_dist import files
from portrait_dist.errors import InputError, one_line, shorten

_EXPONENT = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,20})?[eE][+-]?[0-9]{1,3}")
MOST_BYTES = 1_000_000
MOST_DEPTH = 8
"""Settings are two levels deep; values of ``model.args`` and the like may nest further."""


@dataclass(frozen=True)
class Leaf:
    """One value of a recipe.

    Args:
        key: its setting, such as ``train.lr``.
        text: as written, without quotes; None for a list.
        line: of the key, from 1.
        value: what YAML makes of it, for settings that take values of any type.
    """

    key: str
    text: str | None
    line: int
    value: Any = None


def read(path: Path) -> list[Leaf]:
    """Read the leaves of a YAML file, in the order of the file.

    Raises:
        InputError: not readable, or not YAML as described above; names file and line.
    """
    text = _text(path)
    loader = yaml.SafeLoader(text)
    try:
        # The parser of PyYAML does not recurse, its composer does: look at the depth first.
        _check_events(path, text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refuse(path, line, f"not YAML ({error.problem}); fix that line") from error
    finally:
        loader.dispose()
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise _refuse(path, 1, "a recipe is a mapping such as 'train:' with 'lr: 0.001' below it")
    return list(_leaves(path, root, "", {}))


def _text(path: Path) -> str:
    try:
        data = files.read_regular(path, MOST_BYTES)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refuse(path, line, "not UTF-8; save the file as UTF-8") from error
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise _refuse(path, line, f"a control character ({found.group()!r}); remove it")
    return text


def _check_events(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refuse(path, line, "anchors (&) and aliases (*) are not taken; repeat the value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_DEPTH:
            raise _refuse(
                path, line, "nested too deeply; a recipe is 'section:' with keys below it"
            )


def _leaves(
    path: Path, node: yaml.MappingNode, prefix: str, lines: dict[str, int]
) -> Iterator[Leaf]:
    """Yield the leaves of a mapping; ``lines`` collects where each key stands."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refuse(path, line, "a key is a word such as lr")
        key = f"{prefix}{key_node.value}"
        if key in lines:
            raise _refuse(
                path,
                line,
                f"'{shorten(key)}' stands in line {lines[key]} already; keep one of them",
            )
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            yield from _leaves(path, value_node, f"{key}.", lines)
        else:
            scalar = isinstance(value_node, yaml.ScalarNode)
            value = _value(path, value_node, line)
            yield Leaf(key, value_node.value if scalar else None, line, value)


def _value(path: Path, node: yaml.Node, line: int) -> Any:
    try:
        return _plain(yaml.constructor.SafeConstructor().construct_object(node, deep=True))
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as a date of month 13
        raise _refuse(path, line, f"no value ({one_line(error, 80)})") from error


def parse(text: str) -> Any:
    """Return what a value of an argument stands for: YAML, in which 1e-3 is a number too.

    Raises:
        InputError: it is too long or too deep, or a list or mapping that does not end.
    """
    if len(text) > MOST_BYTES:
        raise InputError(f"'{shorten(text)}': too long for a value")
    try:
        _check_events(Path("value"), text)
        return _plain(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = getattr(error, "problem", None) or error
        raise InputError(f"'{shorten(text)}': no value ({reason}); quote a text") from error


def _plain(value: object) -> Any:
    """Read texts such as ``1e-3``, which YAML 1.1 takes for no number, as numbers."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _refuse(path: Path, line: int, what: str) -> InputError:
    return InputError(f"{path}, line {line}: {what}")
