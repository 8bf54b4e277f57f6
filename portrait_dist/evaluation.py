"""``portrait-dist evaluate``: every sample of a split once, alone or under torchrun, with figures that add up exactly.

portrait-dist evaluate --checkpoint runs/NAME/ckpt_best.pth --data shards --split test
torchrun --nproc-per-node 2 -m portrait_dist evaluate --checkpoint runs/NAME/ckpt_best.pth --data shards
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch

from portrait_dist import distributed
from portrait_dist.checkpoints import load_model
from portrait_dist.data import build_loader
from portrait_dist.losses import SoftIoULoss
from portrait_dist.metrics import PrecisionRecall, SoftIoU, per_sample
from portrait_dist.preprocessing import normalise
from portrait_dist.system.malloc import keep_freed_memory


def evaluate(
    checkpoint: str | Path,
    shards: str,
    split: str = "test",
    *,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    table: str | Path | None = None,
    curve: str | Path | None = None,
    pictures: str | Path | None = None,
) -> dict[str, Any] | None:
    """Score a checkpoint on a split.

    Args:
        checkpoint: a .pth file of a run.
        shards: folder or address of the shards.
        split: ``train``, ``val`` or ``test``.
        batch_size: samples per rank and step; no figure depends on it.
        workers: decoding threads.
        device: ``auto``, ``cpu`` or ``cuda``.
        table: a CSV file for every sample's figures.
        curve: a CSV file for precision, recall and IoU at 101 thresholds.
        pictures: a folder for pictures of the worst and the median samples.

    Returns:
        On rank 0 ``split, samples, iou`` (pixels pooled), ``loss, mean_iou, mae, mse, boundary_iou, gradient_error``, at the
        threshold 0.5 ``precision`` and ``recall`` (pixels pooled), ``best_threshold`` (of the largest IoU) and
        ``world_size``; None on the others.

    Raises:
        InputError: no such checkpoint or shards.
        DamagedDataError: one of them is damaged.
    """
    keep_freed_memory()
    chosen = distributed.pick_device(device)
    distributed.start(chosen)
    model, about = distributed.on_every_rank(lambda: load_model(checkpoint))
    model.to(chosen)
    size = about.get("size") or [256, 256]
    loader = distributed.on_every_rank(
        lambda: build_loader(
            shards,
            split,
            batch_size,
            workers=workers,
            shuffle=False,
            size=(size[0], size[1]),
            drop_last=False,
        )
    )
    rows, pooled, thresholds, loss = _score(model, loader, chosen)
    sums = torch.tensor([loss, float(len(rows))], dtype=torch.float64, device=chosen)
    distributed.sum_over_ranks([sums])
    iou, at = (
        float(pooled.compute()),
        {name: values.tolist() for name, values in thresholds.compute().items()},
    )
    every = [row for part in distributed.gather_objects(rows) for row in part]
    if distributed.rank() != 0:
        return None
    every.sort(key=lambda row: row["key"])
    if table:
        write_table(every, Path(table))
    if curve:
        write_table(
            [dict(zip(at, values, strict=True)) for values in zip(*at.values(), strict=True)],
            Path(curve),
        )
    result = {
        "split": split,
        "samples": len(every),
        "iou": iou,
        "loss": float(sums[0] / sums[1].clamp(min=1)),
    }
    result |= {**_means(every), **_at_thresholds(at), "world_size": distributed.world_size()}
    if pictures:
        result["pictures"] = _draw(model, shards, split, size, every, Path(pictures), chosen)
    return result


def _score(
    model: torch.nn.Module, loader: Any, device: torch.device
) -> tuple[list[dict[str, Any]], SoftIoU, PrecisionRecall, float]:
    """This rank's rows (key and figures), its pooled IoU, the same over thresholds, and the sum of its losses."""
    pooled, thresholds = SoftIoU().to(device), PrecisionRecall().to(device)
    criterion, loss = SoftIoULoss(0.5, 0.5), 0.0
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in loader:
            images, mattes = normalise(batch.image.to(device), batch.alpha.to(device))
            logits = model(images, return_logits=True)
            probabilities = torch.sigmoid(logits)
            pooled.update(probabilities, mattes)
            thresholds.update(probabilities, mattes)
            loss += float(criterion(logits, mattes)) * len(images)
            figures = {
                name: values.tolist() for name, values in per_sample(probabilities, mattes).items()
            }
            rows += [
                {"key": key, **{name: figures[name][i] for name in figures}}
                for i, key in enumerate(batch.keys)
            ]
    return rows, pooled, thresholds, loss


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the samples' figures."""
    names = {
        "mean_iou": "iou",
        "mae": "mae",
        "mse": "mse",
        "boundary_iou": "boundary_iou",
        "gradient_error": "gradient_error",
    }
    return {
        name: sum(row[figure] for row in rows) / max(len(rows), 1) for name, figure in names.items()
    }


