"""From photographs of any size to soft alpha at their own resolution.

    segmenter = PortraitSegmenter.from_checkpoint("runs/NAME/ckpt_best.pth")
    alpha = segmenter.predict("photo.jpg")          # float32 [H, W], 0 background, 1 person

How a photo is brought to the network's size (``fit``): the network was trained on upright pictures of one aspect ratio,
600×800, squeezed into its input size. ``benchmarks/predictions.py`` measures the choices on photos of other shapes.

- ``letterbox`` (the default): the picture keeps its aspect ratio under the squeeze of training; its longer way fills the
  training size and the rest continues its edge pixels, as the augmentation of training does.
- ``cover``: as above, but its shorter way fills the training size and the longer way sticks out. The network is fully
  convolutional and takes that larger picture whole.
- ``squash``: the whole picture is squeezed into the training size, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from portrait_dist.distributed import pick_device
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.models import fused, int8
from portrait_dist.models.unet import STRIDE, UNet
from portrait_dist.preprocessing import DEFAULT_SIZE, MEAN, STD
from portrait_dist.system.info import cores
from portrait_dist.system.malloc import keep_freed_memory

if TYPE_CHECKING:
    from torch import Tensor

Picture = str | Path | Image.Image | NDArray[np.uint8]
Alpha = NDArray[np.float32]

FITS = ("letterbox", "cover", "squash")
REFINE = True
"""Are masks refined unless said otherwise? On, because the boundary figures of ``benchmarks/predictions.py`` improve."""
MIRROR = True
"""Is the mirrored picture predicted too unless said otherwise? On for the same reason."""
TRAINING_ASPECT = 600 / 800
"""Width / height of the pictures of the AISegment set before they are squeezed into the network's input."""
LARGEST_STRETCH = 4
"""With ``cover``, the network's input is at most this many times the training size (panoramas are squeezed beyond it)."""


def read_picture(picture: Picture) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of a file, a PIL image or an array, turned upright as its EXIF orientation says.

    Args:
        picture: a path; a PIL image; or an uint8 array, RGB [H, W, 3], RGBA [H, W, 4] or grey [H, W].

    Raises:
        InputError: no such file, or an array of another shape or type.
        DamagedDataError: the file is no picture, or truncated.
    """
    if isinstance(picture, np.ndarray):
        return _rgb_array(picture)
    if isinstance(picture, Image.Image):
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    path = Path(picture)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the path of a picture")
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise DamagedDataError(
            f"{path}: not a picture that Pillow can read; convert it to JPEG or PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; make it smaller first") from error
    except Exception as error:  # Pillow's readers meet damage with errors of many kinds
        raise DamagedDataError(
            f"{path}: the picture is damaged ({error}); take another copy of it"
        ) from error


def _rgb_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if (
        array.dtype != np.uint8
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))
        or 0 in array.shape
    ):
        raise InputError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture; give uint8 [H, W, 3], RGB from 0 to 255"
        )
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array[..., :3]


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the network's input.

    Attributes:
        height, width: of the network's input, multiples of 16.
        picture: (top, left, height, width) of the picture within it.
    """

    height: int
    width: int
    picture: tuple[int, int, int, int]


def place(
    height: int, width: int, size: tuple[int, int], fit: str, aspect: float = TRAINING_ASPECT
) -> Placement:
    """Lay a picture of ``height`` × ``width`` pixels into the network's input.

    Args:
        size: (H, W) of training.
        fit: ``cover``, ``letterbox`` or ``squash``.
        aspect: width / height of the training pictures before they were squeezed into ``size``.
    """
    if fit == "squash":
        return Placement(*size, (0, 0, *size))
    # The picture in pixels of the network, at the height of training and with the squeeze of training.
    wide = size[0] * (width / height) * (size[1] / size[0]) / aspect
    if fit == "letterbox":
        scale = min(1.0, size[1] / wide)
        inner = (max(1, round(size[0] * scale)), max(1, round(wide * scale)))
        return Placement(*size, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2, *inner))
    scale = max(1.0, size[1] / wide)
    limit = (LARGEST_STRETCH * size[0], LARGEST_STRETCH * size[1])
    inner = (min(limit[0], _rounded(size[0] * scale)), min(limit[1], _rounded(wide * scale)))
    return Placement(*inner, (0, 0, *inner))


def _rounded(side: float) -> int:
    return max(STRIDE, round(side / STRIDE) * STRIDE)


