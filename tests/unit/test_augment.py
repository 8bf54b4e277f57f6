"""What the augmentation promises: torchvision's pictures, the stated distributions, the same numbers in any rank layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as torchvision_ops

from portrait_dist import preprocessing
from portrait_dist.config import AugmentConfig
from portrait_dist.data import augment
from portrait_dist.data.augment import Augment, Parameters

STEPS = (
    torchvision_ops.adjust_brightness,
    torchvision_ops.adjust_contrast,
    torchvision_ops.adjust_saturation,
)


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """24 pictures uint8 [24, 96, 80, 3] with gradients, texture, flat and cut-off areas, and alphas [24, 96, 80]."""
    rng = np.random.default_rng(0)
    down, across = np.mgrid[0:96, 0:80]
    images = []
    for _ in range(24):
        waves = [
            128 + 200 * np.sin(down / rng.uniform(5, 40) + across / rng.uniform(5, 40))
            for _ in range(3)
        ]
        picture = np.stack(waves, axis=-1) * rng.uniform(0.3, 1) + rng.normal(0, 12, (96, 80, 3))
        picture[:20] = rng.integers(0, 256, 3)
        images.append(picture.clip(0, 255).astype(np.uint8))
    alphas = rng.integers(0, 256, (24, 96, 80)).astype(np.uint8)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(alphas)


def by_torchvision(image: np.ndarray, parameters: Parameters, row: int) -> np.ndarray:
    picture = Image.fromarray(image)
    if parameters.flip[row]:
        picture = torchvision_ops.hflip(picture)
    for kind in parameters.order[row]:
        picture = STEPS[kind](picture, float(parameters.factors[row, kind]))
    return np.asarray(picture)


def levels(normalised: torch.Tensor) -> np.ndarray:
    """Normalised float [B, 3, H, W] back to levels 0..255, [B, H, W, 3]."""
    mean, std = torch.tensor(preprocessing.MEAN), torch.tensor(preprocessing.STD)
    return ((normalised.permute(0, 2, 3, 1) * std + mean) * 255).double().numpy()


def test_pictures_are_those_of_torchvision_within_one_level(pictures):
    images, alphas = pictures
    parameters = Augment(AugmentConfig(), seed=1).parameters(0, np.arange(24))
    expected = np.stack(
        [by_torchvision(images[row].numpy(), parameters, row) for row in range(24)]
    ).astype(float)
    on_cpu, mattes = Augment(AugmentConfig()).apply(images, alphas, parameters)
    assert np.abs(levels(on_cpu) - expected).max() <= 1.001
    assert np.abs(levels(on_cpu) - expected).mean() < 0.01
    mirrored = torch.where(torch.from_numpy(parameters.flip)[:, None, None], alphas.flip(2), alphas)
    torch.testing.assert_close(mattes[:, 0], mirrored / 255)


def test_batched_operations_for_the_device_give_torchvisions_levels(pictures):
    images, alphas = pictures
    parameters = Augment(AugmentConfig(), seed=2).parameters(0, np.arange(24))
    expected = np.stack([by_torchvision(images[row].numpy(), parameters, row) for row in range(24)])
    got, _ = augment.colours(*augment.flip(images, alphas, parameters.flip), parameters)
    assert np.abs(got.numpy() - expected).max() <= 1
    assert (got.numpy() != expected).mean() < 1e-4


@pytest.mark.parametrize(
    "geometry", [{}, {"scale": 0.25, "rotation": 10, "translation": 0.1, "background": 0.5}]
)
def test_without_opencv_the_same_pictures_come_out(geometry, pictures, monkeypatch):
    images, alphas = pictures
    transform = Augment(AugmentConfig(**geometry), seed=3)
    fast = transform(images, alphas, epoch=0, positions=np.arange(24))
    monkeypatch.setattr(augment, "_opencv", lambda: None)
    plain = transform(images, alphas, epoch=0, positions=np.arange(24))
    assert np.abs(levels(fast[0]) - levels(plain[0])).max() <= 1.001
    torch.testing.assert_close(fast[1], plain[1])


def test_normalisation_is_imagenets(pictures):
    images, alphas = pictures
    expected = torchvision_ops.normalize(
        images.permute(0, 3, 1, 2) / 255, preprocessing.MEAN, preprocessing.STD
    )
    got, mattes = preprocessing.normalise(images, alphas)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(mattes, alphas[:, None] / 255)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_batch_given_is_left_as_it_was(pictures):
    images, alphas = pictures[0].clone(), pictures[1].clone()
    everything = AugmentConfig(scale=0.2, rotation=10, translation=0.1, background=0.5)
    for config in (AugmentConfig(), everything):
        Augment(config)(images, alphas, epoch=0, positions=np.arange(24))
    preprocessing.normalise(images, alphas)
    assert torch.equal(images, pictures[0])
    assert torch.equal(alphas, pictures[1])


class Augmented(torch.utils.data.Dataset):
    """Batches that are augmented where they are read."""

    def __init__(self, images: torch.Tensor, alphas: torch.Tensor) -> None:
        self.images, self.alphas = images, alphas

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return Augment(AugmentConfig(), seed=1)(
            self.images, self.alphas, epoch=index, positions=np.arange(24)
        )[0]


def test_dataloader_processes_augment_after_their_parent_has(pictures):
    here = [Augmented(*pictures)[epoch] for epoch in range(2)]
    loader = torch.utils.data.DataLoader(
        Augmented(*pictures), None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for ours, theirs in zip(here, loader, strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_depend_on_seed_epoch_and_position_only():
    transform = Augment(
        AugmentConfig(scale=0.2, rotation=9, translation=0.1, background=0.5), seed=5
    )
    whole = transform.parameters(3, np.arange(64))
    for rank in range(4):  # four ranks of 16, in any order
        part = transform.parameters(3, np.arange(rank * 16, rank * 16 + 16)[::-1])
        for name in vars(whole):
            np.testing.assert_array_equal(
                getattr(part, name)[::-1], getattr(whole, name)[rank * 16 : rank * 16 + 16]
            )
    assert not np.array_equal(whole.factors, transform.parameters(4, np.arange(64)).factors)
    assert not np.array_equal(
        whole.factors, Augment(transform.config, seed=6).parameters(3, np.arange(64)).factors
    )


def test_parameters_have_torchvisions_distribution():
    count = 60_000
    drawn = Augment(
        AugmentConfig(flip=0.3, brightness=0.5, contrast=0.2, saturation=1.5), seed=0
    ).parameters(0, np.arange(count))
    assert abs(drawn.flip.mean() - 0.3) < 0.01
    for column, (low, high) in enumerate([(0.5, 1.5), (0.8, 1.2), (0.0, 2.5)]):
        _is_uniform(drawn.factors[:, column], low, high)
    _, frequencies = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(frequencies) == 6  # every order of the three steps, equally often
    assert np.abs(frequencies / count - 1 / 6).max() < 0.01
    independent = np.corrcoef(
        np.column_stack([drawn.flip, drawn.factors, drawn.order[:, 0]]).T
    ) - np.eye(5)
    assert np.abs(independent).max() < 0.02


def _is_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high
    counts, _ = np.histogram(values, bins=20, range=(low, high))
    assert np.abs(counts / len(values) - 0.05).max() < 0.005


def test_zero_strength_changes_nothing(pictures):
    images, alphas = pictures
    off = AugmentConfig(flip=0, brightness=0, contrast=0, saturation=0)
    got = Augment(off)(images, alphas, epoch=0, positions=np.arange(24))
    expected = preprocessing.normalise(images, alphas)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1])


def test_geometry_moves_picture_and_alpha_together(pictures):
    _, alphas = pictures
    soft = torch.nn.functional.avg_pool2d(alphas[:, None].float(), 9, 1, 4).to(torch.uint8)[:, 0]
    images = soft[..., None].expand(-1, -1, -1, 3).contiguous()  # the alpha as a picture
    config = AugmentConfig(
        brightness=0, contrast=0, saturation=0, scale=0.3, rotation=20, translation=0.1
    )
    moved, mattes = Augment(config, seed=1)(images, soft, epoch=0, positions=np.arange(24))
    assert np.abs(levels(moved)[..., 0] / 255 - mattes[:, 0].double().numpy()).max() < 1e-4
    assert (moved - preprocessing.normalise(images, soft)[0]).abs().mean() > 0.05


def test_a_shift_by_a_quarter_moves_every_pixel_by_a_quarter():
    picture = torch.rand(1, 3, 32, 64)
    parameters = Parameters(
        *(np.zeros(1) for _ in range(3)),
        np.ones(1),
        np.zeros(1),
        np.full(1, 0.25),
        np.zeros(1),
        np.zeros(1),
    )
    moved, _ = augment.move(picture, picture[:, :1], parameters)
    torch.testing.assert_close(moved[..., 16:], picture[..., :48], rtol=0, atol=1e-5)


def test_a_quarter_turn_turns_the_picture_counter_clockwise():
    picture = torch.rand(1, 3, 32, 32)
    parameters = Parameters(
        *(np.zeros(1) for _ in range(3)),
        np.ones(1),
        np.full(1, 90.0),
        *(np.zeros(1) for _ in range(3)),
    )
    moved, _ = augment.move(picture, picture[:, :1], parameters)
    torch.testing.assert_close(moved, picture.rot90(1, (2, 3)), rtol=0, atol=1e-4)


def test_a_new_background_keeps_the_figure_and_removes_the_other_one():
    pictures = torch.full((2, 3, 64, 64), 50.0)
    mattes = torch.zeros(2, 1, 64, 64)
    mattes[0, :, 30:50, 30:50] = 1  # figure of value 200 before 50
    mattes[1, :, 10:20, 10:20] = 1  # figure of value 250 before 90
    pictures[1] = 90.0
    pictures[0][:, 30:50, 30:50] = 200.0
    pictures[1][:, 10:20, 10:20] = 250.0
    mixed = augment.new_background(pictures, mattes, np.array([True, False]))
    torch.testing.assert_close(mixed[1], pictures[1])
    assert torch.all(mixed[0][:, 30:50, 30:50] == 200.0)
    outside = mixed[0][mattes[0].expand(3, -1, -1) == 0]
    torch.testing.assert_close(
        outside, torch.full_like(outside, 90.0), rtol=0, atol=3.0
    )  # no trace of 250, nor of 50
