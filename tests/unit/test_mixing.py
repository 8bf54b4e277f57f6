"""Several shard sets with weights: exact in every epoch, on any number of ranks, resumable."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portrait_dist.data import AISegmentIterableDataset, build_loader
from portrait_dist.data.shards import writer
from portrait_dist.data.stream.mixing import MixedOrder, Source, deal
from portrait_dist.errors import InputError
from portrait_dist.system.address import read_locations
from tests import blobs
from tests.cli import assert_one_line, call
from tests.jobs import state_of, train_into
from tests.shard_server import serving
from tests.trees import write_tree

OTHER = 23
"""Training samples of the second set; it has 5 of val and none of test."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second, smaller set of the same size in pixels."""
    folder = tmp_path_factory.mktemp("second")
    keys = {"train": [f"t{i:02d}" for i in range(OTHER)], "val": [f"v{i}" for i in range(5)]}
    writer.pack(write_tree(folder / "data", keys), folder / "other", (32, 32), samples_per_shard=4)
    return folder / "other"


def keys_of(sets: str, epoch: int, world: int = 1, batch: int = 12, **stream: object) -> list[str]:
    """The keys of an epoch in the order of its global batches."""
    ranks = []
    for rank in range(world):
        loader = build_loader(
            sets,
            "train",
            batch // world,
            3,
            -1,
            rank,
            world,
            order=str(stream.get("order", "full")),
        )
        loader.set_epoch(epoch)
        ranks.append([loaded.keys for loaded in loader])
    return [key for parts in zip(*ranks, strict=True) for keys in parts for key in keys]


def test_several_sets_give_the_same_global_batches_on_any_number_of_ranks(
    tiny_shards: Path, other: Path
) -> None:
    sets = f"{tiny_shards}:1,{other}:0.3"
    for order in ("full", "block"):
        first = keys_of(sets, 0, order=order)
        assert Counter(key.split(":")[0] for key in first)["shards"] <= 57
        for world in (2, 3):
            assert keys_of(sets, 0, world, order=order) == first
        assert keys_of(sets, 1, order=order) != first


