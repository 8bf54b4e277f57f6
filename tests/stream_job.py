"""Work of a rank in the tests of the stream: torchrun starts it, it writes OUT/<rank>.json.

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
    """Return the keys of two epochs, a third one resumed and validation, and what is refused."""
    loader = build_loader(shards, "train", options["batch_size"], seed=3)
    seen: dict[str, Any] = {"batches": len(loader), "dropped": loader.samples_dropped}
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen[f"epoch {epoch}"] = [batch.keys for batch in loader]
    loader.load_state_dict(options["state"])
    loader.set_epoch(options["state"]["epoch"])
    seen["rest"] = [batch.keys for batch in loader]
    seen["val"] = [batch.keys for batch in build_loader(shards, "val", options["batch_size"])]
    seen["other seed"] = first_batch(shards, options["batch_size"], seed=dist.get_rank())
    seen["other shards"] = first_batch(
        options["copies"][dist.get_rank() > 0], options["batch_size"], seed=0
    )
    seen["skipping"] = train(
        options["damaged"], {"batch_size": options["batch_size"], "on_damage": "skip"}
    )
    return seen


def first_batch(shards: str, batch_size: int, seed: int) -> str:
    """Return the message of the first iteration where the ranks were given different things."""
    try:
        next(iter(build_loader(shards, "train", batch_size, seed=seed)))
    except InputError as error:
        return str(error)
    return "nothing"


def train(shards: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run a plain training loop with a collective in every step, as DDP has."""
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
    result = {"see": see, "train": train}[action](shards, json.loads(options))
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
