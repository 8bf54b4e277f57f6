"""``portrait-dist predict``: masks and cut-outs of many photos, none of them half-written.

Reading, the network and writing overlap: threads read and shrink photos before they are needed and
finish and write masks afterwards, while this thread runs the network. A photo that cannot be done
is noted and never stops the others.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from portrait_dist import distributed, files
from portrait_dist.checkpoints import read_info
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError, one_line
from portrait_dist.inference.journal import Journal, fingerprint
from portrait_dist.inference.labels import Labels, find_samples, pack_labels
from portrait_dist.inference.outputs import ImageFormat, OutputPlan, plan_outputs
from portrait_dist.inference.photos import (
    KINDS,
    STDIN,
    FailedPhoto,
    Found,
    Photo,
    find_photos,
    keep_part,
    read_photo,
    spread,
)
from portrait_dist.inference.segmenter import PortraitSegmenter, PreparedPhoto, SegmenterOptions
from portrait_dist.models import fused
from portrait_dist.system.info import cores
from portrait_dist.system.progress import track
from portrait_dist.system.threads import submit_in_order, switch_off_opencv_threads

if TYPE_CHECKING:
    from portrait_dist.preprocessing import Alpha, ImageArray

T = TypeVar("T")

CALIBRATION_PHOTOS = 64
"""Photos, spread over all, that show ``--precision int8`` the ranges of the activations."""
LONGEST_WAIT = 7 * 24 * 3600.0
"""Seconds that a rank waits for the slowest one: parts are equal in photos, not in time."""
FAILURES_NAMED = 20
"""Photos that the error line names; the JSON result has all."""


@dataclass(frozen=True)
class ImageOptions:
    """What decides the bytes of an output, beside checkpoint and photo.

    Attributes:
        background: see :func:`portrait_dist.inference.compositing.parse_background`.
        kinds: which of ``mask``, ``cutout`` and ``side-by-side`` to write.
        image_format: see :func:`portrait_dist.inference.outputs.plan_outputs`.
        size: (H, W) of training, for a checkpoint that does not say it.
        network: options of :class:`portrait_dist.inference.segmenter.PortraitSegmenter`;
            ``precision`` may also be ``int8``.
        trust_code: import the network's code where it is the user's.
    """

    background: str = "transparent"
    kinds: Sequence[str] = KINDS
    image_format: ImageFormat = "png"
    size: tuple[int, int] | None = None
    network: SegmenterOptions = field(default_factory=SegmenterOptions)
    trust_code: bool = False

    @property
    def int8(self) -> bool:
        """Whether to compute in 8-bit integers, where that keeps the masks."""
        return self.network.get("precision") == "int8"

    def plan(self, folder: Path) -> OutputPlan:
        """Plan the files of each photo."""
        return plan_outputs(
            folder, kinds=self.kinds, image_format=self.image_format, background=self.background
        )

    def segmenter(self, checkpoint: str | Path) -> PortraitSegmenter:
        """Load the network; one for ``int8`` starts in ``auto`` and needs photos to calibrate."""
        network = self.network.copy()
        if self.int8:
            network["precision"] = "auto"
        return PortraitSegmenter.from_checkpoint(
            checkpoint, size=self.size, trust_code=self.trust_code, **network
        )

    def fingerprint(self, segmenter: PortraitSegmenter, checkpoint: str | Path) -> str:
        """Hash everything that decides the outputs' bytes; the device is not meant to."""
        # A run that moves from a GPU to a CPU continues: masks differ by rounding only.
        options = {
            name: value
            for name, value in self.network.items()
            # Journals of versions before there were engines know no "torch".
            if name != "device" and (name, value) != ("engine", "torch")
        } | {"fit": segmenter.fit}
        settings = {
            "plan": [tuple(self.kinds), self.image_format, self.background],
            "size": segmenter.size,
            "aspect": segmenter.aspect,
            "options": options,
        }
        return fingerprint(settings, checkpoint)


