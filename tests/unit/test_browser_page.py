"""The exported page cuts out portraits in a real browser, from one file, without a server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from portrait_dist.inference import browser as page_of
from portrait_dist.inference.export import Normalised, export
from portrait_dist.models import UNet
from tests import blobs, cli
from tests.browser import CHROMIUM, Browser
from tests.waiting import wait_for

HERE = pytest.mark.skipif(
    CHROMIUM is None or shutil.which("npm") is None, reason="no chromium or no npm here"
)


@pytest.fixture(scope="module")
def model() -> UNet:
    return blobs.random_network()


@pytest.fixture(scope="module")
def checkpoint(model: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs.save(model, tmp_path_factory.mktemp("run") / "ckpt_best.pth", size=(64, 48))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm package, without the packages that it needs outside of browsers."""
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "pack", "--silent", "onnxruntime-web@1.30.0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tgz")
    names = [f"package/dist/{name}" for name in (page_of.CODE, page_of.WASM)]
    subprocess.run(["tar", "-xzf", archive.name, *names], cwd=folder, check=True)
    archive.unlink()
    return folder / "package"


@HERE
def test_a_browser_computes_the_networks_alpha_from_one_file_without_any_connection(
    model: UNet, checkpoint: Path, runtime: Path, tmp_path: Path, browser: Browser
) -> None:
    path = tmp_path / "portrait.html"
    export(checkpoint, path, "html", runtime=str(runtime))
    browser.call("Page.navigate", url=path.as_uri())
    browser.wait_for("Page.loadEventFired")

    def message(begin: str) -> str:
        text = str(browser.evaluate("document.getElementById('message').textContent"))
        assert not text.startswith("failed"), text
        return text if begin in text else ""

    wait_for(lambda: message("ready"), what="the network is ready")
    photo = blobs.photo(64, 48, seed=1)[0]  # the network's size, so that nothing is resized
    png = base64.b64encode(cv2.imencode(".png", photo[..., ::-1])[1].tobytes()).decode()
    browser.evaluate(
        "(async () => { const photo = document.getElementById('photo');"
        f"photo.src = 'data:image/png;base64,{png}'; await photo.decode(); "
        "await window.portrait.segment(photo); "
        "window.found = Array.from(await window.portrait.alpha(photo)); return true })()"
    )
    assert message("48 × 64 pixels")
    found = np.array(json.loads(browser.evaluate("JSON.stringify(window.found)")), np.float32)
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        expected = Normalised(model).eval()(image).numpy()
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)
    shown = browser.evaluate(
        "Array.from(document.getElementById('result').getContext('2d')"
        ".getImageData(0, 0, 48, 64).data.filter((_, i) => i % 4 == 3))"
    )
    np.testing.assert_allclose(
        np.array(shown).reshape(64, 48), 255 * expected[0, 0], atol=1
    )  # the cut-out's transparency
    requested = [
        seen["params"]["request"]["url"].partition(":")[0]
        for seen in browser.events
        if seen["method"] == "Network.requestWillBeSent"
    ]
    assert set(requested) <= {"file", "blob", "data"}, requested


def test_a_missing_runtime_is_one_line_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "portrait.html"
    command = ("export", "--checkpoint", checkpoint, "--format", "html", "--out", out)
    refused = cli.call(*command, "--onnxruntime-web", tmp_path)
    cli.assert_one_line(refused, 2, str(tmp_path), "npm install onnxruntime-web")
    assert list(tmp_path.iterdir()) == []
