"""What packed shards look like on disk: one manifest, and a tar with its index for every shard.

    SHARDS/manifest.json        counts, sizes and hashes of everything, and its own hash
    SHARDS/train-00000.tar      plain WebDataset: <key>.jpg (RGB), <key>.png (alpha, 8 bit), …
    SHARDS/train-00000.index    offset of each sample in the tar, and its CRC-32
    SHARDS/train.json           the same shards for ``wids.ShardListDataset``

The ``raw`` codec has ``<key>.image.npy`` (uint8 [H, W, 3]) and ``<key>.alpha.npy`` (uint8 [H, W]).

An index is one line of JSON (shard, samples, bytes and sha256 of the tar, and a hash of what it
was made from), then 20 bytes for each sample, little endian: offset of the image's tar header (8),
bytes of the image (4), bytes of the alpha (4), CRC-32 of the sample (4). A sample is one piece of
the tar: header, image, padding, header, alpha, padding; its CRC-32 covers all of it.

The hashes form a chain: the manifest holds its own sha256 (of all its other fields, so that white
space does not matter) and those of every tar and index. Manifests without one, of earlier releases,
stay readable; then the reader compares their ``size`` with the pixels stored in each shard.

:func:`parse_manifest` and :func:`parse_index` are the only ways in for these files. They may come
from a server that nobody vouches for: every field is checked for type and bounds before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, NotRequired, TypedDict, cast

from portrait_dist.errors import DamagedDataError, InputError, one_line
from portrait_dist.preprocessing import FITS, Fit

FORMAT = 1
MANIFEST = "manifest.json"
BLOCK = 512
"""Bytes of a tar's block; a member is one block of header and its data, padded with zeros."""
RECORD = struct.Struct("<QIII")
SUFFIXES = {"jpeg": (".jpg", ".png"), "raw": (".image.npy", ".alpha.npy")}
LONGEST_NAME = 100  # bytes; a longer name needs a second tar header
MANIFEST_LIMIT = 1 << 30
"""Bytes of a manifest at most: 330 bytes a shard, so three million shards."""
INDEX_HEADER_LIMIT = 1 << 16
"""Bytes of an index's line of JSON at most; it has about 300."""
MAX_SIDE = 16384
"""Pixels of a side at most, as ``portrait-dist pack --size`` allows."""
MAX_SAMPLES = 1 << 50
MAX_SHARD_SAMPLES = 1 << 26
"""Samples of one shard at most: its index is read into memory, 20 bytes a sample."""
MAX_SHARD_BYTES = 1 << 50
DIGEST = "sha256"
"""Field of the manifest that holds the hash of all its other fields."""


@dataclass(frozen=True)
class Record:
    """Position of a sample in its tar, bytes of its image and alpha, CRC-32 of the whole piece."""

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
    """One split in the manifest; ``keys_sha256`` is the hash of the keys in order, one a line."""

    samples: int
    keys_sha256: str
    shards: list[ShardEntry] = field(default_factory=list)


class StorageSettings(TypedDict):
    """What determines the bytes of shards besides the pairs, as it stands in JSON."""

    size: list[int] | None
    codec: str
    quality: int
    samples_per_shard: int
    fit: NotRequired[str]


