"""Metrics equal independent computations, and the same over several processes as over one."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
import torchmetrics

from portrait_dist import metrics

ROOT = Path(__file__).parents[2]


def blobs(
    count: int, height: int = 48, width: int = 64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft masks and imperfect predictions of them, [count, 1, H, W]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]

    def blob(cy: float, cx: float, radius: float) -> np.ndarray:
        return 1 / (1 + np.exp((np.hypot(y - cy, x - cx) - radius) / 1.5))

    masks, predictions = [], []
    for _ in range(count):
        cy, cx, radius = (
            random.uniform(0.3, 0.7) * height,
            random.uniform(0.3, 0.7) * width,
            random.uniform(8, 16),
        )
        masks.append(blob(cy, cx, radius))
        noise = scipy.ndimage.gaussian_filter(random.normal(size=(height, width)), 2)
        predictions.append(np.clip(blob(cy + 2, cx - 1, radius * 1.1) + 0.4 * noise, 0, 1))
    as_batch = [
        torch.from_numpy(np.stack(planes)).float().unsqueeze(1) for planes in (predictions, masks)
    ]
    return as_batch[0], as_batch[1]


def test_soft_iou_is_torchmetrics_jaccard_index_of_the_foreground() -> None:
    preds, target = blobs(5)
    ours = metrics.SoftIoU(num_classes=2)
    theirs = torchmetrics.JaccardIndex(task="multiclass", num_classes=2, average="none")
    for part in (slice(0, 2), slice(2, 5)):
        ours.update(preds[part], target[part])
        theirs.update((preds[part] > 0.5).long(), (target[part] > 0.5).long())
    assert ours.compute().item() == pytest.approx(theirs.compute()[1].item(), abs=1e-7)
    assert 0.5 < ours.compute() < 0.95


def test_soft_iou_counts_pixels_exactly_beyond_what_float32_can() -> None:
    metric = metrics.SoftIoU()
    metric.intersection += 2**24
    metric.union += 2**24
    one = torch.ones(1, 1, 1, 1)
    metric.update(one, one)
    assert metric.intersection == 2**24 + 1


def test_scores_of_each_sample_equal_plain_arithmetic() -> None:
    preds, target = blobs(4)
    scores = metrics.per_sample(preds, target)
    assert set(scores) == {"iou", "mae", "mse", "boundary_iou", "gradient_error"}
    for i, (p, t) in enumerate(
        zip(preds[:, 0].double().numpy(), target[:, 0].double().numpy(), strict=True)
    ):
        foreground, truth = p > 0.5, t > 0.5
        assert scores["iou"][i].item() == (foreground & truth).sum() / (foreground | truth).sum()
        assert scores["mae"][i].item() == pytest.approx(np.abs(p - t).mean(), rel=1e-6)
        assert scores["mse"][i].item() == pytest.approx(((p - t) ** 2).mean(), rel=1e-6)
        assert scores["boundary_iou"][i].item() == pytest.approx(
            boundary_iou_by_erosion(foreground, truth)
        )
        assert scores["gradient_error"][i].item() == pytest.approx(
            gradient_error_by_convolution(p, t), rel=1e-4
        )


def boundary_iou_by_erosion(foreground: np.ndarray, truth: np.ndarray) -> float:
    """Cheng et al.: the boundary is what 3×3 erosions, 2 % of the diagonal many, take away."""
    times = round(0.02 * np.hypot(*foreground.shape))

    def boundary(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask.astype(np.uint8), 1)
        return mask & (
            cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=times)[1:-1, 1:-1] == 0
        )

    p, t = boundary(foreground), boundary(truth)
    return (p & t).sum() / (p | t).sum()


def gradient_error_by_convolution(p: np.ndarray, t: np.ndarray) -> float:
    """Rhemann et al.: 9×9 derivative-of-Gaussian kernels, sigma 1.4, of unit L2 norm."""
    y, x = np.mgrid[-4:5, -4:5]
    kernel = -x * np.exp(-(x**2 + y**2) / (2 * 1.4**2))
    kernel /= np.sqrt((kernel**2).sum())

    def length(alpha: np.ndarray) -> np.ndarray:
        across, down = (
            scipy.ndimage.convolve(alpha, k, mode="nearest") for k in (kernel, kernel.T)
        )
        return np.hypot(across, down)

    return ((length(p) - length(t)) ** 2).sum() / 1000


def test_a_person_cut_by_the_edge_of_the_image_has_a_boundary_there() -> None:
    full = torch.ones(1, 10, 10, dtype=torch.bool)
    assert metrics.boundary(full, 2).sum() == 100 - 36


def test_an_empty_image_that_is_found_empty_is_perfect_and_a_false_person_is_not() -> None:
    empty, person = torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32)
    assert {name: value.item() for name, value in metrics.per_sample(empty, empty).items()} == {
        "iou": 1,
        "mae": 0,
        "mse": 0,
        "boundary_iou": 1,
        "gradient_error": 0,
    }
    assert metrics.per_sample(person, empty)["iou"].item() == 0
    assert metrics.per_sample(person, empty)["boundary_iou"].item() == 0


def test_scores_are_means_over_samples_whatever_the_batches() -> None:
    preds, target = blobs(7)
    whole, parts = metrics.AlphaScores(), metrics.AlphaScores()
    whole.update(preds, target)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        parts.update(preds[part], target[part])
    for name, value in whole.compute().items():
        assert value.item() == pytest.approx(
            metrics.per_sample(preds, target)[name].mean().item(), rel=1e-9
        )
        assert value.item() == pytest.approx(parts.compute()[name].item(), rel=1e-9)


def test_some_scores_can_be_chosen_and_watched_by_their_names() -> None:
    preds, target = blobs(3)
    metric = metrics.AlphaScores(("mae", "boundary_iou"))
    metric.update(preds=preds, target=target)
    expected = metrics.per_sample(preds, target)
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(
        {name: expected[name].mean().item() for name in ("mae", "boundary_iou")}
    )
    assert metric.component_names == ["mae", "boundary_iou"]
    assert metric.greater_component_is_better == {"mae": False, "boundary_iou": True}


def test_precision_and_recall_equal_counting_at_every_threshold() -> None:
    preds, target = blobs(3)
    preds[0, 0, :2] = torch.tensor([0.25, 0.5]).repeat(32)  # exactly on thresholds
    curve = metrics.PrecisionRecall(thresholds=5)
    curve.update(preds, target)
    found = curve.compute()
    assert found["thresholds"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    truth = target > 0.5
    for k, threshold in enumerate([0, 0.25, 0.5, 0.75, 1]):
        above = preds > threshold
        hits = (above & truth).sum().item()
        assert found["precision"][k].item() == (hits / above.sum().item() if above.any() else 1)
        assert found["recall"][k].item() == hits / truth.sum().item()
        assert found["iou"][k].item() == hits / (above | truth).sum().item()


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        metrics.SoftIoU().update(torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8))


RANKS = """
import os, sys, torch
import torch.distributed as dist
from portrait_dist import metrics
child = os.fork()  # two ranks for one start of torch: nothing has run yet that a fork would break
meet = f"file://{sys.argv[1]}"
dist.init_process_group("gloo", init_method=meet, rank=0 if child else 1, world_size=2)
preds, target = torch.load(sys.argv[2], weights_only=True)
everything = [metrics.SoftIoU(), metrics.AlphaScores(), metrics.PrecisionRecall()]
for batch in [[0, 1], [4]] if dist.get_rank() == 0 else [[2, 3]]:  # uneven numbers of batches
    for metric in everything:
        metric.update(preds[batch], target[batch])
torch.save([metric.compute() for metric in everything], f"{sys.argv[1]}.{dist.get_rank()}")
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_processes_with_uneven_batches_get_one_processs_values(tmp_path: Path) -> None:
    preds, target = blobs(5)
    torch.save((preds, target), tmp_path / "data.pt")
    command = [sys.executable, "-c", RANKS, str(tmp_path / "meet"), str(tmp_path / "data.pt")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    alone = [metrics.SoftIoU(), metrics.AlphaScores(), metrics.PrecisionRecall()]
    for metric in alone:
        metric.update(preds, target)
    iou, scores, curve = (metric.compute() for metric in alone)
    for rank in range(2):
        ddp_iou, ddp_scores, ddp_curve = torch.load(
            f"{tmp_path / 'meet'}.{rank}", weights_only=True
        )
        assert ddp_iou == iou
        assert all(torch.equal(ddp_curve[name], curve[name]) for name in curve)
        assert {name: value.item() for name, value in ddp_scores.items()} == pytest.approx(
            {name: value.item() for name, value in scores.items()},
            rel=1e-7,  # float32 convolutions differ by batch size
        )
