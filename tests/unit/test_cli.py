"""The command line: quick to answer, one JSON object, one line and an exit code for each error."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from portrait_dist import cli
from portrait_dist.commands import command
from portrait_dist.errors import DamagedDataError
from tests.cli import Result, assert_one_line, call


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
        "import portrait_dist, portrait_dist.data\n"
        "from portrait_dist.data import build_loader, AISegmentDataset"
    )
    assert "torch" in loaded
    assert not {
        name
        for name in loaded
        if name.startswith(
            ("super_gradients", "torch.distributed.launcher", "torch.distributed.run")
        )
    }


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
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
def test_wrong_input_gets_one_line_and_exit_code_2_and_the_same_as_json(
    arguments: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something.txt").write_text("not ours")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = call(*given)
    assert_one_line(result, 2)
    assert any(part in result.lines[-1] for part in expected.format(tmp=tmp_path).split("|"))
    assert result.stdout == ""
    as_json = call(*given, "--json")
    assert (as_json.exit_code, as_json.lines) == (2, result.lines)
    assert as_json.json["exit_code"] == 2
    assert as_json.json["error"] in result.lines[-1]
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


@dataclass
class Pack:
    """A result as commands return it."""

    folder: Path
    samples: int
    iou: float = float("nan")


def _command_that(action: Callable[[], object]) -> click.Command:
    return command("probe", summary=lambda pack: f"{pack.samples} samples")(action)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call the command line with one command, which does what is given."""

    def run(action: Callable[[], object], *options: str) -> Result:
        monkeypatch.setitem(cli.COMMANDS, "probe", f"{__name__}:chosen")
        monkeypatch.setitem(globals(), "chosen", _command_that(action))
        return call("probe", *options)

    return run


def test_a_dataclass_is_a_result(probe: Callable[..., Result]) -> None:
    def action() -> Pack:
        return Pack(Path("shards"), 3)

    assert probe(action).stdout == "3 samples\n"
    assert probe(action, "--json").json == {"folder": "shards", "samples": 3, "iou": None}


def test_an_error_keeps_its_result_exit_code_and_line(probe: Callable[..., Result]) -> None:
    def action() -> None:
        raise DamagedDataError("a.tar: truncated", result={"ok": False})

    result = probe(action, "--json")
    assert result.json == {"ok": False, "error": "a.tar: truncated", "exit_code": 3}
    assert (result.exit_code, result.lines) == (3, ["portrait-dist: a.tar: truncated"])


def test_a_failed_disk_is_one_line_and_a_bug_keeps_its_traceback(
    probe: Callable[..., Result],
) -> None:
    def disk() -> None:
        raise OSError(errno.EIO, "Input/output error", "/data/a.tar")

    def bug() -> None:
        raise KeyError("epoch")

    def cut_short() -> None:
        raise EOFError("Ran out of input")

    assert_one_line(probe(disk), 1, "/data/a.tar: Input/output error", "--debug")
    debug = probe(disk, "--debug")
    assert debug.exit_code == 1
    assert "Traceback" in debug.stderr
    assert 'raise OSError(errno.EIO, "Input/output error"' in debug.stderr
    with pytest.raises(KeyError, match="epoch"):
        probe(bug)
    with pytest.raises(EOFError, match="Ran out of input"):
        probe(cut_short)


def test_an_interruption_is_one_line_and_exit_code_1(probe: Callable[..., Result]) -> None:
    def action() -> None:
        raise KeyboardInterrupt

    result = probe(action, "--json")
    assert_one_line(result, 1, "interrupted; nothing half-written is left")
    assert result.json["exit_code"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["verify"],
        ["show", "--out", "sheet.png", "--data"],
        ["show", "--data", "SHARDS", "--out"],
        ["pack", "--data", "SPLIT", "--out"],
        ["pack", "--out", "out", "--data"],
        ["prepare", "--raw", "RAW", "--out"],
        ["prepare", "--out", "out", "--raw"],
        ["synth", "--pairs", "1", "--out"],
    ],
)
def test_a_path_that_cannot_be_one_is_wrong_input_for_every_command(
    words: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    for name, fixture in {"SHARDS": "tiny_shards", "SPLIT": "split_dir", "RAW": "raw_tree"}.items():
        if name in words:
            words = [str(request.getfixturevalue(fixture)) if w == name else w for w in words]
    request.getfixturevalue("monkeypatch").chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for path in ("n" * 300, "loop", "loop/x"):
        assert_one_line(call(*words, path), 2)
    assert sorted(os.listdir(tmp_path)) == ["loop"]


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGBUS", "SIGABRT"])
def test_a_native_crash_says_where_also_without_torchrun(number: str) -> None:
    code = (
        "import os, signal; from portrait_dist import cli\n"
        f"cli.run = lambda words: os.kill(os.getpid(), signal.{number}); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Fatal Python error" in done.stderr
    assert 'File "<string>", line 2' in done.stderr
