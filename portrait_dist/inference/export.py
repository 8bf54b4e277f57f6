"""A trained network as one file for other programs: ONNX, or PyTorch's exported program (.pt2).

Both take RGB pictures with values from 0 to 1; the normalisation is inside. The batch size is free, height and width are those
of training. The file is checked against the network before it gets its name, and says itself what goes in and comes out: ONNX
in its metadata, .pt2 in the extra file ``metadata.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.models import UNet
from portrait_dist.preprocessing import DEFAULT_SIZE, MEAN, STD

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4
"""Largest difference of a probability that counts as the same network; fp32 rounding makes about 1e-6."""


class Normalised(nn.Module):
    """The network with the normalisation in front.

    Shape:
        image: float32 [B, 3, H, W], RGB from 0 to 1; alpha: float32 [B, 1, H, W] from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        alpha: Tensor = self.network((image - self.mean) / self.std)
        return alpha


def describe(size: tuple[int, int]) -> dict[str, str]:
    """What goes in and comes out, as text for the file's metadata."""
    from importlib.metadata import version

    height, width = size
    return {
        "producer": f"portrait-dist {version('portrait-dist')}",
        "input": f"image: float32 [batch, 3, {height}, {width}], RGB, 0 to 1 (uint8 / 255)",
        "input_resize": f"resize to {height}x{width} (height x width), antialiased bilinear, the aspect ratio is not kept",
        "normalisation": f"inside the model: mean {MEAN}, standard deviation {STD}; give plain values from 0 to 1",
        "output": f"alpha: float32 [batch, 1, {height}, {width}], 0 background to 1 person; mask: above 0.5",
    }


def export(
    checkpoint: str | Path, out: str | Path, format: str = "onnx", *, force: bool = False
) -> dict[str, Any]:
    """Write a checkpoint's network as ``format`` and check the file against it.

    Args:
        checkpoint: a .pth file of a run.
        out: the file to write.
        format: ``onnx`` or ``pt2``.
        force: overwrite a file that exists.

    Returns:
        ``file``, ``format``, ``bytes``, ``largest_difference`` (of a probability, on batches of 1 and 3), and the metadata.

    Raises:
        InputError: no such checkpoint or format, or the file exists.
        PortraitDistError: the file does not compute what the network does; nothing is left of it.
    """
    from portrait_dist.checkpoints import load_model

    out = Path(out)
    if format not in FORMATS:
        raise InputError(f"--format is one of {', '.join(FORMATS)}, not '{format}'")
    if out.exists() and not force:
        raise InputError(f"{out}: exists; add --force to overwrite it, or choose another --out")
    network, info = load_model(checkpoint)
    height, width = info.size or DEFAULT_SIZE
    model, metadata = Normalised(network).eval(), describe((height, width))
    write, read = (_write_onnx, _read_onnx) if format == "onnx" else (_write_pt2, _read_pt2)
    temporary = out.with_name(f".{os.getpid()}.{out.name}.tmp.{format}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(model, torch.rand(2, 3, height, width), metadata, temporary)
        difference = largest_difference(model, read(temporary), (height, width))
        if not difference <= TOLERANCE:
            raise PortraitDistError(
                f"{out}: not written, the {format} file differs from the network by {difference:.2g}"
            )
        os.replace(temporary, out)
    except OSError as error:
        raise PortraitDistError(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "file": str(out),
        "format": format,
        "bytes": out.stat().st_size,
        "largest_difference": difference,
        **metadata,
    }


def largest_difference(
    model: nn.Module, exported: Callable[[Tensor], Tensor], size: tuple[int, int]
) -> float:
    """Largest difference of a probability between network and file, on noise and on flat pictures, batches of 1 and 3."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (1, 3):
        pictures = torch.rand(batch, 3, *size, generator=generator)
        pictures[0] = pictures[0].mean((1, 2), keepdim=True)
        with torch.inference_mode():
            worst = max(worst, float((model(pictures) - exported(pictures)).abs().max()))
    return worst


def _write_onnx(model: nn.Module, example: Tensor, metadata: dict[str, str], path: Path) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["image"],
        output_names=["alpha"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pictures: torch.from_numpy(session.run(["alpha"], {"image": pictures.numpy()})[0])


def _write_pt2(model: nn.Module, example: Tensor, metadata: dict[str, str], path: Path) -> None:
    program = torch.export.export(
        model, (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
    )
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata, indent=1)})


def _read_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module
