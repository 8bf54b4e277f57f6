"""Lists of pairs as files: CSV, TSV and JSONL of image, mask and split; a split of one's own.

    image,mask,split                      {"image": "a.jpg", "mask": "a.png", "split": "train"}
    images/a.jpg,masks/a.png,train

Paths are relative to the list's folder, absolute, or addresses. Without a line of names the columns
are image, mask and, where there is a third, split. A ``key`` may be given; otherwise it is the
stem of the image, or its whole path with dashes where two stems are equal.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from portrait_dist.data.source.locations import Location, open_binary, shown, to_location
from portrait_dist.data.source.pairs import (
    ANY,
    Folder,
    PairReport,
    PairTable,
    Place,
    check_keys_are_storable,
)
from portrait_dist.data.source.trees import Tree
from portrait_dist.errors import DamagedDataError, InputError, shorten
from portrait_dist.files import read_regular
from portrait_dist.system.address import is_address

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
COLUMNS = {
    "image": ("image", "images", "img", "photo", "image_path", "file"),
    "mask": ("mask", "masks", "matte", "alpha", "label", "mask_path"),
    "split": ("split", "set", "subset"),
    "key": ("key", "id", "name"),
}
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
MOST_BYTES = 1 << 32
"""Of a split file that is read whole."""
LONGEST_LINE = 1 << 16
LONGEST_PATH = 4095
"""Linux's ``PATH_MAX`` without the final NUL."""


@dataclass(frozen=True)
class Row:
    """One line of a list: texts as they stand there; empty where it says nothing."""

    line: int
    image: str
    mask: str
    split: str = ""
    key: str = ""


def is_list(path: str | Path) -> bool:
    """Return whether a path or address is named as a list."""
    return str(path).lower().endswith(LIST_SUFFIXES)


def read_list(path: str | Path) -> PairReport:
    """Read the pairs of a list.

    Raises:
        InputError: it is not there, a line cannot be understood, or a key is there twice.
    """
    location = to_location(str(path))
    return _report([(location, row) for row in read_rows(location)], shown(location))


def read_lists(tree: Tree, names: Iterable[str]) -> PairReport:
    """Read several lists of one folder, each of which is a split by its name.

    Raises:
        InputError: see :func:`read_list`.
    """
    rows: list[tuple[Location, Row]] = []
    for name in names:
        location = to_location(f"{tree.root}/{name}")
        split = SPLIT_NAMES[name.rpartition(".")[0].lower()]
        rows += [
            (location, Row(row.line, row.image, row.mask, row.split or split, row.key))
            for row in read_rows(location)
        ]
    return _report(rows, tree.shown)


