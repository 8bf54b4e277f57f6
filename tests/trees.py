"""Prepared trees made by hand, far smaller than generated portraits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from portrait_dist.data.source.assignment import SPLITS


def write_tree(data: Path, keys: dict[str, list[str]], size: tuple[int, int] = (24, 16)) -> Path:
    """A prepared tree of tiny pairs, made by hand."""
    for name in SPLITS:
        (data / name).mkdir(parents=True, exist_ok=True)
        for number, key in enumerate(keys.get(name, [])):
            pixels = np.random.default_rng(number).integers(0, 256, (*size, 4), dtype=np.uint8)
            Image.fromarray(pixels[..., :3]).save(data / name / f"{key}.jpg", quality=90)
            Image.fromarray(pixels, "RGBA").save(data / name / f"{key}.png")
    splits = {name: keys.get(name, []) for name in SPLITS}
    (data / "split.json").write_text(
        json.dumps({"format": 1, "source": "by hand", "splits": splits})
    )
    return data
