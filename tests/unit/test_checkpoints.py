"""Checkpoint files: the old or the new one, never half; one door for foreign bytes; no code."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portrait_dist import checkpoints
from portrait_dist.checkpoints import Snapshot
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.models import UNet
from portrait_dist.runs.folder import RunLock
from portrait_dist.training import state as run_state
from portrait_dist.training.averaging import OLD_FILE, AverageOfBest, complete, mean_of_files
from tests.damage import cut, flip_bit
from tests.jobs import largest_difference

WRITER = """
import os, signal, sys, torch
from portrait_dist.checkpoints import save_atomically

def save(number):
    net = {"weight": torch.full((50_000,), number)}
    save_atomically(sys.argv[1], {"net": net, "epoch": int(number)})

save(1.0)
where, call = sys.argv[2], getattr(os, sys.argv[3])

def killed(*args):
    if where == "after":
        call(*args)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, sys.argv[3], killed)
save(2.0)
"""


@pytest.mark.parametrize(
    ("where", "call", "survives"),
    [
        ("before", "fsync", 1),  # the new bytes are in the temporary file, not yet on the disk
        ("after", "fsync", 1),  # on the disk, not yet renamed
        ("before", "replace", 1),
        ("after", "replace", 2),
    ],
)
def test_kill_9_between_write_and_rename_leaves_the_old_or_the_new_checkpoint(
    where: str, call: str, survives: int, tmp_path: Path
) -> None:
    """The writer kills itself at that very call."""
    path = tmp_path / "ckpt_latest.pth"
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), where, call])
    assert done.returncode == -signal.SIGKILL
    state = checkpoints.read(path)
    assert state["epoch"] == survives
    assert bool((state["net"]["weight"] == survives).all()), "weights and number belong together"


def test_a_full_disk_is_one_message_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    """A real full disk where this user may mount one, else a file-size limit of the kernel."""
    path = tmp_path / "disk" / "ckpt_latest.pth"
    path.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path.parent)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
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
                with pytest.raises(PortraitDistError):
                    checkpoints.save_atomically(path, big)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert float(checkpoints.read(path)["net"]["weight"].sum()) == 100_000
        assert [file.name for file in path.parent.iterdir()] == ["ckpt_latest.pth"]
    finally:
        if mounted:
            subprocess.run(["umount", str(path.parent)], check=True)


# One door for foreign bytes ---


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil-was-here",)


def whole() -> dict[str, Any]:
    """A checkpoint as training writes it, with an optimiser that has taken a step."""
    model = UNet(init_features=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.zeros(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    sums = {"loss": torch.zeros(1), "count": 3, "metrics": {"SoftIoU": {"sum": torch.zeros(1)}}}
    return {
        "net": model.state_dict(),
        "acc": 0.5,
        "epoch": 3,
        "metrics": {},
        "packages": {"torch": str(torch.__version__)},
        "optimizer_state_dict": optimizer.state_dict(),
        "scaler_state_dict": {},
        "portrait_dist": {
            **run_state.describe_network(model),
            "size": [32, 48],
            "aspect": 0.75,
            "data": {"train": "ab", "val": "cd"},
            "config": {"train": {"lr": 1e-3}},
            "best_metric": 0.6,
            "samples_seen": 144,
            "world_size": 1,
            "global_batch": 12,
            "ranks": [{**run_state.random_state(), "sums": sums}],
            "position": {"batches": 2, "loader": {"epoch": 3, "samples_seen": 24}},
            "averaged": [{"epoch": 1, "value": 0.4}],
        },
    }


def read_all(path: Path) -> None:
    """Go through the door as prediction does, then as resuming does."""
    checkpoints.load_model(path)
    checkpoints.check_resumable(checkpoints.read(path), path)


def test_what_a_checkpoint_says_is_typed_and_what_it_does_not_say_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoints.save_atomically(path, whole())
    info = checkpoints.read_info(path)
    assert (info.size, info.aspect, info.epoch, info.batches) == ((32, 48), 0.75, 3, 2)
    assert info.network == "portrait_dist.models.unet.UNet"
    assert info.model == UNet(init_features=2).settings
    assert info.data == {"train": "ab", "val": "cd"}
    assert info.averaged == (Snapshot(1, 0.4),)
    assert (info.samples_seen, info.world_size, info.global_batch) == (144, 1, 12)
    torch.save({"net": UNet(init_features=2).state_dict()}, path)
    info = checkpoints.read_info(path)
    assert (info.size, info.aspect, info.model, info.epoch, info.averaged) == (None,) * 5
    model, _ = checkpoints.load_model(path)
    assert model.settings == UNet(init_features=2).settings, "the weights themselves say it"


def at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replace one entry of a checkpoint."""

    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


