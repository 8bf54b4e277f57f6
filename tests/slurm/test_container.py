"""Jobs in containers, on a real two-node SLURM; what enters the image is a stand-in.

In front of srun stands one that notes pyxis' options and takes them away, as pyxis does; in place
of Apptainer one that notes its options and runs the command. Both run this machine's Python.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli import call, call_process
from tests.slurm.cluster import Cluster
from tests.trees import write_tree

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

NOTED = "container.log"
PROGRAMS = {
    "srun": f"""#!/bin/bash
words=()
for word in "$@"; do
    case $word in
        --container-*|--no-container-*) echo "$word" >> "$(dirname "$0")/{NOTED}" ;;
        *) words+=("$word") ;;
    esac
done
exec {shutil.which("srun")} "${{words[@]}}"
""",
    "apptainer": f"""#!/bin/bash
echo "$*" >> "$(dirname "$0")/{NOTED}"
shift
while [[ $1 == --* ]]; do shift 2; done
shift
exec "$@"
""",
    "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Folder of programs, to put before the others."""
    (folder := tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("image", "option"), [("i.sqsh", "--container-image="), ("i.sif", "exec --bind ")]
)
def test_a_step_in_a_container_writes_what_it_writes_without_one(
    cluster: Cluster, tmp_path: Path, programs: Path, image: str, option: str
) -> None:
    tree = write_tree(tmp_path / "data", {"train": ["a", "b", "c"], "val": ["d"], "test": ["e"]})
    (tmp_path / image).touch()
    step = ("--data", tree, "--size", "16", "--samples-per-shard", "2", "--workers", "1", "--out")
    assert call("pack", *step, tmp_path / "alone").exit_code == 0
    submitted = call_process(
        *("submit", "pack", "--json", "--parts", "2", "--container", tmp_path / image),
        *(*step, tmp_path / "shards"),
        environment=cluster.environment | {"PATH": f"{programs}:{os.environ['PATH']}"},
    )
    assert submitted.exit_code == 0, submitted.stderr
    last = submitted.json["steps"][-1]
    log = Path(last["logs"].replace("%j", str(last["job_id"])))
    assert cluster.wait(last["job_id"], 240)["JobState"] == "COMPLETED", log.read_text()
    alone, packed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("alone", "shards")
    )
    assert packed == alone
    noted = (programs / NOTED).read_text()
    assert noted.count(option) == noted.count(str(tmp_path / image)) == 3, "two parts and the end"
