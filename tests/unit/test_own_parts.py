"""The examples do what they show, and the README's ten lines are one of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portrait_dist import checkpoints
from portrait_dist.models import Contract, build, check

torch.set_num_threads(1)
EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = (
    "train.batch_size=8",
    "train.max_batches=2",
    "train.max_epochs=1",
    "train.average_best=false",
    "train.threads=1",
)


def example(name: str) -> Any:
    """Import an example, as its user's Python would."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_own_network_trains_and_predicts(tiny_shards: Path, tmp_path: Path) -> None:
    segmenter = example("own_network").main(str(tiny_shards), str(tmp_path), *SHORT)
    alpha = segmenter.predict(np.full((40, 30, 3), 128, np.uint8))
    assert alpha.shape == (40, 30)
    assert (alpha >= 0).all()
    assert (alpha <= 1).all()


def test_an_own_loss_trains_and_an_own_metric_is_watched(tiny_shards: Path, tmp_path: Path) -> None:
    keys = ("model.init_features=2", *SHORT)
    result = example("own_loss").main(str(tiny_shards), str(tmp_path), *keys)
    state = checkpoints.read(result.checkpoint)
    assert (result.watched, result.best) == ("Foreground", state["acc"])
    assert state["metrics"]["valid"]["Foreground"] == result.best


def test_own_transforms_train(tiny_shards: Path, tmp_path: Path) -> None:
    keys = ("model.init_features=2", *SHORT)
    result = example("own_transform").main(str(tiny_shards), str(tmp_path), *keys)
    config = checkpoints.read_info(result.checkpoint).config
    assert config["augment"]["transforms"].endswith("own_transform.py:build")
    assert config["augment"]["args"] == {"degrees": 15}


def test_the_network_of_the_readme_fulfils_the_contract(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "README.md").read_text()
    code = next(part for part in text.split("```python\n") if part.startswith("# nets.py"))
    (tmp_path / "nets.py").write_text(code.partition("```")[0])
    network = build(f"{tmp_path}/nets.py:MyNet", {"width": 8})
    assert check(network, (48, 32)) == Contract("logits", 16)


def test_an_own_loop_learns_without_supergradients(tiny_shards: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'examples');"
        "import loop_without_supergradients as loop; print(loop.main(sys.argv[1], 1, 2));"
        "assert 'super_gradients' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_shards)],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1