@dataclass(frozen=True)
class PredictResult:
    """What ``predict`` did.

    Attributes:
        files: written now.
        failed: photos that could not be done.
        photos: how many are done now.
        photos_per_second: of them, reading and writing included.
        done_before: photos that an interrupted run of the same command had done.
        skipped: files of other types in the folders and patterns, by suffix.
        out_shards: folder of the shards that were packed, or None.
        samples: in them.
        unsure: photos whose masks are not in them, because their confidence is too low.
    """

    files: list[str]
    failed: list[FailedPhoto]
    photos: int
    photos_per_second: float
    done_before: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    out_shards: str | None = None
    samples: int = 0
    unsure: int = 0


DEFAULTS = ImageOptions()
NO_LABELS = Labels()


def predict_files(
    checkpoint: str | Path,
    paths: Sequence[str],
    out: str | Path,
    images: ImageOptions = DEFAULTS,
    *,
    force: bool = False,
    batch_size: int = 8,
    part: int = 0,
    parts: int = 1,
    keep_journal: bool = False,
    labels: Labels = NO_LABELS,
) -> PredictResult:
    """Write mask, cut-out and side-by-side image of every photo.

    Args:
        checkpoint: a .pth file of a run.
        paths: photos, folders and patterns.
        out: folder for the outputs; made where it does not exist.
        images: what the outputs are; ``int8`` is calibrated with up to 64 of the photos.
        force: overwrite outputs that exist, and do every photo again.
        batch_size: photos that go through the network together.
        part: number of the first photo, from 0.
        parts: do every ``parts``-th photo from there on; names are those of one process.
        keep_journal: also where nothing is left, for :func:`check_finished`.
        labels: where photos come from, if not from ``paths``; :func:`label` packs them.

    Raises:
        InputError: nothing to do, an output exists, or wrong options; nothing was written.
        DamagedDataError: some photos could not be done; its ``result`` is that of the others.
        PortraitDistError: the disk is full or failed; the same command continues.
    """
    plan = images.plan(Path(out))
    files.check_folder_writable(plan.folder)
    found = _find(paths, plan.folder, labels, reported=part == 0)
    segmenter = images.segmenter(checkpoint)
    journal = Journal(plan.folder, images.fingerprint(segmenter, checkpoint), part, parts)
    work = PhotoWork(segmenter, plan, journal, batch_size)
    keep = keep_journal or parts > 1 or labels.out is not None
    return _predict_found(found, images, work, force=force, keep_journal=keep)


def _find(paths: Sequence[str], out: Path, labels: Labels, *, reported: bool = False) -> Found:
    """Find the photos; of several parts one reports which files are none."""
    source = labels.source
    found = find_samples(source, labels.split) if source else find_photos(paths, out)
    if reported and (skipped := found.describe_skipped()):
        print(skipped, file=sys.stderr)
    return found


def label(
    result: PredictResult,
    paths: Sequence[str],
    out: str | Path,
    images: ImageOptions,
    labels: Labels,
) -> PredictResult:
    """Pack the masks of all photos into shards, when every part has done its photos.

    Args:
        result: of the prediction.
        paths: photos, folders and patterns.
        out: folder of the masks.
        images: what the outputs are.
        labels: where to, and which.

    Raises:
        InputError: no mask is confident, or ``labels.out`` holds something else.
        DamagedDataError: a mask is missing or damaged, or a photo cannot be packed.
    """
    plan = images.plan(Path(out))
    photos = _find(paths, plan.folder, labels).photos
    masks = [plan.targets(photo.name)["mask"] for photo in photos]
    packed = pack_labels(photos, masks, labels)
    return replace(result, out_shards=packed.out, samples=packed.samples, unsure=packed.unsure)


def _predict_found(
    found: Found, images: ImageOptions, work: PhotoWork, *, force: bool, keep_journal: bool
) -> PredictResult:
    """Predict this part of the photos that were found, but for those that are done already."""
    journal = work.journal
    photos = keep_part(found.photos, journal.part, journal.parts)
    todo = photos if force else _still_to_do(photos, work.plan, journal)
    if images.int8 and todo:
        _calibrate(work.segmenter, found.photos)
    if journal.part == 0:
        work.failed += found.unusable
    with journal:
        result = work.carry_out(todo, len(photos) - len(todo), dict(found.skipped))
    if not keep_journal:
        journal.remove()  # nothing is left to continue, and nobody else reads it
    return result


