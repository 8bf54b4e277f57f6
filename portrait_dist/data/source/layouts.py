"""Tell how a source of pictures is laid out, and find its pairs.

    aisegment      clip_img/<group>/clip_*/<stem>.jpg, matting/<group>/matting_*/<stem>.png (RGBA)
    arranged       train|val|test/<stem>.jpg with <stem>.png (RGBA) beside it, as the tutorial does
    images-masks   images/<path>.jpg, masks/<path>.png; also images/train, or train/images
    p3m            train/blurred_image and train/mask, validation/P3M-*/original_image and mask
    supervisely    <data set>/img/<name>.jpg and <data set>/ann/<name>.jpg.json, or masks_machine
    list           a CSV, TSV or JSONL of image, mask and, where it says so, split (``lists``)

The first that fits is taken, in this order. What a layout does not say, such as the kind of the
masks, is read from the files later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from portrait_dist.data.source import lists
from portrait_dist.data.source.locations import Location, to_location
from portrait_dist.data.source.pairs import (
    ALPHA,
    ANY,
    Pairing,
    PairReport,
    by_suffix,
    check_keys_are_storable,
)
from portrait_dist.data.source.trees import Tree, open_tree, path_in, readable
from portrait_dist.errors import InputError
from portrait_dist.system.address import is_address

IMAGES, MATTES = "clip_img", "matting"
JPEG_SUFFIXES, PNG_SUFFIXES = (".jpg", ".jpeg"), (".png",)
OTHER_SUFFIXES = (".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".avif")
"""Of pictures that may be meant as images, but are no JPEG."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
UNUSED_SUFFIXES = (".gif", ".heic", ".avif")
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "mattes", "matte", "alphas", "alpha")
P3M_IMAGES = ("original_image", "blurred_image")
SUPERVISELY_MASKS = ("ann", "masks_machine", "masks")
EXPECTED = f"{IMAGES}/<group>/clip_*/<name>.jpg and {MATTES}/<group>/matting_*/<name>.png"
KNOWN = (
    "images/ and masks/ with files of the same names (also below train, val and test), the "
    "tutorial's arranged tree, a Supervisely project, a P3M tree, or a .csv or .jsonl list"
)
WORDS = {
    "aisegment": "an AISegment tree (JPEG in clip_img, alpha channel of the PNG in matting)",
    "arranged": "an arranged tree (JPEG and PNG with alpha side by side in train, val and test)",
    "images-masks": "folders of images and masks with the same names",
    "p3m": "a P3M tree",
    "supervisely": "a Supervisely project",
    "list": "a list of images and masks",
}


@dataclass(frozen=True)
class Section:
    """A folder of images and the folder of their masks, relative to the root.

    Args:
        images: the folder.
        mattes: of the masks; the same folder where they lie side by side.
        group: of the pairs; where it is empty, the folder of each image.
        split: that the layout gives; empty for none.
        prefix: of the keys.
        deep: look into the folders below, too.
    """

    images: str
    mattes: str
    group: str = ""
    split: str = ""
    prefix: str = ""
    deep: bool = True


def find_pairs(raw: str | Path, names: Path | None = None, given: str = "") -> PairReport:
    """Find the pairs of a source of any layout; only names are looked at.

    Hidden files, files where folders are expected and files of other types are ignored. Of files
    with the same key and the same content the first path in sorted order is taken.

    Args:
        raw: folder, address, or a list: a file that ends in .csv, .tsv or .jsonl.
        names: a file that names the files below ``raw``, one a line, in place of listing them.
        given: ``raw`` as that file may write it, where that is not the same.

    Raises:
        InputError: no known layout, no pair in it, one key on different files, or something that
            cannot be read.
        UnreachableError: the address does not answer.
    """
    if lists.is_list(raw):
        report = lists.read_list(raw)
        report.layout = WORDS["list"]
        return report
    if not is_address(raw) and names is None:
        _check_folder(Path(raw))
    tree = open_tree(raw, names, given)
    layout, sections = _recognised(tree)
    if layout == "aisegment":
        report = _aisegment(tree)
    elif layout == "supervisely-lists":
        report = lists.read_lists(tree, _split_lists(tree))
        layout = "list"
    else:
        report = _sections(tree, layout, sections)
    report.layout = WORDS[layout]
    check_keys_are_storable(report.pairs)
    return report


def is_source(raw: str | Path) -> bool:
    """Return whether a path or address looks like something that :func:`find_pairs` takes."""
    if lists.is_list(raw) or is_address(raw):
        return True
    return Path(raw).is_dir() and _layout(open_tree(raw)) is not None


