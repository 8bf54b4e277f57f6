"""Pairs of image and mask: a compact table of them, how files are paired, and how they are checked.

An image and a mask belong together when their keys are equal: the stem of both files, behind the
names of the folders between them and the layout's top folder. The key is the sample key in shards.
"""

from __future__ import annotations

import bisect
import filecmp
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from portrait_dist.data.source import masks
from portrait_dist.data.source.locations import (
    Location,
    open_binary,
    read_bytes,
    shown,
    suffix_of,
    to_location,
)
from portrait_dist.data.source.pictures import (
    MOST_BYTES,
    REMEDY,
    check_picture,
    exif_orientation,
)
from portrait_dist.data.source.trees import readable
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.system.progress import track

ALPHA, ANY, LEVELS = "alpha", "any", "levels"
"""Kinds of masks: PNGs whose alpha channel is the mask; or what :mod:`.masks` reads."""


@dataclass(frozen=True, order=True)
class Pair:
    """One portrait.

    Args:
        key: sample key.
        image: its file, a path or an address.
        matte: the file of its mask.
        group: name of the folder that the image came in.
        masks: ``alpha`` or ``any``; with ``alpha`` the image is a JPEG and the mask's alpha channel
            counts whatever it holds. ``levels`` is a grey PNG that is taken as it is: a mask that
            ``predict`` wrote.
    """

    key: str
    image: Location
    matte: Location
    group: str
    masks: str = ALPHA


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of files of one type. A file's place is its folder: 8 bytes instead of a path.

    Args:
        path: path or address.
        prefix: of the keys; what follows it is a file's stem.
        suffix: of the files' names.
        group: of the pairs whose image is here.
        split: that the layout gives them; empty where it gives none.
    """

    path: str
    prefix: str
    suffix: str
    group: str = ""
    split: str = ""

    def file(self, key: str) -> str:
        """Return the path or address of a file by its key."""
        return f"{self.path}/{key[len(self.prefix) :]}{self.suffix}"


Place = Folder | str
"""Where a file is: in a folder that says it together with the key, or a whole path or address."""


class PairTable(Sequence[Pair]):
    """Pairs sorted by key, 100 bytes each besides the key's characters.

    Args:
        keys: sorted, each once.
        images: place of each image.
        mattes: place of each mask.
        splits: ``train``, ``val``, ``test`` or empty for each; None where none is given.
        masks: kind of the masks.
    """

    def __init__(
        self,
        keys: list[str],
        images: list[Place],
        mattes: list[Place],
        splits: list[str] | None = None,
        masks: str = ALPHA,
    ) -> None:
        self.keys, self.masks, self.splits = keys, masks, splits
        self._images, self._mattes = images, mattes

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        if isinstance(index, slice):
            return self.chosen(range(len(self))[index])
        key, image, matte = self.keys[index], self._images[index], self._mattes[index]
        return Pair(key, _place(image, key), _place(matte, key), self.group(index), self.masks)

    def group(self, index: int) -> str:
        """Return the group of a pair: the folder that its image came in."""
        image = self._images[index]
        if isinstance(image, Folder):
            return image.group
        return image.rpartition("/")[0].rpartition("/")[2]

    def split(self, index: int) -> str:
        """Return the split that the source gives a pair; empty where it gives none."""
        if self.splits is not None:
            return self.splits[index]
        image = self._images[index]
        return image.split if isinstance(image, Folder) else ""

    def chosen(self, indices: Iterable[int]) -> PairTable:
        """Return a table of some of the pairs, in the order of ``indices``."""
        order = array("q", indices)  # a list of numbers takes five times the memory
        return PairTable(
            [self.keys[i] for i in order],
            [self._images[i] for i in order],
            [self._mattes[i] for i in order],
            None if self.splits is None else [self.splits[i] for i in order],
            self.masks,
        )

    def position(self, key: str) -> int:
        """Return where a key stands.

        Raises:
            KeyError: it is not there.
        """
        if not self.has(key):
            raise KeyError(key)
        return bisect.bisect_left(self.keys, key)

    def paths(self, key: str) -> tuple[str, str]:
        """Return the path or address of the image and of the mask of a key."""
        index = self.position(key)
        return _text(self._images[index], key), _text(self._mattes[index], key)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield key, image and mask of each pair as texts."""
        for key, image, matte in zip(self.keys, self._images, self._mattes, strict=True):
            yield key, _text(image, key), _text(matte, key)

    def has(self, key: str) -> bool:
        """Return whether a key is there."""
        # Keys are sorted, so no second index of them is held in memory.
        found = bisect.bisect_left(self.keys, key)
        return found < len(self.keys) and self.keys[found] == key

    def matte_folder(self, key: str) -> Folder:
        """Return the folder of a mask that has one."""
        place = self._mattes[self.position(key)]
        assert isinstance(place, Folder)
        return place


