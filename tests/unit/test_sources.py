"""Sources of every layout: recognised by name, paired, split and packed to the pixel."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from portrait_dist.data.map_dataset import AISegmentDataset
from portrait_dist.data.shards.decode import decode_stored
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.data.source import layouts, lists, locations, split, trees
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.masks import NotAMaskError, decode_mask
from portrait_dist.errors import PortraitDistError
from tests.cli import assert_one_line, call

KEYS = [f"p{number:02d}" for number in range(12)]
SIZE = (24, 32)  # (H, W)
Pixels = NDArray[np.uint8]


def picture(key: str) -> Pixels:
    """Smooth colours, so that JPEG keeps them."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    number = int(key[-2:])
    return np.stack([y * 5 + number, x * 5, np.full(SIZE, 8 * number)], -1).astype(np.uint8)


def person(key: str) -> Pixels:
    """A rectangle of its own for each key: 0 and 255."""
    mask = np.zeros(SIZE, np.uint8)
    number = int(key[-2:])
    mask[4:20, 2 + number : 14 + number] = 255
    return mask


def save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)  # of JPEG and WebP; PNG has none


def split_name(key: str) -> str:
    return {"p10": "val", "p11": "test"}.get(key, "train")


def images_and_masks(top: Path) -> Path:
    """JPEG, PNG and WebP images; masks grey, RGBA, a palette of two colours and black and white."""
    for number, key in enumerate(KEYS):
        save(top / "images" / f"{key}.{('jpg', 'png', 'webp')[number % 3]}", picture(key))
        mask = Image.fromarray(person(key))
        if number % 4 == 1:
            colours = Image.fromarray(picture(key)).convert("RGB")
            colours.putalpha(mask)
            mask = colours
        elif number % 4 == 2:
            palette = Image.fromarray((person(key) // 255).astype(np.uint8), "P")
            palette.putpalette([0, 0, 0, 128, 0, 0])
            mask = palette
        elif number % 4 == 3:
            mask = mask.convert("RGB")
        path = top / "masks" / f"{key}.png"
        path.parent.mkdir(exist_ok=True)
        mask.save(path)
    return top


def split_folders(top: Path) -> Path:
    for key in KEYS:
        save(top / "images" / split_name(key) / f"{key}.jpg", picture(key))
        save(top / "masks" / split_name(key) / f"{key}.png", (person(key) // 255).astype(np.uint8))
    return top


def arranged(top: Path) -> Path:
    """The tutorial's tree."""
    for key in KEYS:
        save(top / split_name(key) / f"{key}.jpg", picture(key))
        rgba = np.dstack([picture(key), person(key)])
        save(top / split_name(key) / f"{key}.png", rgba)
    return top


def p3m(top: Path) -> Path:
    """P3M-10k: blurred faces in training, two sets of validation."""
    for key in KEYS:
        folders = {
            "train": ("train/blurred_image", "train/mask"),
            "val": ("validation/P3M-500-P/blurred_image", "validation/P3M-500-P/mask"),
            "test": ("validation/P3M-500-NP/original_image", "validation/P3M-500-NP/mask"),
        }[split_name(key)]
        save(top / folders[0] / f"{key}.jpg", picture(key))
        save(top / folders[1] / f"{key}.png", person(key))
        save(top / Path(folders[1]).with_name("trimap") / f"{key}.png", person(key))
    return top


def supervisely(top: Path) -> Path:
    """Two data sets whose annotations hold a bitmap, a polygon or both."""
    (top / "ds1").mkdir(parents=True)
    (top / "meta.json").write_text("{}")
    for number, key in enumerate(KEYS):
        folder = top / ("ds1" if number < 6 else "ds2")
        save(folder / "img" / f"{key}.jpg", picture(key))
        (folder / "ann").mkdir(exist_ok=True)
        annotation = {"size": {"height": SIZE[0], "width": SIZE[1]}, "objects": shapes(number)}
        (folder / "ann" / f"{key}.jpg.json").write_text(json.dumps(annotation))
    return top


def shapes(number: int) -> list[dict[str, object]]:
    left, right = 2 + number, 13 + number
    if number % 2:
        corners = [[left, 4], [right, 4], [right, 19], [left, 19]]
        neutral = {"geometryType": "rectangle", "classTitle": "neutral"}
        return [
            {"geometryType": "polygon", "points": {"exterior": corners, "interior": []}},
            {**neutral, "points": {"exterior": [[0, 0], [31, 23]], "interior": []}},
        ]
    buffer = io.BytesIO()
    Image.fromarray(np.ones((16, 12), np.uint8) * 255).convert("1").save(buffer, "PNG")
    data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
    return [{"geometryType": "bitmap", "bitmap": {"data": data, "origin": [left, 4]}}]


def persons_lists(top: Path) -> Path:
    """SuperGradients' Supervisely persons: train.csv and val.csv of image and mask."""
    split_folders(top)
    for name in ("train", "val", "test"):
        rows = [
            f"images/{name}/{k}.jpg,masks/{name}/{k}.png" for k in KEYS if split_name(k) == name
        ]
        (top / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return top


def csv_list(top: Path) -> Path:
    split_folders(top)
    rows = [
        f"images/{split_name(k)}/{k}.jpg,masks/{split_name(k)}/{k}.png,{split_name(k)}"
        for k in KEYS
    ]
    (top / "list.csv").write_text("\n".join(["image,mask,split", *rows]) + "\n")
    return top / "list.csv"


def jsonl_list(top: Path) -> Path:
    split_folders(top)
    rows = [
        {
            "image": str(top / "images" / split_name(k) / f"{k}.jpg"),
            "mask": f"masks/{split_name(k)}/{k}.png",
            "split": {"val": "validation"}.get(split_name(k), split_name(k)),
        }
        for k in KEYS
    ]
    (top / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return top / "list.jsonl"


SOURCES: dict[str, tuple[Callable[[Path], Path], str, bool]] = {
    "images-masks": (images_and_masks, "images and masks with the same names", False),
    "split-folders": (split_folders, "images and masks with the same names", True),
    "arranged": (arranged, "an arranged tree", True),
    "p3m": (p3m, "a P3M tree", True),
    "supervisely": (supervisely, "a Supervisely project", False),
    "persons-lists": (persons_lists, "a list", True),
    "csv": (csv_list, "a list", True),
    "jsonl": (jsonl_list, "a list", True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_layout_is_recognised_split_as_it_says_and_packed_to_the_pixel(
    name: str, tmp_path: Path
) -> None:
    make, words, has_splits = SOURCES[name]
    raw = make(tmp_path / "raw")
    result = call("prepare", "--raw", raw, "--out", tmp_path / "data", "--json").json
    assert words in result["layout"]
    assert result["pairs"] == len(KEYS)
    assert (result["images_without_matte"], result["mattes_without_image"]) == (0, 0)
    made = split.read_split(tmp_path / "data")
    if has_splits:
        assert made.splits == {
            part: [key for key in KEYS if split_name(key) == part] for part in SPLITS
        }
    packed = call("pack", "--data", tmp_path / "data", "--out", tmp_path / "a", "--size", "24x32")
    assert packed.exit_code == 0, packed
    straight = call("pack", "--data", raw, "--out", tmp_path / "b", "--size", "24x32")
    assert straight.exit_code == 0, straight
    seen = []
    for part in SPLITS:
        shards, again = ShardSet(tmp_path / "a", part), ShardSet(tmp_path / "b", part)
        assert [shard.sha256 for shard in shards.shards] == [one.sha256 for one in again.shards]
        for number in range(shards.samples):
            encoded = shards.read(number)
            image, alpha = decode_stored(encoded.image, encoded.alpha, "jpeg")
            key = encoded.key[-3:]
            seen.append(key)
            np.testing.assert_array_equal(alpha, person(key))
            assert np.abs(image.astype(int) - picture(key)).mean() < 4
    assert sorted(seen) == KEYS
    _, mask = AISegmentDataset(tmp_path / "data", "train").read(0)
    np.testing.assert_array_equal(np.asarray(mask), person(made.keys("train")[0][-3:]))


@pytest.mark.parametrize("name", ["images-masks", "supervisely", "csv"])
def test_pictures_may_stay_where_they_are_or_come_along(name: str, tmp_path: Path) -> None:
    raw = SOURCES[name][0](tmp_path / "raw")
    sums = {}
    for mode in ("reference", "link", "copy"):
        data = tmp_path / mode
        assert call("prepare", "--raw", raw, "--out", data, "--mode", mode).exit_code == 0
        assert call("prepare", "--raw", raw, "--out", data, "--mode", mode).exit_code == 0
        if mode == "copy":
            shutil.rmtree(tmp_path / "raw")
        packed = call("pack", "--data", data, "--out", tmp_path / f"{mode}-s", "--size", "24x32")
        assert packed.exit_code == 0, packed
        sums[mode] = [shard.sha256 for shard in ShardSet(tmp_path / f"{mode}-s", "train").shards]
        files = sorted(path.name for path in data.rglob("*") if path.is_file())
        assert len(files) == (2 if mode == "reference" else 2 + 2 * len(KEYS))
    assert sums["reference"] == sums["link"] == sums["copy"]


def test_a_split_file_of_ones_own_decides_and_leaves_out_what_it_does_not_name(
    tmp_path: Path,
) -> None:
    raw = images_and_masks(tmp_path / "raw")
    mine = {"train": KEYS[:6], "val": KEYS[6:8], "test": KEYS[8:10]}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    rows = [f"{key}.jpg;{name}" for name, keys in mine.items() for key in keys]
    (tmp_path / "mine.csv").write_text("\n".join(["name;split", *rows]))
    for file in ("mine.json", "mine.csv"):
        out = tmp_path / file.replace(".", "-")
        options = ("--out", out, "--split-file", tmp_path / file, "--json")
        result = call("prepare", "--raw", raw, *options).json
        assert result["not_in_split_file"] == 2
        assert split.read_split(out).splits == mine
    (tmp_path / "mine.json").write_text(json.dumps({"train": ["p00", "nobody"]}))
    refused = call(
        *("prepare", "--raw", raw, "--out", tmp_path / "x"),
        *("--split-file", tmp_path / "mine.json"),
    )
    assert_one_line(refused, 2, "'nobody'", "remove it")
    assert not (tmp_path / "x").exists()


def test_a_split_file_that_names_no_pair_is_refused(tmp_path: Path) -> None:
    raw = images_and_masks(tmp_path / "raw")
    for number, text in enumerate(['{"splits": {}}', '{"train": [], "val": []}']):
        (tmp_path / f"{number}.json").write_text(text)
        refused = call(
            *("prepare", "--raw", raw, "--out", tmp_path / "x"),
            *("--split-file", tmp_path / f"{number}.json"),
        )
        assert_one_line(refused, 2, "names no pair")
        assert not (tmp_path / "x").exists()


def test_a_split_file_of_json_lines_takes_keys_as_well_as_images(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(
        '{"key": "a", "split": "train"}\n\n{"image": "b/c.jpg", "split": "val"}\n'
    )
    assert lists.read_split_file(tmp_path / "s.jsonl") == {"a": "train", "c": "val"}
    (tmp_path / "s.jsonl").write_text('{"split": "train"}\n')
    with pytest.raises(PortraitDistError, match="line 1: give a key and a split"):
        lists.read_split_file(tmp_path / "s.jsonl")


@pytest.mark.parametrize("mode", ["link", "reference"])
def test_spaces_and_line_ends_in_names_are_part_of_them(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = images_and_masks(tmp_path / "raw\nof two\r\nlines ")
    for path in raw.glob("*/p0[0-4].*"):
        path.rename(path.with_name(f" {path.name}"))
    data, shards = tmp_path / "data", tmp_path / "shards"
    for _ in range(2):  # the second time it is compared with what is there
        made = call("prepare", "--raw", raw, "--out", data, "--mode", mode)
        assert made.exit_code == 0, made.stderr
    packed = call("pack", "--data", data, "--out", shards, "--size", "16")
    assert packed.exit_code == 0, packed.stderr
    found = [key for name in SPLITS for key in split.read_split(data).splits[name]]
    assert sorted(found) == sorted([*(f" {key}" for key in KEYS[:5]), *KEYS[5:]])


def test_splits_of_the_source_are_overruled_by_split_by_sample(tmp_path: Path) -> None:
    raw = split_folders(tmp_path / "raw")
    options = ("--split-by", "sample", "--val-fraction", "0.25", "--test-fraction", "0.25")
    result = call("prepare", "--raw", raw, "--out", tmp_path / "data", *options, "--json").json
    assert (result["train"], result["val"], result["test"]) == (6, 3, 3)


def levels(values: list[int], mode: str = "L", palette: list[int] | None = None) -> bytes:
    found = Image.fromarray(np.array([values], np.uint8), mode)
    if palette:
        found.putpalette(palette)
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (levels([0, 1, 1]), [0, 255, 255]),
        (levels([0, 7, 0]), [0, 255, 0]),
        (levels([0, 100, 255]), [0, 100, 255]),
        (levels([0, 0, 0]), [0, 0, 0]),
        (levels([1, 1, 1]), [255, 255, 255]),
        (levels([1, 0, 0], "P", [255, 255, 255, 0, 0, 0]), [0, 255, 255]),
        (levels([0, 3, 3], "P", [0, 0, 0, 9, 9, 9, 9, 9, 9, 0, 128, 0]), [0, 255, 255]),
    ],
)
def test_masks_of_few_levels_show_the_person(mask: bytes, expected: list[int]) -> None:
    assert decode_mask(mask).tolist() == [expected]


@pytest.mark.parametrize(
    "mask",
    [
        levels([0, 1, 2]),
        levels([0, 1, 2], "P", [0, 0, 0, 128, 0, 0, 0, 128, 0]),
    ],
)
def test_class_numbers_are_no_mask(mask: bytes) -> None:
    with pytest.raises(NotAMaskError, match="255"):
        decode_mask(mask)


def test_a_mask_that_is_none_is_named_by_pack_with_what_to_do(tmp_path: Path) -> None:
    raw = split_folders(tmp_path / "raw")
    bad = raw / "masks" / "train" / "p03.png"
    save(bad, picture("p03"))
    result = call("pack", "--data", raw, "--out", tmp_path / "shards")
    assert_one_line(result, 2, str(bad), "a colour picture")
    assert not (tmp_path / "shards").exists()


def test_files_of_one_name_in_two_folders_are_refused_by_both_names(tmp_path: Path) -> None:
    raw = split_folders(tmp_path / "raw")
    save(raw / "images" / "val" / "p00.jpg", picture("p11"))
    result = call("prepare", "--raw", raw, "--out", tmp_path / "data")
    assert_one_line(result, 2, "val/p00.jpg", "train/p00.jpg", "rename")


def test_stems_that_are_equal_in_a_list_become_whole_paths(tmp_path: Path) -> None:
    for part in ("a", "b"):
        save(tmp_path / part / "one.jpg", picture("p01"))
    (tmp_path / "list.csv").write_text("a/one.jpg,a/one.png\nb/one.jpg,a/one.png\n")
    assert layouts.find_pairs(tmp_path / "list.csv").pairs.keys == ["a-one", "b-one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,mask,split\na.jpg,a.png,holdout\n", "line 2: 'holdout' is no split"),
        ("image,mask\n,a.png\n", "line 2: names no image"),
        ("image,mask,key\na.jpg,a.png,x\nb.jpg,b.png,x\n", "line 3: the key 'x' is there twice"),
        ("image,mask\na.jpg,\n", "holds no pair"),
        ("image,mask\na\0.jpg,a.png\n", "line 2: holds a NUL character"),
        (f"image,mask\n{'a' * 5000}.jpg,a.png\n", "line 2: holds a path of 5,004 characters"),
        ('image,mask\n"a.jpg,a.png\nb.jpg,b.png\n', "line 3: a quotation mark is not closed"),
    ],
)
def test_a_list_that_cannot_be_used_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    result = call("prepare", "--raw", path, "--out", tmp_path / "data")
    assert_one_line(result, 2, message)
    assert not (tmp_path / "data").exists()


def test_a_long_path_of_a_list_does_not_fill_the_line(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"{'n' * 2000}.jpg,a.png\n")
    result = call("prepare", "--raw", tmp_path / "list.csv", "--out", tmp_path / "data")
    assert_one_line(result, 3, "characters): cannot be read")
    assert len(result.stderr) < 400 + 2 * len(str(tmp_path))


def test_a_list_names_the_files_of_a_tree_in_place_of_a_walk(tmp_path: Path) -> None:
    raw = supervisely(tmp_path / "raw")
    names = sorted(str(path.relative_to(raw)) for path in raw.rglob("*") if path.is_file())
    kept = [name for name in names if "p05" not in name]
    (tmp_path / "names.txt").write_text("\n".join(["./" + kept[0], *kept[1:]]) + "\n")
    found = layouts.find_pairs(raw, tmp_path / "names.txt").pairs
    walked = layouts.find_pairs(raw).pairs
    assert list(found) == [pair for pair in walked if "p05" not in pair.key]


def test_a_folder_in_the_root_may_have_the_roots_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = images_and_masks(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    names = sorted(str(path.relative_to(raw)) for path in raw.rglob("*") if path.is_file())
    Path("names.txt").write_text("\n".join(names))
    options = ("--list", "names.txt", "--mode", "reference", "--out", "data", "--json")
    assert call("prepare", "--raw", "images", *options).json["pairs"] == len(KEYS)


@pytest.mark.parametrize("mode", ["link", "reference"])
def test_a_list_may_name_files_as_find_prints_them(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = images_and_masks(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in raw.rglob("*") if path.is_file())
    Path("names.txt").write_text("\n".join(names))
    options = ("--list", "names.txt", "--mode", mode, "--out", mode, "--json")
    assert call("prepare", "--raw", "raw", *options).json["pairs"] == len(KEYS)


def test_a_source_at_an_address_is_packed_where_it_is(tmp_path: Path) -> None:
    import fsspec

    raw = images_and_masks(tmp_path / "raw")
    memory = fsspec.filesystem("memory")
    memory.put(str(raw), "/portraits", recursive=True)
    try:
        data = tmp_path / "data"
        made = call("prepare", "--raw", "memory://portraits", "--out", data, "--json")
        assert made.json["pairs"] == len(KEYS), made
        assert sorted(path.name for path in data.iterdir()) == ["pairs.csv", "split.json"]
        for source, out in ((data, "a"), ("memory://portraits", "b"), (raw, "c")):
            packed = call("pack", "--data", source, "--out", tmp_path / out, "--size", "24x32")
            assert packed.exit_code == 0, packed
        tars = [[s.sha256 for s in ShardSet(tmp_path / out, "train").shards] for out in "abc"]
        assert tars[0] == tars[1] == tars[2]
        copied = call("prepare", "--raw", "memory://portraits", "--out", data, "--mode", "copy")
        assert_one_line(copied, 2, "use --mode reference")
    finally:
        memory.rm("/portraits", recursive=True)


class Listing(http.server.SimpleHTTPRequestHandler):
    """Gives files, and a page of links for a folder, as any web server does."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_pictures_on_a_web_server_are_prepared_and_packed_where_they_are_each_fetched_once(
    tmp_path: Path,
) -> None:
    pytest.importorskip("aiohttp", reason="the extra http is not installed")
    raw = images_and_masks(tmp_path / "raw")
    handler = functools.partial(Listing, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/raw"
        data = tmp_path / "data"
        made = call("prepare", "--raw", address, "--out", data, "--json")
        assert made.json["pairs"] == len(KEYS), made
        assert not [path for path in Listing.asked if path.endswith((".jpg", ".png"))]
        Listing.asked.clear()
        packed = call("pack", "--data", data, "--out", tmp_path / "a", "--size", "24x32")
        assert packed.exit_code == 0, packed
        pictures = [path for path in Listing.asked if not path.endswith("/")]
        assert len(pictures) == len(set(pictures)) == 2 * len(KEYS)
        parts = ("--data", data, "--out", tmp_path / "b", "--size", "24x32", "--part")
        for part in ("1/2", "0/2"):
            assert call("pack", *parts, part).exit_code == 0
        server.shutdown()
    call("pack", "--data", raw, "--out", tmp_path / "c", "--size", "24x32")
    tars = [[s.sha256 for s in ShardSet(tmp_path / out, "train").shards] for out in "abc"]
    assert tars[0] == tars[1] == tars[2]


def test_an_address_with_a_password_is_not_written_down(tmp_path: Path) -> None:
    result = call("prepare", "--raw", "https://me:secret@host/x", "--out", tmp_path / "data")
    assert_one_line(result, 2, "the address holds a password")
    assert "secret" not in result.stderr
    assert not (tmp_path / "data").exists()


def test_a_damaged_list_of_a_prepared_folder_is_named(tmp_path: Path) -> None:
    raw = images_and_masks(tmp_path / "raw")
    data = tmp_path / "data"
    call("prepare", "--raw", raw, "--out", data, "--mode", "reference")
    text = (data / lists_name()).read_text().splitlines(keepends=True)
    for broken in ("".join(text[:-1]), "".join([text[0], *reversed(text[1:])]), text[0] + "a\n"):
        (data / lists_name()).write_text(broken)
        assert_one_line(call("pack", "--data", data, "--out", tmp_path / "s"), 3, "prepare")


def lists_name() -> str:
    assert lists.is_list(split.PAIRS)
    return split.PAIRS


@pytest.mark.parametrize("kind", [ValueError, ConnectionError])
def test_what_a_server_answers_is_shown_without_the_secrets_of_its_address(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of aiohttp hold the whole address that a server led to, with its signature."""
    monkeypatch.setattr(locations, "FIRST_PAUSE", 0.0)
    address, signed = "https://host/a", "https://me:secret@host/a?signature=secret"

    def refused(*_: object, **__: object) -> None:
        raise kind(f"403, message='Forbidden',\nurl='{signed}' {'x' * 120} {signed}")

    class System:
        ls = refused

    with pytest.raises(PortraitDistError) as reading:
        locations._attempt(address, refused)
    monkeypatch.setattr(trees, "file_system", lambda _: (System(), "a"))
    with pytest.raises(PortraitDistError) as listing:
        trees.RemoteTree(address).files("", (".jpg",))
    for error in (reading, listing):
        assert "403, message='Forbidden', url='https://host/a" in str(error.value)
        assert "secret" not in str(error.value)
