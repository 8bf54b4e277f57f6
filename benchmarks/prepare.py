"""Measure what preparing a large set costs: one pass over names, in bounded memory.

    uv run python benchmarks/prepare.py [--pairs 1000000] [--json OUT]

Empty files are made, for only names are looked at with ``--mode reference``: an AISegment tree of
5,000 pairs a folder, and one folder of images beside one of masks. Each is prepared by a fresh
process, by listing it and by a file of names (``--list``). Rows: seconds, CPU seconds, and the
process's peak memory. The trees lie in the folder for temporary files (TMPDIR); what was just made
may still be in memory, whatever the file system, which the result names.
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
WITH_PEAK = """
import re, runpy, sys
try:
    runpy.run_module("portrait_dist", run_name="__main__", alter_sys=True)
finally:
    with open("/proc/self/status") as status:
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", status.read())
    print(peak.group(1), file=sys.stderr)
"""
"""Runs a command, then says its largest resident size in kB.

What ``wait4`` says will not do: it counts the parent's memory too, from before ``exec``.
"""


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
    found = measure.result("prepare", rows, pairs=pairs, file_system=file_system())
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


def file_system() -> str:
    """Name the type of the file system that the trees lie on."""
    command = ["df", "--output=fstype", tempfile.gettempdir()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def prepared(name: str, work: Path, pairs: int, more: list[str]) -> measure.Row:
    """Prepare a tree in a process of its own, and say what it took."""
    out = work / f"data-{name}"
    command = [sys.executable, "-c", WITH_PEAK, "prepare", "--json", "--mode", "reference"]
    command += ["--raw", str(work / "raw"), "--out", str(out), *more]
    begin = time.perf_counter()
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, cwd=measure.REPOSITORY)
    seconds = time.perf_counter() - begin
    after = os.times()
    if done.returncode or json.loads(done.stdout)["pairs"] != pairs:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    return {
        "name": name,
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(user + system, 2),
        "peak_megabytes": round(int(done.stderr.split()[-1]) / 1024, 1),
    }


if __name__ == "__main__":
    main()
