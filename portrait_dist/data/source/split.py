"""Deals the pairs to train, val and test, and writes the arranged tree.

    DATA/split.json
    DATA/{train,val,test}/<key>.jpg
    DATA/{train,val,test}/<key>.png

The split is a pure function of the keys and the seed: the same on every machine, whatever order the files were found in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portrait_dist.data.source.pairs import Pair, PairReport, check_pairs, find_pairs
from portrait_dist.errors import DamagedDataError, InputError, nearest
from portrait_dist.files import lock_output
from portrait_dist.system.progress import track

SPLITS = ("train", "val", "test")
MANIFEST = "split.json"


def assign(
    keys: Sequence[str],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    groups: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Deal keys to train, val and test.

    Keys are ranked by the sha256 of ``"<seed>:<key>"``; val takes the first int(val_fraction * n), test the next
    int(test_fraction * n), train the rest. With ``groups`` (one for each key) whole groups are ranked and dealt, so sizes are
    only near to that.

    Returns:
        The keys of each split, sorted.

    Raises:
        InputError: fractions that leave no training pair, or too few groups.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise InputError(
            f"--val-fraction {val_fraction} --test-fraction {test_fraction}: each is at least 0, and both together are below 1"
        )
    sizes = {"val": int(val_fraction * len(keys)), "test": int(test_fraction * len(keys))}
    if groups is None:
        ranked = _ranked(keys, seed)
        last = sizes["val"] + sizes["test"]
        dealt = {
            "train": ranked[last:],
            "val": ranked[: sizes["val"]],
            "test": ranked[sizes["val"] : last],
        }
    else:
        split_of = _deal_groups(Counter(groups), seed, sizes)
        dealt = {
            name: [key for key, group in zip(keys, groups, strict=True) if split_of[group] == name]
            for name in SPLITS
        }
    return {name: sorted(dealt[name]) for name in SPLITS}


def _ranked(names: Sequence[str], seed: int) -> list[str]:
    return sorted(
        names, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name)
    )


def _deal_groups(counts: Counter[str], seed: int, sizes: dict[str, int]) -> dict[str, str]:
    """Split of each group.

    The largest group is train's. Each other goes to val, or else test, where that brings the split nearer to its size, and to
    train where it does not. A split left empty takes the smallest group that another can spare.
    """
    wanted = [name for name in ("val", "test") if sizes[name]]
    if len(counts) <= len(wanted):
        raise InputError(
            f"--split-by group: there are {len(counts)} groups for {len(wanted) + 1} splits; use --split-by sample"
        )
    ranked = _ranked(list(counts), seed)
    largest = max(ranked, key=lambda group: counts[group])
    split_of = {largest: "train"}
    filled: Counter[str] = Counter()
    for group in ranked:
        if group != largest:
            nearer = [name for name in wanted if filled[name] + counts[group] / 2 <= sizes[name]]
            split_of[group] = nearer[0] if nearer else "train"
            filled[split_of[group]] += counts[group]
    for name in wanted:
        groups_in = Counter(split_of.values())
        if not groups_in[name]:
            spare = [
                group for group in ranked if groups_in[split_of[group]] > 1 and group != largest
            ]
            split_of[min(spare, key=lambda group: counts[group])] = name
    return split_of


@dataclass(frozen=True)
class Split:
    """A prepared tree: its folder and what ``split.json`` says."""

    data: Path
    manifest: dict[str, Any]

    @property
    def source(self) -> str:
        """The raw tree it was made from, as it was named then."""
        return str(self.manifest.get("source", ""))

    def keys(self, split: str) -> list[str]:
        """Sorted keys of ``train``, ``val`` or ``test``."""
        if split not in SPLITS:
            raise InputError(
                f"no split '{split}'.{nearest(split, list(SPLITS))} There are {', '.join(SPLITS)}"
            )
        keys: list[str] = self.manifest["splits"][split]
        return keys

    def pairs(self, split: str) -> list[Pair]:
        """Pairs of a split in key order. The group is the part of the key before its first dash, as AISegment names files."""
        return [
            Pair(key, *pair_paths(self.data, split, key), group=key.partition("-")[0])
            for key in self.keys(split)
        ]


def pair_paths(data: Path, split: str, key: str) -> tuple[Path, Path]:
    """Image and matte of one pair in a prepared tree."""
    return data / split / f"{key}.jpg", data / split / f"{key}.png"


def read_split(data: str | Path) -> Split:
    """Open a prepared tree.

    Raises:
        InputError: not a folder that ``portrait-dist prepare`` wrote.
        DamagedDataError: its split.json cannot be read.
    """
    data = Path(data)
    path = data / MANIFEST
    if not path.is_file():
        raise InputError(_not_prepared(data))
    try:
        manifest = json.loads(path.read_text())
        known = manifest["format"]
        complete = all(isinstance(manifest["splits"][name], list) for name in SPLITS)
    except (ValueError, KeyError, TypeError, OSError):
        complete, known = False, 1
    if not complete:
        raise DamagedDataError(
            f"{path}: damaged; remove {data} and run 'portrait-dist prepare' again"
        )
    if known != 1:
        raise InputError(
            f"{path}: format {known} is newer than this program knows; update portrait-dist"
        )
    return Split(data, manifest)


def _not_prepared(data: Path) -> str:
    if not data.is_dir():
        return f"{data}: there is no such folder; give one that 'portrait-dist prepare' wrote"
    if (data / "clip_img").is_dir():
        return f"{data}: is a raw tree; run 'portrait-dist prepare --raw {data} --out DIR' and give that DIR"
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

    The tree is built in a hidden folder beside ``out`` and renamed, so ``out`` is whole or not there. Run again with the same
    settings it adds what is missing and changes nothing else.

    Args:
        raw: a raw AISegment tree.
        out: folder to write; new, empty, or written by the same command.
        split_by: ``sample``, or ``group`` to keep a group in one split.
        mode: ``link`` makes hard links where the file system allows and copies otherwise; ``copy`` always copies.

    Raises:
        InputError: wrong options, tree, pair, or an ``out`` that holds something else.
        DamagedDataError: a truncated or unreadable file.
    """
    report = find_pairs(raw)
    groups = [pair.group for pair in report.pairs] if split_by == "group" else None
    splits = assign([pair.key for pair in report.pairs], seed, val_fraction, test_fraction, groups)
    manifest = {
        "format": 1,
        "seed": seed,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "split_by": split_by,
        "source": str(raw),
        "splits": splits,
    }
    out = out.resolve()
    again = _is_same(out, manifest)
    check_pairs(report.pairs)
    if again:
        _arrange(report.pairs, out, splits, mode)
    else:
        _build(report.pairs, out, manifest, mode)
    return Split(out, manifest), report


