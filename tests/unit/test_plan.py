"""The plan: batches and steps in one place, small splits fit, a global batch on any ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portrait_dist import config
from portrait_dist.errors import InputError
from portrait_dist.training.plan import Plan, make_plan


def plan_of(samples: int, ranks: int, *keys: str, recipe: str | None = None) -> Plan:
    return make_plan(config.load(recipe, ["data.shards=shards", *keys]), samples, ranks)


def test_the_table_says_what_is_used(tmp_path: Path) -> None:
    plan = plan_of(
        57,
        1,
        "train.batch_size=6",
        "train.accumulate=2",
        "train.lr=0.1",
        "train.lr_base_batch=4",
        "train.warmup_steps=100",
        "train.max_epochs=3",
    )
    assert (plan.global_batch, plan.batches_per_epoch, plan.steps_per_epoch) == (12, 9, 5)
    assert (plan.total_steps, plan.dropped) == (15, 3)
    assert plan.lr == pytest.approx(0.3), "linear in the global batch"
    assert plan.warmup_steps == 5, "no longer than an epoch"
    rows = plan.rows()
    assert rows["global batch"] == "12 samples = 1 rank × 6 samples × 2 batches"
    assert rows["steps per epoch"] == "5, 9 batches on each rank"
    assert rows["epochs"] == "3, 15 steps in all"
    assert rows["training samples"] == "57 (3 dropped in each epoch, others every time)"
    assert rows["learning rate"] == (
        "0.3, 3 times train.lr; warm-up over 5 steps (100 asked for; an epoch has no more)"
    )
    plain = plan_of(57, 1, "train.batch_size=6").rows()["learning rate"]
    assert plain == "0.001, not scaled; no warm-up"


@pytest.mark.parametrize(("samples", "ranks", "size"), [(10, 1, 10), (10, 3, 3), (5, 2, 2)])
def test_a_small_split_is_trained_with_a_smaller_batch_and_a_line_says_so(
    samples: int, ranks: int, size: int
) -> None:
    plan = plan_of(samples, ranks, recipe="aisegment_unet")
    assert (plan.batch_size, plan.steps_per_epoch) == (size, 1)
    assert f"train.batch_size is {size} instead of 16" in plan.notes[0]
    assert plan_of(57, 1, recipe="aisegment_unet").notes == ()


def test_a_batch_that_was_asked_for_and_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(
        InputError,
        match=r"57 training samples do not fill one batch of 64 "
        r"\(4 ranks × train\.batch_size=16\); set train\.batch_size=14 or less",
    ):
        plan_of(57, 4, "train.batch_size=16")
    with pytest.raises(InputError, match=r"3 training samples do not fill one batch on 4 ranks"):
        plan_of(3, 4)


def test_a_fixed_global_batch_is_the_same_on_any_number_of_ranks_that_divides_it() -> None:
    found = [plan_of(57, ranks, "train.global_batch=12") for ranks in (1, 2, 3, 4, 6, 12)]
    assert {plan.global_batch for plan in found} == {12}
    assert {plan.steps_per_epoch for plan in found} == {4}
    assert {plan.dropped for plan in found} == {9}
    small = plan_of(57, 2, "train.global_batch=12", "train.batch_size=2")
    assert (small.batch_size, small.accumulate, small.batches_per_epoch) == (2, 3, 12)
    assert small.steps_per_epoch == 4
    uneven = plan_of(57, 1, "train.global_batch=10", "train.batch_size=3")
    assert (uneven.batch_size, uneven.accumulate, uneven.global_batch) == (2, 5, 10)


def test_a_fixed_global_batch_that_does_not_divide_is_refused_with_what_would() -> None:
    with pytest.raises(InputError, match=r"=12 cannot be divided by 5 ranks; use 1, 2, 3, 4, 6"):
        plan_of(57, 5, "train.global_batch=12")
    with pytest.raises(InputError, match=r"57 training samples do not fill train.global_batch=64"):
        plan_of(57, 2, "train.global_batch=64")
    with pytest.raises(InputError, match=r"leave train.accumulate out"):
        plan_of(57, 2, "train.global_batch=12", "train.accumulate=2")


@given(
    st.integers(1, 10**9),
    st.integers(1, 4096),
    st.integers(1, 512),
    st.integers(1, 16),
    st.integers(0, 1000),
)
def test_steps_and_batches_add_up_at_any_scale(
    samples: int, ranks: int, batch: int, accumulate: int, limit: int
) -> None:
    settings = config.Config()
    settings.train.batch_size, settings.train.accumulate = batch, accumulate
    settings.train.max_batches = limit
    if samples < ranks:
        with pytest.raises(InputError):
            make_plan(settings, samples, ranks)
        return
    plan = make_plan(settings, samples, ranks)
    assert plan.batches_per_epoch >= 1
    assert plan.steps_per_epoch == math.ceil(plan.batches_per_epoch / plan.accumulate)
    assert plan.global_batch == plan.batch_size * plan.accumulate * ranks
    assert plan.dropped + plan.batches_per_epoch * plan.batch_size * ranks == samples
    assert plan.dropped >= 0
