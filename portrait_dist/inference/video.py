"""Masks and cut-outs of videos: frames streamed with constant memory, alpha smoothed over time.

Smoothing is one-frame delay: where the frames before and after agree on a pixel and the frame
between them does not, it flickers, and gets the mean of the two.

References:
    Ke et al., "MODNet: Real-Time Trimap-Free Portrait Matting via Objective Decomposition", AAAI
    2022, section 3.4.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from portrait_dist import files
from portrait_dist.errors import DamagedDataError, InputError, one_line
from portrait_dist.inference import compositing
from portrait_dist.inference.photos import KINDS
from portrait_dist.inference.segmenter import PortraitSegmenter, PreparedPhoto
from portrait_dist.preprocessing import Alpha, ImageArray
from portrait_dist.system.info import check_extra, cores
from portrait_dist.system.progress import track
from portrait_dist.system.threads import submit_in_order, switch_off_opencv_threads

FLICKER = 0.1
"""Difference of alpha between frames from which on they disagree; the paper's."""
CODECS = {
    ".mp4": ("libx264", "yuv420p", {"crf": "16", "preset": "fast"}),
    ".webm": ("libvpx-vp9", "yuva420p", {"crf": "24", "b": "0", "cpu-used": "4"}),
    ".mov": ("prores_ks", "yuva444p10le", {"profile": "4444"}),
}
"""Suffix of the output → codec, pixels and options. MP4 holds no transparency."""


@dataclass(frozen=True)
class VideoResult:
    """What was written.

    Attributes:
        file: its path.
        frames: in it.
        width, height: of its frames.
        frames_per_second: that were done, reading and writing included.
    """

    file: str
    frames: int
    width: int
    height: int
    frames_per_second: float


@dataclass(frozen=True)
class VideoOptions:
    """What is made of the frames.

    Attributes:
        kind: ``mask``, ``cutout`` or ``side-by-side``.
        background: see :func:`portrait_dist.inference.compositing.parse_background`.
        smooth: smooth alpha over time.
        batch_size: frames that go through the network together.
    """

    kind: str = "cutout"
    background: str = "transparent"
    smooth: bool = True
    batch_size: int = 8


def check_video_installed() -> None:
    """Check that the package of the extra ``video`` is there.

    Raises:
        InputError: it is missing.
    """
    check_extra("video", ("av",), "video")


def segment_video(
    segmenter: PortraitSegmenter,
    source: str | Path,
    out: str | Path,
    options: VideoOptions,
    *,
    force: bool = False,
) -> VideoResult:
    """Write the mask, cut-out or side-by-side video of a video, whole or not at all; no sound.

    Args:
        segmenter: predicts the masks.
        source: a video of any format that FFmpeg reads.
        out: the file: .mp4 (H.264), .webm (VP9) or .mov (ProRes 4444); the last two hold
            transparency.
        options: what is made of the frames.
        force: overwrite a file that exists.

    Raises:
        InputError: wrong options, no such video, or the file exists.
        DamagedDataError: the source is no video, or damaged; nothing is written.
        PortraitDistError: the disk is full or failed.
    """
    import av

    source, out = Path(source), Path(out)
    check_options(source, out, options, force)
    render = _renderer(segmenter, options)
    began = time.perf_counter()
    try:
        with av.open(str(source)) as reading:
            times: deque[int] = deque()
            frames = _Frames(reading, source, times)
            images = _on_threads(render, segment_frames(segmenter, frames, options))
            tracked = track(images, total=frames.total, what="frames")
            with files.atomic_path(out, suffix=out.suffix) as temporary:
                count, size = _write(tracked, times, temporary, frames)
    except av.error.FFmpegError as error:
        raise DamagedDataError(
            f"{source}: no video that can be read ({one_line(error)})"
        ) from error
    return VideoResult(str(out), count, size[1], size[0], count / (time.perf_counter() - began))


def _renderer(
    segmenter: PortraitSegmenter, options: VideoOptions
) -> Callable[[tuple[PreparedPhoto, Alpha]], ImageArray]:
    """Return what makes the written frame of a frame and the network's alpha."""
    scene = compositing.parse_background(options.background)

    def render(item: tuple[PreparedPhoto, Alpha]) -> ImageArray:
        photo, alpha = item[0].photo, segmenter.finish(*item)
        if options.kind == "mask":
            return compositing.to_bytes(alpha)
        cutout = compositing.cut_out(photo, alpha, scene)
        if options.kind == "cutout":
            return cutout
        return compositing.side_by_side(photo, alpha, cutout)

    return render


def check_options(source: Path, out: Path, options: VideoOptions, force: bool) -> None:
    """Check what can be checked before the network is loaded.

    Raises:
        InputError: wrong options, no such video, or the file exists.
    """
    check_video_installed()
    if not source.is_file():
        raise InputError(f"{source}: no such file; give the path of a video")
    if out.suffix not in CODECS:
        raise InputError(f"{out}: a video is a file NAME{', NAME'.join(CODECS)}")
    if options.kind not in KINDS:
        raise InputError(f"--only is one of {', '.join(KINDS)}, not '{options.kind}'")
    if (options.kind, options.background, out.suffix) == ("cutout", "transparent", ".mp4"):
        raise InputError(
            f"{out}: MP4 holds no transparency; choose .webm or .mov, or give a --background"
        )
    compositing.parse_background(options.background)
    files.check_folder_writable(out.parent)
    if out.exists() and (not force or out.samefile(source)):
        raise InputError(f"{out}: exists; add --force to overwrite it, or choose another --out")


