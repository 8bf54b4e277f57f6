"""The folder that ``pack`` writes: what it is for, and who may write it.

While shards are missing, ``.pack.json`` says from which pairs, with which settings and by which
encoder the folder is packed; every process that writes there compares itself with it. One process
packs or finishes the whole folder, or one process for each part packs its shards, each with a lock
file of its own. Where the file system has no locks nothing is lost either: files appear whole under
names that one process uses, and whoever writes a shard writes the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from portrait_dist.data.shards.encode import Settings
from portrait_dist.data.shards.fingerprint import (
    Fingerprint,
    encoder_fingerprint,
    parse_fingerprint,
)
from portrait_dist.data.shards.format import (
    MANIFEST,
    MANIFEST_LIMIT,
    Manifest,
    keys_sha256,
    parse_manifest,
)
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.split import Split
from portrait_dist.errors import InputError
from portrait_dist.files import (
    SECONDS_BETWEEN_TRIES,
    SECONDS_FOR_A_DEAD_NODE,
    ExclusiveLock,
    create_text,
    explained,
    lock_holder,
    read_marker,
    read_regular,
)
from portrait_dist.system.info import environment_number

UNFINISHED = ".pack.json"
"""Marks a folder whose packing is under way; gone when the manifest is there."""
PART_LOCK = re.compile(r"\.pack-([0-9]+)-of-([0-9]+)\.lock")
SECONDS_TO_START = 60.0
"""How long a part waits while others start, or while one finishes the folder."""


class HeldError(InputError):
    """Another process writes into the folder."""


@dataclass(frozen=True)
class Part:
    """One of several parts of the shards.

    Args:
        index: from 0.
        count: how many parts.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def lock_name(self) -> str:
        """Name of the part's lock file."""
        return f".pack-{self.index}-of-{self.count}.lock"


