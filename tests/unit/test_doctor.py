"""``doctor`` finds common problems and says what to do; ``completion`` works in a real shell."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from portrait_dist.cli import portrait_dist
from portrait_dist.commands.completion import SHELLS, script
from portrait_dist.system.doctor import Check, gpu, machine, run_checks, software, storage
from tests.cli import call_process


def test_doctor_examines_this_machine_names_what_fails_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    done = call_process("doctor", "--json", "--path", tmp_path, "--shards", tmp_path / "nowhere")
    result = done.json
    names = [check["name"] for check in result["checks"]]
    assert {
        "python",
        "packages",
        "training",
        "gpu",
        "processes",
        "memory",
        "file handles",
        "disk",
        "shards",
    } <= set(names)
    assert len(set(names)) == len(names)
    assert all(check["status"] in ("ok", "warn", "fail") for check in result["checks"])
    assert all(bool(check["advice"]) == (check["status"] != "ok") for check in result["checks"])
    assert [check["name"] for check in result["checks"] if check["status"] == "fail"] == ["shards"]
    assert (result["ok"], done.exit_code) == (False, 1)
    assert "shards failed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_shortened_shard_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    whole = storage.check_shards(str(shards))
    assert whole.status == "ok"
    assert "train 57, val 7, test 7" in whole.found
    os.truncate(shards / "train-00001.tar", 1000)
    found = storage.check_shards(str(shards))
    assert found.status == "fail"
    assert "train-00001.tar has 1000 bytes" in found.found
    (shards / "train-00001.tar").unlink()
    assert "train-00001.tar is missing" in storage.check_shards(str(shards)).found
    assert storage.check_shards(str(tmp_path)).status == "fail"


def test_a_sample_with_changed_bytes_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    data = bytearray((shards / "val-00000.tar").read_bytes())
    data[700] ^= 255
    (shards / "val-00000.tar").write_bytes(data)
    found = storage.check_shards(str(shards))
    assert found.status == "fail"
    assert "val-00000.tar, sample 0" in found.found


@pytest.fixture
def handles() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("handles")
def test_few_file_handles_are_found() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit, status in ((1024, "ok"), (512, "warn"), (200, "fail")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        found = machine.check_file_handles()
        assert (found.status, found.found.split()[0]) == (status, str(limit))
        assert ("ulimit -n" in found.advice) == (status != "ok")


def test_a_folder_that_cannot_be_written_is_a_failure() -> None:
    found = storage.check_disk(Path("/proc/sys"), size=1 << 20)
    assert found.status == "fail"
    assert "--path" in found.advice
    assert storage.check_locks(Path("/proc/sys")).status == "fail"


def test_a_folder_still_to_be_made_is_measured_where_it_will_be(tmp_path: Path) -> None:
    assert str(tmp_path) in storage.check_disk(tmp_path / "runs" / "first", size=1 << 20).found
    assert list(tmp_path.iterdir()) == []


def test_no_shared_memory_is_found(tmp_path: Path) -> None:
    assert machine.check_shared_memory(tmp_path / "shm").status == "warn"


def test_a_gpu_that_is_asked_for_and_missing_is_a_failure() -> None:
    import torch

    status = gpu.check_gpu(required=True).status
    assert status in (("ok", "warn") if torch.cuda.is_available() else ("fail",))


def test_a_driver_with_gpus_hidden_from_torch_differs_from_no_driver(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86\n")
    program.chmod(0o755)
    code = (
        "from portrait_dist.system.doctor.gpu import check_gpu; check = check_gpu(); "
        "print(check.status, check.found, check.advice)"
    )
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("fail")
    assert "CUDA_VISIBLE_DEVICES" in done.stdout or "a build for CPUs" in done.stdout


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    found = storage.check_locks(tmp_path)
    assert (found.status, "no locks" in found.found) == ("warn", True)


def test_a_package_that_is_only_importable_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without network has the packages in a folder on PYTHONPATH, and still trains."""

    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    found = software.check_packages()
    assert (found.status, "importable, not installed" in found.found) == ("warn", True)


def test_a_check_that_breaks_is_a_finding_and_the_others_still_run() -> None:
    def broken() -> Check:
        raise RuntimeError("no such thing")

    found = list(run_checks({"first": broken, "second": lambda: Check("second", "ok", "")}))
    assert (found[0].name, found[0].status) == ("first", "fail")
    assert "no such thing" in found[0].found
    assert found[1].status == "ok"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_the_script_of_each_shell(shell: str) -> None:
    assert "_PORTRAIT_DIST_COMPLETE" in script(shell, portrait_dist)
    assert "portrait-dist" in script(shell, portrait_dist)


def test_bash_puts_no_space_behind_a_key() -> None:
    """The line is patched into click's template: a template that changed would lose it silently."""
    assert "[[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace" in script("bash", portrait_dist)


def complete(*typed: str) -> list[str]:
    """Return what a real bash offers for the last argument."""
    done = call_process("completion", "bash")
    assert done.exit_code == 0, done.stderr
    listed = " ".join(f"'{argument}'" for argument in typed)
    lines = [
        done.stdout,
        f"COMP_WORDS=({listed})",
        f"COMP_CWORD={len(typed) - 1}",
        "_portrait_dist_completion portrait-dist",
    ]
    lines.append('printf "%s\\n" "${COMPREPLY[@]}"')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    asked = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    return asked.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes_commands_and_options() -> None:
    assert complete("portrait-dist", "doc") == ["doctor"]
    assert "--shards" in complete("portrait-dist", "doctor", "--")


def test_keys_and_their_values_are_completed() -> None:
    import click

    from portrait_dist.commands.completion import complete_setting

    command = click.Command("train", params=[click.Argument(["settings"], nargs=-1)])

    def offered(incomplete: str, *before: str) -> list[str]:
        context = command.make_context("train", list(before), resilient_parsing=True)
        return [item.value for item in complete_setting(context, command.params[0], incomplete)]

    assert offered("train.pre") == ["train.precision="]
    assert "data.shards=" in offered("")
    assert offered("train.precision=b") == ["train.precision=bf16"]
    assert offered("run.resume=") == ["run.resume=true", "run.resume=false"]
    assert offered("b", "train.precision", "=") == ["bf16"]  # as bash splits it
    assert offered("", "train.precision") == ["fp32", "bf16"]
    assert offered("no.such.") == []
