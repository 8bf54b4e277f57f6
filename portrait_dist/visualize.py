"""Pictures to look at: a contact sheet of a split, and grids of predictions. Pure functions from arrays to PIL pictures.

Images are uint8 [H, W, 3], alphas uint8 [H, W] or float [H, W] in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Alpha = NDArray[Any]

PAPER, INK, FAINT = (250, 250, 250), (30, 30, 30), (110, 110, 110)
FIGURE, EDGE = (0, 200, 120), (255, 255, 0)
MISSED, WRONG = (
    (255, 140, 0),
    (230, 0, 90),
)  # a person taken for background, and the other way round
GAP, TEXT = 6, 13  # pixels


def overlay(image: Picture, alpha: Alpha) -> Picture:
    """The image with the background faded to grey, the figure tinted green and the 0.5 level of alpha drawn in yellow."""
    share = _share(alpha)[..., None]
    grey: Alpha = image.mean(axis=2, keepdims=True) * 0.45 + 110
    tinted = image * 0.78 + np.array(FIGURE) * 0.22
    picture = (share * tinted + (1 - share) * grey).astype(np.uint8)
    picture[_edge(share[..., 0] >= 0.5)] = EDGE
    return picture


def cut_out(image: Picture, alpha: Alpha, square: int = 8) -> Picture:
    """The figure before a checkerboard."""
    share = _share(alpha)[..., None]
    return (
        share * image + (1 - share) * checkerboard(image.shape[0], image.shape[1], square)
    ).astype(np.uint8)


def checkerboard(height: int, width: int, square: int = 8) -> Picture:
    """White and light grey squares, [height, width, 3]."""
    rows, columns = np.arange(height)[:, None] // square, np.arange(width)[None] // square
    board = np.where((rows + columns) % 2, 255, 205).astype(np.uint8)
    return np.repeat(board[..., None], 3, axis=2)


def errors(image: Picture, alpha: Alpha, prediction: Alpha) -> Picture:
    """The image, dim, with missed figure in orange and wrongly taken background in red, as strong as the error is."""
    difference = _share(prediction) - _share(alpha)
    picture = image * 0.35 + 60
    for colour, size in ((MISSED, -difference), (WRONG, difference)):
        strength = np.clip(size, 0, 1)[..., None]
        picture = picture * (1 - strength) + np.array(colour) * strength
    return picture.astype(np.uint8)


def iou(alpha: Alpha, prediction: Alpha) -> float:
    """Foreground IoU, both binarised at 0.5; 1 where both are empty."""
    truth, guess = _share(alpha) >= 0.5, _share(prediction) >= 0.5
    union = int((truth | guess).sum())
    return int((truth & guess).sum()) / union if union else 1.0


def picture_grid(
    images: Sequence[Picture], alphas: Sequence[Alpha], predictions: Sequence[Alpha]
) -> Image.Image:
    """One row for each sample: image, matte, prediction, cut-out by the prediction, errors; with the sample's IoU.

    Args:
        images: uint8, each [H, W, 3], or one array [B, H, W, 3].
        alphas: the true mattes, uint8 or float in 0..1.
        predictions: likewise.
    """
    rows, captions = [], []
    for image, alpha, prediction in zip(images, alphas, predictions, strict=True):
        rows.append(
            [
                image,
                _grey(alpha),
                _grey(prediction),
                cut_out(image, prediction),
                errors(image, alpha, prediction),
            ]
        )
        captions.append(f"IoU {iou(alpha, prediction):.4f}")
    headings = ["image", "matte", "prediction", "cut-out", "missed: orange, wrong: red"]
    return sheet(rows, headings, captions)


def contact_sheet(
    images: Sequence[Picture],
    alphas: Sequence[Alpha],
    captions: Sequence[str],
    augmented: Sequence[Sequence[Picture]] = (),
) -> Image.Image:
    """One row for each sample: image, matte, overlay, cut-out, then what augmentation makes of it.

    Args:
        images: uint8, each [H, W, 3].
        alphas: their mattes.
        captions: a line under each row.
        augmented: for each sample its augmented pictures, the same number each; none by default.
    """
    rows = [
        [image, _grey(alpha), overlay(image, alpha), cut_out(image, alpha)]
        for image, alpha in zip(images, alphas, strict=True)
    ]
    headings = ["image", "matte", "overlay", "cut-out"]
    if augmented:
        rows = [row + list(more) for row, more in zip(rows, augmented, strict=True)]
        headings += [f"augmented {number}" for number in range(1, len(augmented[0]) + 1)]
    return sheet(rows, headings, captions)


def sheet(
    rows: Sequence[Sequence[Picture]], headings: Sequence[str], captions: Sequence[str]
) -> Image.Image:
    """Pictures in rows, with a heading over each column and a caption under each row.

    All pictures have the size of the first; others are brought to it.
    """
    font = ImageFont.load_default(TEXT)
    height, width = rows[0][0].shape[:2]
    line = TEXT + 2 * GAP
    total = (GAP + len(headings) * (width + GAP), line + len(rows) * (height + line))
    paper = Image.new("RGB", total, PAPER)
    pen = ImageDraw.Draw(paper)
    for column, heading in enumerate(headings):
        pen.text(
            (GAP + column * (width + GAP), GAP), _fitting(heading, width, font), fill=INK, font=font
        )
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = line + number * (height + line)
        for column, picture in enumerate(row):
            cell = Image.fromarray(np.ascontiguousarray(picture))
            paper.paste(
                cell if cell.size == (width, height) else cell.resize((width, height)),
                (GAP + column * (width + GAP), top),
            )
        pen.text(
            (GAP, top + height + GAP // 2),
            _fitting(caption, total[0] - 2 * GAP, font),
            fill=FAINT,
            font=font,
        )
    return paper


def _fitting(text: str, width: int, font: Any) -> str:
    """The text, or as much of it as fits with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _share(alpha: Alpha) -> Alpha:
    """Alpha as float32 in 0..1."""
    alpha = np.asarray(alpha)
    return alpha.astype(np.float32) / 255 if alpha.dtype == np.uint8 else alpha.astype(np.float32)


def _grey(alpha: Alpha) -> Picture:
    levels = (np.clip(_share(alpha), 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a region that touch its outside, the border of the picture not counted."""
    padded = np.pad(inside, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core
