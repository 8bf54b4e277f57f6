"""Checkpoint files: written whole or not at all, and one door through which every reader goes.

The files have SuperGradients' names and content. Tensors lie in the usual NCHW order, names carry
no prefix of DDP or torch.compile, everything else is plain numbers, strings, lists and dicts, so
that loading one cannot execute code. What this package needs beyond SuperGradients' entries stands
under ``portrait_dist``; :class:`CheckpointInfo` is its typed form.
"""

from __future__ import annotations

import io
import logging
import math
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch

from portrait_dist import distributed, files
from portrait_dist.errors import DamagedDataError, InputError, one_line
from portrait_dist.preprocessing import DEFAULT_ASPECT, DEFAULT_SIZE, FITS, Fit
from portrait_dist.runs.folder import BEST, LATEST

if TYPE_CHECKING:
    from portrait_dist.models import MaskNetwork, UNet

log = logging.getLogger("portrait_dist.checkpoints")

MAX_SIDE = 16_384
"""Pixels; a larger side in a checkpoint is a damaged number (such an image takes 3.2 GB)."""
FIRST_WEIGHT = "encoder1.enc1conv1.weight"
LAST_WEIGHT = "conv.weight"
OPTIMIZER_SWITCHES = frozenset(
    {
        *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
        *("decoupled_weight_decay", "nesterov", "centered"),
    }
)
OPTIMIZER_NUMBERS = frozenset({"lr", "initial_lr", "weight_decay", "momentum", "dampening"})
OPTIMIZER_TENSORS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
        *("grad_avg", "acc_delta", "sum"),
    }
)
"""Options and states of torch's optimisers by type; those of other optimisers are not known."""


# Writing ------------------------------------------------------------------------------------------


