"""Attacks on data: shards, manifests, raw trees, splits."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Generator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign import odd
from tests.campaign.case import DAMAGED, INPUT, Case, Outcome, clear, command
from tests.campaign.world import World, samples


def read_all(world: World, shards: Path | str, cache: Any = None) -> Callable[[], int]:
    """Read every sample; exit code 1 where a sample is not what was packed."""

    def action() -> int:

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


def shards(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Damaged tars, indexes and manifests: named, or harmless, and never another sample."""
    for number in itertools.count():
        copy = odd.copy_tree(world.shards, folder / f"shards{number}")
        names = sorted(path.name for path in copy.iterdir() if path.is_file())
        name = random.choice(names)
        what = odd.damage_file(random, copy / name)
        yield Case(f"read: {what}", read_all(world, copy))
        if name.endswith((".tar", ".index")):
            yield Case(f"verify: {what}", command("verify", copy), allowed=(INPUT, DAMAGED))
        else:
            yield Case(f"verify: {what}", command("verify", copy))
        shutil.rmtree(copy)


WEIGHTS = (
    "0",
    "-1",
    "nan",
    "inf",
    "1e3",
    "0.0000000001",
    "0.3",
    "9" * 40,
    ".",
    "",
    ":1",
    "x",
    "٣",
    "1",
)


