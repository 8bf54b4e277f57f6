"""The loader: the same batches for any number of workers, every state resumable, threads that end.

Damage is named, and what is decoded beyond the end of an epoch is used or discarded, never seen.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from portrait_dist.data import AISegmentIterableDataset, Batch, StreamLoader, build_loader
from portrait_dist.data.stream.loader import decoding_threads
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.system import info
from tests.damage import damage_sample
from tests.waiting import wait_for


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
def test_any_number_of_threads_gives_the_same_batches(tiny_shards: Path, split: str) -> None:
    expected = batches(build_loader(tiny_shards, split, 5, seed=1, workers=-1), epoch=2)
    for workers in (1, 2, 5):
        assert_same(
            batches(
                build_loader(tiny_shards, split, 5, seed=1, workers=workers, prefetch=workers),
                epoch=2,
            ),
            expected,
        )


@pytest.mark.parametrize(("split", "rank"), [("train", 0), ("val", 1)])
def test_any_number_of_dataloader_processes_gives_the_same_batches(
    tiny_shards: Path, split: str, rank: int
) -> None:
    expected = keys(
        build_loader(tiny_shards, split, 5, seed=1, workers=-1, rank=rank, world_size=2), epoch=0
    )
    later = keys(
        build_loader(tiny_shards, split, 5, seed=1, workers=-1, rank=rank, world_size=2), epoch=4
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


def test_samples_of_the_dataset_are_those_of_the_loader(tiny_shards: Path) -> None:
    dataset = AISegmentIterableDataset(tiny_shards, "val", 3)
    samples = list(dataset)
    (batch,) = batches(build_loader(tiny_shards, "val", 16))
    assert len(samples) == len(dataset) == dataset.samples == 7
    assert [sample["key"] for sample in samples] == batch.keys
    assert torch.equal(torch.stack([sample["image"] for sample in samples]), batch.image)
    assert [sample["position"] for sample in samples] == batch.positions.tolist()


def _bytes_of(file: tarfile.TarFile, member: tarfile.TarInfo) -> io.BytesIO:
    extracted = file.extractfile(member)
    assert extracted is not None
    return io.BytesIO(extracted.read())


def test_pixels_are_those_of_the_stored_files(tiny_shards: Path) -> None:
    stored: dict[str, np.ndarray] = {}
    for tar in sorted(tiny_shards.glob("train-*.tar")):
        with tarfile.open(tar) as file:
            stored |= {
                member.name: np.asarray(Image.open(_bytes_of(file, member))) for member in file
            }
    for batch in batches(build_loader(tiny_shards, "train", 8)):
        assert batch.image.dtype == batch.alpha.dtype == torch.uint8
        assert batch.image.shape == (8, 32, 32, 3)
        for row, key in enumerate(batch.keys):
            assert (
                np.abs(batch.image[row].numpy().astype(int) - stored[f"{key}.jpg"]).max() <= 1
            )  # two builds of libjpeg
            assert np.array_equal(batch.alpha[row].numpy(), stored[f"{key}.png"])


def test_every_training_sample_comes_once_and_the_dropped_ones_change(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "train", 8, world_size=2, rank=0)
    other = build_loader(tiny_shards, "train", 8, world_size=2, rank=1)
    everybody = set(flat(keys(build_loader(tiny_shards, "train", 8, drop_last=False))))
    assert len(everybody) == 57
    assert loader.samples_dropped == 57 % 16
    missing = []
    for epoch in range(3):
        seen = flat(keys(loader, epoch) + keys(other, epoch))
        assert len(seen) == len(set(seen)) == 48
        missing.append(frozenset(everybody - set(seen)))
    assert len(set(missing)) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 11])
def test_every_validation_sample_is_seen_once_across_ranks(
    tiny_shards: Path, world_size: int
) -> None:
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
def test_global_batches_are_the_same_for_any_world_size(tiny_shards: Path, order: str) -> None:
    options: dict[str, Any] = {"seed": 5, "order": order, "block_samples": 20, "workers": -1}
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


def test_resuming_after_any_number_of_batches_yields_exactly_the_rest(tiny_shards: Path) -> None:
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


def test_resuming_on_another_world_size_yields_exactly_the_rest(tiny_shards: Path) -> None:
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


def test_a_position_in_the_validation_split_can_be_resumed(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "val", 2)
    whole = keys(loader)
    iterator = iter(loader)
    next(iterator)
    resumed = build_loader(tiny_shards, "val", 2)
    resumed.load_state_dict(loader.state_dict())
    assert [batch.keys for batch in resumed] == whole[1:]


def test_a_state_of_other_data_or_another_seed_is_refused(tiny_shards: Path) -> None:
    state = build_loader(tiny_shards, "train", 8, seed=2).state_dict()
    with pytest.raises(InputError, match="seed=2"):
        build_loader(tiny_shards, "train", 8, seed=3).load_state_dict(state)
    with pytest.raises(InputError, match="samples=57"):
        build_loader(tiny_shards, "val", 8, seed=2).load_state_dict(state)


def test_another_epoch_set_while_iterating_starts_it_at_its_beginning(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "train", 8)
    old = iter(loader)
    next(old)
    loader.set_epoch(1)
    next(old)  # continues in epoch 0, and no longer counts
    assert loader.state_dict() == {"epoch": 1, "samples_seen": 0, "samples": 57, "seed": 0}
    assert [batch.keys for batch in loader] == keys(build_loader(tiny_shards, "train", 8), 1)


def test_a_trainer_finds_what_it_expects_of_a_loader(tiny_shards: Path) -> None:
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
    assert "9 dropped per epoch" in loader.describe()
    batch = next(iter(loader))
    assert len(batch) == len(batch.to("cpu")) == 16
    assert loader.data_wait_seconds > 0


OTHERS: set[threading.Thread] = set()
"""Threads that were there before a test: a loader of an earlier one may still wait to be freed."""


@pytest.fixture(autouse=True)
def _remember_others() -> None:
    OTHERS.clear()
    OTHERS.update(threads_now())


def threads_now() -> list[threading.Thread]:
    running = set(threading.enumerate()) - OTHERS
    return [thread for thread in running if thread.name.startswith("decode-")]


def test_no_thread_outlives_a_single_pass_or_one_that_is_left_early(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "train", 4, workers=3)
    for _ in loader:
        assert len(threads_now()) == 3
        break  # leaves the loop early
    assert threads_now() == []
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert threads_now() == []
    assert next(iterator, None) is None
    list(build_loader(tiny_shards, "train", 4, workers=3))
    assert threads_now() == []


@pytest.mark.parametrize("end", ["close", "drop", "leave early"])
def test_threads_that_wait_for_the_next_epoch_end_with_the_loader(
    tiny_shards: Path, end: str
) -> None:
    loader = build_loader(tiny_shards, "train", 4, workers=3)
    list(loader)
    list(loader)
    assert len(threads_now()) == 3  # decoding the next epoch
    if end == "close":
        loader.close()
        assert threads_now() == []
        assert [batch.keys for batch in loader] == keys(build_loader(tiny_shards, "train", 4), 2)
    elif end == "leave early":
        iterator = iter(loader)
        next(iterator)
        del iterator
    del loader
    assert threads_now() == []


def test_a_process_that_ends_while_threads_decode_ends_well(tiny_shards: Path) -> None:
    script = f"""
