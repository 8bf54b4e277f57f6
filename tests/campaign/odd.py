"""Odd values and damaged files: what a broken disk, another program or an attacker leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    65,
    2**31,
    2**63,
    2**200,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "../../etc/passwd",
    "./../x",
    "a" * 300,
    "\udcff",
    "٦٤",
    [],
    {},
    [[]],
    [64],
    [0, 0],
    [64, 64, 64],
    [1, 2, 3],
    {"a": 1},
    "1e400",
    "64",
)
"""Values that stand in for others in JSON, YAML, checkpoints and options."""


def replace_somewhere(random: Random, value: Any, by: Any) -> Any:
    """Return a copy of nested dicts and lists with one random item replaced or removed."""
    places = list(_places(value, ()))
    if not places:
        return by
    place = random.choice(places)
    return _replaced(value, place, by, random.random() < 0.2)


def _places(value: Any, at: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for key, item in items:
        found.append((*at, key))
        found += _places(item, (*at, key))
    return found


def _replaced(value: Any, place: tuple[Any, ...], by: Any, remove: bool) -> Any:
    if isinstance(value, dict):
        copy: Any = dict(value)
    else:
        copy = list(value)
    if len(place) > 1:
        copy[place[0]] = _replaced(copy[place[0]], place[1:], by, remove)
    elif remove:
        del copy[place[0]]
    else:
        copy[place[0]] = by
    return copy


def json_text(value: Any) -> bytes:
    """JSON as careless programs write it: NaN, lone surrogates."""
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return re.sub(rb'"1e400"', b"1e400", text)


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


def damage_file(random: Random, path: Path) -> str:
    """Damage one file in a random way and say how."""
    ways: list[Callable[[Random, Path], str]] = [flip, flip, flip, _cut, _grow, _zero]
    ways += [_delete, _fifo, _folder, _loop, _empty, _rubbish]
    # A hard link must not damage the original.
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return random.choice(ways)(random, path)


def flip(random: Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing"
    offset, bit = random.randrange(len(data)), random.randrange(8)
    data[offset] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {offset} of {path.name} flipped"


def _cut(random: Random, path: Path) -> str:
    length = random.randrange(max(1, path.stat().st_size))
    os.truncate(path, length)
    return f"{path.name} cut to {length} bytes"


def _grow(random: Random, path: Path) -> str:
    with path.open("ab") as file:
        file.write(random.randbytes(random.randrange(1, 5000)))
    return f"{path.name} grown"


def _zero(random: Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    start = random.randrange(max(1, len(data)))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)
    return f"512 bytes of {path.name} at {start} zeroed"


def _delete(_: Random, path: Path) -> str:
    path.unlink()
    return f"{path.name} deleted"


def _fifo(_: Random, path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return f"{path.name} is a FIFO"


def _folder(_: Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def _loop(_: Random, path: Path) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return f"{path.name} is a link to itself"


def _empty(_: Random, path: Path) -> str:
    path.write_bytes(b"")
    return f"{path.name} is empty"


def _rubbish(random: Random, path: Path) -> str:
    path.write_bytes(
        random.choice([b"<html>not found</html>", b"\0" * 700, random.randbytes(3000)])
    )
    return f"{path.name} holds something else"


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a folder by hard links, so that cases cost little; :func:`damage_file` unlinks first."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)
    return target


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)
