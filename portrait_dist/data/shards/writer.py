"""Pack a prepared tree into shards, on all cores of any number of machines, whole shards or none.

Every shard is written under a temporary name, flushed to the disk and renamed; its index follows,
so a shard with an index is complete. Killed at any moment and run again, ``pack`` keeps complete
shards whose sources have not changed and ends with the same bytes as an uninterrupted run.

Several machines share the work by parts: part I of N writes the shards whose number in the plan is
I modulo N, and nothing else. Whoever finds every shard there, a part or a plain ``pack``, writes
the manifest. The bytes are those of one process.

At a size, images are resized bilinearly with antialiasing and stored as JPEG (4:2:0), alphas
resized to the nearest pixel. At original size the JPEG files go in as they are, but for those that
EXIF says to turn. The alpha is the last channel of the matte, an 8-bit grey PNG.

Threads are enough within a machine: reading, decoding, resizing, encoding and compressing all
release the interpreter lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    wids_index,
)
from portrait_dist.data.shards.pack_folder import (
    PART_LOCK,
    SECONDS_TO_START,
    UNFINISHED,
    HeldError,
    PackFolder,
    Part,
)
from portrait_dist.data.shards.plan import (
    ShardPlan,
    check_keys,
    made_from,
    part_of,
    plan_shards,
)
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.split import Split, open_data
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.files import (
    atomic_open,
    check_folder_writable,
    explained,
    open_regular,
    remove_abandoned_files,
    write_bytes,
    write_text,
)
from portrait_dist.preprocessing import DEFAULT_SIZE, Fit
from portrait_dist.system.info import cores
from portrait_dist.system.malloc import keep_freed_memory
from portrait_dist.system.progress import track
from portrait_dist.system.threads import map_in_order

MOST_NAMES = 10
"""Missing shards that a message names."""
SAMPLES_PER_SHARD = 1024
QUALITY = 95


@dataclass(frozen=True)
class PackResult:
    """What is in the folder, and what this run did.

    Args:
        samples: in all splits; of a part that is not the last, in its shards.
        shards: likewise.
        bytes: of their tars.
        pairs_per_second: of the pairs that this run packed.
        packed: pairs that this run packed; the others were there.
        splits: samples of each split, likewise.
        out: the folder.
        part: ``I/N``, or None where the whole folder was packed.
        finished: whether every shard and the manifest are there.
        shards_missing: number of shards of all parts that are not there yet.
        version: of the manifest; one more after each ``--append`` that added pairs.
    """

    samples: int
    shards: int
    bytes: int
    pairs_per_second: float
    packed: int
    splits: dict[str, int]
    out: str
    part: str | None
    finished: bool
    shards_missing: int
    version: int = 1


def pack(
    data: str | Path | Split,
    out: str | Path,
    size: tuple[int, int] | None = DEFAULT_SIZE,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
    codec: str = "jpeg",
    quality: int = QUALITY,
    *,
    part: tuple[int, int] | None = None,
    finish: bool = False,
    check: bool = False,
    fit: Fit = "squash",
) -> PackResult:
    """Pack the three splits of a prepared tree, or a part of their shards.

    Args:
        data: folder that ``portrait-dist prepare`` wrote, any source that it takes, or its split.
        out: folder to write: new, empty, or one of the same settings to finish.
        size: (H, W) in pixels; None for original.
        samples_per_shard: in all shards but the last of a split.
        workers: threads; by default the CPUs this process may use.
        codec: ``jpeg``, or ``raw`` for pixels that need no decoding.
        quality: of the JPEGs; not used at original size.
        part: (I, N) to pack the shards whose number in the plan is I modulo N only.
        finish: pack nothing; write the manifest if every shard is there.
        check: hash the tars that are there already, instead of comparing length and time.
        fit: how images of another shape are brought to ``size``.

    Raises:
        InputError: wrong options, keys or pairs; shards missing with ``finish``; another ``out``.
        DamagedDataError: a file that does not decode.
        PortraitDistError: the disk is full or failed.
    """
    _check_options(workers, part, finish)
    folder = _open(data, out, Settings(size, codec, quality, samples_per_shard, fit))
    packing = _Packing(folder, workers or cores(), check)
    keep_freed_memory()
    with explained(folder.out):
        return packing.finish() if finish else packing.pack(Part(*part) if part else None)


@dataclass(frozen=True)
class PackPlan:
    """What ``pack`` would write.

    Args:
        shards: of all splits.
        samples: of each split.
    """

    shards: int
    samples: dict[str, int]


def plan_pack(
    data: str | Path,
    out: str | Path,
    size: tuple[int, int] | None = DEFAULT_SIZE,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    codec: str = "jpeg",
    quality: int = QUALITY,
    fit: Fit = "squash",
) -> PackPlan:
    """Check what :func:`pack` checks before it encodes anything, and count; writes nothing.

    Raises:
        InputError: wrong options, keys or pairs; another ``out``.
        DamagedDataError: a split or manifest that cannot be read.
    """
    check_folder_writable(out)
    folder = _open(data, out, Settings(size, codec, quality, samples_per_shard, fit))
    if folder.out.is_dir():
        folder.check()
    plans = plan_shards(folder.split, samples_per_shard)
    return PackPlan(len(plans), {name: len(folder.split.keys(name)) for name in SPLITS})


def _check_options(workers: int | None, part: tuple[int, int] | None, finish: bool) -> None:
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: it is at least 1")
    if part and finish:
        raise InputError("--part with --finish: a part packs, --finish only writes the manifest")
    if part and not 0 <= part[0] < part[1]:
        raise InputError(f"--part {part[0]}/{part[1]}: I is from 0 to N - 1")


def _open(data: str | Path | Split, out: str | Path, settings: Settings) -> PackFolder:
    settings.check()
    split = data if isinstance(data, Split) else open_data(data)
    check_keys(split)
    return PackFolder(Path(out).absolute(), split, settings)


class _Packing:
    """One run of ``pack``.

    Args:
        folder: where to.
        workers: threads.
        check: hash tars that are there.
    """

    def __init__(self, folder: PackFolder, workers: int, check: bool) -> None:
        self.folder, self.workers, self.check = folder, workers, check
        self.plans = plan_shards(folder.split, folder.settings.samples_per_shard)
        self.packed = 0
        self.started = time.perf_counter()

    def pack(self, part: Part | None) -> PackResult:
        """Pack a part, or all shards."""
        return self.pack_part(part) if part else self.pack_all()

    def pack_all(self) -> PackResult:
        """Pack what is missing of all shards; on an error leave no folder without a whole one."""
        folder, out = self.folder, self.folder.out
        check_folder_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        with folder.locked():
            try:
                folder.check()
                try:
                    return self._completed(self._write(self.plans, parts=1))
                except (PortraitDistError, OSError):
                    if not any(out.glob("*.index")):
                        (out / UNFINISHED).unlink(missing_ok=True)
                    raise
            finally:
                # Only if it is empty, and only by who holds its lock: a process that is refused
                # would remove it from under the one that has just begun.
                with contextlib.suppress(OSError):
                    out.rmdir()

    def pack_part(self, part: Part) -> PackResult:
        """Pack what is missing of one part's shards; write the manifest where it was the last."""
        out = self.folder.out
        check_folder_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        plans = part_of(self.plans, part.index, part.count)
        with self.folder.locked_part(part):
            entries = self._write(plans, parts=part.count)
        # After the part's lock is released: of parts that end at the same time the last one to
        # release it sees that every shard is there and that nobody is at work.
        if not self._missing():
            with contextlib.suppress(HeldError):  # whoever is at work finishes the folder
                return dataclasses.replace(self.finish(), part=str(part))
        return self._result(plans, entries, part=str(part))

    def finish(self) -> PackResult:
        """Write the manifest of a folder in which every shard is there.

        Raises:
            InputError: a shard is missing; the message names it and its part.
        """
        if not self.folder.out.is_dir():
            raise InputError(
                f"{self.folder.out}: there is no such folder; run 'portrait-dist pack'"
            )
        with self.folder.locked(SECONDS_TO_START):
            self.folder.check()
            if self.check:
                entries, missing = self._find(self.plans)
                absent = [plan.name for plan in missing]
            else:
                entries, absent = self._recorded()
            if absent:
                raise InputError(self._what_is_missing(absent))
            return self._completed(entries)

    def _write(self, plans: list[ShardPlan], parts: int) -> dict[str, ShardEntry]:
        """Write the shards of these that are missing; the entries of all of them."""
        folder = self.folder
        entries, missing = self._find(plans)
        if missing or not (folder.manifest.exists() or (folder.out / UNFINISHED).exists()):
            folder.begin(parts)
        entries |= write_missing(missing, folder.split, folder.out, folder.settings, self.workers)
        self.packed = sum(len(plan.keys) for plan in missing)
        return entries

    def _find(self, plans: list[ShardPlan]) -> tuple[dict[str, ShardEntry], list[ShardPlan]]:
        folder = self.folder
        return plan_missing(plans, folder.split, folder.out, folder.settings, check=self.check)

    def _recorded(self) -> tuple[dict[str, ShardEntry], list[str]]:
        """Entries as the indexes have them, and the names of the shards without one."""
        found = {plan.name: recorded_entry(plan, self.folder.out) for plan in self.plans}
        entries = {name: entry for name, entry in found.items() if entry}
        return entries, [name for name in found if name not in entries]

    def _missing(self) -> list[str]:
        """Names of the shards that have no index; a look at names only."""
        names = {path.name for path in self.folder.out.iterdir()}
        return [plan.name for plan in self.plans if not {plan.name, plan.index_name} <= names]

    def _what_is_missing(self, absent: list[str]) -> str:
        parts = self.folder.begun_parts()
        number = {plan.name: position for position, plan in enumerate(self.plans)}
        named = [
            f"{name} (part {number[name] % parts}/{parts})" if parts > 1 else name
            for name in absent[:MOST_NAMES]
        ]
        more = f" and {len(absent) - MOST_NAMES} more" if len(absent) > MOST_NAMES else ""
        return (
            f"{self.folder.out}: {len(absent)} of {len(self.plans)} shards are not there or not "
            f"whole: {', '.join(named)}{more}; pack them, then run --finish again"
        )

    def _completed(self, entries: dict[str, ShardEntry]) -> PackResult:
        """Write the manifest and what belongs to it."""
        folder = self.folder
        finish_folder(
            folder.out, build_manifest(self.plans, entries, folder.split, folder.settings)
        )
        return self._result(self.plans, entries, finished=True)

    def _result(
        self,
        plans: list[ShardPlan],
        entries: dict[str, ShardEntry],
        *,
        part: str | None = None,
        finished: bool = False,
    ) -> PackResult:
        splits = {
            name: sum(len(plan.keys) for plan in plans if plan.split == name) for name in SPLITS
        }
        return PackResult(
            samples=sum(splits.values()),
            shards=len(plans),
            bytes=sum(entry.bytes for entry in entries.values()),
            pairs_per_second=self.packed / (time.perf_counter() - self.started),
            packed=self.packed,
            splits=splits,
            out=str(self.folder.out),
            part=part,
            finished=finished,
            shards_missing=0 if finished else len(self._missing()),
        )


