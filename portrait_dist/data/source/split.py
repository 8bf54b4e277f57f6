"""Split the pairs into train, val and test, and write the prepared folder.

    DATA/split.json                          settings, and the keys of each split
    DATA/{train,val,test}/<key>.jpg          the files, linked or copied
    DATA/{train,val,test}/<key>.png
    DATA/pairs.csv                           where the files are, if they are not there or have
                                             other types; then split.json holds no keys

The split is a pure function of the keys and the seed: the same on every machine, whatever order the
files were found in. A source that says it for itself, or a user's own file, has the first word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portrait_dist.data.source import lists
from portrait_dist.data.source.assignment import SPLITS, assigned_splits
from portrait_dist.data.source.layouts import find_pairs, is_source
from portrait_dist.data.source.locations import suffix_of
from portrait_dist.data.source.pairs import (
    ALPHA,
    ANY,
    Pair,
    PairReport,
    PairTable,
    Place,
    check_pairs,
)
from portrait_dist.errors import DamagedDataError, InputError, nearest, shorten
from portrait_dist.files import (
    NO_LINKS,
    atomic_open,
    atomic_path,
    check_folder_writable,
    explained,
    lock_output,
    read_regular,
    write_text,
)
from portrait_dist.system.address import is_address, redact
from portrait_dist.system.progress import track

MANIFEST = "split.json"
PAIRS = "pairs.csv"
FORMAT = 1
FORMAT_WITH_PAIRS = 2
"""Of a folder with pairs.csv."""
MOST_BYTES = 1 << 32
"""Of a split.json; a key of 24 bytes takes 30, so that is enough for 10^8 pairs."""
LONGEST_FILE_NAME = 255  # bytes, on the file systems of Linux
GIVEN = "given"
REFERENCE = "reference"
VAL_FRACTION = TEST_FRACTION = 0.1
SEED = 1


@dataclass(frozen=True)
class SplitSettings:
    """Settings that determine the split, besides the keys."""

    seed: int
    val_fraction: float
    test_fraction: float
    split_by: str


@dataclass(frozen=True)
class Split:
    """A prepared folder, or a source that is used as it is.

    Args:
        data: the folder, list or address.
        source: the raw tree it was made from, as it was named then.
        splits: the sorted keys of ``train``, ``val`` and ``test``.
        settings: None for a split.json that was not written by ``prepare``.
        tables: where the files of each split are; None where they lie in ``data`` by their keys.
        masks: kind of the masks, ``alpha`` or ``any``.
    """

    data: Path | str
    source: str
    splits: dict[str, list[str]]
    settings: SplitSettings | None = None
    tables: Mapping[str, PairTable] | None = None
    masks: str = ALPHA

    def keys(self, split: str) -> list[str]:
        """Return the sorted keys of ``train``, ``val`` or ``test``.

        Raises:
            InputError: no such split.
        """
        if split not in SPLITS:
            raise InputError(
                f"no split '{split}'.{nearest(split, list(SPLITS))} There are {', '.join(SPLITS)}"
            )
        return self.splits[split]

    def pair(self, split: str, key: str) -> Pair:
        """Return one pair of a split.

        The group is the part of the key before its first dash, as AISegment names files.
        """
        group = key.partition("-")[0]
        if self.tables is None:
            return Pair(key, *pair_paths(Path(self.data), split, key), group, self.masks)
        found = self.tables[split][self.tables[split].position(key)]
        return Pair(key, found.image, found.matte, group, self.masks)

    def pairs(self, split: str) -> list[Pair]:
        """Return the pairs of a split in key order."""
        return [self.pair(split, key) for key in self.keys(split)]


def pair_paths(data: Path, split: str, key: str) -> tuple[Path, Path]:
    """Return the image and matte file of one pair in a prepared tree."""
    return data / split / f"{key}.jpg", data / split / f"{key}.png"


def read_split(data: str | Path) -> Split:
    """Open a prepared folder.

    Raises:
        InputError: not a folder that ``portrait-dist prepare`` wrote, or a key that is no file
            name.
        DamagedDataError: its split.json cannot be read.
    """
    data = Path(data)
    path = data / MANIFEST
    try:
        text = read_regular(path, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_not_prepared(data)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_split(text, data)


def parse_split(text: bytes, data: Path) -> Split:
    """Validate the content of a split.json; the only way in.

    Args:
        text: the file's content.
        data: the folder it is in; its pairs.csv is read where split.json says that there is one.

    Raises:
        InputError: a newer format, or a key that is no file name.
        DamagedDataError: anything else that ``prepare`` does not write.
    """
    path = data / MANIFEST
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("format"), int):
            raise ValueError("no format")
        if found["format"] not in (FORMAT, FORMAT_WITH_PAIRS):
            raise InputError(
                f"{path}: format {found['format']} is newer than this program knows; "
                "update portrait-dist"
            )
        split = _parsed(found, data)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedDataError(
            f"{path}: damaged; remove {data} and run 'portrait-dist prepare' again"
        ) from error
    for name in SPLITS:
        for key in split.splits[name]:
            if not key or not key.isprintable() or set("/\\") & set(key) or key in (".", ".."):
                raise InputError(
                    f"{path}, {name}: the key {key[:100]!r} cannot be a file name; "
                    "run 'portrait-dist prepare' again"
                )
    return split


def _parsed(found: dict[str, Any], data: Path) -> Split:
    """Build a split of fields that are checked.

    Raises:
        ValueError, KeyError, TypeError: a field is missing or wrong.
    """
    source, settings = _text(found.get("source", "")), _settings(found)
    if found["format"] == FORMAT:
        return Split(data, source, _keys(found), settings)
    masks, counts = found["masks"], {name: int(found["pairs"][name]) for name in SPLITS}
    if masks not in (ALPHA, ANY):
        raise ValueError("an unknown kind of masks")
    tables = lists.read_tables(data / PAIRS, SPLITS, masks)
    if counts != {name: len(table) for name, table in tables.items()}:
        raise ValueError("other numbers of pairs")
    keys = {name: table.keys for name, table in tables.items()}
    return Split(data, source, keys, settings, tables, masks)


def open_data(data: str | Path) -> Split:
    """Open a prepared folder, or any source that ``prepare`` takes, with its default split.

    Raises:
        InputError: neither of both.
        DamagedDataError: a split.json or pairs.csv that cannot be read.
        UnreachableError: the address does not answer.
    """
    prepared = not is_address(data) and (Path(data) / MANIFEST).exists()
    if prepared or not is_source(data):
        return read_split(data)
    root = str(data) if is_address(data) else os.path.abspath(data)
    made, _ = _split_of(
        find_pairs(root), root, root, SplitSettings(SEED, VAL_FRACTION, TEST_FRACTION, ""), {}
    )
    return made


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _keys(found: dict[str, Any]) -> dict[str, list[str]]:
    splits = {name: found["splits"][name] for name in SPLITS}
    for keys in splits.values():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise TypeError("the keys of a split are no list of texts")
    return splits


def _settings(found: dict[str, Any]) -> SplitSettings | None:
    if "seed" not in found:
        return None
    return SplitSettings(
        int(found["seed"]),
        float(found["val_fraction"]),
        float(found["test_fraction"]),
        _text(found["split_by"]),
    )


def _not_prepared(data: Path) -> str:
    if not data.is_dir():
        return f"{data}: there is no such folder; give one that 'portrait-dist prepare' wrote"
    if (data / "clip_img").is_dir():
        return (
            f"{data}: is a raw tree; "
            f"run 'portrait-dist prepare --raw {data} --out DIR' and give that DIR"
        )
    if (data / "manifest.json").is_file():
        return f"{data}: holds shards; give the folder that 'portrait-dist prepare' wrote"
    return f"{data}: no {MANIFEST} in it; give a folder that 'portrait-dist prepare' wrote"


def prepare(
    raw: str | Path,
    out: Path,
    *,
    val_fraction: float = VAL_FRACTION,
    test_fraction: float = TEST_FRACTION,
    seed: int = SEED,
    split_by: str | None = None,
    mode: str | None = None,
    split_file: Path | None = None,
    names: Path | None = None,
    check: bool | None = None,
) -> tuple[Split, PairReport]:
    """Find, check and split the pairs of a source, and arrange or list them.

    Args:
        raw: a source of any layout, see :mod:`portrait_dist.data.source.layouts`.
        out: folder to write, whole or not at all; new, empty, or of the same command.
        val_fraction: of the pairs whose split nobody gives, rounded down.
        test_fraction: likewise.
        seed: of the split.
        split_by: ``sample``, ``group`` or ``given``; None: given where the source says it.
        mode: ``link``, ``copy``, or ``reference`` to list the files where they are.
        split_file: see :func:`.lists.read_split_file`; pairs that it does not name are not used.
        names: a file that names the files below ``raw``, one a line, in place of listing it.
        check: read headers and ends of all files; None: unless ``mode`` is ``reference``.

    Raises:
        InputError, DamagedDataError: wrong options, source, pair or ``out``; a damaged file.
    """
    mode, folder = _mode_for(raw, mode), Path(os.path.realpath(out))
    given = lists.read_split_file(split_file) if split_file else {}
    settings = SplitSettings(seed, val_fraction, test_fraction, split_by or "")
    report = find_pairs(_written_down(raw, mode), names, str(raw))
    split, report.pairs = _split_of(report, folder, redact(str(raw)), settings, given)
    split = _where_prepared(split, mode)
    _check_and_write(report.pairs, split, mode, check)
    return split, report


def _check_and_write(pairs: PairTable, split: Split, mode: str, check: bool | None) -> None:
    """Check the folder, then the files, then arrange or list the pairs."""
    # The folder first: reading the files of 34,000 pairs takes minutes, which must not be in vain.
    again = _is_there(split)
    check_folder_writable(Path(split.data))
    if check or (check is None and mode != REFERENCE):
        check_pairs(pairs)
    _write(pairs, split, mode, again)


def _mode_for(raw: str | Path, mode: str | None) -> str:
    """Return what is done with the files."""
    chosen = mode or (REFERENCE if is_address(raw) else "link")
    if chosen != REFERENCE and is_address(raw):
        raise InputError(f"--mode {mode}: the files are at an address; use --mode {REFERENCE}")
    return chosen


def _written_down(raw: str | Path, mode: str) -> str | Path:
    """Return the source as it is searched: by its absolute path where paths are written down."""
    return os.path.abspath(raw) if mode == REFERENCE and not is_address(raw) else raw


def _write(pairs: PairTable, split: Split, mode: str, again: bool) -> None:
    """Build the folder, or add what is missing of one that is there."""
    with explained(split.data):
        if again:
            _arrange(pairs, split, Path(split.data), mode)
        else:
            _build(pairs, split, mode)


def _split_of(
    report: PairReport,
    data: Path | str,
    source: str,
    settings: SplitSettings,
    given: Mapping[str, str],
) -> tuple[Split, PairTable]:
    """Split what was found; also the pairs that are used.

    Args:
        report: what was found; keys that ``given`` does not name are noted there.
        data: where the split will be.
        source: what was searched, for messages.
        settings: with an empty ``split_by`` the source decides.
        given: split of each key, from a user's file; empty for none.

    Raises:
        InputError: ``given`` names keys that are not there, or nothing is left for training.
    """
    table = _named_in(given, report) if given else report.pairs
    settings, numbers = _split_numbers(table, settings, bool(given))
    tables = {
        name: table.chosen(np.flatnonzero(numbers == number)) for number, name in enumerate(SPLITS)
    }
    if not len(tables["train"]):
        raise InputError(f"{source}: nothing is left for training; give another split")
    keys = {name: part.keys for name, part in tables.items()}
    return Split(data, source, keys, settings, tables, table.masks), table


def _split_numbers(
    table: PairTable, settings: SplitSettings, own: bool
) -> tuple[SplitSettings, NDArray[np.uint8]]:
    """Return the settings as they were decided, and the number of each pair's split.

    Args:
        table: the pairs.
        settings: with an empty ``split_by`` the table decides.
        own: its splits are those of a user's file.
    """
    splits = [table.split(index) for index in range(len(table))]
    by = settings.split_by or (GIVEN if any(splits) else "sample")
    if by != GIVEN and own:
        raise InputError(f"--split-by {by} with --split-file: leave --split-by out")
    free = np.array([by != GIVEN or not split for split in splits], dtype=bool)
    numbers = np.array([SPLITS.index(split) if split else 0 for split in splits], np.uint8)
    del splits  # 10^6 of them are 8 MB
    some = table if free.all() else table.chosen(np.flatnonzero(free))
    groups = [some.group(index) for index in range(len(some))] if by == "group" else None
    fractions = (settings.val_fraction, settings.test_fraction)
    numbers[free] = assigned_splits(some.keys, settings.seed, *fractions, groups)
    return replace(settings, split_by=by), numbers


def _named_in(given: Mapping[str, str], report: PairReport) -> PairTable:
    """Return the pairs that a user's split names, with their splits."""
    table = report.pairs
    unknown = [key for key in given if not table.has(key)]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(
            f"--split-file: names '{shorten(unknown[0])}'{more}, which is no pair of the source; "
            "remove it"
        )
    used = [index for index, key in enumerate(table.keys) if key in given]
    report.not_in_split_file = [key for key in table.keys if key not in given]
    chosen = table.chosen(used)
    chosen.splits = [given[key] for key in chosen.keys]
    return chosen


