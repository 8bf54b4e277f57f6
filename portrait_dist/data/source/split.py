"""Split the pairs into train, val and test, and write the arranged tree.

    DATA/split.json
    DATA/{train,val,test}/<key>.jpg
    DATA/{train,val,test}/<key>.png

The split is a pure function of the keys and the seed: the same on every machine, whatever order the
files were found in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from portrait_dist.data.source.pairs import Pair, PairReport, check_pairs, find_pairs
from portrait_dist.errors import DamagedDataError, InputError, nearest
from portrait_dist.files import (
    NO_LINKS,
    atomic_path,
    check_folder_writable,
    explained,
    lock_output,
    read_regular,
    write_text,
)
from portrait_dist.system.progress import track

SPLITS = ("train", "val", "test")
MANIFEST = "split.json"
FORMAT = 1
MOST_BYTES = 1 << 32
"""Of a split.json; a key of 24 bytes takes 30, so that is enough for 10^8 pairs."""
LONGEST_FILE_NAME = 255  # bytes, on the file systems of Linux


@dataclass(frozen=True)
class SplitSettings:
    """Settings that determine the split, besides the keys."""

    seed: int
    val_fraction: float
    test_fraction: float
    split_by: str


@dataclass(frozen=True)
class Split:
    """A prepared tree: its folder and what ``split.json`` says.

    Args:
        data: the folder.
        source: the raw tree it was made from, as it was named then.
        splits: the sorted keys of ``train``, ``val`` and ``test``.
        settings: None for a split.json that was not written by ``prepare``.
    """

    data: Path
    source: str
    splits: dict[str, list[str]]
    settings: SplitSettings | None = None

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

    def pairs(self, split: str) -> list[Pair]:
        """Return the pairs of a split in key order.

        The group is the part of the key before its first dash, as AISegment names files.
        """
        return [
            Pair(key, *pair_paths(self.data, split, key), group=key.partition("-")[0])
            for key in self.keys(split)
        ]


def pair_paths(data: Path, split: str, key: str) -> tuple[Path, Path]:
    """Return the image and matte file of one pair in a prepared tree."""
    return data / split / f"{key}.jpg", data / split / f"{key}.png"


def assign(
    keys: Sequence[str],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    groups: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Assign keys to train, val and test.

    Keys are ranked by the sha256 of ``"<seed>:<key>"``; val takes the first int(val_fraction * n),
    test the next int(test_fraction * n), train the rest. With groups, whole groups are ranked and
    assigned, so sizes are only near to that.

    Args:
        keys: of all pairs, in any order.
        seed: another one gives another split.
        val_fraction: of the pairs, in [0, 1).
        test_fraction: likewise.
        groups: one for each key.

    Returns:
        The keys of each split, sorted.

    Raises:
        InputError: fractions that leave no training pair, or too few groups.
    """
    _check_fractions(val_fraction, test_fraction)
    sizes = {"val": int(val_fraction * len(keys)), "test": int(test_fraction * len(keys))}
    if groups is None:
        ranked = _ranked(keys, seed)
        first, last = sizes["val"], sizes["val"] + sizes["test"]
        assigned = {"train": ranked[last:], "val": ranked[:first], "test": ranked[first:last]}
    else:
        split_of = _assign_groups(Counter(groups), seed, sizes)
        assigned = {
            name: [key for key, group in zip(keys, groups, strict=True) if split_of[group] == name]
            for name in SPLITS
        }
    return {name: sorted(assigned[name]) for name in SPLITS}


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise InputError(
            f"--val-fraction {val_fraction} --test-fraction {test_fraction}: "
            "each is at least 0, and both together are below 1"
        )


def _ranked(names: Sequence[str], seed: int) -> list[str]:
    return sorted(
        names, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name)
    )


def _assign_groups(counts: Counter[str], seed: int, sizes: dict[str, int]) -> dict[str, str]:
    """Split of each group, so that no group is in two splits and no wanted split is empty."""
    wanted = [name for name in ("val", "test") if sizes[name]]
    if len(counts) <= len(wanted):
        raise InputError(
            f"--split-by group: there are {len(counts)} groups for {len(wanted) + 1} splits; "
            "use --split-by sample"
        )
    ranked = _ranked(list(counts), seed)
    largest = max(ranked, key=lambda group: counts[group])
    others = [group for group in ranked if group != largest]
    split_of = {largest: "train"} | _fill(others, counts, sizes, wanted)
    _move_into_empty(split_of, others, counts, wanted)
    return split_of


def _fill(
    groups: list[str], counts: Counter[str], sizes: dict[str, int], wanted: list[str]
) -> dict[str, str]:
    """Give each group to val, or else test, where that brings the split nearer to its size."""
    split_of: dict[str, str] = {}
    filled: Counter[str] = Counter()
    for group in groups:
        nearer = [name for name in wanted if filled[name] + counts[group] / 2 <= sizes[name]]
        split_of[group] = nearer[0] if nearer else "train"
        filled[split_of[group]] += counts[group]
    return split_of


