r"""How the code is built, in numbers: of any commits, beside each other and beside other projects.

    python benchmarks/structure.py c952b65 HEAD --out benchmarks/results/structure.md

Counts come from the syntax trees of the files that a commit holds. An upward import is one that
points against the layers of the commit's own ``[tool.importlinter]``; without them there is no such
number.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "portrait_dist"
OTHER_ROOMS = ("tests", "benchmarks")
WIDTH, LENGTH, REPEATS = 100, 40, 3

OTHERS = """
Other projects, from their own files (nanoGPT 3adf61e, torchtitan core b5bcd76,
segmentation_models.pytorch 5006616, EDM2 4bf8162, spdl ff33a9f, grain f5dd0d8):

| | nanoGPT | torchtitan | smp | EDM2 | spdl / grain |
|---|---|---|---|---|---|
| modules in the root | 4 scripts | 2 | 0 | scripts | – |
| Python lines | 1,220 | 55,761 | 14,281 | 5,008 | 30,839 / 18,958 |
| lines over 100 columns | 3.6 % | 0.4 % | 2.4 % | 8.2 % | 0.1 % / 0.2 % |
| comments per 100 lines | 27.7 | 6.8 | 2.9 | 17.5 | 6.3 / 9.8 |
| function length, median | 10 | 17 | 14 | 6 | 11 / 7 |
| function length, 90 % | 25 | 63 | 45 | 35 | 45 / 35 |
| function length, longest | 55 | 353 | 140 | 185 | 1,020 / 117 |
| functions with a return type | 0 % | 81 % | 26 % | 13 % | 99 % / 52 % |

Comments are those behind a `#`. What a constant is and where its number comes from stands here in
the string below it, which documentation tools read; these strings are counted apart.
"""


@dataclass(frozen=True)
class Structure:
    """What is counted of one commit; ``upward`` is None without declared layers."""

    root_modules: int
    lines: int
    too_wide: int
    comments: float
    explained: int
    median: int
    most: int
    longest: int
    long_functions: int
    dict_returns: int
    any_parameters: int
    circles: int
    upward: int | None
    help_seconds: float
    data_seconds: float
    rooms: dict[str, int]


def functions(trees: dict[str, ast.Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def imports(name: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that one imports, at the top or inside a function.

    Imports for the type checker alone do not count: they never run.
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    # ``from package import module`` needs the module, not what its package imports.
    found &= modules
    parents = {each for each in found for other in found if other.startswith(f"{each}.")}
    return found - parents - {name}


def circles(graph: dict[str, set[str]]) -> int:
    """Count groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    count = 0

    def visit(name: str) -> None:
        nonlocal count
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            position = stack.index(name)
            count += len(stack) - position > 1
            del stack[position:]

    for name in graph:
        if name not in index:
            visit(name)
    return count


def upward_imports(root: Path, graph: dict[str, set[str]]) -> int | None:
    """Count imports against the layers that the tree declares; None where it declares none."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    if "importlinter" not in settings["tool"]:
        return None
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    level = {
        name.strip(): number for number, layer in enumerate(layers) for name in layer.split("|")
    }

    def level_of(module: str) -> int | None:
        return next(
            (level[name] for name in _ancestors(module) if name in level),
            None,
        )

    pairs = ((level_of(a), level_of(b)) for a in graph for b in graph[a])
    return sum(a is not None and b is not None and b < a for a, b in pairs)


def _ancestors(module: str) -> Iterator[str]:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def comments_of(text: str) -> int:
    """Count comments, those of linters and type checkers not."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(
        token.type == tokenize.COMMENT
        and not token.string.startswith(("# type:", "# noqa", "#!", "# pragma"))
        for token in tokens
    )


