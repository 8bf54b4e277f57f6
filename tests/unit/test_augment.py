"""Torchvision's images, the stated distributions, the same numbers in any rank layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor import metrics as inductor_metrics
from torchvision.transforms import functional as torchvision_ops

from portrait_dist import preprocessing
from portrait_dist.config import AugmentConfig
from portrait_dist.data import augment
from portrait_dist.data.augment import Augment, DeviceParameters, Parameters
from portrait_dist.errors import InputError

STEPS = (
    torchvision_ops.adjust_brightness,
    torchvision_ops.adjust_contrast,
    torchvision_ops.adjust_saturation,
)


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [24, 96, 80, 3] of gradients, texture, flat and clipped areas, and alphas."""
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


EVERYTHING: dict[str, Any] = {"scale": 0.25, "rotation": 10, "translation": 0.1, "background": 0.5}


def moved(parameters: Parameters) -> DeviceParameters:
    return augment.to_device(parameters, torch.device("cpu"), ratio=96 / 80)


def test_images_are_those_of_torchvision_within_one_level(
    pictures: tuple[torch.Tensor, torch.Tensor],
) -> None:
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


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_real_photos_are_those_of_torchvision_within_one_level(
    strength: float, real_or_generated: Path
) -> None:
    """One level in a thousand images is easily missed: many photos, seeds, orders and factors."""
    paths = sorted(real_or_generated.rglob("*.jpg"))
    photos = [np.asarray(Image.open(path).convert("RGB").resize((128, 128))) for path in paths]
    images = torch.from_numpy(np.stack(photos))
    alphas = images[..., 0].contiguous()
    config = AugmentConfig(brightness=strength, contrast=strength, saturation=strength)
    for seed in range(4):
        transform = Augment(config, seed, engine="opencv")
        parameters = transform.parameters(seed, np.arange(len(images)))
        got = levels(transform.apply(images, alphas, parameters)[0])
        for row in range(len(images)):
            expected = by_torchvision(photos[row], parameters, row)
            assert np.abs(got[row] - expected).max() <= 1.001, (seed, paths[row])


