"""The arithmetic of the order over thousands of sizes, ranks and positions; nothing is read."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portrait_dist.data.stream.order import BatchPlan, Order, hash64, hash64_each, permute
from portrait_dist.errors import InputError

seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)
batch_sizes = st.integers(1, 33)
worlds = st.integers(1, 17)
samples = st.integers(1, 700)
shard_lists = st.lists(st.integers(1, 60), min_size=1, max_size=15)


def dealt(plan: BatchPlan) -> list[list[int]]:
    """Positions of each batch of a rank."""
    return [list(range(*plan.span(batch))) for batch in range(plan.batches)]


def all_ranks(
    count: int, batch_size: int, world_size: int, *, drop_last: bool, start: int = 0
) -> list[list[list[int]]]:
    return [
        dealt(BatchPlan(count, batch_size, rank, world_size, drop_last, start))
        for rank in range(world_size)
    ]


def global_batches(ranks: list[list[list[int]]]) -> list[list[int]]:
    longest = max(len(batches) for batches in ranks)
    return [
        [position for batches in ranks for position in (batches[k] if k < len(batches) else [])]
        for k in range(longest)
    ]


@settings(max_examples=300, deadline=None)
@given(size=st.integers(1, 3000), secret=st.integers(0, 2**64 - 1))
def test_permutation_takes_every_value_once(size: int, secret: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, secret)), np.arange(size))


@settings(max_examples=150, deadline=None)
@given(
    seed=seeds,
    epoch=epochs,
    shards=shard_lists,
    block=st.integers(1, 400),
    kind=st.sampled_from(["full", "block", "sequential"]),
)
def test_every_epoch_is_a_permutation_of_the_split(
    seed: int, epoch: int, shards: list[int], block: int, kind: str
) -> None:
    count = sum(shards)
    order = Order(count, seed, kind, block_samples=block, shard_sizes=shards)
    assert np.array_equal(np.sort(order.samples_at(epoch, np.arange(count))), np.arange(count))


@settings(max_examples=150, deadline=None)
@given(
    seed=seeds,
    epoch=epochs,
    shards=shard_lists,
    block=st.integers(1, 400),
    kind=st.sampled_from(["full", "block"]),
    data=st.data(),
)
def test_a_position_means_the_same_sample_whatever_is_asked_with_it(
    seed: int, epoch: int, shards: list[int], block: int, kind: str, data: st.DataObject
) -> None:
    count = sum(shards)
    order = Order(count, seed, kind, block_samples=block, shard_sizes=shards)
    whole = order.samples_at(epoch, np.arange(count))
    some = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20)))
    other_epoch_between = order.samples_at(epoch + 1, some)
    assert np.array_equal(order.samples_at(epoch, some), whole[some])
    assert len(other_epoch_between) == len(some)


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    count=st.integers(1, 700),
    asked=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=40),
    data=st.data(),
)
def test_epochs_in_a_row_have_the_order_that_each_has_alone(
    seed: int, count: int, asked: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Those of few positions are found several at a time."""
    order = Order(count, seed)
    some = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), dtype=np.int64)
    kinds = some, np.arange(count), np.arange(min(count, 80))
    steps = [*((epoch, 2) for epoch in range(15)), *asked, (2**63 - 2, 0), (2**63 - 1, 0)]
    for epoch, kind in steps:
        found = order.samples_at(epoch, kinds[kind])
        alone = permute(kinds[kind], count, hash64(order.seed, epoch))
        assert np.array_equal(found, alone)
        found[:] = -1  # what was handed out is the caller's


def test_threads_that_ask_for_different_positions_get_their_own_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order, equal = Order(1000, 3), np.array_equal
    mine, other = np.arange(20), np.arange(500, 520)
    order.samples_at(4, mine)

    def while_another_thread_asks(first: np.ndarray, second: np.ndarray) -> bool:
        monkeypatch.setattr(np, "array_equal", equal)
        found = equal(first, second)
        order.samples_at(4, other)
        return found

    monkeypatch.setattr(np, "array_equal", while_another_thread_asks)
    found = order.samples_at(4, mine)
    assert np.array_equal(found, Order(1000, 3).samples_at(4, mine))


