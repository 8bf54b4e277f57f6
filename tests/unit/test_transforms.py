"""Transforms of one's own: random numbers come from seed, epoch and position alone."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from portrait_dist.data import AISegmentIterableDataset, Batch, build_loader
from portrait_dist.data.stream.dataset import StreamOptions
from portrait_dist.data.stream.transforms import SampleTransforms, Transform, _DrawFrom
from portrait_dist.errors import InputError
from tests.cli import assert_one_line, call
from tests.jobs import PLAIN, TINY, lines

Array = NDArray[np.uint8]


def torchvisions() -> Transform:
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(degrees=20, translate=(0.1, 0.1), scale=(0.8, 1.2)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomPerspective(),
        ]
    )


def plain(image: Array, mask: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    image = image + generator.integers(0, 40, image.shape, np.uint8)
    return (image[:, ::-1], mask[:, ::-1]) if generator.random() < 0.5 else (image, mask)


class Albumentations:
    """What this package uses of ``albumentations.Compose``: state, a seed, names."""

    __module__ = "albumentations.core.composition"

    def __init__(self) -> None:
        self.generator = random.Random()

    def set_random_seed(self, seed: int) -> None:
        self.generator.seed(seed)

    def __call__(self, *, image: Array, mask: Array) -> dict[str, Array]:
        shift = self.generator.randrange(20)
        return {"image": np.roll(image, shift, 1), "mask": np.roll(mask, shift, 1)}


def albumentations() -> Transform:
    """The library's own where it is installed (extra ``albumentations``), else its protocol."""
    if not importlib.util.find_spec("albumentations"):
        return Albumentations()
    library: Any = importlib.import_module("albumentations")
    chosen = ("HorizontalFlip", "Affine", "RandomBrightnessContrast", "GaussNoise", "CoarseDropout")
    made: Transform = library.Compose([getattr(library, name)(p=0.7) for name in chosen])
    return made


KINDS: dict[str, Any] = {
    "torchvision": torchvisions,
    "a function": lambda: plain,
    "albumentations": albumentations,
}


@pytest.fixture(params=list(KINDS))
def transforms(request: pytest.FixtureRequest) -> Transform:
    made: Transform = KINDS[request.param]()
    return made


def by_key(batches: list[Batch]) -> dict[tuple[int, str], tuple[bytes, bytes]]:
    return {
        (batch.epoch, key): (batch.image[row].numpy().tobytes(), batch.alpha[row].numpy().tobytes())
        for batch in batches
        for row, key in enumerate(batch.keys)
    }