def _check_folder(raw: Path) -> None:
    with readable(raw):
        there, folder = raw.exists(), raw.is_dir()
    if not there:
        raise InputError(
            f"{raw}: there is no such folder; give the folder that holds {IMAGES} and {MATTES}, "
            f"or images and masks, as --raw"
        )
    if not folder:
        raise InputError(
            f"{raw}: is a file; give the folder that holds {IMAGES} and {MATTES}, or a list that "
            "ends in .csv, .tsv or .jsonl, as --raw"
        )


def _recognised(tree: Tree) -> tuple[str, list[Section]]:
    found = _layout(tree)
    if found is not None:
        return found
    top = tree.folders("")
    missing = MATTES if IMAGES in top else IMAGES
    inside = [name for name in top if {IMAGES, MATTES} <= set(tree.folders(name))]
    hint = f"Did you mean '{path_in(tree.shown, inside[0])}'?" if inside else f"Known are: {KNOWN}"
    raise InputError(
        f"{tree.shown}: no AISegment tree, it has no folder '{missing}', and no other known "
        f"layout. {hint}"
    )


def _layout(tree: Tree) -> tuple[str, list[Section]] | None:
    """Return the name of the first layout that fits, and its sections."""
    top = tree.folders("")
    if {IMAGES, MATTES} <= set(top):
        return "aisegment", []
    if _split_lists(tree):
        return "supervisely-lists", []
    for layout, sections in (
        ("p3m", list(_p3m(tree, top))),
        ("images-masks", list(_images_and_masks(tree, top))),
        ("supervisely", list(_supervisely(tree, top))),
        ("arranged", list(_arranged(tree, top))),
    ):
        if sections:
            return layout, sections
    return None


def _splits(folders: Iterable[str]) -> list[tuple[str, str]]:
    """Return (folder, split) of the folders that are named as splits."""
    return [(name, lists.SPLIT_NAMES[name.lower()]) for name in folders if _is_split(name)]


def _is_split(name: str) -> bool:
    return name.lower() in lists.SPLIT_NAMES


def _split_lists(tree: Tree) -> list[str]:
    """CSV files named as splits, one of them of training: SuperGradients' Supervisely persons."""
    found = [name for name in tree.files("", (".csv",)) if _is_split(name.rpartition(".")[0])]
    return found if any(name.lower().startswith("train") for name in found) else []


def _one_of(known: tuple[str, ...], folders: Iterable[str]) -> str | None:
    there = {name.lower(): name for name in reversed(list(folders))}
    return next((there[name] for name in known if name in there), None)


def _p3m(tree: Tree, top: list[str]) -> Iterator[Section]:
    """P3M-10k; of its two validation sets NP, whose faces are not blurred, is the test split."""
    for folder, split in _splits(top):
        inside = tree.folders(folder)
        for name, part in [("", folder), *((name, path_in(folder, name)) for name in inside)]:
            if name and not name.upper().startswith("P3M"):
                continue
            there = inside if not name else tree.folders(part)
            images, mattes = _one_of(P3M_IMAGES, there), _one_of(("mask",), there)
            if images and mattes:
                chosen = "test" if name.upper().endswith("-NP") else split
                yield Section(
                    path_in(part, images), path_in(part, mattes), name or folder, chosen, deep=False
                )


def _images_and_masks(tree: Tree, top: list[str]) -> Iterator[Section]:
    for folder, split in [("", ""), *_splits(top)]:
        inside = tree.folders(folder) if folder else top
        images, mattes = _one_of(IMAGE_FOLDERS, inside), _one_of(MASK_FOLDERS, inside)
        if not images or not mattes:
            continue
        below = _splits(tree.folders(path_in(folder, images))) if not split else []
        images, mattes = path_in(folder, images), path_in(folder, mattes)
        if not below:
            yield Section(images, mattes, split=split)
        for name, part in below:
            yield Section(path_in(images, name), path_in(mattes, name), split=part)


def _supervisely(tree: Tree, top: list[str]) -> Iterator[Section]:
    """Find the data sets of a project, or one data set; their names may be those of splits."""
    for folder in ["", *top]:
        inside = tree.folders(folder) if folder else top
        mattes = _one_of(SUPERVISELY_MASKS, inside)
        if "img" in inside and mattes:
            split = lists.SPLIT_NAMES.get(folder.lower(), "")
            prefix = f"{folder}-" if folder else ""
            yield Section(
                path_in(folder, "img"), path_in(folder, mattes), folder, split, prefix, deep=False
            )


def _arranged(tree: Tree, top: list[str]) -> Iterator[Section]:
    for folder, split in _splits(top):
        if tree.files(folder, JPEG_SUFFIXES) and tree.files(folder, PNG_SUFFIXES):
            yield Section(folder, folder, "", split, deep=False)


