"""The kinds of attack.

Each generator draws its cases from the random generator that it gets, so that a seed names a case.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign import odd, servers
from tests.campaign.case import DAMAGED, DONE, INPUT, OTHER, Area, Case, Outcome, command
from tests.campaign.world import SIDE, World, samples


def areas(world: World) -> list[Area]:
    """Every area, for one world of good data."""

    def bound(
        cases: Callable[..., Iterator[Case]],
    ) -> Callable[[Random, Path], Iterator[Case]]:
        return lambda random, folder: cases(world, random, folder)

    return [
        Area("shards", bound(shards)),
        Area("manifest", bound(manifest)),
        Area("raw trees", bound(raw_trees)),
        Area("splits", bound(splits)),
        Area("settings", bound(settings)),
        Area("recipes", bound(recipes)),
        Area("checkpoints", bound(checkpoints)),
        Area("run folders", bound(run_folders)),
        Area("photos", bound(photos)),
        Area("outputs", bound(outputs)),
        Area("full disks", bound(full_disks), needs_root=True),
        Area("servers", bound(hostile_servers)),
        Area("slurm variables", bound(slurm_variables)),
        Area("kills", bound(kills), slow=True),
    ]


def _read_all(world: World, shards: Path | str, cache: Any = None) -> Callable[[], int]:
    """Read every sample; exit code 1 where a sample is not what was packed."""

    def action() -> int:
        import sys

        from portrait_dist.errors import PortraitDistError

        try:
            found = samples(shards, cache)
        except PortraitDistError as error:
            print(f"portrait-dist: {error}", file=sys.stderr)
            return error.exit_code
        if wrong := [key for key in found if world.samples.get(key) != found[key]]:
            print(f"WRONG SAMPLE {wrong[0]}", file=sys.stderr)
            return 99
        return 0 if len(found) == len(world.samples) else 98

    return action


def shards(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Damaged tars, indexes and manifests: named, or harmless, and never another sample."""
    for number in itertools.count():
        copy = odd.copy_tree(world.shards, folder / f"shards{number}")
        names = sorted(path.name for path in copy.iterdir() if path.is_file())
        name = random.choice(names)
        what = odd.damage_file(random, copy / name)
        yield Case(f"read: {what}", _read_all(world, copy))
        if name.endswith((".tar", ".index")):
            yield Case(f"verify: {what}", command("verify", copy), allowed=(INPUT, DAMAGED))
        else:
            yield Case(f"verify: {what}", command("verify", copy))
        shutil.rmtree(copy)