def shard_sets(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Lists of shard sets with odd weights, names and commas: refused, or every sample once."""
    for number in itertools.count():
        weight, end = (
            random.choice(WEIGHTS),
            random.choice(["", ",", ",s3://", f",{folder}/none:1"]),
        )
        sets = f"{world.shards}:{weight}{end}"
        yield Case(f"sets :{weight[:12]}{end[:8]}", read_all(world, sets), checks=(one_line,))
        copy = odd.copy_tree(world.shards, folder / f"set{number}")
        twice = f"{world.shards}:{weight},{copy}"
        yield Case("the same set twice", read_all(world, twice), allowed=(INPUT,))
        shutil.rmtree(copy)


def _as_foreign(shards: Path, tar: Path, odd_name: Callable[[str], str]) -> None:
    """Write the members of packed shards into one tar, its last one under an odd name."""
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as out:
        for stored in sorted(shards.glob("*.tar")):
            with tarfile.open(stored) as packed:
                for member in packed:
                    data = packed.extractfile(member)
                    member.name = member.name.rpartition("/")[2]
                    out.addfile(member, data)
        member.name = odd_name(member.name)
        out.addfile(member, io.BytesIO(bytes(member.size)))


ODD_NAMES: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    str.upper,
    "../{}".format,
    "/{}".format,
    "a\n{}".format,
    lambda name: name + "/",
    lambda name: "readme",
    lambda name: "notes.txt",
)


def foreign_tars(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Tars of others that are damaged or have an odd member: named, or harmless."""
    for number in itertools.count():
        tar = folder / f"tars{number}" / "train-0.tar"
        what = "an odd member"
        if random.random() < 0.3:
            _as_foreign(world.shards, tar, random.choice(ODD_NAMES))
        else:
            _as_foreign(world.shards, tar, lambda name: "notes.txt")
            what = odd.damage_file(random, tar)

        def action(tars: Path = tar.parent) -> int:
            os.environ["XDG_CACHE_HOME"] = str(tars.parent / "cache")
            return command("verify", tars)()

        yield Case(f"a foreign tar: {what}", action, checks=(one_line,), folders=(tar.parent,))
        shutil.rmtree(tar.parent, ignore_errors=True)


def manifest(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
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
        yield Case(f"manifest: {what}", read_all(world, copy), checks=(one_line,))
        shutil.rmtree(copy)


def one_line(outcome: Outcome) -> str:
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


def make_odd_pair(random: Random, image: Path, matte: Path) -> str:
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


def raw_trees(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Raw trees with odd files: prepared without them, or refused by name."""
    for number in itertools.count():
        tree = odd.copy_tree(world.raw, folder / f"raw{number}")
        images = sorted((tree / "clip_img").rglob("*.jpg"))
        what = []
        for image in random.sample(images, random.choice([1, 1, 2])):
            relative = image.relative_to(tree / "clip_img")
            group = Path(str(relative.parent).replace("clip_", "matting_"))
            matte = next((tree / "matting").rglob(image.stem + ".png"), tree / "matting" / group)
            what.append(make_odd_pair(random, image, matte))
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


def splits(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
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


def lists(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Lists of pairs and split files with odd lines, paths, bytes and sizes."""
    pairs = _pairs(world)
    while True:
        path = folder / f"list{random.choice(['.csv', '.tsv', '.jsonl'])}"
        path.write_bytes(_list_text(random, pairs, path.suffix))
        what = _spoil_list(random, path)
        out = folder / "data"
        words: list[object] = ["prepare", "--raw", path, "--out", out]
        if random.random() < 0.3:
            split = folder / f"split{random.choice(['.json', '.csv'])}"
            keys = {"train": [one.stem for one, _ in pairs[:9]], "val": [pairs[9][0].stem]}
            split.write_bytes(odd.json_text(odd.replace_somewhere(random, keys, "x")))
            what += f"; {odd.damage_file(random, split)}"
            words += ["--split-file", split]
        yield Case(
            f"prepare from {path.name}: {what}",
            command(*words),
            checks=(one_line, lambda _: _nothing_outside(folder, {"data"})),
            folders=(folder,),
        )
        clear(folder)


def _pairs(world: World) -> list[tuple[Path, Path]]:
    images = sorted((world.raw / "clip_img").rglob("*.jpg"))
    return [(image, next((world.raw / "matting").rglob(f"{image.stem}.png"))) for image in images]


def _list_text(random: Random, pairs: list[tuple[Path, Path]], suffix: str) -> bytes:
    splits = [random.choice(["train", "train", "train", "val", "test"]) for _ in pairs]
    rows = [
        [str(image), str(mask), split] for (image, mask), split in zip(pairs, splits, strict=True)
    ]
    if random.random() < 0.7:
        row = random.choice(rows)
        place = random.randrange(3)
        row[place] = random.choice(
            [
                *("", "../../../etc/passwd", "/dev/zero", "http://[::1", "file:///etc/passwd"),
                *("-", "a\0b", "n" * 300, "\u202e", row[(place + 1) % 3], "~/x", "x" * 70_000),
                *("http://127.0.0.1:9/x.jpg", "memory://x", "s3://", ".", "/", '"', "'\n"),
            ]
        )
    if suffix == ".jsonl":
        names = ("image", "mask", "split")
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        if random.random() < 0.3:
            lines.insert(
                random.randrange(len(lines)), random.choice(["[]", "null", "{", '{"a":' * 9000])
            )
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [mark.join(["image", "mask", "split"])] * (random.random() < 0.7)
        lines += [mark.join(row) for row in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _spoil_list(random: Random, path: Path) -> str:
    return odd.damage_file(random, path) if random.random() < 0.4 else "an odd value"


def _nothing_outside(folder: Path, known: set[str]) -> str:
    """Say what was written beside what the case made."""
    own = ("stdout", "stderr", "list.", "split.")
    found = [path.name for path in folder.iterdir() if not path.name.startswith(own)]
    others = [name for name in found if name not in known]
    return f"{others[0]} was written" if others else ""


LAYOUTS = (("images", "masks"), ("img", "alpha"), ("train/images", "train/masks"), ("a b", "ü"))


def layouts(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Folders of other layouts with odd files: prepared, or refused by name."""
    pairs = _pairs(world)[:10]
    while True:
        tree = folder / "tree"
        for part, number in zip(random.choice(LAYOUTS), (0, 1), strict=True):
            (tree / part).mkdir(parents=True)
            for pair in pairs:
                os.link(pair[number], tree / part / pair[number].name)
        victim = random.choice(sorted(path for path in tree.rglob("*") if path.is_file()))
        what = odd.damage_file(random, victim)
        mode = random.choice(["link", "copy", "reference"])
        out = folder / "data"
        prepare = command("prepare", "--raw", tree, "--out", out, "--mode", mode)
        yield Case(f"prepare {mode}: {what}", prepare, folders=(folder,))
        if (out / "split.json").is_file():
            words = ["pack", "--data", out, "--out", folder / "s", "--size", 32, "--workers", 1]
            yield Case(f"pack after prepare {mode}: {what}", command(*words), folders=(folder,))
        clear(folder)
