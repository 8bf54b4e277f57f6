"""Packs a prepared tree into shards, on all cores, whole shards or none.

Every shard is written under a hidden name, brought to the disk and renamed; its index follows, so a shard with an index is
complete. Killed at any moment and run again, ``pack`` keeps complete shards whose sources have not changed and ends with the
same bytes as a run that was not interrupted.

Threads are enough: reading, decoding, resizing, encoding and compressing all release the interpreter lock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from isal import isal_zlib

from portrait_dist.data.shards.encode import EncodedPair, Settings, encode_pair
from portrait_dist.data.shards.format import (
    BLOCK,
    LONGEST_NAME,
    MANIFEST,
    SUFFIXES,
    Manifest,
    Record,
    ShardEntry,
    SplitEntry,
    index_bytes,
    is_shard_file,
    keys_sha256,
    padded,
    parse_index,
    parse_manifest,
    wids_index,
)
from portrait_dist.data.source.split import SPLITS, Split, pair_paths, read_split
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.files import lock_output
from portrait_dist.system.malloc import keep_freed_memory
from portrait_dist.system.progress import track
from portrait_dist.system.threads import map_in_order

UNFINISHED = ".pack.json"
"""Marks a folder whose packing is under way, with its settings; gone when the manifest is there."""
SAMPLES_PER_SHARD = 1024
QUALITY = 95
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be written: name, split, and its keys in order."""

    name: str
    split: str
    keys: list[str]


def pack(
    data: str | Path,
    out: str | Path,
    size: tuple[int, int] | None = (256, 256),
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
    codec: str = "jpeg",
    quality: int = QUALITY,
) -> dict[str, Any]:
    """Pack the three splits of a prepared tree.

    At a size, the image is resized bilinearly with antialiasing and stored as JPEG (4:2:0), the alpha resized to the nearest
    pixel. At original size the JPEG files go in as they are. The alpha is the last channel of the matte, an 8-bit grey PNG.

    Args:
        data: folder that ``portrait-dist prepare`` wrote.
        out: folder to write: new, empty, or one of the same settings to finish.
        size: (H, W) in pixels; None for original.
        samples_per_shard: in all shards but the last of a split.
        workers: threads; by default the CPUs this process may use.
        codec: ``jpeg``, or ``raw`` for pixels that need no decoding.
        quality: of the JPEGs; not used at original size.

    Returns:
        samples, shards, bytes, pairs_per_second, and details.

    Raises:
        InputError: wrong options, keys that cannot be stored, a pair that cannot be used, or ``out`` holds something else.
        DamagedDataError: a file that does not decode.
    """
    settings = Settings(size, codec, quality, samples_per_shard)
    settings.check()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise InputError(f"--workers {workers}: it is at least 1")
    split = read_split(data)
    _check_keys(split)
    out = Path(out).absolute()
    keep_freed_memory()
    begin = time.perf_counter()
    try:
        with _claimed(out, split, settings):
            manifest, packed = _pack_shards(split, out, settings, workers)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); give a folder of yours, with room, as --out"
        ) from error
    seconds = time.perf_counter() - begin
    shards = [shard for entry in manifest.splits.values() for shard in entry.shards]
    return {
        "samples": sum(entry.samples for entry in manifest.splits.values()),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "pairs_per_second": packed / seconds,
        "packed": packed,
        "splits": {name: entry.samples for name, entry in manifest.splits.items()},
        "out": str(out),
    }


def _check_keys(split: Split) -> None:
    """A member's name is key + suffix; WebDataset ends the key at the first dot, and a tar's plain header holds 100 bytes."""
    longest = LONGEST_NAME - max(len(suffix) for pair in SUFFIXES.values() for suffix in pair)
    seen: dict[str, str] = {}
    for name in SPLITS:
        for key in split.keys(name):
            where = f"{split.data}, {name}: the key '{key}'"
            if (
                not isinstance(key, str)
                or not key
                or not key.isprintable()
                or set("./\\") & set(key)
            ):
                raise InputError(
                    f"{where} cannot be stored in WebDataset shards; rename its files without dots and slashes"
                )
            if len(key.encode()) > longest:
                raise InputError(
                    f"{where} is longer than {longest} bytes; give its files a shorter name"
                )
            if key in seen:
                raise InputError(
                    f"{where} is there twice, also in {seen[key]}; prepare the tree again, with different names"
                )
            seen[key] = name


