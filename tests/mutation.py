"""Break each guarantee once and see that its test fails.

python -m tests.mutation                  all of them, each in a copy of the tree
python -m tests.mutation --only data      those of tests/mutations.d/data.py
python -m tests.mutation --sample 4       a fixed sample of quick ones, as CI runs it
python -m tests.mutation --table OUT.md   also write the table

The tests of a list run on the unbroken tree first: a test that fails there would catch anything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from portrait_dist.data.source import synthetic
from tests.conftest import PAIRS, SEED

REPOSITORY = Path(__file__).resolve().parent.parent
LISTS = Path(__file__).parent / "mutations.d"
COPIED = (
    *("portrait_dist", "tests", "launch", "benchmarks", "docs", "examples", ".ci"),
    *("pyproject.toml", "README.md", "requirements.lock", "LICENSE"),
)


@dataclass(frozen=True)
class Mutation:
    """A break of one guarantee.

    Args:
        file: source file, relative to the repository.
        old: text that occurs exactly once in it.
        new: what stands there instead.
        test: node id of the test that must fail.
        why: the guarantee, in a few words.
    """

    file: str
    old: str
    new: str
    test: str
    why: str


def load(only: str | None = None) -> list[tuple[str, Mutation]]:
    """Return all mutations with the name of their list."""
    found = []
    for path in sorted(LISTS.glob("*.py")):
        if only in (None, path.stem):
            spec = importlib.util.spec_from_file_location(f"mutations_{path.stem}", path)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found += [(path.stem, mutation) for mutation in module.MUTATIONS]
    return found


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target / name)


def is_quick(mutation: Mutation) -> bool:
    """Say whether the test starts neither ranks nor SLURM nor SuperGradients."""
    file = mutation.test.partition("::")[0]
    return file.startswith("tests/unit/") and not any(
        word in (REPOSITORY / file).read_text()
        for word in ("portrait_dist.training", "super_gradients", "torchrun", "quickstart")
    )


def run_tests(tree: Path, tests: Sequence[str], raw_tree: Path | None, timeout: float) -> int:
    """Return the exit code of pytest for tests of a copied tree.

    Args:
        tree: the copy.
        tests: their node ids.
        raw_tree: generated portraits for the tests; they generate them when None.
        timeout: seconds; a break that makes a test hang is caught too.
    """
    environment = os.environ | {"PYTHONPATH": str(tree)}
    # Each test is a process of its own: without the bytecode of torch and SuperGradients on the
    # disk every one of them compiles both again, which takes longer than the test.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if raw_tree:
        environment["PORTRAIT_DIST_TEST_TREE"] = str(raw_tree)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=timeout
        ).returncode
    except subprocess.TimeoutExpired:
        return 1
    finally:
        end_what_is_left(tree)


def end_what_is_left(tree: Path) -> None:
    """Kill what a tree's tests left: where a guarantee is broken, ranks outlive their test."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PYTHONPATH") == str(tree):
                process.kill()


def unbroken(mutations: Sequence[Mutation], raw_tree: Path) -> bool:
    """Say whether the tests pass on the tree as it is."""
    tests = sorted({mutation.test for mutation in mutations})
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy_tree(Path(folder))
        return run_tests(Path(folder), tests, raw_tree, 600 * len(tests)) == 0


def verdict(mutation: Mutation, raw_tree: Path) -> str:
    """Return ``caught``, or why the mutation proves nothing."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        file = tree / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            return f"the text occurs {text.count(mutation.old)} times in {mutation.file}"
        file.write_text(text.replace(mutation.old, mutation.new))
        # What a break of the generator does must be seen.
        given = None if mutation.file.startswith("portrait_dist/data/source/") else raw_tree
        code = run_tests(tree, [mutation.test], given, 600)
    return {0: "SURVIVED", 1: "caught"}.get(code, f"pytest ended with {code}: is the test there?")


def main() -> int:
    """Run the chosen mutations and print a table; exit code 1 where one was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", help="name of one list")
    parser.add_argument("--sample", type=int, default=0, help="as many quick ones, a fixed choice")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=2, help="copies at a time")
    options = parser.parse_args()
    chosen = load(options.only)
    if options.sample:
        quick = [item for item in chosen if is_quick(item[1])]
        chosen = random.Random(0).sample(quick, min(options.sample, len(quick)))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-tree-") as folder:
        raw_tree = Path(folder) / "raw"
        synthetic.generate(raw_tree, PAIRS, SEED)
        rows, missed = run_all(chosen, raw_tree, options.jobs)
    minutes = (time.monotonic() - begin) / 60
    summary = f"{len(chosen) - missed} of {len(chosen)} caught, {minutes:.1f} minutes"
    print(summary)
    if options.table:
        header = ["| guarantee | broken in | test | result |", "|---|---|---|---|"]
        options.table.write_text("\n".join([summary, "", *header, *rows]) + "\n")
    return int(missed > 0 or not chosen)


def run_all(
    chosen: Sequence[tuple[str, Mutation]], raw_tree: Path, jobs: int
) -> tuple[list[str], int]:
    """Run the mutations and print each result as it comes.

    Returns:
        A row of the table for each, and how many were not caught.
    """
    rows, missed = [], 0
    lists = sorted({name for name, _ in chosen})
    with ThreadPoolExecutor(jobs) as pool:
        whole = {
            name: pool.submit(unbroken, [found for of, found in chosen if of == name], raw_tree)
            for name in lists
        }
        results = [pool.submit(verdict, mutation, raw_tree) for _, mutation in chosen]
        for (name, mutation), pending in zip(chosen, results, strict=True):
            result = pending.result()
            if not whole[name].result():
                result = f"a test of list '{name}' fails on the unbroken tree"
            missed += result != "caught"
            print(f"{result:10s} {mutation.test}  ({mutation.why})", flush=True)
            rows.append(f"| {mutation.why} | `{mutation.file}` | `{mutation.test}` | {result} |")
    return rows, missed


if __name__ == "__main__":
    sys.exit(main())