@pytest.mark.parametrize("last", [0, 1, 2])
def test_all_steps_but_the_last_give_pillows_levels_exactly(
    last: int, pictures: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The next step would enlarge a difference. Here the last one, of factor 1, changes nothing."""
    first, second = (kind for kind in range(3) if kind != last)
    parameters = Augment(AugmentConfig(flip=0), seed=9).parameters(0, np.arange(24))
    parameters.order = np.array([[first, second, last], [second, first, last]] * 12)
    parameters.factors[:, last] = 1
    for row, image in enumerate(pictures[0].numpy()):
        scratch = np.empty(image.shape, np.float32)
        got = augment.colours_of_one(image, parameters.order[row], parameters.factors[row], scratch)
        assert np.array_equal(got, by_torchvision(image, parameters, row))


def test_batched_operations_for_the_device_give_torchvisions_levels(
    pictures: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, alphas = pictures
    parameters = Augment(AugmentConfig(), seed=2).parameters(0, np.arange(24))
    expected = np.stack([by_torchvision(images[row].numpy(), parameters, row) for row in range(24)])
    on_device = moved(parameters)
    got, _ = augment.colours(*augment.flip(images, alphas, on_device.flip), on_device)
    assert np.abs(got.numpy() - expected).max() <= 1
    assert (got.numpy() != expected).mean() < 1e-4


@pytest.mark.parametrize(("config", "most_loops"), [({}, 13), (EVERYTHING, 40)])
def test_every_engine_gives_the_same_images_the_compiled_one_in_a_few_loops(
    config: dict[str, Any],
    most_loops: int,
    pictures: tuple[torch.Tensor, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()
    inductor_metrics.reset()
    plain, fast, compiled = (
        Augment(AugmentConfig(**config), seed=3, engine=engine)(
            *pictures, epoch=0, positions=np.arange(24)
        )
        for engine in ("torch", "opencv", "compiled")
    )
    for other in (fast, compiled):
        assert np.abs(levels(other[0]) - levels(plain[0])).max() <= 1.001
        torch.testing.assert_close(other[1], plain[1], rtol=0, atol=1e-4)
        assert other[0].is_contiguous(memory_format=torch.channels_last)
    assert "cannot be compiled" not in caplog.text
    assert 0 < inductor_metrics.generated_kernel_count <= most_loops


def test_what_cannot_be_compiled_runs_all_the_same(
    pictures: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise torch._dynamo.exc.Unsupported("no compiler")

    monkeypatch.setattr(torch, "compile", lambda _, **__: fail)
    augment._compiled.cache_clear()
    try:
        transform = Augment(AugmentConfig(), seed=3, engine="compiled")
        for _ in range(2):
            got = transform(*pictures, epoch=0, positions=np.arange(24))
    finally:
        augment._compiled.cache_clear()
    plain = Augment(AugmentConfig(), seed=3, engine="torch")
    assert torch.equal(got[0], plain(*pictures, epoch=0, positions=np.arange(24))[0])
    assert caplog.text.count("no compiler") == 1


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"brightness": float("inf")}, {}, "inf"),
        ({"scale": -0.5}, {}, "-0.5"),
        ({"rotation": float("nan")}, {}, "nan"),
        ({}, {"seed": 2**63}, "seed=9223372036854775808"),
        ({}, {"engine": "cuda"}, "engine=cuda: it is one of auto, opencv, torch, compiled"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    config: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Augment(AugmentConfig(**config), **arguments)
    assert "\n" not in str(caught.value)


def test_normalisation_is_imagenets(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, alphas = pictures
    expected = torchvision_ops.normalize(
        images.permute(0, 3, 1, 2) / 255, preprocessing.MEAN, preprocessing.STD
    )
    got, mattes = preprocessing.normalise(images, alphas)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(mattes, alphas[:, None] / 255)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_batch_given_is_left_as_it_was(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, alphas = pictures[0].clone(), pictures[1].clone()
    for config in (AugmentConfig(), AugmentConfig(**EVERYTHING)):
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


def test_dataloader_processes_augment_after_their_parent_has(
    pictures: tuple[torch.Tensor, torch.Tensor],
) -> None:
    here = [Augmented(*pictures)[epoch] for epoch in range(2)]
    loader = torch.utils.data.DataLoader(
        Augmented(*pictures), None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for ours, theirs in zip(here, loader, strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_depend_on_seed_epoch_and_position_only() -> None:
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


def test_parameters_have_torchvisions_distribution() -> None:
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


def test_zero_strength_changes_nothing(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, alphas = pictures
    off = AugmentConfig(flip=0, brightness=0, contrast=0, saturation=0)
    got = Augment(off)(images, alphas, epoch=0, positions=np.arange(24))
    expected = preprocessing.normalise(images, alphas)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1])


def test_geometry_moves_image_and_alpha_together(
    pictures: tuple[torch.Tensor, torch.Tensor],
) -> None:
    _, alphas = pictures
    soft = torch.nn.functional.avg_pool2d(alphas[:, None].float(), 9, 1, 4).to(torch.uint8)[:, 0]
    images = soft[..., None].expand(-1, -1, -1, 3).contiguous()  # the alpha as a picture
    config = AugmentConfig(
        brightness=0, contrast=0, saturation=0, scale=0.3, rotation=20, translation=0.1
    )
    moved, mattes = Augment(config, seed=1)(images, soft, epoch=0, positions=np.arange(24))
    assert np.abs(levels(moved)[..., 0] / 255 - mattes[:, 0].double().numpy()).max() < 1e-4
    assert (moved - preprocessing.normalise(images, soft)[0]).abs().mean() > 0.05


def geometry_only(angle: float = 0.0, shift_x: float = 0.0) -> Parameters:
    none, zero = np.zeros(1, bool), np.zeros(1)
    order, factors = np.array([[0, 1, 2]]), np.ones((1, 3))
    return Parameters(none, order, factors, zero + 1, zero + angle, zero + shift_x, zero, none)


def warped(picture: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    ratio = picture.shape[-2] / picture.shape[-1]
    theta = augment.to_device(parameters, torch.device("cpu"), ratio).theta
    return augment.warp(picture, picture[:, :1], theta)[0]


def test_a_shift_by_a_quarter_moves_every_pixel_by_a_quarter() -> None:
    picture = torch.rand(1, 3, 32, 64)
    moved = warped(picture, geometry_only(shift_x=0.25))
    torch.testing.assert_close(moved[..., 16:], picture[..., :48], rtol=0, atol=1e-5)


def test_a_quarter_turn_turns_the_image_counter_clockwise() -> None:
    picture = torch.rand(1, 3, 32, 32)
    moved = warped(picture, geometry_only(angle=90.0))
    torch.testing.assert_close(moved, picture.rot90(1, (2, 3)), rtol=0, atol=1e-4)


def test_a_new_background_keeps_the_person_and_removes_the_other_one() -> None:
    pictures = torch.full((2, 3, 64, 64), 50.0)
    mattes = torch.zeros(2, 1, 64, 64)
    mattes[0, :, 30:50, 30:50] = 1  # a person of level 200 before 50
    mattes[1, :, 10:20, 10:20] = 1  # a person of level 250 before 90
    pictures[1] = 90.0
    pictures[0][:, 30:50, 30:50] = 200.0
    pictures[1][:, 10:20, 10:20] = 250.0
    mixed = augment.new_background(pictures, mattes, torch.tensor([True, False]))
    torch.testing.assert_close(mixed[1], pictures[1])
    assert torch.all(mixed[0][:, 30:50, 30:50] == 200.0)
    outside = mixed[0][mattes[0].expand(3, -1, -1) == 0]
    # No trace of 250, nor of 50.
    torch.testing.assert_close(outside, torch.full_like(outside, 90.0), rtol=0, atol=3.0)


def test_a_new_background_is_that_of_the_previous_image() -> None:
    pictures = torch.stack([torch.full((3, 32, 32), level) for level in (10.0, 20.0, 30.0)])
    mixed = augment.new_background(pictures, torch.zeros(3, 1, 32, 32), torch.ones(3).bool())
    torch.testing.assert_close(mixed, pictures.roll(1, dims=0))
