"""Measure the U-Net from PyTorch Hub's model as it comes to the fastest exact form, step by step.

    python benchmarks/unet.py --json unet.json                  # on a CPU
    python benchmarks/unet.py --device cuda --json unet.json    # on a GPU; also TF32, CUDA graphs
    python benchmarks/unet.py --checkpoint runs/NAME/ckpt_best.pth --shards shards
                                                                # with IoU against float32 masks

Rows (each step keeps those before it): hub-eager-fp32, tf32 (GPU), channels-last, bf16, bn-folded,
merged (portrait_dist.models.fused), kept-memory (CPU; portrait_dist.system.malloc, all before have
glibc's own way), int8 (portrait_dist.models.int8, on CPUs with VNNI), compiled (torch.compile of
the bf16 model as it is), compiled-frozen (of the merged one, with frozen weights), max-autotune
(GPU, with CUDA graphs), onnxruntime-… and openvino-… (CPU; benchmarks/engines.py, where they are
installed), best; and train-… for forward, backward and Adam step. int8 can only be the
best where its masks were compared, on a trained network. The share of the roofline is the fastest
conceivable time of the original network on this machine (measured: a large matrix product in the
row's precision, bf16's for int8, a large copy; activations read and written once) divided by the
time taken. Rewrites that multiply less can exceed 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import measure
import torch
from torch import Tensor, nn

from portrait_dist.losses import SoftIoULoss
from portrait_dist.models import UNet, fused, int8
from portrait_dist.system.malloc import keep_freed_memory, set_thresholds

Work = Callable[[], Any]
CHANNELS_LAST = torch.channels_last
INT8_ROWS = ("int8", "onnxruntime-int8", "openvino-int8")
KEEP_MEMORY = ("kept-memory", "int8", "compiled-frozen", "train-kept-memory", "train-compiled")
"""Rows with :func:`portrait_dist.system.malloc.keep_freed_memory`, on a CPU."""


class Bench:
    """Device, input and how to time on it."""

    def __init__(self, device: str, size: int, features: int, checkpoint: Path | None) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.size = size
        self.model = _model(features, checkpoint).to(self.device).eval()
        self.at_least = 0.3 if self.cuda else 0.0
        self.keeps_memory: bool | None = None

    def images(self, batch: int) -> Tensor:
        """Make a batch of noise, float32 [batch, 3, size, size]."""
        torch.manual_seed(1)
        return torch.randn(batch, 3, self.size, self.size, device=self.device)

    def measure(self, work: Work, images: int, name: str = "") -> measure.Round:
        """Measure calls of ``work``, of so many images each, for the row ``name``."""
        synchronize = torch.cuda.synchronize if self.cuda else lambda: None
        keep = name in KEEP_MEMORY
        if not self.cuda and keep != self.keeps_memory:
            self.keeps_memory = keep
            if keep:
                keep_freed_memory()
            else:
                # The largest that glibc's own adjustment comes to.
                set_thresholds(trim=2**26, mmap=2**25)
            work()  # leaves the memory as it will be from now on
        return measure.repeated(work, images, synchronize, self.at_least)


def _model(features: int, checkpoint: Path | None) -> UNet:
    if checkpoint is not None:
        from portrait_dist.checkpoints import load_model

        found, _ = load_model(checkpoint)
        assert isinstance(found, UNet)
        return found
    torch.manual_seed(0)
    model = UNet(init_features=features)
    for module in model.modules():
        # Statistics as after training, not the zeros and ones of a new model.
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


def networks(
    bench: Bench, calibration: Tensor, compiled: tuple[str, ...]
) -> dict[str, fused.Network]:
    """Make the ladder: name → function from normalised float32 [B, 3, H, W] to probabilities."""
    plain, last = bench.model, copy.deepcopy(bench.model).to(memory_format=CHANNELS_LAST)
    bf16 = copy.deepcopy(last).bfloat16()
    ladder: dict[str, fused.Network] = {"hub-eager-fp32": _in_fp32(plain, "ieee", bench.cuda)}
    if bench.cuda:
        ladder["tf32"] = _in_fp32(plain, "tf32", True)
    ladder["channels-last"] = _in_fp32(_reading(last, torch.float32), "tf32", bench.cuda)
    ladder["bf16"] = _reading(bf16, torch.bfloat16)
    folded = fused.fold_batch_norm(bench.model).to(memory_format=CHANNELS_LAST).bfloat16()
    ladder["bn-folded"] = _reading(folded, torch.bfloat16)
    ladder["merged"] = fused.for_inference(bench.model, bench.device, "bf16")
    if not bench.cuda:
        ladder["kept-memory"] = ladder["merged"]
    if not bench.cuda and int8.is_supported() and bench.model.norm == "batch":
        ladder["int8"] = int8.quantise(bench.model, calibration)
    if "compiled" in compiled:
        ladder["compiled"] = _reading(torch.compile(bf16), torch.bfloat16)
    if "compiled-frozen" in compiled:
        ladder["compiled-frozen"] = _reading(_frozen(bench, {"freezing": True}), torch.bfloat16)
    if "max-autotune" in compiled:
        ladder["max-autotune"] = fused.for_inference(
            bench.model, bench.device, "bf16", compile=True
        )
    if not bench.cuda:
        ladder |= dict(engines.forms(bench.model, calibration))
    return ladder


def _frozen(bench: Bench, options: dict[str, Any]) -> fused.Network:
    merged = (
        fused.merge_up_convolutions(fused.fold_batch_norm(bench.model))
        .to(memory_format=CHANNELS_LAST)
        .bfloat16()
    )
    logits = torch.compile(merged, options=options)
    return lambda x: torch.sigmoid(logits(x).float())


def _reading(network: fused.Network, dtype: torch.dtype) -> fused.Network:
    """Return the network; bringing its input to channels-last is part of the price."""
    return lambda x: network(x.to(dtype, memory_format=CHANNELS_LAST))


def _in_fp32(work: Callable[..., Any], precision: str, cuda: bool) -> Callable[..., Any]:
    """Run ``work`` with ``ieee`` or ``tf32`` products of float32 on a GPU; as it is on a CPU."""
    if not cuda:
        return work

    def run(*arguments: Any) -> Any:
        with measure.precision_of_fp32(precision):
            return work(*arguments)

    return run


def forward_rows(
    bench: Bench,
    limits: Roofline,
    batch: int,
    repeats: int,
    compiled: tuple[str, ...],
    real: RealImages | None,
) -> list[measure.Row]:
    """Measure the ladder of inference; masks are compared on real images, if there are some."""
    x = bench.images(batch)
    ladder = networks(bench, real.calibration if real else x, compiled)
    with torch.no_grad():
        found = _outputs(ladder, x)
        ladder = {name: network for name, network in ladder.items() if name in found}
        differences = {
            name: float((output - found["hub-eager-fp32"]).abs().max())
            for name, output in found.items()
        }
        cases = {
            name: functools.partial(bench.measure, functools.partial(network, x), batch, name)
            for name, network in ladder.items()
        }
        rounds = measure.alternate(cases, repeats, warm_up=bench.cuda)
    masks = {}
    if real:  # whole batches: compiled forms take one shape
        whole = real.unseen[: len(real.unseen) // batch * batch]
        masks = {
            name: fused.binary_masks(network, whole, batch) for name, network in ladder.items()
        }
    rows = []
    for name, values in rounds.items():
        rows.append(measure.row(name, values, batch_size=batch, **limits.share(name, values)))
        rows[-1] |= {"largest_difference": float(f"{differences[name]:.1e}")}
        if masks:
            rows[-1] |= {
                "iou_with_fp32": round(fused.mask_iou(masks[name], masks["hub-eager-fp32"]), 6)
            }
    return _with_factors_and_best(rows, "best")


def _outputs(ladder: dict[str, fused.Network], x: Tensor) -> dict[str, Tensor]:
    """Run each form once, compiling where it is to be; name and drop those that cannot run here."""
    outputs = {}
    for name, network in ladder.items():
        try:
            outputs[name] = network(x).float()
        except Exception as error:  # compilers fail in many ways
            print(f"  {name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
    return outputs


def train_rows(
    bench: Bench, batch: int, repeats: int, compiled: tuple[str, ...]
) -> list[measure.Row]:
    """Measure the ladder of a training step: forward, loss, backward, Adam.

    Compiled forms compile in the unmeasured first round.
    """
    eager, last = (_train_step(bench, batch, one, False, False) for one in (False, True))
    steps: dict[str, Work] = {"train-hub-eager-fp32": _in_fp32(eager, "ieee", bench.cuda)}
    if bench.cuda:
        steps["train-tf32"] = _in_fp32(eager, "tf32", True)
    steps["train-channels-last"] = _in_fp32(last, "tf32", bench.cuda)
    steps["train-bf16"] = _train_step(bench, batch, True, True, False)
    if not bench.cuda:
        steps["train-kept-memory"] = steps["train-bf16"]
    if compiled:
        steps["train-compiled"] = _train_step(bench, batch, True, True, True)
    cases = {
        name: functools.partial(bench.measure, work, batch, name) for name, work in steps.items()
    }
    rows = [
        measure.row(name, rounds, batch_size=batch)
        for name, rounds in measure.alternate(cases, repeats).items()
    ]
    return _with_factors_and_best(rows, "train-best")


def _train_step(bench: Bench, batch: int, channels_last: bool, bf16: bool, compiled: bool) -> Work:
    x = bench.images(batch)
    target = (torch.rand(batch, 1, bench.size, bench.size, device=bench.device) > 0.5).float()
    model: nn.Module = copy.deepcopy(bench.model).train()
    if channels_last:
        model, x = model.to(memory_format=CHANNELS_LAST), x.contiguous(memory_format=CHANNELS_LAST)
    network: Callable[..., Tensor] = torch.compile(model) if compiled else model
    optimizer, loss = torch.optim.Adam(model.parameters(), 1e-3, fused=bench.cuda), SoftIoULoss()

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
            value = loss(network(x, return_logits=True), target)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def _with_factors_and_best(rows: list[measure.Row], name: str) -> list[measure.Row]:
    first = rows[0]["images_per_second"]
    for line in rows:
        line["times_eager"] = round(line["images_per_second"] / first, 2)
        line["ms_per_image"] = float(f"{1e3 / line['images_per_second']:.4g}")
    unknown = dict.fromkeys(INT8_ROWS, 0.0)  # the others keep the masks whatever the weights
    equal = [
        line
        for line in rows
        if line.get("iou_with_fp32", unknown.get(line["name"], 1.0)) >= fused.MIN_MASK_IOU
    ]
    fastest = max(equal, key=lambda line: line["images_per_second"])
    return [*rows, {**fastest, "name": name, "note": fastest["name"]}]


class Roofline:
    """Time that the network takes at least on this machine.

    Multiplications at the speed of a large matrix product in the row's precision, or activations
    and weights moved once at the speed of a large copy, whichever is longer.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.flops, self.elements = _cost(bench)
        self.copy = self._best(self._copy())
        kinds = ("fp32", "tf32", "bf16") if bench.cuda else ("fp32", "bf16")
        self.product = {kind: self._best(self._product(kind)) for kind in kinds}

    def share(self, name: str, rounds: list[measure.Round]) -> measure.Row:
        """Divide the least time of a row by the median of what it took."""
        kind = "bf16"
        if name.endswith("-fp32"):
            kind = "fp32"
        elif name in ("tf32", "channels-last"):
            kind = "tf32" if self.bench.cuda else "fp32"
        size = 2 if kind == "bf16" else 4
        least = max(self.flops / self.product[kind], self.elements * size / self.copy)
        return {"share_of_roofline": round(statistics.median(measure.rates(rounds)) * least, 3)}

    def facts(self) -> dict[str, float]:
        """List what was measured, for the record."""
        products = {f"{kind}_tflops": round(one / 1e12, 3) for kind, one in self.product.items()}
        return {
            "gflop_per_image": round(self.flops / 1e9, 2),
            **products,
            "copy_gb_per_second": round(self.copy / 1e9, 1),
        }

    def _best(self, case: tuple[Work, float]) -> float:
        work, amount = case
        return max(self.bench.measure(work, 1).rate * amount for _ in range(15))

    def _product(self, kind: str) -> tuple[Work, float]:
        """Double the side until a product takes long enough to be timed.

        A CPU without bf16 instructions needs minutes for the size that suits another.
        """
        side = 8192 if self.bench.cuda else 128
        while True:
            product = self._product_of(kind, side)
            product()
            seconds = 1 / self.bench.measure(product, 1).rate
            if self.bench.cuda or side == 2048 or seconds > 0.05:
                return product, 2.0 * side**3
            side *= 2

    def _product_of(self, kind: str, side: int) -> Work:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        a = torch.randn(side, side, device=self.bench.device).to(dtype)
        precision = "tf32" if kind == "tf32" else "ieee"
        return _in_fp32(lambda: a @ a, precision, self.bench.cuda)

    def _copy(self) -> tuple[Work, float]:
        source = torch.zeros((1 << 28) if self.bench.cuda else (1 << 25), device=self.bench.device)
        target = torch.empty_like(source)
        return (lambda: target.copy_(source)), 2.0 * source.nbytes


