"""Fill the measured numbers of README and docs from ``benchmarks/results``.

    python -m benchmarks.figures             # list what differs (exit code 1 if anything does)
    python -m benchmarks.figures --write     # write the numbers into the pages

A number stands between two comments that no renderer shows: ``<!--=NAME-->62<!--/-->``. ``NAME`` is
a key of :func:`figures`, which reads it from a file of results and formats it. A test fails when a
page and the results differ, and when a measured number stands outside of such comments.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"(<!--=([\w.+-]+)-->)(.*?)(<!--/-->)", re.DOTALL)
AISEGMENT_TRAINING_IMAGES = 27_543
"""80 % of the 34,427 pairs, as ``prepare`` splits them."""
OTHER_SHAPES = ("landscape 4:3", "landscape 16:9", "square", "phone 9:16")
FRAMES = ("frame 4:3", "frame 16:9")
MINUTES = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60)
"""Where the curve of quality is read."""
RECIPE_HEAD = (
    "| recipe | val IoU | test IoU (lowest to highest) | test boundary IoU | test MAE of alpha |",
    "|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Difference:
    """A number that is not what the results say.

    Args:
        page: path relative to the repository.
        name: of the figure.
        found: what stands in the page.
        expected: what the results give.
    """

    page: str
    name: str
    found: str
    expected: str


def pages() -> list[Path]:
    """List the pages that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def figures(results: Path = RESULTS) -> dict[str, str]:
    """Read and format all figures.

    Args:
        results: folder with the files of results.

    Returns:
        Name → text as it stands in the pages.
    """
    everything = _read(results, "2026-11-23-amd-epyc-2-cores.json")
    speed = everything["benchmarks"]
    return {
        "all.minutes": f"{everything['seconds'] / 60:.0f}",
        **_loader(speed["loader"]),
        **_unet(speed["unet"]),
        **_training(speed),
        **_remote(_read(results, "2026-11-23-amd-epyc-2-cores-remote.json")),
        **_order(_read(results, "2026-11-29-amd-epyc-2-cores-order.json")),
        **_prepare(_read(results, "2026-11-30-amd-epyc-2-cores-prepare.json")),
        **_packing(_read(results, "2026-11-29-amd-epyc-2-cores-pack.json")),
        **_matrix(_read(results, "2026-11-30-matrix.json")),
        **_installs(_read(results, "2026-11-29-installs.json")),
        **_quickstart(_read(results, "2026-11-29-amd-epyc-2-cores-quickstart.json")),
        **_engines(
            *(_read(results, f"2026-11-29-amd-epyc-2-cores-engines-{n}.json") for n in (1, 8))
        ),
        **_equal_time(_read(results, "2026-11-30-amd-epyc-2-cores-equal-time.json")),
        **_serve(_read(results, "2026-11-29-amd-epyc-2-cores-serve.json")),
        **_tiny(_read(results, "2026-11-30-amd-epyc-2-cores-unet-tiny.json")),
        **_serve_idle(_read(results, "2026-11-30-amd-epyc-2-cores-serve-idle.json")),
        **_h200(_read(results, "2026-11-29-nvidia-h200.json")),
        **_recipes(_read(results, "2026-11-23-recipes.json")),
        **_choices(_read(results, "2026-11-30-recipe-choices.json")),
        **_distillation(_read(results, "2026-11-30-distillation.json")),
        **_sizes(
            _read(results, "2026-11-30-amd-epyc-2-cores-sizes.json"),
            _read(results, "2026-11-30-recipe-choices.json"),
        ),
        **_minutes(_read(results, "2026-11-30-amd-epyc-2-cores-minutes.json")),
        **_masks(_read(results, "2026-11-23-predictions.json")),
    }


def _read(results: Path, name: str) -> Any:
    return json.loads((results / name).read_text())


def _row(part: dict[str, Any], **where: Any) -> dict[str, Any]:
    (row,) = (
        row for row in part["rows"] if all(row.get(key) == value for key, value in where.items())
    )
    return row


def _rate(part: dict[str, Any], **where: Any) -> float:
    return float(_row(part, **where)["images_per_second"])


