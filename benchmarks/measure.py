"""Measure: alternating rounds, medians with spread, CPU time, the machine, JSON and tables.

Cases take turns, round after round, so that a slow minute of a shared machine hits all of them.
Each number is the median of the rounds, its spread the lowest and the highest. On a shared machine
the CPU time per item is the number that holds: user and system time of this process and of all its
children, which the neighbours' load changes far less than the rate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Also where the package is not installed, with its dependencies on PYTHONPATH.
sys.path.insert(0, str(REPOSITORY))

from portrait_dist import files  # noqa: E402
from portrait_dist.system import info  # noqa: E402

MORE_PACKAGES = ("pillow", "opencv-python-headless", "litdata", "mosaicml-streaming")
"""Packages whose versions matter besides those that portrait_dist.system.info names."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """What one round of a case took.

    Args:
        rate: items per second, such as images.
        cpu_seconds: CPU seconds per item, children included; None where it was not measured.
    """

    rate: float
    cpu_seconds: float | None = None


Case = Callable[[], Round]


def arguments(description: str | None, *, rounds: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has.

    Args:
        description: the module's docstring; its first line becomes the summary.
        rounds: whether there are rounds, which ``--quick`` and ``--repeats`` change.
    """
    first, _, rest = (description or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write rows, machine and versions to this file"
    )
    if rounds:
        parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
        parser.add_argument(
            "--repeats", type=int, help="rounds; the median of them is reported (default 5)"
        )
    return parser


def description() -> dict[str, Any]:
    """Describe processor, cores, memory, GPU and load of this machine."""
    found = dataclasses.asdict(info.machine())
    memory = round(found.pop("memory_bytes") / 1e9, 1)
    return {**found, "memory_gb": memory, "load_at_start": round(os.getloadavg()[0], 2)}


def versions() -> dict[str, str]:
    """List the versions of Python and of the packages that matter, without absent ones."""
    return {
        name: found
        for name, found in info.versions(*MORE_PACKAGES).items()
        if found != "not installed"
    }


def commit() -> str:
    """Name the commit, with a + where tracked files differ; 'unknown' outside of a repository."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


# Timing -------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Sum user and system time of this process and its children, ended and living ones."""
    import psutil

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not os.times, which counts in steps of 10 ms.
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            # Grandchildren that have ended belong to the living child that waited for them.
            total += times.user + times.system + times.children_user + times.children_system
    return total


def timed(
    work: Callable[[], int],
    synchronize: Callable[[], Any] = lambda: None,
    *,
    children: bool = True,
) -> Round:
    """Measure one piece of work.

    Args:
        work: does it, and returns the number of items.
        synchronize: waits for the device, before and after.
        children: whether child processes belong to the work.
    """
    cpu_time = cpu_seconds if children else time.process_time
    synchronize()
    cpu, begin = cpu_time(), time.perf_counter()
    items = work()
    synchronize()
    seconds, spent = time.perf_counter() - begin, cpu_time() - cpu
    return Round(items / seconds, spent / items)


def repeated(
    work: Callable[[], Any],
    items: int,
    synchronize: Callable[[], Any] = lambda: None,
    at_least: float = 0.0,
) -> Round:
    """Measure as many calls of ``work``, of ``items`` each, as fill ``at_least`` seconds."""

    def calls() -> int:
        begin, done = time.perf_counter(), 0
        while True:
            work()
            done += 1
            if at_least == 0.0:
                return done * items
            # A device is behind the host: look at the clock only when it has caught up.
            if done % 8 == 0:
                synchronize()
                if time.perf_counter() - begin > at_least:
                    return done * items

    return timed(calls, synchronize)


