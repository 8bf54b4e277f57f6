"""Reads samples for a contact sheet, from a prepared folder or from shards, augments them and writes the sheet."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.preprocessing import DEFAULT_SIZE

Sample = tuple[str, NDArray[np.uint8], NDArray[np.uint8]]  # key, image [H, W, 3], alpha [H, W]


def write(
    data: str,
    split: str,
    out: Path,
    *,
    samples: int = 8,
    augmented: int = 3,
    size: tuple[int, int] | None = None,
    recipe: str | None = None,
    words: tuple[str, ...] = (),
    seed: int = 42,
) -> dict[str, Any]:
    """Write a contact sheet of a split.

    Args:
        data: folder that ``prepare`` wrote, or folder or address of shards.
        split: ``train``, ``val`` or ``test``.
        out: picture to write.
        samples: rows, evenly spread over the split in key order.
        augmented: augmented versions of each, as a training run with this recipe and these words makes them.
        size: (height, width) of each picture; that of the shards, or 256x256, when None.
        seed: of the augmentation.

    Returns:
        ``out``, ``split``, ``samples``, ``keys``.

    Raises:
        InputError: no such data, split or recipe, a side is not of 8 to 4096 pixels, or ``out`` cannot be written.
        DamagedDataError: a sample cannot be decoded.
    """
    from portrait_dist import config
    from portrait_dist.visualize import contact_sheet

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"--out {out}: give a name that ends in .png or .jpg")
    if size is not None and not all(8 <= side <= 4096 for side in size):
        raise InputError(f"--size {size[0]}x{size[1]}: each side is from 8 to 4096 pixels")
    settings = config.load(recipe, words)
    found = read(data, split, samples, size)
    keys, images, alphas = (list(column) for column in zip(*found, strict=True))
    versions = _augmented(images, alphas, settings.augment, seed, augmented) if augmented else ()
    sheet = contact_sheet(images, alphas, captions=keys, augmented=versions)
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(part)
        os.replace(part, out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}); give another file"
        ) from error
    return {"out": str(out), "split": split, "samples": len(keys), "keys": keys}


def read(data: str, split: str, count: int, size: tuple[int, int] | None = None) -> list[Sample]:
    """``count`` samples (or all, if fewer), evenly spread over a split, at ``size`` (height, width)."""
    from portrait_dist.data.source.split import MANIFEST

    if (Path(data) / MANIFEST).is_file() or (Path(data) / "clip_img").is_dir():
        return _from_folder(data, split, count, size or DEFAULT_SIZE)
    if "://" not in data and not (Path(data) / "manifest.json").is_file():
        raise InputError(
            f"--data {data}: holds neither split.json nor manifest.json; give what 'prepare' or 'pack' wrote"
        )
    return _from_shards(data, split, count, size)


def _spread(available: int, count: int, data: str, split: str) -> list[int]:
    if not available:
        raise InputError(f"{data}: split '{split}' is empty; give another --split")
    return np.linspace(0, available - 1, min(count, available)).round().astype(int).tolist()


def _from_folder(data: str, split: str, count: int, size: tuple[int, int]) -> list[Sample]:
    from PIL import Image

    from portrait_dist.data.map_dataset import AISegmentDataset

    dataset = AISegmentDataset(data, split)
    samples: list[Sample] = []
    for index in _spread(len(dataset), count, data, split):
        image, mask = dataset.read(index)
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        mask = mask.resize((size[1], size[0]), Image.Resampling.NEAREST)
        samples.append((dataset.pairs[index].key, np.asarray(image), np.asarray(mask)))
    return samples


def _from_shards(data: str, split: str, count: int, size: tuple[int, int] | None) -> list[Sample]:
    from portrait_dist.data.shards.decode import decode_pair
    from portrait_dist.data.shards.reader import ShardSet

    shards = ShardSet(data, split)
    size = size or shards.size or DEFAULT_SIZE
    if shards.codec == "raw" and size != shards.size:
        raise InputError(
            f"--size {size[0]}x{size[1]}: shards of the raw codec are shown at their own size; leave --size out"
        )
    samples: list[Sample] = []
    for index in _spread(shards.samples, count, data, split):
        encoded = shards.read(index)
        image, alpha = np.empty((*size, 3), np.uint8), np.empty(size, np.uint8)
        try:
            decode_pair(
                encoded.image, encoded.alpha, size, image, alpha, exact=True, codec=shards.codec
            )
        except ValueError as error:
            raise DamagedDataError(
                f"{data}: {shards.name(index)}: {error}; see 'portrait-dist verify {data}'"
            ) from error
        samples.append((encoded.key, image, alpha))
    return samples


def _augmented(
    images: list[NDArray[np.uint8]],
    alphas: list[NDArray[np.uint8]],
    settings: Any,
    seed: int,
    versions: int,
) -> list[list[NDArray[np.uint8]]]:
    """For each sample ``versions`` pictures, as epochs 0, 1, … of a training run would see them."""
    import torch

    from portrait_dist.data.augment import Augment
    from portrait_dist.preprocessing import MEAN, STD

    augment = Augment(settings, seed)
    batch = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(alphas))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    rows: list[list[NDArray[np.uint8]]] = [[] for _ in images]
    for epoch in range(versions):
        normalised, _ = augment(*batch, epoch=epoch, positions=np.arange(len(images)))
        levels = (
            ((normalised * std + mean) * 255)
            .round()
            .clamp(0, 255)
            .byte()
            .permute(0, 2, 3, 1)
            .numpy()
        )
        for row, picture in zip(rows, levels, strict=True):
            row.append(picture)
    return rows