def segment_frames(
    segmenter: PortraitSegmenter, frames: Iterable[ImageArray], options: VideoOptions
) -> Iterator[tuple[PreparedPhoto, Alpha]]:
    """Yield each frame with its alpha at the network's size, smoothed over time where asked.

    At most three batches of frames are in memory.

    Args:
        segmenter: predicts the masks.
        frames: RGB uint8 [H, W, 3], all of one size.
        options: ``smooth`` and ``batch_size``.
    """
    prepared = map(segmenter.prepare, frames)
    predicted = segmenter.predict_prepared(prepared, options.batch_size)
    return one_frame_delay(predicted) if options.smooth else predicted


def one_frame_delay(
    frames: Iterable[tuple[PreparedPhoto, Alpha]],
) -> Iterator[tuple[PreparedPhoto, Alpha]]:
    """Take flicker out: see :func:`without_flicker`; the first and the last frame stay."""
    waiting: deque[tuple[PreparedPhoto, Alpha]] = deque(maxlen=3)
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == 1:
            yield frame
        elif len(waiting) == 3:
            (_, before), (photo, alpha), (_, after) = waiting
            yield photo, without_flicker(before, alpha, after)
    if len(waiting) > 1:
        yield waiting[-1]


def without_flicker(before: Alpha, alpha: Alpha, after: Alpha) -> Alpha:
    """Return alpha with the mean of its neighbours where they agree and it does not.

    Args:
        before: float32 [H, W] of the frame before.
        alpha: of the frame.
        after: of the frame after.
    """
    near = np.abs(before - after) <= FLICKER
    apart = (np.abs(alpha - before) > FLICKER) & (np.abs(alpha - after) > FLICKER)
    return np.where(near & apart, (before + after) / 2, alpha)


def _on_threads(function: Any, items: Iterable[Any]) -> Iterator[ImageArray]:
    switch_off_opencv_threads()
    pool = ThreadPoolExecutor(cores())
    try:
        for _, done in submit_in_order(pool, function, items, limit=cores()):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Frames:
    """The frames of a video, upright, as RGB uint8 [H, W, 3]; their times go to ``times``."""

    def __init__(self, container: Any, source: Path, times: deque[int]) -> None:
        if not container.streams.video:
            raise DamagedDataError(f"{source}: holds no video; give a video")
        self.container, self.times, self.source = container, times, source
        self.stream = container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.rate = self.stream.average_rate or self.stream.base_rate or 25
        seconds = (container.duration or 0) / 1e6
        self.total = self.stream.frames or round(seconds * float(self.rate))
        self.seconds = _seconds(container, self.stream)
        self.sideways = False

    def __iter__(self) -> Iterator[ImageArray]:
        found, last = 0, 0.0
        for frame in self.container.decode(self.stream):
            if frame.is_corrupt:
                raise DamagedDataError(f"{self.source}: frame {found + 1} is damaged")
            # Without times of its own a frame comes one frame's time after the one before.
            step = round(1 / (self.rate * self.stream.time_base)) or 1
            self.times.append(frame.pts if frame.pts is not None else found * step)
            found += 1
            last = float((self.times[-1] + max(step, frame.duration or 0)) * self.stream.time_base)
            image = frame.to_ndarray(format="rgb24")
            turns = round(frame.rotation / 90) % 4
            self.sideways = turns % 2 == 1
            yield np.ascontiguousarray(np.rot90(image, turns))
        if not found:
            raise DamagedDataError(f"{self.source}: holds no frame that can be read")
        # FFmpeg ends some formats where they are cut off, and leaves out what it cannot decode. No
        # error: some files show their last frame for seconds, and do not say so.
        if last < self.seconds - max(1.0, 0.02 * self.seconds):
            seconds = f"{last:.1f} of {self.seconds:.1f} s"
            print(
                f"{self.source}: its frames end after {seconds}; is it cut off or damaged?",
                file=sys.stderr,
            )


def _seconds(container: Any, stream: Any) -> float:
    """Return when a video says that its last frame ends; 0 where it does not."""
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")  # of Matroska: 00:01:02.345
    with contextlib.suppress(ValueError):
        if len(parts) == 3:
            return sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    if len(container.streams) == 1 and container.duration is not None:
        return float(container.duration) / 1e6
    return 0.0


def _write(
    images: Iterable[ImageArray], times: deque[int], path: Path, frames: _Frames
) -> tuple[int, tuple[int, int]]:
    """Encode the images with the times of their frames; return how many, and (H, W)."""
    import av

    name, pixels, options = CODECS[path.suffix]
    count, size = 0, (0, 0)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(cast("Any", name), rate=frames.rate, options=options)
        stream.codec_context.time_base = frames.stream.time_base
        stream.pix_fmt = pixels
        for image in images:
            # Codecs that halve the colours want even sides.
            height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
            if not count:
                size = stream.height, stream.width = height, width
                if ratio := frames.stream.sample_aspect_ratio:  # of a pixel
                    ratio = 1 / ratio if frames.sideways else ratio
                    stream.codec_context.sample_aspect_ratio = ratio
            elif size != (height, width):
                raise DamagedDataError(f"{frames.source}: frame {count + 1} has another size")
            even = np.ascontiguousarray(image[:height, :width])
            form = "gray" if image.ndim == 2 else {3: "rgb24", 4: "rgba"}[image.shape[2]]
            frame = av.VideoFrame.from_ndarray(even, format=form).reformat(format=pixels)
            frame.pts, frame.time_base = times.popleft(), frames.stream.time_base
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode())
    return count, size