def plan_missing(
    plans: list[ShardPlan], split: Split, out: Path, settings: Settings, *, check: bool = False
) -> tuple[dict[str, ShardEntry], list[ShardPlan]]:
    """Find which shards are there, and which have to be written.

    Args:
        plans: the shards to look for.
        split: the pairs.
        out: where the shards are.
        settings: how they are stored.
        check: hash the tars that are there.

    Returns:
        The entries of the complete shards, by name, and the plans of the others.
    """
    found = ((plan, complete_entry(plan, split, out, settings, check=check)) for plan in plans)
    entries = {plan.name: entry for plan, entry in found if entry}
    return entries, [plan for plan in plans if plan.name not in entries]


def complete_entry(
    plan: ShardPlan, split: Split, out: Path, settings: Settings, *, check: bool = False
) -> ShardEntry | None:
    """Return the entry of a shard that is complete and made from the sources as they are now.

    None where it has to be written. ``check`` is that of :func:`recorded_entry`.
    """
    index = out / plan.index_name
    entry = recorded_entry(plan, out, check=check)
    if entry is None:
        return None
    header, _ = parse_index(index.read_bytes(), str(index))
    written = index.stat().st_mtime_ns
    same = header.made_from == made_from(plan, split, settings, not_newer_than=written)
    return entry if same else None


