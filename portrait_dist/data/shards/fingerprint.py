"""Tell machines apart that would write other bytes for the same pairs.

Shards packed on several machines are equal to those of one only if every machine encodes alike.
That depends on the libraries and on the processor: torch resizes by another kernel without AVX2,
and igzip compresses by the instructions that it finds. So each machine encodes one synthetic
picture, in 40 ms.
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import simplejpeg

from portrait_dist.data.shards.encode import Settings, encode_pixels
from portrait_dist.data.shards.png import Pixels, encode_grey
from portrait_dist.system.info import cpu_name

SHAPE = (240, 180)
"""(H, W) of the synthetic picture, in pixels."""
LARGEST = 256
"""Pixels of a side that it is resized to at most, so that it takes a few milliseconds."""
LIBRARIES = ("isal", "pillow", "simplejpeg", "torch")
"""Whose versions can change the bytes."""


@dataclass(frozen=True)
class Fingerprint:
    """What a machine makes of the synthetic picture.

    Args:
        sha256: of the encoded members.
        versions: of the libraries that encode.
        machine: name and processor, for messages.
    """

    sha256: str
    versions: dict[str, str]
    machine: str

    def same_bytes(self, other: Fingerprint) -> bool:
        """Return whether two machines write the same bytes."""
        return (self.sha256, self.versions) == (other.sha256, other.versions)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.machine}: {versions}, picture {self.sha256[:8]}"


def encoder_fingerprint(settings: Settings) -> Fingerprint:
    """Encode the synthetic picture as pairs are encoded with these settings."""
    image, alpha = synthetic_picture()
    source = simplejpeg.encode_jpeg(image, quality=95, colorspace="RGB", colorsubsampling="420")
    if settings.size is None:
        members = b"", encode_grey(alpha)
    else:
        size = (min(settings.size[0], LARGEST), min(settings.size[1], LARGEST))
        members = encode_pixels(simplejpeg.decode_jpeg(source, "RGB"), alpha, size, settings)
    return Fingerprint(
        hashlib.sha256(b"".join(members)).hexdigest(),
        {name: metadata.version(name) for name in LIBRARIES},
        f"{socket.gethostname()} ({cpu_name()})",
    )


def parse_fingerprint(found: object) -> Fingerprint | None:
    """Read a fingerprint from a marker; None where there is none."""
    match found:
        case {"sha256": str(sha256), "versions": dict(versions), "machine": str(machine)}:
            return Fingerprint(
                sha256, {str(name): str(version) for name, version in versions.items()}, machine
            )
    return None


def synthetic_picture() -> tuple[Pixels, Pixels]:
    """Make an image, uint8 [H, W, 3], and an alpha, uint8 [H, W], by integer arithmetic only.

    Ramps for the resizing, an XOR pattern as noise for the codecs.
    """
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.int64)
    noise = (x * 7 + y * 13) ^ (x * y >> 3)
    channels = [(x * a + y * b + (noise & 31)) & 255 for a, b in ((1, 1), (2, 1), (1, 3))]
    image = np.stack(channels, axis=-1).astype(np.uint8)
    distance = (2 * x - SHAPE[1]) ** 2 + (2 * y - SHAPE[0]) ** 2
    alpha = np.clip(255 - (distance - 20_000) // 64, 0, 255).astype(np.uint8)
    return image, alpha
