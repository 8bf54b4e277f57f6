"""Read WebDataset tars that ``pack`` did not write: indexed once, then any sample at any time.

    tars                                   a folder of .tar files, or one of them
    tars#image=photo.jpg+mask=seg.png      which member is the image, which the mask

A member's key is its path up to the first dot of its name, the rest is its suffix, in lower case,
as stock ``webdataset`` has it. Without ``image`` and ``mask`` they are told by :func:`choose`.

The first one that opens a tar reads all of it: its sha256, then headers and sizes of every image
and mask. What it finds is kept in ``indexes`` in the folder of the cache, one file for each tar,
and made again when length or time of the tar change. Every read compares a CRC-32 with the index.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import isal_zlib

from portrait_dist import distributed, files
from portrait_dist.data.shards.cache import Cache, locked
from portrait_dist.data.shards.decode import Turns, decode_files, jpeg_size
from portrait_dist.data.shards.format import (
    BLOCK,
    MANIFEST,
    Manifest,
    ShardEntry,
    SplitEntry,
    is_shard_file,
    keys_sha256,
    padded,
)
from portrait_dist.data.shards.reader import DamageError, Encoded, NoSplitError, OpenShard, ShardSet
from portrait_dist.data.source.assignment import SPLITS, assigned_splits
from portrait_dist.data.source.masks import NotAMaskError
from portrait_dist.data.source.pictures import (
    DAMAGED,
    MAX_PIXELS,
    exif_orientation,
    picture_orientation,
    picture_size,
    reason,
)
from portrait_dist.errors import DamagedDataError, InputError, one_line, shorten
from portrait_dist.system.address import is_address, split_members

FORMAT = 1
CODEC = "files"
RECORD = struct.Struct("<QIQIIBB")
"""Offset and bytes of the image, the same of the mask, CRC-32 of both, how EXIF turns the image,
whether the mask turns with it."""
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
MASK_WORDS = ("mask", "seg", "alpha", "matte", "label", "segmentation", "annotation")
LONGEST_HEADER = 1 << 20
"""Bytes that a header of a tar may ask for: a path, not a disk's worth."""
LONGEST_MEMBER = 1 << 30
LONGEST_KEY = 1024
INDEX_LIMIT = 1 << 34
SPLIT_WORDS = re.compile(
    r"(?:^|[/_.-])(train|training|val|valid|validation|test|testing)(?=[/_.0-9-])"
)
SPLIT_OF = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}
DIVIDED = (1, 0.1, 0.1)
"""Seed and fractions of val and test for tars that name no split: those of ``prepare``."""


def is_foreign(location: str) -> bool:
    """Whether a location is a local tar, or a folder of them without a manifest of ours."""
    if is_address(location):
        return False
    path = Path(split_members(location)[0])
    try:
        if path.is_file():
            return path.suffix == ".tar"
        if (path / MANIFEST).exists() or (path / ".pack.json").exists():
            return False
        first = next(_tars(path), None) if path.is_dir() else None
        return first is not None and not _is_packed(first)
    except (OSError, ValueError):  # the reader of packed shards says what is wrong with it
        return False


def _is_packed(tar: Path) -> bool:
    """Whether a tar is one of ours, whose manifest is missing or not copied yet."""
    return is_shard_file(tar.name) and tar.with_suffix(".index").exists()


def _tars(folder: Path) -> Iterator[Path]:
    """Yield the tars of a folder and of its folders."""
    for found in sorted(folder.glob("*.tar")) + sorted(folder.glob("*/*.tar")):
        if found.is_file():
            yield found


@dataclass(frozen=True)
class Member:
    """One file in a tar: offset of its data and its bytes."""

    offset: int
    bytes: int