def count_photos(
    checkpoint: str | Path, paths: Sequence[str], out: str | Path, labels: Labels = NO_LABELS
) -> int:
    """Check what a prediction needs, before a job for it is queued; return how many photos.

    Raises:
        InputError: no such checkpoint, no photos, or an output folder that cannot be written.
        DamagedDataError: the checkpoint is damaged.
    """
    read_info(Path(checkpoint))
    files.check_folder_writable(out)
    return len(_find(paths, Path(out), labels).photos)


def check_finished(
    checkpoint: str | Path,
    paths: Sequence[str],
    out: str | Path,
    images: ImageOptions = DEFAULTS,
    *,
    part: tuple[int, int] | None = None,
    labels: Labels = NO_LABELS,
) -> PredictResult:
    """Check that parts of a prediction have done every photo; write nothing.

    Args:
        checkpoint: a .pth file of a run.
        paths: photos, folders and patterns.
        out: folder of the outputs.
        images: what the outputs are.
        part: not to be given.
        labels: likewise those of :func:`predict_files`.

    Raises:
        InputError: photos are missing; the message names them and their parts.
    """
    if part:
        raise InputError("--part with --finish: a part predicts, --finish only looks")
    plan = images.plan(Path(out))
    found = _find(paths, plan.folder, labels)
    segmenter = images.segmenter(checkpoint)
    journal = Journal(plan.folder, images.fingerprint(segmenter, checkpoint))
    missing = [
        (number, photo)
        for number, photo in enumerate(found.photos)
        if not journal.is_done(photo, list(plan.targets(photo.name).values()))
    ]
    if missing:
        raise InputError(
            f"{out}: {len(missing)} of {len(found.photos)} photos are not done: "
            f"{_named(missing, journal.most_parts)}; run their parts, then --finish again"
        )
    return PredictResult([], [], 0, 0.0, len(found.photos), dict(found.skipped))


def _named(missing: Sequence[tuple[int, Photo]], parts: int) -> str:
    """Name the first of the missing photos, with the part that each belongs to."""
    # Photos are dealt to the parts in turn, see keep_part.
    named = [
        f"{photo.path} (part {number % parts}/{parts})"
        for number, photo in missing[:FAILURES_NAMED]
    ]
    more = f" and {len(missing) - len(named)} more" if len(missing) > len(named) else ""
    return f"{', '.join(named)}{more}"


def predict_to_bytes(checkpoint: str | Path, path: str, images: ImageOptions = DEFAULTS) -> bytes:
    """Predict one photo and return one encoded image; nothing is written.

    Args:
        checkpoint: a .pth file of a run.
        path: of the photo; ``-`` is standard input.
        images: what the output is, with exactly one kind.

    Raises:
        InputError: not exactly one photo, or the options are wrong.
        DamagedDataError: the photo cannot be read.
    """
    plan = images.plan(Path())
    photos = find_photos([path], Path()).photos
    if len(photos) != 1:
        raise InputError(f"{path}: {len(photos)} photos; standard output holds one image")
    segmenter = images.segmenter(checkpoint)
    prepared = segmenter.prepare(read_photo(photos[0].path))
    ((_, small),) = segmenter.predict_prepared([prepared])
    (image,) = plan.render(prepared.photo, segmenter.finish(prepared, small)).values()
    return image


