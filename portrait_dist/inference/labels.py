"""Predicted masks as training data: samples as photos, masks as the alphas of new shards.

``predict --from-shards`` takes the samples of a packed set for photos; ``--out-shards`` packs
photos and their predicted masks, so that the shards can be trained with. The masks are files first:
whatever number of parts predicted them, the shards are the same.

The confidence of a mask is the mean over its pixels of |2 alpha - 1|: 1 where every pixel is surely
person or surely background, 0 where all are at one half.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from portrait_dist.data.shards import writer
from portrait_dist.data.shards.decode import decode_stored, npy_header
from portrait_dist.data.shards.encode import EncodedPair, Settings, StoredPair
from portrait_dist.data.shards.format import LONGEST_NAME, SUFFIXES
from portrait_dist.data.shards.png import decode_grey, encode_grey
from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet
from portrait_dist.data.source.assignment import SPLITS, assigned_splits
from portrait_dist.data.source.pairs import LEVELS, Pair
from portrait_dist.data.source.split import SEED, TEST_FRACTION, VAL_FRACTION, Split
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.files import check_folder_writable
from portrait_dist.inference.photos import Found, Photo
from portrait_dist.preprocessing import ImageArray
from portrait_dist.system.address import redact
from portrait_dist.system.info import cores
from portrait_dist.system.progress import track
from portrait_dist.system.threads import map_in_order

LONGEST_KEY = LONGEST_NAME - max(len(suffix) for pair in SUFFIXES.values() for suffix in pair)


@dataclass(frozen=True)
class Labels:
    """What becomes of masks beside their files.

    Args:
        out: folder of the new shards; None where masks stay files.
        min_confidence: masks below it are left out of them.
        size: (H, W) of their samples, None for the photos' own; not used with ``source``.
        samples_per_shard: likewise.
        source: shards whose samples are the photos; empty for files.
        split: of the source; its other splits go into the new shards as they are.
    """

    out: Path | None = None
    min_confidence: float = 0.0
    size: tuple[int, int] | None = None
    samples_per_shard: int = writer.SAMPLES_PER_SHARD
    source: str = ""
    split: str = "train"

    def check(self, kinds: Sequence[str], image_format: str) -> None:
        """Check before long work what would fail after it.

        Args:
            kinds: that are written.
            image_format: of their files.

        Raises:
            InputError: there would be no masks to pack, or nowhere to.
        """
        if not 0 <= self.min_confidence <= 1:  # also nan, which click's ranges take
            raise InputError(f"--min-confidence {self.min_confidence:g}: it is from 0 to 1")
        if self.out is None:
            if self.min_confidence > 0:
                raise InputError("--min-confidence: it goes with --out-shards; give that too")
            return
        if "mask" not in kinds or image_format != "png":
            raise InputError(
                "--out-shards: the masks are packed, so --only needs mask and --format png"
            )
        _settings(self).check()
        check_folder_writable(self.out)


@dataclass(frozen=True)
class Labelled:
    """What was packed.

    Args:
        out: folder of the shards.
        samples: in all their splits.
        unsure: photos whose masks are below the confidence.
    """

    out: str
    samples: int
    unsure: int


@dataclass(frozen=True)
class SamplePhoto(Photo):
    """A sample of packed shards as a photo; its outputs are named as its key."""

    shards: ShardSet
    sample: int

    def read(self) -> ImageArray:
        """Decode the stored image."""
        encoded = self.shards.read(self.sample)
        try:
            image, _ = decode_stored(encoded.image, encoded.alpha, self.shards.codec)
        except (ValueError, RuntimeError) as error:
            raise DamagedSampleError(f"{self.path}: does not decode ({error})") from error
        return image

    def identity(self) -> str:
        """Return where the sample is, by the content of its shard."""
        number, position = self.shards.locate(self.sample)
        return f"{self.shards.shards[number].sha256[:32]}-{position}"


def find_samples(location: str, split: str) -> Found:
    """Return the samples of a split as photos.

    Raises:
        InputError: no shards there, or no such split.
        DamagedDataError: they are damaged.
    """
    shards = ShardSet(location, split)
    return Found(
        photos=[
            SamplePhoto(Path(shards.name(sample)), shards.key(sample), shards, sample)
            for sample in range(len(shards))
        ]
    )


class _Sample(StoredPair):
    """A sample that goes into other shards, with a predicted mask or with its own."""

    def __init__(self, shards: ShardSet, sample: int, mask: Path | None) -> None:
        where = Path(shards.name(sample))
        super().__init__(shards.key(sample), where, mask or where, "", LEVELS)
        # The base is frozen: what is compared and hashed are its fields.
        object.__setattr__(self, "shards", shards)
        object.__setattr__(self, "sample", sample)
        object.__setattr__(self, "mask", mask)

    shards: ShardSet
    sample: int
    mask: Path | None

    def encoded(self, settings: Settings) -> EncodedPair:
        found = self.shards.read(self.sample)
        if self.mask is None:
            return EncodedPair(self.key, bytes(found.image), bytes(found.alpha))
        alpha = read_mask(self.mask)
        raw = settings.codec == "raw"
        mask = npy_header(alpha.shape) + alpha.tobytes() if raw else encode_grey(alpha)
        try:
            decode_stored(found.image, mask, settings.codec)
        except (ValueError, RuntimeError) as error:  # a mask of another size, above all
            raise DamagedDataError(f"{self.mask}: {error}; predict it again") from error
        return EncodedPair(self.key, bytes(found.image), mask)

    def sizes(self) -> tuple[int, int, int]:
        number, position = self.shards.locate(self.sample)
        content = int(self.shards.shards[number].sha256[:12], 16)
        if self.mask is None:
            return content, position, 0
        try:
            status = self.mask.stat()
        except OSError as error:
            raise _gone(self.mask) from error
        return content, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class _Labelled(Split):
    """Photos or samples with the masks that ``predict`` wrote, as ``pack`` takes them."""

    found: Mapping[tuple[str, str], Pair] | None = None

    def pair(self, split: str, key: str) -> Pair:
        assert self.found is not None
        return self.found[split, key]


def pack_labels(photos: Sequence[Photo], masks: Sequence[Path], labels: Labels) -> Labelled:
    """Pack photos with the masks that were predicted for them.

    Args:
        photos: all of them, also those of other parts.
        masks: the mask file of each, an 8-bit grey PNG.
        labels: where to, and which.

    Raises:
        InputError: ``labels.out`` holds something else, or no mask is confident.
        DamagedDataError: a mask is missing or damaged.
    """
    assert labels.out is not None
    kept = _confident(photos, masks, labels.min_confidence)
    if not kept:
        raise InputError(
            f"--min-confidence {labels.min_confidence:g}: none of {len(photos)} masks reaches it"
        )
    split = _of_samples(kept, labels) if labels.source else _of_files(kept, labels)
    settings = _settings(labels)
    result = writer.pack(
        split,
        labels.out,
        settings.size,
        settings.samples_per_shard,
        codec=settings.codec,
        quality=settings.quality,
        fit=settings.fit,
    )
    return Labelled(result.out, result.samples, len(photos) - len(kept))


def _settings(labels: Labels) -> Settings:
    if not labels.source:
        return Settings(labels.size, "jpeg", writer.QUALITY, labels.samples_per_shard)
    manifest = ShardSet(labels.source, labels.split).manifest
    return Settings(
        manifest.size,
        manifest.codec,
        manifest.quality,
        manifest.samples_per_shard,
        manifest.fit,
    )


def _confident(
    photos: Sequence[Photo], masks: Sequence[Path], least: float
) -> list[tuple[Photo, Path]]:
    pairs = list(zip(photos, masks, strict=True))
    if least <= 0:
        return pairs
    found = map_in_order(lambda mask: confidence(read_mask(mask)), masks, cores())
    shown = track(found, total=len(masks), what="masks")
    return [pair for pair, value in zip(pairs, shown, strict=True) if value >= least]


def confidence(alpha: ImageArray) -> float:
    """Return the mean of |2 alpha - 1| over a mask, uint8 [H, W]."""
    return float(np.abs(alpha.astype(np.float32) * (2 / 255) - 1).mean(dtype=np.float64))


def read_mask(path: Path) -> ImageArray:
    """Read a mask that ``predict`` wrote: uint8 [H, W].

    Raises:
        DamagedDataError: it is missing or damaged.
    """
    try:
        return np.asarray(decode_grey(path.read_bytes()))
    except OSError as error:
        raise _gone(path) from error
    except ValueError as error:
        raise DamagedDataError(f"{path}: does not decode ({error}); predict it again") from error


def _gone(path: Path) -> DamagedDataError:
    return DamagedDataError(f"{path}: cannot be read; predict it again")


def _of_samples(kept: Sequence[tuple[Photo, Path]], labels: Labels) -> Split:
    """Join samples and masks; the splits that were not predicted go along as they are."""
    found: dict[tuple[str, str], Pair] = {}
    for photo, mask in kept:
        assert isinstance(photo, SamplePhoto)
        found[labels.split, photo.name] = _Sample(photo.shards, photo.sample, mask)
    manifest = ShardSet(labels.source, labels.split).manifest
    for name in manifest.splits:
        if name != labels.split:
            shards = ShardSet(labels.source, name)
            others = (_Sample(shards, sample, None) for sample in range(len(shards)))
            found |= {(name, pair.key): pair for pair in others}
    shown = redact(labels.source)
    return _Labelled(shown, shown, _keys(found), masks=LEVELS, found=found)


def _of_files(kept: Sequence[tuple[Photo, Path]], labels: Labels) -> Split:
    """Join photos and masks; the split is ``prepare``'s, a pure function of the keys."""
    keys = sample_keys([photo.name for photo, _ in kept])
    order = sorted(range(len(kept)), key=lambda number: keys[number])
    assigned = assigned_splits(
        [keys[number] for number in order], SEED, VAL_FRACTION, TEST_FRACTION
    )
    found: dict[tuple[str, str], Pair] = {}
    for number, split in zip(order, assigned, strict=True):
        photo, mask = kept[number]
        found[SPLITS[split], keys[number]] = Pair(keys[number], photo.path, mask, "", LEVELS)
    folder = os.path.dirname(os.path.abspath(kept[0][1]))
    return _Labelled(folder, folder, _keys(found), masks=LEVELS, found=found)


def _keys(found: Mapping[tuple[str, str], Pair]) -> dict[str, list[str]]:
    return {name: [key for split, key in found if split == name] for name in SPLITS}


def sample_keys(names: Sequence[str]) -> list[str]:
    """Make keys that shards can hold out of the names of photos; no two are equal."""
    plain = [re.sub(r"[^\w-]", "_", name) for name in names]
    count = Counter(plain)
    return [
        key
        if count[key] == 1 and len(key.encode()) <= LONGEST_KEY - 17
        else f"{key.encode()[:48].decode(errors='ignore')}-{_hash(name)}"
        for key, name in zip(plain, names, strict=True)
    ]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