@dataclass(frozen=True)
class TarIndex:
    """What is known of one tar.

    Args:
        length: of the tar, in bytes.
        state: length and time of the tar when it was indexed.
        sha256: of the tar.
        suffixes: of images and masks, for people.
        skipped: keys without an image or mask.
        keys: of the samples, in the order of the tar.
        records: ``RECORD`` for each.
    """

    length: int
    state: str
    sha256: str
    suffixes: str
    skipped: int
    keys: list[str] = field(default_factory=list)
    records: bytes = b""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """Return the content of its file; the CRC-32 of all else comes first."""
        head = {
            name: value for name, value in vars(self).items() if name not in ("keys", "records")
        }
        blob = "".join(f"{key}\n" for key in self.keys).encode()
        line = json.dumps({"format": FORMAT, **head, "keys": len(blob)}).encode()
        body = line + b"\n" + blob + self.records
        return b"%08x\n" % isal_zlib.crc32(body) + body


def parse_index(data: bytes) -> TarIndex | None:
    """Read an index; None for anything that is not one, which is then made again."""
    try:
        if int(data[:8], 16) != isal_zlib.crc32(memoryview(data)[9:]):
            return None
        end = data.index(b"\n", 9)
        head = json.loads(data[9:end])
        if head.pop("format") != FORMAT:
            return None
        middle = end + 1 + head.pop("keys")
        keys = data[end + 1 : middle].decode().split("\n")[:-1]
        found = TarIndex(**head, keys=keys, records=data[middle:])
    except (ValueError, KeyError, TypeError):
        return None
    return found if len(found.records) == RECORD.size * found.samples else None


