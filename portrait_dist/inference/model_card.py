"""The model card that ``export`` writes beside a file: what the network is, and what it is not."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portrait_dist.checkpoints import CheckpointInfo
from portrait_dist.config import Config
from portrait_dist.evaluation import SplitScores
from portrait_dist.system.info import cpu_name

NOT_SETTINGS = ("recipe", "run", "data.shards", "data.cache_dir", "data.log_keys")
"""Of a run's configuration: names and places, which say nothing of the network."""
TIMED_CALLS = 5


@dataclass(frozen=True)
class Speed:
    """How fast the exported file computed on this machine.

    Attributes:
        images_per_second: in batches of 1, the median of :data:`TIMED_CALLS` calls.
        engine: what computed.
        threads: CPU threads of it.
        processor: its name.
    """

    images_per_second: float
    engine: str
    threads: int
    processor: str


def card_path(out: Path) -> Path:
    """Name the card of an exported file: portrait.onnx has portrait.onnx.card.md."""
    return out.with_name(f"{out.name}.card.md")


def measure_speed(
    exported: Callable[[Tensor], Tensor], size: tuple[int, int], engine: str
) -> Speed:
    """Time an exported file on noise, in batches of 1."""
    image = torch.rand(1, 3, *size)
    exported(image)
    seconds = []
    for _ in range(TIMED_CALLS):
        began = time.perf_counter()
        exported(image)
        seconds.append(time.perf_counter() - began)
    rate = 1 / statistics.median(seconds)
    return Speed(float(f"{rate:.3g}"), engine, torch.get_num_threads(), cpu_name())


def write_card(
    file: str,
    metadata: Mapping[str, str],
    network: nn.Module,
    info: CheckpointInfo,
    speed: Speed,
    scores: SplitScores | None,
) -> str:
    """Write the card's text, Markdown.

    Args:
        file: name of the exported file.
        metadata: what goes in and comes out.
        network: that was exported.
        info: what its checkpoint says.
        speed: of the exported file.
        scores: on real masks; None where they were not measured.
    """
    sections = {
        "Input and output": _list(
            {name: metadata[name] for name in metadata if name != "producer"}
        ),
        "Training": _list(_training(network, info)),
        "Scores": _scores(info, scores),
        "Speed": [
            f"{speed.images_per_second:g} images/s in batches of 1 by {speed.engine} with "
            f"{speed.threads} threads on {speed.processor}, measured when this was written."
        ],
        "Limits": _limits(info, scores),
        "Licence": [
            f"The code that trained and exported it, portrait-dist {version('portrait-dist')}, is "
            "under the Apache License 2.0. Which licence the weights have depends on the training "
            "images, of which a checkpoint says nothing: ask who trained it."
        ],
    }
    lines = [f"# {file}", "", "Alpha of people in photos (background removal)."]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _list(facts: Mapping[str, str]) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {text}" for name, text in facts.items()]


def _training(network: nn.Module, info: CheckpointInfo) -> dict[str, str]:
    own = getattr(network, "network", network)
    weights = sum(weight.numel() for weight in network.parameters())
    built = f", {info.build.name}" if info.build else ""
    facts = {"network": f"{type(own).__name__}{built}, {weights:,} weights"}
    if info.data:
        facts["data"] = "shards with the content " + ", ".join(
            f"{split} `{identity}`" for split, identity in sorted(info.data.items())
        )
    if info.samples_seen:
        epochs = f" in {info.epoch} epochs" if info.epoch is not None else ""
        facts["images seen"] = f"{info.samples_seen:,}{epochs}"
    if changed := _settings(info.config):
        facts["settings other than the defaults"] = ", ".join(f"`{one}`" for one in changed)
    if info.packages:
        facts["versions"] = ", ".join(f"{name} {one}" for name, one in info.packages.items())
    return facts


def _settings(config: Mapping[str, Any]) -> list[str]:
    """List ``key=value`` of what the run's configuration changes of the defaults."""
    defaults = dataclasses.asdict(Config())
    found = []
    for section, values in sorted(config.items()):
        if section in NOT_SETTINGS or not isinstance(values, Mapping):
            continue
        for name, value in sorted(values.items()):
            key, default = f"{section}.{name}", defaults.get(section, {}).get(name)
            if key not in NOT_SETTINGS and value != default:
                found.append(f"{key}={value}".replace("`", "'").replace("\n", " "))
    return found


def _scores(info: CheckpointInfo, scores: SplitScores | None) -> list[str]:
    if scores is None:
        known = (
            f" The watched metric on the validation split was {info.acc:.4f}."
            if info.acc is not None
            else ""
        )
        return [f"Not measured on a test split; `export --data SHARDS` does.{known}"]
    return [
        f"The checkpoint on the {scores.samples} samples of the split {scores.split}, in float32:",
        "",
        *_list(
            {
                "IoU over all pixels": f"{scores.iou:.4f}",
                "mean IoU of the images": f"{scores.mean_iou:.4f}",
                "boundary IoU": f"{scores.boundary_iou:.4f}",
                "mean absolute error of alpha": f"{scores.mae:.5f}",
            }
        ),
    ]


def _limits(info: CheckpointInfo, scores: SplitScores | None) -> list[str]:
    size = f"{info.size[0]}x{info.size[1]} pixels" if info.size else "the size of training"
    limits = [
        f"- It sees {size}: hair and fingers finer than a pixel of that are not in its alpha; "
        "`portrait-dist predict` refines the edge at the photo's size, another program has to.",
        "- What it takes for a person follows from its training masks. Photos unlike the training "
        "images (other framing, light, animals, several people) get worse masks than scores say.",
        "- It says nothing of who is in a photo, and was not tested for differences between groups "
        "of people.",
    ]
    if scores is not None and scores.samples < 1000:
        limits.append(
            f"- {scores.samples} samples are few: differences of the scores below "
            f"{1 / scores.samples**0.5:.2f} may be chance."
        )
    return limits
