"""Packing by parts: any number of processes, in any order, killed or not: the bytes of one."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.data.shards import pack_folder, writer
from portrait_dist.data.shards.encode import Settings
from portrait_dist.data.shards.fingerprint import encoder_fingerprint, synthetic_picture
from portrait_dist.data.shards.plan import part_of, plan_shards
from portrait_dist.data.shards.writer import pack
from portrait_dist.data.source.split import Split, read_split
from portrait_dist.errors import InputError
from portrait_dist.files import ExclusiveLock, create_text, remove_abandoned_files, temporary_path
from tests.cli import PORTRAIT_DIST, assert_one_line, call
from tests.damage import cut, flip_bit
from tests.dying import FILE_OPERATIONS, processes
from tests.trees import write_tree
from tests.waiting import wait_for

ARGUMENTS = ("--size", "16", "--samples-per-shard", "3", "--workers", "1")
WITHOUT_LOCKS = """
import errno, fcntl, sys
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fcntl.lockf = refuse
from portrait_dist.cli import run
sys.exit(run(sys.argv[1:]))
"""
"""Runs the command line as on a file system that has no locks."""


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 train, 5 val and 4 test pairs of 24×16: 15 shards of three."""
    keys = {
        "train": [f"p-{i:03d}" for i in range(31)],
        "val": [f"q-{i}" for i in range(5)],
        "test": [f"r-{i}" for i in range(4)],
    }
    return write_tree(tmp_path_factory.mktemp("tree") / "data", keys)


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert pack_tiny(tree, out).shards == 15
    return hashes(out)


def pack_tiny(
    tree: Path, out: Path, *, part: tuple[int, int] | None = None, check: bool = False
) -> writer.PackResult:
    return pack(tree, out, size=(16, 16), samples_per_shard=3, part=part, check=check)


def start(tree: Path, out: Path, *options: str, locks: bool = True) -> subprocess.Popen[str]:
    program = PORTRAIT_DIST if locks else (sys.executable, "-c", WITHOUT_LOCKS)
    arguments = ["pack", "--data", str(tree), "--out", str(out), *ARGUMENTS, "--json", *options]
    return subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> dict[str, object]:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    found: dict[str, object] = json.loads(stdout)
    return found