def _where_prepared(split: Split, mode: str) -> Split:
    """Return the split with its files where they will be."""
    assert split.tables is not None
    tables: Mapping[str, PairTable] | None = split.tables
    if mode != REFERENCE:
        if split.masks == ALPHA:
            tables = None
        else:
            tables = {name: _arranged(name, part) for name, part in split.tables.items()}
    return Split(split.data, split.source, split.splits, split.settings, tables, split.masks)


def _arranged(split: str, table: PairTable) -> PairTable:
    """Return where the files of a split are linked: ``<split>/<key><suffix>``."""
    images: list[Place] = []
    mattes: list[Place] = []
    for pair in table:
        image, matte = suffix_of(pair.image), suffix_of(pair.matte)
        images.append(f"{split}/{pair.key}{image}")
        mattes.append(f"{split}/{pair.key}{'.mask' if matte == image else ''}{matte}")
    return PairTable(table.keys, images, mattes, masks=table.masks)


def _is_there(split: Split) -> bool:
    """Return True where the tree was made with these settings, False where there is nothing yet.

    Raises:
        InputError: something else is there.
    """
    out = Path(split.data)
    with explained(out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out}: already holds something else; give a new folder as --out")
    before = read_split(out)
    if before.settings != split.settings:
        raise InputError(f"{out}: {_difference(before.settings, split.settings)}")
    if before.splits != split.splits or not _same_files(before, split):
        raise InputError(
            f"{out}: was prepared from other pairs (source {before.source}) or with another "
            "--mode; give another --out"
        )
    return True