@dataclass(frozen=True)
class PackFolder:
    """A folder to pack into.

    Args:
        out: the folder.
        split: the pairs.
        settings: how they are stored.
    """

    out: Path
    split: Split
    settings: Settings

    @property
    def manifest(self) -> Path:
        """Path of the manifest, which is there when every shard is."""
        return self.out / MANIFEST

    def check(self) -> None:
        """Check that the folder is new, or was packed from these pairs with these settings.

        Raises:
            InputError: it holds something else.
            DamagedDataError: its manifest is damaged.
        """
        if self.manifest.is_file():
            manifest = self.read_manifest()
            if manifest.version > 1:  # packing anew would cut its shards in other places
                raise InputError(
                    f"{self.out}: has grown to version {manifest.version}; add pairs with "
                    "--append, or give another --out"
                )
            keys = {name: entry.keys_sha256 for name, entry in manifest.splits.items()}
            self._compare({**manifest.settings, "source": manifest.source, "keys_sha256": keys})
        elif (before := read_marker(self.out, UNFINISHED, "pack")) is not None:
            self._compare(before)

    def _compare(self, before: dict[str, Any]) -> None:
        """Compare what the folder is for with this command line."""
        keys = before.get("keys_sha256", {})  # markers of releases before 0.2 have none
        if not isinstance(keys, dict) or any(
            self._keys.get(name) != sha256 for name, sha256 in keys.items()
        ):
            raise InputError(
                f"{self.out}: was packed from other pairs (source {before.get('source')}); "
                "give another --out"
            )
        self.compare_settings(before)

    def compare_settings(self, before: Mapping[str, Any]) -> None:
        """Compare the settings of packed shards with this command line's.

        Raises:
            InputError: one differs.
        """
        # Squashed shards, and those of earlier releases, do not say it.
        before, now = ({"fit": "squash", **found} for found in (before, self.settings.to_dict()))
        for name, value in now.items():
            if before.get(name) != value:
                option, old, new = name.replace("_", "-"), _shown(before.get(name)), _shown(value)
                raise InputError(
                    f"{self.out}: was packed with --{option} {old}, not {new}; "
                    "use that, or another --out"
                )

    def begin(self, parts: int = 1) -> None:
        """Mark the folder as unfinished, before shards are written.

        Args:
            parts: number of parts, for messages.

        Raises:
            InputError: another machine began the folder and encodes otherwise, or a process with
                other settings was faster.
        """
        self._mark(parts)
        # After the marker: at no moment has a folder neither, which would look like a foreign one.
        self.manifest.unlink(missing_ok=True)

    def _mark(self, parts: int) -> None:
        """Write the marker, or compare with the one that is there."""
        content = {
            **self.settings.to_dict(),
            "source": self.split.source,
            "keys_sha256": self._keys,
            "parts": parts,
            "encoder": asdict(self._encoder),
        }
        # Created, not written: of parts that start together one decides what the folder is for.
        if create_text(self.out / UNFINISHED, json.dumps(content)):
            return
        before = read_marker(self.out, UNFINISHED, "pack") or {}
        self._compare(before)
        theirs = parse_fingerprint(before.get("encoder"))
        if theirs and not self._encoder.same_bytes(theirs):
            raise InputError(_other_encoder(self.out, theirs, self._encoder))

    def begun_parts(self) -> int:
        """Return the number of parts that the first process named; 1 where it is not known."""
        with contextlib.suppress(InputError):
            parts = (read_marker(self.out, UNFINISHED, "pack") or {}).get("parts")
            if isinstance(parts, int) and 0 < parts < 10**9:
                return parts
        return 1

    def read_manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            InputError: it cannot be read.
            DamagedDataError: it is damaged.
        """
        try:
            data = read_regular(self.manifest, MANIFEST_LIMIT)
        except OSError as error:
            raise InputError(f"{self.manifest}: cannot be read ({error.strerror})") from error
        return parse_manifest(data, str(self.manifest))

    @contextlib.contextmanager
    def locked(self, wait: float = 0.0) -> Iterator[None]:
        """Hold the folder alone, without a part at work.

        Args:
            wait: seconds to wait for another process that holds the folder.

        Raises:
            HeldError: it is held, or a part is being packed.
        """
        with self._lock(wait):
            if at_work := self._part_at_work():
                raise HeldError(
                    f"{self.out}: part {at_work[0]} is being packed by {at_work[1]}; wait for it"
                )
            yield

    @contextlib.contextmanager
    def locked_part(self, part: Part) -> Iterator[None]:
        """Hold one part of the folder.

        Raises:
            InputError: another process packs this part or the whole folder, or it holds something
                else.
        """

        def held(holder: str) -> str:
            return f"{self.out}: part {part} is being packed by {holder} already; wait for it"

        path = self.out / part.lock_name
        _ = self._encoder  # takes seconds with torch's import: not while others wait for the lock
        requeued = environment_number("SLURM_RESTART_COUNT") > 0
        give_up = time.monotonic() + (SECONDS_FOR_A_DEAD_NODE if requeued else 0.0)
        while (lock := self._try_part(part, path, held, last=time.monotonic() >= give_up)) is None:
            time.sleep(SECONDS_BETWEEN_TRIES)
        with lock:
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _try_part(
        self, part: Part, path: Path, held: Callable[[str], str], *, last: bool
    ) -> ExclusiveLock | None:
        """Take the lock of a part; None where it is held and this is not the last try.

        Under the folder's lock, so that no process that packs all of it can begin meanwhile.
        """
        with self._lock(SECONDS_TO_START):
            self.check()
            if not self.manifest.exists():
                self._mark(part.count)
            try:
                # A file of its own for each part, by lockf: it must hold between nodes.
                return ExclusiveLock(path, held)
            except InputError:
                if last:
                    raise
                return None

    def _lock(self, wait: float) -> ExclusiveLock:
        try:
            return ExclusiveLock(
                self.out,
                lambda _: (
                    f"{self.out}: another 'portrait-dist pack' is writing there; "
                    "wait for it, or give another --out"
                ),
                wait=lambda _: wait,
            )
        except InputError as error:
            raise HeldError(str(error)) from None

    def _part_at_work(self) -> tuple[Part, str] | None:
        with explained(self.out):
            names = sorted(path.name for path in self.out.iterdir())
        for name in names:
            found = PART_LOCK.fullmatch(name)
            # A lock file alone says nothing: a killed part leaves it, without its lock.
            if found and (holder := lock_holder(self.out / name)):
                return Part(int(found[1]), int(found[2])), holder
        return None

    @functools.cached_property
    def _encoder(self) -> Fingerprint:
        return encoder_fingerprint(self.settings)

    @functools.cached_property
    def _keys(self) -> dict[str, str]:
        return {name: keys_sha256(self.split.keys(name)) for name in SPLITS}


def _other_encoder(out: Path, theirs: Fingerprint, ours: Fingerprint) -> str:
    return (
        f"{out}: was begun on {theirs}; this machine would write other bytes, it is {ours}; "
        "pack with the same libraries on the same kind of machine, or give another --out"
    )


def _shown(value: object) -> str:
    """Format a value of the settings as the command line has it."""
    if value is None:
        return "original"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
