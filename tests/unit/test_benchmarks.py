"""Every benchmark runs, on a small scale, and writes the rows that are read from it by name."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portrait_dist.models import int8

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--quick", "--features", "2", "--repeats", "1")


@pytest.fixture(scope="module", autouse=True)
def _scripts_can_be_imported() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def measured(script: str, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a script in this process; return what its JSON file holds.

    Every rate has the CPU seconds of an item beside it.
    """
    importlib.import_module(script).main(["--json", str(out), *arguments])
    found = json.loads(out.read_text())
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]
    assert {"rows", "commit", "date", "command"} <= found.keys()
    for row in found["rows"]:
        assert row.get("images_per_second") is None or row["cpu_seconds_per_image"] > 0, row
    return found


def rates(found: dict[str, Any], **where: Any) -> dict[str, float | None]:
    """Name → images per second of the rows that have these values."""
    rows = [
        row for row in found["rows"] if all(row.get(key) == value for key, value in where.items())
    ]
    return {row["name"]: row["images_per_second"] for row in rows}


def test_all_writes_page_chart_and_json_with_every_loader_and_a_reason_for_each_missing_one(
    tmp_path: Path,
) -> None:
    arguments = [
        sys.executable,
        str(BENCHMARKS / "all.py"),
        "--quick",
        "--only",
        "loader",
        "--repeats",
        "1",
        "--pairs",
        "12",
    ]
    done = subprocess.run([*arguments, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (page,), (chart,), (text,) = (
        list(tmp_path.glob(f"*.{kind}")) for kind in ("md", "svg", "json")
    )
    loader = json.loads(text.read_text())["benchmarks"]["loader"]
    ours = {"tutorial", "webdataset", "portrait_dist-uint8", "portrait_dist-float", "ceiling"}
    ours |= {"portrait_dist-5-batches"}
    peers = {"litdata", "mosaicml-streaming", "grain", "grain-our-decoder", "lancedb"}
    for size in ("256", "original"):
        found = rates(loader, size=size)
        assert ours | peers <= found.keys()
        assert all(found[name] for name in ours)
    assert all(row["images_per_second"] or row["note"] for row in loader["rows"])
    assert {"pack", "pack-limit", "portrait_dist-raw"} <= rates(loader, size="256").keys()
    assert loader["first_batch_seconds"] > 0
    assert loader["scaled_decoding"]["psnr_db"] > 30
    assert "portrait_dist-uint8" in page.read_text()
    assert chart.read_text().count("<rect") > 10


def test_what_each_loader_loses_is_counted_over_four_processes(tmp_path: Path) -> None:
    arguments = ("--only", "torch DistributedSampler", "grain DataLoader")
    rows = measured("coverage", tmp_path / "coverage.json", *arguments)["rows"]
    found = {(row["name"], row["samples"]): row for row in rows}
    assert found["torch DistributedSampler", 57]["repeated"] == 3
    assert found["torch DistributedSampler", 103]["by_rank"] == "26+26+26+26"
    other = found["grain DataLoader", 103]
    assert other.get("lost") == 3 or "not installed" in other["note"]


def test_unet_ladder_ends_with_the_best_form_and_its_distance_from_fp32(
    tmp_path: Path,
) -> None:
    found = measured(
        "unet", tmp_path / "unet.json", *SMALL, "--size", "32", "--no-compile", "--device", "cpu"
    )
    names = list(rates(found))
    assert names[0] == "hub-eager-fp32"
    assert {"channels-last", "bf16", "bn-folded", "merged", "best", "train-best"} <= set(names)
    assert {"onnxruntime-fp32", "onnxruntime-int8", "openvino-fp32"} <= set(names)
    by = {row["name"]: row for row in found["rows"]}
    equal = {
        name: value or 0
        for name, value in rates(found).items()
        if "train" not in name and "int8" not in name
    }
    assert by["best"]["images_per_second"] == max(equal.values()), (
        "whether int8 keeps the masks of random weights is unknown"
    )
    for name in ("channels-last", "onnxruntime-fp32", "openvino-fp32"):
        assert by[name]["largest_difference"] < 1e-4
    assert 0 < by["merged"]["largest_difference"] < 0.05
    assert by["best"]["share_of_roofline"] > 0
    assert {"fp32_tflops", "bf16_tflops"} <= found["roofline"].keys()


def test_the_best_form_of_a_trained_network_keeps_its_masks_on_images_that_calibrated_nothing(
    tmp_path: Path, tiny_shards: Path
) -> None:
    from tests import blobs

    checkpoint = blobs.save(blobs.train(steps=2), tmp_path / "ckpt_best.pth")
    arguments = (
        "--checkpoint",
        str(checkpoint),
        "--shards",
        str(tiny_shards),
        "--batch",
        "2",
        "--size",
        "32",
        "--no-compile",
    )
    found = measured("unet", tmp_path / "unet.json", *SMALL, *arguments, "--device", "cpu")
    forward = [row for row in found["rows"] if "train" not in row["name"]]
    assert ("int8" in rates(found)) == int8.is_supported()
    fastest = max(row["images_per_second"] for row in forward if row["iou_with_fp32"] >= 0.999)
    assert {row["name"]: row for row in forward}["best"]["images_per_second"] == fastest


def test_a_step_of_both_trainers_is_measured_against_the_bare_loop(tmp_path: Path) -> None:
    found = measured(
        "train_step",
        tmp_path / "step.json",
        *SMALL,
        "--size",
        "32",
        "--steps",
        "4",
        "--device",
        "cpu",
    )
    for network in ("small", "real"):
        assert set(rates(found, network=network)) == {"bare", "portrait_dist", "supergradients"}
    assert "% of a real step" in found["aims"]["portrait_dist over the bare loop"]


def test_training_on_shards_is_measured_against_a_batch_on_the_device(
    tmp_path: Path, tiny_shards: Path
) -> None:
    arguments = ("--shards", str(tiny_shards), "--steps", "2", "--device", "cpu")
    found = measured("train", tmp_path / "train.json", *SMALL, *arguments)
    assert set(rates(found)) == {"resident", "train"}
    assert 0 <= found["rows"][1]["data_wait_share"] <= 1


def test_planning_an_epoch_is_measured_without_a_table(tmp_path: Path) -> None:
    importlib.import_module("order").main(["--quick", "--json", str(tmp_path / "order.json")])
    rows = json.loads((tmp_path / "order.json").read_text())["rows"]
    assert {(row["order"], row["samples"]) for row in rows} == {("full", 10**6), ("block", 10**6)}
    assert all(row["samples_per_second"] > 0 < row["cpu_seconds_per_sample"] for row in rows)


def test_preparing_is_measured_by_listing_and_by_a_file_of_names(tmp_path: Path) -> None:
    found = measured("prepare", tmp_path / "prepare.json", "--quick")
    assert [row["name"].partition(", ")[2] for row in found["rows"]] == ["listed", "--list"] * 2
    assert all(0 < row["peak_megabytes"] < 300 for row in found["rows"])


def test_packing_is_measured_for_one_and_two_processes_against_decoding_alone(
    tmp_path: Path,
) -> None:
    found = measured("pack", tmp_path / "pack.json", "--quick")
    assert [row["name"] for row in found["rows"]] == [
        "decoding alone",
        "256x256, 1 process",
        "256x256, 2 processes",
    ]
    assert all(row["pairs_per_second"] > 0 < row["cpu_seconds_per_pair"] for row in found["rows"])
    sets = {(row["pairs"], row["nodes"]) for row in found["arithmetic"]}
    assert {(34_427, 1), (10**8, 64)} < sets
    for row in found["arithmetic"]:
        hours = row["minutes"] * row["nodes"] * row["cores_per_node"] / 60
        assert hours == pytest.approx(row["cpu_hours"], rel=0.02)


def test_cpu_seconds_count_child_processes_that_live_and_that_ended() -> None:
    measure = importlib.import_module("measure")
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        output = child.stdout
        assert output is not None

        def until_it_has_burnt() -> int:
            output.readline()
            return 1

        assert measure.timed(until_it_has_burnt).cpu_seconds >= 0.2
        before = measure.cpu_seconds()
        child.communicate(b"\n")
    assert measure.cpu_seconds() >= before, "an ended child still counts"


def test_remote_compares_prefetching_with_waiting_and_with_local_shards(tmp_path: Path) -> None:
    arguments = [
        "--pairs",
        "4",
        "--shards",
        "3",
        "--samples-per-shard",
        "16",
        "--repeats",
        "1",
        "--latency",
        "0.01",
    ]
    found = measured("remote", tmp_path / "remote.json", *arguments)
    for order in ("full", "block"):
        speeds = rates(found, order=order)
        assert speeds.keys() == {"portrait_dist", "without-prefetching", "local"}
        assert all(speeds.values())


def test_scaling_measures_real_ranks(tmp_path: Path, tiny_shards: Path) -> None:
    arguments = ("--shards", str(tiny_shards), "--ranks", "2", "--steps", "2", "--device", "cpu")
    found = measured("scaling", tmp_path / "scaling.json", *SMALL, *arguments)
    assert found["rows"][0]["ranks"] == 2
    assert found["rows"][0]["images_per_second"] > 0


def test_fits_and_refinements_are_scored_at_the_images_own_resolution(
    tmp_path: Path, split_dir: Path
) -> None:
    from tests import blobs

    checkpoint = blobs.save(blobs.train(steps=2), tmp_path / "ckpt_best.pth")
    arguments = (
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(split_dir),
        "--split",
        "val",
        "--limit",
        "2",
    )
    found = measured("predictions", tmp_path / "predictions.json", *arguments)
    by = {row["name"]: row for row in found["rows"]}
    assert {
        "upright 3:4, letterbox",
        "upright 3:4, letterbox, not mirrored",
        "upright 3:4, squash",
        "landscape 16:9, cover",
    } <= by.keys()
    assert sum(name.startswith("refined, ") for name in by) == 12
    assert all(
        0 <= row["iou"] <= 1 and row["samples"] <= 2 and row["images_per_second"] > 0
        for row in by.values()
    )


def test_the_readmes_picture_has_a_row_of_photo_mask_and_cut_out_for_each_photo(
    tmp_path: Path,
) -> None:
    from PIL import Image

    hero = importlib.import_module("benchmarks.hero")
    from tests import blobs

    checkpoint = blobs.save(blobs.train(steps=2), tmp_path / "ckpt_best.pth")
    shipped = hero.shipped_photos()
    assert [path.name for path in shipped][:1] == ["grace_hopper.jpg"]
    Image.new("RGB", (90, 60), "white").save(tmp_path / "wide.png")
    made = hero.make(checkpoint, [shipped[0], tmp_path / "wide.png"], tmp_path / "out.png")
    assert len(made.coverage) == 2
    with Image.open(tmp_path / "out.png") as opened:
        sheet = np.asarray(opened)
    assert sheet.shape[0] == 2 * hero.HEIGHT + hero.GAP
    width = round(512 / 600 * hero.HEIGHT)
    with Image.open(shipped[0]) as opened:
        photo = np.asarray(opened.resize((width, hero.HEIGHT))).astype(int)
    assert abs(sheet[: hero.HEIGHT, :width] - photo).mean() < 3, "the photo comes first"
    mask = sheet[: hero.HEIGHT, width + 4 : 2 * width - 4]
    assert (mask == mask[..., :1]).all(), "then its mask, which is grey"


def test_recipes_are_trained_by_their_printed_command_and_scored_on_both_held_out_splits(
    tmp_path: Path,
) -> None:
    arguments = (
        "--only",
        "aisegment_unet",
        "--seeds",
        "3",
        "--epochs",
        "1",
        "--features",
        "2",
        "--side",
        "32",
        "--pairs",
        "24",
        "--other",
        str(tmp_path / "work" / "raw"),
    )
    found = measured(
        "recipes", tmp_path / "recipes.json", *arguments, "--work", str(tmp_path / "work")
    )
    (row,) = found["rows"]
    (one,) = row["runs"]
    assert one["seed"] == 3
    assert row["test_iou"] == pytest.approx(one["test_iou"], abs=1e-4)
    assert all(
        0 <= one[f"{split}_{score}"] <= 1
        for split in ("val", "test", "other")
        for score in ("iou", "mean_iou", "boundary_iou")
    )
    assert row["other_iou"] == pytest.approx(one["other_iou"], abs=1e-4)
    assert row["command"].startswith("portrait-dist train --recipe aisegment_unet")
    assert (tmp_path / "work" / "runs").is_dir()


def test_networks_train_for_as_many_epochs_as_fit_into_the_time(
    trained_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imports and the like, 9 s here, do not count; an epoch takes 2 s."""
    script, recipes = importlib.import_module("equal_time"), importlib.import_module("recipes")
    asked = []

    def call(command: str, *words: str) -> tuple[dict[str, Any], float]:
        if command != "train":
            return dict.fromkeys(recipes.SCORES, 0.5), 1.0
        epochs = int(next(word for word in words if "max_epochs" in word).partition("=")[2])
        asked.append(epochs)
        return {
            "checkpoint": str(trained_checkpoint),
            "samples_seen": 10 * epochs,
        }, 9 + 2.0 * epochs

    for module in (script, recipes):
        monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(script, "cores", lambda: 2)
    monkeypatch.setattr(script, "shards_of", lambda *_: tmp_path)
    out = tmp_path / "found.json"
    (row,) = measured(
        "equal_time", out, "--raw", str(tmp_path), "--only", "sg:pp_lite_t_seg", "--minutes", "0.5"
    )["rows"]
    assert asked == [*script.CALIBRATION, 30]
    assert (row["epochs"], row["cpu_minutes"], row["cpu_seconds_per_image"]) == (30, 1.0, 0.2)


def test_the_curve_of_quality_goes_on_where_the_stage_before_ended(
    trained_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, recipes = importlib.import_module("minutes"), importlib.import_module("recipes")
    commands = []

    def call(command: str, *words: str) -> tuple[dict[str, Any], float]:
        given = dict(word.split("=", 1) for word in words if "=" in word)
        if command != "train":
            return dict.fromkeys(recipes.SCORES, 0.9), 1.0
        epochs, run = int(given["train.max_epochs"]), Path(given["run.root"], given["run.name"])
        if "calibration" not in run.name:
            commands.append(words)
            run.mkdir()
            events = [
                {"epoch": epoch, "cpu_seconds": 15.0 * (epoch + 1), "val_iou": 0.8}
                for epoch in range(epochs)
            ]
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in events))
        return {"checkpoint": str(trained_checkpoint)}, 9 + 30.0 * epochs

    for module in (script, recipes):
        monkeypatch.setattr(module, "call", call)
    for module in (script, importlib.import_module("equal_time")):
        monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(script, "shards_of", lambda *_: tmp_path)
    words = ("--raw", tmp_path, "--work", tmp_path, "--nproc", 2, "--stages", "32:0.5", "64:1")
    found = measured("minutes", tmp_path / "found.json", *map(str, words))
    rows = found["rows"]
    assert [(row["side"], row["minutes"]) for row in rows] == [
        *((32, minutes) for minutes in (0.25, 0.5)),
        *((64, minutes) for minutes in (0.75, 1.0, 1.25, 1.5)),
    ]
    assert [f"model.weights={trained_checkpoint}" in words for words in commands] == [False, True]
    assert [(stage["minutes"], stage["test_iou"]) for stage in found["stages"]] == [
        (0.5, 0.9),
        (1.5, 0.9),
    ]
    chart = (tmp_path / "found.svg").read_text()
    script.main(["--draw", str(tmp_path / "found.json")])
    assert chart == (tmp_path / "found.svg").read_text()
    assert all(text in chart for text in ("validation, 32 px", "validation, 64 px"))


def test_the_agreement_costs_less_than_a_step_at_any_number_of_ranks(tmp_path: Path) -> None:
    found = measured("agreement", tmp_path / "agreement.json", "--quick")
    by = {row["name"]: row for row in found["rows"]}
    assert by["interval 2"]["interval"] == by["interval 4"]["interval"] == 1
    for ranks in (512, 4096):
        assert by[f"interval {ranks}"]["interval"] == 64
        assert by[f"interval {ranks}"]["wait_ms"] <= by[f"every-step {ranks}"]["wait_ms"]


def test_files_are_written_beside_the_next_epoch(tmp_path: Path) -> None:
    found = measured("epoch_ends", tmp_path / "epoch_ends.json", "--quick", "--features", "4")
    by = {row["name"]: row for row in found["rows"]}
    assert set(by) == {"no files", "at once", "background"}
    assert by["no files"]["megabytes_written"] < by["background"]["megabytes_written"]


def test_the_hosts_time_of_a_step_is_measured_by_part(tmp_path: Path) -> None:
    arguments = ("--quick", "--steps", "50", "--device", "cpu", "--plain-kernels")
    rows = measured("step_parts", tmp_path / "step_parts.json", *arguments)["rows"]
    assert [row["name"] for row in rows] == ["this commit", "this commit, plain kernels"]
    parts = ("augment", "forward", "loss", "backward", "optimiser", "ema", "metrics")
    for row in rows:
        assert all(0 < row[part] < row["lowest_ms"] for part in parts)
        assert sum(row[part] for part in parts) <= row["lowest_ms"]


def test_a_gpu_day_names_every_step_and_ends_those_that_hang(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *doctor*) exit 3;; *train.py*) sleep 60;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    steps = ("doctor", "tests", "train", "unet")
    options = ("--device", "cpu", "--shards", str(tmp_path), "--seconds", "6", "--only", *steps)
    done = subprocess.run(
        [str(BENCHMARKS / "gpu_day.sh"), str(out), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )
    assert done.returncode == 3, "three steps have failed"
    summary = (out / "summary.txt").read_text().splitlines()
    assert [line.partition(",")[0] for line in summary] == [
        "doctor: exit code 3",
        "tests: done",
        "train: ended after its 6 s",
        "unet: not begun",
    ]
    assert all((out / f"{name}.log").exists() for name in steps[:3])
