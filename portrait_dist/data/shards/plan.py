"""Plan the shards of a prepared tree: a pure function of its keys and of the samples per shard.

The plan is the same on every machine, so that any number of them can each write a part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass

from portrait_dist.data.shards.encode import Settings, StoredPair
from portrait_dist.data.shards.format import LONGEST_NAME, SUFFIXES
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.locations import Location, size_of
from portrait_dist.data.source.pairs import Pair
from portrait_dist.data.source.split import Split
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.system.threads import map_in_order

STAT_THREADS = 4
"""Threads that ask for the sizes of files: an address answers each in milliseconds."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be written: name, split, and its keys in order."""

    name: str
    split: str
    keys: list[str]

    @property
    def index_name(self) -> str:
        """File name of the shard's index."""
        return self.name.removesuffix(".tar") + ".index"


def plan_shards(split: Split, samples_per_shard: int) -> list[ShardPlan]:
    """Plan all shards, in the order of the splits and of the keys in each."""
    return [
        ShardPlan(f"{name}-{number:05d}.tar", name, keys[start : start + samples_per_shard])
        for name in SPLITS
        for keys in [split.keys(name)]
        for number, start in enumerate(range(0, len(keys), samples_per_shard))
    ]


def part_of(plans: list[ShardPlan], index: int, count: int) -> list[ShardPlan]:
    """Return the shards whose number, over all splits, is ``index`` modulo ``count``."""
    return plans[index::count]


def check_keys(split: Split) -> None:
    """Check that every key can be stored.

    A member's name is key + suffix; WebDataset ends the key at the first dot, and a tar's plain
    header holds 100 bytes.

    Raises:
        InputError: a key with a dot, a long one, or one that is there twice.
    """
    longest = LONGEST_NAME - max(len(suffix) for pair in SUFFIXES.values() for suffix in pair)
    seen: dict[str, str] = {}
    for name in SPLITS:
        for key in split.keys(name):
            where = f"{split.data}, {name}: the key '{key}'"
            if "." in key:
                raise InputError(
                    f"{where} cannot be stored in WebDataset shards; rename its files without dots"
                )
            if len(key.encode()) > longest:
                raise InputError(
                    f"{where} is longer than {longest} bytes; give its files a shorter name"
                )
            if key in seen:
                raise InputError(
                    f"{where} is there twice, also in {seen[key]}; "
                    "prepare the tree again, with different names"
                )
            seen[key] = name


def made_from(
    plan: ShardPlan, split: Split, settings: Settings, not_newer_than: int | None = None
) -> str | None:
    """Hash what a shard is made from: the settings, the keys and the sizes of the files.

    Args:
        plan: the shard.
        split: where its files are.
        settings: how they are stored.
        not_newer_than: a time in ns since the epoch.

    Returns:
        The sha256; None where a file is newer than ``not_newer_than``.

    Raises:
        DamagedDataError: a file is missing.
    """
    digest = hashlib.sha256(json.dumps([plan.name, settings.to_dict()]).encode())
    pairs = (split.pair(plan.split, key) for key in plan.keys)
    with contextlib.closing(map_in_order(_sizes, pairs, STAT_THREADS)) as sizes:
        for key, (image, matte, changed) in zip(plan.keys, sizes, strict=True):
            if not_newer_than is not None and changed > not_newer_than:
                return None
            digest.update(f"\n{key} {image} {matte}".encode())
    return digest.hexdigest()


def _sizes(pair: Pair) -> tuple[int, int, int]:
    """Bytes of image and mask, and the time in ns of the later change of both."""
    if isinstance(pair, StoredPair):
        return pair.sizes()
    (image, image_time), (matte, matte_time) = (_size(file) for file in (pair.image, pair.matte))
    return image, matte, max(image_time, matte_time)


def _size(path: Location) -> tuple[int, int]:
    try:
        return size_of(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise DamagedDataError(
            f"{path}: {what}, though split.json has it; run 'portrait-dist prepare' again"
        ) from None
