"""``predict`` writes what it says, for every photo that can be read, and never over something else."""

import json

import numpy as np
import pytest
from PIL import Image

from portrait_dist.cli import run
from portrait_dist.inference.batch import name_outputs
from portrait_dist.models import int8
from tests import blobs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(blobs.save(blobs.train(steps=2), tmp_path_factory.mktemp("run") / "ckpt_best.pth"))


@pytest.fixture
def photos(tmp_path):
    """photos/{one.jpg, two.png, more/three.jpg}, and things that are no photos."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed, (name, shape) in enumerate(
        {"one.jpg": (80, 60), "two.png": (60, 80), "more/three.jpg": (90, 90)}.items()
    ):
        Image.fromarray(blobs.picture(*shape, seed=seed)[0]).save(folder / name)
    (folder / "._one.jpg").write_bytes(b"macOS")
    (folder / "notes.txt").write_text("no photo")
    return folder


def predict(capfd, checkpoint, *words):
    """(exit code, JSON or None, stderr) of ``portrait-dist predict --json``."""
    code = run(
        ["predict", "--checkpoint", checkpoint, "--device", "cpu", "--json", *map(str, words)]
    )
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def outputs(*names):
    return sorted(
        f"{name}.{kind}.png" for name in names for kind in ("mask", "cutout", "side-by-side")
    )


def test_a_folder_gives_mask_cutout_and_side_by_side_of_every_photo_at_its_own_size(
    capfd, checkpoint, photos, tmp_path
):
    code, result, _ = predict(capfd, checkpoint, photos, "--out", tmp_path / "out")
    assert code == 0
    assert files(tmp_path / "out") == outputs("more/three", "one", "two")
    assert sorted(result["files"]) == sorted(
        str(tmp_path / "out" / name) for name in outputs("more/three", "one", "two")
    )
    assert (result["failed"], result["photos"]) == ([], 3)
    mask, cutout = (Image.open(tmp_path / f"out/two.{kind}.png") for kind in ("mask", "cutout"))
    assert (mask.mode, mask.size) == ("L", (80, 60))
    assert (cutout.mode, cutout.size) == ("RGBA", (80, 60))
    assert np.array_equal(np.asarray(cutout)[..., 3], np.asarray(mask))
    assert Image.open(tmp_path / "out/two.side-by-side.png").size == (240, 60)


def test_patterns_find_photos_to_any_depth_and_a_photo_given_twice_is_done_once(
    capfd, checkpoint, photos, tmp_path
):
    words = [
        f"{photos}/**/*.jpg",
        photos / "one.jpg",
        "--out",
        tmp_path / "out",
        "--background",
        "white",
    ]
    code, result, _ = predict(capfd, checkpoint, *words)
    assert (code, result["photos"]) == (0, 2)
    assert files(tmp_path / "out") == outputs("one", "three")
    assert Image.open(tmp_path / "out/one.cutout.png").mode == "RGB"


def test_nothing_is_overwritten_without_force(capfd, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "two.mask.png").write_text("precious")
    code, result, error = predict(capfd, checkpoint, photos, "--out", out)
    assert (code, result) == (2, None)
    assert error.count("\n") == 1
    assert "two.mask.png exist; add --force" in error.replace("exists", "exist")
    assert files(out) == ["two.mask.png"]
    assert (out / "two.mask.png").read_text() == "precious"
    assert predict(capfd, checkpoint, photos, "--out", out, "--force")[0] == 0
    assert Image.open(out / "two.mask.png").size == (80, 60)


def test_a_broken_photo_is_named_at_the_end_and_the_others_are_done(
    capfd, checkpoint, photos, tmp_path
):
    broken = photos / "one.jpg"
    broken.write_bytes(broken.read_bytes()[:700])
    code, result, error = predict(
        capfd, checkpoint, photos, "--out", tmp_path / "out", "--batch-size", 1
    )
    assert code == 3
    assert (
        error.strip()
        .splitlines()[-1]
        .startswith("portrait-dist: 1 of 3 photos were left out, the others are done: ")
    )
    assert str(broken) in error
    assert "Traceback" not in error
    assert [failure["photo"] for failure in result["failed"]] == [str(broken)]
    assert files(tmp_path / "out") == outputs("more/three", "two")


def test_run_again_in_the_photos_own_folder_its_outputs_are_not_taken_for_photos(
    capfd, checkpoint, photos
):
    assert predict(capfd, checkpoint, photos, "--out", photos)[0] == 0
    code, result, _ = predict(capfd, checkpoint, photos, "--out", photos, "--force")
    assert (code, result["photos"]) == (0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jpg"], "missing.jpg: no such file"),
        (["photos", "--background", "whit"], "Did you mean 'white'"),
        (["photos", "--checkpoint", "nothing.pth"], "nothing.pth: there is no such checkpoint"),
        (["empty"], "empty: no photo in this folder"),
        (["photos", "--levels", "0.7", "0.3"], "0 <= low < high <= 1"),
    ],
)
def test_wrong_input_gets_one_line_and_nothing_is_written(
    capfd, checkpoint, photos, monkeypatch, words, message
):
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    code, result, error = predict(capfd, checkpoint, *words, "--out", "out")
    assert (code, result) == (2, None)
    assert error.count("\n") == 1
    assert message in error
    assert not (photos.parent / "out").exists()


@pytest.mark.skipif(not int8.is_supported(), reason="this CPU has no 8-bit dot products")
def test_int8_is_calibrated_with_the_photos_that_can_be_read_and_says_what_it_keeps(
    capfd, checkpoint, photos, tmp_path
):
    (photos / "broken.jpg").write_bytes((photos / "one.jpg").read_bytes()[:300])
    code, result, error = predict(
        capfd, checkpoint, photos, "--out", tmp_path / "out", "--precision", "int8"
    )
    assert (code, result["photos"]) == (3, 3)
    assert "masks in 8-bit integers against fp32: IoU" in error
    assert files(tmp_path / "out") == outputs("one", "two", "more/three")


def test_photos_of_one_name_from_different_folders_and_formats_are_all_kept(tmp_path):
    given = ["a/face.jpg", "b/face.jpg", "b/face.png", "b/other.jpg", "b/Other.png"]
    photos = {
        tmp_path / name: (tmp_path / name).relative_to((tmp_path / name).parent) for name in given
    }
    names = name_outputs(photos)
    assert list(names.values()) == [
        "a/face.jpg",
        "b/face.jpg",
        "face.png",
        "other.jpg",
        "Other.png",
    ]
    everywhere = {tmp_path / f"{i}/x.jpg": tmp_path / "x.jpg" for i in range(3)} | {
        tmp_path / "0/x.jpg.png": tmp_path / "x.jpg.png"
    }
    assert len(set(name_outputs(everywhere).values())) == 4
