"""Take networks of every source the whole way, and write the table of what held.

python -m tests.networks --out OUT.md          all of NETWORKS
python -m tests.networks --only sg: --only unet

Each network is trained on 2 ranks for two epochs, once undisturbed and once stopped by SIGTERM in
the middle of an epoch and resumed; the weights of both must be equal to the bit. Then its
checkpoint is scored, predicts a photo, and is exported as ONNX and pt2, each by the command line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from portrait_dist import checkpoints
from portrait_dist.data.shards import writer
from portrait_dist.data.source import split, synthetic
from tests import nets
from tests.cli import call, call_process
from tests.jobs import PLAIN

SIDE = 64
"""Pixels; the least that all of the networks take."""
STOPPED_IN = 4
"""Step, the first of the second epoch but one: in the middle of it."""
LARGEST_DIFFERENCE = 1e-3
"""Of an exported network's alpha to torch's."""


@dataclass(frozen=True)
class Network:
    """A network as a user names it.

    Args:
        name: as ``model.name``.
        args: as ``model.args.NAME=VALUE``.
    """

    name: str
    args: tuple[str, ...] = ()

    @property
    def settings(self) -> list[str]:
        return [f"model.name={self.name}", *(f"model.args.{one}" for one in self.args)]


OWN = Network("tests/nets.py:Halved", ("width=6",))
NETWORKS = (
    Network("unet", ("init_features=4",)),
    Network("sg:pp_lite_t_seg"),
    Network("sg:ddrnet_23_slim"),
    Network("sg:stdc1_seg"),
    Network(
        "segmentation_models_pytorch.Unet",
        ("encoder_name=mobilenet_v2", "decoder_channels=[32,16,16,8,8]"),
    ),
    Network("segmentation_models_pytorch.FPN", ("encoder_name=resnet18",)),
    OWN,
)
CELLS = ("train on 2 ranks", "resume to the bit", "evaluate", "predict", "ONNX", "pt2")


@dataclass
class Way:
    """One network's way, in a folder of its own.

    Attributes:
        found: cell → ``held``, or why it did not hold.
    """

    network: Network
    folder: Path
    shards: Path
    photo: Path
    found: dict[str, str] = field(default_factory=dict)

    def go(self) -> dict[str, str]:
        """Try every cell; one that fails does not keep the others from being tried."""
        steps: dict[str, Callable[[], None]] = dict(
            zip(
                CELLS,
                (self.train, self.resume, self.evaluate, self.predict, self.onnx, self.pt2),
                strict=True,
            )
        )
        for cell, step in steps.items():
            try:
                step()
                self.found[cell] = "held"
            except Exception as error:  # whatever a network's code raises
                lines = [line for line in str(error).splitlines() if line.strip()]
                self.found[cell] = f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
            print(f"{self.network.name}: {cell}: {self.found[cell]}", flush=True)
        return self.found

    def train(self) -> None:
        self._train("whole", None, 0)
        state = checkpoints.read(self.folder / "whole" / "ckpt_latest.pth")
        assert (state["epoch"], state["portrait_dist"]["world_size"]) == (2, 2)

    def resume(self) -> None:
        self._train("stopped", STOPPED_IN, 75)
        assert not self._weights("stopped").keys() ^ self._weights("whole").keys()
        self._train("stopped", None, 0)
        whole, resumed = self._weights("whole"), self._weights("stopped")
        other = [name for name in whole if not torch.equal(whole[name], resumed[name])]
        assert not other, f"{len(other)} of {len(whole)} tensors differ, such as {other[0]}"

    def evaluate(self) -> None:
        options = ("--data", self.shards, "--split", "val", "--json")
        scores = call("evaluate", *self._checkpoint, *options)
        assert scores.exit_code == 0, scores.stderr
        saved = checkpoints.read_info(self.folder / "whole" / "ckpt_best.pth").acc
        assert saved is not None
        assert abs(scores.json["iou"] - saved) < 1e-6, f"{scores.json['iou']} is not {saved}"

    def predict(self) -> None:
        options = ("--out", self.folder / "masks", "--only", "mask", "--json")
        masks = call("predict", *self._checkpoint, self.photo, *options)
        assert masks.exit_code == 0, masks.stderr
        assert len(masks.json["files"]) == 1

    def onnx(self) -> None:
        self._export("onnx")

    def pt2(self) -> None:
        self._export("pt2")

    @property
    def _checkpoint(self) -> tuple[str | Path, ...]:
        return "--checkpoint", self.folder / "whole" / "ckpt_best.pth", "--trust-code"

    def _weights(self, run: str) -> dict[str, torch.Tensor]:
        state = checkpoints.read(self.folder / run / "ckpt_latest.pth")
        weights: dict[str, torch.Tensor] = state["net"]
        return weights

    def _train(self, run: str, stop_in: int | None, expected: int) -> None:
        keys = [f"data.shards={self.shards}", f"run.root={self.folder}", f"run.name={run}"]
        keys += ["train.batch_size=4", "train.max_batches=3", "train.max_epochs=2"]
        keys += ["train.average_best=false", "train.threads=1", "train.pictures=0"]
        keys += ["loss.name=tests/nets.py:Stopping", *self.network.settings]
        environment = {nets.STOP_IN_STEP: str(stop_in)} if stop_in else {}
        done = call_process(
            *("train", "--nproc", "2", "--recipe", PLAIN, *keys), environment=environment
        )
        assert done.exit_code == expected, f"exit {done.exit_code}: {done.stderr[-2000:]}"

    def _export(self, form: str) -> None:
        out = self.folder / f"network.{form}"
        exported = call("export", *self._checkpoint, "--format", form, "--out", out, "--json")
        assert exported.exit_code == 0, exported.stderr
        difference = exported.json["largest_difference"]
        assert difference < LARGEST_DIFFERENCE, f"differs by {difference}"


def table(found: dict[Network, dict[str, str]]) -> str:
    """Return a Markdown table, with the reason of each cell that did not hold below it."""
    head = ["| network | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]
    rows = [
        f"| `{network.name}` | "
        + " | ".join("held" if cells[cell] == "held" else "no" for cell in CELLS)
        + " |"
        for network, cells in found.items()
    ]
    reasons = [
        f"- `{network.name}`, {cell}: {reason}"
        for network, cells in found.items()
        for cell, reason in cells.items()
        if reason != "held"
    ]
    return "\n".join([*head, *rows, *([""] if reasons else []), *reasons]) + "\n"


def main() -> int:
    """Try the networks; exit code 1 where a cell did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", action="append", help="networks whose name begins so")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    chosen = [one for one in NETWORKS if one.name.startswith(tuple(options.only or [""]))]
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[Network, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="networks-") as folder:
        shards, photo = make_data(Path(folder))
        for number, network in enumerate(chosen):
            home = Path(folder) / str(number)
            home.mkdir()
            found[network] = Way(network, home, shards, photo).go()
    text = table(found)
    print(text)
    if options.out:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True
        ).stdout.strip()
        words = " ".join(
            ["python -m tests.networks", *(f"--only {one}" for one in options.only or ())]
        )
        options.out.write_text(f"# Networks\n\n`{words}` on commit {commit}.\n\n{text}")
    return int(any(cell != "held" for cells in found.values() for cell in cells.values()))


def make_data(folder: Path) -> tuple[Path, Path]:
    """Make 40 generated portraits, packed; returns the shards and a photo."""
    synthetic.generate(folder / "raw", 40, 3)
    split.prepare(folder / "raw", folder / "data")
    writer.pack(folder / "data", folder / "shards", size=(SIDE, SIDE))
    return folder / "shards", min((folder / "raw").rglob("*.jpg"))


if __name__ == "__main__":
    sys.exit(main())