class ForeignShardSet(ShardSet):
    """One split of foreign tars, with everything that :class:`ShardSet` has.

    Tars or folders whose names say train, val or test hold these splits. Where none does, every
    sample is assigned by the name of its tar and its key, 80/10/10, as ``prepare`` assigns.

    Args:
        location: a .tar, or a folder of them, with ``#image=SUFFIX+mask=SUFFIX`` where needed.
        split: ``train``, ``val`` or ``test``.
        cache: whose folder keeps the indexes; the user's cache folder by default.

    Raises:
        InputError: members that cannot be told apart, an image without a mask, names of splits on
            some tars only, no such split, or a cache folder that cannot be used.
        DamagedDataError: a tar or a picture in it is damaged.
    """

    remedy = "copy the tar again and run the same command, which indexes it anew"

    def __init__(self, location: str | Path, split: str, *, cache: Cache | None = None) -> None:
        path, members = split_members(str(location))
        root = Path(path)
        self._tars = [root] if root.is_file() else list(_tars(root))
        base = root.parent if root.is_file() else root
        self._names = [str(tar.relative_to(base)) for tar in self._tars]
        store = IndexStore(cache or Cache(), members)
        self._indexed = [store.open(tar) for tar in self._tars]
        self._chosen: dict[str, list[Any]] = self._by_split(base)
        super()._open_split(str(location), split, self._manifest(str(location)), cache)
        self._folder, self._hash = base, ""
        self.shown = str(base)
        if store.made:
            distributed.print0(self._described(root))

    @property
    def folder(self) -> Path:
        """Folder that the names of the shards are relative to."""
        return self._folder

    @property
    def identity(self) -> str:
        """Hash of the split's content: the tars, and which of their members are whose."""
        if self._hash:
            return self._hash
        lines = [self.split]
        for number, chosen in self._chosen[self.split]:
            found = self._indexed[number]
            keys = keys_sha256([found.keys[at] for at in chosen])
            members = hashlib.sha256(b"".join(_record_at(found, at) for at in chosen)).hexdigest()
            lines.append(f"{found.sha256} {keys} {members}")
        self._hash = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return self._hash

    @property
    def earlier_identities(self) -> list[str]:
        """None: tars that have changed are other data."""
        return []

    def _by_split(self, base: Path) -> dict[str, list[Any]]:
        """Return for each split (number of the tar, positions in it), where there are any."""
        words = [SPLIT_WORDS.findall(f"/{name.lower()}") for name in self._names]
        odd = next((i for i, found in enumerate(words) if bool(found) != bool(words[0])), None)
        if odd is not None:
            named, other = (odd, 0) if words[odd] else (0, odd)
            raise InputError(
                f"{base / self._names[other]}: its name says no split, that of "
                f"{self._names[named]} does; name all tars by train, val and test, or none"
            )
        found: dict[str, list[Any]] = {name: [] for name in SPLITS}
        if words[0]:
            for number, one in enumerate(words):
                word = SPLIT_OF.get(one[-1], one[-1])
                found[word].append((number, range(self._indexed[number].samples)))
            return {name: chosen for name, chosen in found.items() if chosen}
        names = [
            f"{name}:{key}"
            for name, index in zip(self._names, self._indexed, strict=True)
            for key in index.keys
        ]
        numbers, first = assigned_splits(names, *DIVIDED), 0
        for number, index in enumerate(self._indexed):
            mine = numbers[first : first + index.samples]
            first += index.samples
            for code, name in enumerate(SPLITS):
                if len(at := np.flatnonzero(mine == code)):
                    found[name].append((number, at.tolist()))
        return found

    def _manifest(self, location: str) -> Manifest:
        """Describe the tars as a manifest does."""
        seen: dict[str, str] = {}
        for name, index in zip(self._names, self._indexed, strict=True):
            if (other := seen.setdefault(index.sha256, name)) != name:
                raise InputError(
                    f"{location}: {name} and {other} have the same content; remove one of them"
                )
        splits = {}
        for name, chosen in self._chosen.items():
            shards = [
                ShardEntry(
                    self._names[number],
                    len(at),
                    self._indexed[number].length,
                    self._indexed[number].sha256,
                    "",
                )
                for number, at in chosen
            ]
            splits[name] = SplitEntry(sum(len(at) for _, at in chosen), "", shards)
        most = max((index.samples for index in self._indexed), default=1)
        return Manifest(location, None, CODEC, 100, max(1, most), splits)

    def _described(self, root: Path) -> str:
        """Say what the tars were taken for."""
        total = sum(index.samples for index in self._indexed)
        suffixes = sorted({one for index in self._indexed for one in index.suffixes.split(", ")})
        counts = ", ".join(f"{name} {one.samples:,}" for name, one in self.manifest.splits.items())
        skipped = sum(index.skipped for index in self._indexed)
        return (
            f"{root}: {len(self._tars)} WebDataset tar(s), {total:,} samples of "
            f"{'; '.join(suffixes)}: {counts}"
            + (f"; {skipped:,} keys without a picture" if skipped else "")
        )

    def _check_folder(self) -> None:
        """Leave it to the tar that is missing."""

    def _open_shard(self, number: int, cancelled: object) -> OpenShard:
        tar, at = self._chosen[self.split][number]
        return _OpenTar(self._tars[tar], self._indexed[tar], at, self.shards[number])


def open_splits(location: str, cache: Cache | None = None) -> list[ForeignShardSet]:
    """Open every split that foreign tars have.

    Raises:
        InputError, DamagedDataError: see :class:`ForeignShardSet`.
    """
    sets = []
    for split in SPLITS:
        with contextlib.suppress(NoSplitError):
            sets.append(ForeignShardSet(location, split, cache=cache))
    return sets


def _record_at(index: TarIndex, position: int) -> bytes:
    return index.records[RECORD.size * position : RECORD.size * (position + 1)]


