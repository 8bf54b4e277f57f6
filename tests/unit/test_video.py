"""A video's masks are its frames', smoothed over time; constant memory; whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from portrait_dist.inference.segmenter import PortraitSegmenter
from portrait_dist.inference.video import (
    VideoOptions,
    one_frame_delay,
    segment_frames,
    without_flicker,
)
from portrait_dist.preprocessing import Alpha, ImageArray
from tests import blobs, cli

TIMES = [0, 2, 3, 7, 8, 9, 12, 13, 14, 20, 21]
"""Of the frames, in tenths of a second: a phone's frames come when they come."""


def frames() -> list[ImageArray]:
    return [np.roll(blobs.photo(97, 74, seed=1)[0], shift, axis=1) for shift in range(len(TIMES))]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven frames of 74×97 pixels, without loss."""
    path = tmp_path_factory.mktemp("clip") / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 74, 97, "yuv444p"
        stream.codec_context.time_base = Fraction(1, 10)
        for time, image in zip(TIMES, frames(), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path: Path, pixels: str) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """Images and times in seconds."""
    with av.open(str(path)) as container:
        found = list(container.decode(video=0))
    return [frame.to_ndarray(format=pixels) for frame in found], [frame.time for frame in found]


def video(checkpoint: Path, *arguments: str | Path) -> cli.Result:
    return cli.call("video", "--checkpoint", checkpoint, "--device", "cpu", *arguments)


def test_a_video_that_ends_before_its_time_is_named_and_pixels_keep_their_shape(
    trained_checkpoint: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for number in range(20):
            image = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    out = tmp_path / "out.mp4"
    options = ("--out", out, "--only", "mask", "--no-refine")
    done = video(trained_checkpoint, cut, *options)
    assert done.exit_code == 0
    assert f"{cut}: its frames end after" in done.stderr
    assert "of 4.0 s; is it cut off or damaged?" in done.stderr
    done = video(trained_checkpoint, whole, *options, "--force")
    assert (done.exit_code, "is it cut off" in done.stderr) == (0, False)
    with av.open(str(out)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_a_video_of_masks_has_the_masks_and_times_of_its_frames(
    trained_checkpoint: Path, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mask.mp4"
    command = (clip, "--out", out, "--only", "mask", "--no-smooth", "--batch-size", "4", "--json")
    result = video(trained_checkpoint, *command)
    assert result.exit_code == 0, result.stderr
    facts = {name: result.json[name] for name in ("frames", "width", "height")}
    assert facts == {"frames": 11, "width": 74, "height": 96}  # even sides
    assert list(tmp_path.iterdir()) == [out]
    masks, times = read(out, "gray")
    np.testing.assert_allclose(times, [time / 10 for time in TIMES], atol=0.002)
    segmenter = PortraitSegmenter.from_checkpoint(trained_checkpoint, device="cpu")
    expected = segmenter.predict(read(clip, "rgb24")[0])
    for mask, alpha in zip(masks, expected, strict=True):
        assert np.abs(mask.astype(float) - 255 * alpha[:96]).mean() < 3  # H.264's loss


def test_a_cut_out_keeps_its_transparency_and_colours(
    trained_checkpoint: Path, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cutout.mov"
    assert video(trained_checkpoint, clip, "--out", out).exit_code == 0
    images, _ = read(out, "rgba")
    assert len(images) == len(TIMES)
    first = images[0].astype(float)
    alpha = PortraitSegmenter.from_checkpoint(trained_checkpoint, device="cpu").predict(
        read(clip, "rgb24")[0][0]
    )[:96]
    assert np.abs(first[..., 3] - 255 * alpha).mean() < 3
    sure = alpha > 0.9
    assert sure.any()
    assert np.abs(first[sure][:, :3] - frames()[0][:96][sure]).mean() < 6


def test_flicker_goes_and_what_moves_stays() -> None:
    calm, flash = np.full((2, 2), 0.9, np.float32), np.full((2, 2), 0.1, np.float32)
    np.testing.assert_allclose(without_flicker(calm, flash, calm), calm)
    between = np.full((2, 2), 0.6, np.float32)
    moving = ((calm, flash, flash), (flash, flash, calm), (calm, between, flash))  # an edge passes
    for before, alpha, after in moving:
        assert np.array_equal(without_flicker(before, alpha, after), alpha)
    sequence: list[Alpha] = [calm, flash, calm, calm, flash]
    smoothed = [alpha for _, alpha in one_frame_delay((None, alpha) for alpha in sequence)]  # type: ignore[misc]
    assert [float(alpha[0, 0]) for alpha in smoothed] == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.1])
    for count in range(3):
        assert len(list(one_frame_delay([(None, calm)] * count))) == count  # type: ignore[list-item]


def test_memory_does_not_grow_with_the_number_of_frames() -> None:
    segmenter = PortraitSegmenter(blobs.random_network(), (16, 16), device="cpu")
    taken = 0

    def endless() -> Iterator[ImageArray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.zeros((16, 16, 3), np.uint8)

    ahead = []
    for given, _ in enumerate(segment_frames(segmenter, endless(), VideoOptions(batch_size=4))):
        ahead.append(taken - given)
        if given == 200:
            break
    assert max(ahead) <= 3 * 4


def test_wrong_input_is_one_line_and_nothing_is_written(
    trained_checkpoint: Path, clip: Path, tmp_path: Path
) -> None:
    damaged, other = tmp_path / "damaged.mkv", tmp_path / "other.mkv"
    damaged.write_bytes(b"no video" * 100)
    other.write_bytes(b"")
    out = tmp_path / "out.webm"
    out.write_text("precious")
    for arguments, code, part in (
        ((damaged, "--out", tmp_path / "a.webm"), 3, "damaged.mkv: no video"),
        ((other, "--out", tmp_path / "a.webm"), 3, "other.mkv: no video"),
        ((tmp_path / "none.mp4", "--out", tmp_path / "a.webm"), 2, "none.mp4: no such file"),
        ((clip, "--out", tmp_path / "a.mp4"), 2, "MP4 holds no transparency"),
        ((clip, "--out", tmp_path / "a.gif"), 2, "NAME.mp4"),
        ((clip, "--out", out), 2, "add --force"),
        ((clip, "--out", clip, "--force", "--only", "mask"), 2, "NAME.mp4"),
    ):
        cli.assert_one_line(video(trained_checkpoint, *arguments), code, part)
    assert sorted(tmp_path.iterdir()) == [damaged, other, out]
    assert out.read_text() == "precious"
