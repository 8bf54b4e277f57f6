"""Break guarantees on purpose, each in a copy of the tree, and see that the campaign finds it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests import mutation

MINUTES = 5


@dataclass(frozen=True)
class Break:
    """A guarantee that is taken away.

    Args:
        why: the guarantee, in a few words.
        area: of the campaign that must find it.
        file: source file, relative to the repository.
        old: text that occurs once in it.
        new: what replaces it.
    """

    why: str
    area: str
    file: str
    old: str
    new: str


BREAKS = (
    Break(
        "a damaged sample is never delivered",
        "shards",
        "portrait_dist/data/shards/reader.py",
        "if isal_zlib.crc32(sample) != record.crc32:",
        "if False:",
    ),
    Break(
        "a failed write leaves nothing half-written",
        "full disks",
        "portrait_dist/files.py",
        """        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_open""",
        """        pass


@contextlib.contextmanager
def atomic_open""",
    ),
    Break(
        "other data never joins a run",
        "resumed runs",
        "portrait_dist/training/resume.py",
        "if before is not None and before != identity.now:",
        "if False:",
    ),
)


def main(seed: int) -> int:
    """Print which breaks were found, how soon and by which case; exit code 1 where one was not."""
    missed = 0
    for one in BREAKS:
        begin = time.monotonic()
        found = _attack(one, seed)
        missed += not found
        print(f"{one.why}: {found or 'NOT FOUND'} ({time.monotonic() - begin:.0f} s)", flush=True)
    return int(missed > 0)


def _attack(one: Break, seed: int) -> str:
    """Run the campaign on a broken copy; returns what it found."""
    with tempfile.TemporaryDirectory(prefix="broken-") as folder:
        tree = Path(folder)
        mutation.copy_tree(tree)
        file = tree / one.file
        text = file.read_text()
        if text.count(one.old) != 1:
            raise RuntimeError(f"{one.file}: {one.old!r} occurs {text.count(one.old)} times")
        file.write_text(text.replace(one.old, one.new))
        command = [sys.executable, "-m", "tests.campaign", "--minutes", str(MINUTES), "--first"]
        done = subprocess.run(
            [*command, "--seed", str(seed), "--area", one.area],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
        )
    broken = [line for line in done.stderr.splitlines() if line.startswith("BROKEN ")]
    return broken[0] if broken and "the campaign itself" not in broken[0] else ""