def shrink(picture: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
    """The network's input, uint8 [H, W, 3]: antialiased bilinear resize, as in training, and its edge pixels continued."""
    top, left, height, width = placement.picture
    small = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    bottom, right = placement.height - top - height, placement.width - left - width
    return np.asarray(
        cv2.copyMakeBorder(small, top, bottom, left, right, cv2.BORDER_REPLICATE), np.uint8
    )


def enlarge(alpha: Alpha, placement: Placement, height: int, width: int) -> Alpha:
    """Bring the network's alpha back to the picture's own ``height`` × ``width``."""
    top, left, inner_height, inner_width = placement.picture
    inner = np.ascontiguousarray(alpha[top : top + inner_height, left : left + inner_width])
    return np.asarray(
        cv2.resize(inner, (width, height), interpolation=cv2.INTER_LINEAR), np.float32
    )


class PortraitSegmenter:
    """Predicts the soft alpha of portraits.

    Args:
        model: a trained network; it is not changed.
        size: (H, W) of its training pictures.
        device: ``auto`` (the GPU if there is one), ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it, see :mod:`portrait_dist.models.fused`.
        fit: how pictures of other shapes are brought to the network's size, see this module's docstring.
        refine: sharpen alpha along the edges of the full-size picture, see :mod:`portrait_dist.inference.refine`.
        mirror: predict the mirrored picture too and take the mean of the two, as test-time augmentation does; the network runs
            twice.
        aspect: width / height of the training pictures before they were squeezed into ``size``.
        levels: (low, high) of the network's alpha that become 0 and 1, straight in between: removes the haze that a network
            leaves where it is not sure. At ``0.3, 0.7`` the border between person and background stays where it was, at 0.5.

    Raises:
        InputError: an unknown ``fit``, or ``levels`` that are not 0 <= low < high <= 1.
    """

    def __init__(
        self,
        model: UNet,
        size: tuple[int, int] = (256, 256),
        *,
        device: str = "auto",
        precision: str = "auto",
        fit: str = "letterbox",
        refine: bool | None = None,
        mirror: bool | None = None,
        aspect: float = TRAINING_ASPECT,
        levels: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if fit not in FITS:
            raise InputError(f"fit is one of {', '.join(FITS)}, not '{fit}'")
        if not 0 <= levels[0] < levels[1] <= 1:
            raise InputError(
                f"levels are two numbers, 0 <= low < high <= 1, for example 0.3 0.7; not {levels[0]:g} {levels[1]:g}"
            )
        self.device = pick_device(device)
        self.model, self.size, self.fit, self.aspect = model, size, fit, aspect
        self.levels = levels
        self.refine = REFINE if refine is None else refine
        self.mirror = MIRROR if mirror is None else mirror
        keep_freed_memory()
        self.network = fused.prepare(model, self.device, precision)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> PortraitSegmenter:
        """A segmenter from a checkpoint of ``portrait-dist train``.

        Args:
            path: a .pth file.
            options: ``device``, ``precision``, ``fit``, ``refine``, ``mirror``, ``levels``.

        Raises:
            InputError: no such file, a checkpoint of another model, or wrong options.
            DamagedDataError: the file is damaged.
        """
        from portrait_dist.checkpoints import load_model

        model, info = load_model(path)
        return cls(model, info.size or DEFAULT_SIZE, **options)

    def predict(self, pictures: Any, batch_size: int = 8) -> Any:
        """Alpha of one picture, or of a list of them.

        Args:
            pictures: a path, a PIL image or an uint8 array (see :func:`read_picture`), or a list or tuple of these.
            batch_size: pictures that go through the network together; they need not have one size.

        Returns:
            float32 [H, W] at the picture's own upright resolution, from 0 (background) to 1 (person); a list gives a list.

        Raises:
            InputError, DamagedDataError: a picture cannot be read; the message names it.
        """
        if isinstance(pictures, (list, tuple)):
            return [alpha for _, alpha in self.stream(map(read_picture, pictures), batch_size)]
        return next(self.stream([read_picture(pictures)]))[1]

    def stream(
        self, pictures: Iterable[NDArray[np.uint8]], batch_size: int = 8
    ) -> Iterator[tuple[NDArray[np.uint8], Alpha]]:
        """Yield (picture, alpha) in order, twice ``batch_size`` pictures in memory at a time.

        Masks are brought to full size by threads while this one runs the network on the next batch.

        Args:
            pictures: RGB uint8 [H, W, 3] of any sizes.
        """
        waiting = iter(pictures)
        with ThreadPoolExecutor(cores()) as threads:
            finishing: list[tuple[NDArray[np.uint8], Future[Alpha]]] = []
            while batch := list(islice(waiting, batch_size)):
                placements = [
                    place(picture.shape[0], picture.shape[1], self.size, self.fit, self.aspect)
                    for picture in batch
                ]
                small = self._small_alphas(batch, placements)
                yield from ((picture, future.result()) for picture, future in finishing)
                finishing = [
                    (picture, threads.submit(self._full_size, picture, alpha, placement))
                    for picture, alpha, placement in zip(batch, small, placements, strict=True)
                ]
            yield from ((picture, future.result()) for picture, future in finishing)

    def _small_alphas(
        self, pictures: Sequence[NDArray[np.uint8]], placements: Sequence[Placement]
    ) -> list[Alpha]:
        """Alpha at the network's size; pictures whose inputs have one size share a batch."""
        alphas: dict[int, Alpha] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, placement in enumerate(placements):
            by_size.setdefault((placement.height, placement.width), []).append(i)
        for group in by_size.values():
            inputs = torch.from_numpy(np.stack([shrink(pictures[i], placements[i]) for i in group]))
            alphas.update(
                zip(group, self._levelled(self.alpha_of(inputs)).cpu().numpy(), strict=True)
            )
        return [alphas[i] for i in range(len(pictures))]

    def _levelled(self, alpha: Tensor) -> Tensor:
        low, high = self.levels
        return ((alpha - low) / (high - low)).clamp_(0, 1)

    def alpha_of(self, inputs: Tensor) -> Tensor:
        """uint8 RGB [B, H, W, 3], H and W multiples of 16 → alpha without ``levels``, float32 [B, H, W] on ``device``."""
        x = self._normalised(inputs)
        alpha = self.network(x)
        if self.mirror:  # the mean of the logits: where both are sure, the mean is
            mirrored = self.network(x.flip(3)).flip(3)
            alpha = torch.sigmoid((alpha.logit(eps=1e-6) + mirrored.logit(eps=1e-6)) / 2)
        return alpha[:, 0]

    def _normalised(self, inputs: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD)
        )
        return inputs.to(self.device).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

    def calibrate(self, pictures: Iterable[Picture]) -> float:
        """Compute in 8-bit integers from now on, where this keeps the masks; for CPUs (see :mod:`portrait_dist.models.int8`).

        Every second picture shows the ranges of the network's activations; masks of the others are compared with float32's. It
        takes four times as long as to predict them in bfloat16.

        Args:
            pictures: at least 2, better 64 or more, as different as those to come; see :func:`read_picture`. What they do not
                show (numbers larger than any of theirs) is cut.

        Returns:
            Intersection over union of the masks with float32's. Below ``fused.TOLERANCE`` the segmenter stays as it was.

        Raises:
            InputError: fewer than 2 pictures, a GPU, a CPU without 8-bit dot products, or a network with group norms.
            DamagedDataError: a picture cannot be read.
        """
        if self.device.type != "cpu" or not int8.is_supported():
            raise InputError(
                "8-bit integers are for CPUs with VNNI or AMX instructions; this segmenter stays as it is without them"
            )
        if self.model.norm != "batch":
            raise InputError(
                "only a network with batch norms can compute in 8-bit integers; this one has group norms"
            )
        fit = "letterbox" if self.fit == "cover" else self.fit  # all of one size
        read = map(read_picture, pictures)
        small = [
            shrink(photo, place(photo.shape[0], photo.shape[1], self.size, fit, self.aspect))
            for photo in read
        ]
        if len(small) < 2:
            raise InputError(
                f"{len(small)} pictures are too few to calibrate with; give at least 2, better 64"
            )
        x = self._normalised(torch.from_numpy(np.stack(small)))
        network = int8.quantise(self.model, x[::2])
        exact = fused.prepare(self.model, self.device, "fp32")
        agreement = fused.agreement(*(fused.masks_of(form, x[1::2]) for form in (network, exact)))
        if agreement >= fused.TOLERANCE:
            self.network = network
        return agreement

    def _full_size(self, picture: NDArray[np.uint8], small: Alpha, placement: Placement) -> Alpha:
        """The network's alpha at the picture's own size."""
        alpha = enlarge(small, placement, *picture.shape[:2])
        if not self.refine:
            return alpha
        from portrait_dist.inference.refine import refine_alpha

        pixels = max(alpha.shape[0] / placement.picture[2], alpha.shape[1] / placement.picture[3])
        return refine_alpha(picture, alpha, pixels)