class _OpenTar(OpenShard):
    """One open foreign tar."""

    def __init__(
        self, tar: Path, index: TarIndex, chosen: Sequence[int], entry: ShardEntry
    ) -> None:
        super().__init__(tar, b"", entry, CODEC, None)
        self._index, self._chosen = index, chosen

    def read(self, position: int) -> Encoded:
        """Read one sample and compare it with the index.

        Raises:
            DamageError: it is another than when it was indexed.
            OSError: it cannot be read.
        """
        at = self._chosen[position]
        image_at, image, mask_at, mask, crc, turned, both = RECORD.unpack(
            _record_at(self._index, at)
        )
        parts = []
        for offset, length in ((image_at, image), (mask_at, mask)):
            data = memoryview(os.pread(self._descriptor, length, offset))
            if len(data) != length:
                self._check_length(os.fstat(self._descriptor).st_size)
                raise DamageError("the tar changed while it was read")
            parts.append(data)
        if isal_zlib.crc32(parts[1], isal_zlib.crc32(parts[0])) != crc:
            raise DamageError("the sample is not what it was when the tar was indexed")
        return Encoded(self._index.keys[at], parts[0], parts[1], f"{CODEC}-{turned}-{both}")

    def key(self, position: int) -> str:
        """Return a sample's key."""
        return self._index.keys[self._chosen[position]]


class IndexStore:
    """The indexes of tars, in a folder that processes of a machine share.

    Args:
        cache: whose folder it is in.
        members: suffixes that the user gave, by ``image`` and ``mask``.

    Attributes:
        made: whether an index was made, and not found.
    """

    def __init__(self, cache: Cache, members: dict[str, str]) -> None:
        self._cache, self._members = cache, members
        self._folder = cache.folder / "indexes"
        self.made = False

    def open(self, tar: Path) -> TarIndex:
        """Return the index of a tar, made where there is none of this length and time.

        Raises:
            InputError, DamagedDataError: see :class:`ForeignShardSet`.
        """
        name = json.dumps([str(tar.resolve()), sorted(self._members.items())])
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.index"
        with self._cache.explained():
            self._folder.mkdir(exist_ok=True, mode=0o700)
            if found := self._read(path, tar):
                return found
            with locked(path.with_suffix(".lock")):
                if found := self._read(path, tar):  # another process made it meanwhile
                    return found
                made = index_tar(tar, self._members)
                files.write_bytes(path, made.to_bytes())
        self.made = True
        return made

    def _read(self, path: Path, tar: Path) -> TarIndex | None:
        try:
            found = parse_index(files.read_regular(path, INDEX_LIMIT))
        except FileNotFoundError:
            return None
        return found if found and found.state == _state(tar) else None


def _state(tar: Path) -> str:
    """Return what changes when a tar does; DamagedDataError where it cannot be read."""
    try:
        found = tar.stat()
    except OSError as error:
        raise DamagedDataError(
            f"{tar}: cannot be read ({error.strerror}); copy it again"
        ) from error
    return f"{found.st_size} {found.st_mtime_ns}"


