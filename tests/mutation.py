"""Break each guarantee once and see that its test fails.

python -m tests.mutation                  all of them, each in a copy of the tree
python -m tests.mutation --only data      those of tests/mutations.d/data.py
python -m tests.mutation --sample 6       a fixed sample, as CI runs it
python -m tests.mutation --table OUT.md   also write the table
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LISTS = Path(__file__).parent / "mutations.d"
COPIED = (
    *("portrait_dist", "tests", "launch", "benchmarks", "docs", "examples"),
    *("pyproject.toml", "README.md", "requirements.lock"),
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
    """All mutations with the name of their list."""
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


def run_test(tree: Path, test: str, timeout: float = 600) -> int:
    """Exit code of pytest for one test of a copied tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        return subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=timeout
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def verdict(mutation: Mutation) -> str:
    """``caught``, or why the mutation proves nothing."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        file = tree / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            return f"the text occurs {text.count(mutation.old)} times in {mutation.file}"
        file.write_text(text.replace(mutation.old, mutation.new))
        code = run_test(tree, mutation.test)
    return {0: "SURVIVED", 1: "caught"}.get(code, f"pytest ended with {code}: is the test there?")


def main() -> int:
    """Run the chosen mutations and print a table; exit code 1 where one was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", help="name of one list")
    parser.add_argument("--sample", type=int, default=0, help="as many, chosen by a fixed seed")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=2, help="copies at a time")
    options = parser.parse_args()
    chosen = load(options.only)
    if options.sample:
        chosen = random.Random(0).sample(chosen, min(options.sample, len(chosen)))
    begin = time.monotonic()
    rows = ["| guarantee | broken in | test | result |", "|---|---|---|---|"]
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda item: verdict(item[1]), chosen)
        for (_, mutation), result in zip(chosen, results, strict=True):
            missed += result != "caught"
            print(f"{result:10s} {mutation.test}  ({mutation.why})", flush=True)
            rows.append(f"| {mutation.why} | `{mutation.file}` | `{mutation.test}` | {result} |")
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(chosen) - missed} of {len(chosen)} caught, {minutes:.1f} minutes")
    if options.table:
        options.table.write_text("\n".join(rows) + "\n")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
