"""What ``predict`` has done in its output folder, so that the same command continues there.

One line of JSON is appended before the outputs of a photo are written and one after: a photo that
was begun and not ended is done again, and its files are known to be this command's own. A journal
belongs to one part; every part reads all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from portrait_dist import files
from portrait_dist.inference.photos import STDIN, Photo

PATTERN = ".predict*.jsonl"
OF_PART = re.compile(r"\.predict-[0-9]+-of-([0-9]{1,9})\.jsonl")


def journal_name(part: int, parts: int) -> str:
    """Name the journal of a part."""
    return ".predict.jsonl" if parts == 1 else f".predict-{part}-of-{parts}.jsonl"


def fingerprint(settings: dict[str, Any], checkpoint: str | Path) -> str:
    """Hash what decides the outputs' bytes: the settings and the checkpoint's content."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    with open(checkpoint, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


class Journal:
    """The journal of one part; a context manager that opens its file for appending.

    Args:
        folder: of the outputs.
        settings: from :func:`fingerprint`; what other settings have done does not count.
        part, parts: which part of how many.

    Attributes:
        most_parts: the largest number of parts of which a journal is there.
    """

    def __init__(self, folder: Path, settings: str, part: int = 0, parts: int = 1) -> None:
        self.part, self.parts, self.settings = part, parts, settings
        self.path = folder / journal_name(part, parts)
        self._done: dict[tuple[str, str], str] = {}
        self._begun: set[tuple[str, str]] = set()
        self._descriptor = -1
        self.most_parts = 1
        for path in sorted(folder.glob(PATTERN)) if folder.is_dir() else ():
            if of_part := OF_PART.fullmatch(path.name):
                self.most_parts = max(self.most_parts, int(of_part[1]))
            for entry in files.json_objects(_content(path)):
                if entry.get("settings") == settings and isinstance(entry.get("name"), str):
                    key = entry["name"], str(entry.get("photo", ""))
                    self._begun.add(key)
                    if isinstance(entry.get("done"), str):
                        self._done[key] = entry["done"]

    def is_done(self, photo: Photo, targets: list[Path]) -> bool:
        """Say whether the photo, unchanged, was done with these settings, and its outputs exist."""
        if photo.path == STDIN or self._done_as(photo) != photo.identity():
            return False
        return all(_size(path) > 0 for path in targets)

    def is_ours(self, photo: Photo) -> bool:
        """Say whether this command began to write the photo's outputs before."""
        return any(key in self._begun for key in _keys(photo))

    def was_cut_short(self, photo: Photo) -> bool:
        """Say whether a process that has ended was writing the photo's outputs."""
        return self.is_ours(photo) and self._done_as(photo) is None

    def _done_as(self, photo: Photo) -> str | None:
        """Return the identity with which the photo was done; None where it was not."""
        return next((self._done[key] for key in _keys(photo) if key in self._done), None)

    def begin(self, photo: Photo) -> None:
        """Note that the photo's outputs are about to be written."""
        self._append(self._entry(photo))

    def end(self, photo: Photo, identity: str) -> None:
        """Note that they are written.

        Args:
            photo: it.
            identity: which it had before it was read.
        """
        self._append({**self._entry(photo), "done": identity})

    def _entry(self, photo: Photo) -> dict[str, str]:
        name, path = _keys(photo)[0]
        return {"settings": self.settings, "name": name, "photo": path}

    def _append(self, entry: dict[str, str]) -> None:
        with files.explained(self.path):
            os.write(
                self._descriptor, (json.dumps(entry) + "\n").encode()
            )  # one call, one whole line

    def __enter__(self) -> Journal:
        """Open the file.

        Raises:
            InputError, PortraitDistError: it cannot be written.
        """
        with files.explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, 0o666)
            if os.fstat(self._descriptor).st_size:
                os.write(self._descriptor, b"\n")  # a kill may have cut the last line short
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file: everything is done, and nothing is left to continue."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _keys(photo: Photo) -> list[tuple[str, str]]:
    """Return (name, path), by which a photo is known; an older journal has the name alone."""
    path = "-" if photo.path == STDIN else os.path.abspath(photo.path)
    return [(photo.name, path), (photo.name, "")]


def _content(path: Path) -> bytes:
    """Read a journal; one that cannot be read says nothing, and its photos are done again."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
