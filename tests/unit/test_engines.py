"""OpenVINO gives the masks of PyTorch, or is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from portrait_dist.errors import InputError
from portrait_dist.inference.placement import Fit
from portrait_dist.inference.segmenter import PortraitSegmenter, SegmenterOptions
from portrait_dist.models import MaskNetwork, UNet, check, fused
from tests import blobs, cli


@pytest.fixture(scope="module")
def trained() -> UNet:
    return blobs.train()


def photos(count: int) -> list[np.ndarray]:
    return [blobs.photo(96, 60 + 8 * seed, seed=seed)[0] for seed in range(count)]


def masks(segmenter: PortraitSegmenter) -> list[Tensor]:
    alphas = segmenter.predict(photos(5), batch_size=2)  # two whole batches and one short
    return [torch.from_numpy(alpha > 0.5) for alpha in alphas]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fit", ["letterbox", "cover"])
def test_openvino_gives_the_masks_of_torch_at_every_size_and_batch(
    trained: UNet, fit: Fit, precision: str
) -> None:
    torchs: SegmenterOptions = {"device": "cpu", "fit": fit, "precision": "fp32"}
    openvinos: SegmenterOptions = {"fit": fit, "precision": precision, "engine": "openvino"}
    exact, other = (
        masks(PortraitSegmenter(trained, blobs.SIZE, **options)) for options in (torchs, openvinos)
    )
    ious = [fused.mask_iou(one, two) for one, two in zip(exact, other, strict=True)]
    assert np.mean(ious) > (0.999 if precision == "fp32" else 0.99)  # 6,000 pixels a mask


def test_predict_computes_by_openvino_and_continues_only_its_own(
    trained: UNet, tmp_path: Path
) -> None:
    import cv2

    checkpoint = blobs.save(trained, tmp_path / "ckpt_best.pth")
    cv2.imwrite(str(tmp_path / "photo.png"), photos(1)[0])
    command = ("predict", "--checkpoint", checkpoint, tmp_path / "photo.png", "--only", "mask")
    for engine in ("torch", "openvino"):
        done = cli.call(*command, "--out", tmp_path / engine, "--engine", engine)
        assert done.exit_code == 0, done.stderr
    one, two = (
        cv2.imread(str(tmp_path / engine / "photo.mask.png"), cv2.IMREAD_GRAYSCALE)
        for engine in ("torch", "openvino")
    )
    assert one is not None
    assert two is not None
    assert np.abs(one.astype(int) - two).mean() < 1
    assert one.std() > 50


class Branching(nn.Module):
    """Takes one of two ways by what the image holds; a trace knows one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :1] * self.scale
        return -mask if bool(x.any()) else mask


def test_other_networks_are_compared_with_torch_before_they_are_used() -> None:
    plain = nn.Conv2d(3, 1, 3, padding=1)
    wrapped = MaskNetwork(plain, check(plain, blobs.SIZE))
    segmenter = PortraitSegmenter(wrapped, blobs.SIZE, engine="openvino", refine=False)
    exact = PortraitSegmenter(wrapped, blobs.SIZE, device="cpu", refine=False)
    photo = photos(1)[0]
    np.testing.assert_allclose(segmenter.predict(photo), exact.predict(photo), atol=1e-5)
    with pytest.raises(InputError, match="give letterbox"):
        PortraitSegmenter(wrapped, blobs.SIZE, engine="openvino", fit="cover")
    other = MaskNetwork(Branching(), check(Branching(), blobs.SIZE))
    with pytest.raises(InputError, match="something else than this network"):
        PortraitSegmenter(other, blobs.SIZE, engine="openvino")


def test_an_engine_that_is_unknown_or_missing_is_refused_in_one_line(
    trained: UNet, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="engine is one of torch, openvino"):
        PortraitSegmenter(trained, blobs.SIZE, engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leave --engine openvino out"):
        PortraitSegmenter(trained, blobs.SIZE, engine="openvino").calibrate(photos(2))
    checkpoint = blobs.save(trained, tmp_path / "ckpt_best.pth")
    (tmp_path / "photo.png").touch()
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'openvino' else find(name, *rest)\n"
    )
    result = cli.call_process(
        *("predict", "--checkpoint", checkpoint, tmp_path / "photo.png", "--out", tmp_path / "out"),
        *("--engine", "openvino"),
        environment={"PYTHONPATH": str(hidden)},
    )
    cli.assert_one_line(result, 2, "needs openvino: pip install 'portrait-dist[openvino]'")
    assert not (tmp_path / "out").exists()


SIGNALLED = """
import faulthandler, gc, os, signal

faulthandler.enable()
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append("handled"))
from portrait_dist.inference import PortraitSegmenter
from portrait_dist.models import UNet

segmenters = []
for _ in range(3):
    segmenters.append(
        PortraitSegmenter(UNet(init_features=2), (32, 32), engine="openvino", precision="fp32")
    )
while segmenters:
    del segmenters[0]
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
print(*received)
"""


def test_signals_are_handled_after_a_network_of_openvino_is_gone() -> None:
    """A signal that comes then must not end serve, predict or a training with SIGSEGV."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout.split()) == (0, ["handled"] * 3), done.stderr