import sys
from portrait_dist.data import build_loader
loader = build_loader({str(tiny_shards)!r}, "train", 16, workers=4, prefetch=8)
for epoch in range(int(sys.argv[1])):
    for batch in loader:
        pass
"""
    for epochs in ("2", "3"):
        subprocess.run([sys.executable, "-c", script, epochs], check=True, timeout=60)


def test_a_fork_of_a_process_whose_threads_decode_reads_with_its_own(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "train", 4)
    list(loader)
    list(loader)
    expected = keys(build_loader(tiny_shards, "train", 4), 2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if [batch.keys for batch in loader] == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [batch.keys for batch in loader] == expected
    loader.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples in the order in which they were read."""
    samples: list[int] = []
    read = AISegmentIterableDataset.read

    def counted(self: Any, sample: int, image: Any, alpha: Any, cancelled: Any = None) -> str:
        samples.append(sample)
        return read(self, sample, image, alpha, cancelled)

    monkeypatch.setattr(AISegmentIterableDataset, "read", counted)
    return samples


def test_batches_decoded_ahead_are_bounded(tiny_shards: Path, reads: list[int]) -> None:
    loader = build_loader(tiny_shards, "train", 4, workers=2, prefetch=3)
    iterator = iter(loader)
    for taken in range(1, 4):
        next(iterator)
        wait_for(lambda: len(reads) >= 4 * (taken + 3))  # noqa: B023  called before taken changes
        next_task = threading.Event()
        assert not next_task.wait(0.05)  # time for more, if nothing held them back
        assert len(reads) == 4 * (taken + 3)
    iterator.close()


