"""What a rank does in the tests of the stream: started by torchrun, it writes what it saw to OUT/<rank>.json.

torchrun --nproc-per-node 3 tests/stream_job.py see SHARDS OUT '{"batch_size": 4}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from portrait_dist.data import build_loader
from portrait_dist.errors import InputError


def see(shards: str, options: dict[str, Any]) -> dict[str, Any]:
    """Keys of each batch of two epochs, of a third one resumed, and of the validation split; then the other actions."""
    loader = build_loader(shards, "train", options["batch_size"], seed=3)
    seen: dict[str, Any] = {"steps": len(loader), "left_out": loader.samples_dropped}
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen[f"epoch {epoch}"] = [batch.keys for batch in loader]
    loader.load_state_dict(options["state"])
    loader.set_epoch(options["state"]["epoch"])
    seen["rest"] = [batch.keys for batch in loader]
    seen["val"] = [batch.keys for batch in build_loader(shards, "val", options["batch_size"])]
    seen["other seed"] = begin(shards, options["batch_size"], seed=dist.get_rank())
    seen["other shards"] = begin(
        options["copies"][dist.get_rank() > 0], options["batch_size"], seed=0
    )
    seen["skipping"] = step(
        options["damaged"], {"batch_size": options["batch_size"], "on_damage": "skip"}
    )
    return seen


def begin(shards: str, batch_size: int, seed: int) -> str:
    """What the first iteration says where the ranks were given different things."""
    try:
        next(iter(build_loader(shards, "train", batch_size, seed=seed)))
    except InputError as error:
        return str(error)
    return "nothing"


def step(shards: str, options: dict[str, Any]) -> dict[str, Any]:
    """A plain training loop with a collective in every step, as DDP has."""
    loader = build_loader(shards, "train", options["batch_size"], on_damage=options["on_damage"])
    steps, keys = 0, []
    for batch in loader:
        dist.all_reduce(torch.ones(1))
        keys += batch.keys
        steps += 1
    return {"steps": steps, "keys": keys, "damaged": loader.damaged}


if __name__ == "__main__":
    action, shards, out, options = sys.argv[1:]
    dist.init_process_group("gloo")
    result = {"see": see, "step": step}[action](shards, json.loads(options))
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
