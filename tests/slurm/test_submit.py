"""`submit` checks before it queues anything what would fail later."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.config import load
from portrait_dist.errors import InputError
from portrait_dist.slurm.container import Container, container_of, split_arguments
from portrait_dist.slurm.submit import Request, Submission, submit
from portrait_dist.slurm.sweep import split_arguments as split_train_arguments
from portrait_dist.slurm.sweep import task_arguments


def _dry(shards: Path, root: Path, *overrides: str, **request: Any) -> Submission:
    return submit(
        "aisegment_unet",
        [f"data.shards={shards}", f"run.root={root}", *overrides],
        Request(**request),
        dry_run=True,
    )


def test_a_dry_run_shows_the_whole_sbatch_line_and_leaves_nothing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    overrides = ("run.name=first", "train.batch_size=2")
    result = _dry(
        tiny_shards,
        tmp_path / "runs",
        *overrides,
        nodes=2,
        gpus_per_node=8,
        time="8:00:00",
        partition="gpu",
        account="lab",
    )
    options = result.command.split(" ")
    assert options[0] == "sbatch"
    expected = {
        f"--export=ALL,PYTHON={sys.executable}",
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--time=8:00:00",
        "--partition=gpu",
        "--account=lab",
    }
    assert expected | {"--job-name=first", f"--output={tmp_path}/runs/slurm/%j.log"} < set(options)
    assert options[-4:] == [f"data.shards={tiny_shards}", f"run.root={tmp_path}/runs", *overrides]
    assert (result.world_size, result.global_batch, result.steps_per_epoch) == (16, 32, 1)
    assert result.job_id is None
    assert not (tmp_path / "runs").exists()


def test_a_sweep_becomes_an_array_job(tiny_shards: Path, tmp_path: Path) -> None:
    result = _dry(
        tiny_shards, tmp_path, "run.name=s", array=("train.lr=1e-3,3e-4", "train.seed=1,2,3")
    )
    assert "--array=0-5 " in result.command
    assert "--sweep train.lr=1e-3,3e-4 --sweep train.seed=1,2,3" in result.command
    assert "/slurm/%A_%a.log" in result.command
    assert len(set(result.run_dirs)) == 6
    words = shlex.split(result.command)
    own = task_arguments(words[words.index(result.script) + 1 :], 4)
    assert result.run_dirs[4] == str(load(*split_train_arguments(own)).run_dir)
    with pytest.raises(InputError, match=r"train.lr is above 0, not -1"):
        _dry(tiny_shards, tmp_path, array=("train.lr=1e-3,-1",))


def test_a_sweep_is_checked_with_the_runs_that_its_tasks_have(
    tiny_shards: Path, tmp_path: Path
) -> None:
    runs, once = tmp_path / "runs", ("run.name=s", "run.resume=false")
    (runs / "s").mkdir(parents=True)
    (runs / "s" / "ckpt_latest.pth").touch()
    sweep = ("train.seed=1,2",)
    assert len(_dry(tiny_shards, runs, *once, array=sweep).run_dirs) == 2
    (runs / "s-train.seed=2").mkdir()
    (runs / "s-train.seed=2" / "ckpt_latest.pth").touch()
    with pytest.raises(InputError, match=r"s-train.seed=2: the run exists"):
        _dry(tiny_shards, runs, *once, array=sweep)
    with pytest.raises(InputError, match=r"gives a value twice"):
        _dry(tiny_shards, tmp_path, array=("train.seed=1,1",))
    with pytest.raises(InputError, match=r"named by the values of other keys"):
        _dry(tiny_shards, tmp_path, array=("run.name=a,b",))


def test_shards_of_another_size_or_fit_are_said_before_queueing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"packed at 32x32, asked for 64x64"):
        _dry(tiny_shards, tmp_path, "data.size=64")
    with pytest.raises(InputError, match=r"packed with --fit squash, asked for cover"):
        _dry(tiny_shards, tmp_path, "data.fit=cover")


def test_unknown_keys_and_too_large_batches_are_said_before_queueing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"there is no key 'train.lrr'. Did you mean 'train.lr'?"):
        _dry(tiny_shards, tmp_path, "train.lrr=1")
    with pytest.raises(
        InputError,
        match=r"57 training samples do not fill one batch of 64 "
        r"\(4 ranks × train.batch_size=16\)",
    ):
        _dry(tiny_shards, tmp_path, "train.batch_size=16", nodes=4)


def test_shards_that_are_missing_cut_or_not_there_are_named(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"data.shards is not given"):
        submit("aisegment_unet", [], Request(), dry_run=True)
    with pytest.raises(InputError, match="none: there is no such folder"):
        _dry(tmp_path / "none", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_shards, copy)
    os.truncate(copy / "train-00001.tar", 5120)
    with pytest.raises(InputError, match=r"train-00001.tar: 5120 bytes, the manifest says \d+"):
        _dry(copy, tmp_path)
    (copy / "train-00001.tar").unlink()
    with pytest.raises(InputError, match=r"train-00001.tar: missing or not readable"):
        _dry(copy, tmp_path)


def test_a_run_folder_that_cannot_be_used_is_said_before_queueing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"file is not a folder you can write to; choose another run.root"
    ):
        _dry(tiny_shards, tmp_path / "file" / "runs")
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "ckpt_latest.pth").touch()
    with pytest.raises(InputError, match=r"the run exists and run.resume=false"):
        _dry(tiny_shards, tmp_path / "runs", "run.name=old", "run.resume=false")


def test_a_container_sees_the_folders_that_the_job_names_at_their_own_paths(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work := tmp_path / "work").mkdir()
    (photos := tmp_path / "photos").mkdir()
    (work / "linked").symlink_to(photos)
    monkeypatch.chdir(work)
    image = "docker://site/portrait-dist:0.2.0"
    overrides = ("run.name=first", "train.batch_size=2", f"data.shards={tiny_shards}")
    result = _dry(tiny_shards, tmp_path / "runs", *overrides, container=image, mounts=("linked",))
    words = shlex.split(result.command)
    ours = words[words.index(result.script) + 1 :]
    container, rest = split_arguments(ours)
    assert rest == ours[ours.index("--recipe") :]
    # Not run.root, which does not exist yet: the folder that it will be made in, with all others.
    assert container == Container(image, tuple(sorted([str(tmp_path), str(tiny_shards)])))
    apart = container_of(image, ["linked"], [f"run.root={work}/runs", "train.lr=1", "-x", "s3://b"])
    assert apart == Container(image, (str(photos), str(work))), "what a link leads to is there too"
    for one in ("run.root=../photos/new/runs", "run.root=linked/new", "--out=../photos/new/*.jpg"):
        outside = container_of(image, [], [one, "../" + "x" * 5000])
        assert outside == Container(image, (str(tmp_path),)), one
    assert container.python(8) == [
        f"--container-image={image}",
        f"--container-mounts={','.join(f'{path}:{path}' for path in container.mounts)}",
        f"--container-workdir={work}",
        "--no-container-entrypoint",
        "python",
    ]


def test_a_container_sees_the_folder_of_each_shard_set_of_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work", "one", "two", "three"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    tars = f"{tmp_path}/three#image=jpg+mask=png"
    sets = f"data.shards={tmp_path}/one:1,{tmp_path}/two:0.3,{tars}:2,s3://b/c"
    container = container_of("docker://site/x", [], [sets, "train.lr=1,nan:-1", "x" * 5000])
    assert container is not None
    assert [Path(path).name for path in container.mounts] == ["one", "three", "two", "work"]


def test_a_sif_file_is_for_apptainer_which_looks_for_a_driver_where_there_are_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.sif").touch()
    container = container_of("here.sif", [], [])
    assert container == Container(f"{tmp_path}/here.sif", (str(tmp_path),))
    options = ["--bind", str(tmp_path), "--pwd", str(tmp_path), f"{tmp_path}/here.sif", "python"]
    assert container.python(0) == ["apptainer", "exec", *options]
    assert container.python(2) == ["apptainer", "exec", "--nv", *options]


def test_an_image_or_a_folder_for_it_that_is_not_there_is_said_before_queueing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    fits = ("train.batch_size=2",)
    with pytest.raises(InputError, match=r"--container \S+/no.sif: there is no such file"):
        _dry(tiny_shards, tmp_path, *fits, container=f"{tmp_path}/no.sif")
    with pytest.raises(InputError, match=r"--mount /nowhere: there is no such folder"):
        _dry(tiny_shards, tmp_path, *fits, container="site/image", mounts=("/nowhere",))
    with pytest.raises(InputError, match=r"--mount /shared: it goes with --container"):
        _dry(tiny_shards, tmp_path, *fits, mounts=("/shared",))
    (odd := tmp_path / "a,b").mkdir()
    with pytest.raises(InputError, match="no folder with ',' or ':' in its name"):
        _dry(tiny_shards, tmp_path, *fits, container="site/image", mounts=(str(odd),))


def test_without_slurm_submit_says_where_to_go(tiny_shards: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "portrait_dist",
        "submit",
        f"data.shards={tiny_shards}",
        f"run.root={tmp_path}/runs",
    ]
    done = subprocess.run(
        command, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sbatch is not here" in done.stderr
    assert not (tmp_path / "runs").exists()
