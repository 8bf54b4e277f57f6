"""Training images of any shape: squashed, letterboxed or cut, remembered to score and predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from portrait_dist.checkpoints import read_info
from portrait_dist.data import build_loader
from portrait_dist.data.shards import writer
from portrait_dist.data.shards.decode import fitted, resize_alpha, resize_pixels
from portrait_dist.data.shards.encode import resize_image
from portrait_dist.data.shards.format import parse_manifest
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.errors import InputError
from portrait_dist.inference import PortraitSegmenter
from portrait_dist.inference.placement import fit_photo, shrink
from portrait_dist.preprocessing import FITS, Fit
from tests import blobs
from tests.cli import assert_one_line, call
from tests.jobs import state_of, train_into

SIZE = (32, 32)
SHAPES = [(48, 24), (24, 48), (40, 40), (20, 60)]
"""(H, W) of the photos."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared tree of 20 training and 4 validation pairs of four shapes."""
    folder = tmp_path_factory.mktemp("shapes") / "data"
    keys = {
        "train": [f"t{i:02d}" for i in range(20)],
        "val": [f"v{i}" for i in range(4)],
        "test": [],
    }
    for split, names in keys.items():
        (folder / split).mkdir(parents=True)
        for number, key in enumerate(names):
            image, alpha = blobs.photo(*SHAPES[number % 4], seed=number)
            matte = np.dstack([image, (alpha * 255).astype(np.uint8)])
            Image.fromarray(image).save(folder / split / f"{key}.jpg", quality=95)
            Image.fromarray(matte, "RGBA").save(folder / split / f"{key}.png")
    text = json.dumps({"format": 1, "source": "by hand", "splits": keys})
    (folder / "split.json").write_text(text)
    assert list(keys) == list(SPLITS)
    return folder


