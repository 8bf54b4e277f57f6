"""``predict`` writes what it says, for every photo that can be done, and overwrites nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from portrait_dist.distributed import job_part
from portrait_dist.inference import batch
from portrait_dist.inference import photos as photos_module
from portrait_dist.inference.photos import name_outputs
from portrait_dist.inference.segmenter import PreparedPhoto
from portrait_dist.models import int8
from tests import blobs, cli
from tests.waiting import wait_for

KINDS = ("mask", "cutout", "side-by-side")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs.save(blobs.train(steps=2), tmp_path_factory.mktemp("run") / "ckpt_best.pth")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/{one.jpg, two.png, more/three.jpg}, and things that are no photos."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed, (name, shape) in enumerate(
        {"one.jpg": (80, 60), "two.png": (60, 80), "more/three.jpg": (90, 90)}.items()
    ):
        Image.fromarray(blobs.photo(*shape, seed=seed)[0]).save(folder / name)
    (folder / "._one.jpg").write_bytes(b"macOS")
    (folder / "notes.txt").write_text("no photo")
    return folder


def predict(checkpoint: Path, *arguments: str | Path | int) -> cli.Result:
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--json")
    return cli.call("predict", *options, *map(str, arguments))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def outputs(*names: str) -> list[str]:
    return sorted(f"{name}.{kind}.png" for name in names for kind in KINDS)


def test_photos_of_another_folder_never_take_the_place_of_outputs(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    (photos / "broken.jpg").write_bytes(b"no photo")  # so that there is something to continue
    assert predict(checkpoint, photos, "--out", out).exit_code == 3
    before = (out / "one.mask.png").read_bytes()
    other.mkdir()
    Image.fromarray(blobs.photo(40, 50, seed=9)[0]).save(other / "one.jpg")
    cli.assert_one_line(predict(checkpoint, other, "--out", out), 2, "one", "--force")
    assert (out / "one.mask.png").read_bytes() == before
    (photos / "broken.jpg").unlink()
    again = predict(checkpoint, os.path.relpath(photos), "--out", out)
    assert (again.exit_code, again.json["done_before"]) == (0, 3), "the same by another path"


def test_a_photo_that_is_replaced_after_it_was_read_is_done_again(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, out = batch.PhotoWork._read, tmp_path / "out"

    def replaced(self: batch.PhotoWork, photo: photos_module.Photo) -> PreparedPhoto:
        prepared = read(self, photo)
        if photo.name == "two":
            Image.fromarray(blobs.photo(30, 90, seed=8)[0]).save(photo.path)
        return prepared

    (photos / "broken.jpg").write_bytes(b"no photo")
    monkeypatch.setattr(batch.PhotoWork, "_read", replaced)
    assert predict(checkpoint, photos, "--out", out).exit_code == 3
    monkeypatch.undo()
    (photos / "broken.jpg").unlink()
    again = predict(checkpoint, photos, "--out", out)
    assert (again.exit_code, again.json["photos"], again.json["done_before"]) == (0, 1, 2)
    assert Image.open(out / "two.mask.png").size == (90, 30)


def test_a_folder_gives_mask_cutout_and_side_by_side_of_every_photo_at_its_own_size(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = predict(checkpoint, photos, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert files(out) == outputs("more/three", "one", "two")
    assert sorted(result.json["files"]) == [str(out / name) for name in files(out)]
    assert (result.json["failed"], result.json["photos"]) == ([], 3)
    mask, cutout = (Image.open(out / f"two.{kind}.png") for kind in ("mask", "cutout"))
    assert (mask.mode, mask.size) == ("L", (80, 60))
    assert (cutout.mode, cutout.size) == ("RGBA", (80, 60))
    assert np.array_equal(np.asarray(cutout)[..., 3], np.asarray(mask))
    assert Image.open(out / "two.side-by-side.png").size == (240, 60)


def test_opencv_starts_no_threads_of_its_own_beside_those_of_predict(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    import cv2

    for arguments in ([], ["--only", "mask"]):
        cv2.setNumThreads(4)
        out = tmp_path / f"out{len(arguments)}"
        assert predict(checkpoint, photos, "--out", out, *arguments).exit_code == 0
        assert cv2.getNumThreads() == 1


def test_patterns_find_photos_to_any_depth_and_a_photo_given_twice_is_done_once(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    paths = (f"{photos}/**/*.jpg", photos / "one.jpg")
    result = predict(checkpoint, *paths, "--out", tmp_path / "out", "--background", "white")
    assert (result.exit_code, result.json["photos"]) == (0, 2)
    assert files(tmp_path / "out") == outputs("one", "three")
    assert Image.open(tmp_path / "out/one.cutout.png").mode == "RGB"


def test_files_of_other_types_in_a_folder_are_counted_and_reported(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    for name in ("a.gif", "b.GIF", "more/c.mp4"):
        (photos / name).write_bytes(b"other")
    result = predict(checkpoint, photos, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "4 files of other types skipped: .gif 2, .mp4 1, .txt 1" in result.stderr
    assert result.json["skipped"] == {".gif": 2, ".mp4": 1, ".txt": 1}


def test_heic_photos_are_read_where_pillow_heif_is_installed_and_counted_where_it_is_not(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pillow_heif

    pillow_heif.from_pillow(Image.open(photos / "two.png")).save(photos / "phone.HEIC")
    assert predict(checkpoint, photos, "--out", tmp_path / "out").exit_code == 0
    assert set(outputs("phone")) <= set(files(tmp_path / "out"))
    monkeypatch.setattr(photos_module, "reads_heic", lambda: False)
    without = predict(checkpoint, photos, "--out", tmp_path / "without")
    assert without.json["skipped"] == {".heic": 1, ".txt": 1}


def test_nothing_is_overwritten_without_force(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "two.mask.png").write_text("precious")
    cli.assert_one_line(
        predict(checkpoint, photos, "--out", out), 2, "two.mask.png exist; add --force"
    )
    assert files(out) == ["two.mask.png"]
    assert (out / "two.mask.png").read_text() == "precious"
    assert predict(checkpoint, photos, "--out", out, "--force").exit_code == 0
    assert Image.open(out / "two.mask.png").size == (80, 60)


def bomb(path: Path) -> None:
    """Write a PNG that claims 20000×20000 pixels."""
    Image.new("1", (20000, 20000)).save(path)


def test_a_broken_photo_is_named_at_the_end_and_the_others_are_done(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    long = photos / f"{'x' * 240}.jpg"
    long.write_bytes((photos / "one.jpg").read_bytes())
    (photos / "cut.jpg").write_bytes((photos / "one.jpg").read_bytes()[:700])
    (photos / "text.png").write_text("no photo")
    (photos / "empty.jpg").touch()
    bomb(photos / "bomb.png")
    os.mkfifo(photos / "pipe.jpg")
    (photos / "dangling.jpg").symlink_to(tmp_path / "nothing.jpg")
    (photos / "folder.jpg").mkdir()
    (photos / "folder.jpg" / "inner.png").write_bytes((photos / "two.png").read_bytes())
    (tmp_path / "film.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    result = predict(
        checkpoint, photos, tmp_path / "film.mp4", "--out", tmp_path / "out", "--batch-size", 1
    )
    assert result.exit_code == 3
    assert "Traceback" not in result.stderr
    assert "8 of 12 photos were left out, the others are done: " in result.lines[-1]
    expected = {
        long: "name too long",
        photos / "cut.jpg": "damaged",
        photos / "text.png": "not a photo",
        photos / "empty.jpg": "not a photo",
        photos / "bomb.png": "too many pixels",
        photos / "pipe.jpg": "a pipe or a device",
        photos / "dangling.jpg": "a link to nothing",
        tmp_path / "film.mp4": "a video",
    }
    found = {failure["photo"]: failure["error"] for failure in result.json["failed"]}
    assert sorted(found) == sorted(map(str, expected))
    for path, reason in expected.items():
        assert reason in found[str(path)].lower(), found[str(path)]
        assert str(path)[:80] in found[str(path)]
    assert [name for name in files(tmp_path / "out") if name != ".predict.jsonl"] == outputs(
        "folder.jpg/inner", "more/three", "one", "two"
    )


def test_when_no_photo_can_be_done_nothing_else_is_claimed(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "one.jpg").write_text("no photo")
    result = predict(checkpoint, photos / "one.jpg", "--out", tmp_path / "out")
    cli.assert_one_line(result, 3, "1 of 1 photos were left out: ", "one.jpg")


def test_run_again_in_the_photos_own_folder_its_outputs_are_not_taken_for_photos(
    checkpoint: Path, photos: Path
) -> None:
    assert predict(checkpoint, photos, "--out", photos).exit_code == 0
    result = predict(checkpoint, photos, "--out", photos, "--force")
    assert (result.exit_code, result.json["photos"]) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "missing.jpg: no such file"),
        ([""], "a PATH is empty"),
        (["photos", ""], "a PATH is empty"),
        (["https://host/secret/one.jpg"], "https://…: an address"),
        (["photos", "--background", "whit"], "Did you mean 'white'"),
        (["photos", "--checkpoint", "nothing.pth"], "nothing.pth: there is no such checkpoint"),
        (["photos", "--checkpoint", "x" * 6000], "(6,001 characters) there is no such checkpoint"),
        (["empty"], "empty: no photo in this folder"),
        (["photos", "--levels", "0.7", "0.3"], "0 <= low < high <= 1"),
        (["photos", "--out", "photos/one.jpg"], "photos/one.jpg: is a file"),
        (["photos", "--out", "photos/one.jpg/deep"], "photos/one.jpg is a file"),
        (["photos", "--out", "a\0b"], r"'a\x00b': holds a NUL character"),
        (["photos", "--size", "128x128"], "was trained at 64x64, not at 128x128"),
    ],
)
def test_wrong_input_gets_one_line_and_nothing_is_written(
    checkpoint: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    before = files(photos.parent)
    result = predict(checkpoint, "--out", "out", *arguments)
    cli.assert_one_line(result, 2, message)
    assert files(photos.parent) == before
    assert not (photos.parent / "out").exists()


def test_on_a_full_disk_what_is_done_stays_and_the_same_command_continues(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"noise-{number:02}.png")
    disk = tmp_path / "disk"
    disk.mkdir()
    # A file system of 1 MiB, seen by this one process only.
    command = (
        f"mount -t tmpfs -o size=1m tmpfs {disk} && "
        f'"$@"; code=$?; ls -A {disk}/out > {tmp_path}/first; '
        f"mount -o remount,size=64m {disk} && "
        f'"$@" > {tmp_path}/second.json; echo $? > {tmp_path}/second; '
        f"ls -A {disk}/out > {tmp_path}/files; exit $code"
    )
    arguments = ["--checkpoint", str(checkpoint), "--device", "cpu", "--json", "--batch-size", "2"]
    done = subprocess.run(
        [
            *(() if os.getuid() == 0 else ("unshare", "--map-root-user", "--mount")),
            *("unshare", "--mount", "bash", "-c", command, "bash"),
            *(*cli.PORTRAIT_DIST, "predict", *arguments, str(photos), "--out", str(disk / "out")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert "the disk is full" in done.stderr
    assert f"{result['photos']} of 15 photos are done and stay" in done.stderr
    assert "Traceback" not in done.stderr
    left = (tmp_path / "first").read_text().split()
    assert not [name for name in left if name.startswith(".tmp")]
    assert 0 < result["photos"] < 15
    again = json.loads((tmp_path / "second.json").read_text())
    assert (tmp_path / "second").read_text().strip() == "0"
    assert again["photos"] + again["done_before"] == 15
    assert again["done_before"] >= result["photos"]
    assert len((tmp_path / "files").read_text().split()) == 14 * 3 + 1


@pytest.mark.skipif(not int8.is_supported(), reason="this CPU has no 8-bit dot products")
def test_int8_is_calibrated_with_the_photos_that_can_be_read_and_says_what_it_keeps(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes((photos / "one.jpg").read_bytes()[:300])
    result = predict(checkpoint, photos, "--out", tmp_path / "out", "--precision", "int8")
    assert (result.exit_code, result.json["photos"]) == (3, 3)
    assert "masks in 8-bit integers against fp32: IoU" in result.stderr


def test_an_old_checkpoint_that_does_not_say_its_size_is_named_with_what_is_assumed(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "old.pth"
    torch.save({"net": blobs.train(steps=1).state_dict()}, old)
    result = predict(old, photos / "one.jpg", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert caplog.messages == [
        f"{old}: does not say the shape of its training images; assumed: 256x256 "
        "(give --size HEIGHTxWIDTH if it was another) and width / height 0.75"
    ]
    caplog.clear()
    predict(old, photos / "one.jpg", "--out", tmp_path / "given", "--size", "64x64")
    assert "256x256" not in caplog.text


def test_photos_of_one_name_from_different_folders_and_formats_are_all_kept(
    tmp_path: Path,
) -> None:
    given = ["a/face.jpg", "b/face.jpg", "b/face.png", "b/other.jpg", "b/Other.png"]
    named = name_outputs({tmp_path / name: Path(Path(name).name) for name in given})
    assert [photo.path for photo in named] == [tmp_path / name for name in given]
    assert [photo.name for photo in named] == [
        "a/face.jpg",
        "b/face.jpg",
        "face.png",
        "other.jpg",
        "Other.png",
    ]
    everywhere = {tmp_path / f"{i}/x.jpg": Path("x.jpg") for i in range(3)}
    everywhere |= {tmp_path / "0/x.jpg.png": Path("x.jpg.png")}
    assert len({photo.name for photo in name_outputs(everywhere)}) == 4


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_only_the_kinds_asked_for_are_written_in_the_format_asked_for(
    checkpoint: Path, photos: Path, tmp_path: Path, image_format: str
) -> None:
    out = tmp_path / "out"
    options = ("--format", image_format, "--only", "cutout,mask")
    assert predict(checkpoint, photos / "one.jpg", "--out", out, *options).exit_code == 0
    assert files(out) == [f"one.cutout.{image_format}", f"one.mask.{image_format}"]
    assert predict(checkpoint, photos / "one.jpg", "--out", tmp_path / "png").exit_code == 0
    mask, cutout = (np.asarray(Image.open(out / name)) for name in reversed(files(out)))
    expected = np.asarray(Image.open(tmp_path / "png/one.mask.png"))
    assert np.array_equal(mask[..., 0] if mask.ndim == 3 else mask, expected)
    assert np.array_equal(cutout[..., 3], expected)


def test_jpeg_holds_no_transparency_and_says_so(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out, jpeg = tmp_path / "out", ("--format", "jpeg")
    refused = predict(checkpoint, photos, "--out", out, *jpeg)
    cli.assert_one_line(refused, 2, "JPEG holds no transparency", "--background")
    assert not out.exists()
    assert predict(checkpoint, photos, "--out", out, *jpeg, "--background", "white").exit_code == 0
    assert Image.open(out / "one.cutout.jpg").format == "JPEG"
    unknown = predict(checkpoint, photos, "--out", tmp_path / "no", "--only", "mask,shadow")
    cli.assert_one_line(unknown, 2, "--only is one or several of mask, cutout, side-by-side")


def test_a_photo_on_standard_input_gives_one_image_on_standard_output(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    command = [*cli.PORTRAIT_DIST, "predict", "--checkpoint", str(checkpoint), "--device", "cpu"]
    with (photos / "one.jpg").open("rb") as photo:
        done = subprocess.run(
            [*command, "-", "--only", "mask", "--out", "-"], stdin=photo, capture_output=True
        )
    assert done.returncode == 0, done.stderr
    assert predict(checkpoint, photos / "one.jpg", "--out", tmp_path / "out").exit_code == 0
    assert done.stdout == (tmp_path / "out/one.mask.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/one.jpg", "--out", "-"], "--only"),
        (["photos/one.jpg", "photos/two.png", "--out", "-", "--only", "mask"], "one PATH"),
        (["photos", "--out", "-", "--only", "mask"], "3 photos; standard output holds one"),
        (["photos", "--out", "out", "--part", "4/4"], "'4/4' is not a part"),
        (["photos", "--out", "out", "--part", "auto"], "give --part I/N"),
    ],
)
def test_what_standard_output_or_a_part_cannot_be_is_refused(
    checkpoint: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(photos.parent)
    options = ("--checkpoint", checkpoint, "--device", "cpu")
    cli.assert_one_line(cli.call("predict", *options, *arguments), 2, message)
    assert not (photos.parent / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder) if name[0] != "."}


def test_parts_in_any_order_give_the_files_of_one_process_and_do_nothing_twice(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "more" / "one.jpg").write_bytes((photos / "two.png").read_bytes())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Batches of one: how many photos go through the network together decides its last bits.
    assert predict(checkpoint, photos, "--out", whole, "--batch-size", 1).exit_code == 0
    done = []
    for part in (2, 0, 1, 0):
        options = ("--out", parts, "--part", f"{part}/3", "--batch-size", 1)
        result = predict(checkpoint, photos, *options)
        assert result.exit_code == 0, result.stderr
        done.append((result.json["photos"], result.json["done_before"]))
    assert done == [(1, 0), (2, 0), (1, 0), (0, 2)]
    assert contents(parts) == contents(whole)


KILLED_AFTER = """
import os, signal, sys, threading
from portrait_dist import cli, files
plain, written, one_at_a_time = files.write_bytes, [], threading.Lock()
def write_bytes(path, data):
    with one_at_a_time:
        plain(path, data)
        written.append(path)
        if len(written) == int(sys.argv[1]):
            files.temporary_path(path).write_bytes(data[:9])  # the next one is cut
            os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes = write_bytes
