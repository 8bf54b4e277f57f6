"""Process group, ranks, devices, seeds and printing on rank 0. Works with torchrun and without.

Without torchrun (no RANK in the environment) there is one rank and no process group. With torchrun
the backend is nccl on GPUs and gloo on CPUs. ``rank`` is always the global one; ``local_rank`` only
picks the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from portrait_dist.errors import InputError, PortraitDistError, one_line
from portrait_dist.system import parent
from portrait_dist.system.info import environment_number

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")
SECONDS_AFTER_RANK_0 = 3.0
SECONDS_FOR_PYTHON = 60.0
"""NCCL's watchdog aborts a process without a word; so long the Python error comes before it."""
STORE_ATTEMPTS = 5
"""A second apart."""


def rank() -> int:
    """Return the global rank of this process, 0 without torchrun."""
    return environment_number("RANK")


def local_rank() -> int:
    """Return the rank within this node, 0 without torchrun."""
    return environment_number("LOCAL_RANK")


def world_size() -> int:
    """Return the number of ranks on all nodes, 1 without torchrun."""
    return environment_number("WORLD_SIZE", 1, minimum=1)


def launched_by_torchrun() -> bool:
    """Return whether this process is a rank."""
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
            f"({one_line(error)}); give --part I/N"
        ) from error
    if not 0 <= found[0] < found[1]:
        raise InputError(f"--part auto: the environment says {found[0]} of {found[1]}; give --part")
    return found


def is_initialized() -> bool:
    """Return whether there is a process group, without importing torch.distributed."""
    torch_distributed = sys.modules.get("torch.distributed")
    return bool(
        torch_distributed
        and torch_distributed.is_available()
        and torch_distributed.is_initialized()
    )


def pick_device(name: str = "auto") -> torch.device:
    """Choose the device of this rank.

    Args:
        name: ``auto`` (this rank's GPU if there is one, else the CPU), ``cpu`` or ``cuda``.

    Raises:
        InputError: ``cuda`` without a GPU, or more ranks here than GPUs.
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

    Raises:
        InputError: this rank's device is of another type than rank 0's.
        PortraitDistError: not all ranks started within the time.
    """
    if not launched_by_torchrun():
        return
    # The wait for the other ranks is native code, where no handler of a signal runs.
    with parent.ending_with_it("its torchrun process", if_true="TORCHELASTIC_RUN_ID" in os.environ):
        _start(device, timeout_seconds)


def _start(device: torch.device, timeout_seconds: float) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if card := gloo_interface(os.environ):
        os.environ["GLOO_SOCKET_IFNAME"] = card
    _check_torchrun_is_there()
    timeout = timedelta(seconds=timeout_seconds)
    gpu = device.type == "cuda"
    # By hand, because init_process_group would use the store without the prefix of this start.
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    dist.init_process_group(
        backend="nccl" if gpu else "gloo",
        store=_store_of_this_start(store, device.type, timeout_seconds),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout + timedelta(seconds=SECONDS_FOR_PYTHON) if gpu else timeout,
        device_id=device if gpu else None,
    )


