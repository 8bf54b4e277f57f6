"""Attacks on runs: kills, and damaged, foreign or littered run folders that are resumed."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from random import Random

from tests.campaign import killing, odd
from tests.campaign.case import DAMAGED, DONE, INPUT, Case, Outcome, command
from tests.campaign.world import World, train_words

FILES = (
    *("ckpt_latest.pth", "ckpt_latest.pth", "ckpt_best.pth", "average_model.pth"),
    *("averaging_snapshots/epoch-1.pth", "averaging_snapshots/epoch-2.pth"),
    *("metrics.jsonl", "config.yaml"),
)
OTHER_SETTINGS = (
    *("model.init_features=4", "model.norm=group", "loss.kind=tutorial", "train.seed=9"),
    *("train.weight_decay=0.5", "augment.flip=0.9", "train.optimizer=sgd", "data.size=16"),
    *("train.precision=bf16", "data.order=block", "run.resume=false"),
)
"""What a run may not change; the learning rate and, between epochs, the batch it may."""
LITTER = (
    *(".tmp-0badc0de-1-0", ".tmp-0badc0de-1-7.onnx", ".ckpt_latest.pth.123.tmp", "x.txt"),
    *("averaging_snapshots/.tmp-0badc0de-1-1", "averaging_snapshots/epoch-77.pth", "health.json"),
)


def same_weights(reference: Path, run: Path) -> Callable[[], int]:
    """Make the check that a run has the weights of another one."""
    return lambda: killing.compare(reference, run)


def resumed(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """A stopped run is resumed after something odd: with the right weights, or refused untouched.

    A run that continues must end with the weights of the undisturbed one where nothing that it
    needs was damaged. A refusal changes no file.
    """
    kinds = [_damaged, _damaged, _edited, _edited, _other_data, _other_settings, _littered]
    while True:
        run = folder / "runs" / "stopped"
        run.parent.mkdir()
        shutil.copytree(world.stopped, run)  # no hard links: some files are changed in place
        yield random.choice(kinds)(world, random, run)
        shutil.rmtree(run.parent)


def _damaged(world: World, random: Random, run: Path) -> Case:
    what = odd.damage_file(random, run / random.choice(FILES))
    return _resume(world, run, what, allowed=(DONE, INPUT, DAMAGED))


def _edited(world: World, random: Random, run: Path) -> Case:
    """Values in a checkpoint that no release writes, or code to execute."""
    import torch

    path = run / random.choice(["ckpt_latest.pth", "ckpt_latest.pth", *FILES[4:6]])
    good = torch.load(path, weights_only=True)
    path.unlink()
    if random.random() < 0.1:
        path.write_bytes(pickle.dumps({"net": odd.Payload(run.parent / "hacked")}))
        what = "a pickle that executes a command"
    else:
        by = random.choice([*odd.VALUES, torch.zeros(()), torch.full((3,), float("nan"))])
        torch.save(odd.replace_somewhere(random, good, by), path)
        what = f"a value is {str(by)[:30]!r}"
    hacked = run.parent / "hacked"
    return _resume(
        world,
        run,
        f"{path.name}: {what}",
        # 1: a loss that is not finite, from weights or a state of the optimiser that are not.
        allowed=(DONE, 1, INPUT, DAMAGED),
        checks=(lambda _: "code was executed" if hacked.exists() else "",),
    )


def _other_data(world: World, random: Random, run: Path) -> Case:
    return _resume(world, run, "other data", (INPUT,), shards=world.other_shards)


def _other_settings(world: World, random: Random, run: Path) -> Case:
    setting = random.choice(OTHER_SETTINGS)
    return _resume(world, run, setting, allowed=(INPUT,), more=(setting,))


def _littered(world: World, random: Random, run: Path) -> Case:
    """Leftovers of killed processes and foreign files, and files from another time."""
    names = random.sample(LITTER, random.choice([1, 2, 3]))
    for name in names:
        (run / name).write_bytes(random.choice([b"", b"rubbish", b"{}"]))
    when = random.choice([0, 4_102_444_800])  # 1970, 2100
    for path in run.rglob("*"):
        if random.random() < 0.5:
            os.utime(path, (when, when))
    return _resume(world, run, ", ".join(names), allowed=(DONE,), whole=True)


def _resume(
    world: World,
    run: Path,
    what: str,
    allowed: tuple[int, ...],
    *,
    shards: Path | None = None,
    more: tuple[str, ...] = (),
    checks: tuple[Callable[[Outcome], str], ...] = (),
    whole: bool = False,
) -> Case:
    """Make the case that resumes a run.

    Args:
        world: the good data.
        run: folder of the run as it is now.
        what: is odd.
        allowed: exit codes.
        shards: others than the run's.
        more: settings.
        checks: besides that a refusal changes nothing.
        whole: the run must end with the undisturbed run's weights.
    """
    before = _digests(run)
    words = [*train_words(shards or world.shards, run), *more]
    then = same_weights(world.run, run) if whole else lambda: 0

    def unchanged(outcome: Outcome) -> str:
        changed = sorted(set(before.items()) ^ set(_digests(run).items()))
        # A damaged snapshot is found when the average is made, after an epoch.
        refused = outcome.code == INPUT or (outcome.code == DAMAGED and "epoch-" not in what)
        return f"refused, but {changed[0][0]} changed" if refused and changed else ""

    train = command(*words)
    return Case(
        f"resume: {what}",
        lambda: train() or then(),
        allowed,
        (unchanged, *checks),
        folders=(run,),
        cpu_seconds=200,
    )


def _digests(run: Path) -> dict[str, str]:
    """Digest of each regular file, without the lock and what a killed process left."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def kills(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Two ranks, killed at random moments: in the end the weights of an undisturbed run."""
    reference = killing.finish(world.shards, folder / "undisturbed")
    while True:
        root = folder / "killed"
        schedule = killing.schedule(random, random.choice([2, 3, 4]))
        launcher = random.choice([killing.TORCHRUN, killing.TORCHRUN, killing.LAUNCHER])

        def action(
            root: Path = root,
            schedule: list[killing.Kill] = schedule,
            launcher: tuple[str, ...] = launcher,
        ) -> int:
            run = killing.finish(world.shards, root, schedule, launcher)
            return killing.compare(reference, run)

        yield Case(
            f"{'; '.join(map(str, schedule))}",
            action,
            allowed=(DONE,),
            cpu_seconds=3600,
            idle_seconds=600,
        )
        shutil.rmtree(root, ignore_errors=True)
