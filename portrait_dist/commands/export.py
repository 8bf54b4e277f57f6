"""``export``."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command


def _export_summary(result: dict[str, Any]) -> str:
    return (
        f"{result['file']}: {result['bytes'] / 1e6:.1f} MB, checked against the network: "
        f"largest difference {result['largest_difference']:.2g}\n"
        f"input   {result['input']}\noutput  {result['output']}"
    )


@command(
    "export",
    summary=_export_summary,
    epilog="\b\nExample:\n  portrait-dist export --checkpoint runs/first/ckpt_best.pth --format onnx --out portrait.onnx\n",
)
@click.option("--checkpoint", required=True, help="A .pth file of a run.")
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["onnx", "pt2"]),
    help="ONNX, or PyTorch's exported program.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def export(checkpoint: str, kind: str, out: str, force: bool) -> dict[str, Any]:
    """Write the network for other programs and check the file against it.

    Input: RGB pictures from 0 to 1, any batch size, at the size of training; output: alpha. The file says so in its metadata.
    """
    from portrait_dist.inference.export import export as write

    return write(checkpoint, out, kind, force=force)