def _check_torchrun_is_there() -> None:
    """Ask whether torchrun's key-value store answers; it does before torchrun starts a rank.

    A rank whose torchrun was killed before the rank could look at its parent would otherwise knock
    at that store for the whole timeout.

    Raises:
        PortraitDistError: it refuses.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ.get("MASTER_ADDR", ""), environment_number("MASTER_PORT")
    for attempt in range(STORE_ATTEMPTS):
        try:
            socket.create_connection((host, port), timeout=10).close()
        except ConnectionRefusedError:
            # True is a second: torchrun may be about to end, or its store slow to answer.
            time.sleep(attempt + 1 < STORE_ATTEMPTS)
        except OSError:
            return  # torch has more ways to reach it, and says what is wrong
        else:
            return
    raise PortraitDistError(
        f"nobody answers at {host}:{port}: the torchrun process has ended, so this rank ends too; "
        "run the same command again"
    )


# The network card of gloo -------------------------------------------------------------------------


def gloo_interface(environment: Mapping[str, str]) -> str | None:
    """Find the network card on which gloo reaches the other nodes; GPU runs need gloo, too.

    Gloo itself takes the address that this host's name leads to, which is 127.0.1.1 on Debian and
    Ubuntu, and then waits in vain for the other nodes.

    Args:
        environment: variables of this rank.

    Returns:
        The card: NCCL_SOCKET_IFNAME where it is the name of one, else the one from which
        MASTER_ADDR is reached, else that of the default route. None where GLOO_SOCKET_IFNAME is
        set, all ranks are on this node, or no card is found.
    """
    here = environment_number("LOCAL_WORLD_SIZE", 1, environment=environment)
    ranks = environment_number("WORLD_SIZE", 1, environment=environment)
    if environment.get("GLOO_SOCKET_IFNAME") or here >= ranks:
        return None
    import psutil

    cards = {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    chosen = environment.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if chosen in cards.values():
        return chosen
    # TEST-NET-1 is nobody's: nothing is sent, only the route is looked up.
    for target in (environment.get("MASTER_ADDR", ""), "192.0.2.1"):
        source = _source_address(target)
        if source in cards:
            return cards[source]
    return None


def _source_address(target: str) -> str | None:
    """Return the address of this host from which a target would be reached."""
    if not target:
        return None
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as one:
                # Connecting a datagram socket sends nothing; it only makes the kernel choose the
                # route.
                one.connect(address)
                return str(one.getsockname()[0]).partition("%")[0]
    return None


# The start of all ranks ---------------------------------------------------------------------------


class KeyValueStore(Protocol):
    """What the start needs of torch's ``Store``, whose class torch does not export."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


def _store_of_this_start(store: KeyValueStore, device: str, timeout_seconds: float) -> Any:
    """Return the job's key-value store under a prefix that only the ranks of this start know.

    torchrun keeps one store over its restarts (torch 2.11 to 2.15), so a restarted rank may read
    the address of a killed one and wait for it in vain. So every rank writes a fresh name; rank 0
    reads all of them, makes a token of them, answers each name with it, and opens the way once all
    ranks have confirmed that token. A name left by a killed rank is confirmed by nobody; rank 0
    then reads again. Each rank asks a constant number of times, whatever the number of ranks.
    """
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"portrait_dist/start/{attempt}/{world_size()}"
    name = uuid.uuid4().hex
    mine = json.dumps({"name": name, "device": device, "host": socket.gethostname()})
    store.set(f"{prefix}/{rank()}", mine)
    deadline = time.monotonic() + timeout_seconds
    admit = _admit_ranks if rank() == 0 else _wait_for_admission
    token = admit(store, prefix, name, deadline)
    if token is None:
        raise PortraitDistError(
            f"rank {rank()}: not all {world_size()} ranks started within {timeout_seconds:g} s"
        )
    return dist.PrefixStore(token, store)  # type: ignore[attr-defined, arg-type]


def _admit_ranks(store: KeyValueStore, prefix: str, name: str, deadline: float) -> str | None:
    """Rank 0's side; returns the token."""
    answered: dict[str, str] = {}
    pause = 0.01
    while time.monotonic() < deadline:
        try:
            found = store.multi_get([f"{prefix}/{one}" for one in range(world_size())])
        except RuntimeError:  # it waits for those that are not there yet, to its own timeout
            return None
        ranks = [json.loads(one) for one in found]
        token = hashlib.sha256(b"".join(found)).hexdigest()[:16]
        odd = _odd_device(ranks)
        for one in ranks:
            # Rank 0 reads again and again; an answer that has not changed is not written again.
            if answered.get(one["name"]) != token:
                answered[one["name"]] = token
                store.set(f"{prefix}/answer/{one['name']}", odd or token)
        if odd:
            error = InputError(odd)
            error.agreed = True
            raise error
        # Adding 0 reads a counter without waiting for it to exist, which get() would do.
        if store.add(f"{token}/confirmed", 0) == world_size() - 1:
            store.set(f"{token}/go", "go")
            return token
        time.sleep(pause)
        # Fast where all ranks start together, and no load on the store of 4,096 of them that do
        # not.
        pause = min(2 * pause, 1.0)
    return None


