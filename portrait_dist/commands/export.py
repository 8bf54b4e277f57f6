"""``export``: the network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.inference.export import ExportFormat, ExportResult

EXAMPLES = """\b
Example:
  portrait-dist export --checkpoint runs/first/ckpt_best.pth --format onnx --out portrait.onnx
  npm install onnxruntime-web && portrait-dist export --checkpoint runs/first/ckpt_best.pth \\
    --format html --out portrait.html
"""


def _summary(result: ExportResult) -> str:
    return (
        f"{result.file}: {result.bytes / 1e6:.1f} MB, checked against the network: "
        f"largest difference {result.largest_difference:.2g}\n"
        f"card    {result.card}\n"
        f"input   {result.input}\noutput  {result.output}"
    )


@command("export", summary=_summary, epilog=EXAMPLES)
@options.checkpoint
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["onnx", "pt2", "openvino", "html"]),
    help="ONNX, PyTorch's exported program, OpenVINO's graph and weights (NAME.xml, NAME.bin), or "
    "a page that cuts out portraits in a browser, without a server.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@click.option(
    "--data",
    default="",
    metavar="SHARDS",
    help="Score the checkpoint on the test split of these shards for the model card.",
)
@click.option(
    "--onnxruntime-web",
    "runtime",
    default="node_modules/onnxruntime-web",
    show_default=True,
    metavar="DIR",
    help="The npm package of that name, which becomes part of the page of --format html.",
)
@options.trained_size
@options.trust_code
def export(
    checkpoint: str,
    kind: ExportFormat,
    out: Path,
    force: bool,
    data: str,
    runtime: str,
    size: tuple[int, int] | None,
    trust_code: bool,
) -> ExportResult:
    """Write the network for other programs and check the file against it.

    Input: RGB images from 0 to 1, any batch size, at the size of training; output: alpha. The file
    says so in its metadata. A model card, FILE.card.md, is written beside it.
    """
    from portrait_dist.inference.export import export as write

    return write(
        checkpoint,
        out,
        kind,
        force=force,
        size=size,
        trust_code=trust_code,
        data=data,
        runtime=runtime,
    )
