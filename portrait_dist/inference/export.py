"""A trained network for other programs: ONNX, PyTorch's .pt2, OpenVINO's IR, or a page of HTML.

All take RGB images with values from 0 to 1; the normalisation is inside. The batch size is free,
height and width are those of training. The file is checked against the network before it is
written, and says itself what goes in and comes out: ONNX in its metadata, .pt2 in the extra file
``metadata.json``, OpenVINO in the runtime information. OpenVINO has two files: the graph in .xml,
the weights in .bin beside it. The page holds the ONNX network, see
:mod:`portrait_dist.inference.browser`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from portrait_dist import files
from portrait_dist.errors import InputError, PortraitDistError, one_line, printable
from portrait_dist.evaluation import SplitScores, evaluate
from portrait_dist.inference import browser, engines, model_card
from portrait_dist.models import MaskNetwork, UNet
from portrait_dist.preprocessing import MEAN, STD, Fit
from portrait_dist.system.info import check_extra

ExportFormat = Literal["onnx", "pt2", "openvino", "html"]
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FORMATS: tuple[ExportFormat, ...] = ("onnx", "pt2", "openvino", "html")
ENGINE_OF: dict[ExportFormat, str] = {
    "onnx": "ONNX Runtime",
    "pt2": "PyTorch",
    "openvino": "OpenVINO",
    "html": "ONNX Runtime (not in a browser)",
}
TOLERANCE = 1e-4
"""Largest difference of a probability that counts as the same network; fp32 rounding makes about
1e-6."""
WEIGHTS_SUFFIX = ".bin"
"""Of OpenVINO's weights, which lie beside the graph."""


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        file: its path.
        format: ``onnx``, ``pt2``, ``openvino`` or ``html``.
        bytes: its length, that of OpenVINO's weights included.
        largest_difference: of a probability between file and network, on batches of 1 and 3.
        card: path of the model card.
        producer, input, input_resize, normalisation, output: the file's metadata.
    """

    file: str
    format: str
    bytes: int
    largest_difference: float
    card: str
    producer: str
    input: str
    input_resize: str
    normalisation: str
    output: str


class Normalised(nn.Module):
    """The network with the normalisation in front.

    Shape:
        image: float32 [B, 3, H, W], RGB from 0 to 1; alpha: float32 [B, 1, H, W] from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: UNet | MaskNetwork) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Compute alpha."""
        alpha: Tensor = self.network((image - self.mean) / self.std)
        return alpha


FITTING = {
    "squash": "the aspect ratio is not kept",
    "letterbox": "keeping the aspect ratio: the longer side fills it, edge pixels continue",
    "cover": "keeping the aspect ratio: the shorter side fills it, the longer one is cut",
}


def describe(size: tuple[int, int], fit: Fit = "squash") -> dict[str, str]:
    """Say what goes in and comes out, as text for the file's metadata."""
    from importlib.metadata import version

    height, width = size
    return {
        "producer": f"portrait-dist {version('portrait-dist')}",
        "input": f"image: float32 [batch, 3, {height}, {width}], RGB, 0 to 1 (uint8 / 255)",
        "input_resize": f"resize to {height}x{width} (height x width), antialiased bilinear, "
        f"{FITTING[fit]}",
        "normalisation": f"inside the model: mean {MEAN}, standard deviation {STD}; "
        "give plain values from 0 to 1",
        "output": f"alpha: float32 [batch, 1, {height}, {width}], 0 background to 1 person; "
        "mask: above 0.5",
    }


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: ExportFormat = "onnx",
    *,
    force: bool = False,
    size: tuple[int, int] | None = None,
    trust_code: bool = False,
    data: str = "",
    runtime: str = browser.RUNTIME,
) -> ExportResult:
    """Write a checkpoint's network as ``format``, checked against it, and a model card beside it.

    Args:
        checkpoint: a .pth file of a run.
        out: the file to write, .xml for OpenVINO; its folder is made where it does not exist.
        format: ``onnx``, ``pt2``, ``openvino`` or ``html``.
        force: overwrite a file that exists.
        size: (H, W) of training, for a checkpoint that does not say it.
        trust_code: import the network's code where it is the user's.
        data: shards whose test split the checkpoint is scored on for the card; empty: no scores.
        runtime: folder of the npm package onnxruntime-web, for ``html``.

    Raises:
        InputError: no such checkpoint, shards or format, the file exists or cannot be written, or
            torch cannot export the user's network.
        PortraitDistError: the file does not compute what the network does, or the disk is full;
            nothing is written.
    """
    from portrait_dist.checkpoints import input_geometry, load_model

    out = Path(out)
    _check_options(out, format, force)
    web = browser.find_runtime(runtime) if format == "html" else None
    network, info = load_model(checkpoint, trust_code=trust_code)
    trained = input_geometry(info, size)
    metadata = describe(trained.size, trained.fit)
    model = Normalised(network).eval()
    try:
        parts, exported = _make(model, trained.size, format, metadata)
        difference = _check_difference(out, format, model, exported, trained.size)
    except PortraitDistError:
        raise
    except Exception as error:  # anybody's code, and converters fail in many ways
        if info.build is None:
            raise
        raise InputError(
            f"{checkpoint}: --format {format}: torch cannot export {info.build.name} for any "
            f"number of images ({one_line(error)}); see docs/networks.md"
        ) from error
    speed = model_card.measure_speed(exported, trained.size, ENGINE_OF[format])
    scores = _scores(checkpoint, data, size, trust_code) if data else None
    if web:
        parts = (browser.make_page(parts[0], trained.size, web),)
    card = model_card.write_card(out.name, metadata, network, info, speed, scores)
    _write(out, parts)
    # The name of the checkpoint may hold bytes that are no UTF-8.
    files.write_text(model_card.card_path(out), printable(card))
    count, card_file = sum(map(len, parts)), str(model_card.card_path(out))
    return ExportResult(str(out), format, count, difference, card=card_file, **metadata)


