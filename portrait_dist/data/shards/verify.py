"""Check packed shards against their manifest: every file, every hash, every sample."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from portrait_dist.data.shards import format as shard_format
from portrait_dist.data.shards.cache import Cache, FetchError
from portrait_dist.data.shards.decode import decode_stored
from portrait_dist.data.shards.foreign import is_foreign, open_splits
from portrait_dist.data.shards.format import BLOCK, SUFFIXES, Manifest, ShardEntry, keys_sha256
from portrait_dist.data.shards.reader import (
    ATTEMPTS_AGAINST_EVICTION,
    DamagedSampleError,
    ShardSet,
    read_manifest,
)
from portrait_dist.errors import DamagedDataError
from portrait_dist.files import open_regular, read_regular
from portrait_dist.system.address import is_address, redact
from portrait_dist.system.info import cores
from portrait_dist.system.progress import track
from portrait_dist.system.threads import map_in_order


@dataclass(frozen=True)
class VerifyResult:
    """What was found.

    Args:
        samples: that are whole.
        shards: that the manifest lists.
        ok: whether nothing is damaged.
        errors: a line for each damaged file or sample.
    """

    samples: int
    shards: int
    ok: bool
    errors: list[str]


def verify(
    location: str | Path, workers: int | None = None, *, cache: Cache | None = None
) -> VerifyResult:
    """Check that shards are what ``portrait-dist pack`` wrote.

    That is: nothing is missing, cut off, changed or there in addition; each index belongs to its
    tar and agrees with what ``tarfile`` finds in it; every sample has an image and a mask of one
    size that decode; the keys are those of the manifest.

    Args:
        location: folder or address of the shards; of tars that somebody else wrote, every sample is
            read and decoded.
        workers: threads; by default the CPUs this process may use.
        cache: for an address.

    Raises:
        InputError: no shards there.
        DamagedDataError: the manifest cannot be read.
    """
    if is_foreign(str(location)):
        return _verify_foreign(str(location), workers or cores(), cache)
    manifest = read_manifest(location, cache.downloads if cache else None)
    sets = {split: ShardSet(location, split, cache=cache) for split in manifest.splits}
    errors = [] if is_address(location) else _wrong_files(Path(location), sets)
    keys: dict[str, list[str]] = {split: [] for split in sets}
    every_shard = [
        (split, number) for split, shards in sets.items() for number in range(len(shards.shards))
    ]
    with contextlib.closing(
        map_in_order(lambda at: _check_shard(sets[at[0]], at[1]), every_shard, workers or cores())
    ) as checked:
        results = track(checked, total=len(every_shard), what="shards")
        for (split, _), (found, wrong) in zip(every_shard, results, strict=True):
            keys[split] += found
            errors += wrong
    errors += _wrong_keys(redact(str(location)), manifest, keys)
    whole = sum(len(found) for found in keys.values())
    return VerifyResult(whole, len(every_shard), not errors, errors)


def _wrong_keys(shown: str, manifest: Manifest, keys: Mapping[str, list[str]]) -> list[str]:
    """Name the splits that have as many keys as the manifest says, but not those."""
    wrong = "the keys are not those of the manifest, or in another order"
    return [
        f"{shown}, {split}: {wrong}"
        for split, entry in manifest.splits.items()
        if len(keys[split]) == entry.samples and keys_sha256(keys[split]) != entry.keys_sha256
    ]


def _verify_foreign(location: str, workers: int, cache: Cache | None) -> VerifyResult:
    """Read and decode every sample of foreign tars; opening them has compared their headers."""
    sets = open_splits(location, cache)
    every_shard = [(shards, number) for shards in sets for number in range(len(shards.shards))]
    tars = {shard.name for shards in sets for shard in shards.shards}
    whole, errors = 0, []
    with contextlib.closing(
        map_in_order(lambda at: _check_samples(*at), every_shard, workers)
    ) as checked:
        for found, wrong in track(checked, total=len(every_shard), what="tars"):
            whole += len(found)
            errors += wrong
    return VerifyResult(whole, len(tars), not errors, errors)


def _wrong_files(folder: Path, sets: dict[str, ShardSet]) -> list[str]:
    """Files that belong to no shard of the manifest, and wids indexes that are missing or wrong."""
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
        try:
            expected = shard_format.wids_index(split, shards.manifest.splits[split])
            found = _read(path, max(2 * len(expected), 1 << 20))
        except _UnreadableError as error:
            errors.append(str(error))
            continue
        if found != expected:
            errors.append(f"{path}: does not list the shards of the manifest")
    return errors


class _UnreadableError(Exception):
    """A file is missing or cannot be read; the message is a line of the result."""


class _MissingError(_UnreadableError):
    """It is missing."""


def _read(path: Path, limit: int, shown: str = "") -> bytes:
    with _readable(shown or str(path)):
        return read_regular(path, limit)


@contextlib.contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _MissingError(f"{shown}: is missing") from None
    except OSError as error:  # also a named pipe or a folder in its place
        raise _UnreadableError(f"{shown}: cannot be read ({error.strerror or error})") from error


def _open(shards: ShardSet, number: int) -> tuple[IO[bytes], bytes]:
    """Open a shard and read its index; again where the cache evicted one of them meanwhile."""
    entry, name = shards.shards[number], shards.shard_name(number)
    for attempt in itertools.count(1):
        tar, index = shards.files(number)
        shown = name.removesuffix(entry.name) + entry.index_name
        try:
            data = _read(index, shard_format.index_limit(entry.samples), shown)
            with _readable(name):
                return open(open_regular(tar), "rb"), data
        except _MissingError:
            if not shards.remote or attempt == ATTEMPTS_AGAINST_EVICTION:
                raise
    raise AssertionError


def _check_shard(shards: ShardSet, number: int) -> tuple[list[str], list[str]]:
    """Keys of the whole samples of a shard, and a line for everything that is wrong with it."""
    try:
        tar, data = _open(shards, number)
    except FetchError as error:
        return [], [f"{shards.shard_name(number)}: {error}"]
    except _UnreadableError as error:
        return [], [str(error)]
    with tar:
        return _check_open(shards, number, tar, data)


def _check_open(
    shards: ShardSet, number: int, tar: IO[bytes], data: bytes
) -> tuple[list[str], list[str]]:
    """Check an open shard and the content of its index; returns what ``_check_shard`` does."""
    entry, name = shards.shards[number], shards.shard_name(number)
    length = tar.seek(0, os.SEEK_END)
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        what = f"{entry.index_name} is not its index (its sha256 differs from the manifest's)"
        return [], [f"{name}: {what}"]
    try:
        _, records = shard_format.parse_index(data, f"{name}: {entry.index_name}")
    except DamagedDataError as error:
        return [], [str(error)]
    if length != entry.bytes:
        where = _what_is_left(tar, length, records, entry)
        return [], [f"{name}: has {length:,} bytes instead of {entry.bytes:,}{where}"]
    keys, errors = _check_samples(shards, number)
    if not errors:
        errors = _check_hash(tar, name, entry)
    return keys, errors or _check_tar(tar, name, keys, records, SUFFIXES[shards.codec])


def _check_hash(tar: IO[bytes], name: str, entry: ShardEntry) -> list[str]:
    tar.seek(0)
    if hashlib.file_digest(tar, "sha256").hexdigest() == entry.sha256:  # type: ignore[arg-type]
        return []
    return [f"{name}: its sha256 differs from the manifest's, though every sample is whole"]


def _what_is_left(tar: IO[bytes], length: int, records: bytes, entry: ShardEntry) -> str:
    """For a tar of another length: the first sample that is cut off, or that has no mask."""
    expected = [shard_format.record_at(records, position) for position in range(entry.samples)]
    whole = sum(record.offset + record.length <= length for record in expected)
    names: list[str] = []
    tar.seek(0)
    with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(fileobj=tar) as members:
        names = [member.name for member in members]
    keys = [name.partition(".")[0] for name in names]
    alone = next((key for key in keys if keys.count(key) == 1), None)
    if whole < entry.samples and len(keys) < 2 * entry.samples - 1:
        return f"; it is cut off in sample {whole} of {entry.samples}"
    if alone is None:
        return ""
    return f"; sample {keys.index(alone) // 2} ({alone}) has no image or no mask"


def _check_samples(shards: ShardSet, number: int) -> tuple[list[str], list[str]]:
    """Decode every sample of a shard; (keys of the whole ones, what is wrong with the others)."""
    keys, errors = [], []
    first = sum(shards.shard_sizes[:number])
    for sample in range(first, first + shards.shard_sizes[number]):
        try:
            encoded = shards.read(sample)
            image, _ = decode_stored(encoded.image, encoded.alpha, encoded.codec)
            if shards.size is not None and image.shape[:2] != shards.size:
                found, wanted = image.shape[:2], shards.size
                raise ValueError(
                    f"it has {found[0]}x{found[1]} pixels, the manifest {wanted[0]}x{wanted[1]}"
                )
            keys.append(encoded.key)
        except DamagedSampleError as error:
            errors.append(f"{error.where}: {error.what}")
        except (ValueError, RuntimeError) as error:
            errors.append(f"{shards.name(sample)} ({encoded.key}): does not decode ({error})")
    return keys, errors


def _check_tar(
    tar: IO[bytes], name: str, keys: list[str], records: bytes, suffixes: tuple[str, str]
) -> list[str]:
    """Compare what ``tarfile`` finds in a tar with what its index lists."""
    expected = []
    for position, key in enumerate(keys):
        record = shard_format.record_at(records, position)
        alpha_offset = record.offset + BLOCK + shard_format.padded(record.image)
        expected += [
            (key + suffixes[0], record.offset, record.image),
            (key + suffixes[1], alpha_offset, record.alpha),
        ]
    tar.seek(0)
    try:
        with tarfile.open(fileobj=tar) as members:
            found = [(member.name, member.offset, member.size) for member in members]
    except tarfile.TarError as error:
        return [f"{name}: is not a whole tar ({error})"]
    return [] if found == expected else [f"{name}: its members are not those that its index lists"]