def test_the_next_epoch_is_decoded_before_it_is_asked_for(
    tiny_shards: Path, reads: list[int]
) -> None:
    loader = build_loader(tiny_shards, "train", 4, workers=2, prefetch=3)
    list(loader)
    assert len(reads) == 56  # a single pass decodes nothing beyond its end
    list(loader)
    wait_for(lambda: len(reads) == 2 * 56 + 3 * 4)
    iterator = iter(loader)
    expected = keys(build_loader(tiny_shards, "train", 4, workers=-1), 2)
    del reads[:]
    assert [next(iterator).keys for _ in range(3)] == expected[:3]
    wait_for(lambda: len(reads) >= 3 * 4)
    first_three = set(loader.dataset.order.samples_at(2, np.arange(12)).tolist())
    assert not first_three & set(reads)  # they were decoded before
    assert [batch.keys for batch in iterator] == expected[3:]
    loader.close()


def test_a_consumer_that_counts_batches_keeps_the_threads_at_work(tiny_shards: Path) -> None:
    """It never asks for one batch more, as a trainer that stops after ``len(loader)`` batches."""
    loader = build_loader(tiny_shards, "train", 4, workers=2, prefetch=3)
    held = []  # iterators of earlier epochs, alive while the next ones run
    for epoch in range(4):
        loader.set_epoch(epoch)
        iterator = iter(loader)
        got = [next(iterator).keys for _ in range(len(loader))]
        assert got == keys(build_loader(tiny_shards, "train", 4, workers=-1), epoch)
        held.append(iterator)
        del held[:-2]
        if epoch == 1:
            threads = set(threads_now())
    assert set(threads_now()) == threads  # none was started anew
    loader.close()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [-1, 1, 3])
def test_every_epoch_is_exact_whatever_was_expected(
    tiny_shards: Path, split: str, workers: int
) -> None:
    """Epochs in turn, again, skipped, left early, resumed: each gives what a new loader gives."""
    expected = [
        batches(build_loader(tiny_shards, split, 5, seed=1, workers=-1), epoch)
        for epoch in range(9)
    ]
    loader = build_loader(tiny_shards, split, 5, seed=1, workers=workers, prefetch=3)
    for epoch in (0, 1, 2, 2, 3, 7, 8, 0, 1):
        assert_same(batches(loader, epoch), expected[epoch])
    loader.set_epoch(2)
    iterator = iter(loader)
    assert_same([next(iterator)], expected[2][:1])
    state = loader.state_dict()
    del iterator
    assert_same(batches(loader, 3), expected[3])
    loader.load_state_dict(state)
    assert_same(list(loader), expected[2][1:])
    assert_same(list(loader), expected[3])
    loader.load_state_dict(state | {"epoch": 4})  # the epoch that was expected, but not its start
    assert_same(list(loader), expected[4][1:])
    loader.close()


def test_epochs_cut_short_are_exact_and_keep_the_threads_at_work(
    tiny_shards: Path, reads: list[int]
) -> None:
    """Cut at other batches, resumed within, whole ones between: what a new loader gives."""
    expected = [
        keys(build_loader(tiny_shards, "train", 4, workers=-1), epoch) for epoch in range(9)
    ]
    del reads[:]
    loader = build_loader(tiny_shards, "train", 4, workers=2, prefetch=3)

    def taken(epoch: int, most: int | None) -> list[list[str]]:
        loader.set_epoch(epoch)
        return [batch.keys for batch in loader.first_batches(most)]

    assert taken(0, 5) == expected[0][:5]
    assert len(reads) == 5 * 4  # the first pass decodes nothing beyond its end
    assert taken(1, 5) == expected[1][:5]
    threads = set(threads_now())
    wait_for(lambda: len(reads) == 10 * 4 + 3 * 4)
    assert taken(2, 5) == expected[2][:5]
    wait_for(lambda: len(reads) == 15 * 4 + 3 * 4)  # and nothing that no epoch gives
    assert loader.state_dict()["samples_seen"] == 20
    assert set(threads_now()) == threads  # none was started anew
    assert taken(3, 2) == expected[3][:2]  # less than the prefetch
    assert taken(4, 2) == expected[4][:2]
    assert taken(5, None) == expected[5]
    loader.load_state_dict({**loader.state_dict(), "epoch": 6, "samples_seen": 12})
    assert taken(6, 5) == expected[6][3:5]
    assert taken(7, 5) == expected[7][:5]
    assert taken(8, 99) == expected[8]
    loader.close()