def _check_difference(
    out: Path,
    format: str,
    model: Normalised,
    exported: Callable[[Tensor], Tensor],
    size: tuple[int, int],
) -> float:
    """Compare what is to be written with the network; return the largest difference of alpha."""
    difference = largest_difference(model, exported, size)
    # Not "difference > TOLERANCE": every comparison with NaN is false, and NaN must fail too.
    if not difference <= TOLERANCE:
        raise PortraitDistError(
            f"{out}: not written, the {format} file differs from the network by {difference:.2g}"
        )
    return difference


def _scores(
    checkpoint: str | Path, data: str, size: tuple[int, int] | None, trust_code: bool
) -> SplitScores | None:
    found = evaluate(checkpoint, data, size=size, trust_code=trust_code)
    return found.scores if found else None


def _make(
    model: Normalised, size: tuple[int, int], format: ExportFormat, metadata: dict[str, str]
) -> tuple[tuple[bytes, ...], Callable[[Tensor], Tensor]]:
    """Return the content of the file (and of its weights), and what it computes."""
    # In memory first: torch.export.save aborts the process where a disk refuses to take more.
    example = torch.rand(2, 3, *size)
    if format == "openvino":
        parts = _make_openvino(model, example, metadata)
        return parts, _read_openvino(*parts)
    make, read = (_make_pt2, _read_pt2) if format == "pt2" else (_make_onnx, _read_onnx)
    data = make(model, example, metadata)
    return (data,), read(data)


def _write(out: Path, parts: tuple[bytes, ...]) -> None:
    """Write the file, and the weights beside it where they have a file of their own."""
    with files.explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if len(parts) == 1:
        files.write_bytes(out, parts[0])
        return
    weights = out.with_suffix(WEIGHTS_SUFFIX)
    with files.explained(out):
        # An old graph never stands beside new weights, nor a new one beside old ones.
        out.unlink(missing_ok=True)
    try:
        files.write_bytes(weights, parts[1])
        files.write_bytes(out, parts[0])
    except BaseException:
        with contextlib.suppress(OSError):
            weights.unlink(missing_ok=True)
        raise


def _check_options(out: Path, format: str, force: bool) -> None:
    if format not in FORMATS:
        raise InputError(f"--format is one of {', '.join(FORMATS)}, not '{format}'")
    if out.is_dir():  # "." has no name
        raise InputError(f"{out}: is a folder; give the path of a file")
    written = [out]
    if format == "openvino":
        if out.suffix != ".xml":
            raise InputError(f"{out}: OpenVINO's graph is a file NAME.xml, its weights NAME.bin")
        written.append(out.with_suffix(WEIGHTS_SUFFIX))
    written.append(model_card.card_path(out))
    if folder := next((path for path in written if path.is_dir()), None):
        raise InputError(f"{folder}: is a folder; give the path of a file")
    files.check_folder_writable(out.parent)
    if not force and (there := [path for path in written if path.exists()]):
        raise InputError(
            f"{there[0]}: exists; add --force to overwrite it, or choose another --out"
        )
    if format in ("onnx", "html"):
        check_onnx_installed(f"--format {format}")
    if format == "openvino":
        engines.check_openvino_installed("--format openvino", ", or give --format onnx")


def largest_difference(
    model: nn.Module, exported: Callable[[Tensor], Tensor], size: tuple[int, int]
) -> float:
    """Compare network and file on noise and on flat images, batches of 1 and 3.

    Returns:
        The largest difference of a probability.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (1, 3):
        images = torch.rand(batch, 3, *size, generator=generator)
        images[0] = images[0].mean((1, 2), keepdim=True)
        with torch.inference_mode():
            worst = max(worst, float((model(images) - exported(images)).abs().max()))
    return worst


def check_onnx_installed(what: str = "--format onnx") -> None:
    """Check that the packages of the extra ``export`` are there.

    Args:
        what: needs them.

    Raises:
        InputError: one is missing.
    """
    check_extra(what, ONNX_PACKAGES, "export", ", or give --format pt2")


def _make_onnx(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    with contextlib.redirect_stdout(sys.stderr):  # some onnxscript says there what it rewrites
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
    data: bytes = program.model_proto.SerializeToString()
    return data


def _read_onnx(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["alpha"], {"image": images.numpy()})[0])


def _make_pt2(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    program = torch.export.export(
        model, (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
    )
    buffer = io.BytesIO()
    described = {"metadata.json": json.dumps(metadata, indent=1)}
    torch.export.save(program, buffer, extra_files=described)
    return buffer.getvalue()


def _read_pt2(data: bytes) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(data)).module()
    return module


def _make_openvino(
    model: nn.Module, example: Tensor, metadata: dict[str, str]
) -> tuple[bytes, bytes]:
    import openvino

    shape = (-1, 3, example.shape[2], example.shape[3])
    program = engines.to_openvino(model, (2, *shape[1:]), shape)
    program.inputs[0].set_names({"image"})
    program.outputs[0].set_names({"alpha"})
    for name, text in metadata.items():
        program.set_rt_info(text, [name])
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "network.xml")
        # Weights in float32: OpenVINO rounds them to what a processor computes fastest with.
        openvino.save_model(program, graph, compress_to_fp16=False)
        return graph.read_bytes(), graph.with_suffix(WEIGHTS_SUFFIX).read_bytes()


def _read_openvino(graph: bytes, weights: bytes) -> Callable[[Tensor], Tensor]:
    return engines.compiled(engines.core().read_model(graph, weights))
