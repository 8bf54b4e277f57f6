"""Attacks on places: outputs that cannot be written, disks that are full or read-only, names."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from random import Random

from tests.campaign.case import DONE, INPUT, OTHER, Case, Outcome, command
from tests.campaign.inputs import remove
from tests.campaign.world import World, pack_words, train_words

Words = list[object]
FOLDERS = ("pack", "prepare", "predict", "synth", "train")
"""Commands whose output is a folder that they make."""
REPLACE = ("evaluate --per-sample", "evaluate --curve", "evaluate --pictures", "report", "show")
"""Commands that replace their output without being asked."""


def writers(world: World) -> dict[str, Callable[[Path | str], Words]]:
    """Return each command that writes: name → its command line for an output."""
    photo = min(world.photos.iterdir())
    model: Words = ["--checkpoint", world.checkpoint]
    evaluate: Words = ["evaluate", *model, "--data", world.shards, "--workers", 0]
    return {
        "evaluate --per-sample": lambda out: [*evaluate, "--per-sample", out],
        "evaluate --curve": lambda out: [*evaluate, "--curve", out],
        "evaluate --pictures": lambda out: [*evaluate, "--pictures", out],
        "export": lambda out: ["export", *model, "--format", "onnx", "--out", out],
        "report": lambda out: ["report", world.run, "--samples", 0, "--out", out],
        "show": lambda out: ["show", "--data", world.shards, "--samples", 2, "--out", out],
        "predict": lambda out: ["predict", *model, photo, "--out", out, "--precision", "fp32"],
        "pack": lambda out: pack_words(world.data, Path(out)) if out else ["pack", "--out", ""],
        "prepare": lambda out: ["prepare", "--raw", world.raw, "--out", out, "--mode", "copy"],
        "synth": lambda out: ["synth", "--pairs", 3, "--workers", 1, "--out", out],
    }


def _writers_into(world: World, folder: Path) -> dict[str, Words]:
    """Return each command that writes, with an output of the right kind in a folder."""
    return {
        name: words(folder / f"out{SUFFIXES.get(name, '')}")
        for name, words in writers(world).items()
    }


def outputs(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Output paths that cannot be written: exit code 2 before the work begins, nothing left."""
    mine = folder / "file"
    bad = ["file/x", "missing/deep/x", "", "n" * 300, "file", "loop", "loop/x", "dangling", "a\0b"]
    kinds = writers(world)
    while True:
        name, path = random.choice(sorted(kinds)), random.choice(bad)
        given = path if path in ("", "n" * 300) else str(folder / path)
        mine.write_bytes(b"mine")
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to(folder / "nowhere" / "at" / "all")
        yield Case(
            f"{name} {path[:20]!r}",
            command(*kinds[name](given)),
            allowed=(DONE, INPUT),
            checks=() if path == "file" and name in REPLACE else (lambda _: _untouched(mine),),
            folders=(folder,),
        )
        for left in folder.iterdir():
            if left.name not in ("stdout", "stderr"):
                remove(left)


def _untouched(path: Path) -> str:
    return "" if path.is_file() and path.read_bytes() == b"mine" else "my file is gone"


ODD_NAMES = (
    *("with space", "-dash", "--help", "ü-文-😀", "a\nb", "tab\t", "%s {x} $HOME `id`", "*?[x]"),
    *("'quo\"te", "semi;colon&", "a=b", "#hash", "~", ".hidden", "back\\slash", "n" * 200),
    *("\udcff", "e\u0301", "\u202eright-to-left", "trailing.", "CON"),
)
SUFFIXES = {"show": ".png", "export": ".onnx", "report": ".html"}


