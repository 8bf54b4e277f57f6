"""Process group, ranks, device, seeds and rank-0 printing. Works with torchrun and without.

Without torchrun (no RANK in the environment) there is one rank and no process group. With torchrun the backend is nccl on
GPUs and gloo on CPUs. ``rank`` is always the global one; ``local_rank`` only picks the device.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from portrait_dist.errors import InputError, PortraitDistError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
SECONDS_AFTER_RANK_0 = 3.0


def rank() -> int:
    """Global rank of this process, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank within this node, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks on all nodes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def job_part(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Say which part of a job that is split into equal parts this process is.

    A SLURM array's task goes first, then srun's task, then torchrun's rank.

    Returns:
        (number of the part, from 0; how many parts).

    Raises:
        InputError: the environment names no part.
    """
    try:
        if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
            task = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            found = task, int(environment["SLURM_ARRAY_TASK_COUNT"])
        elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
            found = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        else:
            found = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            "--part auto: neither a SLURM array, nor srun, nor torchrun says which part this is "
            f"({' '.join(str(error).split())}); give --part I/N"
        ) from error
    if not 0 <= found[0] < found[1]:
        raise InputError(f"--part auto: the environment says {found[0]} of {found[1]}; give --part")
    return found


def is_initialized() -> bool:
    """Is there a process group? Does not import torch.distributed where nobody has."""
    torch_distributed = sys.modules.get("torch.distributed")
    return bool(
        torch_distributed
        and torch_distributed.is_available()
        and torch_distributed.is_initialized()
    )


def pick_device(name: str = "auto") -> torch.device:
    """Device of this rank.

    Args:
        name: ``auto`` (this rank's GPU if there is one, else the CPU), ``cpu`` or ``cuda``.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device cuda: torch sees no GPU here; use the device cpu, or see 'portrait-dist doctor'"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank()} has no GPU: torch sees {torch.cuda.device_count()} here; "
            f"start it with --nproc {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def start(device: torch.device, timeout_seconds: float = 600.0) -> None:
    """Join the process group when launched by torchrun; without torchrun do nothing.

    Args:
        device: this rank's device; GPUs use nccl, CPUs gloo.
        timeout_seconds: a collective that takes longer ends the process.
    """
    if not launched_by_torchrun():
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        # NCCL's watchdog aborts the process without a word; the gloo group beside it, whose error is
        # Python's, comes first.
        minute = timedelta(seconds=60 if device.type == "cuda" else 0)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=_store_of_this_start(store, timeout_seconds),
            rank=rank(),
            world_size=world_size(),
            timeout=timeout + minute,
            device_id=device if device.type == "cuda" else None,
        )


def _store_of_this_start(store: Any, timeout_seconds: float) -> Any:
    """The job's key-value store under a prefix that only the processes of this start know.

    torchrun keeps one store over its restarts (torch 2.11 to 2.15), so a restarted rank may read the address of a killed one
    and wait for it in vain. Every rank writes a fresh name, reads all names, and takes their hash for a prefix as soon as all
    ranks have confirmed the same hash: a name left by a killed rank is confirmed by nobody.
    """
    import torch.distributed as dist

    ranks = range(world_size())
    store.set(f"portrait_dist/start/{rank()}", uuid.uuid4().hex)
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        names = store.multi_get(
            [f"portrait_dist/start/{one}" for one in ranks]
        )  # waits for those not there yet
        token = hashlib.sha256(b"".join(names)).hexdigest()[:16]
        store.set(f"{token}/{rank()}", "here")
        if store.check([f"{token}/{one}" for one in ranks]):
            return dist.PrefixStore(token, store)  # type: ignore[attr-defined]
        time.sleep(0.05)
    raise PortraitDistError(
        f"rank {rank()}: not all {world_size()} ranks started within {timeout_seconds:g} s"
    )


def stop() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        import torch.distributed as dist

        dist.destroy_process_group()


def on_every_rank(step: Callable[[], T]) -> T:
    """Run a step that may fail on some ranks; if it does on any, every rank raises the first error.

    Without it the other ranks would wait in the next collective for one that is gone. Rank 0 leaves first, with the message:
    torchrun ends all ranks when one leaves, and names that one.

    Raises:
        PortraitDistError: of the first rank that raised one, ``agreed``, and ``quiet`` on all ranks but 0.
    """
    error: PortraitDistError | None = None
    result: Any = None
    try:
        result = step()
    except PortraitDistError as raised:
        error = raised
    found = [item for item in gather_objects((type(error), str(error)) if error else None) if item]
    if found:
        kind, message = found[0]
        first: PortraitDistError = kind(message)
        first.agreed = True
        first.quiet = first.secondary = rank() != 0
        if first.quiet:
            time.sleep(SECONDS_AFTER_RANK_0)
        raise first
    return result


def first_to_fail() -> int:
    """Which rank failed first? Tell the others that it is this one if nobody was before.

    A rank that fails makes the others fail in their next collective; they need not report that.
    """
    if not is_initialized():
        return rank()
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().compare_set("portrait_dist/failed", "", str(rank())))
    except (RuntimeError, ValueError):  # the store is gone too
        return rank()


def barrier() -> None:
    """Wait for all ranks."""
    if is_initialized():
        import torch.distributed as dist

        dist.barrier()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    if not is_initialized():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_rank_0(value: T, group: Any = None) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None on the others.

    Args:
        value: anything that can be pickled.
        group: a process group with all ranks, such as a gloo group beside NCCL; the default group if None.
    """
    if not is_initialized():
        return [value]
    import torch.distributed as dist

    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values


def broadcast_bytes(data: bytes) -> bytes:
    """Return rank 0's bytes on every rank; what the others give is ignored."""
    if world_size() == 1 or not is_initialized():
        return data
    import numpy as np
    import torch
    import torch.distributed as dist

    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0)
    if dist.get_rank() == 0:
        buffer = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).to(device)
    else:
        buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(buffer, src=0)
    return data if dist.get_rank() == 0 else buffer.cpu().numpy().tobytes()


def broadcast_object(value: T) -> T:
    """Give rank 0's value to every rank. A collective; the value is pickled."""
    if not is_initialized():
        return value
    import torch.distributed as dist

    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def sum_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Add up each tensor over all ranks, in place."""
    if is_initialized():
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch with seed + global rank."""
    import numpy as np
    import torch

    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())


def print0(message: str) -> None:
    """Print one line on stderr, on rank 0 only."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def check_shared_folder(folder: Path, seconds: float = 20.0) -> None:
    """Make sure that every node sees the folder that rank 0 writes to. Collective: every rank calls it, the group is up.

    Args:
        folder: the run folder; rank 0 makes it.
        seconds: how long a node may take to see a new file (NFS caches folder listings).

    Raises:
        InputError: on every rank, naming the nodes that do not see it.
    """
    if world_size() == 1:
        return
    token, problem = folder / f".seen-by-all-{uuid.uuid4().hex}", ""
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = (
                f"{folder}: cannot write the run folder ({error.strerror}); choose another run.root"
            )
    name, problem = gather_objects((token.name, problem))[0]
    if problem:
        raise InputError(problem)
    seen = gather_objects((socket.gethostname(), _appears(folder / name, seconds)))
    if rank() == 0:
        token.unlink(missing_ok=True)
    if blind := sorted({host for host, sees in seen if not sees}):
        raise InputError(
            f"{folder}: rank 0 on {seen[0][0]} writes here, but {', '.join(blind)} does not see it; "
            "set run.root to a folder that all nodes share"
        )


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if path.name in os.listdir(path.parent):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
