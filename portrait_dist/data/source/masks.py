"""Read a mask of any kind: grey, black and white in colours, a palette, an alpha channel, shapes.

What counts as the person:

- an alpha channel, unless it is the same everywhere: then the colours, if they are grey;
- grey levels as they are (255 is the person); of two levels 0 and n, n is the person;
- of two colours, or two colours of a palette, the brighter one;
- in a Supervisely annotation the union of all its shapes and bitmaps, but for the classes
  ``neutral`` and ``background``.

Class numbers, and colour pictures, are refused: which of them is the person nobody says.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from portrait_dist.data.source.pictures import (
    DAMAGED,
    MAX_PIXELS,
    orientation_of,
    reason,
    upright,
)

Pixels = NDArray[np.uint8]

GREY_SPREAD = 12
"""Levels by which the channels of a grey picture may differ: JPEG's rounding."""
CLASS_NUMBERS = 64
"""Masks of several levels that are all below this are taken for class numbers."""
NO_PERSON = ("neutral", "background", "bg")
"""Classes of Supervisely annotations that are not drawn."""


class NotAMaskError(ValueError):
    """A whole picture that is no mask; the message says why."""


def decode_mask(data: bytes, suffix: str = "") -> Pixels:
    """Decode a mask to uint8 [H, W], 255 where the person is.

    Args:
        data: content of the file.
        suffix: of its name; ``.json`` is a Supervisely annotation.

    Raises:
        NotAMaskError: it is whole, but no mask.
        ValueError: it is damaged.
    """
    if suffix == ".json":
        return _annotation(data)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise NotAMaskError(f"it has {picture.width}x{picture.height} pixels")
            picture.load()
            return upright(_person(picture), orientation_of(picture))
    except NotAMaskError:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(reason(error)) from error


def _person(picture: Image.Image) -> Pixels:
    """Tell the person in a picture of any mode: uint8 [H, W]."""
    if picture.mode == "P":
        return _of_palette(picture)
    if picture.mode in ("RGBA", "LA", "PA"):
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() != alpha.max():
            return alpha
        colours = np.asarray(picture.convert("RGB"))
        return alpha if _spread(colours) > GREY_SPREAD else _levels(colours[..., 1])
    if picture.mode == "1":
        return np.asarray(picture.convert("L"))
    if picture.mode in ("L", "I;16", "I;16B", "I;16L", "I"):
        return _levels(np.asarray(picture))
    if picture.mode == "RGB":
        return _of_colours(np.asarray(picture))
    raise NotAMaskError(f"a picture of mode {picture.mode} is no mask; store it in grey")


def _levels(levels: NDArray[Any]) -> Pixels:
    """Person of whole grey levels [H, W] of 8 or 16 bits."""
    low, high = int(levels.min()), int(levels.max())
    if low == 0 < high and ((levels == 0) | (levels == high)).all():
        return np.where(levels, np.uint8(255), np.uint8(0))
    if low == high and 0 < high < CLASS_NUMBERS:
        return np.full(levels.shape, 255, np.uint8)
    if high > 255:
        return (levels >> 8).astype(np.uint8)
    if 0 < high < CLASS_NUMBERS:
        raise NotAMaskError(
            f"its levels go from {low} to {high}, as class numbers do; store the person as 255"
        )
    return levels.astype(np.uint8)


def _of_palette(picture: Image.Image) -> Pixels:
    """Person of a palette: of two colours the brighter one; a ramp of greys is taken as levels."""
    numbers = np.asarray(picture)
    colours = np.asarray(picture.convert("RGB"))
    used = np.unique(numbers)
    if len(used) == 1:
        return np.full(numbers.shape, 255 if colours.max() > 16 else 0, np.uint8)
    if len(used) == 2:
        first = colours[numbers == used[0]][0]
        second = colours[numbers == used[1]][0]
        person = used[1] if _luma(second) >= _luma(first) else used[0]
        return np.where(numbers == person, np.uint8(255), np.uint8(0))
    if _spread(colours) <= GREY_SPREAD:
        return _levels(colours[..., 1])
    raise NotAMaskError(
        f"its palette has {len(used)} colours in use, a mask has two; store the person as 255 in "
        "a grey picture"
    )


def _of_colours(colours: Pixels) -> Pixels:
    """Person of an RGB picture [H, W, 3] that is grey or has two colours."""
    if _spread(colours) <= GREY_SPREAD:
        return _levels(colours[..., 1])
    packed = colours.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    used = np.unique(packed)
    if len(used) != 2:
        raise NotAMaskError("it is a colour picture; give a mask in grey, or in two colours")
    first, second = (colours[packed == value][0] for value in used)
    person = used[1] if _luma(second) >= _luma(first) else used[0]
    return np.where(packed == person, np.uint8(255), np.uint8(0))


def _spread(colours: Pixels) -> int:
    """Return the largest difference between the channels of a pixel."""
    return int((colours.max(axis=-1).astype(np.int16) - colours.min(axis=-1)).max())


def _luma(colour: Pixels) -> float:
    return float(colour.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))


def annotation_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) that a Supervisely annotation says.

    Raises:
        ValueError: it is none.
    """
    return _parsed(data).size


@dataclass(frozen=True)
class _Annotation:
    """A Supervisely annotation: the image's (width, height), and its objects as they are."""

    size: tuple[int, int]
    objects: list[Any]


def _parsed(data: bytes) -> _Annotation:
    try:
        found = json.loads(data)
        width, height = int(found["size"]["width"]), int(found["size"]["height"])
        objects = found["objects"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is no Supervisely annotation") from error
    if not (0 < width * height <= MAX_PIXELS and width > 0 and isinstance(objects, list)):
        raise ValueError(f"it says {width}x{height} pixels")
    return _Annotation((width, height), objects)


def _annotation(data: bytes) -> Pixels:
    """Draw all objects of a Supervisely annotation: bitmaps, polygons, rectangles."""
    found = _parsed(data)
    mask = Image.new("L", found.size)
    for item in found.objects:
        try:
            if str(item.get("classTitle", "")).lower() not in NO_PERSON:
                _draw(mask, item)
        except (*DAMAGED, AttributeError) as error:
            raise ValueError(f"one of its objects cannot be read ({reason(error)})") from error
    return np.asarray(mask)


def _draw(mask: Image.Image, item: dict[str, Any]) -> None:
    kind = item.get("geometryType") or ("bitmap" if item.get("bitmap") else "polygon")
    if kind == "bitmap":
        png = zlib.decompressobj().decompress(base64.b64decode(item["bitmap"]["data"]), 1 << 28)
        bitmap = _person(Image.open(io.BytesIO(png)))
        x, y = item["bitmap"]["origin"]
        mask.paste(255, (int(x), int(y)), Image.fromarray(bitmap))
    elif kind in ("polygon", "rectangle"):
        draw = ImageDraw.Draw(mask)
        outline = [(float(x), float(y)) for x, y in item["points"]["exterior"]]
        if kind == "rectangle":
            draw.rectangle(outline, fill=255)
            return
        shape = Image.new("L", mask.size)
        drawn = ImageDraw.Draw(shape)
        drawn.polygon(outline, fill=255)
        for hole in item["points"].get("interior", ()):
            drawn.polygon([(float(x), float(y)) for x, y in hole], fill=0)
        mask.paste(255, (0, 0), shape)
    else:
        raise ValueError(f"a {kind} has no area")
