"""Measure what preparing a large set costs: one pass over names, in bounded memory.

    uv run python benchmarks/prepare.py [--pairs 1000000] [--json OUT]

Empty files are made, for only names are looked at with ``--mode reference``: an AISegment tree of
5,000 pairs a folder, and one folder of images beside one of masks. Each is prepared by a fresh
process, by listing it and by a file of names (``--list``). Rows: seconds, CPU seconds, and the
process's peak memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

PAIRS_PER_FOLDER = 5_000
SMALL = 2_000


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Make the trees, prepare each, and publish the rows."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=10**6, help="pairs in each tree")
    options = parser.parse_args(arguments)
    pairs = SMALL if options.quick else options.pairs
    rows = []
    for layout, make in (("aisegment", aisegment), ("two folders", two_folders)):
        with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
            work = Path(folder)
            make(work / "raw", pairs)
            names = work / "names.txt"
            with open(names, "w") as file:
                subprocess.run(
                    ["find", ".", "-type", "f"], cwd=work / "raw", stdout=file, check=True
                )
            for way, more in (("listed", []), ("--list", ["--list", str(names)])):
                rows.append(prepared(f"{layout}, {way}", work, pairs, more))
    found = measure.result("prepare", rows, pairs=pairs)
    measure.publish(found, options.json)
    return found


def aisegment(raw: Path, pairs: int) -> None:
    """Make an AISegment tree of empty files."""
    for number in range(pairs):
        part = number // PAIRS_PER_FOLDER
        group = f"18{part:08d}"
        for top, start, suffix in (("clip_img", "clip", "jpg"), ("matting", "matting", "png")):
            folder = raw / top / group / f"{start}_{part:08d}"
            if number % PAIRS_PER_FOLDER == 0:
                folder.mkdir(parents=True)
            touch(f"{folder}/{group}-{number:08d}.{suffix}")


def two_folders(raw: Path, pairs: int) -> None:
    """Make images/ and masks/ of empty files."""
    for name, suffix in (("images", "webp"), ("masks", "png")):
        (raw / name).mkdir(parents=True)
        for number in range(pairs):
            touch(f"{raw}/{name}/1803151818-{number:08d}.{suffix}")


def touch(path: str) -> None:
    """Make an empty file."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def prepared(name: str, work: Path, pairs: int, more: list[str]) -> measure.Row:
    """Prepare a tree in a process of its own, and say what it took."""
    out = work / f"data-{name}"
    command = [sys.executable, "-m", "portrait_dist", "prepare", "--json", "--mode", "reference"]
    command += ["--raw", str(work / "raw"), "--out", str(out), *more]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as text:
        process = subprocess.Popen(command, stdout=text, cwd=measure.REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        text.seek(0)
        result = json.loads(text.read())
    if process.returncode or result["pairs"] != pairs:
        raise RuntimeError(f"{' '.join(command)}: {result}")
    return {
        "name": name,
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_megabytes": round(usage.ru_maxrss / 1024, 1),
    }


if __name__ == "__main__":
    main()