def predict_on_every_rank(predict: Callable[..., PredictResult]) -> PredictResult | None:
    """Let every rank of a torchrun job do its part, and add the parts up on rank 0.

    Args:
        predict: :func:`predict_files` with all arguments but ``part`` and ``parts``.

    Returns:
        The sum on rank 0, None on the other ranks.

    Raises:
        PortraitDistError: on rank 0, what a rank raised; what stopped a rank goes before photos
            that were left out.
    """
    result: PredictResult | None = None
    failed: PortraitDistError | None = None
    try:
        # gloo, also with GPUs: what is gathered are names of files, once, at the end.
        distributed.start(torch.device("cpu"), LONGEST_WAIT)
        try:
            result = predict(part=distributed.rank(), parts=distributed.world_size())
        except PortraitDistError as error:
            failed = error
            if isinstance(error.result, PredictResult):
                result = error.result
        everyone = distributed.gather_objects((result, failed and (type(failed), str(failed))))
    finally:
        distributed.stop()
    if distributed.rank() != 0:
        return None
    results = [found for found, _ in everyone if found]
    errors = [error for _, error in everyone if error]
    for kind, message in errors:
        # A full disk or a wrong option is the reason; photos that were left out are not.
        if kind is not DamagedDataError or not results:
            raise kind(message, merge(results) if results else None)
    merged = merge(results)
    if merged.failed:
        raise failure_of(merged)
    return merged


def merge(results: Sequence[PredictResult]) -> PredictResult:
    """Add up the results of the parts of one job that ran side by side."""
    return PredictResult(
        files=sorted(file for result in results for file in result.files),
        failed=sorted(
            (failure for result in results for failure in result.failed), key=lambda f: f.photo
        ),
        photos=sum(result.photos for result in results),
        photos_per_second=sum(result.photos_per_second for result in results),
        done_before=sum(result.done_before for result in results),
        skipped=results[0].skipped,
    )


def _calibrate(segmenter: PortraitSegmenter, photos: Sequence[Photo]) -> None:
    """Let the segmenter compute in 8-bit integers where that keeps the masks.

    Every part calibrates with the same photos, so that all parts decide alike.
    """
    agreement = segmenter.calibrate(_readable(spread(photos, CALIBRATION_PHOTOS)))
    verdict = "8-bit integers" if agreement >= fused.MIN_MASK_IOU else "too low, so floating point"
    print(f"masks in 8-bit integers against fp32: IoU {agreement:.4f}; {verdict}", file=sys.stderr)


def _readable(photos: Iterable[Photo]) -> Iterator[ImageArray]:
    for photo in photos:
        if photo.path == STDIN:  # it can be read once
            continue
        with contextlib.suppress(PortraitDistError):  # it is reported when it is predicted
            yield photo.read()


def _still_to_do(photos: list[Photo], plan: OutputPlan, journal: Journal) -> list[Photo]:
    """Leave out what an interrupted run has done.

    Raises:
        InputError: an output exists that this command did not write.
    """
    todo: list[Photo] = []
    there: list[Path] = []
    for photo in photos:
        targets = list(plan.targets(photo.name).values())
        if journal.is_done(photo, targets):
            continue
        todo.append(photo)
        if not journal.is_ours(photo):
            there += existing_outputs(targets)
    if there:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise InputError(
            f"{there[0]}{others} exist; add --force to overwrite, or choose another --out"
        )
    return todo


def existing_outputs(targets: Iterable[Path]) -> list[Path]:
    """List those of a photo's outputs that exist, links to nothing included."""
    return [path for path in targets if _exists(path)]


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (OSError, ValueError):  # a name that is too long: it is reported when it is written
        return False
    return True


