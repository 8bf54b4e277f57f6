"""An exported file computes what the network does and says what goes in and comes out."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

from portrait_dist.cli import run
from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.inference.export import (
    ExportFormat,
    Normalised,
    _write,
    export,
    largest_difference,
)
from portrait_dist.models import UNet
from portrait_dist.preprocessing import MEAN, STD
from tests import blobs, cli


@pytest.fixture(scope="module")
def model() -> UNet:
    return blobs.train(steps=2)


@pytest.fixture(scope="module")
def checkpoint(model: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs.save(model, tmp_path_factory.mktemp("run") / "ckpt_best.pth", size=(64, 48))


@pytest.fixture(scope="module")
def expected(model: UNet) -> tuple[torch.Tensor, torch.Tensor]:
    """Five pictures from 0 to 1 and the network's alpha of them."""
    pictures = torch.rand(5, 3, 64, 48, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        return pictures, model((pictures - mean) / std)


def test_an_onnx_file_computes_the_networks_alpha_and_documents_itself(
    checkpoint: Path,
    expected: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "deep" / "portrait.onnx"
    command = [
        "export",
        "--checkpoint",
        str(checkpoint),
        "--format",
        "onnx",
        "--out",
        str(path),
        "--json",
    ]
    assert run(command) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["largest_difference"] < 1e-4
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "portrait.onnx",
        "portrait.onnx.card.md",
    ]  # no temporary one
    pictures, alpha = expected
    session = onnxruntime.InferenceSession(path)
    np.testing.assert_allclose(
        session.run(None, {"image": pictures.numpy()})[0], alpha.numpy(), atol=1e-5
    )
    assert (session.get_inputs()[0].name, session.get_inputs()[0].shape[1:]) == (
        "image",
        [3, 64, 48],
    )
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["input"] == "image: float32 [batch, 3, 64, 48], RGB, 0 to 1 (uint8 / 255)"
    assert metadata["output"].startswith("alpha: float32 [batch, 1, 64, 48]")
    assert "inside the model" in metadata["normalisation"]


def test_a_pt2_file_computes_the_networks_alpha_and_documents_itself(
    checkpoint: Path, expected: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "portrait.pt2"
    assert export(checkpoint, path, "pt2").largest_difference < 1e-4
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    pictures, alpha = expected
    with torch.inference_mode():
        torch.testing.assert_close(program(pictures), alpha, atol=1e-5, rtol=0)
    assert json.loads(extra["metadata.json"])["input"].startswith(
        "image: float32 [batch, 3, 64, 48]"
    )


def test_an_openvino_graph_computes_the_networks_alpha_and_documents_itself(
    checkpoint: Path, expected: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "portrait.xml"
    result = cli.call(
        *("export", "--checkpoint", checkpoint, "--format", "openvino", "--out", path, "--json")
    )
    assert result.exit_code == 0, result.stderr
    assert result.json["largest_difference"] < 1e-4
    weights = path.with_suffix(".bin")
    assert sorted(tmp_path.iterdir()) == [weights, path, tmp_path / "portrait.xml.card.md"]
    assert result.json["bytes"] == path.stat().st_size + weights.stat().st_size
    program = openvino.Core().read_model(path)
    pictures, alpha = expected
    found = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(
        found({"image": pictures.numpy()})["alpha"], alpha.numpy(), atol=1e-5
    )
    assert (
        program.get_rt_info(["input"]).astype(str).startswith("image: float32 [batch, 3, 64, 48]")
    )


def test_an_old_openvino_graph_is_gone_where_its_weights_were_overwritten(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "portrait.xml"
    path.write_text("old")
    with pytest.raises(InputError, match=r"portrait\.xml: exists; add --force"):
        export(checkpoint, path, "openvino")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"portrait\.bin: exists; add --force"):
        export(checkpoint, path, "openvino")
    path.write_text("old")
    path.with_suffix(".bin").unlink()
    path.with_suffix(".bin").mkdir()
    with pytest.raises(InputError, match=r"portrait\.bin: is a folder"):
        export(checkpoint, path, "openvino", force=True)
    assert path.read_text() == "old"
    with pytest.raises(PortraitDistError):  # a folder that comes after the check
        _write(path, (b"graph", b"weights"))
    assert not path.exists()
    with pytest.raises(InputError, match=r"NAME\.xml, its weights NAME\.bin"):
        export(checkpoint, tmp_path / "portrait.onnx", "openvino")


@pytest.mark.parametrize("kind", ["onnx", "pt2", "openvino"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, kind: ExportFormat
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = (  # a file system of 64 KiB, seen by this one process only
        f"mount -t tmpfs -o size=64k tmpfs {disk}; "
        f'"$@"; code=$?; ls -A {disk} > {tmp_path}/left; exit $code'
    )
    options = [
        "--checkpoint",
        str(checkpoint),
        "--format",
        kind,
        "--out",
        f"{disk}/portrait.{'xml' if kind == 'openvino' else kind}",
    ]
    done = subprocess.run(
        [
            *(() if os.getuid() == 0 else ("unshare", "--map-root-user", "--mount")),
            *("unshare", "--mount", "bash", "-c", command, "bash", *cli.PORTRAIT_DIST, "export"),
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "left").read_text() == ""


@pytest.mark.parametrize("out", ["file/portrait.onnx", "folder", "x"])
def test_an_output_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(
    tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.card.md").mkdir()
    result = cli.call(
        *("export", "--checkpoint", tmp_path / "none.pth", "--format", "onnx"),
        *("--out", tmp_path / out),
    )
    cli.assert_one_line(result, 2, str(tmp_path / out.split("/")[0]), "; give the path of a")


@pytest.mark.parametrize("out", [".", "..", "/", ""])
def test_an_output_without_a_name_is_refused_in_one_line(tmp_path: Path, out: str) -> None:
    result = cli.call(
        *("export", "--checkpoint", tmp_path / "none.pth", "--format", "pt2", "--out", out)
    )
    cli.assert_one_line(result, 2, "is a folder; give the path of a file")


def test_a_model_card_beside_the_file_says_what_the_network_is_and_its_scores(
    tiny_shards: Path, tmp_path: Path
) -> None:
    checkpoint = blobs.save(blobs.random_network(), tmp_path / "ckpt_best.pth", size=(32, 32))
    state = torch.load(checkpoint)
    state["portrait_dist"]["config"] = {
        "data": {"shards": "/home/somebody/shards"},
        "train": {"lr": 0.5, "max_epochs": 100},
        "run": {"name": "secret-project"},
    }
    state["portrait_dist"]["samples_seen"] = 1234
    torch.save(state, checkpoint)
    scores = cli.call("evaluate", "--checkpoint", checkpoint, "--data", tiny_shards, "--json").json
    command = ("export", "--checkpoint", checkpoint, "--format", "pt2")
    done = cli.call(*command, "--out", tmp_path / "a.pt2", "--data", tiny_shards, "--json")
    assert done.exit_code == 0, done.stderr
    card = (tmp_path / "a.pt2.card.md").read_text()
    assert done.json["card"] == str(tmp_path / "a.pt2.card.md")
    count = sum(weight.numel() for weight in blobs.random_network().parameters())
    for fact in (
        *(f"UNet, {count:,} weights", "`train.lr=0.5`", "1,234", "float32 [batch, 3, 32, 32]"),
        *(f"the {scores['samples']} samples of the split test", f"{scores['iou']:.4f}"),
        *(f"boundary IoU: {scores['boundary_iou']:.4f}", "images/s", "Apache License 2.0"),
    ):
        assert fact in card, fact
    for other in ("max_epochs", "somebody", "secret-project"):
        assert other not in card  # defaults, and places of the machine that trained
    (tmp_path / "a.pt2").unlink()
    refused = cli.call(*command, "--out", tmp_path / "a.pt2")
    cli.assert_one_line(refused, 2, "a.pt2.card.md: exists; add --force")
    # Another format of the same name has its own card.
    assert cli.call(*command, "--out", tmp_path / "a.other").exit_code == 0
    assert (tmp_path / "a.pt2.card.md").read_text() == card
    assert "`export --data SHARDS` does" in (tmp_path / "a.other.card.md").read_text()
    # A name of bytes that are no UTF-8.
    assert cli.call(*command, "--out", tmp_path / "b\udcff", "--json").exit_code == 0
    assert "b\\udcff" in (tmp_path / "b\udcff.card.md").read_text()


def test_a_file_of_another_network_would_be_noticed(model: UNet) -> None:
    other = blobs.train(steps=3)
    assert largest_difference(Normalised(model), Normalised(other), (64, 48)) > 1e-4
    assert largest_difference(Normalised(model), Normalised(model), (64, 48)) == 0


def test_an_existing_file_is_kept_without_force(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "portrait.onnx"
    path.write_text("precious")
    with pytest.raises(InputError, match="add --force"):
        export(checkpoint, path, "onnx")
    assert path.read_text() == "precious"