@pytest.mark.parametrize("kind", ["full", "block"])
def test_epochs_and_seeds_differ_as_sequences(kind: str) -> None:
    count = 1000
    positions = np.arange(count)
    sequences = [
        Order(count, seed, kind, block_samples=200, shard_sizes=[100] * 10) for seed in range(3)
    ]
    rows = np.stack(
        [order.samples_at(epoch, positions) for order in sequences for epoch in range(4)]
    )
    same_place = (rows[:, None] == rows[None]).sum(axis=2) - count * np.eye(len(rows), dtype=int)
    assert (
        same_place.max() < 25
    )  # two unrelated orders of 1000 agree in 1 place, or in up to 10 within a block


def test_two_interpreters_compute_the_same_order() -> None:
    script = (
        "import numpy as np; from portrait_dist.data.stream.order import Order; import sys; "
        "order = Order(12345, 7).samples_at(3, np.arange(50)); "
        "sys.stdout.write(' '.join(map(str, order.tolist())))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert (
        runs[0].stdout
        == runs[1].stdout
        == " ".join(map(str, Order(12345, 7).samples_at(3, np.arange(50)).tolist()))
    )


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    """An older release's run resumes with the same sequence: these numbers never change."""
    assert Order(10, 0).samples_at(0, np.arange(10)).tolist() == [4, 7, 2, 3, 9, 0, 1, 5, 6, 8]
    blocks = Order(10, 0, "block", block_samples=4, shard_sizes=[3, 3, 4])
    assert blocks.samples_at(1, np.arange(10)).tolist() == [2, 6, 1, 0, 7, 8, 9, 3, 4, 5]


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
def test_all_orders_of_few_samples_are_equally_likely(count: int) -> None:
    """Chi-squared over the count! orders, within 5 standard deviations."""
    orders = int(np.prod(np.arange(1, count + 1)))
    secrets = hash64_each(hash64(3), np.arange(orders * 40))
    images = np.stack(
        [permute(np.full(len(secrets), value), count, secrets) for value in range(count)], axis=1
    )
    _, found = np.unique((images * count ** np.arange(count)).sum(axis=1), return_counts=True)
    assert len(found) == orders
    assert abs(((found - 40) ** 2 / 40).sum() - (orders - 1)) < 5 * np.sqrt(2 * (orders - 1))


def test_neighbours_are_scattered() -> None:
    """Where a sample lands, and how far from its neighbour, is uniform: chi-squared, 5 sigma."""
    secrets = hash64_each(hash64(9), np.arange(50_000))
    here, there = (permute(np.full(50_000, value), 500, secrets) for value in (123, 124))
    for values, cells in ((here, 500), ((there - here) % 500 - 1, 499)):
        counts, expected = np.bincount(values, minlength=cells), 50_000 / cells
        assert abs(((counts - expected) ** 2 / expected).sum() - (cells - 1)) < 5 * np.sqrt(
            2 * (cells - 1)
        )


@settings(max_examples=400, deadline=None)
@given(count=samples, batch_size=batch_sizes, world_size=worlds)
def test_training_batches_are_equal_in_number_and_size_on_every_rank(
    count: int, batch_size: int, world_size: int
) -> None:
    ranks = all_ranks(count, batch_size, world_size, drop_last=True)
    steps = count // (batch_size * world_size)
    assert [len(batches) for batches in ranks] == [steps] * world_size
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    together = [position for batch in global_batches(ranks) for position in batch]
    assert together == list(
        range(steps * batch_size * world_size)
    )  # each once, in order, and the tail dropped


@settings(max_examples=400, deadline=None)
@given(count=st.integers(0, 700), batch_size=batch_sizes, world_size=st.integers(1, 40))
def test_evaluation_deals_every_position_once_and_evenly(
    count: int, batch_size: int, world_size: int
) -> None:
    ranks = all_ranks(count, batch_size, world_size, drop_last=False)
    assert sorted(position for batches in ranks for batch in batches for position in batch) == list(
        range(count)
    )
    loads = [sum(len(batch) for batch in batches) for batches in ranks]
    assert max(loads) - min(loads) <= 1
    assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)


