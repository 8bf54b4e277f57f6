"""Make shards of your own images and grey masks, and look at the batches.

    python examples/own_data.py photos/ masks/ --out shards
    portrait-dist train data.shards=shards run.name=own

Layouts that ``portrait-dist prepare --raw`` knows, such as ``images/`` and ``masks/`` in one
folder, need no program; this is the way for all others. ``photos/`` and ``masks/`` hold files of
the same names, in any format that Pillow reads; masks are white where the person is. They are laid
out as AISegment's: a JPEG, and a PNG whose alpha channel is the mask.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from portrait_dist.data import build_loader
from portrait_dist.data.shards import writer
from portrait_dist.data.source import split
from portrait_dist.data.source.masks import decode_mask
from portrait_dist.inference.photos import read_photo


def arrange(photos: Path, masks: Path, raw: Path) -> int:
    """Write a raw tree from two folders; return the number of pairs.

    Photos without a mask are named by ``split.prepare`` afterwards, like masks without a photo.
    """
    images, mattes = raw / "clip_img" / "own" / "clip_0", raw / "matting" / "own" / "matting_0"
    images.mkdir(parents=True)
    mattes.mkdir(parents=True)
    for path in sorted(photos.iterdir()):
        image = Image.fromarray(read_photo(path))
        image.save(images / f"{path.stem}.jpg", quality=95)
    for path in sorted(masks.iterdir()):
        alpha = Image.fromarray(decode_mask(path.read_bytes()))
        matte = Image.new("RGBA", alpha.size)
        matte.putalpha(alpha)
        matte.save(mattes / f"{path.stem}.png")
    return len(list(mattes.iterdir()))


def main(arguments: list[str] | None = None) -> Path:
    """Pack the shards and print the shape of the first batch; return their folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--out", type=Path, default=Path("shards"))
    parser.add_argument("--side", type=int, default=256, help="height and width in the shards")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        raw, data = Path(folder) / "raw", Path(folder) / "data"
        arrange(options.photos, options.masks, raw)
        split.prepare(raw, data)
        writer.pack(data, options.out, size=(options.side, options.side))
    loader = build_loader(str(options.out), "train", batch_size=4, seed=0)
    batch = next(iter(loader))
    loader.close()
    print(batch.image.shape, batch.alpha.shape, batch.keys)
    return Path(options.out)


if __name__ == "__main__":
    main()