def test_epochs_shorter_than_the_prefetch_are_exact(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "train", 50, workers=2, prefetch=4)
    assert len(loader) == 1
    for epoch in range(6):
        assert [batch.keys for batch in loader] == keys(
            build_loader(tiny_shards, "train", 50), epoch
        )
    loader.close()
    nothing = build_loader(tiny_shards, "train", 64, workers=2)
    assert [list(nothing) for _ in range(3)] == [[], [], []]


def test_each_iteration_is_the_next_epoch_until_one_is_set(tiny_shards: Path) -> None:
    expected = [keys(build_loader(tiny_shards, "train", 8), epoch) for epoch in range(5)]
    loader = build_loader(tiny_shards, "train", 8)
    assert [[batch.keys for batch in loader] for _ in range(3)] == expected[:3]
    next(iter(loader))  # left early, epoch 3
    assert [batch.keys for batch in loader] == expected[4]
    loader.set_epoch(1)
    loader.set_epoch(1)
    assert [batch.keys for batch in loader] == expected[1]
    assert [batch.keys for batch in loader] == expected[2]
    resumed = build_loader(tiny_shards, "train", 8)
    resumed.load_state_dict(loader.state_dict() | {"samples_seen": 16})
    assert [batch.keys for batch in resumed] == expected[2][2:]
    assert [batch.keys for batch in resumed] == expected[3]
    fixed = build_loader(tiny_shards, "train", 8, shuffle=False)
    assert [batch.keys for batch in fixed] == [batch.keys for batch in fixed]


def test_memory_of_batches_is_used_again_only_when_nothing_shares_it(tiny_shards: Path) -> None:
    loader = build_loader(tiny_shards, "train", 8, workers=2, prefetch=2)
    plain = build_loader(tiny_shards, "train", 8, workers=-1)
    plain.set_epoch(1)
    expected = [batch.image.clone() for batch in plain]
    addresses: set[int] = set()
    kept: list[Any] = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        for index, batch in enumerate(loader):
            addresses.add(batch.image.data_ptr())
            if epoch == 1:  # views of each kind keep a batch's memory, not only the batch itself
                views: list[Callable[[torch.Tensor], Any]] = [
                    lambda image: image[2:],
                    lambda image: image.numpy(),
                    lambda image: image.permute(0, 3, 1, 2)[:, :1],
                ]
                kept.append((index, views[index % 3], views[index % 3](batch.image)))
    loader.close()
    assert len(kept) == 7
    for index, view, image in kept:
        assert np.array_equal(np.asarray(image), np.asarray(view(expected[index])))
    # Those kept, in the making, spare and in use, of the pipelines of the first and later passes;
    # not 35.
    assert len(addresses) < 7 + 2 * (4 + 3)