def recorded_entry(plan: ShardPlan, out: Path, *, check: bool = False) -> ShardEntry | None:
    """Return the entry of a shard whose tar is as its index says; None where it is not.

    The tar was hashed when it was written, before its index. So it is hashed again only where its
    time says that it changed afterwards.

    Args:
        plan: the shard.
        out: the folder.
        check: hash the tar in any case.

    Raises:
        InputError: a file is there that cannot be read.
    """
    tar, index = out / plan.name, out / plan.index_name
    try:
        with open(open_regular(index), "rb") as file:
            data, index_time = file.read(), os.fstat(file.fileno()).st_mtime_ns
        header, _ = parse_index(data, str(index))
        with open(open_regular(tar), "rb") as file:
            status = os.fstat(file.fileno())
            if (header.samples, header.bytes) != (len(plan.keys), status.st_size):
                return None
            changed = check or status.st_mtime_ns > index_time
            if changed and hashlib.file_digest(file, "sha256").hexdigest() != header.sha256:
                return None
        index_sha256 = hashlib.sha256(data).hexdigest()
        return ShardEntry(plan.name, header.samples, header.bytes, header.sha256, index_sha256)
    except (FileNotFoundError, DamagedDataError):
        return None
    except OSError as error:  # also a named pipe or a folder in its place
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); remove it, or give another --out"
        ) from error


