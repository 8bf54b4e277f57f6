"""Assign keys to train, val and test: a pure function of the keys, the seed and the fractions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import InputError

SPLITS = ("train", "val", "test")


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
    numbers = assigned_splits(keys, seed, val_fraction, test_fraction, groups)
    return {
        name: sorted(keys[i] for i in np.flatnonzero(numbers == number).tolist())
        for number, name in enumerate(SPLITS)
    }


def assigned_splits(
    keys: Sequence[str],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    groups: Sequence[str] | None = None,
) -> NDArray[np.uint8]:
    """Return the number of each key's split in ``SPLITS``; see :func:`assign`."""
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise InputError(
            f"--val-fraction {val_fraction} --test-fraction {test_fraction}: "
            "each is at least 0, and both together are below 1"
        )
    sizes = {"val": int(val_fraction * len(keys)), "test": int(test_fraction * len(keys))}
    numbers = np.zeros(len(keys), np.uint8)
    if groups is None:
        ranked, last = _ranked(keys, seed), sizes["val"] + sizes["test"]
        numbers[ranked[: sizes["val"]]] = 1
        numbers[ranked[sizes["val"] : last]] = 2
    else:
        split_of = _assign_groups(Counter(groups), seed, sizes)
        for i, group in enumerate(groups):
            numbers[i] = SPLITS.index(split_of[group])
    return numbers


def _ranked(names: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Return the numbers of the names, sorted by the sha256 of ``"<seed>:<name>"``.

    By its first 8 bytes, in one buffer: whole digests as objects take ten times the memory. Where
    two begin alike, which 10^6 names do once in 10^7 seeds, whole ones are compared.
    """
    starts = bytearray(8 * len(names))
    for number, name in enumerate(names):
        starts[8 * number : 8 * number + 8] = _digest(seed, name)[:8]
    order = np.argsort(np.frombuffer(starts, ">u8"), kind="stable")
    ranked = np.frombuffer(starts, ">u8")[order]
    if (ranked[1:] == ranked[:-1]).any():
        order = np.array(
            sorted(range(len(names)), key=lambda i: (_digest(seed, names[i]), names[i]))
        )
    return order


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _assign_groups(counts: Counter[str], seed: int, sizes: dict[str, int]) -> dict[str, str]:
    """Split of each group, so that no group is in two splits and no wanted split is empty."""
    wanted = [name for name in ("val", "test") if sizes[name]]
    if len(counts) <= len(wanted):
        raise InputError(
            f"--split-by group: there are {len(counts)} groups for {len(wanted) + 1} splits; "
            "use --split-by sample"
        )
    names = list(counts)
    ranked = [names[number] for number in _ranked(names, seed)]
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