def _loader(part: dict[str, Any]) -> dict[str, str]:
    def rate(name: str, size: str = "256") -> float:
        return _rate(part, name=name, size=size)

    peers = max(rate(name) for name in ("webdataset", "litdata", "mosaicml-streaming"))
    ours, tutorial = rate("portrait_dist-uint8"), rate("tutorial")
    stored = part["bytes_per_sample"]
    return {
        "loader.rate": f"{ours:,.0f}",
        "loader.times-tutorial": f"{ours / tutorial:.0f}",
        "loader.times-peers": f"{ours / peers:.1f}",
        "loader.of-decoders": f"{ours / rate('ceiling'):.2f}",
        "loader.float.rate": f"{rate('portrait_dist-float'):,.0f}",
        "loader.float.times-tutorial": f"{rate('portrait_dist-float') / tutorial:.0f}",
        "loader.raw.rate": f"{rate('portrait_dist-raw'):,.0f}",
        "loader.raw.times-tutorial": f"{rate('portrait_dist-raw') / tutorial:.0f}",
        "loader.raw.times-bytes": f"{stored['raw'] / stored['256']:.0f}",
        "loader.original.rate": f"{rate('portrait_dist-uint8', 'original'):,.0f}",
        "loader.original.times-tutorial": (
            f"{rate('portrait_dist-uint8', 'original') / rate('tutorial', 'original'):.0f}"
        ),
        "pack.rate": f"{rate('pack'):,.0f}",
        "pack.of-pillow": f"{rate('pack') / rate('pack-limit-pillow'):.2f}",
    }


def _unet(part: dict[str, Any]) -> dict[str, str]:
    by_name = {row["name"]: row for row in part["rows"]}
    bf16, integers = by_name["kept-memory"], by_name["int8"]
    return {
        "unet.bf16.rate": f"{bf16['images_per_second']:.1f}",
        "unet.bf16.times-eager": f"{bf16['times_eager']:.1f}",
        "unet.bf16.of-roofline": f"{bf16['share_of_roofline']:.0%}".replace("%", " %"),
        "unet.int8.rate": f"{integers['images_per_second']:.1f}",
        "unet.int8.times-eager": f"{integers['times_eager']:.1f}",
        "unet.int8.times-bf16": (
            f"{integers['images_per_second'] / bf16['images_per_second']:.1f}"
        ),
        "unet.int8.iou": f"{integers['iou_with_fp32']:.4f}",
        "unet.train.times-eager": f"{by_name['train-best']['times_eager']:.1f}",
    }


def _engines(*batches: dict[str, Any]) -> dict[str, str]:
    """CPU time of our bf16 over OpenVINO's, in batches of 1 and 8."""
    found = {}
    for part, batch in zip(batches, (1, 8), strict=True):
        ours, other = (
            _row(part, name=name)["cpu_seconds_per_image"]
            for name in ("kept-memory", "openvino-bf16")
        )
        found[f"engines.openvino.times-bf16.{batch}"] = f"{ours / other:.1f}"
    for name in ("int8", "onnxruntime-int8", "openvino-int8"):
        found[f"engines.{name}.iou"] = f"{_row(batches[1], name=name)['iou_with_fp32']:.4f}"
    return found


def _h200(found: dict[str, Any]) -> dict[str, str]:
    benchmarks, portraits = found["benchmarks"], found["portraits"]
    train, small = benchmarks["train"], benchmarks["train_batch_16"]
    parts, step = _row(benchmarks["step_parts"]), benchmarks["train_step"]
    scores = portraits["test"]["cuda"]
    return {
        "h200.tests": str(found["tests"]["passed"]),
        "h200.rate": f"{_rate(train, name='train'):,.0f}",
        "h200.of-resident": f"{_rate(train, name='train') / _rate(train, name='resident'):.2f}",
        "h200.waiting": f"{_row(train, name='train')['data_wait_share']:.0%}".replace("%", " %"),
        "h200.small.rate": f"{_rate(small, name='train'):,.0f}",
        "h200.small.of-resident": (
            f"{_rate(small, name='train') / _rate(small, name='resident'):.2f}"
        ),
        "h200.overhead": f"{step['rows'][1]['overhead_ms']:.2f}",
        "h200.step": f"{parts['lowest_ms']:.1f}",
        "h200.portraits.iou": f"{scores['iou']:.3f}",
        "h200.portraits.boundary-iou": f"{scores['boundary_iou']:.3f}",
        "h200.portraits.seconds": f"{portraits['seconds_of_epochs']:.0f}",
        "h200.portraits.rate": f"{portraits['images_per_second']:,.0f}",
        "h200.portraits.gigabytes": f"{portraits['gpu_memory_bytes'] / 1e9:.1f}",
    }


def _serve(found: dict[str, Any]) -> dict[str, str]:
    (memory,) = (value for name, value in found["aims"].items() if name.startswith("MB in use"))
    (answers,) = (value for name, value in found["aims"].items() if name.startswith("answers"))
    counts = json.loads(answers)
    return {
        "serve.megabytes": f"{min(memory)} to {max(memory)} MB",
        "serve.overload": f"{counts['200']} with the mask, {counts['503']} with 503",
    }


