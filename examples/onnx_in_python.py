"""Compute the mask of a photo with the exported network alone: no PyTorch, no portrait_dist.

    portrait-dist export --checkpoint runs/first/ckpt_best.pth --format onnx --out portrait.onnx
    pip install onnxruntime pillow numpy
    python examples/onnx_in_python.py portrait.onnx photo.jpg mask.png

The file says itself what goes in and comes out: ``session.get_modelmeta().custom_metadata_map``.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(arguments: list[str] | None = None) -> None:
    """Write the mask of one photo, at its own size, as an 8-bit grey PNG."""
    network, photo, out = arguments or sys.argv[1:]
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    _, _, height, width = wanted.shape

    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    # The normalisation is inside of the network: it takes values from 0 to 1.
    small = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    (alpha,) = session.run(["alpha"], {"image": small.transpose(2, 0, 1)[None]})

    mask = Image.fromarray((alpha[0, 0] * 255).round().astype(np.uint8))
    mask.resize(image.size, Image.Resampling.BILINEAR).save(out)


if __name__ == "__main__":
    main()