def index_tar(tar: Path, members: dict[str, str]) -> TarIndex:
    """Read a tar to its end, and check every image and mask by its header.

    Args:
        tar: a local file.
        members: suffixes that the user gave, by ``image`` and ``mask``.

    Raises:
        InputError: it is compressed, an image has no mask, or members cannot be told apart.
        DamagedDataError: it is cut off, no tar, or holds what no picture is.
    """
    state = _state(tar)
    try:
        with open(files.open_regular(tar), "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found = _index_open(tar, file, members)
            length = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DamagedDataError(
            f"{tar}: cannot be read ({error.strerror}); copy it again"
        ) from error
    if _state(tar) != state:
        raise DamagedDataError(f"{tar}: it changed while it was read; run again when it is whole")
    return TarIndex(length, state, sha256, **found)


def _index_open(tar: Path, file: IO[bytes], members: dict[str, str]) -> dict[str, Any]:
    keys: list[str] = []
    records: list[bytes] = []
    suffixes: set[str] = set()
    skipped = 0
    for key, found in _grouped(tar, file).items():
        chosen = choose(tuple(found), members.get("image", ""), members.get("mask", ""))
        if isinstance(chosen, str):
            raise InputError(f"{tar}: {shorten(key)}: {chosen}")
        if chosen is None:
            skipped += 1
            continue
        suffixes.add(shorten(f"image {chosen[0]} mask {chosen[1]}"))
        pair = {name: found[name] for name in chosen}
        records.append(_record(tar, key, file, pair, decode=not records))
        keys.append(key)
    if not keys:
        raise InputError(
            f"{tar}: no image with a mask in it; say which members they are: "
            "DIR#image=SUFFIX+mask=SUFFIX"
        )
    return {
        "suffixes": ", ".join(sorted(suffixes)),
        "skipped": skipped,
        "keys": keys,
        "records": b"".join(records),
    }


@functools.lru_cache(maxsize=1024)
def choose(suffixes: tuple[str, ...], image: str, mask: str) -> tuple[str, str] | str | None:
    """Tell the image and the mask among the members of a key.

    Args:
        suffixes: of the members.
        image: what the user says, several separated by ``;``; empty: the only picture but the
            mask.
        mask: likewise; empty: the only picture with a word such as mask, seg or alpha in its
            suffix, else a PNG beside one JPEG.

    Returns:
        Both suffixes; None where the key has neither; a text that says what is wrong.
    """
    pictures = [one for one in suffixes if one.rpartition(".")[2] in IMAGE_TYPES]
    images, masks = (
        [one for one in given.lower().split(";") if one in suffixes] for given in (image, mask)
    )
    if not (pictures or images or masks):
        return None
    if not mask:
        rest = [one for one in pictures if one not in images]
        named = [one for one in rest if set(re.split(r"[._-]", one)) & set(MASK_WORDS)]
        png = [one for one in rest if one == "png"]
        masks = named or (png if len(rest) + len(images) == 2 else [])
    if not image:
        images = [one for one in pictures if one not in masks]
    if len(images) == len(masks) == 1 and images != masks:
        return images[0], masks[0]
    lacks = " and ".join(
        f"no {what}" for what, found in (("image", images), ("mask", masks)) if not found
    )
    what = lacks or "several members that may be image or mask"
    return (
        f"{what} among {shorten(', '.join(suffixes))}; say which they are: "
        "DIR#image=SUFFIX+mask=SUFFIX"
    )


def _grouped(tar: Path, file: IO[bytes]) -> dict[str, dict[str, Member]]:
    """Return the members of each key, by suffix, in the order of the tar."""
    found: dict[str, dict[str, Member]] = {}
    for name, member in _members(tar, file):
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        if not stem or not suffix:
            continue
        if not key.isprintable() or len(key) > LONGEST_KEY:
            raise DamagedDataError(
                f"{tar}: {key[:40]!r} is no name of a sample; pack the tar again"
            )
        own = found.setdefault(key, {})
        if suffix in own:
            raise DamagedDataError(
                f"{tar}: {shorten(name)} is in it twice; pack the tar again with one of each name"
            )
        own[suffix] = member
    return found


class _Headers:
    """A file for tarfile, which reads headers only: none may ask for a disk's worth of memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read a header."""
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _members(tar: Path, file: IO[bytes]) -> Iterator[tuple[str, Member]]:
    """Yield the regular files of a tar.

    Raises:
        InputError: it is compressed.
        DamagedDataError: it is no tar, or not whole.
    """
    length = os.fstat(file.fileno()).st_size
    file.seek(0)
    if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise InputError(f"{tar}: is compressed; unpack it to a plain .tar")
    file.seek(0)
    end, before = 0, -1
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            while (info := archive.next()) is not None:
                archive.members = []  # it would keep all of them
                if info.offset <= before or info.size < 0 or info.offset_data <= info.offset:
                    raise tarfile.ReadError("its headers go backwards")
                before = info.offset
                end = info.offset_data + (padded(info.size) if info.isreg() else 0)
                if end > length:
                    raise tarfile.ReadError(f"cut off within {shorten(info.name)}")
                if info.issparse() or (info.isreg() and info.size > LONGEST_MEMBER):
                    raise tarfile.ReadError(f"{shorten(info.name)} is no picture of a usual size")
                if not (info.isreg() or info.isdir()):
                    raise tarfile.ReadError(f"{shorten(info.name)} is a link or device, no file")
                if info.isreg():
                    yield info.name, Member(info.offset_data, info.size)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        what = one_line(error, 100)
        raise DamagedDataError(f"{tar}: is no whole tar ({what}); copy or pack it again") from error
    _check_end(tar, file, end)


def _check_end(tar: Path, file: IO[bytes], end: int) -> None:
    """Check that zeros follow on the last member: tarfile takes anything else for the end, too."""
    file.seek(end)
    first = file.read(BLOCK)
    if len(first) < BLOCK:
        raise DamagedDataError(f"{tar}: is cut off, its end is missing; copy or pack it again")
    while first:
        if first.count(0) != len(first):
            raise DamagedDataError(
                f"{tar}: something follows on its end at byte {end:,}: a damaged header, or "
                "several tars in one file; pack it again as one"
            )
        first = file.read(1 << 20)


def _record(
    tar: Path, key: str, file: IO[bytes], pair: dict[str, Member], *, decode: bool
) -> bytes:
    """Check image and mask of a sample, and return its record.

    Args:
        tar: for messages.
        key: of the sample.
        file: the open tar.
        pair: image and mask, by suffix.
        decode: whether to decode both, too.

    Raises:
        InputError: their sizes differ, or the mask is none.
        DamagedDataError: one is no picture.
    """
    image, mask = (os.pread(file.fileno(), one.bytes, one.offset) for one in pair.values())
    names = [f"{tar}: {shorten(f'{key}.{suffix}')}" for suffix in pair]
    (size, turned), (shape, own) = map(_facts_of, names, (image, mask))
    try:
        if max(size[0] * size[1], shape[0] * shape[1]) > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        shown, mask_shown = _upright(size, turned), _upright(shape, own)
        # As ``pack`` does: the maker of the mask may not have looked at EXIF.
        both = mask_shown == size != shown
        if mask_shown != shown and not both:
            raise InputError(
                f"{tar}: {shorten(key)}: its image has {shown[0]}x{shown[1]} pixels, its mask "
                f"{mask_shown[0]}x{mask_shown[1]}; bring both to one size"
            )
        if decode:
            out = np.empty((*shown[::-1], 3), np.uint8), np.empty(shown[::-1], np.uint8)
            decode_files(image, mask, None, *out, exact=True, turns=Turns(turned, both))
    except NotAMaskError as error:
        raise InputError(f"{tar}: {shorten(key)}: {error}") from error
    except (*DAMAGED, RuntimeError) as error:
        raise _damaged(f"{tar}: {shorten(key)}", error) from error
    crc = isal_zlib.crc32(mask, isal_zlib.crc32(image))
    places = [place for one in pair.values() for place in (one.offset, one.bytes)]
    return RECORD.pack(*places, crc, turned, both)


def _facts_of(name: str, data: bytes) -> tuple[tuple[int, int], int]:
    """Return :func:`_facts` of a member; DamagedDataError, which names it, where it has none."""
    try:
        return _facts(data)
    except (*DAMAGED, RuntimeError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> DamagedDataError:
    return DamagedDataError(
        f"{name}: does not decode ({reason(error)[:100]}); pack the tar again without it"
    )


def _facts(data: bytes) -> tuple[tuple[int, int], int]:
    """Return (width, height) of a picture as it is stored, and its EXIF orientation."""
    if data.startswith(b"\xff\xd8"):
        height, width = jpeg_size(data)
        return (width, height), exif_orientation(data)
    return picture_size(data), picture_orientation(data)


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation >= 5 else size