def _at_thresholds(at: dict[str, list[float]]) -> dict[str, float]:
    """Precision and recall at 0.5, and the threshold of the largest IoU."""
    half = at["thresholds"].index(0.5)
    best = at["thresholds"][at["iou"].index(max(at["iou"]))]
    return {
        "precision": at["precision"][half],
        "recall": at["recall"][half],
        "best_threshold": best,
    }


def baseline_iou(shards: str, size: tuple[int, int], split: str = "test") -> float:
    """IoU on a split of one constant mask: the mean matte of the training split, cut at 0.5.

    Args:
        shards: folder or address of the shards.
        size: (H, W) at which both are compared.
    """
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for batch in build_loader(
        shards, "train", 16, shuffle=False, size=size, drop_last=False, rank=0, world_size=1
    ):
        total += batch.alpha.to(torch.float64).sum(0) / 255
        count += len(batch.alpha)
    mean = (total / max(count, 1)).to(torch.float32)
    pooled = SoftIoU()
    for batch in build_loader(
        shards, split, 16, shuffle=False, size=size, drop_last=False, rank=0, world_size=1
    ):
        pooled.update(mean.expand(len(batch.alpha), *size), batch.alpha.to(torch.float32) / 255)
    return float(pooled.compute())


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one CSV line for each sample, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["key"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _draw(
    model: torch.nn.Module,
    shards: str,
    split: str,
    size: list[int],
    rows: list[dict[str, Any]],
    folder: Path,
    device: torch.device,
) -> list[str]:
    """Pictures of the four worst and four median samples by IoU: image, matte, prediction."""
    from portrait_dist.visualize import picture_grid

    ranked = sorted(rows, key=lambda row: row["iou"])
    middle = len(ranked) // 2
    wanted = {"worst": ranked[:4], "median": ranked[max(0, middle - 2) : middle + 2]}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    loader = build_loader(
        shards,
        split,
        16,
        shuffle=False,
        size=(size[0], size[1]),
        drop_last=False,
        rank=0,
        world_size=1,
    )
    found = _find(loader, {row["key"] for group in wanted.values() for row in group})
    for name, group in wanted.items():
        if not group:
            continue
        images = torch.stack([found[row["key"]][0] for row in group])
        alphas = torch.stack([found[row["key"]][1] for row in group])
        with torch.inference_mode():
            predictions = (
                model(normalise(images.to(device), alphas.to(device))[0])[:, 0].cpu().numpy()
            )
        path = folder / f"{split}-{name}.png"
        picture_grid(list(images.numpy()), list(alphas.numpy()), list(predictions)).save(path)
        paths.append(str(path))
    return paths


def _find(loader: Any, keys: set[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for batch in loader:
        for i, key in enumerate(batch.keys):
            if key in keys:
                found[key] = (batch.image[i].clone(), batch.alpha[i].clone())
    return found
