"""Run the processes of a job in a container: with pyxis, or with Apptainer for a .sif file.

The batch script itself runs outside, where SLURM's commands are; it hands the container on to
srun. Folders have the same path inside as outside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from portrait_dist.errors import InputError
from portrait_dist.system.address import is_address, read_locations, split_members

IMAGE, MOUNT = "--container", "--mount"
"""Arguments of the batch script, before all others."""
SIF = ".sif"


@dataclass(frozen=True)
class Container:
    """An image and what is seen in it.

    Args:
        image: what pyxis takes (an address such as ``docker://site/portrait-dist:0.2.0``, or a
            .sqsh file), or Apptainer's .sif file.
        mounts: absolute paths of folders.
    """

    image: str
    mounts: tuple[str, ...]

    def arguments(self) -> list[str]:
        """Return the batch script's arguments, which :func:`split_arguments` reads."""
        return [IMAGE, self.image, *(word for path in self.mounts for word in (MOUNT, path))]

    def python(self, gpus: int) -> list[str]:
        """Return what follows srun's options: its options for pyxis, and the image's Python.

        Args:
            gpus: GPUs of a node; without any Apptainer does not look for a driver.
        """
        if self.image.endswith(SIF):
            driver = ["--nv"] if gpus else []
            binds = ["--bind", ",".join(self.mounts), "--pwd", os.getcwd()]
            return ["apptainer", "exec", *driver, *binds, self.image, "python"]
        mounts = ",".join(f"{path}:{path}" for path in self.mounts)
        return [
            f"--container-image={self.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={os.getcwd()}",
            "--no-container-entrypoint",  # the image's is portrait-dist
            "python",
        ]


def python(container: Container | None, gpus: int) -> list[str]:
    """Return what starts Python in a task of srun, this process's one without a container."""
    return [sys.executable] if container is None else container.python(gpus)


def container_of(image: str, mounts: Sequence[str], arguments: Sequence[str]) -> Container | None:
    """Check an image and find the folders that a job needs; None without an image.

    Args:
        image: see :class:`Container`.
        mounts: folders to see besides the working directory and those of the arguments.
        arguments: of the batch script.

    Raises:
        InputError: an image file or a folder that is not there, or a folder that cannot be named.
    """
    if not image:
        if mounts:
            raise InputError(f"{MOUNT} {mounts[0]}: it goes with {IMAGE}")
        return None
    if _is_file_name(image):
        if not Path(image).is_file():
            raise InputError(f"{IMAGE} {image}: there is no such file")
        image = os.path.abspath(image)
    for path in mounts:
        if not Path(path).is_dir():
            raise InputError(f"{MOUNT} {path}: there is no such folder")
    folders = {os.getcwd()}
    for path in [*mounts, *_named_folders(arguments)]:
        # Both: the job uses the name, and a link in a mounted folder leads to the place.
        folders |= {os.path.abspath(path), os.path.realpath(path)}
    for path in sorted(folders):
        if {",", ":"} & set(path):
            raise InputError(f"{path}: containers take no folder with ',' or ':' in its name")
    return Container(image, _outermost(folders))


def split_arguments(arguments: Sequence[str]) -> tuple[Container | None, list[str]]:
    """Split the batch script's arguments into the container and the rest."""
    image, mounts, rest = "", [], list(arguments)
    while rest[:1] in ([IMAGE], [MOUNT]):
        name, value = rest.pop(0), rest.pop(0) if rest else ""
        if not value:
            raise InputError(f"{name}: its value is missing")
        if name == IMAGE:
            image = value
        else:
            mounts.append(value)
    return (Container(image, tuple(mounts)) if image else None), rest


def _is_file_name(image: str) -> bool:
    return image.startswith(("/", "./", "../")) or image.endswith((SIF, ".sqsh"))


def _values(arguments: Sequence[str]) -> list[str]:
    """Return what arguments say, each shard set of a list for itself."""
    found = []
    for argument in arguments:
        value = argument.partition("=")[2] or argument
        try:
            found += [split_members(one.location)[0] for one in read_locations(value)]
        except InputError:  # a list of something else
            found.append(value)
    return found


def _named_folders(arguments: Sequence[str]) -> list[str]:
    """Return the folders of what arguments name, or those in which it will be made."""
    found, here = [], f"{os.path.realpath('.')}/"
    for value in _values(arguments):
        path = Path(value).absolute()
        if is_address(value) or value.startswith("-"):
            continue
        if not os.path.isabs(value) and os.path.realpath(path).startswith(here):
            continue  # no path, or one below the working directory
        there = next(one for one in (path, *path.parents) if os.path.isdir(one))
        if there != there.parent:
            found.append(str(there))
    return found


def _outermost(folders: set[str]) -> tuple[str, ...]:
    """Leave out what lies in another of the folders."""
    return tuple(
        path
        for path in sorted(folders)
        if not any(str(parent) in folders for parent in Path(path).parents)
    )