SIZES: list[Any] = [[64], [0, 0], [65, 65], 5, [10**7, 10**7], [True, 16], ["a", "b"], {}]
WRONG_MODEL = [
    at("net", value=[1, 2]),
    at("net", value={"weight": 3}),
    at("net", value={}),
    at("net", "encoder1.enc1conv1.weight", value=torch.tensor(1.0)),
    at("net", "encoder1.enc1conv1.weight", value=torch.ones(1).expand(1 << 31, 3, 3, 3)),
    at("ema_net", value={"weight": "x"}),
    at("epoch", value="x"),
    at("epoch", value=2**70),
    at("acc", value=[1]),
    at("packages", value=[1]),
    at("portrait_dist", value=5),
    *[at("portrait_dist", "size", value=size) for size in SIZES],
    *[at("portrait_dist", "aspect", value=aspect) for aspect in ("x", 0.0, -1.0, 1e9, [1])],
    at("portrait_dist", "config", value={"data": {"size": torch.zeros(3)}}),
    at("portrait_dist", "config", value={1: 2}),
    at("portrait_dist", "model", "norm", value=torch.zeros(3)),
    at("portrait_dist", "model", value=7),
    at("portrait_dist", "model", "norm", value="unknown"),
    at("portrait_dist", "model", "init_features", value=2**31),
    at("portrait_dist", "model", "more", value=1),
    at("portrait_dist", "position", value="x"),
    at("portrait_dist", "averaged", value=[{"epoch": "x"}]),
]
WRONG_RUN = [
    at("optimizer_state_dict", value=[]),
    at("optimizer_state_dict", "param_groups", value=3),
    at("optimizer_state_dict", "param_groups", value=[]),
    at("optimizer_state_dict", "param_groups", 0, "params", value=["a"]),
    at("optimizer_state_dict", "param_groups", 0, "amsgrad", value={}),
    at("optimizer_state_dict", "param_groups", 0, "lr", value="x"),
    at("optimizer_state_dict", "param_groups", 0, "betas", value=0.9),
    at("optimizer_state_dict", "param_groups", 0, "more", value={"a": {1, 2}}),
    at("optimizer_state_dict", "state", value=[1]),
    at("optimizer_state_dict", "state", 0, value=4),
    at("optimizer_state_dict", "state", 0, "exp_avg", value="x"),
    at("optimizer_state_dict", "state", 0, "exp_avg_sq", value=65),
    at("scaler_state_dict", value=1),
    at("portrait_dist", "ranks", value=3),
    at("portrait_dist", "ranks", value=[1]),
    at("portrait_dist", "ranks", 0, "python", value={}),
    at("portrait_dist", "ranks", 0, "python", "words", value=torch.zeros(3)),
    at("portrait_dist", "ranks", 0, "python", "gauss", value="x"),
    at("portrait_dist", "ranks", 0, "numpy", "position", value=10**6),
    at("portrait_dist", "ranks", 0, "numpy", "name", value="other"),
    at("portrait_dist", "ranks", 0, "torch", value=torch.zeros(4)),
    at("portrait_dist", "ranks", 0, "sums", "count", value=-1),
    at("portrait_dist", "ranks", 0, "sums", "metrics", value={"a": 1}),
    at("portrait_dist", "position", "loader", value=None),
]


@pytest.mark.parametrize("change", [*WRONG_MODEL, *WRONG_RUN])
def test_an_entry_of_the_wrong_type_or_size_is_one_error_that_names_the_file(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    path = tmp_path / "odd.pth"
    state = copy.deepcopy(whole())
    change(state)
    torch.save(state, path)
    with pytest.raises((InputError, DamagedDataError), match=r"odd\.pth"):
        read_all(path)


def test_settings_in_a_checkpoint_are_plain_values(tmp_path: Path) -> None:
    """A tensor among them could not even be compared with the setting of now."""
    state = copy.deepcopy(whole())
    state["portrait_dist"]["config"] = {"data": {"size": torch.zeros(3)}}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(DamagedDataError, match=r"odd\.pth.*config holds something else"):
        checkpoints.read_info(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.Adafactor(weights),  # its eps is a pair
        lambda weights: torch.optim.Adam(weights, betas=(torch.tensor(0.9), torch.tensor(0.99))),
        lambda weights: torch.optim.SGD(weights, momentum=0.9, nesterov=True, lr=0.1),
    ],
)
def test_options_of_torchs_optimisers_pass_the_door(
    make: Callable[[Any], torch.optim.Optimizer], tmp_path: Path
) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = make([weight])
    weight.sum().backward()
    optimizer.step()
    state = whole() | {"optimizer_state_dict": optimizer.state_dict()}
    checkpoints.save_atomically(tmp_path / "a.pth", state)
    checkpoints.check_resumable(checkpoints.read(tmp_path / "a.pth"), tmp_path / "a.pth")