def manifest(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Manifests with values that pack never writes."""
    good = json.loads((world.shards / "manifest.json").read_bytes())
    for number in itertools.count():
        copy = odd.copy_tree(world.shards, folder / f"manifest{number}")
        (copy / "manifest.json").unlink()
        by = random.choice(odd.VALUES)
        if random.random() < 0.05:
            data, what = odd.DEEP, "50,000 levels"
        else:
            data = odd.json_text(odd.replace_somewhere(random, good, by))
            what = f"a value is {str(by)[:30]!r}"
        (copy / "manifest.json").write_bytes(data)
        yield Case(f"manifest: {what}", _read_all(world, copy), checks=(_one_line,))
        shutil.rmtree(copy)


def _one_line(outcome: Outcome) -> str:
    return "a line of over 2,000 characters" if len(outcome.last_line) > 2000 else ""


ODD_FILES: tuple[str, ...] = (
    "empty",
    "text",
    "cut",
    "bomb",
    "grey",
    "palette",
    "sixteen",
    "rgb",
    "jpeg-as-png",
    "png-as-jpeg",
    "other-size",
    "cmyk",
    "loop",
    "fifo",
    "folder",
    "long",
    "newline",
    "dots",
    "unicode",
    "same-stem",
    "missing",
)


def _make_odd_pair(random: Random, image: Path, matte: Path) -> str:
    """Make one file of a pair odd; returns how."""
    import io
    import struct
    import zlib

    from PIL import Image

    what = random.choice(ODD_FILES)
    target = random.choice([image, matte])
    data = target.read_bytes()
    target.unlink()

    def png(mode: str, size: tuple[int, int] = (600, 800)) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        return buffer.getvalue()

    def bomb() -> bytes:
        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0)
        chunk = b"IHDR" + header
        return (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
        )

    simple: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "text": lambda: b"not a picture",
        "cut": lambda: data[: len(data) // 2],
        "bomb": bomb,
        "grey": lambda: png("L"),
        "palette": lambda: png("P"),
        "sixteen": lambda: png("I;16"),
        "rgb": lambda: png("RGB"),
        "jpeg-as-png": lambda: image.read_bytes() if image.exists() else data,
        "png-as-jpeg": lambda: matte.read_bytes() if matte.exists() else data,
        "other-size": lambda: png("RGBA", (601, 800)),
    }
    if what in simple:
        target.write_bytes(simple[what]())
    elif what == "cmyk":
        buffer = io.BytesIO()
        Image.new("CMYK", (600, 800)).save(buffer, "JPEG")
        target.write_bytes(buffer.getvalue())
    elif what == "loop":
        target.symlink_to(target.name)
    elif what == "fifo":
        os.mkfifo(target)
    elif what == "folder":
        target.mkdir()
    elif what == "same-stem":
        target.write_bytes(data)
        other = target.parent.parent / "other"
        other.mkdir(exist_ok=True)
        (other / target.name).write_bytes(data)
    elif what != "missing":
        names = {"long": "n" * 245, "newline": "a\nb", "dots": "a.b.c", "unicode": "ü-文-\udcff"}
        for path, suffix in ((image, ".jpg"), (matte, ".png")):
            content = data if path == target else path.read_bytes()
            if path != target:
                path.unlink()
            os.fsencode(names[what])
            path.with_name(names[what] + suffix).write_bytes(content)
    return f"{what} in place of {target.name}"


def raw_trees(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Raw trees with odd files: prepared without them, or refused by name."""
    for number in itertools.count():
        tree = odd.copy_tree(world.raw, folder / f"raw{number}")
        images = sorted((tree / "clip_img").rglob("*.jpg"))
        what = []
        for image in random.sample(images, random.choice([1, 1, 2])):
            relative = image.relative_to(tree / "clip_img")
            group = Path(str(relative.parent).replace("clip_", "matting_"))
            matte = next((tree / "matting").rglob(image.stem + ".png"), tree / "matting" / group)
            what.append(_make_odd_pair(random, image, matte))
        if random.random() < 0.1:
            (tree / "clip_img" / "clip_loop").symlink_to("clip_loop")
            what.append("a folder that is a link to itself")
        out = folder / f"data{number}"
        yield Case(
            f"prepare: {'; '.join(what)}",
            command("prepare", "--raw", tree, "--out", out),
            folders=(folder,),
        )
        if (out / "split.json").is_file():
            pack = command(
                "pack", "--data", out, "--out", folder / "s", "--size", "32x32", "--workers", 1
            )
            yield Case(f"pack: {'; '.join(what)}", pack, folders=(folder,))
        for path in (tree, out, folder / "s"):
            shutil.rmtree(path, ignore_errors=True)


def splits(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """split.json with odd content."""
    good = json.loads((world.data / "split.json").read_bytes())
    for number in itertools.count():
        data = odd.copy_tree(world.data, folder / f"data{number}")
        (data / "split.json").unlink()
        by = random.choice(odd.VALUES)
        text = (
            odd.DEEP
            if random.random() < 0.05
            else odd.json_text(odd.replace_somewhere(random, good, by))
        )
        (data / "split.json").write_bytes(text)
        pack = command(
            "pack", "--data", data, "--out", folder / "s", "--size", "32x32", "--workers", 1
        )
        yield Case(f"pack: split.json with {str(by)[:30]!r}", pack, folders=(folder,))
        for path in (data, folder / "s"):
            shutil.rmtree(path, ignore_errors=True)


def _setting_names() -> list[str]:
    from portrait_dist import config

    return sorted(config.settings())


TEXTS = (
    "inf",
    "-inf",
    "nan",
    "1e308",
    "1e400",
    "-1",
    "0",
    "x",
    "",
    "true",
    "9" * 40,
    "2147483648",
    "9223372036854775808",
    "٦٤",
    "1_000",
    "0x10",
    " 3",
    "a" * 6000,
    "../..",
    "..",
    "/",
    "a\0b",
    "\udcff",
    "[1,2]",
    "{}",
    "http://[::1",
    "null",
    "~",
    "64x64",
)


def settings(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Values of settings that are out of range, of another type or absurd."""
    names = _setting_names()
    base = [
        "submit",
        "--dry-run",
        f"data.shards={world.shards}",
        f"run.root={folder / 'runs'}",
        "train.batch_size=2",
    ]
    while True:
        name, text = random.choice(names), random.choice(TEXTS)
        yield Case(f"{name}={text[:30]!r}", command(*base, f"{name}={text}"), checks=(_one_line,))


def recipes(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Recipes that are not YAML, not UTF-8, bombs, deep, or of other types."""
    bomb = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}\n"
        for i in range(1, 9)
    )
    fixed = [
        b"\xff\xfe\x00",
        b"train:\n  lr: \x07\n",
        b"[" * 20000,
        bomb.encode(),
        b"a: &x [*x]\n",
        b"train: &t\n  lr: *t\n",
        b"!!python/object/apply:os.system ['touch hacked']\n",
        b"train:\n  lr: 1e-3\n  lr: 2e-3\n",
        b"train: x\n",
        b"- 1\n- 2\n",
        b"",
        b"null\n",
        b"train:\n  lr: {a: 1}\n",
        b"? [1]\n: 2\n",
        b"train:\n\tlr: 1\n",
        b"\0",
    ]
    good = (world.run / "config.yaml").read_bytes()
    for number in itertools.count():
        path = folder / f"recipe{number}.yaml"
        if number < len(fixed):
            path.write_bytes(fixed[number])
        else:
            path.write_bytes(good)
            odd._flip(random, path)
        words = [
            "submit",
            "--dry-run",
            "--recipe",
            path,
            f"data.shards={world.shards}",
            "train.batch_size=2",
        ]
        yield Case(
            f"recipe {number}: {path.read_bytes()[:40]!r}",
            command(*words, f"run.root={folder / 'runs'}"),
            checks=(lambda _: "a tag was executed" if (folder / "hacked").exists() else "",),
        )
        path.unlink()


class _Payload:
    """Executes a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.folder / 'hacked'}",)


def checkpoints(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Checkpoints with odd content: refused in one line, never executed."""
    import torch

    good = torch.load(world.checkpoint, weights_only=True)
    photo = next(iter(sorted(world.photos.iterdir())))
    for number in itertools.count():
        path = folder / f"odd{number}.pth"
        kind = random.random()
        if kind < 0.1:
            path.write_bytes(pickle.dumps({"net": _Payload(folder)}))
            what = "a pickle that executes a command"
        elif kind < 0.3:
            path.write_bytes(world.checkpoint.read_bytes())
            what = odd.damage_file(random, path)
        else:
            by = random.choice(
                [*odd.VALUES, torch.zeros(()), torch.zeros(3), torch.full((2, 2), float("nan"))]
            )
            torch.save(odd.replace_somewhere(random, good, by), path)
            what = f"a value is {str(by)[:30]!r}"
        out = folder / f"out{number}"
        action = random.choice(
            [
                command(
                    "evaluate",
                    "--checkpoint",
                    path,
                    "--data",
                    world.shards,
                    "--device",
                    "cpu",
                    "--workers",
                    0,
                ),
                command(
                    "predict", "--checkpoint", path, photo, "--out", out, "--precision", "fp32"
                ),
            ]
        )
        yield Case(
            f"checkpoint: {what}",
            action,
            checks=(lambda _: "code was executed" if (folder / "hacked").exists() else "",),
            folders=(folder,),
        )
        _remove(path)
        shutil.rmtree(out, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _strict_json(outcome: Outcome) -> str:
    if outcome.code:
        return ""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        json.loads(outcome.stdout, parse_constant=refuse)
    except ValueError as error:
        return f"not JSON: {error}"
    return ""


def run_folders(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Run folders with odd metrics.jsonl and config.yaml: status and report say what they can."""
    events = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    for number in itertools.count():
        run = odd.copy_tree(world.run, folder / f"run{number}")
        file = random.choice(["metrics.jsonl", "metrics.jsonl", "config.yaml"])
        if file == "metrics.jsonl" and random.random() < 0.8:
            by = random.choice(odd.VALUES)
            lines = odd.replace_somewhere(random, events, by)
            (run / file).unlink()
            (run / file).write_bytes(b"\n".join(odd.json_text(line) for line in lines) + b"\n")
            what = f"a value of {file} is {str(by)[:30]!r}"
        else:
            what = odd.damage_file(random, run / file)
        yield Case(f"status: {what}", command("status", "--json", run), checks=(_strict_json,))
        yield Case(
            f"report: {what}",
            command("report", run, "--out", folder / "r.html", "--samples", 0),
            checks=(
                lambda _: (
                    "a script was injected" if "<script>alert" in _text(folder / "r.html") else ""
                ),
            ),
            folders=(folder,),
        )
        shutil.rmtree(run)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def photos(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Folders of photos of which some are odd: the good ones are done."""
    for number in itertools.count():
        copy = odd.copy_tree(world.photos, folder / f"photos{number}")
        victim = copy / "good0.jpg"
        matte = folder / "m.png"
        matte.write_bytes(next((world.raw / "matting").rglob("*.png")).read_bytes())
        what = _make_odd_pair(random, victim, matte)
        out = folder / f"out{number}"
        yield Case(
            f"predict: {what}",
            command(
                "predict",
                "--checkpoint",
                world.checkpoint,
                copy,
                "--out",
                out,
                "--precision",
                "fp32",
            ),
            checks=(lambda _, out=out: _both_done(out),),  # type: ignore[misc]
            folders=(out,),
        )
        for path in (copy, out):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.iterdir():
            if path.name not in ("stdout", "stderr"):
                _remove(path)


def _both_done(out: Path) -> str:
    missing = [n for n in (1, 2) if not (out / f"good{n}.mask.png").is_file()]
    return f"good{missing[0]}.jpg was not done" if missing else ""


def outputs(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Output paths that cannot be written: exit code 2 before the work begins, nothing left."""
    photo = next(iter(sorted(world.photos.iterdir())))
    mine = folder / "file"
    model = ["--checkpoint", world.checkpoint]
    bad = ["file/x", "missing/deep/x", "", "n" * 300, "file"]
    kinds: dict[str, Callable[[str], list[object]]] = {
        "evaluate --per-sample": lambda p: [
            "evaluate",
            *model,
            "--data",
            world.shards,
            "--workers",
            0,
            "--per-sample",
            p,
        ],
        "evaluate --curve": lambda p: [
            "evaluate",
            *model,
            "--data",
            world.shards,
            "--workers",
            0,
            "--curve",
            p,
        ],
        "evaluate --pictures": lambda p: [
            "evaluate",
            *model,
            "--data",
            world.shards,
            "--workers",
            0,
            "--pictures",
            p,
        ],
        "export": lambda p: ["export", *model, "--format", "onnx", "--out", p],
        "report": lambda p: ["report", world.run, "--samples", 0, "--out", p],
        "show": lambda p: ["show", "--data", world.shards, "--out", p],
        "predict": lambda p: ["predict", *model, photo, "--out", p],
        "pack": lambda p: ["pack", "--data", world.data, "--out", p, "--workers", 1],
        "prepare": lambda p: ["prepare", "--raw", world.raw, "--out", p],
    }
    while True:
        name, path = random.choice(sorted(kinds)), random.choice(bad)
        given = path if path in ("", "n" * 300) else str(folder / path)
        mine.write_bytes(b"mine")
        replaced = path == "file" and name not in ("pack", "prepare", "predict", "export")
        yield Case(
            f"{name} {path[:20]!r}",
            command(*kinds[name](given)),
            allowed=(DONE, INPUT),
            checks=() if replaced else (lambda _: _untouched(mine),),
            folders=(folder,),
        )
        for left in folder.iterdir():
            if left.name not in ("stdout", "stderr"):
                _remove(left)


def _untouched(path: Path) -> str:
    return "" if path.is_file() and path.read_bytes() == b"mine" else "my file is gone"


def full_disks(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Disks that fill up: one line, nothing half-written, and done when there is room."""
    disk = folder / "disk"
    disk.mkdir()
    photo = next(iter(sorted(world.photos.iterdir())))
    model = ["--checkpoint", world.checkpoint]
    kinds: dict[str, list[object]] = {
        "pack": [
            "pack",
            "--data",
            world.data,
            "--out",
            disk / "out",
            "--size",
            f"{SIDE}x{SIDE}",
            "--samples-per-shard",
            6,
            "--workers",
            1,
        ],
        "prepare": ["prepare", "--raw", world.raw, "--out", disk / "out", "--mode", "copy"],
        "predict": ["predict", *model, photo, "--out", disk / "out", "--precision", "fp32"],
        "report": ["report", world.run, "--samples", 0, "--out", disk / "out"],
        "evaluate": [
            "evaluate",
            *model,
            "--data",
            world.shards,
            "--workers",
            0,
            "--per-sample",
            disk / "out",
        ],
        "export": ["export", *model, "--format", "onnx", "--out", disk / "out"],
    }
    while True:
        name = random.choice(sorted(kinds))
        kilobytes = random.choice([4, 8, 20, 64, 200])
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "campaign", disk], check=True
        )
        try:
            yield Case(
                f"{name} on {kilobytes} kB",
                command(*kinds[name]),
                allowed=(DONE, OTHER, INPUT),
                folders=(disk,),
            )
            subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
            if name == "predict":
                kinds[name] += ["--force"]  # what was done before the disk was full stays
            yield Case(
                f"{name} again with room", command(*kinds[name]), allowed=(DONE,), folders=(disk,)
            )
            if name == "pack":
                yield Case(
                    f"{name}: same bytes", _same_bytes(world.shards, disk / "out"), allowed=(DONE,)
                )
        finally:
            subprocess.run(["umount", disk], check=True)


def _same_bytes(one: Path, other: Path) -> Callable[[], int]:
    def action() -> int:
        for path in sorted(one.glob("*.tar")) + sorted(one.glob("*.index")):
            if path.read_bytes() != (other / path.name).read_bytes():
                print(f"DIFFERENT BYTES {path.name}")
                return 99
        return 0

    return action


def hostile_servers(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Servers of shards that cut, lie, drip, send too much or redirect."""
    for number in itertools.count():
        way = random.choice(servers.WAYS)
        seed = random.randrange(2**32)
        cache = folder / f"cache{number}"
        outside = folder / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "precious.tar").write_bytes(b"mine")

        def action(way: str = way, seed: int = seed, cache: Path = cache) -> int:
            from portrait_dist.data.shards.cache import Cache, DownloadOptions

            kept = Cache(
                cache, gigabytes=0.002, downloads=DownloadOptions(wait_for_server_seconds=5)
            )
            with servers.serve(world.shards, way, seed) as address:
                return _read_all(world, address, kept)()

        yield Case(
            f"server that {way}",
            action,
            allowed=(DONE, OTHER, INPUT, DAMAGED),
            checks=(
                lambda _: _kept(folder / "outside" / "precious.tar"),
                lambda _, cache=cache: _small(cache),  # type: ignore[misc]
            ),
            seconds=90,
        )
        shutil.rmtree(cache, ignore_errors=True)


def _kept(path: Path) -> str:
    return "" if path.exists() else "a file outside the cache is gone"


def _small(cache: Path) -> str:
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return f"the cache holds {size:,} bytes" if size > 5_000_000 else ""


def slurm_variables(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Variables of SLURM that are not what SLURM sets."""
    good = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "0",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_RESTART_COUNT": "0",
        "SLURM_ARRAY_TASK_ID": "",
        "SLURM_ARRAY_JOB_ID": "",
        "SLURM_JOB_NODELIST": "n1",
        "NPROC_PER_NODE": "1",
        "SLURM_CPUS_ON_NODE": "2",
    }
    while True:
        name = random.choice(sorted(set(good) - {"SLURM_JOB_NODELIST", "SLURM_ARRAY_JOB_ID"}))
        value = random.choice(["x", "-1", "1.5", "2(x2)", "٦", "9" * 30, " ", "0x1", "nan"])

        def action(name: str = name, value: str = value) -> int:
            os.environ.update(good | {name: value, "PATH": "/nonexistent"})
            from portrait_dist.slurm.__main__ import main

            return main(["job", f"data.shards={world.shards}", f"run.root={folder / 'runs'}"])

        yield Case(f"{name}={value[:20]!r}", action, allowed=(OTHER, INPUT))


def kills(world: World, random: Random, folder: Path) -> Iterator[Case]:
    """Two ranks, killed at random moments: in the end the weights of an undisturbed run."""
    from tests.campaign import killing

    reference = killing.finish(world.shards, folder / "undisturbed", random, kills=0)
    for number in itertools.count():
        root = folder / f"killed{number}"

        def action(root: Path = root) -> int:
            return killing.compare(reference, killing.finish(world.shards, root, random, kills=3))

        yield Case("kill -9 of ranks and of torchrun", action, allowed=(DONE,), seconds=900)
        shutil.rmtree(root, ignore_errors=True)
