"""Several processes that write the same output, and processes killed while they write it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from random import Random

from tests.campaign import runs
from tests.campaign.case import DONE, INPUT, Case, clear, command
from tests.campaign.places import same_bytes
from tests.campaign.world import World, pack_words, train_words

Action = Callable[[], int]


def _commands(world: World, out: Path) -> dict[str, tuple[list[object], Action]]:
    """Command lines that write ``out``, each with what must hold when one of them has ended."""
    photos = sorted(world.photos.iterdir())
    model = ["--checkpoint", world.checkpoint]
    predict = ["predict", *model, *photos, "--out", out, "--precision", "fp32", "--force"]
    evaluate = ["evaluate", *model, "--data", world.shards, "--workers", 0]
    return {
        "pack": (pack_words(world.data, out), same_bytes(world.shards, out)),
        "prepare": (
            [
                *("prepare", "--raw", world.raw, "--out", out),
                "--val-fraction",
                0.2,
                "--test-fraction",
                0.2,
                "--seed",
                1,
            ],
            _equal(world.data / "split.json", out / "split.json"),
        ),
        "predict": (predict, _all_there(out, [f"{path.stem}.mask.png" for path in photos])),
        "report": (["report", world.run, "--samples", 0, "--out", out], _all_there(out, [""])),
        "evaluate": ([*evaluate, "--per-sample", out], _all_there(out, [""])),
        "export": (
            ["export", *model, "--format", "onnx", "--out", out, "--force"],
            _all_there(out, [""]),
        ),
        "synth": (
            ["synth", "--out", out, "--pairs", 24, "--seed", 5, "--workers", 1],
            _same_tree(world.raw, out),
        ),
    }


def two_at_once(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Two or three processes with one output: one does it, or all; the output is whole."""
    out = folder / "out"
    kinds = _commands(world, out)
    run = folder / "runs" / "run"
    kinds["train"] = train_words(world.shards, run), runs.same_weights(world.run, run)
    while True:
        name = random.choice(sorted(kinds))
        words, holds = kinds[name]
        number = random.choice([2, 3])
        delays = [random.choice([0.0, random.uniform(0, 1)]) for _ in range(number)]
        yield Case(
            f"{number} times {name} at once",
            _together([command(*words)] * number, delays, holds),
            allowed=(DONE,),
            folders=(folder,),
            cpu_seconds=200,
        )
        clear(folder)


def _together(actions: Sequence[Action], delays: Sequence[float], holds: Action) -> Action:
    """Run actions in forks of their own: all end with 0 or 2, one with 0, and then this holds."""

    def action() -> int:
        children = [_fork(one, delay) for one, delay in zip(actions, delays, strict=True)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if DONE not in codes or set(codes) - {DONE, INPUT}:
            print(f"the processes end with {codes}", file=sys.stderr)
            return 97
        return holds()

    return action


def killed_and_again(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Kill -9 while something is written; the same command again writes the whole."""
    out = folder / "out"
    kinds = _commands(world, out)
    while True:
        name = random.choice(sorted(kinds))
        words, holds = kinds[name]
        moments = [random.uniform(0, 0.8) for _ in range(random.choice([1, 2]))]
        yield Case(
            f"{name} killed {len(moments)} times, then again",
            _killed(command(*words), moments, holds),
            allowed=(DONE,),
            cpu_seconds=200,
            # What a kill leaves beside a single file stays, for nobody owns that folder.
            folders=(out,),
        )
        clear(folder)


def _killed(one: Action, moments: Sequence[float], holds: Action) -> Action:
    def action() -> int:
        for moment in moments:
            child = _fork(one, 0.0)
            time.sleep(moment)  # a random moment is the point
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return one() or holds()

    return action


def _fork(action: Action, delay: float) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        time.sleep(delay)  # the order in which they come is the point
        code = action()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _all_there(out: Path, names: Sequence[str]) -> Action:
    def action() -> int:
        for path in [out / name if name else out for name in names]:
            if not path.is_file() or not path.stat().st_size:
                print(f"MISSING {path}", file=sys.stderr)
                return 96
        return 0

    return action


def _equal(one: Path, other: Path) -> Action:
    def action() -> int:
        if one.read_bytes() != other.read_bytes():
            print(f"DIFFERENT BYTES {other}", file=sys.stderr)
            return 99
        return 0

    return action


def _same_tree(one: Path, other: Path) -> Action:
    def action() -> int:
        for path in sorted(one.rglob("*.jpg")) + sorted(one.rglob("*.png")):
            if code := _equal(path, other / path.relative_to(one))():
                return code
        return 0

    return action