@settings(max_examples=300, deadline=None)
@given(count=samples, per_rank=st.integers(1, 6), drop_last=st.booleans())
def test_global_batches_do_not_depend_on_the_world_size(
    count: int, per_rank: int, drop_last: bool
) -> None:
    whole = 24 * per_rank
    expected = global_batches(all_ranks(count, whole, 1, drop_last=drop_last))
    for world_size in (2, 3, 4, 8, 24):
        assert (
            global_batches(all_ranks(count, whole // world_size, world_size, drop_last=drop_last))
            == expected
        )


@settings(max_examples=300, deadline=None)
@given(
    count=samples,
    before=worlds,
    after=worlds,
    per=st.integers(1, 5),
    stop=st.integers(0, 40),
    drop_last=st.booleans(),
)
def test_resuming_on_any_world_size_yields_exactly_the_rest(
    count: int, before: int, after: int, per: int, stop: int, drop_last: bool
) -> None:
    global_batch = before * after * per
    uninterrupted = global_batches(all_ranks(count, after * per, before, drop_last=drop_last))
    plan = BatchPlan(count, after * per, 0, before, drop_last)
    stop = min(stop, plan.whole_batches)
    rest = global_batches(
        all_ranks(count, before * per, after, drop_last=drop_last, start=plan.seen_after(stop))
    )
    assert plan.global_batch == global_batch
    assert rest == uninterrupted[stop:]


@settings(max_examples=100, deadline=None)
@given(seed=seeds, epoch=epochs, shards=shard_lists, block=st.integers(1, 200), data=st.data())
def test_block_order_bounds_how_many_shards_are_touched(
    seed: int, epoch: int, shards: list[int], block: int, data: st.DataObject
) -> None:
    count = sum(shards)
    order = Order(count, seed, "block", block_samples=block, shard_sizes=shards)
    first = data.draw(st.integers(0, max(0, count - block)))
    touched = order.samples_at(epoch, np.arange(first, min(first + block, count)))
    open_shards = len(np.unique(np.searchsorted(np.cumsum(shards), touched, side="right")))
    line = np.array(
        sorted(shards)
    )  # 2 * block samples in a row, cut anywhere, out of the smallest shards
    bound = int((np.cumsum(line) < 2 * block).sum()) + 2
    assert open_shards <= min(bound, len(shards))


def test_what_is_dropped_changes_with_the_epoch() -> None:
    plan = BatchPlan(1000, 16, 0, 8)
    assert plan.dropped == 1000 % 128
    order = Order(1000, 0)
    tails = [
        set(order.samples_at(epoch, np.arange(1000 - plan.dropped, 1000)).tolist())
        for epoch in range(60)
    ]
    assert all(len(tail) == plan.dropped for tail in tails)
    assert all(len(one & other) < plan.dropped / 2 for one, other in itertools.pairwise(tails))
    assert len(set().union(*tails)) > 990  # everybody is dropped at some time


def test_a_billion_samples_on_4096_ranks_are_planned_without_a_table() -> None:
    plan = BatchPlan(10**9, 64, 4095, 4096)
    order = Order(10**9, 1)
    assert plan.batches == 10**9 // (64 * 4096)
    last = np.arange(*plan.span(plan.batches - 1))
    assert len(last) == 64
    chosen = order.samples_at(2, last)
    assert len(np.unique(chosen)) == 64
    assert chosen.max() < 10**9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchPlan(10, 0), "batch_size"),
        (lambda: BatchPlan(10, 1, 2, 2), "rank"),
        (lambda: BatchPlan(10, 1, start=11), "samples_seen"),
        (lambda: Order(10, 0, "blocks"), "full, block"),
        (lambda: BatchPlan(10, 2**63), r"batch_size=9223372036854775808.*below 2\^63"),
        (lambda: BatchPlan(10, 1, start=-1), "samples_seen=-1"),
        (lambda: Order(-1), "samples=-1"),
        (lambda: Order(10, 2**63), "seed=9223372036854775808"),
        (lambda: Order(10, -(2**63) - 1), "seed=-9223372036854775809"),
        (lambda: Order(10, 0.5), "seed=0.5: give a whole number"),  # type: ignore[arg-type]
        (lambda: Order(10, 0, "block", block_samples=0), "block"),
        (lambda: Order(10, 0, shard_sizes=[4, 5]), "pack"),
    ],
)
def test_impossible_plans_are_refused_with_what_to_do(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make()