def _serve_idle(found: dict[str, Any]) -> dict[str, str]:
    rates = [_rate(found, name=name) for name in ("service", "engine")]
    return {"serve.of-engine": f"{rates[0] / rates[1]:.1f}"}


def _tiny(found: dict[str, Any]) -> dict[str, str]:
    return {
        "tiny.int8.rate": f"{_rate(found, name='int8'):.0f}",
        "tiny.float.rate": f"{_rate(found, name='bn-folded'):.0f}",
    }


def _training(speed: dict[str, Any]) -> dict[str, str]:
    step = speed["train_step"]
    over = _row(step, name="portrait_dist", network="small")["overhead_ms"]
    real = _row(step, name="bare", network="real")["ms_per_step"]
    rate = _rate(speed["train"], name="train")
    return {
        "step.overhead-ms": f"{over:.1f}",
        "step.overhead": f"{over / real:.2%}".replace("%", " %"),
        "train.rate": f"{rate:.1f}",
        "train.epoch-hours": f"{AISEGMENT_TRAINING_IMAGES / rate / 3600:.1f}",
    }


def _remote(part: dict[str, Any]) -> dict[str, str]:
    def times(order: str) -> str:
        with_it = _rate(part, name="portrait_dist", order=order)
        return f"{with_it / _rate(part, name='without-fetching-ahead', order=order):.1f}"

    return {
        "remote.block.times": times("block"),
        "remote.full.times": times("full"),
        "remote.connection": f"{part['megabytes_per_second']:.0f} MB/s",
    }


def _order(part: dict[str, Any]) -> dict[str, str]:
    rows = [row for row in part["rows"] if row["samples"] == 10**9 and row["ranks"] == 4096]
    seconds = max(row["cpu_seconds_per_sample"] * row["samples"] / row["ranks"] for row in rows)
    return {
        "order.cpu-seconds": f"{seconds:.2f} s",
        "order.megabytes": f"{max(row['megabytes'] for row in rows):.0f} MB",
    }


def _prepare(part: dict[str, Any]) -> dict[str, str]:
    rows = part["rows"]
    return {
        "prepare.seconds": f"{max(row['seconds'] for row in rows):.0f} s",
        "prepare.cpu": f"{max(row['cpu_seconds'] for row in rows):.0f} s",
        "prepare.megabytes": f"{max(row['peak_megabytes'] for row in rows):.0f} MB",
        "prepare.file-system": str(part["file_system"]),
    }


def _packing(part: dict[str, Any]) -> dict[str, str]:
    spent = {row["name"]: row["cpu_seconds_per_pair"] for row in part["rows"]}
    one, two = spent["256x256, 1 process"], spent["256x256, 2 processes"]
    many = [row for row in part["arithmetic"] if row["name"] == "10^8 pairs, 256x256"]
    few = [row for row in part["arithmetic"] if row["name"] == "AISegment, 256x256"]
    return {
        "packing.cpu": f"{one * 1000:.1f} ms",
        "packing.original": f"{spent['original, 1 process'] * 1000:.1f} ms",
        "packing.decoding": f"{spent['decoding alone'] / one:.0%}",
        "packing.two": f"{two / one:.2f}",
        "packing.aisegment": f"{few[0]['cpu_hours'] * 60:.0f}",
        "packing.hours": f"{many[0]['cpu_hours']:.0f}",
        "packing.one-node": f"{many[0]['minutes'] / 60:.1f} hours",
        "packing.16-nodes": f"{_of(many, 16):.0f} minutes",
        "packing.64-nodes": f"{_of(many, 64):.1f} minutes",
    }


def _of(rows: list[dict[str, Any]], nodes: int) -> float:
    return float(next(row["minutes"] for row in rows if row["nodes"] == nodes))


def _matrix(part: dict[str, Any]) -> dict[str, str]:
    columns = ("python", "torch", "torchvision", "torchmetrics", "numpy")
    lines = ["| Python | torch | torchvision | torchmetrics | numpy | result |", "|---" * 6 + "|"]
    for row in part["rows"]:
        cells = [row["versions"].get(name, "") for name in columns]
        result = f"{row['result']}, {row['passed']} tests"
        lines.append("| " + " | ".join([*cells, result]) + " |")
    return {"matrix.table": "\n\n" + "\n".join(lines) + "\n\n"}