cli.run(sys.argv[2:])
"""


def test_a_single_part_leaves_what_finish_reads(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    given = (photos, "--out", tmp_path / "out", "--only", "mask")
    part = predict(checkpoint, *given, "--part", "0/1")
    assert part.exit_code == 0, part.stderr
    looked = predict(checkpoint, *given, "--finish")
    assert looked.exit_code == 0, looked.stderr
    assert looked.json["done_before"] == part.json["photos"] == len(files(tmp_path / "out")) - 1


@pytest.mark.parametrize("count", [1, 8])
def test_killed_within_a_photo_the_same_command_continues_and_gives_the_same_files(
    checkpoint: Path, photos: Path, tmp_path: Path, count: int
) -> None:
    for number in range(5):
        Image.fromarray(blobs.photo(120, 90, seed=number)[0]).save(photos / f"{number}.png")
    out = tmp_path / "out"
    options = ["--checkpoint", str(checkpoint), "--device", "cpu", "--json", "--batch-size", "1"]
    command = ["predict", *options, str(photos), "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER, str(count), *command])
    assert killed.returncode == -signal.SIGKILL
    assert len(contents(out)) == count  # no multiple of 3: a photo is half done
    assert list(out.glob(".tmp-*"))
    again = predict(checkpoint, photos, "--out", out, "--batch-size", 1)
    assert again.exit_code == 0, again.stderr
    assert again.json["photos"] + again.json["done_before"] == 8
    assert again.json["done_before"] <= count // 3
    assert not list(out.glob(".*")), "nothing half-written is left, and no journal"
    assert predict(checkpoint, photos, "--out", tmp_path / "b", "--batch-size", 1).exit_code == 0
    assert contents(out) == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "RANK": "0", "WORLD_SIZE": "1"}, (2, 3)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "15",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_STEP": "5",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (2, 3),
        ),
    ],
)
def test_the_environment_says_which_part_a_process_is(
    environment: dict[str, str], part: tuple[int, int]
) -> None:
    assert job_part(environment) == part


def test_ranks_share_the_photos_and_rank_0_reports_all_of_them(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "cut.jpg").write_bytes((photos / "one.jpg").read_bytes()[:700])
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--checkpoint", str(checkpoint), "--device", "cpu", "--json"]
    done = subprocess.run(
        [*launcher, "-m", "portrait_dist", "predict", *options, str(photos), "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert (result["exit_code"], result["photos"]) == (3, 3)
    assert [failure["photo"] for failure in result["failed"]] == [str(photos / "cut.jpg")]
    assert sorted(contents(out)) == outputs("more/three", "one", "two")


def test_a_watched_folder_gives_the_masks_of_photos_as_they_come_and_ends_by_a_signal(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    command = [
        *(*cli.PORTRAIT_DIST, "predict", "--checkpoint", str(checkpoint), str(photos)),
        *("--out", str(out), "--only", "mask", "--watch", "--json"),
    ]
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        wait_for(lambda: (out / "more" / "three.mask.png").exists(), what="the first photos")
        (photos / "broken.jpg").write_bytes(b"no photo")
        late = blobs.photo(70, 70, seed=9)[0]
        copy = photos / "late.part"
        Image.fromarray(late).save(copy, format="png")
        copy_of_late = copy.read_bytes()
        copy.rename(photos / "late.png")
        wait_for(lambda: (out / "late.mask.png").exists(), what="the late photo")
        first = (out / "late.mask.png").read_bytes()
        Image.fromarray(late[:60]).save(photos / "late.png")  # another photo of that name
        wait_for(lambda: (out / "late.mask.png").read_bytes() != first, what="the changed photo")
        wait_for(lambda: "broken.jpg: not a photo" in errors.read_text(), what="the broken one")
        (photos / "slow.png").write_bytes(copy_of_late[:200])
        wait_for(lambda: "slow.png" in errors.read_text(), what="the photo that is still copied")
        (photos / "slow.png").write_bytes(copy_of_late)
        wait_for(lambda: (out / "slow.mask.png").exists(), what="the photo, copied at last")
    finally:
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 3  # a photo could not be done
    result = json.loads(stdout)
    assert "broken.jpg" in result["error"]
    assert [Path(failure["photo"]).name for failure in result["failed"]] == ["broken.jpg"]
    assert files(out) == [
        ".predict.jsonl",
        *("late.mask.png", "more/three.mask.png", "one.mask.png", "slow.mask.png", "two.mask.png"),
    ]
    # The masks are those of a plain run, which finds everything done.
    (photos / "broken.jpg").unlink()
    again = predict(checkpoint, photos, "--out", out, "--only", "mask", "--device", "auto")
    assert again.json["done_before"] == 5, again


SIGNAL_AT_EACH_LINE = """
import signal, sys
from portrait_dist.inference.watch import stop_by_signal
left = 0
def trace(frame, event, argument):
    global left
    if event == "line":
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGTERM)
    return trace
for line in range(1, 30):
    with stop_by_signal() as stop:
        left = line
        sys.settrace(trace)
        try:
            stop.wait(0.01)
        finally:
            sys.settrace(None)
        assert stop.asked or left > 0
"""


def test_a_signal_at_any_moment_ends_the_watching_of_a_folder() -> None:
    """Also where the handler interrupts the wait itself."""
    done = subprocess.run([sys.executable, "-c", SIGNAL_AT_EACH_LINE], timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--part", "0/2"], ["--watch with --part"]),
        (["--finish"], ["--watch with --finish"]),
        (["--precision", "int8"], ["--precision int8", "to come"]),
        (["no-folder"], ["no-folder: no folder"]),
    ],
)
def test_what_cannot_be_watched_is_refused(
    checkpoint: Path, photos: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    result = predict(checkpoint, photos, "--out", tmp_path / "out", "--watch", *arguments)
    cli.assert_one_line(result, 2, *parts)
    assert not (tmp_path / "out").exists()
