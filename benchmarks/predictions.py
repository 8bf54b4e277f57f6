r"""How good full-resolution masks are: fits of other shapes, mirrored averages, refined edges.

    python benchmarks/predictions.py --checkpoint runs/NAME/ckpt_best.pth --data prepared \
        --split val test --json out.json

Every image is compared with its matte at the image's own resolution. For the shapes, windows
are cut out of the upright images around the person (the person is close, and cut by the frame),
and the person is set into wide frames at the frame's full height, before the blurred background of
the next image (the person is far; only images whose person hardly touches the sides). The
network sees nothing but that window or frame. ``images_per_second`` is prediction and scoring
together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import measure
import numpy as np
import torch
from PIL import Image

from portrait_dist import metrics
from portrait_dist.data.source.split import read_split
from portrait_dist.inference import compositing
from portrait_dist.inference.photos import read_photo
from portrait_dist.inference.placement import FITS
from portrait_dist.inference.refine import refine_alpha
from portrait_dist.inference.segmenter import PortraitSegmenter

Pair = tuple[np.ndarray, np.ndarray]
Row = dict[str, str | float]
SHAPES = {
    "upright 3:4": None,
    "landscape 4:3": 4 / 3,
    "landscape 16:9": 16 / 9,
    "square": 1.0,
    "phone 9:16": 9 / 16,
}
REFINEMENTS = [
    (radius, smoothness) for radius in (1.0, 2.0, 4.0, 8.0) for smoothness in (1e-2, 1e-3, 1e-4)
]


def window(image: np.ndarray, alpha: np.ndarray, aspect: float | None) -> Pair:
    """Return the largest window of that width / height around the person's upper half."""
    if aspect is None:
        return image, alpha
    height, width = alpha.shape
    size = (min(height, round(width / aspect)), min(width, round(height * aspect)))
    rows, columns = np.nonzero(alpha > 127)
    centre = (
        (np.quantile(rows, 0.3), np.quantile(columns, 0.5))
        if len(rows)
        else (height / 2, width / 2)
    )
    top, left = (
        int(np.clip(middle - side / 2, 0, whole - side))
        for middle, side, whole in zip(centre, size, alpha.shape, strict=True)
    )
    cut = np.s_[top : top + size[0], left : left + size[1]]
    return image[cut], alpha[cut]


def frames(loaded: list[Pair], aspect: float) -> list[Pair]:
    """Make wide frames: the person in the middle, the next image's blurred background behind."""
    made = []
    for (image, alpha), (other, other_alpha) in zip(loaded, loaded[1:] + loaded[:1], strict=True):
        if max(alpha[:, :4].mean(), alpha[:, -4:].mean()) > 0.35 * 255:
            continue
        height, width = alpha.shape
        scene = compositing.to_bytes(
            compositing.blurred(other, other_alpha.astype(np.float32) / np.float32(255))
        )
        frame = np.asarray(Image.fromarray(scene).resize((round(height * aspect), height)))
        left = (frame.shape[1] - width) // 2
        matte = np.pad(alpha, ((0, 0), (left, frame.shape[1] - width - left)))
        weight = alpha[..., None].astype(np.float32) / np.float32(255)
        person = weight * compositing.foreground_colours(image, weight[..., 0])
        composed = frame.astype(np.float32) / 255
        composed[:, left : left + width] = person + (1 - weight) * composed[:, left : left + width]
        made.append((compositing.to_bytes(composed), matte))
    return made


def score(pairs: Iterator[Pair]) -> dict[str, float]:
    """Compute the pooled IoU and the means of the per-sample scores of (alpha, matte) pairs."""
    pooled, scores = metrics.SoftIoU(), metrics.AlphaScores()

    def add_all() -> int:
        count = 0
        for alpha, matte in pairs:
            preds = torch.from_numpy(alpha)[None]
            target = torch.from_numpy(matte.astype(np.float32) / 255)[None]
            pooled.update(preds, target)
            scores.update(preds, target)
            count += 1
        return count

    taken = measure.timed(add_all)
    means = {
        "mean_iou" if name == "iou" else name: float(value)
        for name, value in scores.compute().items()
    }
    return {
        "iou": float(pooled.compute()),
        **means,
        "samples": int(scores.samples),
        "images_per_second": taken.rate,
        "cpu_seconds_per_image": taken.cpu_seconds or 0.0,
    }


class Rows:
    """Score predictions and collect one row each."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, name: str, results: Iterator[Pair]) -> None:
        """Score (alpha, matte) pairs and print the row."""
        scores = score(results)
        self.rows.append({"name": name, **scores})
        shown = " ".join(
            f"{key} {scores[key]:.4f}"
            for key in ("iou", "mean_iou", "boundary_iou", "gradient_error", "mae")
        )
        print(f"{name:36s} {shown}", flush=True)


def add_fits(rows: Rows, segmenter: PortraitSegmenter, loaded: list[Pair]) -> None:
    """Score every fit on every shape."""
    shapes = {shape: [window(*pair, aspect) for pair in loaded] for shape, aspect in SHAPES.items()}
    shapes |= {
        f"frame {name}": frames(loaded, aspect)
        for name, aspect in (("4:3", 4 / 3), ("16:9", 16 / 9))
    }
    for shape, windows in shapes.items():
        for fit in FITS if windows else ():
            segmenter.fit = fit
            pairs = ((segmenter.predict(image), matte) for image, matte in windows)
            rows.add(f"{shape}, {fit}", pairs)


def add_refinements(rows: Rows, segmenter: PortraitSegmenter, loaded: list[Pair]) -> None:
    """Score masks without the mirrored average, then refined ones."""
    segmenter.fit, segmenter.mirror = "letterbox", False
    pairs = ((segmenter.predict(image), matte) for image, matte in loaded)
    rows.add("upright 3:4, letterbox, not mirrored", pairs)
    segmenter.mirror = True
    # Predicted once: the refinements differ only in what follows.
    alphas = [segmenter.predict(image) for image, _ in loaded]
    for radius, smoothness in REFINEMENTS:
        refine = functools.partial(refine_alpha, radius=radius, smoothness=smoothness)
        refined = (
            (refine(image, alpha, image.shape[0] / segmenter.size[0]), matte)
            for (image, matte), alpha in zip(loaded, alphas, strict=True)
        )
        rows.add(f"refined, radius {radius:g}, epsilon {smoothness:g}", refined)


def main(arguments: list[str] | None = None) -> None:
    """Score every fit on every shape, and the refinements."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="folder that 'portrait-dist prepare' wrote")
    parser.add_argument("--split", nargs="+", default=["test"])
    parser.add_argument("--limit", type=int, help="images; all when not given, 8 with --quick")
    options = parser.parse_args(arguments)
    pairs = [pair for split in options.split for pair in read_split(options.data).pairs(split)]
    pairs = pairs[: options.limit or (8 if options.quick else None)]
    loaded = [
        (read_photo(pair.image), np.asarray(Image.open(pair.matte).split()[-1])) for pair in pairs
    ]
    segmenter = PortraitSegmenter.from_checkpoint(options.checkpoint, refine=False)
    rows = Rows()
    add_fits(rows, segmenter, loaded)
    add_refinements(rows, segmenter, loaded)
    found = measure.result("predictions at full resolution", rows.rows, splits=options.split)
    measure.publish(found, options.json)


if __name__ == "__main__":
    main()