def _wait_for_admission(
    store: KeyValueStore, prefix: str, name: str, deadline: float
) -> str | None:
    """Every other rank's side; returns the token, which may change while ranks are restarted."""
    confirmed = ""
    while (left := deadline - time.monotonic()) > 0:
        answer = f"{prefix}/answer/{name}"
        try:
            store.wait([answer], timedelta(seconds=left))
        except RuntimeError:
            return None
        token = store.get(answer).decode()
        # A token is hexadecimal; a sentence has spaces.
        if " " in token:  # rank 0 refuses, and says why
            error = InputError(token)
            error.agreed = error.quiet = error.secondary = True
            time.sleep(SECONDS_AFTER_RANK_0)
            raise error
        if token != confirmed:
            store.add(f"{token}/confirmed", 1)
            confirmed = token
        with contextlib.suppress(RuntimeError):  # not yet: there may be a newer answer
            store.wait([f"{token}/go"], timedelta(seconds=min(2.0, max(left, 0.01))))
            return token
    return None


def _odd_device(ranks: Sequence[Mapping[str, str]]) -> str:
    """Say which rank has another type of device than most; nothing where all have the same."""
    kinds = [one["device"] for one in ranks]
    # Sorted, so that a tie does not depend on the order of a set.
    usual = max(sorted(set(kinds)), key=kinds.count)
    odd = [number for number, kind in enumerate(kinds) if kind != usual]
    if not odd:
        return ""
    kind, host = kinds[odd[0]], ranks[odd[0]]["host"]
    return (
        f"rank {odd[0]} on {host} runs on {kind}, the others on {usual}: a GPU is missing or "
        "broken there; see 'portrait-dist doctor' on that node, or set train.device=cpu "
        "for all"
    )


# Collectives ------------------------------------------------------------------------------------


def stop() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        import torch.distributed as dist

        dist.destroy_process_group()


def on_every_rank(step: Callable[[], T]) -> T:
    """Run a step that may fail on some ranks; where it does, every rank raises the first error.

    Without it the other ranks would wait in the next collective for one that is gone. Rank 0 leaves
    first, with the message: torchrun ends all ranks when one leaves, and names that one.

    Raises:
        PortraitDistError: of the first rank that raised one, ``agreed``, and ``quiet`` on all ranks
            but 0.
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
    """Return which rank failed first; this one where no other did, which the others then learn.

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
    """Return every rank's value, in rank order, on every rank."""
    if not is_initialized():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_rank_0(value: T, group: ProcessGroup | None = None) -> list[T] | None:
    """Return every rank's value, in rank order, on rank 0; None on the others.

    Args:
        value: anything that can be pickled.
        group: a process group with all ranks, such as a gloo group beside NCCL; the default group
            if None.
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
        # A copy: torch warns of memory that it could write into, and bytes are read-only.
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
    # numpy takes 32 bits only.
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())


def print0(message: str) -> None:
    """Print one line on stderr, on rank 0 only."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def check_shared_folder(folder: Path, seconds: float = 20.0) -> None:
    """Check that every node sees the folder that rank 0 writes to. A collective.

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
            f"{folder}: rank 0 on {seen[0][0]} writes here, but {', '.join(blind)} does not see "
            "it; set run.root to a folder that all nodes share"
        )


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            # Listed, not stat: NFS caches for some seconds that a name was not there.
            if path.name in os.listdir(path.parent):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