@contextlib.contextmanager
def _claimed(out: Path, split: Split, settings: Settings) -> Iterator[None]:
    """Make sure that ``out`` may be written and by nobody else; on an error leave no folder without a whole shard."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder as --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock_output(out, "pack", out):
            _check_out(out, split, settings)
            try:
                yield
            except PortraitDistError:
                if not any(out.glob("*.index")):
                    (out / UNFINISHED).unlink(missing_ok=True)
                raise
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # only if it is empty


def _check_out(out: Path, split: Split, settings: Settings) -> None:
    """
    Raises:
        InputError: ``out`` holds something that this command line did not write.
    """
    if (out / MANIFEST).is_file():
        manifest = parse_manifest((out / MANIFEST).read_bytes(), str(out / MANIFEST))
        before = manifest.settings
        if any(
            manifest.splits[name].keys_sha256 != keys_sha256(split.keys(name))
            for name in SPLITS
            if name in manifest.splits
        ):
            raise InputError(
                f"{out}: was packed from other pairs (source {manifest.source}); give another --out"
            )
    elif (out / UNFINISHED).is_file():
        try:
            before = json.loads((out / UNFINISHED).read_bytes())
        except ValueError:
            before = settings.to_dict()  # killed while it was written: no shard is there yet
    elif any(out.iterdir()):
        raise InputError(f"{out}: already holds something else; give a new folder as --out")
    else:
        return
    for name, value in settings.to_dict().items():
        if before.get(name) != value:
            option, old, new = name.replace("_", "-"), _shown(before.get(name)), _shown(value)
            raise InputError(
                f"{out}: was packed with --{option} {old}, not {new}; use that, or another --out"
            )


def _shown(value: Any) -> str:
    return (
        "original"
        if value is None
        else f"{value[0]}x{value[1]}"
        if isinstance(value, list)
        else str(value)
    )


def _pack_shards(split: Split, out: Path, settings: Settings, workers: int) -> tuple[Manifest, int]:
    """Write what is missing, then the manifest; (manifest, number of pairs packed)."""
    plans = [
        plan
        for name in SPLITS
        for plan in _plan(name, split.keys(name), settings.samples_per_shard)
    ]
    done = {plan.name: entry for plan in plans if (entry := _complete(plan, split, out, settings))}
    missing = [plan for plan in plans if plan.name not in done]
    if missing or not (out / MANIFEST).exists():
        _write_whole(out / UNFINISHED, json.dumps(settings.to_dict()).encode())
        (out / MANIFEST).unlink(missing_ok=True)
    packed = sum(len(plan.keys) for plan in missing)
    encode = functools.partial(encode_pair, settings=settings)
    sources = (
        (key, *pair_paths(split.data, plan.split, key)) for plan in missing for key in plan.keys
    )
    with contextlib.closing(map_in_order(encode, sources, workers)) as encoded:
        pairs = iter(track(encoded, total=packed, what="pairs"))
        for plan in missing:
            made_from = _made_from(plan, split, settings)
            done[plan.name] = _write_shard(
                out, plan, itertools.islice(pairs, len(plan.keys)), settings.codec, made_from
            )
    entries = {
        name: SplitEntry(
            samples=len(split.keys(name)),
            keys_sha256=keys_sha256(split.keys(name)),
            shards=[done[plan.name] for plan in plans if plan.split == name],
        )
        for name in SPLITS
    }
    manifest = Manifest(
        split.source,
        settings.size,
        settings.codec,
        settings.quality,
        settings.samples_per_shard,
        entries,
    )
    _finish(out, manifest)
    return manifest, packed


def _plan(split: str, keys: list[str], samples_per_shard: int) -> list[ShardPlan]:
    starts = range(0, len(keys), samples_per_shard)
    return [
        ShardPlan(f"{split}-{number:05d}.tar", split, keys[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def _complete(plan: ShardPlan, split: Split, out: Path, settings: Settings) -> ShardEntry | None:
    """The entry of a shard that is there, whole, and made from these sources as they are now; else None."""
    tar, index = out / plan.name, out / plan.name.replace(".tar", ".index")
    try:
        data = index.read_bytes()
        header, _ = parse_index(data)
        if header["made_from"] != _made_from(
            plan, split, settings, not_newer_than=index.stat().st_mtime_ns
        ):
            return None
        with tar.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != header["sha256"]:
            return None
        return ShardEntry(
            plan.name, len(plan.keys), header["bytes"], sha256, hashlib.sha256(data).hexdigest()
        )
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _made_from(
    plan: ShardPlan, split: Split, settings: Settings, not_newer_than: int | None = None
) -> str | None:
    """Hash of the settings, keys and file sizes a shard is made from; None where a file is newer than a time (ns)."""
    digest = hashlib.sha256(json.dumps([plan.name, settings.to_dict()]).encode())
    for key in plan.keys:
        stats = [_stat(path) for path in pair_paths(split.data, plan.split, key)]
        if not_newer_than is not None and any(stat.st_mtime_ns > not_newer_than for stat in stats):
            return None
        digest.update(f"\n{key} {stats[0].st_size} {stats[1].st_size}".encode())
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise DamagedDataError(
            f"{path}: is missing, though split.json has it; run 'portrait-dist prepare' again"
        ) from None


def _write_shard(
    out: Path, plan: ShardPlan, pairs: Iterable[EncodedPair], codec: str, made_from: str | None
) -> ShardEntry:
    """Write a tar and then its index, each under a hidden name first."""
    records: list[Record] = []
    digest = hashlib.sha256()
    tar = out / plan.name
    with _whole_file(tar) as write:
        offset = 0
        for pair in pairs:
            piece = b"".join(
                part
                for name, data in zip(SUFFIXES[codec], (pair.image, pair.alpha), strict=True)
                for part in (
                    _tar_header(pair.key + name, len(data)),
                    data,
                    bytes(padded(len(data)) - len(data)),
                )
            )
            records.append(Record(offset, len(pair.image), len(pair.alpha), isal_zlib.crc32(piece)))
            digest.update(piece)
            offset += write(piece)
        digest.update(bytes(2 * BLOCK))  # the end of a tar
        offset += write(bytes(2 * BLOCK))
    sha256 = digest.hexdigest()
    header = {
        "shard": plan.name,
        "samples": len(records),
        "bytes": offset,
        "sha256": sha256,
        "made_from": made_from,
    }
    index = index_bytes(header, records)
    _write_whole(tar.with_suffix(".index"), index)
    return ShardEntry(plan.name, len(records), offset, sha256, hashlib.sha256(index).hexdigest())


def _tar_header(name: str, length: int) -> bytes:
    """A ustar header without anything that changes from run to run: no time, no owner."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = length, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Callable[[bytes], int]]:
    """Write a file that appears under its name when it is whole and on the disk; on an error nothing of it is left."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_whole(path: Path, data: bytes) -> None:
    with _whole_file(path) as write:
        write(data)


def _finish(out: Path, manifest: Manifest) -> None:
    """Write the index for wids and the manifest, then remove what an interrupted run left."""
    for name, entry in manifest.splits.items():
        _write_whole(out / f"{name}.json", wids_index(name, entry))
    known = {
        name
        for entry in manifest.splits.values()
        for shard in entry.shards
        for name in (shard.name, shard.index_name)
    }
    for path in out.iterdir():
        stale = is_shard_file(path.name) and path.name not in known
        if stale or re.fullmatch(r"\..*\.part", path.name):
            path.unlink()
    _write_whole(out / MANIFEST, manifest.to_json().encode())
    (out / UNFINISHED).unlink(missing_ok=True)