def read_rows(location: Location, *, as_written: bool = False) -> Iterator[Row]:
    """Yield the lines of a list.

    Args:
        location: of the list.
        as_written: of :func:`write_tables`: spaces around a path and line ends in it are its own;
            elsewhere they are slips of the one who wrote the list.

    Raises:
        InputError: it cannot be read, or a line cannot be understood.
    """
    try:
        with open_binary(location) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            if str(location).lower().endswith(".jsonl"):
                yield from _json_rows(text, location)
            else:
                yield from _csv_rows(text, location, as_written)
    except OSError as error:
        raise InputError(
            f"{shown(location)}: cannot be read ({error.strerror or error}); give another list"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{shown(location)}: is no text in UTF-8 ({error})") from error


def _csv_rows(text: io.TextIOWrapper, location: Location, as_written: bool) -> Iterator[Row]:
    first = text.readline(LONGEST_LINE)
    delimiter = next((mark for mark in ("\t", ";", ",") if mark in first), ",")
    lines = csv.reader(itertools.chain([first], text), delimiter=delimiter)
    columns: dict[str, int] | None = None
    for cells in lines:
        if not any(cells):
            continue
        if columns is None:
            named = _named([cell.strip().lower() for cell in cells])
            columns = named or {"image": 0, "mask": 1, "split": 2}
            if named:
                continue
        values = {name: cells[number] for name, number in columns.items() if number < len(cells)}
        if not as_written:
            values = {name: value.strip() for name, value in values.items()}
        yield _row(lines.line_num, values, location, as_written=as_written)


def _named(cells: list[str]) -> dict[str, int]:
    """Columns by the names in a first line; empty where it holds a pair already."""
    found = {
        name: cells.index(one) for name, known in COLUMNS.items() for one in known if one in cells
    }
    return found if {"image", "mask"} <= found.keys() else {}


def _json_rows(text: io.TextIOWrapper, location: Location) -> Iterator[Row]:
    for number, values in _json_values(text, location):
        yield _row(number, values, location)


def _json_values(
    text: Iterable[str], location: Location
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the number of each line that is not empty, and its values by column."""
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            lower = {str(name).lower(): value for name, value in found.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{shown(location)}, line {number}: is no JSON object such as "
                '{"image": "a.jpg", "mask": "a.png"}'
            ) from error
        yield (
            number,
            {
                name: str(lower[one])
                for name, known in COLUMNS.items()
                for one in known
                if lower.get(one) is not None
            },
        )


def _row(
    line: int, values: Mapping[str, str], location: Location, *, as_written: bool = False
) -> Row:
    where = f"{shown(location)}, line {line}"
    if not values.get("image"):
        raise InputError(f"{where}: names no image; give columns image, mask and split")
    if any("\0" in value for value in values.values()):
        raise InputError(f"{where}: holds a NUL character, which no path can have; correct it")
    if not as_written and any("\n" in value or "\r" in value for value in values.values()):
        raise InputError(f"{where}: a quotation mark is not closed; close or remove it")
    if (longest := max(map(len, values.values()))) > LONGEST_PATH:
        raise InputError(
            f"{where}: holds a path of {longest:,} characters; it has at most {LONGEST_PATH:,}"
        )
    split = values.get("split", "")
    if split and split.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: '{shorten(split)}' is no split; they are train, val and test")
    return Row(
        line,
        values["image"],
        values.get("mask", ""),
        SPLIT_NAMES.get(split.lower(), ""),
        values.get("key", ""),
    )


def _report(rows: list[tuple[Location, Row]], where: str) -> PairReport:
    whole = [(location, row) for location, row in rows if row.mask]
    alone = [to_location(_absolute(row.image, at)) for at, row in rows if not row.mask]
    if not whole:
        raise InputError(f"{where}: holds no pair; give lines of image, mask and split")
    keys, compact = _keys(whole), _Compact()
    images: list[Place] = []
    mattes: list[Place] = []
    for key, (at, row) in zip(keys, whole, strict=True):
        images.append(compact(key, _absolute(row.image, at)))
        mattes.append(compact(key, _absolute(row.mask, at)))
    table = PairTable(keys, images, mattes, [row.split for _, row in whole], ANY)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for one, other in itertools.pairwise(order):
        if keys[one] == keys[other]:
            at, row = whole[max(one, other)]
            raise InputError(
                f"{shown(at)}, line {row.line}: the key '{shorten(keys[one])}' is there twice; "
                "remove a line, or give a column 'key'"
            )
    table = table.chosen(order)
    check_keys_are_storable(table)
    return PairReport(table, alone, [])


def _keys(rows: list[tuple[Location, Row]]) -> list[str]:
    """Return the key of each line: its own, the image's stem, or its whole path."""
    stems = [_stem(row.image) for _, row in rows]
    if len(set(stems)) < len(stems):
        stems = [_stem(row.image, whole_path=True) for _, row in rows]
    return [row.key or stem for (_, row), stem in zip(rows, stems, strict=True)]


def _stem(path: str, whole_path: bool = False) -> str:
    stem, dot, _ = path.rpartition(".")
    stem = stem if dot else path
    if whole_path:
        return stem.removeprefix("./").strip("/").replace("://", "-").replace("/", "-")
    return stem.rpartition("/")[2]


def _absolute(path: str, of: Location) -> str:
    """Return a path of a list, which is relative to the list's folder."""
    if is_address(path) or os.path.isabs(path):
        return path
    return f"{str(of).rpartition('/')[0] or '.'}/{path.removeprefix('./')}"


class _Compact:
    """Places of files that share one object a folder, so that a path takes 8 bytes."""

    def __init__(self) -> None:
        self._folders: dict[tuple[str, str, str], Folder] = {}

    def __call__(self, key: str, path: str) -> Place:
        folder, _, name = path.rpartition("/")
        stem, dot, ending = name.rpartition(".")
        if not folder or not key.endswith(stem) or not stem:
            return path
        prefix, suffix = key[: len(key) - len(stem)], dot + ending
        group = folder.rpartition("/")[2]
        return self._folders.setdefault(
            (folder, prefix, suffix), Folder(folder, prefix, suffix, group)
        )


# The list of a prepared folder ------------------------------------------------------------------


def write_tables(tables: Mapping[str, PairTable]) -> Iterator[str]:
    """Yield the lines of a list of the pairs of each split, with their keys."""
    yield "key,split,image,mask\n"
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for split, table in tables.items():
        for key, image, matte in table.rows():
            line = f"{key},{split},{image},{matte}\n"
            plain = line.count(",") == 3 and line.count("\n") == 1
            if plain and '"' not in line and "\r" not in line:
                buffer.write(line)
            else:
                writer.writerow([key, split, image, matte])
            if buffer.tell() > 1 << 16:
                yield buffer.getvalue()
                buffer.seek(0)
                buffer.truncate()
    yield buffer.getvalue()


def read_tables(path: Path, splits: Iterable[str], masks: str) -> dict[str, PairTable]:
    """Read the list of a prepared folder: the pairs of each split, sorted by key.

    Raises:
        DamagedDataError: it is missing, or a line has no key or split.
    """
    columns: dict[str, tuple[list[str], list[Place], list[Place]]] = {
        split: ([], [], []) for split in splits
    }
    compact = _Compact()
    try:
        for row in read_rows(path, as_written=True):
            if not (row.key and row.split and row.mask):
                raise InputError(f"{path}, line {row.line}: has no key, split or mask")
            keys, images, mattes = columns[row.split]
            keys.append(row.key)
            images.append(compact(row.key, _absolute(row.image, path)))
            mattes.append(compact(row.key, _absolute(row.mask, path)))
    except InputError as error:
        raise DamagedDataError(f"{error}; run 'portrait-dist prepare' again") from error
    tables = {}
    for split, (keys, images, mattes) in columns.items():
        if any(one >= other for one, other in itertools.pairwise(keys)):
            raise DamagedDataError(
                f"{path}: its keys of {split} are not in order; run 'portrait-dist prepare' again"
            )
        tables[split] = PairTable(keys, images, mattes, masks=masks)
    return tables


# A split of one's own ---------------------------------------------------------------------------


def read_split_file(path: Path) -> dict[str, str]:
    """Read a split that somebody else made: the split of each key.

    A JSON object ``{"train": ["key", …], "val": […], "test": […]}``, such as split.json has it
    under ``splits``; or a CSV, TSV or JSONL with the columns ``key`` (or ``image``, whose stem is
    the key) and ``split``.

    Raises:
        InputError: it cannot be read or understood, gives a key to two splits, or names none.
    """
    if path.suffix.lower() == ".json":
        entries = _json_split(path)
    else:
        entries = _table_split(path)
    found: dict[str, str] = {}
    for key, split in entries:
        if found.setdefault(key, split) != split:
            raise InputError(
                f"{path}: gives '{shorten(key)}' to {found[key]} and to {split}; keep one"
            )
    if not found:  # not the same as no file: then the pairs are split by chance
        raise InputError(f"{path}: names no pair; give the keys of each split")
    return found


def _json_split(path: Path) -> Iterator[tuple[str, str]]:
    try:
        found = json.loads(read_regular(path, MOST_BYTES))
        found = found.get("splits", found)
        for name, keys in found.items():
            split = SPLIT_NAMES[name.lower()]
            yield from ((str(key), split) for key in keys)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f'{path}: is no split; write {{"train": ["key", …], "val": […], "test": […]}}'
        ) from error


def _table_split(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text in UTF-8 ({error.reason})") from error
    if path.suffix.lower() == ".jsonl":
        for number, values in _json_values(io.StringIO(text), path):
            key = values.get("key") or _stem(values.get("image", ""))
            if not key:
                raise InputError(f"{path}, line {number}: give a key and a split")
            yield _key_and_split(key, values.get("split", ""), path, number)
        return
    lines = [line for line in text.splitlines() if line.strip()]
    mark = next((one for one in ("\t", ";", ",") if lines and one in lines[0]), ",")
    rows = list(csv.reader(lines, delimiter=mark))
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    split_at = next((names.index(one) for one in COLUMNS["split"] if one in names), None)
    keys = (*COLUMNS["key"], *COLUMNS["image"])
    key_at = next((names.index(one) for one in keys if one in names), None)
    if split_at is None or key_at is None:
        split_at, key_at, first = 1, 0, 0
    else:
        first = 1
    for number, cells in enumerate(rows[first:], start=first + 1):
        if len(cells) <= max(split_at, key_at):
            raise InputError(f"{path}, line {number}: give a key and a split")
        key = cells[key_at].strip()
        yield _key_and_split(_stem(key) if "." in key else key, cells[split_at], path, number)


def _key_and_split(key: str, split: str, path: Path, line: int) -> tuple[str, str]:
    name = split.strip().lower()
    if name not in SPLIT_NAMES:
        raise InputError(
            f"{path}, line {line}: '{shorten(split)}' is no split; they are train, val and test"
        )
    return key, SPLIT_NAMES[name]
