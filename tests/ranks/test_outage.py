"""A stop signal while a server of shards is away: all ranks save, end, and resume exactly there."""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from portrait_dist.data import build_loader
from portrait_dist.data.shards import writer
from portrait_dist.data.shards.reader import ShardSet
from tests.jobs import lines, train, wait_for
from tests.shard_server import Handler, serving

BATCH, STEPS, SEED = 6, 2, 42


@pytest.fixture(scope="module")
def shards(split_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sample a shard, so that an outage falls between two steps of our choice."""
    folder = tmp_path_factory.mktemp("outage") / "shards"
    writer.pack(split_dir, folder, size=(32, 32), samples_per_shard=1)
    return folder


def shards_of_first_steps(shards: Path) -> set[str]:
    """Names of the shards that two ranks need for their first ``STEPS`` batches."""
    names = [shard.name for shard in ShardSet(shards, "train").shards]
    found = set()
    for rank in (0, 1):
        loader = build_loader(shards, "train", BATCH, SEED, rank=rank, world_size=2)
        for _, (_, samples) in zip(range(STEPS), loader.dataset.batches(0, 0), strict=False):
            found |= {names[sample] for sample in samples}
    return found


def keys_seen(run: Path) -> list[str]:
    """Keys that the ranks trained on, over all starts."""
    return [
        key
        for path in run.glob("keys-rank*.jsonl")
        for line in path.read_text().splitlines()
        for key in json.loads(line)["keys"]
    ]


def digests(run: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.iterdir()
        if path.is_file() and path.name != ".lock"
    }


def test_a_signal_during_an_outage_saves_and_ends_all_ranks_and_no_sample_is_lost(
    shards: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Where it stopped, in the middle of an epoch, other data is refused as at its end."""
    run = tmp_path / "run"
    settings = ["data.log_keys=true", "train.max_epochs=1", f"train.seed={SEED}"]
    settings += [f"data.cache_dir={tmp_path / 'cache'}"]
    here = shards_of_first_steps(shards)

    def away(handler: Handler, name: str) -> bool:
        if name.endswith(".tar") and name not in here:
            handler.send_error(503)
            return True
        return False

    with serving(shards) as server:
        server.instead = away
        address = f"data.shards={server.address}"
        job = train(tmp_path, shards, *settings, f"train.batch_size={BATCH}", address, nproc=2)
        wait_for(
            lambda: len(keys_seen(run)) == 2 * BATCH * STEPS, "the last possible step", job, 400
        )
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.text()
        assert f"waiting for batch {STEPS + 1}, saved in" in job.text()
        stop = lines(run)[-1]
        assert (stop["kind"], stop["step"], stop["requeue"]) == ("stop", STEPS, True)

        before = digests(run)
        other = (f"data.shards={tiny_shards}", f"train.batch_size={2 * BATCH}")
        job = train(tmp_path, shards, *settings, *other, ranks=0)
        assert job.wait() == 2, job.text()
        assert "train split is that of" in job.text()
        assert "Traceback" not in job.text()
        assert digests(run) == before

        server.instead = lambda handler, name: False
        job = train(tmp_path, shards, *settings, f"train.batch_size={BATCH}", address, nproc=2)
        assert job.wait() == 0, job.text()
    assert set(Counter(keys_seen(run)).values()) == {1}
    assert len(keys_seen(run)) == 48 == lines(run, "epoch")[-1]["samples_seen"]