def host_copy(value: object) -> Any:
    """Copy a state to the CPU as contiguous tensors and plain Python values.

    No tensor of the copy shares memory with the live network, so training may run while it is
    written. From a GPU the tensors travel through page-locked memory, all at once, and the host
    waits for them once.
    """
    copied = _copy(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(value: object) -> Any:
    if isinstance(value, torch.Tensor):
        return _copy_tensor(value.detach())
    if isinstance(value, dict):
        return {
            int(key) if isinstance(key, int) else str(key): _copy(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [_copy(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # also of subclasses, such as torch.__version__ and np.float64
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        # copy=True: for a contiguous CPU tensor .to("cpu").contiguous() is the tensor itself.
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.contiguous(), non_blocking=True)


def save_atomically(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that appears whole or not at all, on the disk when this returns.

    Args:
        path: the checkpoint's file.
        state: anything :func:`host_copy` takes.

    Raises:
        InputError: the folder is missing or cannot be written; the old file stays.
        PortraitDistError: the disk is full or failed; the old file stays.
    """
    write(path, host_copy(state))


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state that is on the host already; see :func:`save_atomically`."""
    buffer = io.BytesIO()  # first in memory: torch.save hides the reason when a disk refuses
    torch.save(state, buffer)
    # Released at once: Python 3.12.1 crashes when it collects such a view in a cycle, such as that
    # of a full disk's exception and its traceback.
    with buffer.getbuffer() as view:
        files.write_bytes(path, view, durable=True)


# What a checkpoint says of itself -----------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A model of the average: ``epoch`` epochs were complete, ``value`` is the watched metric."""

    epoch: int
    value: float


@dataclass(frozen=True)
class BuildInfo:
    """How to build a network that is not the U-Net, and what is known of it.

    Attributes:
        name: as ``model.name``; never code.
        args: plain values.
        output: ``logits`` or ``probabilities``.
        stride: height and width are multiples of it; 0: only the size of training.
        channels_last: whether it takes images in channels-last memory.
    """

    name: str
    args: Mapping[str, Any]
    output: str
    stride: int
    channels_last: bool


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides its weights; None is what it does not say.

    Attributes:
        path: the file.
        model: arguments of ``UNet``; None where the network is another one.
        network: name of the network's class.
        build: how to build it; None for the U-Net, and for networks that no name was given of.
        size: (H, W) in pixels of the training images as the network saw them.
        aspect: width / height of the training images before they were resized to ``size``.
        fit: how training images of another shape were brought to ``size``.
        data: hash of each split's content, by split.
        config: the run's configuration.
        epoch: complete epochs.
        batches: batches of each rank done in the epoch after those; None where the epoch has not
            begun.
        samples_seen: training samples over all ranks.
        best_metric: the best value of the watched metric so far.
        acc: the watched metric of these weights (SuperGradients' name for it).
        world_size: ranks of the run that wrote it.
        global_batch: samples of an optimiser step.
        packages: versions by package.
        averaged: the models that the average of the best consists of; None where the run averages
            nothing.
    """

    path: str = ""
    model: Mapping[str, int | str] | None = None
    network: str | None = None
    build: BuildInfo | None = None
    size: tuple[int, int] | None = None
    aspect: float | None = None
    fit: Fit = "squash"
    data: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    batches: int | None = None
    samples_seen: int = 0
    best_metric: float | None = None
    acc: float | None = None
    world_size: int | None = None
    global_batch: int | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    averaged: tuple[Snapshot, ...] | None = None


class _Checks:
    """Checks the entries of one file; every failure is one line that names file and entry."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def need(self, holds: bool, entry: str) -> None:
        if not holds:
            raise DamagedDataError(
                f"{self.path}: not a whole checkpoint ({entry}); take another one of the run, "
                f"such as {BEST}"
            )

    def integer(self, value: Any, entry: str, least: int = 0) -> int:
        self.need(_is_integer(value) and least <= value < 2**63, f"{entry} is no whole number")
        return int(value)

    def optional_integer(self, value: object, entry: str, least: int = 0) -> int | None:
        return None if value is None else self.integer(value, entry, least)

    def optional_number(self, value: Any, entry: str) -> float | None:
        if value is None:
            return None
        self.need(isinstance(value, (int, float)), f"{entry} is no number")
        return float(value)

    def mapping(self, value: Any, entry: str) -> dict[Any, Any]:
        self.need(isinstance(value, dict), f"{entry} is no dictionary")
        return dict(value)

    def plain_mapping(self, value: object, entry: str) -> dict[Any, Any]:
        """Accept named numbers, texts, lists and dictionaries: a tensor does not even compare."""
        found = self.mapping(value, entry)
        named = all(isinstance(name, str) for name in found)
        self.need(named and _is_plain(found), f"{entry} holds something else than named values")
        return found

    def tensors(self, value: object, entry: str) -> dict[str, torch.Tensor]:
        found = self.mapping(value, entry)
        self.need(
            all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()),
            f"{entry} holds something else than named tensors",
        )
        return found

    def size(self, value: Any) -> tuple[int, int] | None:
        if value is None:
            return None
        self.need(
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(_is_integer(side) and 1 <= side <= MAX_SIDE for side in value),
            f"size {_short(value)} is not [height, width] in pixels, 1 to {MAX_SIDE}",
        )
        return int(value[0]), int(value[1])

    def aspect(self, value: object) -> float | None:
        number = self.optional_number(value, "aspect")
        self.need(number is None or 0.01 <= number <= 100, f"aspect {_short(value)}")
        return number

    def fit(self, value: object) -> Fit:
        self.need(value in FITS, f"fit {_short(value)} is none of {', '.join(FITS)}")
        return cast(Fit, value)

    def build(self, value: object) -> BuildInfo | None:
        if value is None:
            return None
        found = self.mapping(value, "build")
        name, output = found.get("name"), found.get("output")
        self.need(isinstance(name, str) and 0 < len(name) <= 1000, "the network's name")
        self.need(output in ("logits", "probabilities"), "the network's output")
        args = self.plain_mapping(found.get("args"), "the network's arguments")
        stride = self.integer(found.get("stride"), "the network's stride")
        self.need(stride <= MAX_SIDE, "the network's stride")
        channels_last = found.get("channels_last", True)  # older releases did not ask
        self.need(isinstance(channels_last, bool), "the network's memory format")
        return BuildInfo(str(name), args, str(output), stride, bool(channels_last))

    def averaged(self, value: Any) -> tuple[Snapshot, ...] | None:
        if value is None:
            return None
        self.need(isinstance(value, list), "averaged is no list")
        found = []
        for item in value:
            entry = self.mapping(item, "averaged")
            number, metric = entry.get("epoch"), entry.get("value")
            self.need(_is_integer(number) and isinstance(metric, (int, float)), "averaged")
            assert number is not None
            assert metric is not None
            found.append(Snapshot(int(number), float(metric)))
        return tuple(found)


def _is_plain(value: object, depth: int = 32) -> bool:
    """Whether a value is made of numbers and texts, in at most ``depth`` levels."""
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(one, depth - 1) for one in inner)
    return value is None or isinstance(value, (bool, int, float, str))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def info_of(state: Mapping[str, Any], path: str | Path = "") -> CheckpointInfo:
    """Check what a checkpoint says besides its weights, and return it typed.

    Args:
        state: a checkpoint as it was read.
        path: its file, for messages.

    Raises:
        DamagedDataError: an entry has the wrong type or an impossible value.
    """
    checks = _Checks(path)
    own = checks.mapping(state.get("portrait_dist") or {}, "portrait_dist")
    position = checks.mapping(own.get("position") or {}, "position")
    model, network = own.get("model"), own.get("network")
    checks.need(network is None or isinstance(network, str), "network is no name")
    packages = checks.mapping(state.get("packages") or {}, "packages")
    data = checks.mapping(own.get("data") or {}, "data")
    return CheckpointInfo(
        path=str(path),
        model=checks.plain_mapping(model, "model") if model is not None else None,
        network=network,
        build=checks.build(own.get("build")),
        size=checks.size(own.get("size")),
        aspect=checks.aspect(own.get("aspect")),
        fit=checks.fit(own.get("fit", "squash")),
        data={str(split): str(identity) for split, identity in data.items()},
        config=checks.plain_mapping(own.get("config") or {}, "config"),
        epoch=checks.optional_integer(state.get("epoch"), "epoch"),
        batches=checks.integer(position.get("batches"), "position") if position else None,
        samples_seen=checks.integer(own.get("samples_seen", 0), "samples_seen"),
        best_metric=checks.optional_number(own.get("best_metric"), "best_metric"),
        acc=checks.optional_number(state.get("acc"), "acc"),
        world_size=checks.optional_integer(own.get("world_size"), "world_size", 1),
        global_batch=checks.optional_integer(own.get("global_batch"), "global_batch", 1),
        packages={str(name): str(version) for name, version in packages.items()},
        averaged=checks.averaged(own.get("averaged")),
    )


# Reading ------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint whole, without executing anything in it, and check every byte and entry.

    Raises:
        InputError: there is no such file, or it is no checkpoint.
        DamagedDataError: the file is truncated, has a flipped bit, or entries of the wrong type.
    """
    return _checkpoint(_load(io.BytesIO(_bytes_of(path)), path), path)


def check_whole(path: str | Path) -> None:
    """Check every byte of a checkpoint, and its entries.

    Raises:
        InputError, DamagedDataError: as :func:`read`.
    """
    _checked_bytes(path)


def read_info(path: str | Path) -> CheckpointInfo:
    """Read what a checkpoint says besides its weights; the weights stay on the disk.

    Raises:
        InputError, DamagedDataError: as :func:`read`.
    """
    path = _existing(path)
    with path.open("rb") as file:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
    state = _load(str(path) if mapped else io.BytesIO(path.read_bytes()), path, mmap=mapped)
    return info_of(_checkpoint(state, path), path)


def read_on_every_rank(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on rank 0 and give it to all ranks. A collective.

    A shared disk serves the file once, whatever the number of ranks.

    Raises:
        InputError, DamagedDataError: as :func:`read`, on every rank.
    """
    # Bytes are sent, not objects: what every rank parses has been checked on rank 0.
    own = distributed.on_every_rank(
        lambda: _checked_bytes(path) if distributed.rank() == 0 else b""
    )
    return _parsed(distributed.broadcast_bytes(own), path)


def _checked_bytes(path: str | Path) -> bytes:
    data = _bytes_of(path)
    _parsed(data, path)
    return data


def load_foreign(path: str | Path) -> Any:
    """Load any torch file without executing anything in it; the caller checks what it holds.

    Raises:
        InputError: there is no such file.
        DamagedDataError: it is truncated, damaged, or holds something that would execute.
    """
    return _load(io.BytesIO(_bytes_of(path)), path)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise InputError(
            f"{path}: there is no such checkpoint; give the path of a .pth file, for example "
            f"runs/NAME/{BEST}"
        ) from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device never ends
        raise InputError(f"{path}: is not a file; give the path of a .pth file")
    if not status.st_size:
        raise DamagedDataError(f"{path}: is empty; {_advice()}")
    return path


def _bytes_of(path: str | Path) -> bytes:
    """Read a file's bytes; check its CRC-32, which torch.load does not."""
    path = _existing(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); see its permissions"
        ) from error
    if zipfile.is_zipfile(io.BytesIO(data)):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # A flipped bit in a weight would otherwise be trained on.
                damaged = archive.testzip()
        except Exception as error:
            raise DamagedDataError(
                f"{path}: damaged ({type(error).__name__}); {_advice()}"
            ) from error
        if damaged:
            raise DamagedDataError(f"{path}: damaged ({damaged} has a wrong checksum); {_advice()}")
    return data


def _advice() -> str:
    return f"take another checkpoint of the run, such as {LATEST} or {BEST}"


def _load(source: str | io.BytesIO, path: str | Path, *, mmap: bool = False) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a foreign pickle may raise anything
        raise DamagedDataError(
            f"{path}: not a file that can be read safely ({type(error).__name__}); {_advice()}"
        ) from error


def _parsed(data: bytes, path: str | Path) -> dict[str, Any]:
    return _checkpoint(_load(io.BytesIO(data), path), path)


def _checkpoint(state: object, path: str | Path) -> dict[str, Any]:
    """Check that a loaded file is a checkpoint, with the right type for each entry that it has."""
    if not isinstance(state, dict) or "net" not in state:
        raise InputError(
            f"{path}: a torch file, but no checkpoint of portrait_dist or SuperGradients "
            "(it has no 'net')"
        )
    checks = _Checks(path)
    checks.tensors(state["net"], "net")
    if state.get("ema_net") is not None:
        checks.tensors(state["ema_net"], "ema_net")
    info_of(state, path)
    return state


def check_resumable(state: Mapping[str, Any], path: str | Path) -> None:
    """Check the entries that training resumes from.

    Args:
        state: a checkpoint from :func:`read`.
        path: its file, for messages.

    Raises:
        InputError: only weights; a run cannot resume from them.
        DamagedDataError: an entry has the wrong type.
    """
    missing = [name for name in ("epoch", "optimizer_state_dict") if name not in state]
    if missing:
        raise InputError(
            f"{path}: holds no {' and no '.join(missing)}, so no run can resume from it; "
            "start a new run with model.weights= and this file"
        )
    checks = _Checks(path)
    checks.integer(state["epoch"], "epoch")
    _check_optimizer(checks, state["optimizer_state_dict"])
    for name in ("scaler_state_dict", "torch_scheduler_state_dict"):
        if state.get(name) is not None:
            checks.mapping(state[name], name)
    own = checks.mapping(state.get("portrait_dist") or {}, "portrait_dist")
    checks.need(isinstance(own.get("ranks", []), list), "ranks is no list")
    for rank in own.get("ranks", []):
        if rank is not None:
            _check_rank(checks, checks.mapping(rank, "ranks"))
    if own.get("position"):
        checks.mapping(own["position"].get("loader"), "position of the loader")


def _check_optimizer(checks: _Checks, value: object) -> None:
    optimizer = checks.mapping(value, "optimizer_state_dict")
    groups = optimizer.get("param_groups")
    checks.need(isinstance(groups, list) and bool(groups), "param_groups of the optimizer")
    assert isinstance(groups, list)
    for group in groups:
        options = checks.mapping(group, "param_groups")
        numbers = options.pop("params", None)
        checks.need(
            isinstance(numbers, list) and all(map(_is_integer, numbers)), "params of the optimizer"
        )
        for name, option in options.items():
            checks.need(_may_be_option(name, option), f"{name} of the optimizer")
    entries = checks.mapping(optimizer.get("state"), "state of the optimizer")
    for number, entry in entries.items():
        checks.need(_is_integer(number), "state of the optimizer")
        for name, item in checks.mapping(entry, "state of the optimizer").items():
            number_too = isinstance(item, (int, float)) and name not in OPTIMIZER_TENSORS
            plain = item is None or isinstance(item, torch.Tensor) or number_too
            checks.need(plain, f"{name} of the optimizer")


def _may_be_option(name: object, value: object) -> bool:
    """Whether an optimiser may have such an option; torch takes any and fails in its first step."""
    if name in OPTIMIZER_SWITCHES:
        return value is None or isinstance(value, bool)
    if name in OPTIMIZER_NUMBERS:
        return isinstance(value, (int, float, torch.Tensor))
    if name == "betas":
        return isinstance(value, (tuple, list)) and all(
            isinstance(one, (int, float, torch.Tensor)) for one in value
        )
    return isinstance(value, torch.Tensor) or _is_plain(value)


def _check_rank(checks: _Checks, rank: dict[Any, Any]) -> None:
    """Check one rank's random state and sums."""
    if "python" in rank:
        python = checks.mapping(rank["python"], "random state")
        numpy = checks.mapping(rank.get("numpy"), "random state")
        _check_words(checks, python.get("words"), 625)
        _check_words(checks, numpy.get("keys"), 624)
        for value in (python.get("version"), numpy.get("position"), numpy.get("has_gauss")):
            checks.integer(value, "random state")
        checks.need(0 <= numpy["position"] <= 624, "random state")
        checks.optional_number(python.get("gauss"), "random state")
        checks.need(isinstance(numpy.get("cached"), float), "random state")
        checks.need(numpy.get("name") == "MT19937", "random state")
        generator = rank.get("torch")
        checks.need(
            isinstance(generator, torch.Tensor)
            and generator.dtype == torch.uint8
            and generator.shape == torch.get_rng_state().shape,
            "random state of torch",
        )
    if "sums" in rank:
        sums = checks.mapping(rank["sums"], "sums")
        checks.integer(sums.get("count"), "count of the sums")
        loss = sums.get("loss")
        checks.need(loss is None or isinstance(loss, torch.Tensor), "loss of the sums")
        for states in checks.mapping(sums.get("metrics"), "metrics of the sums").values():
            checks.tensors(states, "metrics of the sums")


def _check_words(checks: _Checks, words: object, count: int) -> None:
    checks.need(
        isinstance(words, torch.Tensor)
        and words.dtype == torch.int64
        and words.shape == (count,)
        and bool(((words >= 0) & (words < 2**32)).all()),
        "random state",
    )


# The network --------------------------------------------------------------------------------------


def weights_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights for use: the averaged ones where there are some."""
    weights: dict[str, torch.Tensor] = state.get("ema_net") or state["net"]
    return weights


def load_model(
    path: str | Path, *, trust_code: bool = False
) -> tuple[UNet | MaskNetwork, CheckpointInfo]:
    """Build the network of a checkpoint, in evaluation mode on the CPU.

    The averaged weights (``ema_net``) are taken where there are some.

    Args:
        path: a .pth file.
        trust_code: import the network's code where it is none of this package or a known library.

    Returns:
        The U-Net, or any other network under its interface; and what the checkpoint says of it.

    Raises:
        InputError: no such file, a checkpoint whose network cannot be built again, or code that
            nobody vouches for.
        DamagedDataError: the file is damaged.
    """
    return model_of(read(path), path, trust_code=trust_code)


def model_of(
    state: Mapping[str, Any], path: str | Path, *, trust_code: bool = False
) -> tuple[UNet | MaskNetwork, CheckpointInfo]:
    """Build the network of a checkpoint that was read; see :func:`load_model`."""
    info = info_of(state, path)
    if info.build is None:
        return _unet_of(weights_of(state), info, path), info
    return _other_of(weights_of(state), info, info.build, path, trust_code), info


def _other_of(
    weights: Mapping[str, torch.Tensor],
    info: CheckpointInfo,
    build: BuildInfo,
    path: str | Path,
    trust_code: bool,
) -> MaskNetwork:
    """Build a network by its name, and give it the weights."""
    from portrait_dist.models import Contract, MaskNetwork
    from portrait_dist.models import build as build_network

    try:
        network = build_network(build.name, build.args, trust_code=trust_code)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: its weights do not fit the network that {build.name} builds now "
            f"({one_line(error)})"
        ) from error
    contract = Contract(
        "logits" if build.output == "logits" else "probabilities",
        build.stride,
        build.channels_last,
    )
    return MaskNetwork(network, contract).eval()


def _unet_of(weights: Mapping[str, torch.Tensor], info: CheckpointInfo, path: str | Path) -> UNet:
    from portrait_dist.models import UNet
    from portrait_dist.models.unet import STRIDE

    def refuse(reason: str) -> InputError:
        network = f"{info.network}, " if info.network else ""
        return InputError(
            f"{path}: a checkpoint of another model than the U-Net of this package "
            f"({network}{' '.join(reason.split())[:200]})"
        )

    # Before UNet(...): it allocates what it is asked for.
    settings = _unet_settings(weights, info, refuse)
    if info.size and any(side % STRIDE for side in info.size):
        raise DamagedDataError(
            f"{path}: not a whole checkpoint (size {list(info.size)}, "
            f"not multiples of {STRIDE}); {_advice()}"
        )
    try:
        model = UNet(**settings)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise refuse(str(error)) from error
    return model.eval()


class _UNetSettings(TypedDict):
    """The arguments of ``UNet``."""

    in_channels: int
    out_channels: int
    init_features: int
    norm: str


def _unet_settings(
    weights: Mapping[str, torch.Tensor], info: CheckpointInfo, refuse: Callable[[str], InputError]
) -> _UNetSettings:
    """Derive ``UNet``'s arguments from the weights, and compare them with what the checkpoint says.

    The weights have the last word: a wrong number in the metadata must not make a network of 10^9
    channels.
    """
    first, last = weights.get(FIRST_WEIGHT), weights.get(LAST_WEIGHT)
    for name, weight in ((FIRST_WEIGHT, first), (LAST_WEIGHT, last)):
        if weight is None or weight.ndim != 4 or min(weight.shape) < 1:
            raise refuse(f"it has no 4-dimensional {name}")
    assert first is not None
    assert last is not None
    if math.prod(first.shape) > first.untyped_storage().nbytes():  # a view that repeats one number
        raise refuse(f"{FIRST_WEIGHT} has {math.prod(first.shape)} elements and fewer bytes")
    derived: _UNetSettings = {
        "in_channels": first.shape[1],
        "out_channels": last.shape[0],
        "init_features": first.shape[0],
        "norm": "batch" if "encoder1.enc1norm1.running_mean" in weights else "group",
    }
    of_weights: dict[str, object] = {**derived}
    for name, value in (info.model or {}).items():
        if name not in of_weights or of_weights[name] != value:
            raise refuse(f"its {name} is {_short(value)}, its weights say {of_weights.get(name)}")
    return derived


# The network's input ------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputGeometry:
    """How training images reached the network.

    Attributes:
        size: (H, W) in pixels of the network's input.
        aspect: width / height of the training images before they were resized to ``size``.
        fit: how images of another shape were brought to ``size``.
    """

    size: tuple[int, int]
    aspect: float
    fit: Fit = "squash"


def input_geometry(
    info: CheckpointInfo, size: tuple[int, int] | None = None, *, aspect_matters: bool = False
) -> InputGeometry:
    """Say at which size and aspect a checkpoint was trained.

    What it does not say is assumed, and logged in one line.

    Args:
        info: from :func:`load_model`.
        size: (H, W) for a checkpoint that does not say it.
        aspect_matters: log an assumed aspect too; only photos of any shape need it.

    Raises:
        InputError: ``size`` differs from what the checkpoint says, or is not a multiple of 16.
    """
    if size:
        _check_given_size(size, info)
    found = InputGeometry(
        info.size or size or DEFAULT_SIZE, info.aspect or DEFAULT_ASPECT, info.fit
    )
    assumed = []
    if not info.size and not size:
        assumed.append(
            f"{found.size[0]}x{found.size[1]} (give --size HEIGHTxWIDTH if it was another)"
        )
    if aspect_matters and not info.aspect:
        assumed.append(f"width / height {found.aspect:g}")
    if assumed and distributed.rank() == 0:
        log.warning(
            "%s: does not say the shape of its training images; assumed: %s",
            info.path,
            " and ".join(assumed),
        )
    return found


def _check_given_size(size: tuple[int, int], info: CheckpointInfo) -> None:
    from portrait_dist.models.unet import STRIDE

    if info.size and size != info.size:
        raise InputError(
            f"{info.path}: was trained at {info.size[0]}x{info.size[1]}, not at "
            f"{size[0]}x{size[1]}; leave --size out"
        )
    step = (info.build.stride or 1) if info.build else STRIDE
    if any(side < step or side % step or side > MAX_SIDE for side in size):
        raise InputError(
            f"--size {size[0]}x{size[1]}: each side is a multiple of {step}, up to {MAX_SIDE}"
        )