def _is_same(out: Path, manifest: dict[str, Any]) -> bool:
    """True where ``out`` was made with these settings, False where there is nothing yet; else InputError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out}: already holds something else; give a new folder as --out")
    before = read_split(out).manifest
    for name in ("seed", "val_fraction", "test_fraction", "split_by"):
        if before.get(name) != manifest[name]:
            option = name.replace("_", "-")
            raise InputError(
                f"{out}: was prepared with --{option} {before.get(name)}, not {manifest[name]}; use that, or another --out"
            )
    if before["splits"] != manifest["splits"]:
        raise InputError(
            f"{out}: was prepared from other pairs (source {before.get('source')}); give another --out"
        )
    return True


def _build(pairs: Sequence[Pair], out: Path, manifest: dict[str, Any], mode: str) -> None:
    part = out.with_name(f".{out.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        with lock_output(part, "prepare", out):
            try:
                for left in part.iterdir():  # of a run that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                _arrange(pairs, part, manifest["splits"], mode)
                (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
                part.rename(out)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); give a folder of yours, with room, as --out"
        ) from error


def _arrange(pairs: Sequence[Pair], data: Path, splits: dict[str, list[str]], mode: str) -> None:
    """Link or copy each file to its place, unless it is there."""
    split_of = {key: name for name in SPLITS for key in splits[name]}
    for name in SPLITS:
        (data / name).mkdir(parents=True, exist_ok=True)
    for pair in track(pairs, total=len(pairs), what="pairs"):
        image, matte = pair_paths(data, split_of[pair.key], pair.key)
        place(pair.image, image, mode)
        place(pair.matte, matte, mode)


def place(source: Path, target: Path, mode: str) -> None:
    """Make ``target`` the same file as ``source``, or a copy; a copy appears whole or not at all.

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
        except OSError as error:  # another file system, one without links, a file of another user, too many links
            if error.errno not in (
                errno.EXDEV,
                errno.EPERM,
                errno.EACCES,
                errno.EMLINK,
                errno.ENOTSUP,
                errno.ENOSYS,
            ):
                raise
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)