def test_workers_are_a_number_or_chosen_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoding_threads(-1) == 0
    assert decoding_threads(5) == 5
    for cores, quota, ranks, expected in (
        (2, None, "1", 2),
        (8, None, "1", 7),
        (112, None, "8", 13),
        (112, None, "1", 16),
        (112, 8.0, "2", 3),
        (4, None, "8", 2),
    ):
        monkeypatch.setattr(info, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(info, "cpu_quota", lambda quota=quota: quota)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert decoding_threads(0) == expected


def test_a_gpus_page_locked_memory_is_used_only_when_asked_for(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not build_loader(tiny_shards, "train").pin_memory
    assert build_loader(tiny_shards, "train", pin_memory=True).pin_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not build_loader(tiny_shards, "train", pin_memory=True).pin_memory


def test_opencv_starts_no_threads_of_its_own_beside_the_decoders(tiny_shards: Path) -> None:
    import cv2

    cv2.setNumThreads(4)
    list(build_loader(tiny_shards, "train", workers=1))
    assert cv2.getNumThreads() == 1


def test_a_batch_stays_what_it_was_while_others_are_decoded(tiny_shards: Path) -> None:
    kept = batches(build_loader(tiny_shards, "train", 4))
    assert_same(kept, batches(build_loader(tiny_shards, "train", 4, workers=-1)))


@pytest.fixture
def damaged(tiny_shards: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Shards with one bit changed in each of two samples, and their keys."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    loader = build_loader(tiny_shards, "train", 57, shuffle=False)
    dataset = loader.dataset
    chosen = [5, 33]
    for sample in chosen:
        damage_sample(folder, f"train-{sample // 10:05d}.tar", sample % 10)
    return folder, [dataset.shards.read(sample).key for sample in chosen]


@pytest.mark.parametrize("workers", [-1, 2])
def test_damage_stops_at_the_batch_that_has_it_and_says_where(
    damaged: tuple[Path, list[str]], workers: int
) -> None:
    folder, _ = damaged
    iterator = iter(build_loader(folder, "train", 4, shuffle=False, workers=workers))
    assert len(next(iterator)) == 4  # samples 0 to 3
    with pytest.raises(DamagedDataError, match=r"train-00000\.tar, sample 5.*verify"):
        next(iterator)
    assert threads_now() == []


def test_skipped_damage_is_counted_logged_once_and_changes_no_other_batch(
    damaged: tuple[Path, list[str]], tiny_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_a_batch_with_nothing_left_is_not_skipped(damaged: tuple[Path, list[str]]) -> None:
    folder, _ = damaged
    with pytest.raises(DamagedDataError, match="all 1 samples of a batch"):
        batches(build_loader(folder, "train", 1, on_damage="skip"))


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("train", {"batch_size": 0}, "batch_size=0"),
        ("train", {"workers": -2}, "workers=-2"),
        ("train", {"workers": 1.5}, "workers=1.5: give a whole number"),
        ("train", {"batch_size": float("inf")}, "batch_size=inf"),
        ("train", {"seed": 2**63}, "seed=9223372036854775808"),
        ("train", {"seed": float("nan")}, "seed=nan"),
        ("train", {"size": (-32, 32)}, "size=-32"),
        ("train", {"size": (32, 32, 3)}, "height, width"),
        ("train", {"block_samples": 0}, "block_samples=0"),
        ("train", {"rank": -1, "world_size": 2}, "rank=-1"),
        ("train", {"rank": 0, "world_size": 0}, "world_size=0"),
        ("train", {"prefetch": 0}, "prefetch=0"),
        ("train", {"rank": 2, "world_size": 2}, "rank=2"),
        ("train", {"rank": 1}, "give both"),
        ("train", {"on_damage": "ignore"}, "stop or skip"),
        ("train", {"order": "random"}, "full or block"),
        ("train", {"size": (64, 64)}, "packed at 32x32"),
        ("trian", {}, "train"),
    ],
)
def test_wrong_options_are_refused_at_once_with_what_to_do(
    tiny_shards: Path, split: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_loader(tiny_shards, split, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "lacks epoch"),
        ({"epoch": -1, "samples_seen": 0}, "epoch=-1"),
        ({"epoch": 2**63, "samples_seen": 0}, "epoch=9223372036854775808"),
        ({"epoch": 0, "samples_seen": -1}, "samples_seen=-1"),
        ({"epoch": 0, "samples_seen": 58}, "samples_seen=58: the split has 57"),
        ({"epoch": 0, "samples_seen": 0.5}, "samples_seen=0.5"),
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(
    tiny_shards: Path, state: dict[str, Any], message: str
) -> None:
    loader = build_loader(tiny_shards, "train", 8)
    loader.set_epoch(3)
    before = loader.state_dict()
    with pytest.raises(InputError, match=message):
        loader.load_state_dict(state)
    with pytest.raises(InputError, match="epoch"):
        loader.set_epoch(2**63)
    assert loader.state_dict() == before


def test_shards_at_original_size_come_at_the_size_asked_for(
    split_dir: Path, tmp_path: Path
) -> None:
    from portrait_dist.data.shards import writer

    writer.pack(split_dir, tmp_path / "shards", size=None, samples_per_shard=30)
    exact = batches(build_loader(tmp_path / "shards", "val", 4, size=(96, 72)))
    scaled = batches(build_loader(tmp_path / "shards", "val", 4, size=(96, 72), exact=False))
    assert exact[0].image.shape == (4, 96, 72, 3)
    assert build_loader(tmp_path / "shards", "val", 4).dataset.size == (256, 256)
    for one, other in zip(exact, scaled, strict=True):
        assert torch.equal(one.alpha, other.alpha)
        assert (one.image.float() - other.image.float()).abs().mean() < 3  # levels of 255