def _installs(part: dict[str, Any]) -> dict[str, str]:
    stored = part["site_packages_kilobytes"]
    return {
        "install.gigabytes": f"{max(row.get('gigabytes', 0) for row in part['rows']):.1f}",
        "install.cpu-gigabytes": f"{part['without_cuda']['gigabytes']:.1f}",
        "install.cuda-gigabytes": f"{(stored['nvidia'] + stored['triton']) / 2**20:.0f}",
    }


def _quickstart(part: dict[str, Any]) -> dict[str, str]:
    return {
        "quickstart.iou": f"{part['test_iou']:.2f}",
        "quickstart.baseline": f"{part['baseline_iou']:.2f}",
        "quickstart.cpu-minutes": f"{part['cpu_seconds'] / 60:.0f}",
    }


def _recipes(parts: list[dict[str, Any]]) -> dict[str, str]:
    by_steps = {part["rows"][0]["steps"]: part for part in parts if "128x128" in part["pictures"]}
    short, long = by_steps[1000], by_steps[2500]
    labels = {
        "tutorial": "`tutorial`",
        "+ zoom, turn, shift": "+ zoom, rotation, translation",
        "aisegment_unet": "+ new backgrounds = `aisegment_unet`",
    }
    lines = [_recipe_line(labels.get(row["name"], row["name"]), row) for row in short["rows"]]
    (row,) = long["rows"]
    minutes = f"{row['minutes']:.0f} minutes on both cores"
    lines.append(_recipe_line(f"`aisegment_unet`, 500 epochs ({minutes})", row))
    best = max(row["runs"], key=lambda run: run["val_iou"])
    return {
        # Blank lines around it, or no Markdown renderer takes it for a table.
        "recipes.table": "\n\n" + "\n".join([*RECIPE_HEAD, *lines]) + "\n\n",
        "recipes.best-val": f"{best['val_iou']:.3f}",
        "recipes.best-test": f"{best['test_iou']:.3f}",
    }


def _choices(part: dict[str, Any]) -> dict[str, str]:
    """Differences to the first row are those of each seed, so of the same images."""
    lines = [
        "| `aisegment_unet`, 8 features, and … | val IoU | difference (lowest to highest) "
        "| test IoU | test boundary IoU | IoU on another source | CPU ms an image |",
        "|---" * 7 + "|",
    ]
    plain, *changed = part["rows"]
    before = {run["seed"]: run["val_iou"] for run in plain["runs"]}
    lines.append(_choice_line("nothing changed", "", plain))
    for row in sorted(changed, key=lambda row: -row["val_iou"]):
        gains = [run["val_iou"] - before[run["seed"]] for run in row["runs"]]
        mean = f"{statistics.mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
        lines.append(_choice_line(row["name"], mean, row))
    return {"choices.table": "\n\n" + "\n".join(lines) + "\n\n"}


def _choice_line(label: str, difference: str, row: dict[str, Any]) -> str:
    scores = f"{row['val_iou']:.3f} | {difference} | {row['test_iou']:.3f}"
    cpu = f"{row['cpu_seconds_per_image'] * 1000:.1f}"
    other = f"{row['test_boundary_iou']:.3f} | {row['other_iou']:.3f}"
    return f"| {label} | {scores} | {other} | {cpu} |"


def _distillation(part: dict[str, Any]) -> dict[str, str]:
    lines = [
        "| 8 features learn from | val IoU | test IoU | test boundary IoU | IoU on another source "
        "| CPU ms an image |",
        "|---" * 6 + "|",
    ]
    for row in part["rows"]:
        scores = (row[name] for name in ("val_iou", "test_iou", "test_boundary_iou", "other_iou"))
        cells = [row["name"], *(f"{score:.3f}" for score in scores)]
        lines.append(f"| {' | '.join(cells)} | {row['cpu_seconds_per_image'] * 1000:.1f} |")
    return {"distillation.table": "\n\n" + "\n".join(lines) + "\n\n"}


