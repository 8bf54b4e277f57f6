"""What this machine can run, and what is missing: each check looks at one thing and says what to do about it.

    for check in diagnose(path=Path("runs"), shards="shards"):
        print(check.status, check.name, check.found, check.advice)

``fail`` means that something will not work, ``warn`` that it works but slowly or not everywhere, ``ok`` that there is nothing to
do. A check that itself breaks is a ``fail`` with the error's text.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from portrait_dist.errors import DamagedDataError, PortraitDistError
from portrait_dist.system import info

OK, WARN, FAIL = "ok", "warn", "fail"
GB = 1e9
FEW_HANDLES, TOO_FEW_HANDLES = 1024, 256  # a reader keeps up to 256 shards of each split open
LITTLE_MEMORY = 4 * GB
LITTLE_SHARED_MEMORY = 1 * GB  # containers come with 64 MB
LITTLE_SPACE = 5 * GB
SLOW_DISK = 50e6  # bytes/s
SLOW_FSYNC = 0.2  # seconds; each checkpoint waits for two
SLOW_DECODING = 300.0  # pairs of 256×256 per second and core
CORES_PER_GPU = 4


@dataclass(frozen=True)
class Check:
    """One finding: ``status`` is ok, warn or fail; ``advice`` is empty where there is nothing to do."""

    name: str
    status: str
    found: str
    advice: str = ""


def diagnose(
    path: Path = Path(), shards: str | None = None, gpu_required: bool = False
) -> Iterator[Check]:
    """Run every check, one after the other, and yield the findings as they come.

    Args:
        path: folder whose disk is measured: where runs or shards shall lie. A file of 64 MB is written and removed.
        shards: folder or address of packed shards to look at.
        gpu_required: no usable GPU is a failure, not a warning.
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("training", check_training),
        ("gpu", functools.partial(check_gpu, required=gpu_required)),
        ("processes", check_process_group),
        ("compiler", check_compiler),
        ("cores", check_cores),
        ("memory", check_memory),
        ("shared memory", check_shared_memory),
        ("file handles", check_file_handles),
        ("disk", functools.partial(check_disk, path)),
        ("locks", functools.partial(check_locks, path)),
        ("decoders", check_decoders),
        ("slurm", check_slurm),
    ]
    if shards:
        checks.append(("shards", functools.partial(check_shards, shards)))
    for name, check in checks:
        try:
            yield check()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            yield Check(
                name,
                FAIL,
                f"the check itself broke ({reason})",
                "what it needs is missing or broken; mend that first",
            )


def check_python() -> Check:
    found = f"{info.versions()['python']} in {sys.prefix}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", WARN, found, "use Python 3.11, 3.12 or 3.13; others are not tested")
    return Check("python", OK, found)


def check_packages() -> Check:
    """Every requirement of the installed portrait-dist against what is installed."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires("portrait-dist") or []]
    except metadata.PackageNotFoundError:
        return Check(
            "packages",
            FAIL,
            "portrait-dist is not installed, only importable",
            "run 'pip install -e .' in its folder",
        )
    wrong = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check(
            "packages", FAIL, "; ".join(wrong), "install the locked environment again: 'uv sync'"
        )
    main = [f"{name} {version}" for name, version in info.versions().items() if name != "python"]
    return Check("packages", OK, ", ".join(main))


def check_training() -> Check:
    """SuperGradients is from 2024: does it import with the other packages' versions?"""
    try:
        from portrait_dist.training import sg_adapter

        del sg_adapter
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Check(
            "training",
            FAIL,
            f"the trainer does not import ({reason})",
            "install the locked environment again: 'uv sync'",
        )
    return Check("training", OK, "SuperGradients imports")