@pytest.fixture(scope="module")
def packed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tree packed with each fit, and at original size."""
    folder = tmp_path_factory.mktemp("packed")
    for fit in FITS:
        done = call("pack", "--data", data, "--out", folder / fit, "--size", "32x32", "--fit", fit)
        assert done.exit_code == 0, done.stderr
    writer.pack(data, folder / "original", None)
    return {path.name: path for path in folder.iterdir()}


def test_squashed_shards_keep_their_bytes_and_say_nothing_of_a_fit(
    data: Path, packed: dict[str, Path], tmp_path: Path
) -> None:
    writer.pack(data, tmp_path / "as-before", SIZE)
    for path in (tmp_path / "as-before").iterdir():
        assert path.read_bytes() == (packed["squash"] / path.name).read_bytes()
    assert "fit" not in json.loads((packed["squash"] / "manifest.json").read_text())
    assert json.loads((packed["cover"] / "manifest.json").read_text())["fit"] == "cover"
    text = (packed["cover"] / "manifest.json").read_text().replace('"cover"', '"covers"')
    with pytest.raises(Exception, match="damaged"):
        parse_manifest(text, "m")


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [*SHAPES, (7, 200), (32, 32), (64, 64), (1, 9)])
def test_a_fit_keeps_the_shape_and_lies_where_predict_lays_photos(
    fit: Fit, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    for resize in (resize_pixels, resize_image):
        found = fitted(image, SIZE, fit, resize)
        assert found.shape == (*SIZE, 3)
        assert found.flags.c_contiguous
    if fit != "cover":
        expected = shrink(image, fit_photo(*shape, SIZE, fit, 1.0))
        assert np.array_equal(fitted(image, SIZE, fit, resize_pixels), expected)
    mask = (np.indices(shape).sum(0) % 2 * 255).astype(np.uint8)
    assert set(np.unique(fitted(mask, SIZE, fit, resize_alpha))) <= {0, 255}


def test_cover_cuts_both_ends_of_the_longer_side_alike() -> None:
    columns = np.broadcast_to(np.arange(96, dtype=np.uint8)[None], (32, 96)).copy()
    assert fitted(columns, SIZE, "cover", resize_alpha)[0].tolist() == list(range(32, 64))
    rows = np.ascontiguousarray(columns.T)
    assert fitted(rows, SIZE, "cover", resize_alpha)[:, 0].tolist() == list(range(32, 64))


@pytest.mark.parametrize("fit", FITS)
def test_original_size_is_fitted_when_it_is_read_as_packing_does(
    fit: Fit, packed: dict[str, Path]
) -> None:
    stored = build_loader(packed[fit], "val", 4, workers=-1)
    read = build_loader(packed["original"], "val", 4, workers=2, size=SIZE, fit=fit)
    (one,), (other,) = list(stored), list(read)
    assert one.keys == other.keys
    assert torch.equal(one.alpha, other.alpha)
    # The stored one went through a JPEG once more.
    assert (one.image.float() - other.image.float()).abs().mean() < 6
    assert stored.dataset.fit == read.dataset.fit == fit
    for wrong in set(FITS) - {fit}:
        with pytest.raises(InputError, match=f"packed with --fit {fit}, asked for {wrong}"):
            build_loader(packed[fit], "val", 4, fit=wrong)


def test_a_folder_packed_with_another_fit_is_refused(data: Path, packed: dict[str, Path]) -> None:
    for fit, other in (("squash", "cover"), ("letterbox", "squash")):
        before = state_of(packed[fit])
        arguments = ("--data", data, "--out", packed[fit], "--size", "32x32", "--fit", other)
        for more in ((), ("--append",)):
            refused = call("pack", *arguments, *more)
            assert_one_line(refused, 2, f"packed with --fit {fit}, not {other}")
        assert state_of(packed[fit]) == before
    wrong = ("--out", data.parent / "x", "--size", "original", "--fit", "cover")
    assert_one_line(call("pack", "--data", data, *wrong), 2, "--fit cover", "data.fit=cover")


def test_a_run_remembers_its_fit_and_evaluate_and_predict_follow_it(
    data: Path, packed: dict[str, Path], tmp_path: Path
) -> None:
    keys = ("train.max_epochs=1", "train.batch_size=20")
    done = train_into(tmp_path, packed["letterbox"], *keys)
    assert done.exit_code == 0, done.stderr
    checkpoint = tmp_path / "run" / "ckpt_latest.pth"
    info = read_info(checkpoint)
    assert (info.fit, info.aspect, info.size) == ("letterbox", 1.0, SIZE)
    options = ("--checkpoint", checkpoint, "--split", "val", "--device", "cpu", "--json")
    scores = {}
    for name in ("letterbox", "original"):
        result = call("evaluate", *options, "--data", packed[name])
        assert result.exit_code == 0, result.stderr
        scores[name] = result.json["mae"]
    assert scores["original"] == pytest.approx(scores["letterbox"], rel=0.02)
    for name in ("squash", "cover"):
        refused = call("evaluate", *options, "--data", packed[name])
        assert_one_line(refused, 2, "trained on images with --fit letterbox", f"--fit {name}")
    refused = train_into(tmp_path, packed["original"], "data.size=32", *keys)
    assert_one_line(refused, 2, "train split")
    segmenter = PortraitSegmenter.from_checkpoint(checkpoint, device="cpu", precision="fp32")
    assert (segmenter.fit, segmenter.aspect) == ("letterbox", 1.0)
    photo = np.asarray(Image.open(data / "val" / "v0.jpg"))
    # What the network gets of a photo is what training gets of it.
    assert np.array_equal(
        segmenter.prepare(photo).small, fitted(photo, SIZE, "letterbox", resize_pixels)
    )


def test_predict_takes_the_fit_of_training_unless_it_is_told_another(tmp_path: Path) -> None:
    expected = {"squash": "letterbox", "letterbox": "letterbox", "cover": "cover"}
    for fit, default in expected.items():
        path = blobs.save(blobs.random_network(), tmp_path / f"{fit}.pth", SIZE, aspect=1.0)
        state = torch.load(path, weights_only=True)
        state["portrait_dist"] |= {"fit": fit} if fit != "squash" else {}
        torch.save(state, path)
        found = PortraitSegmenter.from_checkpoint(path, device="cpu")
        assert found.fit == default
        assert PortraitSegmenter.from_checkpoint(path, device="cpu", fit="squash").fit == "squash"
    state["portrait_dist"]["fit"] = "crop"
    torch.save(state, path)
    assert_one_line(
        call("predict", "--checkpoint", path, path, "--out", tmp_path / "out"), 3, "fit 'crop'"
    )