def _text(place: Place, key: str) -> str:
    return place if isinstance(place, str) else place.file(key)


def _place(place: Place, key: str) -> Location:
    return to_location(_text(place, key))


@dataclass
class PairReport:
    """What a source holds.

    Args:
        pairs: sorted by key.
        images_without_matte: in sorted order.
        mattes_without_image: in sorted order.
        identical: (the file that is taken, another of the same key and content).
        other_pictures: files among the images that are not used for their type.
        layout: what the source was taken for, in words.
        not_in_split_file: keys that the user's split file does not name.
    """

    pairs: PairTable
    images_without_matte: list[Location]
    mattes_without_image: list[Location]
    identical: list[tuple[Location, Location]] = field(default_factory=list)
    other_pictures: list[Location] = field(default_factory=list)
    layout: str = ""
    not_in_split_file: list[str] = field(default_factory=list)


class Pairing:
    """Match images and masks by key in one pass over each; first all images, then all masks.

    Of files with the same key and the same content the first one is taken.

    Args:
        masks: kind of the masks.
    """

    def __init__(self, masks: str = ALPHA) -> None:
        self._masks = masks
        self._waiting: dict[str, Folder] = {}
        self._alone: dict[str, Folder] = {}
        self._found: tuple[list[str], list[Place], list[Place]] = ([], [], [])
        self.identical: list[tuple[Location, Location]] = []
        self.images = self.mattes = 0

    def add_images(self, folder: Folder, stems: Iterable[str]) -> None:
        """Add images by their stems.

        Raises:
            InputError: a key is there already, with another content.
        """
        for stem in stems:
            key = folder.prefix + stem
            if self._is_twin(self._waiting.setdefault(key, folder), folder, key):
                continue
            self.images += 1

    def add_mattes(self, folder: Folder, stems: Iterable[str]) -> None:
        """Add masks by their stems.

        Raises:
            InputError: a key is there already, with another content.
        """
        for stem in stems:
            key = folder.prefix + stem
            image = self._waiting.pop(key, None)
            if image is not None:
                keys, images, mattes = self._found
                keys.append(key)
                images.append(image)
                mattes.append(folder)
            elif self._is_twin(self._alone.setdefault(key, folder), folder, key):
                continue
            self.mattes += 1

    def _is_twin(self, first: Folder, folder: Folder, key: str) -> bool:
        """Whether a file is the same as an earlier one of its key."""
        if first is folder:
            return False
        one, other = to_location(first.file(key)), to_location(folder.file(key))
        with readable(shown(other)):
            same = (
                isinstance(one, Path)
                and isinstance(other, Path)
                # Not shallow: equal size and time do not make files equal.
                and filecmp.cmp(one, other, shallow=False)
            )
        if not same:
            raise InputError(
                f"{shown(other)}: differs from {shown(one)}, which has the same name; "
                "remove or rename one of them"
            )
        self.identical.append((one, other))
        return True

    def table(self) -> PairTable:
        """Return the pairs that were found, and forget them.

        Raises:
            InputError: two masks of one image differ.
        """
        self._waiting = dict(self._waiting)  # a dict keeps the memory of what was taken out
        keys, images, mattes = self._found
        self._found = ([], [], [])
        table = PairTable(keys, images, mattes, masks=self._masks)
        # Most sources are listed in order already: sorting 10^6 keys needs a second list.
        if any(one >= other for one, other in itertools.pairwise(keys)):
            table = table.chosen(sorted(range(len(keys)), key=keys.__getitem__))
        for key in [key for key in self._alone if table.has(key)]:
            second = self._alone.pop(key)  # of an image that has a mask
            self._is_twin(table.matte_folder(key), second, key)
            self.mattes -= 1
        return table

    def images_alone(self) -> list[Location]:
        """Return the images without a mask, sorted by key."""
        return [to_location(place.file(key)) for key, place in _by_key(self._waiting)]

    def mattes_alone(self) -> list[Location]:
        """Return the masks without an image, sorted by key."""
        return [to_location(place.file(key)) for key, place in _by_key(self._alone)]