@contextlib.contextmanager
def locked_elsewhere(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock file until it gets a line."""
    code = (
        "import sys; from pathlib import Path; from portrait_dist.files import ExclusiveLock;"
        "lock = ExclusiveLock(Path(sys.argv[1]), str); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_the_plan_is_a_pure_function_and_parts_divide_it() -> None:
    keys = {"train": [f"a{i:03d}" for i in range(100)], "val": ["b1", "b2"], "test": []}
    split = Split(Path("nowhere"), "", keys)
    plans = plan_shards(split, 7)
    assert [plan.name for plan in plans[-3:]] == [
        "train-00013.tar",
        "train-00014.tar",
        "val-00000.tar",
    ]
    assert [key for plan in plans for key in plan.keys] == keys["train"] + keys["val"]
    for count in (1, 2, 3, 7, 40):
        parts = [part_of(plans, index, count) for index in range(count)]
        assert sorted((plan.split, plan.name) for part in parts for plan in part) == sorted(
            (plan.split, plan.name) for plan in plans
        )
        assert parts[-1] == [plan for i, plan in enumerate(plans) if i % count == count - 1]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_in_any_order_write_the_bytes_of_one_process(
    tree: Path, whole: dict[str, str], tmp_path: Path, count: int
) -> None:
    out = tmp_path / "out"
    order = list(range(count))
    random.Random(count).shuffle(order)
    for number, index in enumerate(order, start=1):
        result = pack_tiny(tree, out, part=(index, count))
        assert result.part == f"{index}/{count}"
        assert result.finished == (number == count)
        assert (out / "manifest.json").exists() == (number == count)
        assert result.shards_missing == sum(i % count in order[number:] for i in range(15))
    assert hashes(out) == whole
    again = pack_tiny(tree, out, part=(0, count))
    assert (again.packed, again.finished) == (0, True)
    assert hashes(out) == whole


PROCESSES = processes(__name__)


def pack_and_die(tree: Path, out: Path, part: tuple[int, int], dies_at: int) -> None:
    """Pack a part; SIGKILL itself at the file operation of that number, 0 for none.

    Exit code 2 where another process packs the part.
    """
    numbers = itertools.count(1)

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        ours = event in FILE_OPERATIONS and str(arguments[0]).startswith((str(tree), str(out)))
        if ours and next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if dies_at:
        sys.addaudithook(die)
    try:
        pack_tiny(tree, out, part=part)
    except InputError as error:
        sys.exit(2 if "is being packed by" in str(error) else str(error))


def pack_in_processes(jobs: list[tuple[Any, ...]]) -> list[int]:
    """Exit codes of processes that run :func:`pack_and_die` at the same time."""
    processes = [PROCESSES.Process(target=pack_and_die, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode or 0 for process in processes]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_killed_at_any_file_operation_and_started_twice_parts_write_the_bytes_of_one_process(
    tree: Path, whole: dict[str, str], tmp_path: Path, count: int
) -> None:
    rng = random.Random(count)
    for attempt in range(2):
        out = tmp_path / f"out{attempt}"
        order = rng.sample(range(count), count)
        # Two parts (the only one twice) die somewhere between their first file and the manifest.
        victims = [order[0], order[-1]]
        for part in victims:
            assert pack_in_processes([(tree, out, (part, count), rng.randrange(1, 30))]) == [
                -signal.SIGKILL
            ]
        twice = rng.choice(order)
        jobs = [(tree, out, (part, count), 0) for part in [*order, twice]]
        codes = pack_in_processes(jobs)
        assert set(codes) <= {0, 2}
        assert codes.count(2) <= 1, "only of the part that was started twice"
        assert hashes(out) == whole


def test_processes_at_once_two_of_them_killed_write_the_bytes_of_one(
    split_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--size", "96", "--samples-per-shard", "2")
    pack(split_dir, tmp_path / "whole", size=(96, 96), samples_per_shard=2)
    parts = [start(split_dir, out, *options, "--part", f"{index}/3") for index in range(3)]
    # The first and the last are killed when they have begun; a shard may be half written.
    for process in (parts[0], parts[2]):
        wait_for(lambda: len(list(out.glob("*.index"))) >= 2, what="two shards")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not end(parts[1])["finished"]
    refused = call(
        "pack", "--data", split_dir, "--out", out, *options, "--finish", "--workers", "1"
    )
    assert_one_line(refused, 2, "shards are not there", "(part 0/3)", "--finish")
    (out / temporary_path(out / "x").name).write_bytes(b"ours, alive")
    half = f".tmp-{temporary_path(out).name.split('-')[1]}-{parts[0].pid}-0"
    (out / half).write_bytes(b"of a killed process")
    again = [start(split_dir, out, *options, "--part", f"{index}/3") for index in (2, 0)]
    results = [end(process) for process in again]
    assert any(result["finished"] for result in results)
    assert not (out / half).exists()
    for mine in out.glob(f".tmp-*-{os.getpid()}-*"):  # a living process's file is spared
        mine.unlink()
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_two_processes_on_the_same_part_never_damage_each_other(
    tree: Path, whole: dict[str, str], tmp_path: Path, locks: bool
) -> None:
    out = tmp_path / "out"
    both = [start(tree, out, "--part", "0/1", locks=locks) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=300)
        if process.returncode:
            assert locks
            assert process.returncode == 2
            assert "being packed by process" in stderr
    assert 0 in [process.returncode for process in both]
    assert hashes(out) == whole


def test_a_part_does_not_touch_the_files_of_others(
    tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack_tiny(tree, out, part=(0, 2))
    before = {path: path.stat() for path in out.iterdir()}
    theirs = out / ".tmp-0123abcd-77-0"  # another host's, being written
    theirs.write_bytes(b"half a shard")
    result = pack_tiny(tree, out, part=(1, 2))
    assert result.finished
    assert theirs.read_bytes() == b"half a shard"
    theirs.unlink()
    for path, status in before.items():
        if path.name != pack_folder.UNFINISHED:
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (
                status.st_ino,
                status.st_mtime_ns,
            )
    assert hashes(out) == whole


def test_a_part_that_is_being_packed_is_refused_and_so_is_all_of_it(
    tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    folder = pack_folder.PackFolder(out, read_split(tree), Settings((16, 16), "jpeg", 95, 3))
    with locked_elsewhere(out / pack_folder.Part(1, 3).lock_name) as holder:
        folder.begin(parts=3)
        for options in (["--part", "1/3"], [], ["--finish"]):
            refused = call("pack", "--data", tree, "--out", out, *ARGUMENTS, *options)
            assert_one_line(refused, 2, "part 1/3 is being packed by", str(holder.pid))
        assert pack_tiny(tree, out, part=(0, 3)).packed > 0
        assert pack_tiny(tree, out, part=(2, 3)).packed > 0
        holder.communicate("\n")
    assert pack_tiny(tree, out, part=(1, 3)).finished
    assert hashes(out) == whole


def test_a_requeued_part_waits_for_the_lock_of_a_node_that_died(
    tree: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    folder = pack_folder.PackFolder(out, read_split(tree), Settings((16, 16), "jpeg", 95, 3))
    folder.begin(parts=1)
    lock = out / pack_folder.Part(0, 1).lock_name
    refusals: list[Path] = []
    with locked_elsewhere(lock) as holder:

        def try_lock(path: Path, *arguments: Any, **options: Any) -> ExclusiveLock:
            try:
                return ExclusiveLock(path, *arguments, **options)
            except InputError:
                refusals.append(path)
                holder.communicate("\n")  # the lease of the dead node ends
                raise

        monkeypatch.setattr(pack_folder, "ExclusiveLock", try_lock)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert pack_tiny(tree, out, part=(0, 1)).finished
    assert refusals == [lock]
    assert hashes(out) == whole


def test_of_parts_that_end_together_one_finishes(
    tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    results = [end(process) for process in [start(tree, out, "--part", f"{i}/4") for i in range(4)]]
    assert any(result["finished"] for result in results)
    assert hashes(out) == whole


def test_a_machine_that_encodes_otherwise_is_refused_and_both_are_named(
    tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack_tiny(tree, out, part=(0, 2))
    marker = out / pack_folder.UNFINISHED
    content = json.loads(marker.read_text())
    for name, value in {"sha256": "0" * 64, "versions": {"torch": "1.0"}}.items():
        theirs = {**content["encoder"], name: value, "machine": "node-a (a CPU without AVX2)"}
        marker.write_text(json.dumps({**content, "encoder": theirs}))
        before = hashes(out)
        result = call("pack", "--data", tree, "--out", out, *ARGUMENTS, "--part", "1/2")
        ours = encoder_fingerprint(Settings((16, 16), "jpeg", 95, 3)).machine
        assert_one_line(result, 2, "node-a (a CPU without AVX2)", ours, "other bytes")
        assert hashes(out) == before


def test_the_fingerprint_depends_on_what_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg, raw = Settings((64, 64), "jpeg", 95, 3), Settings((64, 64), "raw", 95, 3)
    original = Settings(None, "jpeg", 95, 3)
    ours = {settings: encoder_fingerprint(settings) for settings in (jpeg, raw, original)}
    assert len({fingerprint.sha256 for fingerprint in ours.values()}) == 3
    assert all(encoder_fingerprint(settings) == ours[settings] for settings in ours)
    image, alpha = synthetic_picture()
    assert len(set(image.reshape(-1, 3).sum(1).tolist())) > 200
    assert {int(alpha.min()), int(alpha.max())} == {0, 255}
    from portrait_dist.data.shards import encode

    resize = encode.resize_image
    monkeypatch.setattr(encode, "resize_image", lambda *a: resize(*a) ^ 1)  # rounds otherwise
    for settings in (jpeg, raw):
        assert not encoder_fingerprint(settings).same_bytes(ours[settings])


def test_finish_names_missing_shards_and_their_parts_and_does_not_hash_again(
    tree: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for part in (0, 1):
        pack_tiny(tree, out, part=(part, 3))
    arguments = ("pack", "--data", tree, "--out", out, *ARGUMENTS, "--finish")
    assert_one_line(
        call(*arguments), 2, "5 of 15 shards", "train-00002.tar (part 2/3)", "test-00001.tar"
    )
    assert not (out / "manifest.json").exists()
    result = pack_tiny(tree, out, part=(2, 3))
    assert result.finished
    hashed: list[object] = []
    digest = hashlib.file_digest

    def count(*arguments: Any) -> Any:
        hashed.append(arguments)
        return digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", count)
    assert call(*arguments).exit_code == 0
    assert pack_tiny(tree, out).packed == 0
    assert not hashed
    assert call(*arguments, "--check").exit_code == 0
    assert len(hashed) == 15
    assert hashes(out) == whole


def test_finish_finds_a_shard_that_was_cut_or_changed(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_tiny(tree, out)
    tar = out / "val-00001.tar"
    flip_bit(tar, 600)
    arguments = ("pack", "--data", tree, "--out", out, *ARGUMENTS, "--finish")
    assert_one_line(call(*arguments), 2, "1 of 15 shards", "val-00001.tar")
    index = tar.with_suffix(".index").stat()
    os.utime(tar, ns=(index.st_atime_ns, index.st_mtime_ns))  # now only a hash tells
    assert_one_line(call(*arguments, "--check"), 2, "1 of 15 shards", "val-00001.tar")
    assert pack_tiny(tree, out, check=True).packed == 2
    assert call(*arguments, "--check").exit_code == 0
    cut(tar, -512)
    os.utime(tar, ns=(0, 0))  # now only its length tells
    assert_one_line(call(*arguments), 2, "1 of 15 shards", "val-00001.tar")
    assert pack_tiny(tree, out).packed == 2


def test_the_part_is_what_slurm_or_torchrun_say(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("pack", "--data", tree, "--out", tmp_path / "out", *ARGUMENTS, "--json")
    assert_one_line(call(*arguments, "--part", "auto"), 2, "--part auto", "give --part I/N")
    for name, value in {"RANK": "1", "WORLD_SIZE": "5"}.items():
        monkeypatch.setenv(name, value)
    assert call(*arguments, "--part", "auto").json["part"] == "1/5"
    for name, value in {"SLURM_PROCID": "2", "SLURM_NTASKS": "5"}.items():
        monkeypatch.setenv(name, value)
    assert call(*arguments, "--part", "auto").json["part"] == "2/5"
    array = {"ID": "10", "MIN": "4", "STEP": "2", "COUNT": "5"}
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert call(*arguments, "--part", "auto").json["part"] == "3/5"
    for wrong in ("5/5", "-1/5", "a/b", "1", "٠/٥", "0/0"):
        assert_one_line(call(*arguments, "--part", wrong), 2, "--part")
    assert_one_line(call(*arguments, "--part", "0/5", "--finish"), 2, "--part with --finish")


def test_a_failed_part_names_its_pair_and_leaves_the_others_alone(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "data", {"train": [f"p-{i}" for i in range(6)]})
    out = tmp_path / "out"
    bad = tree / "train" / "p-5.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:-30])
    arguments = ("pack", "--data", tree, "--out", out, *ARGUMENTS)
    assert_one_line(call(*arguments, "--part", "1/2"), 3, str(bad))
    assert call(*arguments, "--part", "0/2").exit_code == 0
    assert not list(out.glob("*.lock"))
    bad.write_bytes(content)
    assert call(*arguments, "--part", "1/2", "--json").json["finished"]


def test_one_of_many_that_create_a_file_makes_it(tmp_path: Path) -> None:
    made: list[int] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        if create_text(tmp_path / "file", str(number)):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() == str(made[0])
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_files_of_dead_processes_are_abandoned(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = temporary_path(tmp_path).name.split("-")[1]
    names = {
        "ours": f".tmp-{host}-{os.getpid()}-999",
        "dead": f".tmp-{host}-{ended.pid}-0",
        "elsewhere": ".tmp-0123abcd-5-0",
        "elsewhere, old": ".tmp-0123abcd-6-0",
        "old release": ".train-00000.tar.part",
        "no temporary": "train-00000.tar",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"x")
    old = (tmp_path / names["ours"]).stat().st_mtime - 3600
    os.utime(tmp_path / names["elsewhere, old"], (old, old))
    remove_abandoned_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        names[kind] for kind in ("ours", "elsewhere", "no temporary")
    }


def test_a_marker_of_an_older_release_is_taken(
    tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack_tiny(tree, out, part=(0, 2))
    settings = Settings((16, 16), "jpeg", 95, 3)
    (out / pack_folder.UNFINISHED).write_text(json.dumps(settings.to_dict()))
    assert pack_tiny(tree, out).finished
    assert hashes(out) == whole