class PhotoWork:
    """The photos' way from file to outputs.

    Args:
        segmenter: predicts the masks.
        plan: what is written for each photo.
        journal: open for appending while photos are done.
        batch_size: photos that go through the network together.

    Attributes:
        failed: photos that could not be done so far.
    """

    def __init__(
        self,
        segmenter: PortraitSegmenter,
        plan: OutputPlan,
        journal: Journal,
        batch_size: int,
    ) -> None:
        self.segmenter, self.plan = segmenter, plan
        self.journal, self.batch_size = journal, batch_size
        self.failed: list[FailedPhoto] = []
        self._identities: dict[str, str] = {}

    def carry_out(
        self, photos: Sequence[Photo], done_before: int, skipped: dict[str, int]
    ) -> PredictResult:
        """Do all photos.

        Raises:
            DamagedDataError: some could not be done, the others are.
            PortraitDistError: the disk is full or failed.
        """
        begin = time.perf_counter()
        written: list[list[str]] = []
        stopped: PortraitDistError | None = None
        try:
            for files_of_photo in track(self.run(photos), total=len(photos), what="photos"):
                written.append(files_of_photo)
        except PortraitDistError as error:
            stopped = error
        result = PredictResult(
            files=[file for names in written for file in names],
            failed=sorted(self.failed, key=lambda failure: failure.photo),
            photos=len(written),
            photos_per_second=len(written) / (time.perf_counter() - begin),
            done_before=done_before,
            skipped=skipped,
        )
        done, total = done_before + len(written), done_before + len(photos)
        if stopped:
            raise type(stopped)(
                f"{stopped}; {done} of {total} photos are done and stay", result
            ) from stopped
        if result.failed:
            raise failure_of(result)
        return result

    def run(self, photos: Iterable[Photo]) -> Iterator[list[str]]:
        """Yield the written files of each photo that could be done, in order.

        Raises:
            PortraitDistError: the disk is full or failed, or the device's memory is too small.
        """
        switch_off_opencv_threads()
        # Two pools: in one, reading far ahead would keep finished masks from being written.
        readers, writers = ThreadPoolExecutor(cores()), ThreadPoolExecutor(cores())
        try:
            reads = submit_in_order(readers, self._read, photos, limit=2 * self.batch_size)
            predicted = self._predicted(reads)
            for item, writing in submit_in_order(writers, self._write, predicted, limit=cores()):
                if (written := self._outcome(item[0], writing)) is not None:
                    yield written
        finally:  # what has begun is finished, so that nothing is half-written
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)

    def _outcome(self, photo: Photo, work: Future[T]) -> T | None:
        """Wait for the work on one photo; None where it failed and only this photo is concerned."""
        try:
            return work.result()
        except (InputError, DamagedDataError) as error:
            message = str(error)
        except PortraitDistError:  # the disk
            raise
        except Exception as error:  # whatever a codec or a filter raises on one photo
            message = one_line(error)
        where = "" if str(photo.path) in message else f"{photo.path}: "
        self.failed.append(FailedPhoto(str(photo.path), where + message))
        return None

    def _read(self, photo: Photo) -> PreparedPhoto:
        # Before it is read: one that is replaced meanwhile is not done.
        self._identities[photo.name] = photo.identity()
        return self.segmenter.prepare(photo.read())

    def _predicted(
        self, reads: Iterable[tuple[Photo, Future[PreparedPhoto]]]
    ) -> Iterator[tuple[Photo, PreparedPhoto, Alpha]]:
        """Run the network on what could be read."""
        readable: deque[Photo] = deque()

        def prepared() -> Iterator[PreparedPhoto]:
            for photo, reading in reads:
                if (read := self._outcome(photo, reading)) is not None:
                    # Those that could not be read drop out: the network's results come for the
                    # others.
                    readable.append(photo)
                    yield read

        try:
            for item, small in self.segmenter.predict_prepared(prepared(), self.batch_size):
                yield readable.popleft(), item, small
        except torch.OutOfMemoryError as error:
            raise PortraitDistError(
                f"--batch-size {self.batch_size}: the memory of {self.segmenter.device} is too "
                "small for it; give a smaller one"
            ) from error

    def _write(self, item: tuple[Photo, PreparedPhoto, Alpha]) -> list[str]:
        photo, prepared, small = item
        alpha = self.segmenter.finish(prepared, small)
        encoded = self.plan.render(prepared.photo, alpha)
        if self.journal.was_cut_short(photo):
            self.plan.remove_leftovers(photo.name)
        # Before the first byte: after a kill the half of its files is known to be ours.
        self.journal.begin(photo)
        written = self.plan.write(photo.name, encoded)
        self.journal.end(photo, self._identities.pop(photo.name))
        return written


def failure_of(result: PredictResult) -> DamagedDataError:
    """Make the error that names the photos that were not done."""
    named = [failure.error for failure in result.failed[:FAILURES_NAMED]]
    if more := len(result.failed) - len(named):
        named.append(f"and {more} more, which --json lists")
    done = result.photos + result.done_before
    others = ", the others are done" if done else ""
    return DamagedDataError(
        f"{len(result.failed)} of {done + len(result.failed)} photos were left out{others}: "
        f"{'; '.join(named)}",
        result,
    )
