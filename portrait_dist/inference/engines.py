"""The network in another engine than PyTorch: OpenVINO, which is faster on CPUs.

    network = engines.openvino_network(model, "auto")
    probabilities = network(x)         # normalised float32 [B, 3, H, W] → float32 [B, 1, H, W]

OpenVINO rewrites the network itself (batch norms, memory formats), so the model goes in as it is.
Batch size, and the U-Net's height and width, are free: one compiled network takes all of them.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from portrait_dist.errors import InputError, one_line
from portrait_dist.models import MaskNetwork, UNet, fused
from portrait_dist.system.info import check_extra

if TYPE_CHECKING:
    import openvino

Engine = Literal["torch", "openvino"]
ENGINES: tuple[Engine, ...] = ("torch", "openvino")
Shape = tuple[int, int, int, int]
"""Batch, channels, height, width; -1 is any."""
FOREIGN_TOLERANCE = 1e-3
"""Largest difference of a probability that counts as the same network; rounding makes 1e-6."""


def check_engine(engine: str, device: torch.device) -> None:
    """Check that an engine is there and runs on the device.

    Raises:
        InputError: an unknown engine, one that is not installed, or OpenVINO with a GPU.
    """
    if engine not in ENGINES:
        raise InputError(f"engine is one of {', '.join(ENGINES)}, not '{engine}'")
    if engine == "openvino":
        check_openvino_installed("--engine openvino", ", or leave the option out")
        if device.type != "cpu":
            raise InputError("--engine openvino computes on the CPU; add --device cpu")


def check_openvino_installed(what: str, otherwise: str = "") -> None:
    """Check that the package of the extra ``openvino`` is there.

    Args:
        what: needs it.
        otherwise: what else can be done, after the comma.

    Raises:
        InputError: it is missing.
    """
    check_extra(what, ("openvino",), "openvino", otherwise)


def openvino_network(
    model: UNet | MaskNetwork, size: tuple[int, int], precision: str = "auto"
) -> fused.Network:
    """Compile the network by OpenVINO for this machine's CPU.

    Args:
        model: in any mode; it is not changed.
        size: (H, W) of its inputs; the U-Net takes others as well.
        precision: ``fp32``, ``bf16`` or ``auto``, see :func:`fused.pick_precision`; another network
            than the U-Net computes in fp32 where it is ``auto``.

    Returns:
        A function from normalised float32 [B, 3, H, W] to probabilities, float32 [B, 1, H, W], on
        the CPU. It computes with as many threads as torch has, and one call at a time.

    Raises:
        InputError: OpenVINO cannot compute another network than the U-Net.
    """
    if isinstance(model, UNet):
        program = to_openvino(model, (2, 3, *size), (-1, 3, -1, -1))
        return compiled(program, fused.pick_precision(torch.device("cpu"), precision))
    _check_foreign(model, size)
    dtype = fused.pick_precision(torch.device("cpu"), "fp32" if precision == "auto" else precision)
    return compiled(to_openvino(model, (2, 3, *size), (-1, 3, *size)), dtype)


def _check_foreign(model: MaskNetwork, size: tuple[int, int]) -> None:
    """Compare a network of anybody's code in both engines, in float32, on noise.

    A trace holds one way through the code, and OpenVINO does not know every operation.
    """
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    own = copy.deepcopy(model).cpu().float().eval()
    try:
        found = compiled(to_openvino(own, (2, 3, *size), (-1, 3, *size)))(images)
        with torch.no_grad():
            difference = float((own(images) - found).abs().max())
    except Exception as error:  # converters fail in many ways
        raise InputError(
            f"--engine openvino cannot compute this network ({one_line(error)}); "
            "leave the option out"
        ) from error
    if not difference <= FOREIGN_TOLERANCE:
        raise InputError(
            f"--engine openvino computes something else than this network (a difference of "
            f"{difference:.2g}); leave the option out"
        )


def to_openvino(model: nn.Module, example: Shape, shape: Shape) -> openvino.Model:
    """Convert a module with one image as input and one as output.

    Args:
        model: in any mode; a copy in evaluation mode is converted.
        example: shape of an input that it takes.
        shape: of the inputs of the result.
    """
    import openvino

    own = copy.deepcopy(model).cpu().float().eval()
    with warnings.catch_warnings(), torch.no_grad():
        # Tracing warns of checks of the input's size, which become part of the trace.
        warnings.simplefilter("ignore")
        return openvino.convert_model(
            own, example_input=torch.zeros(example), input=[openvino.PartialShape(list(shape))]
        )


@functools.cache
def core() -> openvino.Core:
    """Return the one Core of this process, which is never unloaded.

    OpenVINO's CPU plugin gives the thread that loads it another stack for signals, and frees that
    stack when it is unloaded: the next signal that Python handles (SIGTERM, or SIGCHLD with
    PyTorch's DataLoader) would end the process with SIGSEGV. Seen with 2026.4.
    """
    import openvino

    return openvino.Core()


def compiled(program: openvino.Model, dtype: torch.dtype = torch.float32) -> fused.Network:
    """Compile a program for this CPU.

    Args:
        program: with one input and one output.
        dtype: of the arithmetic; bfloat16 or float32.

    Returns:
        A function from float32 to float32 on the CPU, not for several threads at a time.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,  # one batch at a time, by all threads
    }
    request = core().compile_model(program, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        found = request.infer({0: x.contiguous().numpy()}, share_inputs=True)
        return torch.from_numpy(found[0])

    return run
