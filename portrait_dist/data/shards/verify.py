"""Checks packed shards against their manifest: every file, every hash, every sample."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

from portrait_dist.data.shards import format as shard_format
from portrait_dist.data.shards.cache import Cache, FetchError
from portrait_dist.data.shards.decode import decode_stored
from portrait_dist.data.shards.format import BLOCK, SUFFIXES, ShardEntry, keys_sha256
from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet, read_manifest
from portrait_dist.system.progress import track
from portrait_dist.system.threads import map_in_order


def verify(
    location: str | Path, workers: int | None = None, *, cache: Cache | None = None
) -> dict[str, Any]:
    """Check that shards are what ``portrait-dist pack`` wrote.

    That is: nothing is missing, cut off, changed or there in addition; each index belongs to its tar and agrees with what
    ``tarfile`` finds in it; every sample has an image and a mask of one size that decode; the keys are those of the manifest.

    Args:
        location: folder or address of the shards.
        workers: threads; by default the CPUs this process may use.
        cache: for an address.

    Returns:
        samples (that are whole), shards, ok, errors: a line for each damaged file or sample.

    Raises:
        InputError: no shards there.
        DamagedDataError: the manifest cannot be read.
    """
    manifest = read_manifest(location)
    sets = {split: ShardSet(location, split, cache=cache) for split in manifest.splits}
    errors = [] if "://" in str(location) else _wrong_files(Path(location), sets)
    keys: dict[str, list[str]] = {split: [] for split in sets}
    every_shard = [
        (split, number) for split, shards in sets.items() for number in range(len(shards.shards))
    ]
    threads = workers or len(os.sched_getaffinity(0))
    with contextlib.closing(
        map_in_order(lambda shard: _check_shard(sets[shard[0]], shard[1]), every_shard, threads)
    ) as checked:
        results = track(checked, total=len(every_shard), what="shards")
        for (split, _), (found, wrong) in zip(every_shard, results, strict=True):
            keys[split] += found
            errors += wrong
    for split, shards in sets.items():
        if (
            len(keys[split]) == shards.samples
            and keys_sha256(keys[split]) != manifest.splits[split].keys_sha256
        ):
            errors.append(
                f"{location}, {split}: the keys are not those of the manifest, or in another order"
            )
    whole = sum(len(found) for found in keys.values())
    return {"samples": whole, "shards": len(every_shard), "ok": not errors, "errors": errors}


def _wrong_files(folder: Path, sets: dict[str, ShardSet]) -> list[str]:
    """Files that belong to no shard of the manifest, and indexes for wids that are missing or changed."""
    known = {
        name
        for shards in sets.values()
        for shard in shards.shards
        for name in (shard.name, shard.index_name)
    }
    extra = sorted(path for path in folder.iterdir() if path.name not in known)
    errors = [
        f"{path}: is not in the manifest"
        for path in extra
        if path.suffix == ".tar" or shard_format.is_shard_file(path.name)
    ]
    for split, shards in sets.items():
        path = folder / f"{split}.json"
        if not path.is_file():
            errors.append(f"{path}: is missing")
        elif path.read_bytes() != shard_format.wids_index(split, shards.manifest.splits[split]):
            errors.append(f"{path}: does not list the shards of the manifest")
    return errors


def _check_shard(shards: ShardSet, number: int) -> tuple[list[str], list[str]]:
    """Keys of the whole samples of a shard, and a line for everything that is wrong with it."""
    entry, name = shards.shards[number], shards.shard_name(number)
    try:
        tar, index = shards.files(number)
    except FetchError as error:
        return [], [f"{name}: {error}"]
    if not tar.is_file() or not index.is_file():
        return [], [
            f"{path.parent / path.name}: is missing" for path in (tar, index) if not path.is_file()
        ]
    data = index.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        return [], [
            f"{name}: {entry.index_name} is not its index (its sha256 differs from the manifest's)"
        ]
    _, records = shard_format.parse_index(data)
    if (length := tar.stat().st_size) != entry.bytes:
        return [], [
            f"{name}: has {length:,} bytes instead of {entry.bytes:,}{_what_is_left(tar, length, records, entry)}"
        ]
    keys, errors = _check_samples(shards, number)
    with tar.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    if not errors and not same:
        errors = [f"{name}: its sha256 differs from the manifest's, though every sample is whole"]
    return keys, errors or _check_tar(tar, name, keys, records, SUFFIXES[shards.codec])


def _what_is_left(tar: Path, length: int, records: bytes, entry: ShardEntry) -> str:
    """For a tar of another length: the first sample that is cut off, or that has no mask."""
    places = [shard_format.record_at(records, position) for position in range(entry.samples)]
    whole = sum(place.offset + place.length <= length for place in places)
    names: list[str] = []
    with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(tar) as members:
        names = [member.name for member in members]
    keys = [name.partition(".")[0] for name in names]
    alone = next((key for key in keys if keys.count(key) == 1), None)
    if whole < entry.samples and len(keys) < 2 * entry.samples - 1:
        return f"; it is cut off in sample {whole} of {entry.samples}"
    return f"; sample {keys.index(alone) // 2} ({alone}) has no image or no mask" if alone else ""


def _check_samples(shards: ShardSet, number: int) -> tuple[list[str], list[str]]:
    """Decode every sample of a shard; (keys of the whole ones, what is wrong with the others)."""
    keys, errors = [], []
    first = sum(shards.shard_sizes[:number])
    for sample in range(first, first + shards.shard_sizes[number]):
        try:
            encoded = shards.read(sample)
            image, _ = decode_stored(encoded.image, encoded.alpha, shards.codec)
            if shards.size is not None and image.shape[:2] != shards.size:
                raise ValueError(
                    f"it has {image.shape[0]}x{image.shape[1]} pixels, the manifest {shards.size[0]}x{shards.size[1]}"
                )
            keys.append(encoded.key)
        except DamagedSampleError as error:
            errors.append(f"{error.where}: {error.what}")
        except (ValueError, RuntimeError) as error:
            errors.append(f"{shards.name(sample)} ({encoded.key}): does not decode ({error})")
    return keys, errors


def _check_tar(
    tar: Path, name: str, keys: list[str], records: bytes, suffixes: tuple[str, str]
) -> list[str]:
    """Does ``tarfile`` find the members where the index says they are, and nothing else?"""
    expected = []
    for position, key in enumerate(keys):
        place = shard_format.record_at(records, position)
        expected.append((key + suffixes[0], place.offset, place.image))
        expected.append(
            (
                key + suffixes[1],
                place.offset + BLOCK + shard_format.padded(place.image),
                place.alpha,
            )
        )
    try:
        with tarfile.open(tar) as members:
            found = [(member.name, member.offset, member.size) for member in members]
    except tarfile.TarError as error:
        return [f"{name}: is not a whole tar ({error})"]
    return [] if found == expected else [f"{name}: its members are not those that its index lists"]
