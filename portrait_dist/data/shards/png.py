"""Decode the alpha of a PNG, and encode an alpha as a grey PNG.

By hand, because a third of the time is enough: only the alpha of a 600×800 RGBA matte takes 2.9 ms,
the whole matte 7.4 ms with OpenCV and 7.7 ms with Pillow (benchmarks/NOTES.md, "Decoding and
pack"). That halves the time of ``pack``, and of a training run on mattes of original size.

How: a PNG's row filters work on each channel for itself. So the alpha bytes of an inflated RGBA
matte, still filtered, are put into a grey PNG that is not compressed, and OpenCV undoes the filters
of that: a quarter of the bytes, and the same alpha. Inflating is igzip's (2.1 ms, zlib 4.5 ms).
Kinds of PNG that are rare among mattes (interlaced, 16 bits) go to Pillow.

The numbers of sections are those of the PNG specification, ISO/IEC 15948.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

MAX_PIXELS = 1 << 28
"""Of a PNG; more than any camera gives. A header that claims more is damaged or hostile."""
GREY, GREY_ALPHA, RGB_ALPHA = 0, 4, 6
"""Colour types, 11.2.2."""
ALPHA_COMPRESSION = 2
"""Level of igzip for stored alphas, without row filters.

A 256×256 mask takes 0.04 ms and 3.5 kB, with zlib's level 3 0.16 ms and 3.6 kB. Without filters it
decodes in 0.03 ms, against 0.18 ms with the filters that Pillow chooses.
"""
_CHANNELS = {GREY: 1, 2: 3, 3: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LAST_FILTER = 4
_LARGEST_STORED_BLOCK = 0xFFFF


class Header(NamedTuple):
    """What a PNG's IHDR chunk says (11.2.2); sizes in pixels, depth in bits."""

    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filters: int
    interlaced: int

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of one pixel; 0 for less than 8 bits a channel in one channel."""
        return _CHANNELS[self.colour] * self.depth // 8


def decode_grey(png: bytes | memoryview) -> Pixels:
    """Decode an 8-bit grey PNG to uint8 [H, W].

    Raises:
        ValueError: damaged, or another kind of PNG.
    """
    header, data = _read(png)
    if (header.depth, header.colour) != (8, GREY):
        raise ValueError("the alpha is not an 8-bit grey PNG")
    if header.interlaced:
        return _by_pillow(png)
    rows = _inflate(data, header)
    return _unfilter(rows) if rows[:, 0].any() else rows[:, 1:]  # our own have no row filters


def decode_matte(png: bytes | memoryview) -> Pixels:
    """Decode the alpha channel of a PNG with alpha to uint8 [H, W]; of 16 bits the upper 8.

    Raises:
        ValueError: damaged, or without an alpha channel.
    """
    header, data = _read(png)
    if header.colour not in (GREY_ALPHA, RGB_ALPHA):
        raise ValueError("is not a PNG with an alpha channel")
    if header.interlaced or header.depth != 8:
        return _by_pillow(png)
    rows, channels = _inflate(data, header), header.bytes_per_pixel
    # A row filter refers to the same channel of neighbouring pixels, so alpha can be unfiltered
    # alone: a quarter of the work of RGBA.
    alpha = np.empty((header.height, 1 + header.width), np.uint8)
    alpha[:, 0] = rows[:, 0]
    alpha[:, 1:] = rows[:, channels::channels]
    return _unfilter(alpha)


def encode_grey(alpha: Pixels) -> bytes:
    """Encode uint8 [H, W] as an 8-bit grey PNG that decodes fast."""
    # Each row begins with the number of its filter, 0 for none.
    rows = np.zeros((alpha.shape[0], 1 + alpha.shape[1]), np.uint8)
    rows[:, 1:] = alpha
    return _assemble(rows, isal_zlib.compress(rows.data, ALPHA_COMPRESSION))


def iter_chunks(png: bytes | memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield type and data of each chunk of a PNG up to IEND, its checksum compared (5.3).

    Raises:
        ValueError: no PNG, cut off or damaged.
    """
    view, offset, kind = memoryview(png), len(_SIGNATURE), b""
    if view[:offset] != _SIGNATURE:
        raise ValueError("is not a PNG")
    while kind != b"IEND":
        if offset + 12 > len(view):
            raise ValueError("the PNG is cut off")
        length, kind = struct.unpack_from(">I4s", view, offset)
        end = offset + 8 + length
        if end + 4 > len(view):
            raise ValueError("the PNG is cut off")
        if isal_zlib.crc32(view[offset + 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise ValueError("the PNG is damaged, a checksum is wrong")
        yield kind, view[offset + 8 : end]
        offset = end + 4


def parse_header(data: bytes | memoryview) -> Header:
    """Parse the data of an IHDR chunk.

    Raises:
        ValueError: not one that the specification allows, or of more pixels than ``MAX_PIXELS``.
    """
    if len(data) != 13:
        raise ValueError("the PNG has no header")
    header = Header(*struct.unpack(">IIBBBBB", data))
    if header.colour not in _CHANNELS:
        raise ValueError("the PNG has a colour type that does not exist")
    if not 0 < header.width * header.height <= MAX_PIXELS:
        raise ValueError(f"the PNG says that it has {header.width}x{header.height} pixels")
    return header


def _read(png: bytes | memoryview) -> tuple[Header, bytes | memoryview]:
    """Header and compressed pixels of a PNG whose every checksum is right."""
    header, pixels = None, []
    for kind, data in iter_chunks(png):
        if kind == b"IHDR":
            header = parse_header(data)
        elif kind == b"IDAT":
            pixels.append(data)
    if header is None or not pixels:
        raise ValueError("the PNG has no header or no pixels")
    return header, pixels[0] if len(pixels) == 1 else b"".join(pixels)


def _inflate(data: bytes | memoryview, header: Header) -> Pixels:
    """Return filtered rows, uint8 [H, 1 + W·bytes per pixel], each behind its filter's number."""
    stride = 1 + header.width * header.bytes_per_pixel
    try:
        # The size is known: otherwise the buffer grows by doubling, and is copied each time.
        raw = isal_zlib.decompress(data, bufsize=header.height * stride)
    except isal_zlib.IsalError as error:  # type: ignore[misc]  # its stub takes the class for an instance
        raise ValueError(str(error)) from error
    if len(raw) != header.height * stride:
        raise ValueError(f"the PNG holds {len(raw)} bytes of pixels, not {header.height * stride}")
    return np.frombuffer(raw, np.uint8).reshape(header.height, stride)


def _unfilter(rows: Pixels) -> Pixels:
    """Undo the row filters: uint8 [H, 1 + W], filtered, to [H, W]."""
    import cv2

    if rows[:, 0].max() > _LAST_FILTER:
        raise ValueError("the PNG has a row filter that does not exist")
    height, width = rows.shape[0], rows.shape[1] - 1
    png = np.frombuffer(_assemble(rows, _store(rows)), np.uint8)
    plain: Pixels | None = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
    if plain is None or plain.shape != (height, width):
        raise ValueError("the PNG does not decode")
    return plain


def _assemble(rows: Pixels, compressed: bytes) -> bytes:
    """Return an 8-bit grey PNG of filtered rows, uint8 [H, 1 + W], and of their zlib stream."""
    header = struct.pack(">IIBBBBB", rows.shape[1] - 1, rows.shape[0], 8, GREY, 0, 0, 0)
    parts = [_SIGNATURE]
    for kind, data in ((b"IHDR", header), (b"IDAT", compressed), (b"IEND", b"")):
        # The checksum covers type and data (5.3); begun at the type, the two need not be joined.
        checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)]
    return b"".join(parts)


def _store(rows: Pixels) -> bytes:
    """Return a zlib stream (RFC 1950) of stored, not compressed blocks (RFC 1951, 3.2.4)."""
    data, most = rows.reshape(-1).data, _LARGEST_STORED_BLOCK
    parts: list[bytes | memoryview] = [b"\x78\x01"]
    for start in range(0, len(data), most):
        block = data[start : start + most]
        last = start + most >= len(data)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ most), block]
    return b"".join([*parts, struct.pack(">I", isal_zlib.adler32(data))])


def _by_pillow(png: bytes | memoryview) -> Pixels:
    """Last channel of a rare kind of PNG: interlaced, or of 16 bits."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png)) as opened:
            pixels = np.asarray(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[..., -1])
