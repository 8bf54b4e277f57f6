"""From photos of any size to soft alpha at their own resolution.

segmenter = PortraitSegmenter.from_checkpoint("runs/NAME/ckpt_best.pth")
alpha = segmenter.predict("photo.jpg")          # float32 [H, W], 0 background, 1 person
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, cast, overload

import numpy as np
import torch

from portrait_dist.distributed import pick_device
from portrait_dist.errors import InputError
from portrait_dist.inference.engines import Engine, check_engine, openvino_network
from portrait_dist.inference.photos import PhotoSource, read_photo
from portrait_dist.inference.placement import FITS, Fit, Placement, enlarge, fit_photo, shrink
from portrait_dist.inference.refine import keep_largest, refine_alpha
from portrait_dist.models import MaskNetwork, UNet, fused, int8
from portrait_dist.preprocessing import DEFAULT_ASPECT, DEFAULT_SIZE, Alpha, normalise_levels
from portrait_dist.system.info import cores
from portrait_dist.system.malloc import keep_freed_memory
from portrait_dist.system.threads import submit_in_order, switch_off_opencv_threads

if TYPE_CHECKING:
    from torch import Tensor

    from portrait_dist.preprocessing import ImageArray

PRECISIONS = ("auto", "fp32", "bf16")


class SegmenterOptions(TypedDict, total=False):
    """Options of :class:`PortraitSegmenter`, which documents them."""

    device: str
    precision: str
    engine: Engine
    fit: Fit | None
    refine: bool
    mirror: bool
    largest: bool
    levels: tuple[float, float]


@dataclass(frozen=True)
class PreparedPhoto:
    """A photo ready for the network.

    Attributes:
        photo: uint8 [H, W, 3].
        small: the network's input.
        placement: where the photo lies in it.
    """

    photo: ImageArray
    small: ImageArray
    placement: Placement


class PortraitSegmenter:
    """Predict the soft alpha of portraits.

    Args:
        model: a trained network: the U-Net, or any other in a ``MaskNetwork``; it is not changed.
        size: (H, W) of its training images.
        device: ``auto`` (the GPU if there is one), ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it, see
            :mod:`portrait_dist.models.fused`.
        engine: ``torch``, or ``openvino``, which is faster on CPUs, see
            :mod:`portrait_dist.inference.engines`.
        fit: how photos of other shapes are brought to the network's size, see
            :mod:`portrait_dist.inference.placement`; by default letterbox.
        refine: sharpen alpha along the edges of the full-size photo, see
            :mod:`portrait_dist.inference.refine`. On, because the boundary scores of
            ``benchmarks/predictions.py`` improve.
        mirror: predict the mirrored photo too and average the two, as test-time augmentation does;
            the network runs twice. On for the same reason.
        largest: keep the largest connected person only and drop islands.
        aspect: width / height of the training images before they were resized to ``size``.
        levels: (low, high) of the network's alpha that become 0 and 1, linear in between: removes
            the haze that a network leaves where it is not sure. At ``0.3, 0.7`` the border between
            person and background stays where it was, at 0.5.

    Raises:
        InputError: an unknown ``fit``, ``precision`` or ``engine``, an engine that is not installed
            or does not compute this network, a ``size`` that the network cannot take,
            ``fit="cover"`` with a network of one size, an ``aspect`` that is not positive, or
            ``levels`` that are not 0 <= low < high <= 1.
    """

    def __init__(
        self,
        model: UNet | MaskNetwork,
        size: tuple[int, int] = DEFAULT_SIZE,
        *,
        device: str = "auto",
        precision: str = "auto",
        engine: Engine = "torch",
        fit: Fit | None = None,
        refine: bool = True,
        mirror: bool = True,
        largest: bool = False,
        aspect: float = DEFAULT_ASPECT,
        levels: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        fit = fit or "letterbox"
        _check_choices(fit, precision, levels, aspect)
        _check_size(model, size, fit, engine)
        self.device = pick_device("cpu" if (device, engine) == ("auto", "openvino") else device)
        self.model, self.size, self.fit, self.aspect = model, size, fit, aspect
        self.refine, self.mirror, self.largest, self.levels = refine, mirror, largest, levels
        self.precision, self.engine = precision, engine
        check_engine(engine, self.device)
        keep_freed_memory()
        if engine == "openvino":
            self.network = openvino_network(model, size, precision)
        else:
            self.network = fused.for_inference(model, self.device, precision)

    def __repr__(self) -> str:
        """Show what decides the masks."""
        own = self.model.network if isinstance(self.model, MaskNetwork) else self.model
        count = sum(weight.numel() for weight in self.model.parameters())
        network = f"{type(own).__name__} of {count:,} weights"
        names = (
            *("size", "aspect", "fit", "refine", "mirror", "largest", "levels"),
            *("precision", "engine"),
        )
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"PortraitSegmenter({network}, {options}, device={str(self.device)!r})"

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        size: tuple[int, int] | None = None,
        trust_code: bool = False,
        **options: Unpack[SegmenterOptions],
    ) -> PortraitSegmenter:
        """Make a segmenter from a checkpoint; its size and aspect are those of training.

        Args:
            path: a .pth file.
            size: (H, W) of the training images, for a checkpoint that does not say it.
            trust_code: import the network's code where it is the user's, which executes it.
            options: see :class:`PortraitSegmenter`; ``fit`` is by default that of training where
                photos kept their shape there.

        Raises:
            InputError: no such file, a network that cannot be built again, or wrong options.
            DamagedDataError: the file is damaged.
        """
        from portrait_dist.checkpoints import input_geometry, load_model

        model, info = load_model(path, trust_code=trust_code)
        trained = input_geometry(info, size, aspect_matters=True)
        if not options.get("fit") and trained.fit != "squash":
            # What was cut in training is not cut here: a network that takes one size gets all.
            one_size = _takes_one_size(model, options.get("engine", "torch"))
            options["fit"] = "letterbox" if one_size else trained.fit
        return cls(model, trained.size, aspect=trained.aspect, **options)

    @overload  # a str is a path here, though it is a sequence of str too
    def predict(  # type: ignore[overload-overlap]
        self, photos: PhotoSource, batch_size: int = 8
    ) -> Alpha: ...

    @overload
    def predict(self, photos: Sequence[PhotoSource], batch_size: int = 8) -> list[Alpha]: ...

    def predict(
        self, photos: PhotoSource | Sequence[PhotoSource], batch_size: int = 8
    ) -> Alpha | list[Alpha]:
        """Predict the alpha of one photo, or of a list of them.

        Args:
            photos: a path, a PIL image or an uint8 array (see
                :func:`portrait_dist.inference.photos.read_photo`), or a list or tuple of these.
            batch_size: photos that go through the network together; they need not have one size.

        Returns:
            float32 [H, W] at the photo's own upright resolution, from 0 (background) to 1 (person);
            a list gives a list.

        Raises:
            InputError, DamagedDataError: a photo cannot be read; the message names it.
        """
        if isinstance(photos, (list, tuple)):
            return [alpha for _, alpha in self.stream(photos, batch_size)]
        return next(self.stream([cast("PhotoSource", photos)]))[1]

    def stream(
        self, photos: Iterable[PhotoSource], batch_size: int = 8
    ) -> Iterator[tuple[ImageArray, Alpha]]:
        """Yield (photo, alpha) in order; about four times ``batch_size`` photos are in memory.

        Threads read photos, shrink them and bring masks to full size while this thread runs the
        network.

        Args:
            photos: as for ``predict``.
            batch_size: photos that go through the network together.

        Raises:
            InputError, DamagedDataError: a photo cannot be read.
        """
        workers = cores()
        switch_off_opencv_threads()
        with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(workers) as finishers:
            reads = submit_in_order(readers, self._read, photos, limit=2 * batch_size)
            predicted = self.predict_prepared((read.result() for _, read in reads), batch_size)
            for _, finished in submit_in_order(finishers, self._finish, predicted, batch_size):
                yield finished.result()

    def _read(self, source: PhotoSource) -> PreparedPhoto:
        return self.prepare(read_photo(source))

    def _finish(self, item: tuple[PreparedPhoto, Alpha]) -> tuple[ImageArray, Alpha]:
        return item[0].photo, self.finish(*item)

    def prepare(self, photo: ImageArray) -> PreparedPhoto:
        """Shrink a photo to the network's input; may run on any thread.

        Args:
            photo: RGB uint8 [H, W, 3] of any size.
        """
        height, width = photo.shape[:2]
        stride = self.model.stride or 1
        placement = fit_photo(height, width, self.size, self.fit, self.aspect, stride)
        return PreparedPhoto(photo, shrink(photo, placement), placement)

    def predict_prepared(
        self, photos: Iterable[PreparedPhoto], batch_size: int = 8
    ) -> Iterator[tuple[PreparedPhoto, Alpha]]:
        """Yield each prepared photo with the network's alpha, float32 at the network's size.

        The next batch is started before the one before it is waited for, so that a GPU is not idle
        between them.
        """
        waiting = iter(photos)
        before: list[tuple[PreparedPhoto, _Row]] = []
        while batch := list(islice(waiting, batch_size)):
            started = list(zip(batch, self._start(batch), strict=True))
            yield from ((photo, row.wait()) for photo, row in before)
            # One batch behind: the host brings masks to full size while the device computes.
            before = started
        yield from ((photo, row.wait()) for photo, row in before)

    def _start(self, batch: Sequence[PreparedPhoto]) -> list[_Row]:
        """Start the network on a batch; inputs of one size go through it together."""
        # Only "cover" gives inputs of several sizes; the others are one group.
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, photo in enumerate(batch):
            by_size.setdefault((photo.placement.height, photo.placement.width), []).append(i)
        rows: dict[int, _Row] = {}
        for group in by_size.values():
            inputs = torch.from_numpy(np.stack([batch[i].small for i in group]))
            result = _OnTheWay(self._levelled(self.alpha_of(inputs)))
            rows |= {i: _Row(result, number) for number, i in enumerate(group)}
        return [rows[i] for i in range(len(batch))]

    def _levelled(self, alpha: Tensor) -> Tensor:
        low, high = self.levels
        return ((alpha - low) / (high - low)).clamp_(0, 1)

    def alpha_of(self, inputs: Tensor) -> Tensor:
        """Run the network, without ``levels``.

        Args:
            inputs: uint8 RGB [B, H, W, 3], H and W multiples of the stride, on any device.

        Returns:
            float32 [B, H, W] on ``device``.
        """
        x = self._normalised(inputs)
        alpha = self.network(x)
        if self.mirror:  # the mean of the logits: where both are sure, the mean is
            mirrored = self.network(x.flip(3)).flip(3)
            alpha = torch.sigmoid((alpha.logit(eps=1e-6) + mirrored.logit(eps=1e-6)) / 2)
        return alpha[:, 0]

    def _normalised(self, inputs: Tensor) -> Tensor:
        levels = inputs.to(self.device, non_blocking=True).float()
        return normalise_levels(levels).permute(0, 3, 1, 2)

    def finish(self, photo: PreparedPhoto, small: Alpha) -> Alpha:
        """Bring the network's alpha to the photo's own size and refine it; may run on any thread.

        Args:
            photo: from ``prepare``.
            small: the network's alpha at the network's size.

        Returns:
            float32 [H, W] in [0, 1].
        """
        if self.largest:  # of the photo, not of what continues its edges around it
            top, left, inner_height, inner_width = photo.placement.inner
            inside = slice(top, top + inner_height), slice(left, left + inner_width)
            whole, small = small, small.copy()
            small[inside] = keep_largest(whole[inside])
        height, width = photo.photo.shape[:2]
        alpha = enlarge(small, photo.placement, height, width)
        if not self.refine:
            return alpha
        _, _, inner_height, inner_width = photo.placement.inner
        return refine_alpha(photo.photo, alpha, max(height / inner_height, width / inner_width))

    def calibrate(self, photos: Iterable[PhotoSource]) -> float:
        """Compute in 8-bit integers from now on, where this keeps the masks.

        For CPUs, see :mod:`portrait_dist.models.int8`. Every second photo shows the ranges of the
        network's activations; masks of the others are compared with float32's. It takes four times
        as long as to predict them in bfloat16.

        Args:
            photos: at least 2, better 64 or more, as different as those to come. What they do not
                show (activations larger than any of theirs) is clipped.

        Returns:
            Intersection over union of the masks with float32's. Below ``fused.MIN_MASK_IOU`` the
            segmenter stays as it was.

        Raises:
            InputError: fewer than 2 photos, another engine than torch, a GPU, a CPU without 8-bit
                dot products, another network than the U-Net, or one with group norms.
            DamagedDataError: a photo cannot be read.
        """
        self._check_int8()
        x = self._calibration_images(photos)
        assert isinstance(self.model, UNet)
        network = int8.quantise(self.model, x[::2])
        # Compared with float32 on images that the calibration has not seen.
        exact = fused.for_inference(self.model, self.device, "fp32")
        agreement = fused.mask_iou(
            *(fused.binary_masks(form, x[1::2]) for form in (network, exact))
        )
        if agreement >= fused.MIN_MASK_IOU:
            self.network, self.precision = network, "int8"
        return agreement

    def _calibration_images(self, photos: Iterable[PhotoSource]) -> Tensor:
        """Read the photos as the network gets them, float32 [N, 3, H, W]."""
        # "cover" gives photos of different aspects different sizes; these must fit one tensor.
        fit: Fit = "letterbox" if self.fit == "cover" else self.fit
        small = []
        for photo in map(read_photo, photos):
            height, width = photo.shape[:2]
            small.append(shrink(photo, fit_photo(height, width, self.size, fit, self.aspect)))
        if len(small) < 2:
            raise InputError(
                f"{len(small)} photos are too few to calibrate with; give at least 2, better 64"
            )
        return self._normalised(torch.from_numpy(np.stack(small)))

    def _check_int8(self) -> None:
        if self.engine != "torch":
            raise InputError(
                "8-bit integers are computed by PyTorch; leave --engine openvino out, or give "
                "another precision"
            )
        if self.device.type != "cpu" or not int8.is_supported():
            raise InputError(
                "8-bit integers are for CPUs with VNNI or AMX instructions; "
                "this segmenter stays as it is without them"
            )
        if isinstance(self.model, MaskNetwork):
            raise InputError(
                "only the U-Net of this package can compute in 8-bit integers; "
                "give another precision, or export to ONNX and quantise there"
            )
        if self.model.norm != "batch":
            raise InputError(
                "only a network with batch norms can compute in 8-bit integers; "
                "this one has group norms"
            )


def _check_choices(fit: str, precision: str, levels: tuple[float, float], aspect: float) -> None:
    """Check options that are right or wrong by themselves."""
    if fit not in FITS:
        raise InputError(f"fit is one of {', '.join(FITS)}, not '{fit}'")
    if precision not in PRECISIONS:
        raise InputError(f"precision is one of {', '.join(PRECISIONS)}, not '{precision}'")
    if not 0 <= levels[0] < levels[1] <= 1:
        raise InputError(
            "levels are two numbers, 0 <= low < high <= 1, for example 0.3 0.7; "
            f"not {levels[0]:g} {levels[1]:g}"
        )
    if not 0 < aspect < float("inf"):
        raise InputError(f"aspect is width / height, a positive number, not {aspect:g}")


def _check_size(model: UNet | MaskNetwork, size: tuple[int, int], fit: str, engine: str) -> None:
    """Check that the network takes its size, and others where the fit gives others."""
    if any(side < model.stride or side % (model.stride or 1) for side in size):
        raise InputError(f"size {size[0]}x{size[1]}: the network takes multiples of {model.stride}")
    if fit == "cover" and _takes_one_size(model, engine):
        raise InputError(
            f"fit 'cover': this network takes {size[0]}x{size[1]} only; give letterbox"
        )


def _takes_one_size(model: UNet | MaskNetwork, engine: str) -> bool:
    return not model.stride or (engine == "openvino" and isinstance(model, MaskNetwork))


class _OnTheWay:
    """A result on its way from the device to the host."""

    def __init__(self, result: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if result.device.type == "cuda":
            # Page-locked: otherwise the copy would wait for the device here.
            host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            self._host = host.copy_(result, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = result.cpu()

    def wait(self) -> Alpha:
        """Wait until it has arrived."""
        if self._arrived:
            self._arrived.synchronize()
        return self._host.numpy()


@dataclass(frozen=True)
class _Row:
    """One photo's row of a batch."""

    batch: _OnTheWay
    number: int

    def wait(self) -> Alpha:
        return self.batch.wait()[self.number]
