"""The map-style dataset of the tutorial, over the tree that ``portrait-dist prepare`` writes.

It is the plain reference the stream is compared with: it opens two files for each sample, decodes
the whole RGBA matte and augments on the CPU at full size, as the tutorial does. To train, ``pack``
the tree and use ``build_loader``: many times faster.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as F

from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.locations import (
    Location,
    open_binary,
    read_bytes,
    shown,
    suffix_of,
)
from portrait_dist.data.source.masks import NotAMaskError, decode_mask
from portrait_dist.data.source.pairs import ALPHA, Pair
from portrait_dist.data.source.pictures import (
    MOST_BYTES,
    DepthError,
    orientation_of,
    rgb_of,
    upright,
)
from portrait_dist.data.source.split import MANIFEST, open_data, pair_paths
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.preprocessing import MEAN, STD


class AISegmentDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of image and soft mask of one split.

    A sample is ``(image, mask)``: image float32 [3, H, W], RGB, normalised by ImageNet's mean and
    deviation; mask float32 [1, H, W] in 0..1, the matte's last channel.

    On ``train`` a sample is flipped with probability 0.5, then its brightness, contrast and
    saturation are jittered by factors from [0.5, 1.5] at full size, then it is resized: the image
    bilinear with antialiasing, the mask to the nearest pixel. These are SuperGradients'
    SegRandomFlip, SegColorJitter and SegResize: equal to the bit when ``random`` and ``torch`` are
    seeded equally. On ``val`` and ``test`` it is only resized.

    Args:
        data_path: tree with ``<split>/<key>.jpg`` and ``<split>/<key>.png``, of ``prepare`` or of
            the tutorial; or any source that ``prepare`` takes, with its default split.
        split: ``train``, ``val`` or ``test``.
        input_height: of the samples, in pixels.
        input_width: of the samples, in pixels.

    Raises:
        InputError: no such tree or split.
        DamagedDataError: from ``__getitem__``, a file that is missing or cannot be decoded.
    """

    def __init__(
        self, data_path: str | Path, split: str, input_height: int = 256, input_width: int = 256
    ) -> None:
        self.pairs = _pairs(Path(data_path), split)
        self.split = split
        self.input_height, self.input_width = input_height, input_width
        self.jitter = ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.read(index)
        if self.split == "train":
            image, mask = self.augment(image, mask)
        size = (self.input_width, self.input_height)
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask.resize(size, Image.Resampling.NEAREST)
        return F.normalize(F.to_tensor(image), MEAN, STD), F.to_tensor(mask)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return image (RGB) and mask (L) of a pair at their own size."""
        pair = self.pairs[index]
        stored, mask = _decode(pair.image), _decode_mask(pair)
        orientation = orientation_of(stored)
        try:
            image = Image.fromarray(upright(rgb_of(stored), orientation))  # as ``pack`` does
        except DepthError as error:
            raise InputError(f"{shown(pair.image)}: {error}") from error
        if mask.size == stored.size != image.size:
            mask = Image.fromarray(upright(np.asarray(mask), orientation))
        if image.size != mask.size:
            raise InputError(
                f"{shown(pair.matte)}: {mask.size}, but its image {shown(pair.image)} has "
                f"{image.size}; bring both to one size"
            )
        return image, mask

    def augment(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Flip both and jitter the image.

        Draws from ``random`` and torch's default generator, in the order of SuperGradients.
        """
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.jitter(image), mask


def _pairs(data: Path, split: str) -> list[Pair]:
    """Return the pairs of a prepared tree, or of one arranged by other means (no split.json)."""
    images = data / split
    if split in SPLITS and not (data / MANIFEST).is_file() and images.is_dir():
        keys = sorted(path.stem for path in images.glob("*.jpg") if not path.name.startswith("."))
        return [
            Pair(key, *pair_paths(data, split, key), group=key.partition("-")[0]) for key in keys
        ]
    return open_data(data).pairs(split)


def _decode(path: Location) -> Image.Image:
    try:
        with open_binary(path) as file, Image.open(file) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise DamagedDataError(
            f"{path}: missing; run 'portrait-dist prepare' again, it adds what is missing"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DamagedDataError(
            f"{shown(path)}: cannot be decoded ({error}); get the file again, or remove the pair"
        ) from error


def _decode_mask(pair: Pair) -> Image.Image:
    """Mask of a pair, an image of mode L."""
    if pair.masks == ALPHA:
        matte = _decode(pair.matte)
        return matte.getchannel(matte.getbands()[-1])
    try:
        return Image.fromarray(
            decode_mask(read_bytes(pair.matte, MOST_BYTES), suffix_of(pair.matte))
        )
    except NotAMaskError as error:
        raise InputError(f"{shown(pair.matte)}: {error}") from error
    except (OSError, ValueError) as error:
        raise DamagedDataError(
            f"{shown(pair.matte)}: cannot be decoded ({error}); get the file again, or remove the "
            "pair"
        ) from error
