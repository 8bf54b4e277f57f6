"""The examples run as they stand, on a small scale."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import blobs

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAIRS = 12
SMALL = ("model.init_features=2", "train.max_epochs=1", "train.batch_size=8", "train.pictures=0")


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def example(name: str) -> Any:
    return importlib.import_module(name)


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    mask, truth = mask > 0.5, truth > 0.5
    return float((mask & truth).sum() / (mask | truth).sum())


def test_every_example_is_listed_and_tested() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    listed = (EXAMPLES / "README.md").read_text()
    assert [name for name in files if f"({name})" not in listed] == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve photos (WebP) and their grey masks (BMP), as one has them."""
    photos, masks = (tmp_path_factory.mktemp(name) for name in ("photos", "masks"))
    for number in range(PAIRS):
        image, alpha = blobs.photo(80, 60, number)
        Image.fromarray(image).save(photos / f"p{number}.webp", lossless=True)
        Image.fromarray((alpha * 255).astype(np.uint8)).save(masks / f"p{number}.bmp")
    return photos, masks


@pytest.fixture
def shards(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    options = ("--out", str(tmp_path / "shards"), "--side", "64")
    return Path(example("own_data").main([*map(str, folders), *options]))


def test_own_images_and_grey_masks_become_shards_with_their_masks(shards: Path) -> None:
    from portrait_dist.data import build_loader

    seen: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        for batch in build_loader(str(shards), split, batch_size=1, seed=0):
            seen.update(zip(batch.keys, batch.alpha, strict=True))
    assert len(seen) == PAIRS
    for key, alpha in seen.items():
        number = int(str(key).rpartition("p")[2])
        truth = Image.fromarray((blobs.photo(80, 60, number)[1] * 255).astype(np.uint8))
        expected = np.asarray(truth.resize((64, 64), Image.Resampling.BILINEAR))
        assert iou(np.asarray(alpha) / 255, expected / 255) > 0.95, key


def test_fine_tuning_starts_a_run_of_its_own_from_the_weights_of_the_first(
    shards: Path, tmp_path: Path
) -> None:
    from portrait_dist.runs.folder import RunFolder

    many, few = example("fine_tuning").main(
        [str(shards), str(shards), "--root", str(tmp_path), *SMALL]
    )
    assert few.run_dir != many.run_dir
    settings = RunFolder(Path(few.run_dir)).config.read_text()
    assert f"weights: {many.checkpoint}" in settings
    assert few.epochs == 1


def test_an_exported_network_masks_a_photo_without_this_package(tmp_path: Path) -> None:
    from portrait_dist.checkpoints import load_model
    from portrait_dist.inference.export import Normalised, export

    checkpoint = blobs.save(blobs.train(steps=2), tmp_path / "ckpt_best.pth")
    network, photo, out = (tmp_path / name for name in ("n.onnx", "p.png", "mask.png"))
    export(checkpoint, network, size=blobs.SIZE)
    image = Image.fromarray(blobs.photo(160, 120, 99)[0])
    image.save(photo)
    example("onnx_in_python").main([str(network), str(photo), str(out)])
    mask = np.asarray(Image.open(out))
    assert mask.shape == (160, 120)

    small = np.asarray(image.resize(blobs.SIZE, Image.Resampling.BILINEAR), np.float32) / 255
    batch = torch.from_numpy(small).permute(2, 0, 1)[None]
    with torch.inference_mode():
        alpha = Normalised(load_model(checkpoint)[0]).eval()(batch)[0, 0].numpy()
    wanted = Image.fromarray((alpha * 255).round().astype(np.uint8))
    expected = np.asarray(wanted.resize(image.size, Image.Resampling.BILINEAR), np.int32)
    assert abs(expected - mask).max() <= 1
    text = (EXAMPLES / "onnx_in_python.py").read_text()
    assert "import torch" not in text
    assert "import portrait_dist" not in text


def test_the_sweep_queues_one_run_for_each_combination(shards: Path, tmp_path: Path) -> None:
    command = [str(EXAMPLES / "slurm_sweep.sh"), str(shards), str(tmp_path / "runs")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, "--dry-run", "train.batch_size=1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "--array=0-5" in done.stdout


def test_the_notebook_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs] == [], "outputs are not committed"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    (score,) = [
        output.text
        for cell in code
        for output in cell.outputs
        if output.get("name") == "stdout" and output.text.startswith("IoU")
    ]
    trained, constant = (float(word.strip(",")) for word in score.split() if word[:1] == "0")
    assert trained > 0
    assert constant > 0
    assert any("image/png" in output.get("data", {}) for output in code[-1].outputs)
