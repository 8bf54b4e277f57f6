"""Draw samples of a prepared folder or of shards, and what augmentation makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.files import atomic_path, check_folder_writable, explained
from portrait_dist.preprocessing import DEFAULT_SIZE, MEAN, STD
from portrait_dist.system.address import is_one_folder, redact

if TYPE_CHECKING:
    from portrait_dist.config import AugmentConfig

Pixels = NDArray[np.uint8]
SIDES = range(8, 4096 + 1)
"""Height and width of a picture on the sheet, in pixels."""
SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Sheet:
    """A contact sheet that was written.

    Args:
        out: the file.
        split: what it shows.
        samples: number of rows.
        keys: of the samples.
    """

    out: str
    split: str
    samples: int
    keys: list[str]


@dataclass(frozen=True)
class Sample:
    """One sample: uint8 image [H, W, 3] and alpha [H, W], at the size they are stored in."""

    key: str
    image: Pixels
    alpha: Pixels


def write(
    data: str,
    split: str,
    out: Path,
    augmentation: AugmentConfig,
    *,
    samples: int = 8,
    augmented: int = 3,
    size: tuple[int, int] | None = None,
    seed: int = 42,
) -> Sheet:
    """Write a contact sheet of a split.

    Args:
        data: folder that ``prepare`` wrote, or folder or address of shards.
        split: ``train``, ``val`` or ``test``.
        out: picture to write.
        augmentation: settings of a training run.
        samples: rows, evenly spread over the split in key order.
        augmented: augmented versions of each, as epochs 0, 1, … of the training run see them.
        size: (H, W) that each is fitted into; None: that of the shards, or the default.
        seed: of the augmentation.

    Raises:
        InputError: no such data or split, a wrong size, or ``out`` cannot be written.
        DamagedDataError: a sample cannot be decoded.
    """
    from portrait_dist.visualize import contact_sheet

    _check_options(out, size)
    stored_size, reading = _open(data, split, samples)
    check_folder_writable(out.parent)
    found = list(reading)
    size = size or stored_size or DEFAULT_SIZE
    keys = [sample.key for sample in found]
    columns = _augmented(found, size, augmentation, seed, augmented) if augmented else ()
    images = [_resize(sample.image, _fit(sample, size)) for sample in found]
    alphas = [_resize(sample.alpha, _fit(sample, size)) for sample in found]
    _save(contact_sheet(images, alphas, captions=keys, augmented=columns), out)
    return Sheet(str(out), split, len(found), keys)


def _check_options(out: Path, size: tuple[int, int] | None) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out {out}: give a name that ends in .png or .jpg")
    if size is not None and not all(side in SIDES for side in size):
        raise InputError(
            f"--size {size[0]}x{size[1]}: each side is from {SIDES[0]} to {SIDES[-1]} pixels"
        )


def _save(sheet: Image.Image, out: Path) -> None:
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out, suffix=out.suffix.lower()) as temporary:
        sheet.save(temporary)


def _open(data: str, split: str, count: int) -> tuple[tuple[int, int] | None, Iterator[Sample]]:
    """Size of all samples, where there is one, and ``count`` of them, evenly spread over a split.

    Raises:
        InputError: no such data or split.
    """
    from portrait_dist.data.shards import format as shard_format
    from portrait_dist.data.shards.foreign import is_foreign
    from portrait_dist.data.source.layouts import is_source
    from portrait_dist.data.source.split import MANIFEST

    folder = Path(data)
    packed = (folder / shard_format.MANIFEST).is_file() or is_foreign(data)
    if packed or not is_one_folder(data):
        return _open_shards(data, split, count)
    if (folder / MANIFEST).is_file() or is_source(folder):
        return None, _open_folder(data, split, count)
    raise InputError(
        f"--data {redact(data)}: holds neither {MANIFEST} nor {shard_format.MANIFEST}; "
        "give what 'prepare' or 'pack' wrote"
    )


def _spread(available: int, count: int, data: str, split: str) -> list[int]:
    if not available:
        raise InputError(f"{redact(data)}: split '{split}' is empty; give another --split")
    return np.linspace(0, available - 1, min(count, available)).round().astype(int).tolist()


def _open_folder(data: str, split: str, count: int) -> Iterator[Sample]:
    from portrait_dist.data.map_dataset import AISegmentDataset

    dataset = AISegmentDataset(data, split)
    chosen = _spread(len(dataset), count, data, split)

    def read(index: int) -> Sample:
        image, mask = dataset.read(index)
        return Sample(dataset.pairs[index].key, np.asarray(image), np.asarray(mask))

    return map(read, chosen)


def _open_shards(
    data: str, split: str, count: int
) -> tuple[tuple[int, int] | None, Iterator[Sample]]:
    from portrait_dist.data.shards.decode import decode_stored
    from portrait_dist.data.shards.sets import open_shards

    shards = open_shards(data, split)
    chosen = _spread(shards.samples, count, data, split)

    def read(index: int) -> Sample:
        encoded = shards.read(index)
        try:
            return Sample(encoded.key, *decode_stored(encoded.image, encoded.alpha, encoded.codec))
        except ValueError as error:
            raise DamagedDataError(
                f"{shards.name(index)}: {error}; see 'portrait-dist verify'"
            ) from error

    return shards.size, map(read, chosen)


def _fit(sample: Sample, size: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (H, W) within ``size`` with the aspect ratio of a sample."""
    height, width = sample.alpha.shape
    scale = min(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize an image bilinearly, an alpha to the nearest pixel, as training samples are."""
    method = Image.Resampling.BILINEAR if pixels.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), method))


def _augmented(
    samples: Sequence[Sample],
    size: tuple[int, int],
    settings: AugmentConfig,
    seed: int,
    versions: int,
) -> list[list[Pixels]]:
    """For each sample ``versions`` pictures, as epochs 0, 1, … of a training run see them.

    They are augmented at the size of training and then drawn with the sample's aspect ratio.
    """
    import torch

    from portrait_dist.data.augment import Augment

    augment = Augment(settings, seed)
    images = torch.from_numpy(np.stack([_resize(sample.image, size) for sample in samples]))
    alphas = torch.from_numpy(np.stack([_resize(sample.alpha, size) for sample in samples]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    rows: list[list[Pixels]] = [[] for _ in samples]
    for epoch in range(versions):
        normalised, _ = augment(images, alphas, epoch=epoch, positions=np.arange(len(samples)))
        levels = ((normalised * std + mean) * 255).round().clamp(0, 255).byte()
        pictures = levels.permute(0, 2, 3, 1).contiguous().numpy()
        for row, sample, picture in zip(rows, samples, pictures, strict=True):
            row.append(_resize(picture, _fit(sample, size)))
    return rows