def _move_into_empty(
    split_of: dict[str, str], groups: list[str], counts: Counter[str], wanted: list[str]
) -> None:
    """Give a split that stayed empty the smallest group that another can spare, in place."""
    for name in wanted:
        groups_in = Counter(split_of.values())
        if not groups_in[name]:
            spare = [group for group in groups if groups_in[split_of[group]] > 1]
            split_of[min(spare, key=lambda group: counts[group])] = name


def read_split(data: str | Path) -> Split:
    """Open a prepared tree.

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
        data: the folder it is in.

    Raises:
        InputError: a newer format, or a key that is no file name.
        DamagedDataError: anything else that ``prepare`` does not write.
    """
    path = data / MANIFEST
    try:
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("format"), int):
            if found["format"] != FORMAT:
                raise InputError(
                    f"{path}: format {found['format']} is newer than this program knows; "
                    "update portrait-dist"
                )
            split = Split(data, _text(found.get("source", "")), _keys(found), _settings(found))
        else:
            raise ValueError("no format")
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


def _text(value: Any) -> str:
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
    raw: Path,
    out: Path,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 1,
    split_by: str = "sample",
    mode: str = "link",
) -> tuple[Split, PairReport]:
    """Find, check, split and arrange the pairs of a raw tree.

    Args:
        raw: a raw AISegment tree.
        out: folder to write, whole or not at all; new, empty, or of the same command, which then
            adds what is missing.
        val_fraction: of the pairs, rounded down.
        test_fraction: likewise.
        seed: of the split.
        split_by: ``sample``, or ``group`` for whole groups.
        mode: ``link`` for hard links where the file system allows, or ``copy``.

    Raises:
        InputError: wrong options, tree, pair, or an ``out`` that holds something else.
        DamagedDataError: a truncated or unreadable file.
    """
    report = find_pairs(raw)
    groups = [pair.group for pair in report.pairs] if split_by == "group" else None
    splits = assign([pair.key for pair in report.pairs], seed, val_fraction, test_fraction, groups)
    settings = SplitSettings(seed, val_fraction, test_fraction, split_by)
    split = Split(Path(os.path.realpath(out)), str(raw), splits, settings)
    again = _is_there(split)
    check_folder_writable(split.data)
    check_pairs(report.pairs)
    with explained(split.data):
        if not again:
            _build(report.pairs, split, mode)
        else:
            _arrange(report.pairs, split, split.data, mode)
    return split, report


def _is_there(split: Split) -> bool:
    """Return True where the tree was made with these settings, False where there is nothing yet.

    Raises:
        InputError: something else is there.
    """
    out = split.data
    with explained(out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out}: already holds something else; give a new folder as --out")
    before = read_split(out)
    if before.settings != split.settings:
        raise InputError(f"{out}: {_difference(before.settings, split.settings)}")
    if before.splits != split.splits:
        raise InputError(
            f"{out}: was prepared from other pairs (source {before.source}); give another --out"
        )
    return True


def _difference(before: SplitSettings | None, now: SplitSettings | None) -> str:
    if before is None or now is None:
        return "its split.json is not from 'portrait-dist prepare'; give another --out"
    for name, value in asdict(now).items():
        if (old := getattr(before, name)) != value:
            option = name.replace("_", "-")
            return f"was prepared with --{option} {old}, not {value}; use that, or another --out"
    raise AssertionError


def _build(pairs: Sequence[Pair], split: Split, mode: str) -> None:
    """Build the tree in a hidden folder, then rename it."""
    out = split.data
    part = _hidden_folder(out)
    part.mkdir(parents=True, exist_ok=True)
    with lock_output(part, "prepare", out):
        try:
            for leftover in part.iterdir():  # of a run that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            _arrange(pairs, split, part, mode)
            write_text(part / MANIFEST, _to_json(split))
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _hidden_folder(out: Path) -> Path:
    """Return the folder where ``out`` is built, always the same: a second process meets it."""
    name = f".{out.name}.part"
    if len(os.fsencode(name)) > LONGEST_FILE_NAME:
        name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:32]}.part"
    return out.with_name(name)


def _to_json(split: Split) -> str:
    assert split.settings
    content = {
        "format": FORMAT,
        **asdict(split.settings),
        "source": split.source,
        "splits": split.splits,
    }
    return json.dumps(content, indent=1) + "\n"


def _arrange(pairs: Sequence[Pair], split: Split, data: Path, mode: str) -> None:
    """Link or copy each file to where it belongs, unless it is there."""
    split_of = {key: name for name in SPLITS for key in split.splits[name]}
    for name in SPLITS:
        (data / name).mkdir(parents=True, exist_ok=True)
    for pair in track(pairs, total=len(pairs), what="pairs"):
        image, matte = pair_paths(data, split_of[pair.key], pair.key)
        link_or_copy(pair.image, image, mode)
        link_or_copy(pair.matte, matte, mode)


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
