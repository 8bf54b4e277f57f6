"""Two ranks for one start of torch: forked before anything has run that a fork would break.

Usage: python -m tests.ranks.two_ranks SHARDS FOLDER; each rank writes FOLDER/rank<r>.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portrait_dist import checkpoints, distributed
from portrait_dist.config import load
from portrait_dist.data import build_loader
from portrait_dist.errors import DivergedError, PortraitDistError
from portrait_dist.losses import SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import LoopOptions, PortraitTrainer, preemption
from portrait_dist.training.main import Prepare
from portrait_dist.training.preemption import NOTHING, SAVE, STOP, Agreement
from portrait_dist.training.sg_adapter import use_device

BATCH = 6


class SkipsALayer(nn.Module):
    """Uses another layer in every second step, as networks with layer dropping do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 1, 3, padding=1) for _ in range(2))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.sigmoid(self.layers[self.calls % 2](x))


class NotANumberOnRank1(SoftIoULoss):
    """Fails on rank 1 in step 3; through the gradients rank 0 meets it in step 4."""

    def __init__(self) -> None:
        super().__init__(0.5, 0.5)
        self.calls = 0

    def forward(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        value = super().forward(preds, target)
        bad = self.calls == 3 and distributed.rank() == 1 and torch.is_grad_enabled()
        return value * float("nan") if bad else value


def train(
    shards: str, folder: Path, name: str, model: nn.Module, loss: nn.Module, **params: Any
) -> PortraitTrainer:
    """Train for an epoch of four steps."""
    config = load(None, [])
    trainer = PortraitTrainer(
        name,
        str(folder),
        prepare=Prepare(config, 0),
        options=LoopOptions(log_keys=True, log_every_steps=2),
    )
    trainer.fixed_folder = True
    defaults = {
        "max_epochs": 1,
        "initial_lr": 1e-2,
        "optimizer": "SGD",
        "loss": loss,
        "train_metrics_list": [SoftIoU()],
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        "average_best_models": False,
        "kill_ddp_pgroup_on_end": False,
        "silent_mode": True,
        "log_installed_packages": False,
    }
    loaders = (build_loader(shards, split, BATCH, workers=-1) for split in ("train", "val"))
    trainer.train(model, defaults | params, *loaders)
    return trainer


def agreed(interval: int, requests: dict[int, dict[int, int]], calls: int) -> list[int]:
    """What a rank receives in each call, where ``requests[rank][call]`` are the ranks' requests."""
    agreement = Agreement()
    agreement.interval = interval
    mine = requests.get(distributed.rank(), {})
    received = [agreement.exchange(mine.get(call, NOTHING)) for call in range(calls)]
    return [*received, agreement.finish()]


def check(shards: str, folder: Path) -> dict[str, Any]:
    """Everything that needs two ranks."""
    found: dict[str, Any] = {}
    rank = distributed.rank()
    found["stop"] = agreed(4, {1: dict.fromkeys(range(5, 20), STOP)}, 20)
    # A rank that wants a save asks until it has happened.
    found["save"] = agreed(1, {0: {2: SAVE, 3: SAVE}}, 8)
    found["intervals"] = [preemption.exchange_interval(2, 100)]

    torch.manual_seed(1)
    train(shards, folder, "skips", SkipsALayer(), nn.BCELoss())
    found["skips"] = checkpoints.read_info(folder / "skips" / "ckpt_latest.pth").samples_seen

    try:
        torch.manual_seed(1)
        train(shards, folder, "diverged", UNet(init_features=2, norm="group"), NotANumberOnRank1())
    except DivergedError as error:
        found["diverged"] = str(error)
        found["keys"] = list(error.keys)
        found["agreed"], found["quiet"] = error.agreed, error.quiet

    if rank == 1:  # the file is read once, whatever the number of ranks
        checkpoints._bytes_of = refuse
    state = checkpoints.read_on_every_rank(folder / "skips" / "ckpt_latest.pth")
    found["read"] = float(state["net"]["layers.0.weight"].double().sum())
    if rank == 0:
        (folder / "damaged.pth").write_bytes(b"x")
    try:
        checkpoints.read_on_every_rank(folder / "damaged.pth")
    except PortraitDistError as error:
        found["damaged"] = str(error)
    found["gathered"] = distributed.gather_to_rank_0(rank)
    return found


def refuse(path: object) -> bytes:
    raise AssertionError(f"rank 1 reads {path}")


def main() -> None:
    """Fork, join the group, check, write what was found."""
    shards, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    child = os.fork()
    faulthandler.dump_traceback_later(120, exit=True)  # where the ranks hang, if they do
    rank = 0 if child else 1
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    use_device(torch.device("cpu"))
    found = check(shards, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(status != 0)
    os._exit(0)


if __name__ == "__main__":
    main()
