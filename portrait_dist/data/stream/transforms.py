"""Anybody's transforms of image and mask, in the decoding threads, the same on any number of them.

A sample's random numbers are a function of (seed, epoch, position) alone, as those of the built-in
augmentation are. torchvision's transforms draw from torch's one global generator, which threads
would share with each other and with the network's dropout; :class:`_DrawFrom` gives their calls a
generator of the sample's own, in the calling thread only.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from portrait_dist.errors import InputError, kind_and_message

Transform = Callable[..., Any]
"""A transform of torchvision.transforms.v2, one of albumentations, or any
``(image, mask, generator) -> (image, mask)`` on uint8 arrays with a ``numpy.random.Generator``."""
Pictures = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_WITH_GENERATOR = frozenset(
    {
        *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal),
        *(torch.bernoulli, torch.multinomial, torch.poisson, torch.binomial),
        # What gamma, beta and Dirichlet of torch.distributions draw by.
        *(torch._standard_gamma, torch._sample_dirichlet),
        *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_),
        *(torch.Tensor.bernoulli_, torch.Tensor.exponential_, torch.Tensor.multinomial),
        *(torch.Tensor.cauchy_, torch.Tensor.geometric_, torch.Tensor.log_normal_),
        torch.Tensor.bernoulli,
    }
)
_LIKE = {
    torch.rand_like: torch.rand,
    torch.randn_like: torch.randn,
    torch.randint_like: torch.randint,
}
"""Functions that take no generator, with those that do the same with a shape."""


class SampleTransforms:
    """Applies transforms to decoded samples.

    Args:
        transforms: see :data:`Transform`. It gets images uint8 [H, W, 3] RGB and masks uint8
            [H, W], and returns both with the same type and shape.
        seed: of the run.
        name: how messages call them.

    What draws from the generators of ``random`` or of numpy's old interface, or by a function of
    torch that takes no generator (dropout), cannot be made exact.
    """

    def __init__(self, transforms: Transform, seed: int, name: str = "transforms") -> None:
        if not callable(transforms):
            raise InputError(f"{name}: {type(transforms).__name__} cannot be called")
        self._transforms, self._seed, self._name = transforms, seed, name
        calls: dict[str, Callable[[Pictures, np.random.SeedSequence], Any]] = {
            "torchvision": self._torchvision,
            "albumentations": self._albumentations,
        }
        # Of the bases too: a class of the user's own that extends one of theirs is called alike.
        packages = [one.__module__.partition(".")[0] for one in type(transforms).__mro__]
        self._call = next((calls[one] for one in packages if one in calls), self._plain)
        self._own = threading.local()

    def __call__(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.uint8],
        *,
        epoch: int,
        position: int,
        key: str,
    ) -> None:
        """Transform a sample in place.

        Args:
            image: uint8 [H, W, 3].
            mask: uint8 [H, W].
            epoch: number of the epoch.
            position: of the sample in the epoch's order.
            key: of the sample, for messages.

        Raises:
            InputError: the transform fails, or returns something of another type or shape.
        """
        try:
            found = self._call((image, mask), np.random.SeedSequence((self._seed, epoch, position)))
            new_image, new_mask = (np.asarray(one) for one in found)
        except (Exception, SystemExit) as error:  # anybody's code
            raise InputError(f"{self._name}: {key}: {kind_and_message(error)}") from error
        for new, old, what in ((new_image, image, "image"), (new_mask, mask, "mask")):
            if new.shape != old.shape or new.dtype != np.uint8:
                raise InputError(
                    f"{self._name}: {key}: gives the {what} as {new.dtype} {list(new.shape)}, "
                    f"it must stay uint8 {list(old.shape)}"
                )
            old[...] = new

    def _plain(self, pictures: Pictures, seeds: np.random.SeedSequence) -> Any:
        return self._transforms(*pictures, np.random.default_rng(seeds))

    def _albumentations(self, pictures: Pictures, seeds: np.random.SeedSequence) -> Any:
        # Its generator belongs to the object: a copy for each thread.
        own: Any = getattr(self._own, "transforms", None)
        if own is None:
            own = self._own.transforms = copy.deepcopy(self._transforms)
        own.set_random_seed(int(seeds.generate_state(1)[0]))
        found = own(image=pictures[0], mask=pictures[1])
        return found["image"], found["mask"]

    def _torchvision(self, pictures: Pictures, seeds: np.random.SeedSequence) -> Any:
        from torchvision import tv_tensors

        image, mask = (torch.from_numpy(one) for one in pictures)
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        with _DrawFrom(generator):
            new_image, new_mask = self._transforms(
                tv_tensors.Image(image.permute(2, 0, 1)), tv_tensors.Mask(mask)
            )
        return new_image.permute(1, 2, 0).numpy(), new_mask.numpy()

    def __getstate__(self) -> dict[str, object]:
        return {"transforms": self._transforms, "seed": self._seed, "name": self._name}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _DrawFrom(TorchFunctionMode):
    """Let torch's random functions draw from a generator, within the block and its thread."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function in _LIKE:
            like, *left = args or (options.pop("input"),)
            options.pop("memory_format", None)
            given = {name: value for name, value in options.items() if value is not None}
            options = {"dtype": like.dtype, "device": like.device, "size": like.shape} | given
            function, args = _LIKE[function], tuple(left)
        if function in _WITH_GENERATOR and options.get("generator") is None:
            options["generator"] = self._generator
        return function(*args, **options)
