"""New pairs join packed shards; what is there stays where and as it is."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from portrait_dist.data.shards.append import append
from portrait_dist.data.shards.reader import ShardSet, read_manifest
from portrait_dist.data.shards.verify import verify
from portrait_dist.data.shards.writer import PackResult, pack
from portrait_dist.data.stream.dataset import AISegmentIterableDataset
from portrait_dist.errors import DamagedDataError, InputError
from tests.cli import assert_one_line, call
from tests.dying import FILE_OPERATIONS, processes
from tests.jobs import checkpoint, lines, state_of, train_into
from tests.trees import write_tree

PROCESSES = processes(__name__)
OLD = {"train": [f"p-{i:02d}" for i in range(8)], "val": ["q-0", "q-1"], "test": ["r-0"]}
# The grown tree: two old pairs have moved to other splits, one is gone, six are new.
GROWN = {
    "train": [f"p-{i:02d}" for i in range(2, 12)] + ["q-0"],
    "val": ["p-00", "q-1", "q-2"],
    "test": ["r-0", "r-1"],
}


def keys(shards: Path) -> dict[str, list[str]]:
    found = {name: ShardSet(shards, name) for name in ("train", "val", "test")}
    return {name: [one.key(i) for i in range(len(one))] for name, one in found.items()}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def append_tiny(data: Path, out: Path) -> PackResult:
    return append(data, out, size=(16, 16), samples_per_shard=3)


def test_a_worker_process_that_opens_grown_shards_gives_no_other_samples(
    shards: Path, grown: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pack(write_tree(tmp_path / "more", {"train": ["z"], "val": ["y"]}), other, size=(16, 16))
    dataset = AISegmentIterableDataset(f"{shards},{other}", "train", 2)
    sent = pickle.dumps(dataset)
    append_tiny(grown, shards)
    assert len(list(dataset)) == 8, "what was open stays as it was"
    with pytest.raises(InputError, match="have changed since this dataset was made"):
        list(pickle.loads(sent))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("grown") / "data", GROWN)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    pack(write_tree(tmp_path / "data", OLD), out, size=(16, 16), samples_per_shard=3)
    return out


def test_new_pairs_become_new_shards_and_old_samples_stay_in_their_splits(
    shards: Path, grown: Path, tmp_path: Path
) -> None:
    before = {path: path.stat() for path in shards.glob("*-0*")}
    assert b"versions" not in (shards / "manifest.json").read_bytes()
    result = append_tiny(grown, shards)
    assert (result.version, result.packed, result.samples) == (2, 6, 17)
    for path, status in before.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert keys(shards) == {
        "train": [*OLD["train"], "p-08", "p-09", "p-10", "p-11"],
        "val": ["q-0", "q-1", "q-2"],
        "test": ["r-0", "r-1"],
    }
    names = [shard.name for shard in read_manifest(shards).splits["train"].shards]
    assert names == [f"train-0000{number}.tar" for number in range(5)]
    assert verify(shards).ok
    manifest = (shards / "manifest.json").read_bytes()
    again = append_tiny(grown, shards)
    assert (again.version, again.packed) == (2, 0)
    assert (shards / "manifest.json").read_bytes() == manifest
    third = write_tree(tmp_path / "third", {"train": ["z-0"]})
    assert append_tiny(third, shards).version == 3
    assert keys(shards)["train"][-1] == "z-0"
    assert verify(shards).ok


def test_an_earlier_version_is_known_by_its_content(shards: Path, grown: Path) -> None:
    first = {name: ShardSet(shards, name).identity for name in ("train", "val", "test")}
    append_tiny(grown, shards)
    for name, identity in first.items():
        assert ShardSet(shards, name).earlier_identities == [identity]


def append_and_die(data: Path, out: Path, dies_at: int) -> None:
    """Append; SIGKILL itself at the file operation of that number."""
    numbers = itertools.count(1)

    def die(event: str, arguments: tuple[object, ...]) -> None:
        ours = event in FILE_OPERATIONS and str(arguments[0]).startswith(str(out))
        if ours and next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    append_tiny(data, out)


def test_killed_at_any_file_operation_readers_see_one_of_both_versions_and_the_end_is_the_same(
    shards: Path, grown: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(shards, tmp_path / "whole"))
    append_tiny(grown, whole)
    rng, killed = random.Random(1), 0
    for dies_at in rng.sample(range(8, 60), 6):
        out = Path(shutil.copytree(shards, tmp_path / f"killed-{dies_at}"))
        process = PROCESSES.Process(target=append_and_die, args=(grown, out, dies_at))
        process.start()
        process.join(120)
        killed += process.exitcode == -signal.SIGKILL
        assert sum(map(len, keys(out).values())) in (11, 17)
        append_tiny(grown, out)
        assert hashes(out) == hashes(whole)
    assert killed >= 3


@pytest.mark.parametrize(
    "versions",
    [
        [{"train": 3, "val": 1, "test": 1}, {"train": 9, "val": 2, "test": 2}],
        [{"train": 6, "val": 1, "test": 1}, {"train": 5, "val": 2, "test": 2}],
        [{"train": 3}, {"train": 5, "val": 2, "test": 2}],
        [{"train": "3", "val": 1, "test": 1}, {"train": 5, "val": 2, "test": 2}],
        [7],
        "2",
    ],
)
def test_versions_that_do_not_fit_the_shards_are_damage(
    shards: Path, grown: Path, versions: object
) -> None:
    append_tiny(grown, shards)
    path = shards / "manifest.json"
    found = json.loads(path.read_text())
    del found["sha256"]
    path.write_text(json.dumps({**found, "versions": versions}))
    with pytest.raises(DamagedDataError, match="damaged"):
        read_manifest(shards)


def test_what_cannot_be_appended_is_refused_and_nothing_changes(
    shards: Path, grown: Path, tmp_path: Path
) -> None:
    before = hashes(shards)
    arguments = ("pack", "--append", "--data", grown, "--out")
    options = ("--size", "16", "--samples-per-shard", "3")
    assert_one_line(call(*arguments, shards), 2, "was packed with --size 16x16, not 256x256")
    assert_one_line(call(*arguments, tmp_path / "none", *options), 2, "no complete shards")
    assert_one_line(call(*arguments, shards, *options, "--part", "0/2"), 2, "--append stands alone")
    assert hashes(shards) == before
    assert call(*arguments, shards, *options, "--json").json["version"] == 2


def test_packing_without_append_never_replaces_the_versions_of_a_folder(
    shards: Path, tmp_path: Path
) -> None:
    """Here keys and order are those of the folder, so nothing else tells the two apart."""
    data = write_tree(tmp_path / "more", OLD | {"train": [*OLD["train"], "z-0"]})
    append_tiny(data, shards)
    before = hashes(shards)
    with pytest.raises(InputError, match="has grown to version 2; add pairs with --append"):
        pack(data, shards, size=(16, 16), samples_per_shard=3)
    assert hashes(shards) == before


def test_a_run_says_which_version_it_saw_and_takes_another_only_on_purpose_between_epochs(
    tiny_shards: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    assert train_into(tmp_path, shards, "train.max_epochs=1").exit_code == 0
    run = tmp_path / "run"
    new = write_tree(tmp_path / "data", {"train": [f"new-{i:02d}" for i in range(19)]})
    append(new, shards, size=(32, 32), samples_per_shard=10)
    before = state_of(run)
    saw = "this run saw version 1 of", str(shards), "now it is version 2"
    refused = train_into(tmp_path, shards, "train.max_epochs=2")
    assert_one_line(refused, 2, *saw, "run.accept_changes=true", "model.weights=")
    assert state_of(run) == before

    accept = ("train.max_epochs=2", "run.accept_changes=true")
    shutil.copytree(run, tmp_path / "middle" / "run")
    state = checkpoint(run)
    position = {"batches": 1, "loader": {"epoch": 0, "samples_seen": 19}}
    state["epoch"], state["portrait_dist"]["position"] = 0, position
    torch.save(state, tmp_path / "middle" / "run" / "ckpt_latest.pth")
    refused = train_into(tmp_path / "middle", shards, *accept)
    assert_one_line(refused, 2, *saw, "stopped in the middle of an epoch", "model.weights=")

    result = train_into(tmp_path, shards, *accept)
    assert result.exit_code == 0, result.stderr
    assert result.json["samples_seen"] == 57 + 76
    assert [line["shards_version"] for line in lines(run, "start")] == [1, 2]


def test_a_run_of_several_sets_says_their_versions_and_names_the_one_that_has_grown(
    tiny_shards: Path, grown: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pack(write_tree(tmp_path / "data", OLD), other, size=(32, 32), samples_per_shard=3)
    sets = f"{tiny_shards},{other}:0.5"
    assert train_into(tmp_path, sets, "train.max_epochs=1").exit_code == 0
    run = tmp_path / "run"
    append(grown, other, size=(32, 32), samples_per_shard=3)
    before = state_of(run)
    # Also on purpose: the order of several sets has no place for a later version.
    for keys in ((), ("run.accept_changes=true",)):
        refused = train_into(tmp_path, sets, "train.max_epochs=2", *keys)
        assert_one_line(
            refused,
            2,
            f"this run saw version 1 of {other}, now it is version 2; a run of several sets",
            "choose another run.name",
        )
        assert str(tiny_shards) not in refused.lines[-1]
    assert state_of(run) == before
    fresh = train_into(tmp_path / "fresh", sets, "train.max_epochs=1")
    assert fresh.exit_code == 0, fresh.stderr
    found = [lines(one, "start")[0]["shards_versions"] for one in (run, tmp_path / "fresh" / "run")]
    assert found == [{"shards": 1, "other": 1}, {"shards": 1, "other": 2}]