def storage_settings(
    size: tuple[int, int] | None,
    codec: str,
    quality: int,
    samples_per_shard: int,
    fit: Fit = "squash",
) -> StorageSettings:
    """Return the settings for JSON; :class:`Manifest` says what they are."""
    # The order stays: the identity of a split hashes this dict as Python writes it.
    found: StorageSettings = {
        "size": list(size) if size else None,
        "codec": codec,
        "quality": quality,
        "samples_per_shard": samples_per_shard,
    }
    if fit != "squash":  # shards that are squashed keep the bytes of earlier releases
        found["fit"] = fit
    return found


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        source: the raw tree that was packed, for messages.
        size: (H, W) of all samples in pixels; None where images keep their own.
        codec: ``jpeg`` or ``raw``.
        quality: of the JPEGs, 1 to 100.
        samples_per_shard: in all shards but the last of a split, and of each version of it.
        splits: by name.
        versions: where ``pack --append`` added shards, how many each split had in each version;
            the last is this one. Empty for shards that are as they were packed.
        fit: how images of another shape were brought to ``size``.
    """

    source: str
    size: tuple[int, int] | None
    codec: str
    quality: int
    samples_per_shard: int
    splits: dict[str, SplitEntry]
    versions: tuple[dict[str, int], ...] = ()
    fit: Fit = "squash"

    @property
    def version(self) -> int:
        """Number of this version; 1 for shards that are as they were packed."""
        return max(1, len(self.versions))

    @property
    def settings(self) -> StorageSettings:
        """What determines the bytes of the shards, besides the pairs."""
        return storage_settings(
            self.size, self.codec, self.quality, self.samples_per_shard, self.fit
        )

    def to_json(self) -> str:
        """Return the text of ``manifest.json``, with its own hash as the last field."""
        splits = {name: asdict(split) for name, split in self.splits.items()}
        found = {"format": FORMAT, "source": self.source, **self.settings, "splits": splits}
        if self.versions:  # sets that never grew keep the bytes of earlier releases
            found["versions"] = list(self.versions)
        return json.dumps({**found, DIGEST: _digest(found)}, indent=1) + "\n"


def _digest(found: Mapping[str, Any]) -> str:
    """Hash of all fields but the hash itself, whatever their order and the white space."""
    rest = {name: value for name, value in found.items() if name != DIGEST}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


_in_use: weakref.WeakValueDictionary[bytes, Manifest] = weakref.WeakValueDictionary()
"""Manifests by the sha256 of their text: the splits of a run share one, 1 GB of 10^6 shards."""


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Read and check a manifest; one with the same text that is still in use is returned again.

    Args:
        text: content of ``manifest.json``.
        where: its path or redacted address, for messages.

    Raises:
        InputError: a format newer than this program.
        DamagedDataError: not a manifest, a field of a wrong type or out of bounds, numbers that do
            not add up, or a hash that differs.
    """
    try:
        if len(text) > MANIFEST_LIMIT:
            raise ValueError(f"longer than {MANIFEST_LIMIT:,} bytes")
        data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        content = hashlib.sha256(data).digest()
        if (manifest := _in_use.get(content)) is not None:
            return manifest
        found = _object(json.loads(text, parse_constant=_no_number), "it")
        version = _whole(found, "format", 0, 1 << 31)
        if version == FORMAT:
            return _in_use.setdefault(content, _manifest(found))
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(
            f"{where}: damaged ({_short(error)}); copy it again, or pack the shards again"
        ) from error
    raise InputError(
        f"{where}: format {version}, this program knows {FORMAT}; "
        "update portrait-dist, or pack the shards again"
    )


def _manifest(found: Mapping[str, Any]) -> Manifest:
    """Build a manifest of fields that are all checked.

    Raises:
        ValueError: says which field is wrong.
    """
    if DIGEST in found and _sha256(found, DIGEST) != _digest(found):
        raise ValueError("its sha256 differs from the one it holds")
    splits = _object(found.get("splits"), "splits")
    manifest = Manifest(
        source=_text(found, "source"),
        size=_size(found.get("size", 0)),
        codec=_text(found, "codec"),
        quality=_whole(found, "quality", 1, 100),
        samples_per_shard=_whole(found, "samples_per_shard", 1, MAX_SAMPLES),
        splits={name: _split(name, _object(split, name)) for name, split in splits.items()},
        versions=_versions(found),
        fit=cast(Fit, _text(found, "fit") if "fit" in found else "squash"),
    )
    if manifest.fit not in FITS or (manifest.fit != "squash" and manifest.size is None):
        raise ValueError(f"fit is none of {', '.join(FITS)}, or has no size")
    if manifest.codec not in SUFFIXES:
        raise ValueError(f"codec is none of {', '.join(SUFFIXES)}")
    if manifest.versions:
        now = {name: len(split.shards) for name, split in manifest.splits.items()}
        if manifest.versions[-1] != now:
            raise ValueError("the last version has other shards than splits")
    for split in manifest.splits.values():
        if any(shard.samples > manifest.samples_per_shard for shard in split.shards):
            raise ValueError("a shard has more samples than samples_per_shard")
    return manifest


def _versions(found: Mapping[str, Any]) -> tuple[dict[str, int], ...]:
    if "versions" not in found:
        return ()
    versions = tuple(
        {str(name): _whole(one, name, 0, MAX_SAMPLES) for name in one}
        for one in (_object(one, "a version") for one in _list(found, "versions"))
    )
    for before, after in itertools.pairwise(versions):
        if before.keys() != after.keys() or any(before[name] > after[name] for name in before):
            raise ValueError("a version has fewer shards than the one before")
    return versions


def _split(name: str, found: Mapping[str, Any]) -> SplitEntry:
    if not is_shard_file(f"{name}-00000.tar"):
        raise ValueError(f"there is no split {name!r}")
    shards = [_shard(name, _object(shard, "a shard")) for shard in _list(found, "shards")]
    if _whole(found, "samples", 0, MAX_SAMPLES) != sum(shard.samples for shard in shards):
        raise ValueError(f"the samples of the shards do not add up to those of {name}")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"a shard of {name} is there twice")
    return SplitEntry(found["samples"], _sha256(found, "keys_sha256"), shards)


