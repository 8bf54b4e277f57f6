"""What packed shards look like on disk: one manifest, and a tar with its index for every shard.

    SHARDS/manifest.json        counts, sizes and hashes of everything
    SHARDS/train-00000.tar      plain WebDataset: <key>.jpg (RGB), <key>.png (alpha, 8-bit grey), <key>.jpg, …, by key
    SHARDS/train-00000.index    where each sample lies in the tar, and its CRC-32
    SHARDS/train.json           the same shards for ``wids.ShardListDataset``

The ``raw`` codec has ``<key>.image.npy`` (uint8 [H, W, 3]) and ``<key>.alpha.npy`` (uint8 [H, W]) instead.

An index is one line of JSON (shard, samples, bytes and sha256 of the tar, and what it was made from), then 20 bytes for each
sample, little endian: offset of the image's tar header (8), bytes of the image (4), bytes of the alpha (4), CRC-32 of the
sample (4). A sample is one piece of the tar: header, image, padding, header, alpha, padding; its CRC-32 covers all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

from portrait_dist.errors import DamagedDataError, InputError

FORMAT = 1
MANIFEST = "manifest.json"
BLOCK = 512
"""A tar is made of blocks of 512 bytes; a member is one block of header and its data, padded with zeros."""
RECORD = struct.Struct("<QIII")
SUFFIXES = {"jpeg": (".jpg", ".png"), "raw": (".image.npy", ".alpha.npy")}
LONGEST_NAME = 100  # bytes; a longer name needs a second tar header


@dataclass(frozen=True)
class Record:
    """Place of one sample in its tar: bytes of image and alpha, and the CRC-32 of the whole piece."""

    offset: int
    image: int
    alpha: int
    crc32: int

    @property
    def length(self) -> int:
        """Bytes of the sample with headers and padding."""
        return 2 * BLOCK + padded(self.image) + padded(self.alpha)


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the manifest has it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index"


@dataclass(frozen=True)
class SplitEntry:
    """One split, as the manifest has it; ``keys_sha256`` is of the keys in order, one a line."""

    samples: int
    keys_sha256: str
    shards: list[ShardEntry] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``. ``size`` is (H, W) in pixels, or None where pictures keep their own; ``quality`` is the JPEG's."""

    source: str
    size: tuple[int, int] | None
    codec: str
    quality: int
    samples_per_shard: int
    splits: dict[str, SplitEntry]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides over the bytes of the shards, besides the pairs."""
        return {
            "size": list(self.size) if self.size else None,
            "codec": self.codec,
            "quality": self.quality,
            "samples_per_shard": self.samples_per_shard,
        }

    def to_json(self) -> str:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        return (
            json.dumps(
                {"format": FORMAT, "source": self.source, **self.settings, "splits": splits},
                indent=1,
            )
            + "\n"
        )


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        text: of ``manifest.json``.
        where: its path or address, for messages.

    Raises:
        InputError: a format newer than this program.
        DamagedDataError: not a manifest, or its numbers do not add up.
    """
    try:
        found = json.loads(text)
        version = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedDataError(
            f"{where}: damaged, cannot be read; pack the shards again"
        ) from error
    if version != FORMAT:
        raise InputError(
            f"{where}: format {version}, this program knows {FORMAT}; update portrait-dist, or pack the shards again"
        )
    try:
        manifest = Manifest(
            source=found["source"],
            size=(int(found["size"][0]), int(found["size"][1])) if found["size"] else None,
            codec=found["codec"],
            quality=found["quality"],
            samples_per_shard=found["samples_per_shard"],
            splits={name: _parse_split(split) for name, split in found["splits"].items()},
        )
        if manifest.codec not in SUFFIXES:
            raise ValueError(f"codec {manifest.codec}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedDataError(
            f"{where}: damaged ({type(error).__name__}: {error}); pack the shards again"
        ) from error
    return manifest


def _parse_split(found: dict[str, Any]) -> SplitEntry:
    shards = [ShardEntry(**shard) for shard in found["shards"]]
    if found["samples"] != sum(shard.samples for shard in shards) or any(
        shard.samples < 1 for shard in shards
    ):
        raise ValueError("the samples of the shards do not add up to those of the split")
    for shard in shards:
        if "/" in shard.name or not shard.name.endswith(".tar"):
            raise ValueError(f"shard name {shard.name!r}")
    return SplitEntry(found["samples"], found["keys_sha256"], shards)


def index_bytes(header: dict[str, Any], records: list[Record]) -> bytes:
    """An index file."""
    line = json.dumps({"format": FORMAT, **header}).encode() + b"\n"
    return line + b"".join(RECORD.pack(r.offset, r.image, r.alpha, r.crc32) for r in records)


def parse_index(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and packed records of an index file.

    Raises:
        ValueError: it is not one, or was cut off.
    """
    line, newline, records = data.partition(b"\n")
    header = json.loads(line)
    if (
        not newline
        or not isinstance(header, dict)
        or len(records) != RECORD.size * header.get("samples", -1)
    ):
        raise ValueError("cut off")
    return header, records


def record_at(records: bytes, position: int) -> Record:
    """Record of the sample at a position in its shard."""
    return Record(*RECORD.unpack_from(records, RECORD.size * position))


def member_name(header: bytes | memoryview) -> str:
    """Name in a tar header block."""
    return bytes(header[:LONGEST_NAME]).rstrip(b"\0").decode("utf-8", "replace")


def wids_index(split: str, entry: SplitEntry) -> bytes:
    """The shards of a split as ``wids.ShardListDataset`` wants them described."""
    shards = [
        {"url": shard.name, "nsamples": shard.samples, "filesize": shard.bytes}
        for shard in entry.shards
    ]
    return (
        json.dumps({"wids_version": 1, "name": split, "shardlist": shards}, indent=1) + "\n"
    ).encode()


def is_shard_file(name: str) -> bool:
    """Does a file's name say that it is a shard or its index?"""
    return re.fullmatch(r"(train|val|test)-\d{5,}\.(tar|index)", name) is not None


def padded(length: int) -> int:
    """Bytes that a member's data takes in a tar."""
    return -length % BLOCK + length


def keys_sha256(keys: list[str]) -> str:
    """Hash of the keys of a split in their order."""
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