def _same_files(before: Split, now: Split) -> bool:
    """Whether pairs.csv is what would be written."""
    if before.tables is None or now.tables is None:
        return before.tables is now.tables
    written = (Path(before.data) / PAIRS).read_bytes()
    return written == b"".join(line.encode() for line in lists.write_tables(now.tables))


def _difference(before: SplitSettings | None, now: SplitSettings | None) -> str:
    if before is None or now is None:
        return "its split.json is not from 'portrait-dist prepare'; give another --out"
    for name, value in asdict(now).items():
        if (old := getattr(before, name)) != value:
            option = name.replace("_", "-")
            return f"was prepared with --{option} {old}, not {value}; use that, or another --out"
    raise AssertionError


def _build(pairs: PairTable, split: Split, mode: str) -> None:
    """Build the tree in a hidden folder, then rename it."""
    out = Path(split.data)
    part = _hidden_folder(out)
    part.mkdir(parents=True, exist_ok=True)
    with lock_output(part, "prepare", out):
        # Another process may have ended meanwhile: what is locked here is then its renamed folder,
        # or a new one of its old name.
        if _is_there(split):
            with contextlib.suppress(OSError):
                part.rmdir()
            _arrange(pairs, split, out, mode)
            return
        try:
            for leftover in part.iterdir():  # of a run that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            _arrange(pairs, split, part, mode)
            if split.tables is not None:
                with atomic_open(part / PAIRS) as file:
                    for text in lists.write_tables(split.tables):
                        file.write(text.encode())
            write_text(part / MANIFEST, _to_json(split))
            part.rename(out)
        except BaseException:  # not after the rename: the name may be another process's by then
            shutil.rmtree(part, ignore_errors=True)
            raise