def _cost(bench: Bench) -> tuple[float, float]:
    """Count one image's floating-point operations, and the numbers its convolutions move."""
    elements = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += inputs[0].numel() + output.numel()

    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(bench.model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(bench.images(1))
    return float(counter.get_total_flops()), float(elements)


def sweep(bench: Bench, batches: list[int], repeats: int) -> list[measure.Row]:
    """Measure batch sizes, for the ladder's first row and the forms that PortraitSegmenter uses."""
    forms: dict[str, fused.Network] = {
        "hub-eager-fp32": _in_fp32(bench.model, "ieee", bench.cuda),
        "merged" if bench.cuda else "kept-memory": fused.for_inference(
            bench.model, bench.device, "bf16"
        ),
    }
    if not bench.cuda and int8.is_supported() and bench.model.norm == "batch":
        forms["int8"] = int8.quantise(bench.model, bench.images(1))
    rows = []
    with torch.no_grad():
        for batch in batches:
            x = bench.images(batch)
            cases = {
                name: functools.partial(bench.measure, functools.partial(form, x), batch, name)
                for name, form in forms.items()
            }
            for name, rounds in measure.alternate(cases, repeats).items():
                rows.append(measure.row(name, rounds, batch_size=batch))
    return rows


class RealImages:
    """Normalised images, float32 [N, 3, H, W].

    Up to 32 of the training split to calibrate int8 with, and up to 32 each of validation and test
    to compare masks on.
    """

    def __init__(self, shards: Path, size: int, device: torch.device) -> None:
        train, val, test = (
            _normalised(shards, split, size, 32).to(device) for split in ("train", "val", "test")
        )
        self.calibration, self.unseen = train, torch.cat((val, test))


def _normalised(shards: Path, split: str, size: int, count: int) -> Tensor:
    from portrait_dist.data import build_loader
    from portrait_dist.preprocessing import normalise

    loader = build_loader(shards, split, batch_size=16, size=(size, size), shuffle=False)
    return torch.cat([normalise(batch.image, batch.alpha)[0] for batch in loader])[:count]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the ladders of inference and training, and the batch sizes."""
    options = _options(arguments)
    bench = Bench(options.device, options.size, options.features, options.checkpoint)
    batch = options.batch or (64 if bench.cuda else 8)
    repeats = options.repeats or 5
    real = RealImages(options.shards, options.size, bench.device) if options.shards else None
    if bench.cuda:
        torch.backends.cudnn.benchmark = True
    limits = Roofline(bench)
    rows = forward_rows(bench, limits, batch, repeats, _compiled_forms(options, bench.cuda), real)
    training_batch = 2 if options.quick and not bench.cuda else batch
    rows += train_rows(
        bench, training_batch, repeats, () if options.quick or options.no_compile else ("compiled",)
    )
    swept = (
        []
        if options.quick
        else sweep(bench, [1, 16, 64, 256, 512] if bench.cuda else [1, 2, 8, 16], repeats)
    )
    found = measure.result(
        "unet",
        rows,
        sweep=swept,
        device=str(bench.device),
        size=options.size,
        features=options.features,
        parameters=sum(weight.numel() for weight in bench.model.parameters()),
        threads=torch.get_num_threads(),
    )
    found["roofline"] = limits.facts()
    measure.publish(found, options.json)
    if swept:
        print("\nbatch sizes\n" + measure.table(swept))
    return found


def _compiled_forms(options: argparse.Namespace, cuda: bool) -> tuple[str, ...]:
    if options.no_compile or (options.quick and not cuda):
        return ()
    forms = ("compiled-frozen",) if options.quick else ("compiled", "compiled-frozen")
    return (*forms, "max-autotune") if cuda else forms


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--features", type=int, default=32, help="channels of the first level")
    parser.add_argument(
        "--batch",
        type=int,
        help="images at once (default 64 on a GPU, 8 on a CPU, as predict has)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a trained network in place of a random one"
    )
    parser.add_argument("--shards", type=Path, help="with --checkpoint: images to compare masks on")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile makes"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