def explained_values(tree: ast.Module) -> int:
    """Count assignments with a string below that says what the value is."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef)]
    return sum(
        isinstance(value, ast.Assign | ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
        for body in bodies
        for value, text in itertools.pairwise(body)
    )


def cpu_seconds(root: Path, code: str) -> float:
    """Median CPU-seconds of a fresh interpreter that runs ``code`` in a tree."""
    taken = []
    for _ in range(REPEATS + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(taken[1:])  # the first one compiles


def measure(root: Path) -> Structure:
    """Count everything in a tree."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    texts = {path.relative_to(root).with_suffix("").as_posix(): path.read_text() for path in paths}
    texts = {name.replace("/", ".").removesuffix(".__init__"): text for name, text in texts.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    graph = {name: imports(name, tree, set(trees)) for name, tree in trees.items()}
    lines = [line for text in texts.values() for line in text.splitlines()]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions(trees))
    rooms: Counter[str] = Counter()
    for path in itertools.chain(paths, *((root / name).rglob("*.py") for name in OTHER_ROOMS)):
        room = path.relative_to(root).parts[0]
        if room == PACKAGE:
            room = path.relative_to(root / PACKAGE).parts[0]
        rooms["the root" if room.endswith(".py") else room] += len(path.read_text().splitlines())
    return Structure(
        root_modules=sum(not path.name.startswith("__") for path in (root / PACKAGE).glob("*.py")),
        lines=len(lines),
        too_wide=sum(len(line) > WIDTH for line in lines),
        comments=100 * sum(map(comments_of, texts.values())) / len(lines),
        explained=sum(map(explained_values, trees.values())),
        median=lengths[len(lengths) // 2],
        most=lengths[len(lengths) * 9 // 10],
        longest=lengths[-1],
        long_functions=sum(length > LENGTH for length in lengths),
        dict_returns=sum(
            node.returns is not None and "dict[str, Any]" in ast.unparse(node.returns)
            for node in functions(trees)
        ),
        any_parameters=sum(map(_any_parameters, functions(trees))),
        circles=circles(graph),
        upward=upward_imports(root, graph),
        help_seconds=cpu_seconds(root, "from portrait_dist import cli; cli.run(['--help'])"),
        data_seconds=cpu_seconds(root, "from portrait_dist.data import build_loader"),
        rooms=dict(rooms),
    )


def _any_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    names = (
        name
        for argument in arguments
        if argument and argument.annotation
        for name in {getattr(part, "id", "") for part in ast.walk(argument.annotation)}
    )
    return sum(name == "Any" for name in names)


def table(found: dict[str, Structure]) -> str:
    """Lay the commits out beside each other, in Markdown."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, values: list[str]) -> None:
        rows.append((name, values))

    all_found = list(found.values())
    add(
        "modules in the root beside __init__ and __main__",
        [str(one.root_modules) for one in all_found],
    )
    add("Python lines", [f"{one.lines:,}" for one in all_found])
    add(
        f"lines over {WIDTH} columns",
        [f"{one.too_wide:,} ({one.too_wide / one.lines:.1%})" for one in all_found],
    )
    add("comments per 100 lines", [f"{one.comments:.1f}" for one in all_found])
    add("constants explained by the string below", [str(one.explained) for one in all_found])
    add(
        "function length, median / 90 % / longest",
        [f"{one.median} / {one.most} / {one.longest}" for one in all_found],
    )
    add(f"functions over {LENGTH} lines", [str(one.long_functions) for one in all_found])
    add("functions that return dict[str, Any]", [str(one.dict_returns) for one in all_found])
    add("parameters of Any", [str(one.any_parameters) for one in all_found])
    add("circles of imports", [str(one.circles) for one in all_found])
    add("upward imports", ["–" if one.upward is None else str(one.upward) for one in all_found])
    add("CPU-seconds of --help", [f"{one.help_seconds:.2f}" for one in all_found])
    data = [f"{one.data_seconds:.2f}" for one in all_found]
    add("CPU-seconds of importing the loader, with torch", data)
    names = sorted(set(itertools.chain.from_iterable(one.rooms for one in all_found)))
    for name in names:
        add(f"lines in {name}", [f"{one.rooms.get(name, 0):,}" for one in all_found])
    header = ["", *found]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join([name, *values]) + " |" for name, values in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure commits and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("commits", nargs="+")
    parser.add_argument("--out", type=Path, help="Markdown file")
    options = parser.parse_args(arguments)
    found: dict[str, Structure] = {}
    for commit in options.commits:
        with tempfile.TemporaryDirectory() as folder:
            git = ["git", "-C", str(REPOSITORY)]
            archive = subprocess.run([*git, "archive", commit], check=True, capture_output=True)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(folder, filter="data")
            short = subprocess.run(
                [*git, "rev-parse", "--short", commit], check=True, capture_output=True, text=True
            )
            found[short.stdout.strip()] = measure(Path(folder))
    command = f"python benchmarks/structure.py {' '.join(options.commits)}"
    text = f"# Structure of the code\n\n`{command}`\n"
    text += f"\n{table(found)}\n{OTHERS}"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