def test_threads_ranks_and_resuming_change_no_sample(
    tiny_shards: Path, transforms: Transform
) -> None:
    def loader(workers: int, rank: int = 0, ranks: int = 1, batch: int = 6) -> Any:
        return build_loader(
            tiny_shards, "train", batch, 3, workers, rank, ranks, transforms=transforms
        )

    one = loader(-1)
    expected = by_key([batch for _ in range(3) for batch in one])
    assert len(expected) == 3 * 54
    first, second = ({k: v for (e, k), v in expected.items() if e == epoch} for epoch in (0, 1))
    assert sum(first[key] != second[key] for key in first.keys() & second.keys()) > 40
    four = loader(4)
    # From the second epoch on the threads decode across its end.
    assert by_key([batch for _ in range(3) for batch in four]) == expected
    ranks = [by_key(list(loader(2, rank, 2, 3))) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == {place: v for place, v in expected.items() if place[0] == 0}
    stopped = loader(2)
    seen = [next(iter(stopped)) for _ in range(1)]
    resumed = loader(2)
    resumed.load_state_dict(stopped.state_dict())
    rest = by_key(list(resumed))
    assert by_key(seen) | rest == {place: v for place, v in expected.items() if place[0] == 0}


def test_worker_processes_of_a_data_loader_give_the_same_samples(
    tiny_shards: Path, transforms: Transform
) -> None:
    options = StreamOptions(transforms=transforms)
    dataset = AISegmentIterableDataset(
        tiny_shards, "train", 6, 3, rank=0, world_size=1, options=options
    )
    dataset = pickle.loads(pickle.dumps(dataset)) if transforms is plain else dataset
    expected = by_key(
        list(build_loader(tiny_shards, "train", 6, 3, 2, 0, 1, transforms=transforms))
    )
    found = {
        (0, key): (batch["image"][row].numpy().tobytes(), batch["alpha"][row].numpy().tobytes())
        for batch in DataLoader(dataset, batch_size=6, num_workers=2)
        for row, key in enumerate(batch["key"])
    }
    assert expected.items() <= found.items()


def test_the_global_generators_are_left_alone(tiny_shards: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(build_loader(tiny_shards, "train", 6, 3, 2, 0, 1, transforms=torchvisions()))
    assert torch.equal(torch.get_rng_state(), before)


def test_torchs_functions_without_a_generator_draw_from_the_samples_own() -> None:
    class Noise(v2.Transform):
        def forward(self, *inputs: Any) -> Any:
            image, mask = inputs
            noise = torch.randn_like(image, dtype=torch.float32) + torch.rand_like(image.float())
            return (image + noise.abs()).to(torch.uint8), mask

    found = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        image, mask = np.full((4, 4, 3), 100, np.uint8), np.zeros((4, 4), np.uint8)
        SampleTransforms(Noise(), 7)(image, mask, epoch=0, position=5, key="a")
        found.append(image)
    assert np.array_equal(found[0], found[1])
    assert found[0].std() > 0


HALVES = torch.full((64,), 0.5, dtype=torch.float64)
ONE_HALF = torch.tensor([0.5])
DRAWS: dict[str, Callable[[], torch.Tensor]] = {
    "rand_like, all by name": lambda: torch.rand_like(
        input=HALVES, dtype=None, memory_format=torch.preserve_format
    ),
    "randint_like": lambda: torch.randint_like(HALVES, 1000),
    "randint_like from": lambda: torch.randint_like(HALVES, 5, high=1000),
    "poisson": lambda: torch.poisson(HALVES * 100),
    "binomial": lambda: torch.binomial(HALVES * 100, HALVES),
    "bernoulli": lambda: HALVES.bernoulli(),
    "cauchy": lambda: torch.empty(64).cauchy_(),
    "geometric": lambda: torch.empty(64).geometric_(0.1),
    "log-normal": lambda: torch.empty(64).log_normal_(),
    "gamma": lambda: torch.distributions.Gamma(ONE_HALF, ONE_HALF).sample((64,)),
    "beta": lambda: torch.distributions.Beta(ONE_HALF, ONE_HALF).sample((64,)),
}


@pytest.mark.parametrize("name", list(DRAWS))
def test_whatever_can_take_a_generator_gets_the_samples_own(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = []
    for _ in range(2):
        with _DrawFrom(torch.Generator().manual_seed(3)):
            found.append(DRAWS[name]())
    assert torch.equal(*found)
    assert len(found[0].unique()) > 1
    if "like" in name:
        assert found[0].dtype == HALVES.dtype
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda image, mask, _: (image[:8], mask), r"image as uint8 \[8, 16, 3\]"),
        (lambda image, mask, _: (image, mask / 255.0), r"mask as float64 \[16, 16\]"),
        (lambda image, mask, _: image.missing, "AttributeError"),
        (lambda image, mask, _: None, "TypeError"),
        (lambda image, mask, _: sys.exit("enough"), "SystemExit: enough"),
    ],
)
def test_what_fails_or_changes_shape_or_type_is_named_with_the_sample(
    wrong: Transform, message: str
) -> None:
    image, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    with pytest.raises(InputError, match=rf"augment\.transforms: the-key: .*{message}"):
        SampleTransforms(wrong, 0, "augment.transforms")(
            image, mask, epoch=0, position=0, key="the-key"
        )


class Odd(BaseException):
    """No Exception, as those that end a thread without a word."""


@pytest.mark.timeout(60)
def test_an_error_of_any_kind_in_a_decoding_thread_reaches_the_consumer(tiny_shards: Path) -> None:
    def fails(*_: object) -> None:
        raise Odd

    loader = build_loader(tiny_shards, "train", 6, workers=2, transforms=fails)
    with pytest.raises(Odd):
        next(iter(loader))


def test_a_recipe_names_them_and_training_uses_them(tiny_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def build(black):\n"
        "    def change(image, mask, generator):\n"
        "        return image * (not black), mask\n"
        "    return change\n"
    )

    def train(run: str, *keys: str) -> Any:
        where = (f"data.shards={tiny_shards}", f"run.root={tmp_path}", f"run.name={run}")
        once = ("train.max_epochs=1", "train.batch_size=19")
        return call("train", "--json", "--recipe", PLAIN, *where, *TINY, *once, *keys)

    mine = f"augment.transforms={file}:build"
    for run, keys in (
        ("without", ()),
        ("same", (mine, "augment.args.black=false")),
        ("black", (mine, "augment.args.black=true")),
    ):
        done = train(run, *keys)
        assert done.exit_code == 0, done.stderr
    losses = {
        run: lines(tmp_path / run, "epoch")[-1]["loss"] for run in ("without", "same", "black")
    }
    assert losses["without"] == losses["same"] != losses["black"]
    changed = train("same", "train.max_epochs=2", mine, "augment.args.black=true")
    assert_one_line(changed, 2, "augment.args", "run.accept_changes=true")
    assert_one_line(train("new", "augment.transforms=nothing.there:build"), 2, "augment.transforms")
    assert not (tmp_path / "new").exists()
