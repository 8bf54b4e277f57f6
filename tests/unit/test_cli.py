"""The command line: quick to answer, one JSON object, one line and the right exit code for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from portrait_dist import cli

COMMANDS = (
    "quickstart",
    "synth",
    "prepare",
    "pack",
    "verify",
    "show",
    "train",
    "evaluate",
    "predict",
    "export",
    "doctor",
)


def call(*words: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line in this process."""
    capfd.readouterr()
    code = cli.run(list(words))
    out, err = capfd.readouterr()
    return code, out, err


def loaded_after(code: str) -> set[str]:
    """Top-level and torch modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys, json; json.dump(sorted(sys.modules), sys.__stdout__)"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(output[output.index('["') :]))


def test_help_loads_neither_torch_nor_supergradients() -> None:
    """Which is what makes it answer at once."""
    loaded = loaded_after("from portrait_dist import cli; cli.run(['--help'])")
    assert not {"torch", "numpy", "super_gradients", "torchvision"} & loaded


def test_the_data_package_loads_neither_supergradients_nor_the_launcher() -> None:
    loaded = loaded_after(
        "import portrait_dist, portrait_dist.data; from portrait_dist.data import build_loader, AISegmentDataset"
    )
    assert "torch" in loaded
    assert not {
        name
        for name in loaded
        if name.startswith(
            ("super_gradients", "torch.distributed.launcher", "torch.distributed.run")
        )
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(name, "--help", capfd=capfd)
    assert code == 0
    assert "--json" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "Did you mean 'train'"),
        (("train", "train.lrr=1"), "Did you mean 'train.lr'"),
        (("train", "--recipe", "tutoral"), "Did you mean 'tutorial'"),
        (("train", "train.precision=fp8"), "fp32, bf16"),
        (("train", "train.batch_size=0"), "at least 1"),
        (("train", "lr"), "write key=value"),
        (("train",), "data.shards is not given"),
        (("train", "data.shards=/nowhere", "run.root={tmp}"), "/nowhere"),
        (("prepare", "--raw", "/nowhere", "--out", "{tmp}/out"), "/nowhere"),
        (("pack", "--data", "{tmp}", "--out", "{tmp}/out"), "{tmp}"),
        (("evaluate", "--checkpoint", "/nowhere.pth", "--data", "{tmp}"), "/nowhere.pth"),
        (
            ("predict", "--checkpoint", "/nowhere.pth", "/nopicture.jpg", "--out", "{tmp}/p"),
            "nowhere.pth|nopicture",
        ),
        (("quickstart", "--raw", "{tmp}", "--out", "{tmp}/q"), "{tmp}"),
        (("pack", "--nosuch"), "nosuch"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something.txt").write_text("not ours")
    code, out, err = call(*(word.format(tmp=tmp_path) for word in words), capfd=capfd)
    line = err.strip().splitlines()[-1]
    assert code == 2, err
    assert any(part in line for part in said.format(tmp=tmp_path).split("|")), line
    assert "Traceback" not in err
    assert out == ""
    left = {path.name for path in tmp_path.iterdir()} - {
        "something.txt",
        "run",
        "aisegment_unet",
        "runs",
        "q",
    }
    assert not left, "nothing half-written is left behind"


def test_json_is_the_only_thing_on_stdout(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "portrait_dist",
        "synth",
        "--json",
        "--out",
        str(tmp_path / "raw"),
        "--pairs",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["pairs"] == 3
    assert done.stdout.count("\n") == 1


def test_keys_are_listed_with_default_and_meaning(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("train", "--keys", capfd=capfd)
    assert code == 0
    assert "train.batch_size" in out
    assert "data.shards" in out
