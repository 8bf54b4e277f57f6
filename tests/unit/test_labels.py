"""Predicted masks become training data: from photos or shards, into shards."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from portrait_dist.data import build_loader
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.data.shards.verify import verify
from portrait_dist.errors import DamagedDataError
from portrait_dist.inference.labels import (
    Labels,
    confidence,
    find_samples,
    pack_labels,
    sample_keys,
)
from portrait_dist.inference.photos import Photo
from tests import blobs, cli

ONLY = ("--only", "mask", "--device", "cpu", "--batch-size", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs.save(blobs.train(steps=2), tmp_path_factory.mktemp("run") / "ckpt_best.pth")


def predict(checkpoint: Path, *arguments: str | Path, exit_code: int = 0) -> cli.Result:
    result = cli.call("predict", "--checkpoint", checkpoint, *ONLY, *arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    return result


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name[0] != "."
    }


def samples(shards: Path, split: str) -> dict[str, tuple[bytes, bytes]]:
    """Encoded image and alpha of every sample, by key."""
    found = ShardSet(shards, split)
    read = [found.read(number) for number in range(len(found))]
    return {one.key: (bytes(one.image), bytes(one.alpha)) for one in read}


def test_masks_of_a_packed_set_are_its_new_alphas_and_its_images_and_other_splits_stay(
    checkpoint: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    masks, out = tmp_path / "masks", tmp_path / "shards"
    given = ("--from-shards", tiny_shards, "--out", masks, "--out-shards", out)
    result = predict(checkpoint, *given).json
    assert (result["photos"], result["samples"], result["unsure"]) == (57, 71, 0)
    before, after = samples(tiny_shards, "train"), samples(out, "train")
    assert list(after) == list(before)
    for key, (image, alpha) in after.items():
        assert image == before[key][0]
        mask = np.asarray(Image.open(masks / f"{key}.mask.png"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(alpha))), mask)
    for split in ("val", "test"):
        assert samples(out, split) == samples(tiny_shards, split)
    assert verify(out).ok
    loader = build_loader(out, "train", batch_size=19, seed=0, rank=0, world_size=1)
    assert sorted(key for batch in loader for key in batch.keys) == sorted(before)
    again = predict(checkpoint, *given).json
    assert (again["photos"], again["done_before"], again["samples"]) == (0, 57, 71)


def test_only_confident_masks_are_packed_and_parts_pack_what_one_process_does(
    checkpoint: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    source = ("--from-shards", tiny_shards, "--split", "val")
    predict(checkpoint, *source, "--out", tmp_path / "look")
    found = {
        path.name.removesuffix(".mask.png"): confidence(np.array(Image.open(path)))
        for path in (tmp_path / "look").glob("*.mask.png")
    }
    least = max(found.values())
    kept = {key for key, value in found.items() if value >= least}
    assert 0 < len(kept) < 7

    def arguments(name: str) -> tuple[str | Path, ...]:
        shards = ("--out-shards", tmp_path / f"{name}-shards", "--min-confidence", f"{least!r}")
        return (*source, "--out", tmp_path / name, *shards)

    result = predict(checkpoint, *arguments("whole")).json
    assert (result["unsure"], result["samples"]) == (7 - len(kept), len(kept) + 57 + 7)
    assert set(samples(tmp_path / "whole-shards", "val")) == kept
    for part in (1, 2):
        predict(checkpoint, *arguments("parts"), "--part", f"{part}/3")
    assert not (tmp_path / "parts-shards").exists()
    missing = predict(checkpoint, *arguments("parts"), "--finish", exit_code=2)
    assert "3 of 7 photos are not done" in missing.json["error"]
    assert "(part 0/3)" in missing.json["error"]
    predict(checkpoint, *arguments("parts"), "--part", "0/3")
    predict(checkpoint, *arguments("parts"), "--finish")
    assert hashes(tmp_path / "parts-shards") == hashes(tmp_path / "whole-shards")
    none = predict(checkpoint, *arguments("whole")[:-1], "1", exit_code=2)
    assert "none of 7 masks reaches it" in none.json["error"]


def test_photos_and_masks_are_packed_at_original_size_with_the_photos_own_bytes(
    checkpoint: Path, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "shards"
    (photos / "more").mkdir(parents=True)
    for number in range(10):
        image = blobs.photo(48, 36, seed=number)[0]
        Image.fromarray(image).save(photos / "more" / f"{number}.a.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(blobs.photo(48, 36, seed=99)[0]).save(photos / "turned.jpg", exif=turned)
    Image.fromarray(blobs.photo(40, 40, seed=5)[0]).save(photos / "grey.png")
    options = ("--out", tmp_path / "masks", "--shard-size", "original")
    result = predict(checkpoint, photos, *options, "--out-shards", out).json
    assert result["samples"] == 12
    found = {split: samples(out, split) for split in ("train", "val", "test")}
    assert [len(found[split]) for split in found] == [10, 1, 1]
    everything = {key: pair for split in found.values() for key, pair in split.items()}
    for number in range(10):
        path = photos / "more" / f"{number}.a.jpg"
        assert everything[f"more_{number}_a"][0] == path.read_bytes()
    upright = Image.open(io.BytesIO(everything["turned"][0]))
    assert upright.size == (48, 36)
    assert verify(out).ok


def test_a_mask_is_packed_as_it_was_predicted_whatever_its_levels(tmp_path: Path) -> None:
    """Of another source, levels below 64 would be class numbers, and two levels 0 and 255."""
    photo = tmp_path / "photo.jpg"
    Image.fromarray(blobs.photo(64, 64, seed=1)[0]).save(photo)
    mask = tmp_path / "photo.mask.png"
    level = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 9
    for levels in (level, level * 0, np.minimum(level, 1)):
        cv2.imwrite(str(mask), levels)
        shards = tmp_path / f"levels-{int(levels.sum())}"
        pack_labels([Photo(photo, "photo")], [mask], Labels(shards, size=(64, 64)))
        (_, alpha) = samples(shards, "train")["photo"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(alpha))), levels)


def test_a_mask_of_another_size_than_its_sample_is_named_and_not_packed(
    tiny_shards: Path, tmp_path: Path
) -> None:
    photos = find_samples(str(tiny_shards), "val").photos
    masks = [tmp_path / f"{photo.name}.png" for photo in photos]
    for path in masks:
        cv2.imwrite(str(path), np.zeros((32, 32), np.uint8))
    cv2.imwrite(str(masks[3]), np.zeros((16, 32), np.uint8))
    labels = Labels(tmp_path / "out", source=str(tiny_shards), split="val")
    with pytest.raises(DamagedDataError, match=f"{masks[3]}: .* differ in size; predict it again"):
        pack_labels(photos, masks, labels)
    cv2.imwrite(str(masks[3]), np.zeros((32, 32), np.uint8))
    assert pack_labels(photos, masks, labels).samples == 71


def test_confidence_is_the_distance_from_one_half() -> None:
    sure = np.array([[0, 255], [255, 0]], np.uint8)
    assert confidence(sure) == 1.0
    assert confidence(np.full((4, 4), 128, np.uint8)) == pytest.approx(1 / 255, abs=1e-6)
    assert confidence(np.array([[0, 51]], np.uint8)) == pytest.approx(0.8, abs=1e-6)


def test_keys_of_photos_can_be_stored_and_differ() -> None:
    names = ["a/b", "a_b", "é.x", "x" * 300, "plain", "🙂" * 60]
    keys = sample_keys(names)
    assert keys[4] == "plain"
    assert len(set(keys)) == len(names)
    assert all("." not in key and "/" not in key and len(key.encode()) <= 89 for key in keys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing argument 'PATH...'"),
        (["photo.jpg", "--from-shards", "s"], "Give PATHs or --from-shards"),
        (["photo.jpg", "--min-confidence", "0.5"], "--min-confidence: it goes with --out-shards"),
        (["photo.jpg", "--out-shards", "s", "--only", "cutout"], "--only needs mask"),
        (["photo.jpg", "--out-shards", "s", "--format", "webp"], "--format png"),
        (["photo.jpg", "--out-shards", "s", "--min-confidence", "nan"], "--min-confidence nan"),
        (["photo.jpg", "--out-shards", "s", "--only", "mask", "--out", "-"], "give a folder"),
        (["--from-shards", "/nowhere"], "/nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    checkpoint: Path, arguments: list[str], expected: str
) -> None:
    result = cli.call("predict", "--checkpoint", checkpoint, "--out", "out", *arguments)
    cli.assert_one_line(result, 2, expected)
