"""Data shared by all tests: a generated raw tree, its split, small shards, the real sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.browser import Browser

REPOSITORY = Path(__file__).parent.parent
REAL_SAMPLE = REPOSITORY.parent / "shared" / "data" / "aisegment-sample"

PAIRS, SEED = 71, 7
"""Of the generated raw tree: 80/10/10 of 71 pairs are 57, 7 and 7."""

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of tests/gpu."""
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where tests/gpu runs; cpu is a dry run without a GPU",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long rooms, so that no process is left with one of them at the end."""

    def room(item: pytest.Item) -> str:
        return item.path.relative_to(REPOSITORY / "tests").parts[0]

    items.sort(key=lambda item: {"slurm": 0, "ranks": 1}.get(room(item), 2))


class OneRoomOfSlurm(LoadScopeScheduling):
    """One process runs a file of tests, and one runs all of tests/slurm with its one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "tests/slurm" if path.startswith("tests/slurm/") else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Divide the tests among the processes of ``pytest -n``."""
    return OneRoomOfSlurm(config, log)


@pytest.fixture(scope="session")
def raw_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated raw AISegment tree of 71 pairs, 600×800; no test changes it."""
    from portrait_dist.data.source import synthetic

    if given := os.environ.get("PORTRAIT_DIST_TEST_TREE"):  # tests.mutation makes it once for all
        return Path(given)
    folder = tmp_path_factory.mktemp("raw") / "tree"
    synthetic.generate(folder, PAIRS, SEED)
    return folder


@pytest.fixture(scope="session")
def split_dir(raw_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated tree, split and arranged."""
    from portrait_dist.data.source import split

    folder = tmp_path_factory.mktemp("split") / "data"
    split.prepare(raw_tree, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(split_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32×32 shards of the split, 10 samples a shard: 57 train, 7 val, 7 test."""
    from portrait_dist.data.shards import writer

    folder = tmp_path_factory.mktemp("tiny") / "shards"
    writer.pack(split_dir, folder, size=(32, 32), samples_per_shard=10)
    return folder


@pytest.fixture(scope="session")
def real_or_generated(raw_tree: Path) -> Path:
    """The real portraits where this machine has them, else the generated ones."""
    return REAL_SAMPLE if REAL_SAMPLE.is_dir() else raw_tree


@pytest.fixture(scope="session")
def real_sample() -> Path:
    """The real portraits in the raw AISegment layout, where this machine has them."""
    if not REAL_SAMPLE.is_dir():
        pytest.skip("the real sample is not on this machine; generated data covers the same path")
    return REAL_SAMPLE


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser with an empty page."""
    started = Browser(tmp_path / "profile")
    target = started.call("Target.createTarget", url="about:blank")["targetId"]
    started.session = started.call("Target.attachToTarget", targetId=target, flatten=True)[
        "sessionId"
    ]
    for domain in ("Page", "Network", "Log", "Runtime"):
        started.call(f"{domain}.enable")
    yield started
    started.end()