def test_a_whole_checkpoint_passes_the_door(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoints.save_atomically(path, whole())
    read_all(path)


def test_weights_alone_load_as_a_model_and_cannot_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "hub.pth"
    torch.save({"net": UNet(init_features=2, norm="group").state_dict()}, path)
    assert checkpoints.load_model(path)[0].norm == "group"
    with pytest.raises(
        InputError, match=r"holds no epoch and no optimizer_state_dict.*model\.weights"
    ):
        checkpoints.check_resumable(checkpoints.read(path), path)


def test_truncated_empty_flipped_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pth"
    checkpoints.save_atomically(path, whole())
    size = path.stat().st_size
    expected = checkpoints.load_model(path)[0].state_dict()
    harmless = 0
    for offset in range(100, size, size // 40):
        flip_bit(path, offset, 3)
        with contextlib.suppress(DamagedDataError, InputError):
            found = checkpoints.load_model(path)[0].state_dict()
            # A byte that only fills a gap.
            assert largest_difference(found, expected) == 0
            harmless += 1
        flip_bit(path, offset, 3)
    assert harmless < 20
    checkpoints.load_model(path)
    cut(path, -1000)
    with pytest.raises(DamagedDataError, match=r"ckpt\.pth: .*take another"):
        checkpoints.load_model(path)
    cut(path, 0)
    with pytest.raises(DamagedDataError, match="is empty"):
        checkpoints.load_model(path)
    path.write_text("net: 1")
    with pytest.raises(DamagedDataError, match="read safely"):
        checkpoints.load_model(path)
    torch.save({"net": torch.nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(InputError, match="another model"):
        checkpoints.load_model(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="has no 'net'"):
        checkpoints.load_model(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load_model(tmp_path / "missing.pth")


def test_pipes_devices_and_folders_are_refused_instead_of_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for read in (checkpoints.read, checkpoints.read_info, checkpoints.load_foreign):
            with pytest.raises(InputError, match="is not a file"):
                read(path)


def test_a_checkpoint_file_cannot_execute_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"net": Evil()}))
    torch.save({"net": {}, "extra": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        for read in (checkpoints.load_model, checkpoints.read_info, checkpoints.load_foreign):
            with pytest.raises(DamagedDataError, match=name):
                read(tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()


def test_weights_are_saved_in_nchw_without_prefixes_whatever_the_model_is_wrapped_in(
    tmp_path: Path,
) -> None:
    model = UNet(init_features=2).to(memory_format=torch.channels_last)
    model.compile()
    checkpoints.save_atomically(tmp_path / "a.pth", {"net": model.state_dict()})
    state = torch.load(tmp_path / "a.pth", weights_only=True)["net"]
    assert list(state) == list(UNet(init_features=2).state_dict())
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_one_writer_per_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from portrait_dist.runs.folder import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid}"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()


# The average of the best ---

VALUES = [0.5, 0.7, 0.1, 0.9, 0.7, 0.8, 0.75, 0.2, 0.75]


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def change_in_place(net: torch.nn.Module, epoch: int) -> None:
    """What training does: the same tensors, other numbers."""
    generator = torch.Generator().manual_seed(epoch)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 10.0**-epoch)
            else:
                tensor.fill_(epoch)


def save_epoch(average: AverageOfBest, net: torch.nn.Module, epoch: int, value: float) -> bool:
    """Write what an epoch writes for the average, in its order."""
    if not average.consider(epoch, value):
        return False
    average.save(epoch, {"net": checkpoints.host_copy(net.state_dict()), "epoch": epoch})
    average.write()
    average.discard_others(average.members)
    return True


def test_the_average_is_the_mean_of_the_best_of_one_network_that_changes_in_place(
    tmp_path: Path,
) -> None:
    net, states = network(), {}
    average = AverageOfBest(tmp_path, greater_is_better=True, number=3)
    for epoch, value in enumerate(VALUES, start=1):
        change_in_place(net, epoch)
        states[epoch] = copy.deepcopy(net.state_dict())
        entered = save_epoch(average, net, epoch, value)
        assert entered == (epoch < 8), "the last one only equals the worst of the three"
    best = [4, 6, 7]
    assert [member.epoch for member in average.members] == best
    assert sorted(path.name for path in (tmp_path / "averaging_snapshots").iterdir()) == [
        f"epoch-{epoch}.pth" for epoch in best
    ]
    mean = checkpoints.read(tmp_path / "average_model.pth")["net"]
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            total = sum(states[epoch][name].double() for epoch in best)
            assert torch.equal(tensor, (total / 3).float()), name
        else:
            assert int(tensor) == 7
    average.cleanup()
    assert [path.name for path in tmp_path.iterdir()] == ["average_model.pth"]


def test_tensors_that_are_one_in_a_file_are_averaged_each(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.pth" for number in range(2)]
    for number, path in enumerate(paths):
        tied = torch.full((2,), float(number), dtype=torch.float64)
        torch.save({"net": {"one": tied, "other": tied}}, path)
    mean, _ = mean_of_files(paths)
    assert [tensor.tolist() for tensor in mean.values()] == [[0.5, 0.5]] * 2


def test_a_value_that_is_not_finite_never_enters_the_average(tmp_path: Path) -> None:
    average = AverageOfBest(tmp_path, greater_is_better=True)
    assert not average.consider(1, float("nan"))
    assert not average.consider(1, float("inf"))
    assert average.members == ()


def test_snapshots_of_older_releases_join_the_average_and_foreign_ones_are_named(
    tmp_path: Path,
) -> None:
    net = network()
    change_in_place(net, 1)
    first = copy.deepcopy(net.state_dict())
    old = tmp_path / OLD_FILE
    checkpoints.save_atomically(old, {"snapshots": [{"value": 0.5, "net": first}]})
    average = AverageOfBest(tmp_path, greater_is_better=True)
    average.resume(None)
    change_in_place(net, 2)
    save_epoch(average, net, 9, 0.8)
    mean = checkpoints.read(tmp_path / "average_model.pth")["net"]
    second = net.state_dict()
    weight = "0.weight"
    assert torch.equal(mean[weight], ((first[weight].double() + second[weight]) / 2).float())
    assert not old.exists()

    for content in (b"", b"text", pickle.dumps({"snapshots": [Evil()]})):
        old.write_bytes(content)
        with pytest.raises(DamagedDataError, match=OLD_FILE):
            AverageOfBest(tmp_path, greater_is_better=True).resume(None)
    for wrong in ([1], {"snapshots": 3}, {"snapshots": [{"value": "x", "net": {}}]}):
        torch.save(wrong, old)
        with pytest.raises(DamagedDataError, match=f"{OLD_FILE}: holds no snapshots"):
            AverageOfBest(tmp_path, greater_is_better=True).resume(None)


def test_a_finished_run_that_was_killed_before_its_average_is_completed(tmp_path: Path) -> None:
    """The last checkpoint names a model that the average does not hold yet."""
    net = network()
    average = AverageOfBest(tmp_path, greater_is_better=True)
    for epoch in (1, 2):
        change_in_place(net, epoch)
        average.consider(epoch, 0.1 * epoch)
        average.save(epoch, {"net": checkpoints.host_copy(net.state_dict()), "epoch": epoch})
        if epoch == 1:
            average.write()
    expected = tmp_path / "expected"
    expected.mkdir()
    members = [{"epoch": one.epoch, "value": one.value} for one in average.members]
    latest = {"net": net.state_dict(), "epoch": 2, "portrait_dist": {"averaged": members}}
    checkpoints.save_atomically(tmp_path / "ckpt_latest.pth", latest)
    (tmp_path / "average_model.pth").unlink()
    (tmp_path / "average_model.pth").mkdir()
    with pytest.raises(InputError, match=r"average_model\.pth: is a folder"):
        complete(tmp_path)
    (tmp_path / "average_model.pth").rmdir()
    assert complete(tmp_path), "and the snapshots were still there"
    info = checkpoints.read_info(tmp_path / "average_model.pth")
    assert [one.epoch for one in info.averaged or ()] == [1, 2]
    assert not (tmp_path / "averaging_snapshots").exists()
    assert not complete(tmp_path), "nothing left to do"
