"""One round of step_parts.py, with the package that PYTHONPATH names.

    python benchmarks/step_round.py SHARDS RUN_ROOT OUT.json STEPS BATCH KIND cpu|cuda

KIND is eager, compiled (``train.compile``) or plain (without oneDNN).
It imports nothing of this folder, so that it measures any tree.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("augment", "forward", "loss", "backward", "optimiser", "ema", "metrics")
SKIPPED = 30
"""First steps of a round that are not counted: torch still plans its kernels."""


class PartTimes:
    """CPU time of each part of each step, by functions that are wrapped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now = dict.fromkeys(PARTS, 0.0)
        self._begin: float | None = None

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time a method of a class; the time of a part within is counted in both."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._now[part] += time.thread_time() - begin

        setattr(owner, name, timed)

    def begin_steps_at(self, owner: Any, name: str) -> None:
        """Begin a step where a method is called."""
        method = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self._next_step()
            return method(*args, **kwargs)

        setattr(owner, name, called)

    def _next_step(self) -> None:
        now = time.thread_time()
        if self._begin is not None:
            self.steps.append({"step": now - self._begin, **self._now})
        self._begin, self._now = now, dict.fromkeys(PARTS, 0.0)

    def lower_quartiles(self) -> dict[str, float]:
        """Return milliseconds of each part, of the whole step, and of what no part has."""
        # Without an epoch's last steps, whose ends hold validation and saving.
        kept = self.steps[SKIPPED:]
        found = {
            name: 1e3 * statistics.quantiles([one[name] for one in kept], n=4)[0]
            for name in (*PARTS, "step")
        }
        found["other"] = max(0.0, found["step"] - sum(found[part] for part in PARTS))
        return found


def one_round(
    shards: str, root: str, steps: int, batch: int, *, device: str, kind: str
) -> dict[str, float]:
    """Train with the package that PYTHONPATH names; return what the parts took."""
    import torch
    from torch import nn
    from torchmetrics import MetricCollection

    from portrait_dist import cli
    from portrait_dist.data.augment import Augment
    from portrait_dist.models import UNet
    from portrait_dist.training import sg_adapter

    times = PartTimes()
    # Called as a module: hooks and the wrapper that DDP or a compiler puts around belong to it.
    call: Callable[..., Any] = nn.Module.__call__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs)

    UNet.__call__ = forward  # type: ignore[method-assign]
    for owner, name, part in (
        (UNet, "__call__", "forward"),
        (sg_adapter.AdaptedTrainer, "compute_loss", "loss"),
        (torch.Tensor, "backward", "backward"),
        (torch.optim.Optimizer, "zero_grad", "optimiser"),
        (torch.optim.AdamW, "step", "optimiser"),
        (sg_adapter.FusedEMA, "update", "ema"),
        (MetricCollection, "update", "metrics"),
        (Augment, "__call__", "augment"),
    ):
        times.wrap(owner, name, part)
    times.begin_steps_at(Augment, "__call__")
    if kind == "plain":
        torch.backends.mkldnn.set_flags(_enabled=False)
    settings = settings_of(shards, root, steps, batch, device, kind)
    values = [f"{name}={value}" for name, value in settings.items()]
    sys.argv = ["portrait-dist", "train", "--recipe", "aisegment_unet", *values, "--json"]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    return times.lower_quartiles()


def settings_of(
    shards: str, root: str, steps: int, batch: int, device: str, kind: str
) -> dict[str, object]:
    """Return the settings of the training, whose tensors are tiny."""
    return {
        "data.shards": shards,
        "run.root": root,
        "run.name": "parts",
        "train.max_epochs": 1,
        "train.max_batches": steps,
        "train.max_val_batches": 1,
        "train.batch_size": batch,
        "train.device": device,
        "train.threads": 1,
        "train.average_best": "false",
        "train.pictures": 0,
        "train.precision": "fp32",
        "train.compile": str(kind == "compiled").lower(),
        # The plain kernels copy images that are channels-last.
        "train.channels_last": str(kind != "plain").lower(),
        "model.init_features": 2,
    }


if __name__ == "__main__":
    shards, root, out, steps, batch, kind, device = sys.argv[1:]
    found = one_round(shards, root, int(steps), int(batch), device=device, kind=kind)
    Path(out).write_text(json.dumps(found))
