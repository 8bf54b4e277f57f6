"""How ranks find each other: a handshake that no killed rank can join, the same kind of device."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import psutil
import pytest
from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it to mypy

from portrait_dist import distributed
from portrait_dist.errors import InputError
from portrait_dist.training.preemption import Agreement
from tests.jobs import TORCHRUN

PREFIX = "portrait_dist/start/0"


class CountingStore:
    """A client of a TCPStore that counts what it asks."""

    def __init__(self, port: int, counts: Counter[str], name: str) -> None:
        self.store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=30))
        self.counts, self.name = counts, name

    def __getattr__(self, method: str) -> Any:
        self.counts[self.name] += 1
        return getattr(self.store, method)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )


def start_ranks(
    server: TCPStore, ranks: dict[int, str], found: dict[str, Any], counts: Counter[str]
) -> list[threading.Thread]:
    """Start a thread for each rank, which has a name; its token, or error, comes into ``found``."""

    def one(rank: int, name: str) -> None:
        store = CountingStore(server.port, counts, name)
        world = int(os.environ["WORLD_SIZE"])
        entry = {"name": name, "device": name.partition("-")[0], "host": f"node{rank}"}
        store.set(f"{PREFIX}/{world}/{rank}", json.dumps(entry))
        admit = distributed._wait_for_admission if rank else distributed._admit_ranks
        try:
            found[name] = admit(store, f"{PREFIX}/{world}", name, time.monotonic() + 20)
        except InputError as error:
            found[name] = str(error)

    threads = [threading.Thread(target=one, args=item) for item in ranks.items()]
    for thread in threads:
        thread.start()
    return threads


def test_all_ranks_get_one_token_and_each_asks_a_constant_number_of_times(
    server: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    for world in (4, 32):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        found: dict[str, Any] = {}
        counts: Counter[str] = Counter()
        names = {rank: f"cpu-{world}-{rank}" for rank in range(world)}
        for thread in start_ranks(server, names, found, counts):
            thread.join()
        assert len(set(found.values())) == 1
        assert None not in found.values()
        asked[world] = max(count for name, count in counts.items() if name != names[0])
        # Rank 0 answers everybody once; it reads the names with one request a round.
        assert counts[names[0]] < 4 * world + 200
    assert asked[32] <= asked[4] + 6, "a rank that waits longer than 2 s asks once more"


def test_a_name_that_a_killed_rank_left_is_never_part_of_a_start(
    server: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    dead = json.dumps({"name": "dead", "device": "cpu", "host": "node2"})
    server.set(f"{PREFIX}/3/2", dead)
    threads = start_ranks(server, {0: "cpu-a", 1: "cpu-b"}, found, counts)
    server.wait([f"{PREFIX}/3/answer/dead"], timedelta(seconds=10))
    threads += start_ranks(server, {2: "cpu-c"}, found, counts)
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == 1
    assert set(found) == {"cpu-a", "cpu-b", "cpu-c"}
    assert found["cpu-a"] not in (None, server.get(f"{PREFIX}/3/answer/dead").decode())


def test_a_rank_with_another_kind_of_device_is_refused_by_number_and_host(
    server: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "SECONDS_AFTER_RANK_0", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    found: dict[str, Any] = {}
    for thread in start_ranks(server, {0: "cuda-a", 1: "cpu-b", 2: "cuda-c"}, found, Counter()):
        thread.join()
    assert len(set(found.values())) == 1
    assert "rank 1 on node1 runs on cpu, the others on cuda" in found["cuda-a"]


def test_ranks_on_different_devices_end_at_once_with_one_line() -> None:
    """Real processes: rank 1 lost its GPU."""
    code = (
        "import torch; from portrait_dist import distributed, errors\n"
        "kind = 'cpu' if distributed.rank() else 'cuda'\n"
        "try: distributed.start(torch.device(kind, 0), 60)\n"
        "except errors.InputError as error: print(error.quiet, error)"
    )
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 2, done
    assert lines[0].startswith("False rank ")
    assert f" on {socket.gethostname()} runs on " in lines[0]
    assert lines[1].startswith("True rank ")


def test_gloo_uses_the_card_that_reaches_the_other_nodes() -> None:
    several = {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
    cards = psutil.net_if_addrs()
    card = next(name for name in cards if name != "lo")
    find = distributed.gloo_interface
    assert find({**several, "MASTER_ADDR": "127.0.0.1"}) == "lo"
    assert find({**several, "NCCL_SOCKET_IFNAME": card, "MASTER_ADDR": "127.0.0.1"}) == card
    assert find({**several, "NCCL_SOCKET_IFNAME": f"={card}"}) == card
    for pattern in ("^lo", "nosuch", "eth0,eth1,ib"):
        assert find({**several, "NCCL_SOCKET_IFNAME": pattern, "MASTER_ADDR": "127.0.0.1"}) == "lo"
    own = [a.address for a in cards[card] if a.family == socket.AF_INET]
    if own:
        assert find({**several, "MASTER_ADDR": own[0]}) == card
    assert find({**several, "GLOO_SOCKET_IFNAME": "eth9", "MASTER_ADDR": "127.0.0.1"}) is None
    one_node = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert find(one_node) is None


@pytest.mark.parametrize(("kind", "seconds"), [("cpu", 90), ("cuda", 150)])
def test_gloo_has_the_timeout_of_the_settings_and_nccl_a_minute_more(
    kind: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the Python error, which names the rank, comes before NCCL's watchdog."""
    import torch
    import torch.distributed as dist

    given: dict[str, timedelta] = {}

    def keep(backend: str, timeout: timedelta, **_: Any) -> None:
        given[backend] = timeout

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed, "_store_of_this_start", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", keep)
    monkeypatch.setattr(dist, "new_group", keep)
    distributed.start(torch.device(kind, 0), 90)
    backend = "nccl" if kind == "cuda" else "gloo"
    assert given == {backend: timedelta(seconds=seconds)}
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    Agreement(90)
    assert given["gloo"] == timedelta(seconds=90)


def test_the_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    """512 ranks and 512 shards need more than the usual 1,024."""
    code = (
        "import resource\n"
        "from portrait_dist import cli\n"
        "cli._raise_descriptor_limit()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 5000) if hard > 0 else 5000
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, wanted)),
    )
    assert done.stdout.split() == [str(wanted), str(wanted)]


def test_a_rank_whose_torchrun_is_gone_before_it_could_look_ends_instead_of_knocking() -> None:
    """In a process of its own: torch's client of the store would not end before its timeout."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    code = (
        "import torch; from portrait_dist import distributed, errors\n"
        "try: distributed.start(torch.device('cpu'), 5)\n"
        "except errors.PortraitDistError as error: print(error)"
    )
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | place | store | agent,
        capture_output=True,
        text=True,
    )
    assert f"nobody answers at 127.0.0.1:{port}: the torchrun process has ended" in done.stdout
