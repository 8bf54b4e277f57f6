"""Make the README's picture: photos of the public domain, their masks and cut-outs.

    python -m benchmarks.hero --checkpoint runs/portraits/ckpt_best.pth
    uv run --with scikit-image python -m benchmarks.hero --checkpoint …     # two photos
    python -m benchmarks.hero --checkpoint … me.jpg --out me-cut-out.jpg

The photos come with packages: Grace Hopper with Matplotlib (by James S. Davis for the US Navy),
Eileen Collins with scikit-image (by NASA); works of US authorities, in the public domain. The
checkpoint should be of a network that was trained on real portraits; none of these two is shown to
it before. Each row is photo, mask and cut-out, as ``portrait-dist predict`` makes them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from portrait_dist.errors import InputError
from portrait_dist.inference import PortraitSegmenter, compositing
from portrait_dist.preprocessing import ImageArray

OUT = Path(__file__).parent / "results" / "portraits.jpg"
HEIGHT, GAP = 320, 8
"""Pixels of a row, and between rows."""
SHIPPED = (
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/astronaut.png"),
)


@dataclass(frozen=True)
class Hero:
    """What was made.

    Args:
        picture: the file.
        photos: paths.
        checkpoint: its sha256.
        coverage: fraction of each photo that the mask calls person.
    """

    picture: str
    photos: list[str]
    checkpoint: str
    coverage: list[float]


def shipped_photos() -> list[Path]:
    """List the photos that installed packages bring."""
    found = []
    for package, name in SHIPPED:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (path := Path(spec.origin).parent / name).is_file():
            found.append(path)
    return found


def row(photo: ImageArray, segmenter: PortraitSegmenter) -> tuple[ImageArray, float]:
    """Return photo, mask and cut-out side by side, uint8 [320, W, 3], and the mask's mean."""
    alpha = segmenter.predict(photo)
    panels = compositing.side_by_side(photo, alpha, compositing.cut_out(photo, alpha))
    width = round(panels.shape[1] * HEIGHT / panels.shape[0])
    return cv2.resize(panels, (width, HEIGHT), interpolation=cv2.INTER_AREA), float(alpha.mean())


def make(checkpoint: Path, photos: list[Path], out: Path) -> Hero:
    """Predict the photos and write the picture.

    Args:
        checkpoint: a .pth file of a run.
        photos: files that Pillow reads.
        out: .jpg or .png.

    Raises:
        InputError: there is no photo.
    """
    if not photos:
        raise InputError("no photo is given, and neither Matplotlib nor scikit-image is installed")
    segmenter = PortraitSegmenter.from_checkpoint(checkpoint)
    rows, coverage = [], []
    for path in photos:
        with Image.open(path) as opened:
            panels, mean = row(np.asarray(opened.convert("RGB")), segmenter)
        rows.append(panels)
        coverage.append(round(mean, 4))
    width = max(panels.shape[1] for panels in rows)
    sheet = np.full((len(rows) * (HEIGHT + GAP) - GAP, width, 3), 255, np.uint8)
    for number, panels in enumerate(rows):
        top = number * (HEIGHT + GAP)
        sheet[top : top + HEIGHT, : panels.shape[1]] = panels
    Image.fromarray(sheet).save(out, quality=88)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    return Hero(str(out), [str(path) for path in photos], digest, coverage)


def main() -> None:
    """Run as the README's line does."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="*", type=Path, help="default: those of the packages")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in results/")
    options = parser.parse_args()
    made = make(options.checkpoint, options.photos or shipped_photos(), options.out)
    print(json.dumps(asdict(made)))


if __name__ == "__main__":
    main()