def _hidden_folder(out: Path) -> Path:
    """Return the folder where ``out`` is built, always the same: a second process meets it."""
    name = f".{out.name}.part"
    if len(os.fsencode(name)) > LONGEST_FILE_NAME:
        name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:32]}.part"
    return out.with_name(name)


def _to_json(split: Split) -> str:
    assert split.settings
    content: dict[str, Any] = {
        "format": FORMAT,
        **asdict(split.settings),
        "source": split.source,
    }
    if split.tables is None:
        content["splits"] = split.splits
    else:
        content["format"] = FORMAT_WITH_PAIRS
        content["masks"] = split.masks
        content["pairs"] = {name: len(keys) for name, keys in split.splits.items()}
    return json.dumps(content, indent=1) + "\n"


def _arrange(pairs: PairTable, split: Split, data: Path, mode: str) -> None:
    """Link or copy each file to where it belongs, unless it is there."""
    if mode == REFERENCE:
        return
    for name in SPLITS:
        (data / name).mkdir(parents=True, exist_ok=True)
    for name, keys in split.splits.items():
        for key in track(keys, total=len(keys), what=f"{name} pairs"):
            pair = pairs[pairs.position(key)]
            image, matte = pair_paths(data, name, key)
            if split.tables is not None:
                image, matte = (data / place for place in split.tables[name].paths(key))
            for source, target in ((pair.image, image), (pair.matte, matte)):
                assert isinstance(source, Path)
                link_or_copy(source, target, mode)


def link_or_copy(source: Path, target: Path, mode: str) -> None:
    """Make ``target`` the same file as ``source``, or a copy that appears whole or not at all.

    Args:
        source: an existing file.
        target: the file that appears, unless it is there with the same size.
        mode: ``link`` or ``copy``, as in :func:`prepare`.

    Raises:
        InputError: ``target`` exists and has another size.
    """
    if target.exists():
        if target.stat().st_size != source.stat().st_size:
            raise InputError(f"{target}: is not the same file as {source}; give another --out")
        return
    if mode == "link":
        try:
            os.link(source.resolve(), target)
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