def _shard(split: str, found: Mapping[str, Any]) -> ShardEntry:
    name = _text(found, "name")
    if not (is_shard_file(name) and name.endswith(".tar") and name.startswith(f"{split}-")):
        raise ValueError(f"{name!r} is no name of a shard of {split}")
    samples = _whole(found, "samples", 1, MAX_SHARD_SAMPLES)
    smallest = 2 * BLOCK * (samples + 1)  # two headers a sample, and two blocks as the tar's end
    length = _whole(found, "bytes", smallest, MAX_SHARD_BYTES)
    if length % BLOCK:
        raise ValueError(f"bytes of {name} is no multiple of {BLOCK}")
    return ShardEntry(
        name, samples, length, _sha256(found, "sha256"), _sha256(found, "index_sha256")
    )


def _size(found: object) -> tuple[int, int] | None:
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2:
        raise ValueError("size is not null or two numbers")
    sides = {"height": found[0], "width": found[1]}
    return _whole(sides, "height", 1, MAX_SIDE), _whole(sides, "width", 1, MAX_SIDE)


def _object(found: object, name: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{name} is not a JSON object")
    return found


def _list(found: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(found.get(name), list):
        raise ValueError(f"{name} is not a list")
    return list(found[name])


def _whole(found: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = found.get(name)
    if type(value) is not int or not least <= value <= most:  # a bool is an int, too
        raise ValueError(f"{name} is not a whole number from {least} to {most}")
    return value


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or "\0" in value or len(value) > 4096:
        raise ValueError(f"{name} is not a text")
    return value


def _sha256(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not is_sha256(value):
        raise ValueError(f"{name} is not a sha256 of 64 hexadecimal digits")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _short(error: Exception) -> str:
    """One line of bounded length, whatever the file holds."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return one_line(error)


def is_sha256(text: str) -> bool:
    """Whether a text is a sha256 as hashlib writes it, and so safe as a part of a file's name."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


@dataclass(frozen=True)
class IndexHeader:
    """The line of JSON of an index: whose it is, and a hash of what the shard was made from."""

    shard: str
    samples: int
    bytes: int
    sha256: str
    made_from: str | None


def index_bytes(header: IndexHeader, records: Sequence[Record]) -> bytes:
    """Return the content of an index file."""
    line = json.dumps({"format": FORMAT, **asdict(header)}).encode() + b"\n"
    return line + b"".join(RECORD.pack(r.offset, r.image, r.alpha, r.crc32) for r in records)


def index_limit(samples: int) -> int:
    """Bytes that the index of a shard with so many samples has at most."""
    return INDEX_HEADER_LIMIT + RECORD.size * samples


def parse_index(data: bytes, where: str) -> tuple[IndexHeader, bytes]:
    """Read and check an index.

    Args:
        data: content of the file.
        where: its path, for messages.

    Returns:
        Its header and the packed records, 20 bytes a sample, for :func:`record_at`.

    Raises:
        DamagedDataError: it is not one, or was cut off.
    """
    line, newline, records = data.partition(b"\n")
    try:
        if len(line) > INDEX_HEADER_LIMIT:
            raise ValueError("it has no first line")
        found = _object(json.loads(line, parse_constant=_no_number), "its first line")
        _whole(found, "format", FORMAT, FORMAT)
        header = IndexHeader(
            shard=_text(found, "shard"),
            samples=_whole(found, "samples", 1, MAX_SHARD_SAMPLES),
            bytes=_whole(found, "bytes", 1, MAX_SHARD_BYTES),
            sha256=_sha256(found, "sha256"),
            made_from=None if found.get("made_from") is None else _sha256(found, "made_from"),
        )
        if not is_shard_file(header.shard):
            raise ValueError("shard is no name of a shard")
        if not newline or len(records) != RECORD.size * header.samples:
            raise ValueError("cut off")
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(
            f"{where}: damaged ({_short(error)}); pack or copy the shards again"
        ) from error
    return header, records


def record_at(records: bytes, position: int) -> Record:
    """Return the record of the sample at a position in its shard."""
    return Record(*RECORD.unpack_from(records, RECORD.size * position))


def member_name(header: bytes | memoryview) -> str:
    """Return the name in a tar header block."""
    return bytes(header[:LONGEST_NAME]).rstrip(b"\0").decode("utf-8", "replace")


def wids_index(split: str, entry: SplitEntry) -> bytes:
    """Describe the shards of a split as ``wids.ShardListDataset`` wants it."""
    shards = [
        {"url": shard.name, "nsamples": shard.samples, "filesize": shard.bytes}
        for shard in entry.shards
    ]
    return (
        json.dumps({"wids_version": 1, "name": split, "shardlist": shards}, indent=1) + "\n"
    ).encode()


def is_shard_file(name: str) -> bool:
    """Whether a file's name says that it is a shard or its index."""
    return re.fullmatch(r"(train|val|test)-[0-9]{5,12}\.(tar|index)", name) is not None


def padded(length: int) -> int:
    """Return the bytes that a member's data takes in a tar."""
    return -length % BLOCK + length


def keys_sha256(keys: list[str]) -> str:
    """Return the hash of the keys of a split in their order."""
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
