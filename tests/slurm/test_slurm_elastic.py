"""A job that asks for one or two nodes continues on the one that is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.global_batches import GLOBAL_BATCH, KEYS, STEPS, planned_steps, trained_steps
from tests.jobs import PLAIN, checkpoint, lines
from tests.slurm.cluster import LAUNCH, Cluster

EPOCHS = 12
MORE = (
    "model.norm=group",
    f"train.batch_size={GLOBAL_BATCH}",  # one batch for a step on any ranks
    f"train.max_epochs={EPOCHS}",
    "train.save_every_steps=1",
    "train.threads=1",
    "train.average_best=false",
    "train.pictures=0",
)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_that_lost_a_node_goes_on_with_one_and_the_same_global_batches(
    cluster: Cluster, tiny_shards: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "runs" / "run", tmp_path / "log"
    options = ("--nodes=1-2", f"--output={log}", str(LAUNCH / "slurm.sbatch"))
    keys = (f"data.shards={tiny_shards}", f"run.root={tmp_path}/runs", "run.name=run")
    job = cluster.sbatch(*options, "--recipe", PLAIN, *keys, *KEYS, *MORE, cwd=tmp_path)

    def trained_on_two() -> bool:
        found = lines(run, "interval")
        return bool(found) and found[-1]["step"] > 5 and found[-1]["world_size"] == 2

    cluster.until(trained_on_two, 240, "steps on two nodes")
    cluster.lose_node("n1")  # and it stays away
    try:
        ended = cluster.wait(job, 300)
        text = log.read_text(errors="replace")
        assert ended["JobState"] == "COMPLETED", text[-6000:]
        assert int(ended["Restarts"]) >= 1
        starts = [line["world_size"] for line in lines(run, "start")]
        assert (starts[0], starts[-1]) == (2, 1), text[-6000:]
        assert lines(run, "epoch")[-1]["epoch"] == EPOCHS - 1
        assert checkpoint(run)["portrait_dist"]["samples_seen"] == EPOCHS * STEPS * GLOBAL_BATCH
        # What was trained after the last save is trained again, as the same batches.
        trained = {at: sorted(set(one)) for at, one in trained_steps(run, {}, 1).items()}
        assert trained == planned_steps(tiny_shards, EPOCHS), "none skipped, none in another step"
    finally:
        cluster.start_node("n1")