def check_gpu(required: bool = False) -> Check:
    """GPUs that torch can compute on; tells apart no GPU, a CPU build of torch, hidden GPUs and a driver that does not fit."""
    import torch

    if torch.cuda.is_available():
        return _try_gpus()
    driver = driver_version()
    if driver is None:
        advice = "training on CPUs works, only far slower; for a GPU install NVIDIA's driver (containers: start with GPUs)"
        return Check("gpu", FAIL if required else WARN, "no GPU and no NVIDIA driver here", advice)
    if torch.version.cuda is None:
        found = f"NVIDIA driver {driver}, but torch {torch.__version__} is a build for CPUs"
        return Check("gpu", FAIL, found, "install a CUDA build of the same torch version")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Check(
            "gpu",
            FAIL,
            f"CUDA_VISIBLE_DEVICES='{hidden}' hides every GPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
    return Check(
        "gpu",
        FAIL,
        f"driver {driver}, CUDA {torch.version.cuda} in torch: {_cuda_error()}",
        _driver_advice(),
    )


def _cuda_error() -> str:
    """Why CUDA does not start, in its own words."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return " ".join(str(error).split())[:300]
    return "torch sees no GPU"


def _driver_advice() -> str:
    import torch

    return (
        f"update the driver to one for CUDA {torch.version.cuda} or install a torch built for an older CUDA; "
        "after a driver update restart the machine; in a container or job ask for GPUs; 'nvidia-smi' must list them"
    )


def _try_gpus() -> Check:
    """Multiply on every GPU: a torch without code for the GPU's generation fails here, not an hour later."""
    import torch

    names = info.gpu_names()
    for number, name in enumerate(names):
        try:
            square = torch.ones(64, 64, device=f"cuda:{number}")
            if float((square @ square).sum()) != 64**3:
                return Check(
                    "gpu",
                    FAIL,
                    f"GPU {number} ({name}) computes wrong results",
                    "take it out of use",
                )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            return Check(
                "gpu", FAIL, f"GPU {number} ({name}) does not compute: {reason}", _driver_advice()
            )
    memory = [torch.cuda.mem_get_info(number) for number in range(len(names))]
    total = ", ".join(
        f"{name} {whole / GB:.0f} GB" for name, (_, whole) in zip(names, memory, strict=True)
    )
    found = f"{len(names)} ({total}), driver {driver_version()}, CUDA {torch.version.cuda}"
    busy = [str(number) for number, (free, whole) in enumerate(memory) if free < 0.5 * whole]
    if busy:
        return Check(
            "gpu",
            WARN,
            f"{found}; more than half of the memory of GPU {', '.join(busy)} is taken",
            "see 'nvidia-smi'",
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check(
            "gpu", WARN, f"{found}; no bf16 in hardware", "train with train.precision=fp32"
        )
    return Check("gpu", OK, found)


def driver_version() -> str | None:
    """Version of NVIDIA's driver, ``unknown`` where only its devices show, None without one."""
    text = _read("/proc/driver/nvidia/version")
    words = [word for word in text.split() if word[:1].isdigit() and word.count(".") >= 1]
    if words:
        return words[0]
    if text or Path("/dev/nvidiactl").exists():
        return "unknown"
    return (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition(
            "\n"
        )[0]
        or None
    )


def check_process_group() -> Check:
    """Can ranks talk? Starts a process group of one (gloo), which needs a network interface, and looks for NCCL."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    nccl = dist.is_nccl_available()
    if gpus > 1 and not nccl:
        return Check(
            "processes",
            FAIL,
            f"{gpus} GPUs, but torch has no NCCL",
            "install a CUDA build of torch for Linux",
        )
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
            dist.destroy_process_group()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            advice = f"let the name '{socket.gethostname()}' lead to this machine (/etc/hosts), or set GLOO_SOCKET_IFNAME=lo"
            return Check("processes", FAIL, f"gloo does not start: {reason}", advice)
    if not nccl:
        return Check("processes", OK, "gloo; no NCCL, which only GPUs need")
    version = ".".join(map(str, torch.cuda.nccl.version())) if gpus else "not loaded without a GPU"
    return Check("processes", OK, f"gloo, NCCL {version}")


def check_compiler() -> Check:
    """``train.compile=true`` builds C++ on CPUs, and a small C module with Python's headers for GPUs."""
    compiler = os.environ.get("CXX") or next(
        (name for name in ("g++", "c++", "clang++", "gcc") if shutil.which(name)), None
    )
    if compiler is None:
        advice = "leave train.compile=false, or install g++ (Debian: build-essential)"
        return Check("compiler", WARN, "no C++ compiler: torch.compile cannot work", advice)
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        advice = "leave train.compile=false, or install them (Debian: python3-dev)"
        return Check(
            "compiler",
            WARN,
            f"{compiler}, but Python's C headers are missing: torch.compile may fail",
            advice,
        )
    return Check("compiler", OK, f"{compiler}, for train.compile=true")


def check_cores() -> Check:
    import torch

    cores, quota, gpus = info.cores(), info.cpu_quota(), torch.cuda.device_count()
    found = f"{cores} of {os.cpu_count()} usable ({info.cpu_name()})"
    if quota is not None and quota < cores:
        advice = f"set train.threads={max(1, int(quota))}, or give the container more: too many threads take turns"
        return Check(
            "cores", WARN, f"{found}, but the container may use only {quota:g} cores' time", advice
        )
    if gpus and cores < CORES_PER_GPU * gpus:
        advice = f"ask for {CORES_PER_GPU} cores for each GPU, or store pixels with 'portrait-dist pack --codec raw'"
        return Check(
            "cores", WARN, f"{found} for {gpus} GPUs: decoding may keep them waiting", advice
        )
    return Check("cores", OK, found)


def check_memory() -> Check:
    import psutil

    free, total = psutil.virtual_memory().available, info.memory_limit()
    found = f"{min(free, total) / GB:.1f} GB free of {total / GB:.1f} GB"
    if min(free, total) < LITTLE_MEMORY:
        return Check("memory", WARN, found, "start fewer ranks, or lower train.batch_size")
    return Check("memory", OK, found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """NCCL's ranks on one machine, and DataLoader's worker processes, meet in /dev/shm."""
    advice = "start containers with --shm-size=8g or --ipc=host"
    if not folder.is_dir():
        return Check("shared memory", WARN, f"no {folder}", advice)
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GB:.2f} GB free of {usage.total / GB:.2f} GB in {folder}"
    return (
        Check("shared memory", OK, found)
        if usage.free >= LITTLE_SHARED_MEMORY
        else Check("shared memory", WARN, found, advice)
    )


def check_file_handles() -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    if soft == resource.RLIM_INFINITY or soft >= FEW_HANDLES:
        return Check(
            "file handles",
            OK,
            f"{'no limit' if soft == resource.RLIM_INFINITY else soft} (at most {most})",
        )
    advice = f"'ulimit -n {min(65536, hard) if hard != resource.RLIM_INFINITY else 65536}' in the shell or job script"
    return Check(
        "file handles",
        FAIL if soft < TOO_FEW_HANDLES else WARN,
        f"{soft} (at most {most}); shards need more",
        advice,
    )


def check_disk(path: Path, size: int = 64 << 20) -> Check:
    """Free space, and the speed of writing a file of ``size`` bytes through to the disk."""
    folder = _existing(path)
    try:
        usage = shutil.disk_usage(folder)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            speed, wait = _write_speed(Path(scratch) / "data", size)
    except OSError as error:
        advice = "give a folder that you can write to (--path), and free some space"
        return Check("disk", FAIL, f"{folder}: cannot write there ({error.strerror})", advice)
    found = f"{folder}: writes {speed / 1e6:.0f} MB/s, fsync {wait * 1e3:.0f} ms, {usage.free / GB:.0f} GB free"
    if speed < SLOW_DISK or wait > SLOW_FSYNC:
        return Check(
            "disk", WARN, found, "put shards and runs on a local disk (--path measures another one)"
        )
    if usage.free < LITTLE_SPACE:
        return Check(
            "disk", WARN, found, "free some space; a full disk stops a run at its next checkpoint"
        )
    return Check("disk", OK, found)


def _write_speed(file: Path, size: int) -> tuple[float, float]:
    """(bytes/s of writing with a final fsync, seconds that one small write with fsync takes in the median of 5)."""
    block = os.urandom(1 << 20)
    waits = []
    with open(file, "wb", buffering=0) as out:
        started = time.perf_counter()
        for _ in range(size >> 20):
            out.write(block)
        os.fsync(out.fileno())
        speed = size / max(time.perf_counter() - started, 1e-9)
        for _ in range(5):
            started = time.perf_counter()
            out.write(b"x")
            os.fsync(out.fileno())
            waits.append(time.perf_counter() - started)
    return speed, sorted(waits)[2]


def check_locks(path: Path) -> Check:
    """A run folder is locked against a second writer; some network file systems cannot lock."""
    import fcntl

    folder = _existing(path)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        advice = (
            "put run.root on another file system, or mount this one with locks (Lustre: -o flock)"
        )
        return Check("locks", FAIL, f"{folder}: files cannot be locked ({error.strerror})", advice)
    return Check("locks", OK, f"{folder}: files can be locked")


def check_decoders(seconds: float = 0.15) -> Check:
    """Pairs of 256×256 that one core decodes, for ``seconds``."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    from portrait_dist.data.shards.decode import decode_pair

    rows, columns = np.mgrid[0:256, 0:256]
    image = np.stack([rows, columns, (rows * columns) >> 8], axis=2).astype(np.uint8)
    alpha = ((rows - 128) ** 2 + (columns - 128) ** 2 < 90**2).astype(np.uint8) * 255
    jpeg, png = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95), io.BytesIO()
    Image.fromarray(alpha).save(png, "png")
    out_image, out_alpha = np.empty_like(image), np.empty_like(alpha)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decode_pair(jpeg, png.getvalue(), None, out_image, out_alpha)
        count += 1
    speed = count / (time.perf_counter() - started)
    found = f"{speed:.0f} pairs/s on one core, 256x256"
    if speed < SLOW_DECODING:
        advice = "something else may be using the cores; or store pixels with 'portrait-dist pack --codec raw'"
        return Check("decoders", WARN, found, advice)
    return Check("decoders", OK, found)


def check_slurm() -> Check:
    if not shutil.which("sbatch"):
        return Check("slurm", OK, "none here; torchrun needs none")
    version = _output("sinfo", "--version") or "unknown version"
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        return Check("slurm", OK, f"{version}, inside job {job}")
    if not _output("sinfo", "--noheader", "--format=%P"):
        return Check(
            "slurm",
            WARN,
            f"{version}, but the controller does not answer",
            "ask those who run the cluster; see 'sinfo'",
        )
    return Check("slurm", OK, f"{version}: 'portrait-dist submit' queues jobs")


def check_shards(location: str, samples: int = 64) -> Check:
    """The manifest, every shard's size (local ones), and some samples of each split decoded."""
    from portrait_dist.data.shards.reader import ShardSet, read_manifest

    try:
        manifest = read_manifest(location)
        sets = {split: ShardSet(location, split) for split in manifest.splits}
        missing = [
            text for found in sets.values() if not found.remote for text in _wrong_sizes(found)
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return Check(
                "shards",
                FAIL,
                f"{missing[0]}{more}",
                "copy them again, or run 'portrait-dist pack' again",
            )
        speed = _read_samples(sets, samples)
    except PortraitDistError as error:
        return Check("shards", FAIL, str(error), f"see 'portrait-dist verify {location}'")
    counts = ", ".join(f"{split} {found.samples}" for split, found in sets.items())
    return Check(
        "shards", OK, f"{location}: {counts} samples; reads {speed:.0f} pairs/s with one thread"
    )


def _wrong_sizes(shards: Any) -> Iterator[str]:
    for number, entry in enumerate(shards.shards):
        try:
            size = os.stat(Path(shards.location) / entry.name).st_size
        except FileNotFoundError:
            yield f"{shards.shard_name(number)} is missing"
            continue
        if size != entry.bytes:
            yield f"{shards.shard_name(number)} has {size} bytes, not {entry.bytes}"


def _read_samples(sets: dict[str, Any], samples: int) -> float:
    """Read and decode samples spread evenly over each split; pairs per second."""
    import numpy as np

    from portrait_dist.data.shards.decode import decode_pair

    started, read = time.perf_counter(), 0
    for found in sets.values():
        size = found.size or (256, 256)
        image, alpha = np.empty((*size, 3), np.uint8), np.empty(size, np.uint8)
        wanted = min(samples, found.samples)
        for place in range(wanted):
            number = place * found.samples // wanted
            stored = found.read(number)
            try:
                decode_pair(stored.image, stored.alpha, size, image, alpha, codec=found.codec)
            except ValueError as error:
                raise DamagedDataError(
                    f"{found.name(number)}: does not decode ({error})"
                ) from error
        read += wanted
    return read / max(time.perf_counter() - started, 1e-9)


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*words: str) -> str:
    """What a program prints, or nothing where it is not there, fails or hangs."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
