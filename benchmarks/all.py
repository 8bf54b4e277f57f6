"""All benchmarks with one command, and their results as one page.

    python benchmarks/all.py --quick          # within 8 minutes on 2 cores
    python benchmarks/all.py --full           # more images and rounds, compiled forms, batch
    sizes python benchmarks/all.py --full --device cuda --data RAW

Writes ``benchmarks/results/<date>-<hardware>.md`` (tables, aims, hardware, versions, commit,
command), the same as ``.json``, and the chart ``.svg`` (benchmarks/chart.py). Packages that are
missing leave rows empty, with the reason. Without installation, a Python that has torch and
torchvision, and PYTHONPATH naming a folder with the other packages, is enough.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import chart
import measure

from portrait_dist import files

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TITLES = {
    "loader": "Batches",
    "unet": "U-Net",
    "train_step": "Cost of a trainer per step",
    "train": "Training end to end",
    "scaling": "Ranks on this machine",
}
NO_GPU = """No GPU was there: nothing is claimed about one. With one, this fills the rows:

    python benchmarks/all.py --full --device cuda
"""


def command_of(name: str, options: argparse.Namespace, work: Path) -> list[str]:
    """Make a benchmark's command line; the later ones read the shards that loader.py packs."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(work / f"{name}.json")]
    command += ["--quick"] if options.quick else []
    command += ["--repeats", str(options.repeats)] if options.repeats else []
    if name == "loader":
        command += ["--work", str(work / "data")]
        command += ["--data", str(options.data)] if options.data else []
        command += ["--pairs", str(options.pairs)] if options.pairs else []
        return command + ([] if options.quick else ["--full-peers"])
    command += ["--device", options.device] if options.device else []
    command += ["--features", str(options.features)]
    command += ["--size", str(options.size)] if name in ("unet", "train_step") else []
    packed = work / "data" / "s256"
    if name in ("train", "scaling") and (packed / "manifest.json").is_file():
        command += ["--shards", str(packed)]
    if name == "unet" and options.checkpoint:
        command += ["--checkpoint", str(options.checkpoint)]
        command += ["--shards", str(options.shards)] if options.shards else []
    return command


def run(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one benchmark; return its result, or the reason why there is none."""
    print(f"\n== {name}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    with open(work / f"{name}.log", "w+") as log:
        code = subprocess.run(
            command_of(name, options, work), stdout=sys.stderr, stderr=log, env=environment
        ).returncode
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    out = work / f"{name}.json"
    if code or not out.is_file():
        print("\n".join(lines[-15:]), file=sys.stderr)
        return {
            "benchmark": name,
            "rows": [],
            "failed": lines[-1] if lines else f"exit code {code}",
        }
    text = out.read_text().replace(str(work) + os.sep, "")  # of the temporary folder only the names
    return json.loads(text) | {"seconds": round(time.monotonic() - begin, 1)}


def page(found: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpus = ", ".join(machine["gpus"]) or "none"
    lines = [
        f"# Benchmarks, {found['date']}",
        "",
        f"- hardware: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']:g} GB; GPU: {gpus}",
        f"- load of the machine at the start: {machine['load_at_start']:g}",
        f"- commit: {found['commit']}",
        f"- versions: {versions}",
        f"- command: `{found['command']}`, {found['seconds'] / 60:.1f} minutes",
        "",
        "Each number is the median of rounds in which all rows take turns, with the lowest and the "
        "highest beside it. CPU seconds are user + system, of all processes.",
    ]
    for part in found["benchmarks"].values():
        lines += ["", f"## {TITLES[part['benchmark']]}", ""]
        lines += (
            [f"Failed: {part['failed']}"]
            if "failed" in part
            else [measure.table(part["rows"]), *_notes(part)]
        )
    if not machine["gpus"]:
        lines += ["", "## GPU", "", NO_GPU.rstrip()]
    return "\n".join(lines) + "\n"


def _notes(part: dict[str, Any]) -> list[str]:
    known = {
        "benchmark",
        "rows",
        "sweep",
        "aims",
        "machine",
        "versions",
        "commit",
        "date",
        "command",
        "seconds",
    }
    notes = [f"- {name}: {value}" for name, value in part.get("aims", {}).items()]
    notes += [f"- {name}: {value}" for name, value in part.items() if name not in known]
    swept = ["", "Batch sizes:", "", measure.table(part["sweep"])] if part.get("sweep") else []
    return ["", *notes, f"- `{part['command']}`", *swept]


def hardware(machine: dict[str, Any]) -> str:
    """Name the hardware for a file: the GPUs, or processor and cores."""
    gpus = machine["gpus"]
    name = f"{len(gpus)}x-{gpus[0]}" if gpus else f"{machine['cpu']}-{machine['cores']}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks and write their page, chart and JSON; return the exit code."""
    options = _options(arguments)
    found = measure.result("all", [])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        found["benchmarks"] = {name: run(name, options, Path(temporary)) for name in options.only}
    found["seconds"] = round(time.monotonic() - begin, 1)
    del found["rows"]
    stem = options.out / f"{found['date'][:10]}-{hardware(found['machine'])}"
    options.out.mkdir(parents=True, exist_ok=True)
    measure.write(found, stem.with_suffix(".json"))
    files.write_text(stem.with_suffix(".md"), page(found))
    files.write_text(stem.with_suffix(".svg"), chart.draw(found))
    print(f"\n{stem.with_suffix('.md')}, {found['seconds'] / 60:.1f} minutes")
    failed = [name for name, part in found["benchmarks"].items() if "failed" in part]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="within 8 minutes on 2 cores")
    length.add_argument("--full", action="store_true", help="everything (the default)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="of the network (default: the GPU if there is one)",
    )
    parser.add_argument(
        "--data", type=Path, help="raw AISegment tree; portraits are generated when left out"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a trained network for unet.py, to compare masks with --shards",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        help="shards with the kind of images that --checkpoint was trained on",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder for the results (default benchmarks/results)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(TITLES),
        help="some of the benchmarks (--quick: all but scaling)",
    )
    parser.add_argument("--repeats", type=int, help="rounds, where not each benchmark's own number")
    parser.add_argument("--pairs", type=int, help="pairs to generate")
    parser.add_argument(
        "--features", type=int, default=32, help="channels of the network's first level"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the network's images")
    options = parser.parse_args(arguments)
    options.only = options.only or [
        name for name in TITLES if not (options.quick and name == "scaling")
    ]
    return options


if __name__ == "__main__":
    sys.exit(main())
