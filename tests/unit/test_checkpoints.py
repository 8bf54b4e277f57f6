"""Checkpoint files: old or new, never half; no code in them; one writer; a full disk is a message."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from portrait_dist import checkpoints
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.models import UNet
from portrait_dist.training.averaging import AverageOfBest

WRITER = """
import sys, torch
from portrait_dist.checkpoints import save_atomically
number = 0
while True:
    number += 1
    save_atomically(sys.argv[1], {"net": {"weight": torch.full((500_000,), float(number))}, "epoch": number})
    print(number, flush=True)
"""


def test_kill_9_at_any_moment_of_writing_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ckpt_latest.pth"
    for moment in (0.0, 0.002, 0.005, 0.013):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        printed = [int(line) for line in process.stdout.read().split() if line.isdigit()]
        process.wait()
        state = checkpoints.read(path)
        number = state["epoch"]
        assert bool((state["net"]["weight"] == number).all()), "weights and number belong together"
        assert number >= (max(printed) if printed else 2)


def test_a_full_disk_is_one_message_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    """A real full disk where this user may mount one, else a file-size limit of the kernel."""
    path = tmp_path / "disk" / "ckpt_latest.pth"
    path.parent.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path.parent)],
            capture_output=True,
        ).returncode
        == 0
    )
    try:
        checkpoints.save_atomically(path, {"net": {"weight": torch.ones(100_000)}})
        big = {"net": {"weight": torch.zeros(2_000_000)}}
        if mounted:
            with pytest.raises(PortraitDistError, match="disk is full"):
                checkpoints.save_atomically(path, big)
        else:
            import resource

            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
            try:
                with pytest.raises(PortraitDistError, match="was not written"):
                    checkpoints.save_atomically(path, big)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert float(checkpoints.read(path)["net"]["weight"].sum()) == 100_000
        assert [file.name for file in path.parent.iterdir()] == ["ckpt_latest.pth"]
    finally:
        if mounted:
            subprocess.run(["umount", str(path.parent)], check=True)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil-was-here",)


def test_a_checkpoint_file_cannot_execute_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"net": Evil()}))
    torch.save({"net": {}, "extra": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(DamagedDataError, match=name):
            checkpoints.load_model(tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()


def test_a_truncated_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pth"
    checkpoints.save_atomically(path, {"net": UNet(init_features=2).state_dict()})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DamagedDataError, match=r"ckpt\.pth"):
        checkpoints.load_model(path)
    torch.save({"net": torch.nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(InputError, match="another model"):
        checkpoints.load_model(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load_model(tmp_path / "missing.pth")


def test_weights_are_saved_in_nchw_without_prefixes_whatever_the_model_is_wrapped_in(
    tmp_path: Path,
) -> None:
    model = UNet(init_features=2).to(memory_format=torch.channels_last)
    model.compile()
    checkpoints.save_atomically(tmp_path / "a.pth", {"net": model.state_dict()})
    state = torch.load(tmp_path / "a.pth", weights_only=True)["net"]
    assert list(state) == list(UNet(init_features=2).state_dict())
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_the_average_of_the_best_is_their_mean_and_survives_a_restart(tmp_path: Path) -> None:
    def net(value: float) -> torch.nn.Module:
        module = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(module.weight, value)
        return module

    average = AverageOfBest(tmp_path, "SoftIoU", greater_is_better=True, number=2)
    average.get_average_model(net(1.0), {"SoftIoU": 0.5})
    average.get_average_model(net(2.0), {"SoftIoU": 0.7})
    again = AverageOfBest(tmp_path, "SoftIoU", greater_is_better=True, number=2)
    assert float(again.get_average_model(net(8.0), {"SoftIoU": 0.1})["weight"]) == 1.5
    assert float(again.get_average_model(net(4.0), {"SoftIoU": 0.9})["weight"]) == 3.0
