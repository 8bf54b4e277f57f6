"""The loader: the same batches for any number of workers, every state resumable, threads that end, damage that is named."""

from __future__ import annotations

import io
import itertools
import json
import logging
import shutil
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from portrait_dist.data import AISegmentIterableDataset, Batch, StreamLoader, build_loader
from portrait_dist.errors import DamagedDataError, InputError


def batches(loader: StreamLoader, epoch: int = 0) -> list[Batch]:
    loader.set_epoch(epoch)
    return list(loader)


def keys(loader: StreamLoader, epoch: int = 0) -> list[list[str]]:
    return [batch.keys for batch in batches(loader, epoch)]


def flat(lists: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(lists))


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert [batch.keys for batch in some] == [batch.keys for batch in others]
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.alpha, other.alpha)
        assert np.array_equal(one.positions, other.positions)
        assert one.epoch == other.epoch


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_number_of_threads_gives_the_same_batches(tiny_shards, split):
    expected = batches(build_loader(tiny_shards, split, 5, seed=1, workers=0), epoch=2)
    for workers in (1, 2, 5):
        assert_same(
            batches(
                build_loader(tiny_shards, split, 5, seed=1, workers=workers, prefetch=workers),
                epoch=2,
            ),
            expected,
        )


@pytest.mark.parametrize(("split", "rank"), [("train", 0), ("val", 1)])
def test_any_number_of_dataloader_processes_gives_the_same_batches(tiny_shards, split, rank):
    expected = keys(
        build_loader(tiny_shards, split, 5, seed=1, workers=0, rank=rank, world_size=2), epoch=0
    )
    later = keys(
        build_loader(tiny_shards, split, 5, seed=1, workers=0, rank=rank, world_size=2), epoch=4
    )
    for workers in (0, 2, 3):
        dataset = AISegmentIterableDataset(tiny_shards, split, 5, seed=1, rank=rank, world_size=2)
        loader = DataLoader(
            dataset, batch_size=5, num_workers=workers, persistent_workers=workers > 0
        )
        assert [batch["key"] for batch in loader] == expected
        dataset.set_epoch(4)  # reaches the processes that are running
        assert [batch["key"] for batch in loader] == later
        dataset.load_state_dict(dataset.state_after(batches=1) | {"epoch": 4})
        assert [batch["key"] for batch in loader] == later[1:]
        assert len(loader) == len(expected)


def test_samples_of_the_dataset_are_those_of_the_loader(tiny_shards):
    dataset = AISegmentIterableDataset(tiny_shards, "val", 3)
    samples = list(dataset)
    (batch,) = batches(build_loader(tiny_shards, "val", 16))
    assert len(samples) == len(dataset) == dataset.samples == 7
    assert [sample["key"] for sample in samples] == batch.keys
    assert torch.equal(torch.stack([sample["image"] for sample in samples]), batch.image)
    assert [sample["position"] for sample in samples] == batch.positions.tolist()


def test_pixels_are_those_of_the_stored_files(tiny_shards):
    stored = {}
    for tar in sorted(tiny_shards.glob("train-*.tar")):
        with tarfile.open(tar) as file:
            stored |= {
                member.name: np.asarray(Image.open(io.BytesIO(file.extractfile(member).read())))
                for member in file
            }
    for batch in batches(build_loader(tiny_shards, "train", 8)):
        assert batch.image.dtype == batch.alpha.dtype == torch.uint8
        assert batch.image.shape == (8, 32, 32, 3)
        for row, key in enumerate(batch.keys):
            assert (
                np.abs(batch.image[row].numpy().astype(int) - stored[f"{key}.jpg"]).max() <= 1
            )  # two builds of libjpeg
            assert np.array_equal(batch.alpha[row].numpy(), stored[f"{key}.png"])


def test_every_training_sample_comes_once_and_the_left_out_ones_change(tiny_shards):
    loader = build_loader(tiny_shards, "train", 8, world_size=2, rank=0)
    other = build_loader(tiny_shards, "train", 8, world_size=2, rank=1)
    everybody = set(flat(keys(build_loader(tiny_shards, "train", 8, drop_last=False))))
    assert len(everybody) == 57
    assert loader.samples_left_out == 57 % 16
    missing = []
    for epoch in range(3):
        seen = flat(keys(loader, epoch) + keys(other, epoch))
        assert len(seen) == len(set(seen)) == 48
        missing.append(frozenset(everybody - set(seen)))
    assert len(set(missing)) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 11])