def write_missing(
    plans: list[ShardPlan], split: Split, out: Path, settings: Settings, workers: int
) -> dict[str, ShardEntry]:
    """Write shards one after another; the pairs of all of them are encoded on threads."""
    encode = functools.partial(encode_pair, settings=settings)
    sources = (split.pair(plan.split, key) for plan in plans for key in plan.keys)
    entries: dict[str, ShardEntry] = {}
    # Closed where writing fails: otherwise the threads would encode what nobody takes.
    with contextlib.closing(map_in_order(encode, sources, workers)) as encoded:
        total = sum(len(plan.keys) for plan in plans)
        pairs = iter(track(encoded, total=total, what="pairs"))
        for plan in plans:
            # Hashed before the files are read: one that changes meanwhile is newer than the index.
            source = made_from(plan, split, settings)
            # One iterator over all shards, cut into shards: the threads encode the first pairs of
            # the next shard while the last ones of this shard are written.
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
    """Return a ustar header without anything that changes from run to run: no time, no owner."""
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
        fit=settings.fit,
    )


def finish_folder(out: Path, manifest: Manifest) -> None:
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
        stale = is_shard_file(path.name) and path.name not in known
        if stale or PART_LOCK.fullmatch(path.name):
            path.unlink(missing_ok=True)
    remove_abandoned_files(out)
    write_text(out / MANIFEST, manifest.to_json(), durable=True)
    (out / UNFINISHED).unlink(missing_ok=True)
