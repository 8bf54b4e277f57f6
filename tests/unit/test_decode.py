"""What the decoders and encoders give, against PIL, which the tutorial uses."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from portrait_dist.data.shards.decode import (
    decode_pair,
    decode_stored,
    npy_header,
    resize_alpha,
)
from portrait_dist.data.shards.png import decode_grey, decode_matte, encode_grey

SIDE = st.integers(1, 97)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture with some noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(int)
    return np.clip(smooth + rng.integers(-3, 4, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def decoded(
    image: bytes, alpha: bytes, size: tuple[int, int], **options: object
) -> tuple[np.ndarray, np.ndarray]:
    out = np.empty((*size, 3), np.uint8), np.empty(size, np.uint8)
    decode_pair(image, alpha, size, *out, **options)  # type: ignore[arg-type]
    return out


@settings(max_examples=40, deadline=None)
@given(height=SIDE, width=SIDE, seed=st.integers(0, 9))
def test_the_alpha_png_is_read_by_everyone_to_the_same_pixels(
    height: int, width: int, seed: int
) -> None:
    alpha = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    png = encode_grey(alpha)
    with Image.open(io.BytesIO(png)) as opened:
        assert opened.mode == "L"
        assert (np.asarray(opened) == alpha).all()
    assert (decode_grey(memoryview(png)) == alpha).all()


@settings(max_examples=200, deadline=None)
@given(height=SIDE, width=SIDE, new=st.tuples(SIDE, SIDE))
def test_the_alpha_is_resized_to_the_pixels_that_pil_takes(
    height: int, width: int, new: tuple[int, int]
) -> None:
    alpha = (np.arange(height * width) % 251).astype(np.uint8).reshape(height, width)
    reference = Image.fromarray(alpha).resize((new[1], new[0]), Image.Resampling.NEAREST)
    assert (resize_alpha(alpha, new) == np.asarray(reference)).all()


@pytest.mark.parametrize("size", [(256, 256), (64, 96), (800, 600)])
def test_exact_decoding_gives_the_pixels_of_the_tutorial(size: tuple[int, int]) -> None:
    stored, mask = jpeg(picture(800, 600)), picture(800, 600, seed=1)[..., 0]
    image, alpha = decoded(stored, encode_grey(mask), size)
    with Image.open(io.BytesIO(stored)) as opened:
        assert (
            image
            == np.asarray(
                opened.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
            )
        ).all()
    assert (
        alpha
        == np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
    ).all()


def test_scaled_decoding_is_close_to_exact_and_leaves_the_alpha_exact() -> None:
    stored, mask = jpeg(picture(800, 600)), encode_grey(picture(800, 600, seed=1)[..., 0])
    exact, exact_alpha = decoded(stored, mask, (256, 256))
    scaled, scaled_alpha = decoded(stored, mask, (256, 256), exact=False)
    error = np.abs(exact.astype(int) - scaled)
    assert error.any(), "the JPEG was not decoded at a reduced scale"
    assert error.mean() < 1.0
    assert 10 * np.log10(255**2 / np.mean(error.astype(float) ** 2)) > 40
    assert (exact_alpha == scaled_alpha).all()


def test_a_sample_is_decoded_into_its_row_of_the_batch_and_nowhere_else() -> None:
    batch, masks = np.full((3, 32, 48, 3), 7, np.uint8), np.full((3, 32, 48), 7, np.uint8)
    pixels = picture(32, 48)
    decode_pair(jpeg(pixels), encode_grey(pixels[..., 0]), None, batch[1], masks[1])
    assert (batch[[0, 2]] == 7).all()
    assert (masks[[0, 2]] == 7).all()
    assert (masks[1] == pixels[..., 0]).all()
    assert np.abs(batch[1].astype(int) - pixels).mean() < 6


def test_a_grey_jpeg_becomes_rgb() -> None:
    image, _ = decoded(
        jpeg(picture(16, 16)[..., 0]), encode_grey(np.zeros((16, 16), np.uint8)), (16, 16)
    )
    assert (image[..., 0] == image[..., 2]).all()


def test_the_raw_codec_gives_back_the_pixels() -> None:
    pixels, mask = picture(24, 40), picture(24, 40)[..., 1]
    stored = npy_header(pixels.shape) + pixels.tobytes(), npy_header(mask.shape) + mask.tobytes()
    assert (np.load(io.BytesIO(stored[0])) == pixels).all(), "numpy itself does not read it"
    for image, alpha in (decoded(*stored, (24, 40), codec="raw"), decode_stored(*stored, "raw")):
        assert (image == pixels).all()
        assert (alpha == mask).all()
    with pytest.raises(ValueError, match=r"not a \.npy"):
        decoded(*stored, (40, 24), codec="raw")


def test_damaged_or_mismatched_members_are_refused() -> None:
    image, mask = jpeg(picture(64, 64)), encode_grey(picture(64, 64)[..., 0])
    for broken in (
        (image[: len(image) // 2], mask),
        (image, mask[: len(mask) // 2]),
        (b"", mask),
        (image, b""),
    ):
        with pytest.raises(ValueError):
            decoded(*broken, (64, 64))
    with pytest.raises(ValueError, match="differ in size"):
        decoded(image, encode_grey(np.zeros((64, 63), np.uint8)), (64, 64))


def test_only_the_alpha_channel_of_a_matte_is_taken() -> None:
    for mode, channels in (("RGBA", 4), ("LA", 2)):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 11, channels), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels, mode).save(buffer, "PNG")
        assert (decode_matte(buffer.getvalue()) == pixels[..., -1]).all()
        for offset in range(8, len(buffer.getvalue()), 5):
            flipped = bytearray(buffer.getvalue())
            flipped[offset] ^= 4
            with pytest.raises(ValueError):
                decode_matte(bytes(flipped))
        with pytest.raises(ValueError, match="cut off"):
            decode_matte(buffer.getvalue()[:-5])
    buffer = io.BytesIO()
    Image.fromarray(picture(9, 11)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="alpha channel"):
        decode_matte(buffer.getvalue())


def rgba_png(pixels: np.ndarray, kind: int) -> bytes:
    """Write a PNG whose rows all have one filter: 0 none, 1 sub, 2 up, 3 average, 4 Paeth."""
    height, width, _ = pixels.shape
    padded = np.zeros((height + 1, width + 1, 4), np.int16)
    padded[1:, 1:] = pixels
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    to_left, to_above = abs(above - corner), abs(left - corner)
    to_corner = abs(left + above - 2 * corner)
    paeth = np.where(to_above <= to_corner, above, corner)
    paeth = np.where((to_left <= to_above) & (to_left <= to_corner), left, paeth)
    guess = (np.zeros_like(left), left, above, (left + above) // 2, paeth)[kind]
    rows = (padded[1:, 1:] - guess).astype(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    content = zlib.compress(np.insert(rows, 0, kind, axis=1).tobytes())
    chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@settings(max_examples=40, deadline=None)
@given(height=SIDE, width=SIDE, kind=st.integers(0, 4), seed=st.integers(0, 9))
def test_mattes_of_every_row_filter_give_the_alpha_that_pil_reads(
    height: int, width: int, kind: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = np.maximum.accumulate(pixels[..., 3], axis=1)  # some structure, as mattes have
    png = rgba_png(pixels, kind)
    with Image.open(io.BytesIO(png)) as opened:
        assert (np.asarray(opened) == pixels).all(), "the test's own PNG is a right one"
    assert (decode_matte(png) == pixels[..., 3]).all()


def test_of_a_matte_with_16_bits_the_upper_ones_are_taken() -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (9, 11, 4), dtype=np.uint16)
    assert (decode_matte(cv2.imencode(".png", pixels)[1].tobytes()) == pixels[..., 3] >> 8).all()


def test_a_png_that_claims_to_be_huge_is_refused_before_it_takes_memory() -> None:
    png = bytearray(encode_grey(np.zeros((8, 8), np.uint8)))
    png[16:24] = struct.pack(">II", 1 << 30, 1 << 30)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with pytest.raises(ValueError, match="1073741824x1073741824 pixels"):
        decode_grey(bytes(png))


def test_decoding_in_place_is_what_simplejpeg_gives() -> None:
    stored = simplejpeg.encode_jpeg(
        picture(40, 56), quality=95, colorspace="RGB", colorsubsampling="420"
    )
    image, _ = decoded(stored, encode_grey(np.zeros((40, 56), np.uint8)), (40, 56))
    assert (image == simplejpeg.decode_jpeg(stored, "RGB")).all()