def names(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Folders and files of odd names, for input and for output: they work like any other."""
    kinds = writers(world)
    while True:
        name, odd_name = random.choice([*kinds, "verify", "chain"]), random.choice(ODD_NAMES)
        home = folder / odd_name
        home.mkdir()
        if name == "verify":
            (home / "shards").symlink_to(world.shards)
            action, out = command("verify", home / "shards"), home / "shards"
        elif name == "chain":
            action, out = _chain(world, home), home / "out"
        else:
            out = home / f"{odd_name}{SUFFIXES.get(name, '')}"
            action = command(*kinds[name](out))
        yield Case(
            f"{name} in {odd_name[:20]!r}",
            action,
            # Bytes that are no UTF-8 may be refused; all else is a name.
            allowed=(DONE, INPUT) if "\udcff" in odd_name else (DONE,),
            checks=(lambda outcome, out=out: _is_there(outcome, out),),  # type: ignore[misc]
            folders=(home,),
        )
        remove(home)


def _chain(world: World, home: Path) -> Callable[[], int]:
    """Prepare, pack and verify within a folder."""

    def action() -> int:
        data, out = home / "data", home / "out"
        steps = [
            command("prepare", "--raw", world.raw, "--out", data),
            command(*pack_words(data, out)),
            command("verify", out),
        ]
        return next((code for code in (step() for step in steps) if code), 0)

    return action


def _is_there(outcome: Outcome, out: Path) -> str:
    return f"{out.name!r} was not written" if not outcome.code and not out.exists() else ""


@contextlib.contextmanager
def mounted(disk: Path, size: str) -> Iterator[None]:
    """Mount a file system of a size on a folder, until the end of the block."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "campaign", str(disk)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        # Lazily: a process that was killed may still be on its way out.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    """Change the size of a mounted file system, or whether it may be written."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def full_disks(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Disks that fill up: one line, nothing half-written, and done when there is room."""
    disk = folder / "disk"
    disk.mkdir()
    out, run = disk / "out", disk / "runs" / "run"
    kinds = _writers_into(world, disk)
    kinds["train"] = train_words(world.shards, run)
    while True:
        name = random.choice([*sorted(kinds), "train"])
        kilobytes = random.choice([4, 8, 20, 64, 200])
        if name == "train":
            kilobytes = random.choice([4, 64, 150, 300, 600, 900])
        with mounted(disk, f"{kilobytes}k"):
            yield Case(
                f"{name} on {kilobytes} kB",
                command(*kinds[name]),
                allowed=(DONE, OTHER, INPUT),
                folders=(disk,),
                cpu_seconds=200,
            )
            remount(disk, "size=100m")
            # What was done before the disk was full stays.
            more = ["--force"] if name in ("predict", "export") else []
            again = command(*kinds[name], *more)
            holds = _as_undisturbed(name, world, out, run)
            yield Case(
                f"{name} again with room after {kilobytes} kB",
                lambda again=again, holds=holds: again() or holds(),  # type: ignore[misc]
                allowed=(DONE,),
                folders=(disk,),
                cpu_seconds=200,
            )


def _as_undisturbed(name: str, world: World, out: Path, run: Path) -> Callable[[], int]:
    if name == "pack":
        return same_bytes(world.shards, out)
    if name == "train":
        from tests.campaign.killing import compare

        return lambda: compare(world.run, run)
    return lambda: 0


def same_bytes(one: Path, other: Path) -> Callable[[], int]:
    """Make the check that two folders hold the same shards."""

    def action() -> int:
        for path in sorted(one.glob("*.tar")) + sorted(one.glob("*.index")):
            if path.read_bytes() != (other / path.name).read_bytes():
                print(f"DIFFERENT BYTES {path.name}", file=sys.stderr)
                return 99
        return 0

    return action


def read_only_disks(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Disks that may not be written: outputs there are refused, data there is read all the same."""
    disk = folder / "disk"
    disk.mkdir()
    refused = _writers_into(world, disk)
    refused["train"] = train_words(world.shards, disk / "runs" / "run")
    while True:
        with mounted(disk, "20m"):
            subprocess.run(["cp", "-r", world.shards, disk / "shards"], check=True)
            subprocess.run(["cp", "-r", world.photos, disk / "photos"], check=True)
            subprocess.run(["cp", "-r", world.run, disk / "run"], check=True)
            remount(disk, "ro")
            name = random.choice(sorted(refused))
            yield Case(f"{name} there", command(*refused[name]), allowed=(INPUT,))
            name, words = random.choice(_readers(world, disk, folder))
            yield Case(f"{name} from there", command(*words), allowed=(DONE,), cpu_seconds=200)
        for left in folder.iterdir():
            if left.name not in ("stdout", "stderr", "disk"):
                remove(left)


def _readers(world: World, disk: Path, folder: Path) -> list[tuple[str, Words]]:
    model: Words = ["--checkpoint", disk / "run" / "ckpt_best.pth"]
    return [
        ("verify", ["verify", disk / "shards"]),
        ("evaluate", ["evaluate", *model, "--data", disk / "shards", "--workers", 0]),
        ("predict", ["predict", *model, disk / "photos", "--out", folder / "out"]),
        ("report", ["report", disk / "run", "--samples", 0, "--out", folder / "r.html"]),
        ("status", ["status", disk / "run"]),
        ("train", train_words(disk / "shards", folder / "runs" / "run")),
        ("show", ["show", "--data", disk / "shards", "--samples", 2, "--out", folder / "s.png"]),
    ]