def test_every_validation_sample_is_seen_once_across_ranks(tiny_shards, world_size):
    """7 samples: more ranks than shards (1), and more ranks than samples."""
    loaders = [
        build_loader(tiny_shards, "val", 2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [flat(keys(loader)) for loader in loaders]
    assert sorted(flat(seen)) == sorted(flat(keys(build_loader(tiny_shards, "val", 7))))
    assert [len(keys(loader)) for loader in loaders] == [len(loader) for loader in loaders]
    assert [len(part) for part in seen] == [len(loader.dataset) for loader in loaders]


@pytest.mark.parametrize("order", ["full", "block"])
def test_global_batches_are_the_same_for_any_world_size(tiny_shards, order):
    options = {"seed": 5, "order": order, "block_samples": 20, "workers": 0}
    expected = keys(build_loader(tiny_shards, "train", 24, **options), epoch=1)
    for world_size in (2, 3, 4, 8):
        ranks = [
            keys(
                build_loader(
                    tiny_shards,
                    "train",
                    24 // world_size,
                    rank=rank,
                    world_size=world_size,
                    **options,
                ),
                epoch=1,
            )
            for rank in range(world_size)
        ]
        assert [flat(parts) for parts in zip(*ranks, strict=True)] == expected


def test_resuming_after_any_number_of_batches_yields_exactly_the_rest(tiny_shards):
    whole = keys(build_loader(tiny_shards, "train", 8, seed=2), epoch=3)
    for taken in range(len(whole) + 1):
        loader = build_loader(tiny_shards, "train", 8, seed=2, prefetch=3)
        loader.set_epoch(3)
        iterator = iter(loader)
        assert [next(iterator).keys for _ in range(taken)] == whole[:taken]
        state = json.loads(json.dumps(loader.state_dict()))  # plain numbers
        assert all(type(value) is int for value in state.values())
        assert state["samples_seen"] == 8 * taken  # what was decoded ahead does not count
        resumed = build_loader(tiny_shards, "train", 8, seed=2)
        resumed.load_state_dict(state)
        resumed.set_epoch(3)  # as a trainer does
        assert resumed.batches_left == len(whole) - taken
        assert keys(resumed, 3) == whole[taken:]
        assert keys(resumed, 3) == whole  # only once: the next pass is a whole epoch again
        assert keys(resumed, 4) == keys(build_loader(tiny_shards, "train", 8, seed=2), epoch=4)


def test_resuming_on_another_world_size_yields_exactly_the_rest(tiny_shards):
    whole = keys(build_loader(tiny_shards, "train", 24, seed=2), epoch=1)
    before = build_loader(tiny_shards, "train", 8, seed=2, rank=1, world_size=3)
    before.set_epoch(1)
    next(iter(before))
    rest = []
    for rank in range(2):
        after = build_loader(tiny_shards, "train", 12, seed=2, rank=rank, world_size=2)
        after.load_state_dict(before.state_dict())
        rest.append(keys(after, 1))
    assert [flat(parts) for parts in zip(*rest, strict=True)] == whole[1:]


def test_a_position_in_the_validation_split_can_be_resumed(tiny_shards):
    loader = build_loader(tiny_shards, "val", 2)
    whole = keys(loader)
    iterator = iter(loader)
    next(iterator)
    resumed = build_loader(tiny_shards, "val", 2)
    resumed.load_state_dict(loader.state_dict())
    assert keys(resumed) == whole[1:]


def test_a_state_of_other_data_or_another_seed_is_refused(tiny_shards):
    state = build_loader(tiny_shards, "train", 8, seed=2).state_dict()
    with pytest.raises(InputError, match="seed=2"):
        build_loader(tiny_shards, "train", 8, seed=3).load_state_dict(state)
    with pytest.raises(InputError, match="samples=57"):
        build_loader(tiny_shards, "val", 8, seed=2).load_state_dict(state)


def test_another_epoch_set_while_iterating_starts_it_at_its_beginning(tiny_shards):
    loader = build_loader(tiny_shards, "train", 8)
    old = iter(loader)
    next(old)
    loader.set_epoch(1)
    next(old)  # goes on in epoch 0, and no longer counts
    assert loader.state_dict() == {"epoch": 1, "samples_seen": 0, "samples": 57, "seed": 0}
    assert [batch.keys for batch in loader] == keys(build_loader(tiny_shards, "train", 8), 1)


def test_a_trainer_finds_what_it_expects_of_a_loader(tiny_shards):
    loader = build_loader(tiny_shards, "train", 16)
    assert (len(loader), loader.batch_size, len(loader.dataset), loader.dataset.samples) == (
        3,
        16,
        48,
        57,
    )
    assert loader.sampler is None
    assert loader.batch_sampler is None
    assert loader.drop_last
    assert loader.num_workers == 2
    assert "57 samples, 3 batches" in loader.describe()
    assert "9 left out" in loader.describe()
    batch = next(iter(loader))
    assert len(batch) == len(batch.to("cpu")) == 16
    assert loader.data_wait_seconds > 0


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode-")]


def test_no_thread_outlives_its_iteration(tiny_shards):
    loader = build_loader(tiny_shards, "train", 4, workers=3)
    for _ in loader:
        assert len(decoding_threads()) == 3
        break  # leaves the loop early
    assert decoding_threads() == []
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert decoding_threads() == []
    assert next(iterator, None) is None
    list(loader)
    assert decoding_threads() == []


def test_batches_decoded_ahead_are_bounded(tiny_shards, monkeypatch):
    reads: list[int] = []
    read = AISegmentIterableDataset.read

    def counted(self, sample, image, alpha):
        reads.append(sample)
        return read(self, sample, image, alpha)

    monkeypatch.setattr(AISegmentIterableDataset, "read", counted)
    iterator = iter(build_loader(tiny_shards, "train", 4, workers=2, prefetch=3))
    for taken in range(1, 4):
        next(iterator)
        time.sleep(0.3)  # long enough to decode everything, if nothing held them back
        assert len(reads) <= 4 * (taken + 3)
    iterator.close()


def test_a_batch_stays_what_it_was_while_others_are_decoded(tiny_shards):
    kept = batches(build_loader(tiny_shards, "train", 4))
    assert_same(kept, batches(build_loader(tiny_shards, "train", 4, workers=0)))


@pytest.fixture
def damaged(tiny_shards: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Shards with one byte changed in each of two samples, and their keys."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    loader = build_loader(tiny_shards, "train", 57, shuffle=False)
    dataset = loader.dataset
    chosen = [5, 33]
    for sample in chosen:
        tar = folder / f"train-{sample // 10:05d}.tar"
        data = bytearray(tar.read_bytes())
        data[data.find(bytes(dataset.shards.read(sample).image)) + 200] ^= 0xFF
        tar.write_bytes(data)
    return folder, [dataset.shards.read(sample).key for sample in chosen]


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_stops_at_the_batch_that_has_it_and_says_where(damaged, workers):
    folder, _ = damaged
    iterator = iter(build_loader(folder, "train", 4, shuffle=False, workers=workers))
    assert len(next(iterator)) == 4  # samples 0 to 3
    with pytest.raises(DamagedDataError, match=r"train-00000\.tar, sample 5.*verify"):
        next(iterator)
    assert decoding_threads() == []


def test_skipped_damage_is_counted_logged_once_and_changes_no_other_batch(
    damaged, tiny_shards, caplog
):
    folder, bad = damaged
    expected = batches(build_loader(tiny_shards, "train", 8))
    loader = build_loader(folder, "train", 8, on_damage="skip")
    with caplog.at_level(logging.WARNING):
        got = batches(loader)
        batches(loader, epoch=1)
    assert len(got) == len(loader) == len(expected)
    for have, want in zip(got, expected, strict=True):
        rows = [row for row, key in enumerate(want.keys) if key not in bad]
        assert have.keys == [want.keys[row] for row in rows]
        assert torch.equal(have.image, want.image[rows])
        assert np.array_equal(have.positions, want.positions[rows])
    assert len(loader.damaged) == 2
    assert len(caplog.records) == 2


def test_a_batch_with_nothing_left_is_not_skipped(damaged):
    folder, _ = damaged
    with pytest.raises(DamagedDataError, match="all 1 samples of a batch"):
        batches(build_loader(folder, "train", 1, on_damage="skip"))


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("train", {"batch_size": 0}, "batch_size=0"),
        ("train", {"workers": -1}, "workers=-1"),
        ("train", {"prefetch": 0}, "prefetch=0"),
        ("train", {"rank": 2, "world_size": 2}, "rank=2"),
        ("train", {"rank": 1}, "give both"),
        ("train", {"on_damage": "ignore"}, "stop or skip"),
        ("train", {"order": "random"}, "full, block"),
        ("train", {"size": (64, 64)}, "packed at 32x32"),
        ("trian", {}, "train"),
    ],
)
def test_wrong_options_are_refused_at_once_with_what_to_do(tiny_shards, split, options, message):
    with pytest.raises(InputError, match=message):
        build_loader(tiny_shards, split, **options)


def test_shards_at_original_size_come_at_the_size_asked_for(split_dir, tmp_path):
    from portrait_dist.data.shards import writer

    writer.pack(split_dir, tmp_path / "shards", size=None, samples_per_shard=30)
    exact = batches(build_loader(tmp_path / "shards", "val", 4, size=(96, 72)))
    scaled = batches(build_loader(tmp_path / "shards", "val", 4, size=(96, 72), exact=False))
    assert exact[0].image.shape == (4, 96, 72, 3)
    assert build_loader(tmp_path / "shards", "val", 4).dataset.size == (256, 256)
    for one, other in zip(exact, scaled, strict=True):
        assert torch.equal(one.alpha, other.alpha)
        assert (one.image.float() - other.image.float()).abs().mean() < 3  # levels of 255