def _by_key(places: dict[str, Folder]) -> list[tuple[str, Folder]]:
    return sorted(places.items(), key=lambda item: item[0])


def by_suffix(
    path: str, names: list[str], prefix: str = "", group: str = "", split: str = ""
) -> Iterator[tuple[Folder, list[str]]]:
    """Yield the files of a folder by their suffixes: a :class:`Folder` and stems.

    Args:
        path: of the folder.
        names: of the files; the list is emptied, so that names and stems are not both in memory.
        prefix: see :class:`Folder`, as for all that follow.
        group: of the pairs.
        split: that the layout gives.
    """
    found: dict[str, list[str]] = {}
    names.reverse()
    while names:
        stem, dot, ending = names.pop().rpartition(".")
        found.setdefault(dot + ending, []).append(stem)
    for suffix, stems in found.items():
        yield Folder(path, prefix, suffix, group, split), stems


def check_keys_are_storable(table: PairTable) -> None:
    """Check that every key can be one of WebDataset, which cuts a member's name at its first dot.

    Raises:
        InputError: a key with a dot or an unprintable character.
    """
    for index, key in enumerate(table.keys):
        if "." in key or "/" in key or "\\" in key or not key.isprintable():
            raise InputError(
                f"{shown(table[index].image)}: the name '{key}' cannot be a key in WebDataset "
                "shards; rename it, and its matte, without dots"
            )


def check_pairs(pairs: Sequence[Pair], threads: int = 4) -> None:
    """Check every pair by its headers and last bytes: type, alpha channel, equal sizes, whole.

    Raises:
        InputError: a pair cannot be used (no alpha channel, sizes that differ, a wrong type).
        DamagedDataError: a file is truncated or unreadable.
        UnreachableError: an address does not answer.
    """
    with ThreadPoolExecutor(threads) as pool:
        problems = [
            problem
            for problem in track(pool.map(_problem, pairs), total=len(pairs), what="pairs checked")
            if problem
        ]
    if not problems:
        return
    first = next((problem for problem in problems if isinstance(problem, InputError)), problems[0])
    more = f" (and {len(problems) - 1} more such pairs)" if len(problems) > 1 else ""
    raise type(first)(f"{first}{more}")


IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF")
MASK_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF")
IMAGE_MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1")
MASK_MODES = ("L", "1", "P", "RGBA", "LA", "RGB", "I;16", "I;16B", "I")


def _problem(pair: Pair) -> PortraitDistError | None:
    try:
        if pair.masks == ALPHA:
            image_size = check_picture(pair.image, ("JPEG", "MPO"), ("RGB", "L"))
            matte_size = check_picture(pair.matte, ("PNG",), ("RGBA", "LA"))
        else:
            image_size = check_picture(pair.image, IMAGE_FORMATS, IMAGE_MODES)
            matte_size = _mask_size(pair.matte)
    except PortraitDistError as error:
        return error
    if image_size == matte_size or _turned(pair.image, image_size) == matte_size:
        return None
    return InputError(
        f"{shown(pair.matte)}: {matte_size[0]}x{matte_size[1]} pixels, "
        f"but its image {shown(pair.image)} has {image_size[0]}x{image_size[1]}; "
        "bring both to one size, or remove the pair"
    )


def _mask_size(mask: Location) -> tuple[int, int]:
    if suffix_of(mask) != ".json":
        return check_picture(mask, MASK_FORMATS, MASK_MODES)
    try:
        return masks.annotation_size(read_bytes(mask, MOST_BYTES))
    except (OSError, ValueError) as error:
        raise DamagedDataError(f"{shown(mask)}: {error}; {REMEDY}") from error


def _turned(image: Location, size: tuple[int, int]) -> tuple[int, int] | None:
    """(width, height) of an image as it is shown, where its EXIF orientation swaps them."""
    with open_binary(image) as file:
        # EXIF stands in the first segment, which has 64 kB at most.
        orientation = exif_orientation(file.read(65536))
    return size[::-1] if orientation >= 5 else None
