"""Attacks by what a user gives: settings, recipes, checkpoints, run folders, photos, variables."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Generator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign import odd
from tests.campaign.case import INPUT, OTHER, Case, Outcome, command
from tests.campaign.data import make_odd_pair, one_line
from tests.campaign.world import World


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
    "os:system",
    "torch.nn.Nope",
    "../../x.py:Net",
    "sg:nope",
    "package.module:",
)


def settings(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
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
        yield Case(f"{name}={text[:30]!r}", command(*base, f"{name}={text}"), checks=(one_line,))


def submissions(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Jobs around a training with one odd option, as dry runs: one line, nothing executed."""
    model: list[str] = ["--checkpoint", str(world.checkpoint)]
    out, data, shards = str(folder / "out"), str(world.data), str(world.shards)
    run = [f"data.shards={folder / 'shards'}", f"run.root={folder / 'runs'}", "run.name=first"]
    kinds = [
        ["pack", "--parts", "4", "--cpus", "2", "--data", data, "--out", out],
        ["predict", "--parts", "2", *model, str(world.photos), "--out", out],
        ["evaluate", "--nodes", "1", "--cpus", "2", *model, "--data", shards],
        ["pipeline", "--raw", str(world.raw), "--data", out, "--parts", "2", "--nodes", "1", *run],
    ]
    # As paths of photos these two would search the whole machine, however large it is.
    texts = [text for text in TEXTS if text not in ("../..", "/")]
    odd_texts = (*texts, "; touch hacked", "$(touch hacked)", "`touch hacked`", "\n#SBATCH -x")
    while True:
        words = list(random.choice(kinds))
        place = random.randrange(1, len(words) + 1)
        text = random.choice(odd_texts)
        words[place:] = [text, *words[place + random.choice([0, 1]) :]]
        yield Case(
            f"submit {words[0]} with {text[:30]!r}",
            command("submit", *words, "--dry-run"),
            checks=(one_line, lambda _: "executed" if (folder / "hacked").exists() else ""),
        )


def recipes(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
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
            odd.flip(random, path)
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


def checkpoints(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Checkpoints with odd content: refused in one line, never executed."""
    import torch

    good = torch.load(world.checkpoint, weights_only=True)
    photo = next(iter(sorted(world.photos.iterdir())))
    for number in itertools.count():
        path = folder / f"odd{number}.pth"
        kind = random.random()
        if kind < 0.1:
            path.write_bytes(pickle.dumps({"net": odd.Payload(folder / "hacked")}))
            what = "a pickle that executes a command"
        elif kind < 0.2:
            what = _name_code(random, good, path, folder / "hacked")
        elif kind < 0.4:
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
        remove(path)
        remove(folder / "segmentation_models_pytorch.py")
        shutil.rmtree(out, ignore_errors=True)


def _name_code(random: Random, good: dict[str, Any], path: Path, hacked: Path) -> str:
    """Write a checkpoint whose network is a name that leads to code; returns the name."""
    evil = f"import os; os.system('touch {hacked}')"
    # A module in the current folder under the name of a library that may not be installed.
    (hacked.parent / "segmentation_models_pytorch.py").write_text(evil)
    payload = hacked.parent / "payload.pkl"
    payload.write_bytes(pickle.dumps(odd.Payload(hacked)))
    name, args = random.choice(
        [
            ("os:system", {"command": f"touch {hacked}"}),
            ("builtins:exec", {"source": evil}),
            ("subprocess:getoutput", {"cmd": f"touch {hacked}"}),
            ("torch.serialization:load", {"f": str(payload), "weights_only": False}),
            ("segmentation_models_pytorch.Unet", {}),
            (f"{hacked.parent}/segmentation_models_pytorch.py:Unet", {}),
            ("segmentation_models_pytorch.os:system", {"command": f"touch {hacked}"}),
            ("sg:os.system", {"command": f"touch {hacked}"}),
        ]
    )
    build = {"name": name, "args": args, "output": "logits", "stride": 16}
    import torch

    torch.save({**good, "portrait_dist": {**good["portrait_dist"], "build": build}}, path)
    return f"its network is {name}"


def remove(path: Path) -> None:
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


def run_folders(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
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


def photos(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Folders in which some photos are odd: the others are processed."""
    for number in itertools.count():
        copy = odd.copy_tree(world.photos, folder / f"photos{number}")
        victim = copy / "good0.jpg"
        matte = folder / "m.png"
        matte.write_bytes(next((world.raw / "matting").rglob("*.png")).read_bytes())
        what = make_odd_pair(random, victim, matte)
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
                remove(path)


def _both_done(out: Path) -> str:
    missing = [n for n in (1, 2) if not (out / f"good{n}.mask.png").is_file()]
    return f"good{missing[0]}.jpg was not done" if missing else ""


def slurm_variables(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
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
