"""The network in ONNX Runtime and OpenVINO, for the ladder of ``unet.py``.

Both compute with as many threads as torch. ONNX Runtime multiplies no bf16 on CPUs. Its 8-bit form
is made by its own ``quantize_static``, OpenVINO's by NNCF (``pip install nncf``), with the images
that calibrate ours.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portrait_dist.inference import engines
from portrait_dist.models import UNet, fused


def forms(model: UNet, calibration: Tensor) -> Iterator[tuple[str, fused.Network]]:
    """Yield name and function of each form that this machine has the packages for.

    Args:
        model: in evaluation mode, on the CPU.
        calibration: normalised float32 [N, 3, H, W].
    """
    if _has("onnxruntime", "onnx", "onnxscript"):
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder, "plain.onnx")
            _export(model, calibration, plain)
            yield "onnxruntime-fp32", _session(plain)
            yield "onnxruntime-int8", _session(_quantised(plain, calibration))
    if _has("openvino"):
        any_size = (-1, 3, -1, -1)
        size = (calibration.shape[2], calibration.shape[3])
        program = engines.to_openvino(model, (2, 3, *size), any_size)
        yield "openvino-fp32", engines.compiled(program)
        if fused.cpu_multiplies_bf16():
            yield "openvino-bf16", engines.compiled(program, torch.bfloat16)
        if _has("nncf"):
            yield "openvino-int8", engines.compiled(_in_bytes(program, calibration), torch.bfloat16)


def _has(*packages: str) -> bool:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  not installed here: {', '.join(missing)}", file=sys.stderr)
    return not missing


def _export(model: UNet, example: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        fused.fold_batch_norm(model),
        (example[:2] if len(example) > 1 else example.repeat(2, 1, 1, 1),),
        input_names=["image"],
        output_names=["alpha"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


def _session(path: Path) -> fused.Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["alpha"], {"image": x.contiguous().numpy()})[0])


def _quantised(path: Path, calibration: Tensor) -> Path:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = iter([{"image": one[None].numpy()} for one in calibration])

    class Images(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(images, None)

    prepared, out = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, prepared)
    quantization.quantize_static(
        prepared, out, Images(), per_channel=True, activation_type=quantization.QuantType.QUInt8
    )
    return out


def _in_bytes(program: Any, calibration: Tensor) -> Any:
    import nncf

    data = nncf.Dataset([one[None].numpy() for one in calibration])
    return nncf.quantize(
        program, data, subset_size=len(calibration), preset=nncf.QuantizationPreset.MIXED
    )