def _sizes(part: dict[str, Any], choices: dict[str, Any]) -> dict[str, str]:
    """Set the recipes' networks side by side: their scores in equal steps, sizes and costs."""
    lines = [
        "| recipe (features) | parameters | ONNX file | test IoU | test boundary IoU "
        "| IoU on another source | CPU ms a training image "
        "| CPU ms a mask: bf16 | OpenVINO | int8 |",
        "|---" * 10 + "|",
    ]
    for size in part["rows"]:
        scores = _row(choices, name=size["choice"])
        network = f"`{size['recipe']}` ({size['features']}) | {size['parameters']:,}"
        masks = (
            f"{_row(size['unet'], name=name)['cpu_seconds_per_image'] * 1000:.0f}"
            for name in ("kept-memory", "openvino-bf16", "int8")
        )
        cells = [
            f"{network} | {size['onnx_bytes'] / 1e6:.1f} MB",
            *(f"{scores[name]:.3f}" for name in ("test_iou", "test_boundary_iou", "other_iou")),
            f"{scores['cpu_seconds_per_image'] * 1000:.0f}",
            *masks,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return {"sizes.table": "\n\n" + "\n".join(lines) + "\n\n"}


def _minutes(part: dict[str, Any]) -> dict[str, str]:
    """Describe the last validation before each of some minutes, and the stages' tests."""
    lines = ["| minutes | images | val IoU |", "|---|---|---|"]
    for limit in MINUTES:
        last = [row for row in part["rows"] if row["minutes"] <= limit][-1]
        cells = f"{last['minutes']:.1f} | {last['side']}×{last['side']}"
        line = f"| {cells} | {last['val_iou']:.3f} |"
        if line != lines[-1]:  # the training has ended before
            lines.append(line)
    found = {"minutes.table": "\n\n" + "\n".join(lines) + "\n\n"}
    for number, stage in enumerate(part["stages"], 1):
        found[f"minutes.{number}.after"] = f"{stage['minutes']:.0f}"
        found[f"minutes.{number}.iou"] = f"{stage['test_iou']:.3f}"
        found[f"minutes.{number}.boundary-iou"] = f"{stage['test_boundary_iou']:.3f}"
    return found


def _equal_time(part: dict[str, Any]) -> dict[str, str]:
    lines = [
        "| network | parameters | epochs | test IoU | test boundary IoU | CPU ms an image |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(part["rows"], key=lambda row: -row["test_iou"]):
        scores = f"{row['test_iou']:.3f} | {row['test_boundary_iou']:.3f}"
        millions = f"{row['parameters'] / 1e6:.2f} million"
        cpu = f"{row['cpu_seconds_per_image'] * 1000:.1f}"
        lines.append(f"| `{row['name']}` | {millions} | {row['epochs']} | {scores} | {cpu} |")
    return {
        "equal-time.table": "\n\n" + "\n".join(lines) + "\n\n",
        "equal-time.minutes": f"{part['minutes']:.0f}",
    }


def _recipe_line(label: str, row: dict[str, Any]) -> str:
    test = f"{row['test_iou']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    scores = f"{row['val_iou']:.3f} | {test} | {row['test_boundary_iou']:.3f}"
    return f"| {label} | {scores} | {row['test_mae']:.3f} |"


def _masks(parts: list[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for network, part in enumerate(parts, 1):
        rows = {row["name"]: row for row in part["rows"]}
        for fit in ("letterbox", "squash", "cover"):
            shapes = [rows[f"{shape}, {fit}"]["mean_iou"] for shape in (*OTHER_SHAPES, *FRAMES)]
            found[f"masks.{fit}.{network}"] = f"{statistics.mean(shapes):.3f}"
        plain, mirrored = "upright 3:4, letterbox, not mirrored", "upright 3:4, letterbox"
        refined = rows["refined, radius 4, epsilon 0.0001"]
        found[f"masks.not-mirrored.{network}"] = f"{rows[plain]['mean_iou']:.3f}"
        found[f"masks.mirrored.{network}"] = f"{rows[mirrored]['mean_iou']:.3f}"
        found[f"masks.not-refined.{network}"] = f"{rows[mirrored]['boundary_iou']:.3f}"
        found[f"masks.refined.{network}"] = f"{refined['boundary_iou']:.3f}"
    return found


def differences(text: str, known: dict[str, str], page: str = "") -> list[Difference]:
    """Compare the figures of a page with the results.

    Raises:
        KeyError: a marker names a figure that the results do not have.
    """
    return [
        Difference(page, name, found, known[name])
        for _, name, found, _ in MARKER.findall(text)
        if found != known[name]
    ]


def filled(text: str, known: dict[str, str]) -> str:
    """Return a page with the numbers of the results between its markers."""
    return MARKER.sub(lambda match: match[1] + known[match[2]] + match[4], text)


def main(arguments: list[str] | None = None) -> int:
    """Compare or write; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the numbers into the pages")
    options = parser.parse_args(arguments)
    known, differing = figures(), 0
    for page in pages():
        text = page.read_text()
        for one in differences(text, known, str(page.relative_to(ROOT))):
            print(f"{one.page}: {one.name}: {one.found!r}, the results say {one.expected!r}")
            differing += 1
        if options.write:
            page.write_text(filled(text, known))
    return 0 if options.write else int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