def _sections(tree: Tree, layout: str, sections: list[Section]) -> PairReport:
    """Pair the files of all sections: first their images, then their masks."""
    beside = layout == "arranged"
    pairing = Pairing(ALPHA if beside else ANY)
    unused: list[Location] = []
    for section in sections:
        suffixes: tuple[str, ...] = (*IMAGE_SUFFIXES, *UNUSED_SUFFIXES)
        suffixes = JPEG_SUFFIXES if beside else suffixes
        for path, prefix, names in _walk(tree, section.images, section, suffixes):
            place, group = f"{tree.root}/{path}", section.group or path.rpartition("/")[2]
            unused += _taken_out(names, place, IMAGE_SUFFIXES)
            for folder, stems in by_suffix(place, names, prefix, group, section.split):
                pairing.add_images(folder, stems)
    for section in sections:
        suffixes = PNG_SUFFIXES if beside else MASK_SUFFIXES
        if section.mattes.endswith("ann"):
            suffixes = (".json",)
        for path, prefix, names in _walk(tree, section.mattes, section, suffixes):
            for folder, stems in by_suffix(f"{tree.root}/{path}", names, prefix):
                if folder.suffix.lower() == ".json":
                    _add_annotations(pairing, folder.path, prefix, stems)
                else:
                    pairing.add_mattes(folder, stems)
    return _report(pairing, tree, unused)


def _taken_out(names: list[str], place: str, suffixes: tuple[str, ...]) -> list[Location]:
    """Take files of other types out of a list of names, in place, and return where they are."""
    others = [name for name in names if not name.lower().endswith(suffixes)]
    if others:
        names[:] = [name for name in names if name.lower().endswith(suffixes)]
    return [to_location(f"{place}/{name}") for name in others]


def _add_annotations(pairing: Pairing, path: str, prefix: str, stems: list[str]) -> None:
    """Add annotations, which are named after the image's whole file: ``a.jpg.json``."""
    for folder, inner in by_suffix(path, stems, prefix):
        suffix = f"{folder.suffix}.json"
        pairing.add_mattes(type(folder)(path, prefix, suffix), inner)


def _walk(
    tree: Tree, top: str, section: Section, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each folder below ``top`` with the prefix of its keys and its files."""
    waiting = [(top, section.prefix)]
    while waiting:
        path, prefix = waiting.pop()
        last = section.images != section.mattes
        yield path, prefix, tree.files(path, suffixes, last=last)
        if section.deep:
            below = reversed(tree.folders(path))
            waiting += [(path_in(path, name), f"{prefix}{name}-") for name in below]


def _report(pairing: Pairing, tree: Tree, unused: list[Location]) -> PairReport:
    images, mattes = pairing.images, pairing.mattes
    table = pairing.table()
    if not len(table):
        raise InputError(
            f"{tree.shown}: {images} images and {mattes} masks, but no two of the same name"
        )
    return PairReport(
        table, pairing.images_alone(), pairing.mattes_alone(), pairing.identical, unused
    )


def _aisegment(tree: Tree) -> PairReport:
    pairing = Pairing(ALPHA)
    others: list[Location] = []
    for path, group, names in _clips(tree, IMAGES, "clip_", (*JPEG_SUFFIXES, *OTHER_SUFFIXES)):
        place = f"{tree.root}/{path}"
        others += _taken_out(names, place, JPEG_SUFFIXES)
        for folder, stems in by_suffix(place, names, group=group):
            pairing.add_images(folder, stems)
    for path, group, names in _clips(tree, MATTES, "matting_", PNG_SUFFIXES):
        for folder, stems in by_suffix(f"{tree.root}/{path}", names, group=group):
            pairing.add_mattes(folder, stems)
    images, mattes = pairing.images, pairing.mattes
    table = pairing.table()
    if not len(table):
        raise InputError(_no_pairs(tree, images, mattes, others))
    return PairReport(
        table, pairing.images_alone(), pairing.mattes_alone(), pairing.identical, others
    )


def _clips(
    tree: Tree, top: str, start: str, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield path, group and files of each folder ``top/<group>/<start>*``."""
    for group in tree.folders(top):
        for name in tree.folders(path_in(top, group)):
            if name.startswith(start):
                path = f"{top}/{group}/{name}"
                yield path, group, tree.files(path, suffixes, last=True)


def _no_pairs(tree: Tree, images: int, mattes: int, others: list[Location]) -> str:
    if others and not images:
        return (
            f"{others[0]}: is no JPEG by its name, and neither is any other image in "
            f"{tree.shown}; expected {EXPECTED}: convert the images to JPEG"
        )
    return (
        f"{tree.shown}: {images} images and {mattes} mattes, but no two of the same name; "
        f"expected {EXPECTED}"
    )
