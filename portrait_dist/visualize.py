"""Images to look at: contact sheets and grids of predictions, from arrays to PIL images.

Images are uint8 [H, W, 3], alphas uint8 [H, W] or float [H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from portrait_dist.preprocessing import Alpha, ImageArray

AnyAlpha = NDArray[Any]
"""uint8 [H, W], or float [H, W] in [0, 1]."""

PAPER, INK, FAINT = (250, 250, 250), (30, 30, 30), (110, 110, 110)
PERSON, EDGE = (0, 200, 120), (255, 255, 0)
MISSED, WRONG = (255, 140, 0), (230, 0, 90)
"""Colours of a person taken for background, and of background taken for a person."""
GAP, TEXT = 6, 13
"""Pixels between the cells of a sheet, and height of its text."""


def overlay(image: ImageArray, alpha: AnyAlpha) -> ImageArray:
    """Fade the background to grey, tint the person green, draw alpha's 0.5 level in yellow."""
    opacity = as_fraction(alpha)[..., None]
    grey = image.mean(axis=2, keepdims=True) * 0.45 + 110
    tinted = image * 0.78 + np.array(PERSON) * 0.22
    result = (opacity * tinted + (1 - opacity) * grey).astype(np.uint8)
    result[_edge(opacity[..., 0] >= 0.5)] = EDGE
    return result


def over_checkerboard(image: ImageArray, alpha: AnyAlpha, square: int = 8) -> ImageArray:
    """Put the image over a checkerboard, as opaque as alpha says."""
    opacity = as_fraction(alpha)[..., None]
    board = checkerboard(image.shape[0], image.shape[1], square)
    return (opacity * image + (1 - opacity) * board).astype(np.uint8)


def checkerboard(height: int, width: int, square: int = 8) -> ImageArray:
    """Return white and light grey squares, uint8 [height, width, 3]."""
    rows, columns = np.arange(height)[:, None] // square, np.arange(width)[None] // square
    board = np.where((rows + columns) % 2, 255, 205).astype(np.uint8)
    return np.repeat(board[..., None], 3, axis=2)


def errors(image: ImageArray, alpha: AnyAlpha, prediction: AnyAlpha) -> ImageArray:
    """Dim the image and mark missed person in orange and wrong background in red.

    The colours are as strong as the error is.
    """
    difference = as_fraction(prediction) - as_fraction(alpha)
    result = image * 0.35 + 60
    for colour, size in ((MISSED, -difference), (WRONG, difference)):
        strength = np.clip(size, 0, 1)[..., None]
        result = result * (1 - strength) + np.array(colour) * strength
    return result.astype(np.uint8)


def picture_grid(
    images: Sequence[ImageArray],
    alphas: Sequence[AnyAlpha],
    predictions: Sequence[AnyAlpha],
    ious: Sequence[float],
) -> Image.Image:
    """Draw one row for each sample: image, matte, prediction, cut-out by the prediction, errors.

    Args:
        images: uint8, each [H, W, 3], or one array [B, H, W, 3].
        alphas: the true mattes.
        predictions: likewise.
        ious: of each sample, for the captions.
    """
    rows = [
        [
            image,
            _grey(alpha),
            _grey(prediction),
            over_checkerboard(image, prediction),
            errors(image, alpha, prediction),
        ]
        for image, alpha, prediction in zip(images, alphas, predictions, strict=True)
    ]
    headings = ["image", "matte", "prediction", "cut-out", "errors"]
    captions = [f"IoU {iou:.4f}; missed person orange, wrong background red" for iou in ious]
    return sheet(rows, headings, captions)


def contact_sheet(
    images: Sequence[ImageArray],
    alphas: Sequence[AnyAlpha],
    captions: Sequence[str],
    augmented: Sequence[Sequence[ImageArray]] = (),
) -> Image.Image:
    """Draw one row for each sample: image, matte, overlay, cut-out, augmented images.

    Args:
        images: uint8, each [H, W, 3].
        alphas: their mattes.
        captions: a line under each row.
        augmented: for each sample its augmented images, the same number each; none by default.
    """
    rows = [
        [image, _grey(alpha), overlay(image, alpha), over_checkerboard(image, alpha)]
        for image, alpha in zip(images, alphas, strict=True)
    ]
    headings = ["image", "matte", "overlay", "cut-out"]
    if augmented:
        rows = [row + list(more) for row, more in zip(rows, augmented, strict=True)]
        headings += [f"augmented {number}" for number in range(1, len(augmented[0]) + 1)]
    return sheet(rows, headings, captions)


def sheet(
    rows: Sequence[Sequence[ImageArray]], headings: Sequence[str], captions: Sequence[str]
) -> Image.Image:
    """Lay images out in rows, with a heading over each column and a caption under each row.

    All images of a row get the size of its first. Where rows differ in size, images are centred in
    cells that the largest fits into.
    """
    font = ImageFont.load_default(TEXT)
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (0, 1))
    line = TEXT + 2 * GAP
    total = (GAP + len(headings) * (width + GAP), line + len(rows) * (height + line))
    paper = Image.new("RGB", total, PAPER)
    pen = ImageDraw.Draw(paper)
    for column, heading in enumerate(headings):
        corner = (GAP + column * (width + GAP), GAP)
        pen.text(corner, _fitting(heading, width, font), fill=INK, font=font)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = line + number * (height + line)
        size = (row[0].shape[1], row[0].shape[0])
        for column, image in enumerate(row):
            cell = Image.fromarray(np.ascontiguousarray(image))
            if cell.size != size:
                cell = cell.resize(size)
            left = GAP + column * (width + GAP) + (width - size[0]) // 2
            paper.paste(cell, (left, top + (height - size[1]) // 2))
        text = _fitting(caption, total[0] - 2 * GAP, font)
        pen.text((GAP, top + height + GAP // 2), text, fill=FAINT, font=font)
    return paper


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the text, or as much of it as fits with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def as_fraction(alpha: AnyAlpha) -> Alpha:
    """Return alpha as float32 in [0, 1]."""
    if alpha.dtype == np.uint8:
        return alpha.astype(np.float32) / np.float32(255)
    return alpha.astype(np.float32)


def _grey(alpha: AnyAlpha) -> ImageArray:
    levels = (np.clip(as_fraction(alpha), 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the pixels of a region that touch its outside, except at the image's border."""
    padded = np.pad(inside, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core