@pytest.mark.parametrize("order", ["full", "block"])
@pytest.mark.parametrize(("weight", "each"), [("2", 46), ("0.3", 7), ("2.5", 58), ("0", 0)])
def test_every_sample_comes_as_often_as_its_weight_says(
    tiny_shards: Path, other: Path, weight: str, each: int, order: str
) -> None:
    """Of an epoch nothing is dropped here: 57 of one set, weight × 23 of the other."""
    total: Counter[str] = Counter()
    for epoch in range(10):
        loader = build_loader(
            f"{tiny_shards},{other}:{weight}", "train", 8, 1, -1, drop_last=False, order=order
        )
        loader.set_epoch(epoch)
        found = Counter(key for batch in loader for key in batch.keys)
        mine = Counter({key: n for key, n in found.items() if key.startswith("other:")})
        assert sum(found.values()) - sum(mine.values()) == len(found) - len(mine) == 57
        assert sum(mine.values()) == each
        counts = [mine[f"other:t{number:02d}"] for number in range(OTHER)]
        assert set(counts) <= {each // OTHER, -(-each // OTHER)}
        total += mine
        ahead = [total[f"other:t{number:02d}"] for number in range(OTHER)]
        assert max(ahead) - min(ahead) <= 1


@pytest.mark.parametrize("order", ["full", "block"])
def test_several_sets_resume_in_the_middle_of_an_epoch_on_other_ranks(
    tiny_shards: Path, other: Path, order: str
) -> None:
    sets = f"{tiny_shards}:0.5,{other}:1.7"
    whole = keys_of(sets, 4, order=order)
    state = {}
    for rank in range(2):
        loader = build_loader(sets, "train", 6, 3, -1, rank, 2, order=order)
        loader.set_epoch(4)
        for _ in itertools.islice(loader, 2):
            state = loader.state_dict()
    rest = []
    for rank in range(3):
        loader = build_loader(sets, "train", 4, 3, 2, rank, 3, order=order)
        loader.load_state_dict(state)
        rest.append([batch.keys for batch in loader])
    found = [key for parts in zip(*rest, strict=True) for keys in parts for key in keys]
    assert found == whole[24:]


def test_a_position_of_other_weights_or_sets_is_refused(tiny_shards: Path, other: Path) -> None:
    loader = build_loader(f"{tiny_shards}:1,{other}:0.5", "train", 4, 3)
    for sets in (f"{tiny_shards}:1,{other}:0.52", f"{other}:0.5,{tiny_shards}:1"):
        assert len(build_loader(sets, "train", 4, 3)) == len(loader)
        with pytest.raises(InputError, match="the saved position is for data="):
            build_loader(sets, "train", 4, 3).load_state_dict(loader.state_dict())


def test_one_set_keeps_order_and_state_and_equal_weights_are_one_set(
    tiny_shards: Path, other: Path
) -> None:
    alone = AISegmentIterableDataset(tiny_shards, "train", 4, 3)
    same = AISegmentIterableDataset(f"{tiny_shards}:1", "train", 4, 3)
    assert (
        same.state(8)
        == alone.state(8)
        == {
            "epoch": 0,
            "samples_seen": 8,
            "samples": 57,
            "seed": 3,
        }
    )
    assert same.shards.identity == alone.shards.identity
    both = AISegmentIterableDataset(f"{tiny_shards},{other}:1", "train", 4, 3)
    assert both.samples == 57 + OTHER
    positions = np.arange(57 + OTHER)
    assert sorted(both.order.samples_at(2, positions).tolist()) == positions.tolist()


def test_validation_has_every_sample_of_every_set_once_whatever_the_weights(
    tiny_shards: Path, other: Path
) -> None:
    for weight in ("0", "0.2", "3"):
        ranks = [
            build_loader(f"{tiny_shards},{other}:{weight}", "val", 5, 1, 2, rank, 2)
            for rank in range(2)
        ]
        found = Counter(key for loader in ranks for batch in loader for key in batch.keys)
        assert set(found.values()) == {1}
        assert Counter(key.split(":")[0] for key in found) == {"shards": 7, "other": 5}


@settings(max_examples=150, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any))
def test_the_deal_gives_every_place_of_every_set_once_and_evenly(counts: list[int]) -> None:
    line = np.arange(sum(counts))
    numbers, places = deal(line, counts)
    for number, count in enumerate(counts):
        assert places[numbers == number].tolist() == list(range(count))
    half = np.count_nonzero(numbers[: sum(counts) // 2] == 0)
    assert abs(half - counts[0] / 2) <= 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    weights=st.lists(st.integers(0, 250), min_size=3, max_size=3),
    kind=st.sampled_from(["full", "block"]),
    seed=st.integers(-(2**63), 2**63 - 1),
    epoch=st.integers(0, 2**62),
)
def test_any_weights_give_floor_or_ceil_passes_in_any_epoch(
    sizes: list[list[int]], weights: list[int], kind: str, seed: int, epoch: int
) -> None:
    sources = [
        Source(sum(one), max(1, sum(one) * weight // 100), one)
        for one, weight in zip(sizes, weights, strict=False)
    ]
    order = MixedOrder(sources, seed, kind, block_samples=7)
    found = Counter(order.samples_at(epoch, np.arange(order.samples)).tolist())
    first = 0
    for source in sources:
        counts = [found[first + number] for number in range(source.samples)]
        assert sum(counts) == source.epoch_samples
        low, rest = divmod(source.epoch_samples, source.samples)
        assert sorted(counts) == [low] * (source.samples - rest) + [low + 1] * rest
        first += source.samples


def test_two_sets_of_a_billion_samples_are_planned_without_a_list_and_blocks_stay_local() -> None:
    shards = [10_000] * 100_000
    order = MixedOrder([Source(10**9, 10**9, shards), Source(10**9, 3 * 10**8, shards)], 1, "block")
    found = order.samples_at(2**40, np.arange(16384, 2 * 16384))
    assert len(set(found.tolist())) == 16384
    assert len(set((found // 10_000).tolist())) <= 6
    with pytest.raises(InputError, match="smaller weights"):
        MixedOrder([Source(10**9, 4 * 10**9, shards)], 1, "full")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,,b", "no name"),
        ("a:1,a:2", "named twice"),
        ("a:1,a/:2", "named twice"),
        ("a:9999999,b", "a weight is from 0"),
        ("a:-1,b", "a weight is from 0"),
        ("a:nan,b", "a weight is from 0"),
        ("b,a:1e-3", "no exponent"),
        ("a:0,b:0", "all weights are 0"),
    ],
)
def test_a_wrong_list_of_sets_is_refused_in_one_line(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        read_locations(text)
    assert_one_line(call("train", f"data.shards={text}"), 2, "data.shards", part)


def test_ports_queries_and_folders_with_odd_names_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    (tmp_path / "b,c").mkdir()
    assert [one.location for one in read_locations(f"{tmp_path}/b,c")] == [f"{tmp_path}/b,c"]
    text = f"{tmp_path}/a:2,http://host:8080,https://h/x:0.5,s3://b/y?sig=1,2:3"
    found = read_locations(text)
    assert [one.location for one in found] == [
        f"{tmp_path}/a:2",
        "http://host:8080",
        "https://h/x",
        "s3://b/y?sig=1,2",
    ]
    assert [float(one.weight) for one in found] == [1, 1, 0.5, 3]
    assert found[3].shown == "s3://b/y:3"


def test_a_single_set_takes_a_weight_too_on_a_disk_or_at_an_address(
    other: Path, tmp_path: Path
) -> None:
    for text, location, weight in (
        ("s3://b/a:0.5", "s3://b/a", 0.5),
        ("https://h:80/a:2", "https://h:80/a", 2),
        ("https://h:80", "https://h:80", 1),
        ("https://h/a?until=12:30", "https://h/a?until=12:30", 1),
        ("a:1", "a", 1),
    ):
        (found,) = read_locations(text)
        assert (found.location, float(found.weight)) == (location, weight)
    with pytest.raises(InputError, match="a weight is from 0"):
        read_locations("s3://b/a:nan")
    with serving(other.parent) as server:
        half = build_loader(f"{server.address}/other:0.5", "train", 4, 3, -1)
    assert len(half) == 3
    assert keys_of(f"{other}:1", 1) == keys_of(str(other), 1)
    assert len(keys_of(f"{other}:0.5", 1)) == 12
    picture = tmp_path / "s.png"
    shown = call("show", "--data", f"{other}:1", "--split", "val", "--out", picture)
    assert shown.exit_code == 0, shown.stderr


@pytest.mark.parametrize(
    "weight", ["0.00001", "0.000000001", "999999.123456789", "1000000", "2.50"]
)
def test_a_weight_is_the_same_when_it_is_read_again_as_it_was_stored(weight: str) -> None:
    found = read_locations(f"a:{weight},b")
    assert read_locations(",".join(one.shown for one in found)) == found


def test_sets_that_do_not_go_together_are_refused_by_name(
    tiny_shards: Path, other: Path, split_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_shards, tmp_path / "copy"))
    larger = tmp_path / "larger"
    keys = {name: [f"{name}1"] for name in ("train", "val")}
    writer.pack(write_tree(tmp_path / "data", keys), larger, (40, 40))
    for sets, parts in (
        (f"{tiny_shards},{copy}:0.5", [f"{copy}: its train split is that of {tiny_shards}"]),
        (f"{tiny_shards},{larger}", ["packed at 32x32", f"{larger} at 40x40 (squash)"]),
        (f"{tiny_shards},{tmp_path}/none:0.3", [f"{tmp_path}/none: there is no such folder"]),
    ):
        result = train_into(tmp_path, sets, "train.max_epochs=1")
        assert_one_line(result, 2, *parts)
    assert not (tmp_path / "run").exists()


def test_a_run_of_several_sets_trains_and_refuses_other_weights_by_name(
    tiny_shards: Path, other: Path, tmp_path: Path
) -> None:
    sets = f"{tiny_shards}:1,{other}:0.5"
    done = train_into(tmp_path, sets, "train.max_epochs=1", "train.batch_size=23")
    assert done.exit_code == 0, done.stderr
    assert done.json["samples_seen"] == 69  # 57 + 12
    assert "shards 57 of 57, other 12 of 23" in done.stderr
    before = state_of(tmp_path / "run")
    for wrong in (f"{tiny_shards}:1,{other}:0.6", str(tiny_shards), f"{other}:0.5,{tiny_shards}"):
        refused = train_into(tmp_path, wrong, "train.max_epochs=2", "train.batch_size=23")
        # Of long lists the line has the beginning and the end.
        assert_one_line(refused, 2, "train split", "other:0.5", wrong.rpartition("/")[2])
    assert state_of(tmp_path / "run") == before
    report = call("report", tmp_path / "run", "--out", tmp_path / "r.html", "--json")
    assert report.exit_code == 0, report.stderr
    html = (tmp_path / "r.html").read_text()
    assert "7 val" in html
    assert "shards: 7 samples, IoU" in call("report", tmp_path / "run").stdout
    best = tmp_path / "run" / "ckpt_best.pth"
    kept = tmp_path / "run" / "scores-val.json"  # where ``submit evaluate`` keeps them
    scored = ("--checkpoint", best, "--split", "val", "--device", "cpu", "--out", kept, "--json")
    scores = call("evaluate", "--data", sets, *scored).json["sets"]
    status = call("status", tmp_path / "run", "--json").json["scores"]["val"]
    assert status["samples"] == 12
    assert list(report.json["sets"]) == list(status["sets"]) == ["shards", "other"]
    table = call("status", tmp_path / "run").stdout
    for name, one in report.json["sets"].items():
        assert one == {field: pytest.approx(scores[name][field], rel=1e-6) for field in one}
        assert status["sets"][name] == {field: scores[name][field] for field in one}
        assert f"<td>{name}</td>" in html
        assert f"{one['iou']:.5g}" in html
        assert f"  {name:14s} {scores[name]['samples']} samples, IoU" in table


def test_evaluate_reports_each_set_and_all_of_them(
    tiny_shards: Path, other: Path, tmp_path: Path
) -> None:
    checkpoint = blobs.save(blobs.random_network(), tmp_path / "net.pth", size=(32, 32))

    def evaluate(sets: str, *options: str | Path) -> dict[str, object]:
        common = ("--checkpoint", checkpoint, "--split", "val", "--device", "cpu", "--json")
        result = call("evaluate", "--data", sets, *common, *options)
        assert result.exit_code == 0, result.stderr
        return dict(result.json)

    table = tmp_path / "rows.csv"
    both = evaluate(f"{tiny_shards}:1,{other}:0.3", "--per-sample", table)
    alone = {"shards": evaluate(str(tiny_shards)), "other": evaluate(str(other))}
    sets = both["sets"]
    assert isinstance(sets, dict)
    assert list(sets) == ["shards", "other"]
    for name, scores in alone.items():
        assert scores.pop("sets") is None
        assert sets[name] == {key: scores[key] for key in sets[name]}, json.dumps(scores)
    assert both["samples"] == 12
    for name in ("mae", "loss", "mean_iou"):
        mean = (7 * sets["shards"][name] + 5 * sets["other"][name]) / 12
        assert both[name] == pytest.approx(mean, rel=1e-9)
    only = evaluate(f"{tiny_shards},{other}", "--split", "test")  # the other one has none
    assert (only["samples"], list(dict(only["sets"]))) == (7, ["shards"])  # type: ignore[call-overload]
    low, high = sorted(scores["iou"] for scores in sets.values())
    assert low <= float(str(both["iou"])) <= high
    keys = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    assert Counter(key.split(":")[0] for key in keys) == {"shards": 7, "other": 5}
