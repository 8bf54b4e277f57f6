"""Contact sheets and picture grids show what is there, from a prepared folder and from shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from portrait_dist import visualize
from portrait_dist.cli import run
from portrait_dist.data.source.split import read_split


def cell(sheet: Image.Image, row: int, column: int, size: tuple[int, int]) -> np.ndarray:
    """A picture of a sheet; size is (height, width)."""
    line = visualize.TEXT + 2 * visualize.GAP
    left = visualize.GAP + column * (size[1] + visualize.GAP)
    top = line + row * (size[0] + line)
    return np.asarray(sheet.crop((left, top, left + size[1], top + size[0])))


def test_the_sheet_of_a_prepared_folder_shows_image_matte_and_augmented_versions(
    split_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "show",
        "--data",
        str(split_dir),
        "--split",
        "val",
        "--samples",
        "3",
        "--augmented",
        "2",
        "--size",
        "80x60",
        "--json",
    ]
    assert run([*words, "--out", str(tmp_path / "deep" / "sheet.png"), "augment.flip=1"]) == 0
    result = json.loads(capfd.readouterr().out)
    keys = read_split(split_dir).keys("val")
    assert result["keys"] == [keys[0], keys[3], keys[6]]
    sheet = Image.open(tmp_path / "deep" / "sheet.png")
    pair = read_split(split_dir).pairs("val")[3]
    image = np.asarray(Image.open(pair.image).resize((60, 80), Image.Resampling.BILINEAR))
    matte = np.asarray(
        Image.open(pair.matte).getchannel("A").resize((60, 80), Image.Resampling.NEAREST)
    )
    assert np.array_equal(cell(sheet, 1, 0, (80, 60)), image)
    assert np.array_equal(cell(sheet, 1, 1, (80, 60))[..., 0], matte)
    assert not np.array_equal(cell(sheet, 1, 4, (80, 60)), cell(sheet, 1, 5, (80, 60)))
    grey = [cell(sheet, 1, column, (80, 60)).mean(2) for column in (0, 4)]
    assert (
        np.corrcoef(grey[0][:, ::-1].ravel(), grey[1].ravel())[0, 1] > 0.9
    )  # flipped, in other colours
    assert run([*words, "--out", str(tmp_path / "again.png"), "augment.flip=1"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "deep" / "sheet.png").read_bytes()


def test_the_sheet_of_shards_shows_the_stored_samples(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert (
        run(["show", "--data", str(tiny_shards), "--split", "test", "--out", str(out), "--json"])
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["samples"] == len(set(result["keys"])) == 7
    first = cell(Image.open(out), 0, 0, (32, 32))
    from portrait_dist.data.shards.reader import ShardSet

    encoded = ShardSet(tiny_shards, "test").read(0)
    assert encoded.key == result["keys"][0]
    import simplejpeg

    assert np.array_equal(first, simplejpeg.decode_jpeg(encoded.image))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "nowhere", "--out", "a.png"], "nowhere"),
        (["--data", "SPLIT", "--out", "a.gif"], "--out"),
        (["--data", "SPLIT", "--out", "a.png", "--size", "big"], "--size"),
        (["--data", "SPLIT", "--out", "a.png", "--size", "64x4"], "--size 64x4"),
        (["--data", "SPLIT", "--out", "a.png", "--split", "tset"], "Did you mean 'test'"),
        (["--data", "SPLIT", "--out", "a.png", "augment.flop=1"], "augment.flip"),
        (["--data", "SPLIT", "--out", "SPLIT/split.json/a.png"], "cannot be written"),
    ],
)
def test_wrong_words_are_named_and_nothing_is_written(
    split_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["show", *(word.replace("SPLIT", str(split_dir)) for word in words)]) == 2
    message = capfd.readouterr().err
    assert told in message
    assert message.count("\n") == 1
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
