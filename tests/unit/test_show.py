"""Contact sheets and picture grids show what is there, from a prepared folder and from shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from portrait_dist import visualize
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.data.source.split import read_split
from tests.cli import Result, assert_one_line, call


def cell(sheet: Image.Image, row: int, column: int, size: tuple[int, int]) -> np.ndarray:
    """A picture of a sheet; size is (height, width)."""
    line = visualize.TEXT + 2 * visualize.GAP
    left = visualize.GAP + column * (size[1] + visualize.GAP)
    top = line + row * (size[0] + line)
    return np.asarray(sheet.crop((left, top, left + size[1], top + size[0])))


def show(data: Path, out: Path, *options: str) -> Result:
    return call("show", "--data", data, "--out", out, "--json", *options)


def test_the_sheet_of_a_prepared_folder_shows_image_matte_and_augmented_versions(
    split_dir: Path, tmp_path: Path
) -> None:
    options = ["--split", "val", "--samples", "3", "--augmented", "2", "--size", "80x60"]
    options += ["--recipe", "tutorial", "augment.flip=1"]
    out = tmp_path / "deep" / "sheet.png"
    keys = read_split(split_dir).keys("val")
    assert show(split_dir, out, *options).json["keys"] == [keys[0], keys[3], keys[6]]
    sheet = Image.open(out)
    pair = read_split(split_dir).pairs("val")[3]
    image = np.asarray(Image.open(pair.image).resize((60, 80), Image.Resampling.BILINEAR))
    matte = np.asarray(
        Image.open(pair.matte).getchannel("A").resize((60, 80), Image.Resampling.NEAREST)
    )
    assert np.array_equal(cell(sheet, 1, 0, (80, 60)), image)
    assert np.array_equal(cell(sheet, 1, 1, (80, 60))[..., 0], matte)
    assert not np.array_equal(cell(sheet, 1, 4, (80, 60)), cell(sheet, 1, 5, (80, 60)))
    grey = [cell(sheet, 1, column, (80, 60)).mean(2) for column in (0, 4)]
    flipped, augmented = grey[0][:, ::-1], grey[1]
    assert np.corrcoef(flipped.ravel(), augmented.ravel())[0, 1] > 0.9  # in other colours
    assert show(split_dir, tmp_path / "again.png", *options).exit_code == 0
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["sheet.png"]


def test_photos_keep_their_aspect_ratio_and_the_augmentation_is_that_of_training(
    split_dir: Path, tmp_path: Path
) -> None:
    options = ["--split", "val", "--samples", "1", "--augmented", "1", "--size", "80"]
    for name, more in {"default": [], "named": ["--recipe", "aisegment_unet"]}.items():
        assert show(split_dir, tmp_path / f"{name}.png", *options, *more).exit_code == 0
    assert show(split_dir, tmp_path / "off.png", *options, "--recipe", "tutorial").exit_code == 0
    default, named, off = (
        Image.open(tmp_path / f"{name}.png") for name in ("default", "named", "off")
    )
    pair = read_split(split_dir).pairs("val")[0]
    image = np.asarray(Image.open(pair.image).resize((60, 80), Image.Resampling.BILINEAR))
    assert np.array_equal(cell(default, 0, 0, (80, 60)), image)  # 600×800 within 80×80
    assert np.array_equal(np.asarray(default), np.asarray(named))
    assert not np.array_equal(cell(default, 0, 4, (80, 60)), cell(off, 0, 4, (80, 60)))


def test_photos_of_different_aspect_ratios_stand_in_the_middle_of_equal_cells() -> None:
    wide, tall = (np.full((*size, 3), 200, np.uint8) for size in ((20, 40), (40, 20)))
    sheet = visualize.contact_sheet(
        [wide, tall], [wide[..., 0], tall[..., 0]], captions=["wide", "tall"]
    )
    for row, image in enumerate((wide, tall)):
        drawn = cell(sheet, row, 0, (40, 40))
        top, left = (40 - image.shape[0]) // 2, (40 - image.shape[1]) // 2
        inside = drawn[top : top + image.shape[0], left : left + image.shape[1]]
        assert (inside == 200).all()
        assert (drawn == 200).all(2).sum() == 20 * 40


def test_the_sheet_of_shards_shows_the_stored_samples(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    result = show(tiny_shards, out, "--split", "test").json
    assert result["samples"] == len(set(result["keys"])) == 7
    first = cell(Image.open(out), 0, 0, (32, 32))
    encoded = ShardSet(tiny_shards, "test").read(0)
    assert encoded.key == result["keys"][0]
    assert np.array_equal(first, simplejpeg.decode_jpeg(encoded.image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--out", "a.png"], "nowhere"),
        (["--data", "SPLIT", "--out", "a.gif"], "--out"),
        (["--data", "SPLIT", "--out", "a.png", "--size", "big"], "--size"),
        (["--data", "SPLIT", "--out", "a.png", "--size", "64x4"], "--size 64x4"),
        (["--data", "SPLIT", "--out", "a.png", "--size", "٦٤"], "--size"),
        (["--data", "SPLIT", "--out", "a.png", "--size", "9" * 5000], "--size"),
        (["--data", "SPLIT", "--out", "a.png", "--samples", "0"], "--samples"),
        (["--data", "SPLIT", "--out", "a.png", "--split", "tset"], "Did you mean 'test'"),
        (["--data", "SPLIT", "--out", "a.png", "augment.flop=1"], "augment.flip"),
        (["--data", "SPLIT", "--out", "SPLIT/split.json/a.png"], "split.json"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    split_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("show", *(part.replace("SPLIT", str(split_dir)) for part in arguments))
    assert_one_line(result, 2, message)
    assert len(result.lines) == 1
    assert len(result.lines[0]) < 1000
    assert not list(tmp_path.iterdir())


def test_a_grid_of_predictions_shows_where_they_are_wrong() -> None:
    image = np.full((40, 30, 3), 120, np.uint8)
    alpha = np.zeros((40, 30), np.uint8)
    alpha[10:30, 5:15] = 255
    shifted = np.roll(alpha, 5, axis=1) / 255.0
    predictions = [alpha / 255.0, shifted]
    sheet = visualize.picture_grid([image, image], [alpha, alpha], predictions, [1.0, 1 / 3])
    right, wrong = cell(sheet, 0, 4, (40, 30)), cell(sheet, 1, 4, (40, 30))
    assert len(np.unique(right)) == 1
    assert tuple(wrong[20, 7]) == visualize.MISSED
    assert tuple(wrong[20, 17]) == visualize.WRONG
    assert tuple(wrong[20, 12]) == tuple(right[0, 0])
    assert np.array_equal(cell(sheet, 1, 1, (40, 30))[..., 0], alpha)


def test_the_overlay_draws_the_edge_of_the_figure_only() -> None:
    alpha = np.zeros((40, 30), np.uint8)
    alpha[20:, 10:20] = 255
    picture = visualize.overlay(np.full((40, 30, 3), 90, np.uint8), alpha)
    edge = (picture == visualize.EDGE).all(2)
    expected = np.zeros((40, 30), bool)
    expected[20, 10:20] = expected[20:, 10] = expected[20:, 19] = True
    assert np.array_equal(edge, expected)
