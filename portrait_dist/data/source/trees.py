"""List folders of pictures: on a disk, at an address, or as a file of names says.

Every layout is found through these three, so that each works with all of them. Only names are
asked for; a local folder of 10^6 files takes about a second.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from portrait_dist.data.source.locations import file_system, reason_of
from portrait_dist.errors import InputError, UnreachableError
from portrait_dist.files import open_regular
from portrait_dist.system.address import check_address, is_address, redact

MOST_NAME_BYTES = 1 << 33
"""Of a file of names; 10^8 names of 80 bytes."""


class Tree(Protocol):
    """A tree of folders.

    Attributes:
        root: its path or address, without a slash at the end.
        shown: the same for messages.
    """

    root: str
    shown: str

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders in ``folder``, relative to the root; no hidden."""

    def files(self, folder: str, suffixes: tuple[str, ...], *, last: bool = False) -> list[str]:
        """Return the sorted names of its files that end in ``suffixes``, in any case; no hidden.

        ``last`` says that this folder is not asked for again, so that its names need not be kept.
        """


def path_in(folder: str, name: str) -> str:
    """Return the path of a name in a folder that is relative to the root; "" is the root."""
    return f"{folder}/{name}" if folder else name


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Name what cannot be read: a loop of symbolic links, a folder without permission.

    Raises:
        InputError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); repair or remove it"
        ) from error


class LocalTree:
    """A tree on a disk.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = self.shown = str(root)

    def folders(self, folder: str) -> list[str]:
        """See :class:`Tree`."""
        with self._scan(folder) as entries:
            return sorted(entry.name for entry in entries if _visible(entry) and _is_folder(entry))

    def files(self, folder: str, suffixes: tuple[str, ...], *, last: bool = False) -> list[str]:
        """See :class:`Tree`; a named pipe, socket or device of such a name is refused."""
        with self._scan(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.lower().endswith(suffixes) and _visible(entry) and _is_file(entry)
            )

    @contextlib.contextmanager
    def _scan(self, folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        path = os.path.join(self.root, folder) if folder else self.root
        with readable(path), os.scandir(path) as entries:
            yield entries


def _visible(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with readable(entry.path):
        return entry.is_dir()


def _is_file(entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False):  # nearly always, and it never fails
        return True
    with readable(entry.path):
        if entry.is_file():
            return True
        if not entry.is_dir() and os.path.exists(entry.path):
            raise InputError(f"{entry.path}: is a named pipe, socket or device, no file; remove it")
    return False


class RemoteTree:
    """A tree at an address that fsspec opens; each folder is listed once.

    Args:
        root: the address, without secrets: it is written down where the pictures stay there.

    Raises:
        InputError: no such address, or one that holds a password or a query.
    """

    def __init__(self, root: str) -> None:
        check_address(root)
        self.root = root.rstrip("/")
        self.shown = redact(self.root)
        if self.shown != self.root:
            raise InputError(
                f"{self.shown}: the address holds a password or a query, which would be written "
                "into pairs.csv; give credentials by the environment"
            )
        self._listed: dict[str, tuple[list[str], list[str]]] = {}

    def folders(self, folder: str) -> list[str]:
        """See :class:`Tree`."""
        return self._list(folder)[0]

    def files(self, folder: str, suffixes: tuple[str, ...], *, last: bool = False) -> list[str]:
        """See :class:`Tree`."""
        return [name for name in self._list(folder)[1] if name.lower().endswith(suffixes)]

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        if folder not in self._listed:
            found = _remote_entries(path_in(self.root, folder) if folder else self.root)
            folders = sorted(name for name, kind in found if kind == "directory")
            self._listed[folder] = folders, sorted(name for name, kind in found if kind == "file")
        return self._listed[folder]


def _remote_entries(address: str) -> list[tuple[str, str]]:
    """Names and kinds (``file``, ``directory``) of what a folder at an address holds; no hidden."""
    system, path = file_system(address)
    try:
        entries = system.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{redact(address)}: there is no such folder; see the address") from None
    except Exception as error:  # fsspec's file systems raise kinds of their own
        raise UnreachableError(
            f"{redact(address)}: cannot be listed ({type(error).__name__}: "
            f"{reason_of(error)}); run again when it answers"
        ) from error
    named = [
        (str(entry["name"]).rstrip("/").rpartition("/")[2], entry["type"]) for entry in entries
    ]
    return [(name, str(kind)) for name, kind in named if name and not name.startswith(".")]


class ListedTree:
    """A tree whose files a text names, one path a line; nothing is listed or looked at.

    Args:
        root: what the paths are relative to; or they begin with it.
        names: the text's file.
        given: the root as the user wrote it, with which they may begin too; empty: ``root``.

    Raises:
        InputError: the file cannot be read, or a path lies outside of the root.
    """

    def __init__(self, root: str, names: Path, given: str = "") -> None:
        self.root = root.rstrip("/") or root
        self.shown = redact(self.root)
        # Names of a folder are one text: 10^6 strings take 70 MB, their text 25.
        texts: dict[str, bytearray] = defaultdict(bytearray)
        with readable(names), open(open_regular(names), encoding="utf-8") as lines:
            self._beginning = f"{self.root}/"
            # A folder in the root may have the root's name: only if every line begins with it.
            written = f"{given.rstrip('/')}/"
            if given and all(line.startswith(written) for line in lines if line.strip()):
                self._beginning = written
            lines.seek(0)
            for line in lines:
                if path := self._relative(line.rstrip("\r\n"), names):
                    folder, _, name = path.rpartition("/")
                    texts[folder] += name.encode() + b"\n"
        self._texts = texts
        self._folders: dict[str, set[str]] = defaultdict(set)
        for folder in list(texts):
            while folder:
                folder, _, name = folder.rpartition("/")
                self._folders[folder].add(name)

    def _relative(self, line: str, names: Path) -> str:
        line = line.removeprefix(self._beginning)
        line = line.removeprefix("./")
        if "\0" in line:
            raise InputError(
                f"{names}: holds a NUL character; give one path a line, as find prints"
            )
        # A cheap look first: the exact ones below would take seconds for 10^6 lines.
        odd = line.startswith("/") or "://" in line or ".." in line
        if odd and (line[0] == "/" or is_address(line) or ".." in line.split("/")):
            raise InputError(
                f"{names}: '{redact(line)[:200]}' does not lie in {self.shown}; "
                "give paths relative to --raw"
            )
        return line

    def folders(self, folder: str) -> list[str]:
        """See :class:`Tree`."""
        return sorted(name for name in self._folders.get(folder, ()) if not name.startswith("."))

    def files(self, folder: str, suffixes: tuple[str, ...], *, last: bool = False) -> list[str]:
        """See :class:`Tree`."""
        # Given away where it is not needed again: names and stems are never both in memory.
        text = self._texts.pop(folder, b"") if last else self._texts.get(folder, b"")
        names = text.decode().split("\n")
        del text
        found = [
            name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
        found.sort()
        return found


def open_tree(root: str | Path, names: Path | None = None, given: str = "") -> Tree:
    """Open a tree on a disk or at an address.

    Args:
        root: folder or address.
        names: a file that names its files, one a line, in place of listing it.
        given: the root as that file may write it.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    if names is not None:
        return ListedTree(str(root), names, given)
    return RemoteTree(str(root)) if is_address(root) else LocalTree(root)
