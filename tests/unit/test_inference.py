"""Alpha comes at the photo's own resolution and upright; finishing filters do what they say."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from portrait_dist.data.map_dataset import AISegmentDataset
from portrait_dist.data.shards.decode import decode_stored
from portrait_dist.data.shards.encode import Settings, encode_pair
from portrait_dist.data.source.pairs import LEVELS, Pair
from portrait_dist.data.source.pictures import decode_picture, upright
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.inference.compositing import (
    blurred,
    cut_out,
    foreground_colours,
    parse_background,
    side_by_side,
)
from portrait_dist.inference.photos import read_photo
from portrait_dist.inference.placement import FITS, Fit, fit_photo, shrink
from portrait_dist.inference.refine import keep_largest, refine_alpha
from portrait_dist.inference.segmenter import PortraitSegmenter
from portrait_dist.models import UNet
from portrait_dist.preprocessing import Alpha, ImageArray
from tests import blobs


@pytest.fixture(scope="module")
def segmenter(trained_checkpoint: Path) -> PortraitSegmenter:
    return PortraitSegmenter.from_checkpoint(trained_checkpoint, device="cpu", precision="fp32")


def iou(alpha: Alpha, truth: Alpha) -> float:
    return ((alpha > 0.5) & (truth > 0.5)).sum() / ((alpha > 0.5) | (truth > 0.5)).sum()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(160, 120), (120, 213), (97, 101), (300, 90)])
def test_alpha_finds_the_person_at_the_photos_own_resolution(
    segmenter: PortraitSegmenter, shape: tuple[int, int], fit: Fit
) -> None:
    photo, truth = blobs.photo(shape[0], shape[1], seed=100)
    alpha = PortraitSegmenter(
        segmenter.model, segmenter.size, fit=fit, device="cpu", precision="fp32"
    ).predict(photo)
    assert alpha.shape == shape
    assert alpha.dtype == np.float32
    assert 0 <= alpha.min() <= alpha.max() <= 1
    assert iou(alpha, truth) > 0.8


def test_a_photo_turned_by_its_exif_orientation_is_predicted_upright(
    segmenter: PortraitSegmenter, tmp_path: Path
) -> None:
    photo, truth = blobs.photo(160, 120, seed=101)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn it clockwise to see it upright
    Image.fromarray(np.rot90(photo)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(segmenter.predict(tmp_path / "turned.png"), segmenter.predict(photo))
    assert iou(segmenter.predict(tmp_path / "turned.png"), truth) > 0.8


def test_a_list_gives_in_order_what_each_picture_gives_alone(segmenter: PortraitSegmenter) -> None:
    shapes = [(160, 120), (120, 160), (80, 60), (160, 120), (97, 101)]
    photos = [blobs.photo(*shape, seed=seed)[0] for seed, shape in enumerate(shapes)]
    for alpha, photo in zip(segmenter.predict(photos, batch_size=3), photos, strict=True):
        np.testing.assert_allclose(alpha, segmenter.predict(photo), atol=1e-5)
    assert segmenter.predict([]) == []


def test_paths_pil_images_and_arrays_of_one_photo_give_one_alpha(
    segmenter: PortraitSegmenter, tmp_path: Path
) -> None:
    photo, _ = blobs.photo(80, 60, seed=102)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    opaque = np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)])
    expected = segmenter.predict(photo)
    for same in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        Image.fromarray(photo),
        opaque,
        Image.fromarray(opaque),
    ):
        assert np.array_equal(segmenter.predict(same), expected)


def test_size_and_aspect_of_the_training_images_come_from_the_checkpoint(
    segmenter: PortraitSegmenter, tmp_path: Path
) -> None:
    assert isinstance(segmenter.model, UNet)
    square = blobs.save(segmenter.model, tmp_path / "ckpt.pth", size=(48, 64), aspect=1.0)
    found = PortraitSegmenter.from_checkpoint(square, device="cpu", precision="fp32")
    assert (found.size, found.aspect) == ((48, 64), 1.0)
    # A square photo fills the input of a network that was trained on square images.
    assert found.prepare(np.zeros((90, 90, 3), np.uint8)).placement.inner == (0, 0, 48, 64)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "1"])
def test_photos_of_any_colour_mode_are_read(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.full((20, 30), 255, np.uint8))
    image = (
        Image.fromarray(np.full((20, 30), 65535, np.uint16))
        if mode == "I;16"
        else grey.convert(mode)
    )
    image.save(tmp_path / "photo.tif")
    assert read_photo(tmp_path / "photo.tif").shape == (20, 30, 3)
    assert read_photo(tmp_path / "photo.tif").min() >= 253


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_levels_of_16_bits_keep_their_brightness(tmp_path: Path, suffix: str) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(levels * 257).save(path)
    assert np.array_equal(read_photo(path)[..., 1], levels)
    assert np.array_equal(decode_picture(path.read_bytes())[..., 1], levels)
    folder = tmp_path / "pairs"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    Image.fromarray(levels * 257).save(folder / "images" / f"a.{suffix}")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "masks" / "a.png")
    image, _ = AISegmentDataset(folder, "train").read(0)
    assert np.array_equal(np.asarray(image)[..., 1], levels)
    Image.fromarray(levels.astype(np.float32) / 255).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif: has 32 bits a pixel"):
        read_photo(tmp_path / "float.tif")


def test_a_photo_with_a_tag_that_is_wrong_is_read(tmp_path: Path) -> None:
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"72\0\0")  # a text, where it is a number
    tags = b"II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + bytes(4)
    Image.new("RGB", (20, 30)).save(tmp_path / "odd.jpg", exif=b"Exif\0\0" + tags)
    assert read_photo(tmp_path / "odd.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_type_of_photo_is_read_and_packed_upright(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:8, :8], stored[:8, 32:] = (255, 0, 0), (0, 255, 0)  # two corners are marked
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo, mask = tmp_path / f"p.{suffix}", tmp_path / "p-mask.png"
    Image.fromarray(stored).save(photo, exif=exif, quality=95)  # of JPEG and WebP
    shown = upright(stored, orientation)
    Image.fromarray(shown[..., 0]).save(mask)
    assert np.abs(read_photo(photo).astype(int) - shown).mean() < 6
    pair = Pair("p", photo, mask, "", LEVELS)
    encoded = encode_pair(pair, Settings((80, 80), "raw", 95, 10))
    image, alpha = decode_stored(encoded.image, encoded.alpha, "raw")
    assert ((image[..., 0] > 128) == (alpha > 128)).mean() > 0.98


def test_the_largest_person_is_that_of_the_photo_not_of_what_continues_its_edges(
    segmenter: PortraitSegmenter,
) -> None:
    largest = PortraitSegmenter(
        segmenter.model, segmenter.size, device="cpu", precision="fp32", largest=True, refine=False
    )
    prepared = largest.prepare(np.zeros((60, 240, 3), np.uint8))
    top, left, height, width = prepared.placement.inner
    assert top > height, "most of what the network sees is not the photo"
    small = np.zeros((prepared.placement.height, prepared.placement.width), np.float32)
    small[top + 1 : top + height - 2, left + 2 : left + 10] = 1  # the person
    small[top + height - 1 :, left + width - 4 : left + width] = 1  # an island that is continued
    alpha = largest.finish(prepared, small)
    assert alpha[:, :120].mean() > 0.1
    assert alpha[:, 180:].max() == 0


def test_bad_photos_are_named_with_what_to_do(segmenter: PortraitSegmenter, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(blobs.photo(200, 200, seed=103)[0]).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("no photo")
    for name, kind in (
        ("cut.jpg", DamagedDataError),
        ("text.jpg", DamagedDataError),
        ("missing.jpg", InputError),
    ):
        with pytest.raises(kind, match=f"{name}: .+; "):
            segmenter.predict(tmp_path / name)
    with pytest.raises(InputError, match="give uint8"):
        segmenter.predict(np.zeros((8, 8, 3)))  # type: ignore[arg-type]


def test_bf16_gives_the_masks_of_fp32(segmenter: PortraitSegmenter) -> None:
    photo, _ = blobs.photo(160, 120, seed=104)
    low = PortraitSegmenter(
        segmenter.model, segmenter.size, device="cpu", precision="bf16"
    ).predict(photo)
    assert iou(low, segmenter.predict(photo)) > 0.98
    assert not np.array_equal(low, segmenter.predict(photo))


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_every_fit_gives_the_network_a_size_it_takes(height: int, width: int) -> None:
    for fit in FITS:
        placement = fit_photo(height, width, (256, 192), fit, 0.75)
        top, left, inner_height, inner_width = placement.inner
        assert placement.height % 16 == placement.width % 16 == 0
        assert 0 <= top <= top + inner_height <= placement.height <= 4 * 256
        assert 0 <= left <= left + inner_width <= placement.width <= 4 * 192
        assert min(inner_height, inner_width) >= 1


@pytest.mark.parametrize("fit", ["cover", "letterbox"])
@pytest.mark.parametrize("shape", [(800, 600), (600, 800), (1080, 1920), (1920, 1080), (700, 700)])
def test_a_person_is_squeezed_as_in_training_whatever_the_photos_shape(
    fit: Fit, shape: tuple[int, int]
) -> None:
    _, _, height, width = fit_photo(shape[0], shape[1], (256, 256), fit, 0.75).inner
    squeeze = (height / shape[0]) / (width / shape[1])
    assert squeeze == pytest.approx(
        (256 / 800) / (256 / 600), rel=0.04
    )  # cover rounds to multiples of 16


def test_an_upright_photo_of_the_training_shape_fills_the_network_exactly() -> None:
    assert {
        fit: fit_photo(1200, 900, (256, 256), fit, 0.75).inner for fit in FITS
    } == dict.fromkeys(FITS, (0, 0, 256, 256))


def test_what_a_letterbox_adds_continues_the_photos_edge() -> None:
    photo, _ = blobs.photo(100, 200, seed=107)
    placement = fit_photo(100, 200, (64, 64), "letterbox", 0.75)
    top, left, height, width = placement.inner
    small = shrink(photo, placement)
    inner = small[top : top + height, left : left + width]
    assert (small.shape, left, width) == ((64, 64, 3), 0, 64)
    assert 0 < top < 64 - height
    assert np.array_equal(small[:top], np.repeat(inner[:1], top, axis=0))
    assert np.array_equal(small[top + height :], np.repeat(inner[-1:], 64 - top - height, axis=0))


def test_levels_make_what_the_network_is_sure_of_whole_and_leave_the_border_where_it_is(
    segmenter: PortraitSegmenter,
) -> None:
    options: dict[str, Any] = {
        "size": segmenter.size,
        "device": "cpu",
        "precision": "fp32",
        "refine": False,
    }
    photo, _ = blobs.photo(64, 64, seed=106)
    plain = PortraitSegmenter(segmenter.model, **options, fit="squash").predict(photo)
    hard = PortraitSegmenter(segmenter.model, **options, fit="squash", levels=(0.3, 0.7)).predict(
        photo
    )
    assert (
        plain.shape == segmenter.size
    )  # nothing is resampled, so that every pixel can be compared
    assert ((plain > 0.01) & (plain < 0.3)).any()
    np.testing.assert_allclose(hard, np.clip((plain - 0.3) / 0.4, 0, 1), atol=1e-6)
    assert np.array_equal(hard > 0.5, plain > 0.5)


def test_left_and_right_are_treated_alike_unless_the_mean_with_the_mirrored_photo_is_switched_off(
    segmenter: PortraitSegmenter,
) -> None:
    options: dict[str, Any] = {
        "size": segmenter.size,
        "device": "cpu",
        "precision": "fp32",
        "refine": False,
        "fit": "squash",
    }
    photo, truth = blobs.photo(64, 64, seed=108)
    both, one = (
        PortraitSegmenter(segmenter.model, **options, mirror=mirror) for mirror in (True, False)
    )
    np.testing.assert_allclose(
        both.predict(photo[:, ::-1]), both.predict(photo)[:, ::-1], atol=1e-5
    )
    assert abs(one.predict(photo[:, ::-1]) - one.predict(photo)[:, ::-1]).max() > 0.01
    assert iou(both.predict(photo), truth) > 0.8


@pytest.mark.parametrize(
    "levels", [(0.7, 0.3), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)]
)
def test_levels_that_make_no_sense_are_refused(
    segmenter: PortraitSegmenter, levels: tuple[float, float]
) -> None:
    with pytest.raises(InputError, match="0 <= low < high <= 1"):
        PortraitSegmenter(segmenter.model, segmenter.size, device="cpu", levels=levels)


def test_islands_go_with_their_soft_edges_and_the_largest_person_keeps_its_own() -> None:
    rows, columns = np.mgrid[:64, :64]
    distance = [np.hypot(rows - y, columns - x) for y, x in ((30, 20), (30, 52))]
    both = [
        np.clip((radius - d) / 6 + 0.5, 0, 1) for d, radius in zip(distance, (14, 6), strict=True)
    ]
    alpha = np.maximum(*both).astype(np.float32)
    kept = keep_largest(alpha)
    assert np.array_equal(kept[:, :38], alpha[:, :38])
    assert kept[:, 42:].max() == 0
    assert alpha[:, 42:].max() == 1
    alone = both[0].astype(np.float32)
    assert np.array_equal(keep_largest(alone), alone)


def test_a_segmenter_shows_what_decides_its_masks(segmenter: PortraitSegmenter) -> None:
    shown = repr(segmenter)
    for fact in ("size=(64, 64)", "aspect=0.75", "fit='letterbox'", "precision='fp32'", "'cpu'"):
        assert fact in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (60, 64)}, "multiples of 16"),
        ({"precision": "int4"}, "precision is one of"),
        ({"fit": "stretch"}, "fit is one of"),
        ({"aspect": 0.0}, "positive number"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    segmenter: PortraitSegmenter, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PortraitSegmenter(segmenter.model, **{"device": "cpu", **options})


def test_refined_alpha_follows_the_photos_edge() -> None:
    photo, truth = blobs.photo(400, 300, seed=105)
    small = Image.fromarray(truth).resize((19, 25), Image.Resampling.BILINEAR)
    coarse = np.roll(np.asarray(small.resize((300, 400), Image.Resampling.BILINEAR)), 8, axis=1)
    refined = refine_alpha(photo, coarse, 16)
    assert refined.shape == truth.shape
    assert refined.dtype == np.float32
    assert 0 <= refined.min() <= refined.max() <= 1
    assert 1 - iou(refined, truth) < 0.25 * (1 - iou(coarse, truth))
    assert np.allclose(refine_alpha(photo, np.ones_like(truth), 16), 1, atol=1e-3)


def fringe() -> tuple[ImageArray, Alpha, NDArray[np.bool_]]:
    """A red person with a wide soft edge before green: the photo, its alpha and where they mix."""
    y, x = np.mgrid[:480, :360]
    alpha = np.clip((120 - np.hypot(y - 240, x - 180)) / 12 + 0.5, 0, 1).astype(np.float32)
    photo = (
        255 * (alpha[..., None] * [0.8, 0.2, 0.2] + (1 - alpha[..., None]) * [0.1, 0.7, 0.1])
    ).astype(np.uint8)
    return photo, alpha, (alpha > 0.1) & (alpha < 0.9)


def test_a_cut_out_has_no_fringe_of_the_old_background() -> None:
    photo, alpha, mixed = fringe()
    red = np.array([0.8, 0.2, 0.2])
    before, after = (
        np.abs(photo / 255.0 - red)[mixed].mean(),
        np.abs(foreground_colours(photo, alpha) - red)[mixed].mean(),
    )
    assert after < 0.15 * before
    assert np.abs(cut_out(photo, alpha)[..., :3].astype(int) - photo)[alpha == 1].max() <= 2


def test_a_blurred_background_holds_none_of_the_person() -> None:
    photo, alpha, _ = fringe()
    assert np.abs(blurred(photo, alpha)[alpha < 0.9] - [0.1, 0.7, 0.1]).max() < 0.1


def test_backgrounds_are_colours_pictures_blur_or_nothing(tmp_path: Path) -> None:
    photo, alpha, _ = fringe()
    Image.new("RGB", (300, 100), (0, 0, 255)).save(tmp_path / "sea.png")
    assert cut_out(photo, alpha, parse_background("transparent")).shape == (480, 360, 4)
    for text, colour in (
        ("white", (255, 255, 255)),
        ("#1e90ff", (30, 144, 255)),
        (str(tmp_path / "sea.png"), (0, 0, 255)),
    ):
        image = cut_out(photo, alpha, parse_background(text))
        assert image.shape == (480, 360, 3)
        assert tuple(image[0, 0]) == colour
        assert np.abs(image[240, 180].astype(int) - photo[240, 180]).max() <= 2
    assert abs(int(cut_out(photo, alpha, parse_background("blur"))[0, 0, 1]) - 178) <= 3
    with pytest.raises(InputError, match="Did you mean 'white'"):
        parse_background("whte")


def test_a_side_by_side_picture_has_three_panels_of_at_most_800_pixels_height() -> None:
    photo, alpha = blobs.photo(1200, 900, seed=106)
    assert side_by_side(photo, alpha, cut_out(photo, alpha)).shape == (800, 1800, 3)


def test_predictions_leave_the_callers_arrays_alone(segmenter: PortraitSegmenter) -> None:
    photo, _ = blobs.photo(64, 64, seed=107)
    copy = photo.copy()
    alpha = segmenter.predict(photo)
    cut_out(photo, alpha)
    assert np.array_equal(photo, copy)