def alternate(
    cases: Mapping[str, Case], repeats: int, warm_up: bool = True
) -> dict[str, list[Round]]:
    """Run all cases in turn, ``repeats`` times over.

    Args:
        cases: name → a function that does the work once and returns what it took.
        repeats: rounds; every round begins with another case.
        warm_up: run each once before, unmeasured.

    Returns:
        name → its rounds.
    """
    names = list(cases)
    if warm_up:
        for name in names:
            cases[name]()
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    for number in range(repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            rounds[name].append(cases[name]())
        print(f"  round {number + 1} of {repeats} done", file=sys.stderr, flush=True)
    return rounds


def run_measured(command: Sequence[str], **options: Any) -> tuple[str, float]:
    """Run a command to its end.

    Args:
        command: program and arguments.
        options: of ``subprocess.Popen``, such as ``env``.

    Returns:
        Its stdout, and the CPU seconds of it and its children.

    Raises:
        RuntimeError: it failed; the message ends with its stderr.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, **options)
        # Not Popen.wait: the times of one child among several that run side by side.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            text = errors.read().strip()[-2000:]
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {text}")
        return out.read(), usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def older_tree(commit: str) -> Iterator[Path]:
    """Check an older commit out into a folder of its own for a while."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "older")
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def run_in_tree(tree: Path, program: str, *arguments: str) -> None:
    """Run a program of this folder with the package of another tree.

    It must not import this module, which puts this tree's package first.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), *_python_path()])}
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    run_measured(command, env=environment)


def _python_path() -> list[str]:
    """PYTHONPATH without this tree: the dependencies may lie there."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [one for one in folders if one and Path(one).resolve() != REPOSITORY]


@contextlib.contextmanager
def precision_of_fp32(name: str) -> Iterator[None]:
    """Set how GPUs multiply float32 for a while.

    Through ``fp32_precision`` alone: mixed with the older ``allow_tf32`` switches, torch refuses to
    read either.

    Args:
        name: ``ieee`` or ``tf32``.
    """
    import torch

    settings: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    )
    before = [one.fp32_precision for one in settings]
    for one in settings:
        one.fp32_precision = name
    try:
        yield
    finally:
        for one, value in zip(settings, before, strict=True):
            one.fp32_precision = value


# Results ------------------------------------------------------------------------------------------


def rates(rounds: Sequence[Round | float]) -> list[float]:
    """List the rates of rounds."""
    return [one.rate if isinstance(one, Round) else one for one in rounds]


def row(
    name: str,
    rounds: Sequence[Round | float],
    unit: str = "images_per_second",
    **facts: Any,
) -> Row:
    """Make one line of the result.

    Args:
        name: of the case.
        rounds: what its rounds took, or other measured values.
        unit: name of the median value.
        facts: more columns.

    Returns:
        The median rate as ``unit``, ``low``, ``high``, ``runs``, ``cpu_seconds_per_image`` (the
        median) and the facts.
    """
    found = rates(rounds)
    line = {
        "name": name,
        unit: _short(statistics.median(found)),
        "low": _short(min(found)),
        "high": _short(max(found)),
        "runs": len(found),
    }
    spent = [
        one.cpu_seconds for one in rounds if isinstance(one, Round) and one.cpu_seconds is not None
    ]
    if spent:
        line["cpu_seconds_per_image"] = _short(statistics.median(spent))
    return line | facts


def absent(name: str, why: str, **facts: Any) -> Row:
    """Make a line for what could not be measured here."""
    return {"name": name, "images_per_second": None, "note": why, **facts}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def result(benchmark: str, rows: list[Row], **facts: Any) -> dict[str, Any]:
    """Make a benchmark's JSON object: rows, machine, versions, commit, date and command."""
    return {
        "benchmark": benchmark,
        "rows": rows,
        **facts,
        "machine": description(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "command": " ".join(["python", *map(_short_path, sys.argv)]),
    }


def _short_path(argument: str) -> str:
    """Files of the repository as they lie in it, other paths by their name alone."""
    path = Path(argument)
    if path.resolve().is_relative_to(REPOSITORY) and path.exists():
        return str(path.resolve().relative_to(REPOSITORY))
    return path.name if "/" in argument else argument


def publish(found: dict[str, Any], out: Path | None) -> None:
    """Print the rows as a table and write the JSON file where asked."""
    machine = found["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    print(f"\n{found['benchmark']}: {where}, commit {found['commit']}")
    print(table(found["rows"]))
    for name, value in found.get("aims", {}).items():
        print(f"  {name}: {value}")
    write(found, out)


def write(found: dict[str, Any], out: Path | None) -> None:
    """Write the JSON file where asked."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, json.dumps(found, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table; low, high and runs become one column."""
    columns = list(
        dict.fromkeys(key for line in rows for key in line if key not in ("low", "high", "runs"))
    )
    if any("low" in line for line in rows):
        columns.insert(2, "low to high")
    cells = [[_cell(line, column) for column in columns] for line in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _cell(line: Row, column: str) -> str:
    if column == "low to high":
        return f"{line['low']:g} to {line['high']:g}" if "low" in line else ""
    value = line.get(column)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
