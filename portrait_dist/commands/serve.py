"""``serve``: masks and cut-outs over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.inference.segmenter import SegmenterOptions

EXAMPLES = """\b
Examples:
  portrait-dist serve --checkpoint runs/first/ckpt_best.pth
  curl --data-binary @photo.jpg 'http://127.0.0.1:8000/segment?output=cutout' > cutout.png
  curl --form photo=@photo.jpg \\
    'http://127.0.0.1:8000/segment?output=mask&format=webp' > mask.webp
"""
MEGA = 1_000_000


@dataclass(frozen=True)
class ServeResult:
    """What a service did until it was stopped.

    Attributes:
        address: where it listened.
        photos: that it answered with an image.
    """

    address: str
    photos: int


def _summary(result: ServeResult) -> str:
    return f"{result.photos} photos served at {result.address}"


@command("serve", summary=_summary, epilog=EXAMPLES)
@options.checkpoint
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. The default is reached from this machine only; 0.0.0.0 is every "
    "network that this machine is in, and there is no password.",
)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free one, which is printed.",
)
@options.batch_size(8, "Photos that go through the network together, at most.")
@click.option(
    "--max-requests",
    default=64,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Requests in progress at a time; others are answered with 503 at once.",
)
@click.option(
    "--max-megabytes",
    default=32.0,
    show_default=True,
    type=click.FloatRange(0.001, 10_000),
    help="Length of a photo's file, at most.",
)
@click.option(
    "--max-megapixels",
    default=50.0,
    show_default=True,
    type=click.FloatRange(0.001, 10_000),
    help="Size of a photo, at most.",
)
@click.option(
    "--timeout-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    help="For one request, with its upload.",
)
@options.segmenter("auto", "fp32", "bf16")
@options.trained_size
@options.trust_code
def serve(
    checkpoint: str,
    host: str,
    port: int,
    batch_size: int,
    max_requests: int,
    max_megabytes: float,
    max_megapixels: float,
    timeout_seconds: float,
    size: tuple[int, int] | None,
    trust_code: bool,
    **network: Unpack[SegmenterOptions],
) -> ServeResult:
    """Answer photos with masks and cut-outs over HTTP, and show a page to try it.

    POST /segment takes a photo as the body, or a form's file 'photo', and the options
    output=cutout|mask|side-by-side, format=png|webp|jpeg and
    background=transparent|blur|COLOUR. GET /health and GET /metrics (Prometheus) are for
    monitoring. Ctrl-C or SIGTERM ends it after the requests in progress.
    """
    from portrait_dist.inference import service
    from portrait_dist.inference.segmenter import PortraitSegmenter

    service.check_service_installed()
    limits = service.ServiceLimits(
        batch_size=batch_size,
        max_requests=max_requests,
        max_bytes=round(max_megabytes * MEGA),
        max_pixels=round(max_megapixels * MEGA),
        timeout_seconds=timeout_seconds,
    )
    with service.listen(host, port) as socket:
        segmenter = PortraitSegmenter.from_checkpoint(
            checkpoint, size=size, trust_code=trust_code, **network
        )
        address = service.address_of(socket)
        click.echo(f"listening at {address}, Ctrl-C ends it", err=True)
        return ServeResult(address, service.run(segmenter, limits, socket))
