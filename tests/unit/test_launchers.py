"""The files of launch/ for containers, Kubernetes and clouds say what their programs understand."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from portrait_dist import config, recipes

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """Schema of an object that has nothing but these properties."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
TEXTS, NAMED = listed(TEXT), closed(["name"], name=TEXT)
QUANTITIES = {"type": "object", "additionalProperties": TEXT}

# The part of trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer 2.3) that the file uses.
POD = closed(
    [],
    terminationGracePeriodSeconds=COUNT,
    containers=listed(
        closed(
            ["name"], name=TEXT, volumeMounts=listed(closed(["name"], name=TEXT, mountPath=TEXT))
        )
    ),
    volumes=listed(
        closed(["name"], name=TEXT, persistentVolumeClaim=closed(["claimName"], claimName=TEXT))
    ),
)
REPLICATED_JOB = closed(
    ["name"],
    name=TEXT,
    template=closed([], spec=closed([], template=closed([], spec=POD))),
)
TRAIN_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=NAMED,
    spec=closed(
        ["runtimeRef"],
        runtimeRef=NAMED,
        trainer=closed(
            [],
            image=TEXT,
            numNodes=COUNT,
            numProcPerNode=COUNT,
            command=TEXTS,
            args=TEXTS,
            resourcesPerNode=closed([], requests=QUANTITIES, limits=QUANTITIES),
        ),
        runtimePatches=listed(
            closed(
                ["manager"],
                manager=TEXT,
                trainingRuntimeSpec=closed(
                    [],
                    template=closed([], spec=closed([], replicatedJobs=listed(REPLICATED_JOB))),
                ),
            )
        ),
    ),
)
# The part of SkyPilot's task (0.14) that the file uses.
SKY_TASK = closed(
    ["resources", "run"],
    name=TEXT,
    num_nodes=COUNT,
    resources=closed(
        [],
        accelerators=TEXT,
        use_spot={"type": "boolean"},
        disk_size=COUNT,
        job_recovery=closed([], max_restarts_on_errors=COUNT),
    ),
    workdir=TEXT,
    file_mounts={
        "type": "object",
        "additionalProperties": closed(
            ["name"], name=TEXT, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}
        ),
    },
    envs={"type": "object", "additionalProperties": TEXT},
    setup=TEXT,
    run=TEXT,
)


@pytest.mark.parametrize(
    ("file", "schema"), [("trainjob.yaml", TRAIN_JOB), ("skypilot.yaml", SKY_TASK)]
)
def test_cluster_files_hold_nothing_that_their_program_does_not_know(
    file: str, schema: dict[str, Any]
) -> None:
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load((LAUNCH / file).read_text()))


def test_the_train_job_starts_torchrun_with_settings_that_exist() -> None:
    trainer = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())["spec"]["trainer"]
    assert [*trainer["command"], *trainer["args"][:3]] == [
        "torchrun",
        "-m",
        "portrait_dist",
        "train",
    ]
    settings = config.load(recipes.DEFAULT, trainer["args"][3:])
    ranks = trainer["numNodes"] * trainer["numProcPerNode"]
    assert settings.train.global_batch % ranks == 0
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


def test_the_sky_task_starts_one_torchrun_per_node_that_all_meet_at_the_first(
    tmp_path: Path,
) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
    python.chmod(0o755)
    given = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "PYTHON": str(python),
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=ROOT,
        env=os.environ | task["envs"] | given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:6] == ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "8"]
    assert {"is_host=0", "10.0.0.1:29400"} <= set(words), "the second node joins the first"
    settings = config.load(recipes.DEFAULT, words[words.index("train") + 1 :])
    assert settings.data.shards == "/shared/shards"


def test_the_image_copies_what_exists_and_gets_signals_itself() -> None:
    text = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    allowed = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        word, *rest = line.split()
        if word == "COPY":
            *sources, _ = rest
            for source in sources:
                assert (ROOT / source).exists()
                assert any(fnmatch.fnmatch(f"!{source}", rule) for rule in allowed), source
    entry = [line for line in lines if line.startswith(("ENTRYPOINT", "CMD"))]
    assert all("[" in line for line in entry), "a shell would keep TERM from the ranks"
    assert any(line.startswith("USER ") and line != "USER root" for line in lines)


def test_the_image_runs_a_python_that_the_package_supports() -> None:
    import tomllib

    from packaging.specifiers import SpecifierSet

    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (version,) = re.findall(r"^FROM python:([\d.]+)", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert SpecifierSet(supported).contains(f"{version}.0")
