"""Pack a prepared tree into shards, on all cores, whole shards or none.

Every shard is written under a temporary name, flushed to the disk and renamed; its index follows,
so a shard with an index is complete. Killed at any moment and run again, ``pack`` keeps complete
shards whose sources have not changed and ends with the same bytes as an uninterrupted run.

Threads are enough: reading, decoding, resizing, encoding and compressing all release the
interpreter lock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib

from portrait_dist.data.shards.encode import EncodedPair, Settings, encode_pair
from portrait_dist.data.shards.format import (
    BLOCK,
    MANIFEST,
    SUFFIXES,
    IndexHeader,
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
from portrait_dist.data.shards.plan import ShardPlan, check_keys, made_from, plan_shards
from portrait_dist.data.source.split import SPLITS, Split, pair_paths, read_split
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.files import (
    atomic_open,
    check_folder_writable,
    explained,
    lock_output,
    open_regular,
    read_marker,
    remove_temporary_files,
    write_bytes,
    write_text,
)
from portrait_dist.preprocessing import DEFAULT_SIZE
from portrait_dist.system.info import cores
from portrait_dist.system.malloc import keep_freed_memory
from portrait_dist.system.progress import track
from portrait_dist.system.threads import map_in_order

UNFINISHED = ".pack.json"
"""Marks a folder whose packing is under way, with its settings; gone when the manifest is there."""
SAMPLES_PER_SHARD = 1024
QUALITY = 95


@dataclass(frozen=True)
class PackResult:
    """What is in the folder, and what this run did.

    Args:
        samples: in all splits.
        shards: in all splits.
        bytes: of all tars.
        pairs_per_second: of the pairs that this run packed.
        packed: pairs that this run packed; the others were there.
        splits: samples of each split.
        out: the folder.
    """

    samples: int
    shards: int
    bytes: int
    pairs_per_second: float
    packed: int
    splits: dict[str, int]
    out: str


def pack(
    data: str | Path,
    out: str | Path,
    size: tuple[int, int] | None = DEFAULT_SIZE,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
    codec: str = "jpeg",
    quality: int = QUALITY,
) -> PackResult:
    """Pack the three splits of a prepared tree.

    At a size, the image is resized bilinearly with antialiasing and stored as JPEG (4:2:0), the
    alpha resized to the nearest pixel. At original size the JPEG files go in as they are. The alpha
    is the last channel of the matte, an 8-bit grey PNG.

    Args:
        data: folder that ``portrait-dist prepare`` wrote.
        out: folder to write: new, empty, or one of the same settings to finish.
        size: (H, W) in pixels; None for original.
        samples_per_shard: in all shards but the last of a split.
        workers: threads; by default the CPUs this process may use.
        codec: ``jpeg``, or ``raw`` for pixels that need no decoding.
        quality: of the JPEGs; not used at original size.

    Raises:
        InputError: wrong options, keys that cannot be stored, a pair that cannot be used, or
            ``out`` holds something else or cannot be written.
        DamagedDataError: a file that does not decode.
        PortraitDistError: the disk is full or failed.
    """
    settings = Settings(size, codec, quality, samples_per_shard)
    settings.check()
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: it is at least 1")
    split = read_split(data)
    check_keys(split)
    out = Path(out).absolute()
    keep_freed_memory()
    begin = time.perf_counter()
    with explained(out), _claimed(out, split, settings):
        plans = plan_shards(split, samples_per_shard)
        entries, missing = plan_missing(plans, split, out, settings)
        if missing or not (out / MANIFEST).exists():
            write_text(out / UNFINISHED, json.dumps(settings.to_dict()), durable=True)
            (out / MANIFEST).unlink(missing_ok=True)
        entries |= write_missing(missing, split, out, settings, workers or cores())
        manifest = build_manifest(plans, entries, split, settings)
        _finish(out, manifest)
    packed = sum(len(plan.keys) for plan in missing)
    return PackResult(
        samples=sum(entry.samples for entry in manifest.splits.values()),
        shards=len(plans),
        bytes=sum(entry.bytes for entry in entries.values()),
        pairs_per_second=packed / (time.perf_counter() - begin),
        packed=packed,
        splits={name: entry.samples for name, entry in manifest.splits.items()},
        out=str(out),
    )


@contextlib.contextmanager
def _claimed(out: Path, split: Split, settings: Settings) -> Iterator[None]:
    """Lock ``out`` for this command; on an error leave no folder without a complete shard."""
    check_folder_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock_output(out, "pack", out):
            _check_out(out, split, settings)
            try:
                yield
            except (PortraitDistError, OSError):
                if not any(out.glob("*.index")):
                    (out / UNFINISHED).unlink(missing_ok=True)
                raise
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # only if it is empty


def _check_out(out: Path, split: Split, settings: Settings) -> None:
    """Check that a folder is new, or was packed from these pairs with these settings.

    Raises:
        InputError: ``out`` holds something that this command line did not write.
    """
    before: dict[str, Any] | None
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
    else:
        before = read_marker(out, UNFINISHED, "pack")
    if before is None:
        return
    for name, value in settings.to_dict().items():
        if before.get(name) != value:
            option, old, new = name.replace("_", "-"), _shown(before.get(name)), _shown(value)
            raise InputError(
                f"{out}: was packed with --{option} {old}, not {new}; use that, or another --out"
            )


def _shown(value: Any) -> str:
    """A value of the settings as the command line has it."""
    if value is None:
        return "original"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def plan_missing(
    plans: list[ShardPlan], split: Split, out: Path, settings: Settings
) -> tuple[dict[str, ShardEntry], list[ShardPlan]]:
    """Find which shards are there, and which have to be written.

    Returns:
        The entries of the complete shards, by name, and the plans of the others.
    """
    found = ((plan, complete_entry(plan, split, out, settings)) for plan in plans)
    entries = {plan.name: entry for plan, entry in found if entry}
    return entries, [plan for plan in plans if plan.name not in entries]


def complete_entry(
    plan: ShardPlan, split: Split, out: Path, settings: Settings
) -> ShardEntry | None:
    """Return the entry of a shard that is complete and made from the sources as they are now."""
    tar, index = out / plan.name, out / plan.index_name
    try:
        with open(open_regular(index), "rb") as file:
            data = file.read()
        header, _ = parse_index(data, str(index))
        written = index.stat().st_mtime_ns
        if header.made_from != made_from(plan, split, settings, not_newer_than=written):
            return None
        with open(open_regular(tar), "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != header.sha256:
            return None
        index_sha256 = hashlib.sha256(data).hexdigest()
        return ShardEntry(plan.name, len(plan.keys), header.bytes, sha256, index_sha256)
    except (FileNotFoundError, DamagedDataError):
        return None
    except OSError as error:  # also a named pipe or a folder in its place
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); remove it, or give another --out"
        ) from error


def write_missing(
    plans: list[ShardPlan], split: Split, out: Path, settings: Settings, workers: int
) -> dict[str, ShardEntry]:
    """Write shards one after another; the pairs of all of them are encoded on threads ahead."""
    encode = functools.partial(encode_pair, settings=settings)
    sources = (
        (key, *pair_paths(split.data, plan.split, key)) for plan in plans for key in plan.keys
    )
    entries: dict[str, ShardEntry] = {}
    with contextlib.closing(map_in_order(encode, sources, workers)) as encoded:
        total = sum(len(plan.keys) for plan in plans)
        pairs = iter(track(encoded, total=total, what="pairs"))
        for plan in plans:
            # Hashed before the files are read: one that changes meanwhile is newer than the index.
            source = made_from(plan, split, settings)
            pairs_of_shard = itertools.islice(pairs, len(plan.keys))
            entries[plan.name] = _write_shard(out, plan, pairs_of_shard, settings.codec, source)
    return entries


def _write_shard(
    out: Path, plan: ShardPlan, pairs: Iterable[EncodedPair], codec: str, source: str | None
) -> ShardEntry:
    """Write a tar and then its index."""
    records: list[Record] = []
    digest = hashlib.sha256()
    offset = 0
    with atomic_open(out / plan.name, durable=True) as file:
        for pair in pairs:
            piece = _members(pair, codec)
            crc32 = isal_zlib.crc32(piece)
            records.append(Record(offset, len(pair.image), len(pair.alpha), crc32))
            digest.update(piece)
            offset += file.write(piece)
        end = bytes(2 * BLOCK)
        digest.update(end)
        offset += file.write(end)
    sha256 = digest.hexdigest()
    header = IndexHeader(plan.name, len(records), offset, sha256, source)
    index = index_bytes(header, records)
    write_bytes(out / plan.index_name, index, durable=True)
    return ShardEntry(plan.name, len(records), offset, sha256, hashlib.sha256(index).hexdigest())


def _members(pair: EncodedPair, codec: str) -> bytes:
    """Both members of a sample as they stand in the tar: header, data, padding."""
    return b"".join(
        part
        for suffix, data in zip(SUFFIXES[codec], (pair.image, pair.alpha), strict=True)
        for part in (
            _tar_header(pair.key + suffix, len(data)),
            data,
            bytes(padded(len(data)) - len(data)),
        )
    )


def _tar_header(name: str, length: int) -> bytes:
    """A ustar header without anything that changes from run to run: no time, no owner."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = length, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def build_manifest(
    plans: list[ShardPlan], entries: dict[str, ShardEntry], split: Split, settings: Settings
) -> Manifest:
    """Make the manifest of a folder in which every planned shard has an entry."""
    splits = {
        name: SplitEntry(
            samples=len(split.keys(name)),
            keys_sha256=keys_sha256(split.keys(name)),
            shards=[entries[plan.name] for plan in plans if plan.split == name],
        )
        for name in SPLITS
    }
    return Manifest(
        source=split.source,
        size=settings.size,
        codec=settings.codec,
        quality=settings.quality,
        samples_per_shard=settings.samples_per_shard,
        splits=splits,
    )


def _finish(out: Path, manifest: Manifest) -> None:
    """Write the indexes for wids, remove what an interrupted run left, then write the manifest."""
    for name, entry in manifest.splits.items():
        write_bytes(out / f"{name}.json", wids_index(name, entry), durable=True)
    known = {
        name
        for entry in manifest.splits.values()
        for shard in entry.shards
        for name in (shard.name, shard.index_name)
    }
    for path in out.iterdir():
        if is_shard_file(path.name) and path.name not in known:
            path.unlink()
    remove_temporary_files(out)
    write_text(out / MANIFEST, manifest.to_json(), durable=True)
    (out / UNFINISHED).unlink(missing_ok=True)
