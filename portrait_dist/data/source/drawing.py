"""Draws one synthetic portrait with its alpha: a figure with soft hair before a textured background.

The pictures are learnable but not trivial: scale, pose, hair, clothes and light vary, and the background takes its colours from
the same palettes as skin, hair and cloth, so that colour alone does not tell the figure from what is behind it.
``draw_portrait`` is a pure function of its generator. Pictures are drawn as planes, [3, H, W] float32 in 0..1, which numpy adds
and multiplies several times faster than [H, W, 3].
"""

# ruff: noqa: RUF005  (array + list adds coordinates here, it does not join)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH = 800, 600  # pixels, as the AISegment set

Array = NDArray[Any]  # float32 unless said otherwise
Generator = np.random.Generator

# sRGB in 0..1. Backgrounds draw from the same lists on purpose.
SKIN = [
    (0.94, 0.78, 0.68),
    (0.88, 0.69, 0.56),
    (0.78, 0.57, 0.43),
    (0.62, 0.43, 0.31),
    (0.45, 0.30, 0.22),
    (0.32, 0.21, 0.16),
]
HAIR = [
    (0.09, 0.07, 0.06),
    (0.22, 0.14, 0.09),
    (0.40, 0.25, 0.14),
    (0.62, 0.44, 0.24),
    (0.80, 0.66, 0.42),
    (0.55, 0.55, 0.56),
]
SUBPIXEL = 4  # cv2 takes coordinates in 1/16 pixel


@dataclass
class Figure:
    """Where the parts of a person are, in pixels; x to the right, y down."""

    head: Array  # centre of the head [2]
    width: float  # half width of the head
    height: float  # half height of the head
    tilt: float  # of the head, degrees
    shoulders: float  # half width of the shoulders
    lean: float  # shift of the hips against the head
    skin: Array  # RGB
    hair: Array  # RGB

    def at(self, across: float, down: float) -> Array:
        """The point ``across`` half widths and ``down`` half heights from the head's centre, turned with the head."""
        angle = np.deg2rad(self.tilt)
        x, y = across * self.width, down * self.height
        turned = [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)]
        return np.asarray(self.head + turned, np.float32)


class Canvas:
    """Premultiplied colour [3, H, W] (colour times coverage) and coverage [H, W]."""

    def __init__(self) -> None:
        self.colour = np.zeros((3, HEIGHT, WIDTH), np.float32)
        self.alpha = np.zeros((HEIGHT, WIDTH), np.float32)

    def paint(self, mask: Array, colour: Array, shade: Array | None = None) -> None:
        """Lay a colour, [3] or [3, H, W], over what is there, where ``mask`` [H, W] in 0..1 says so.

        ``shade`` [H, W] is a factor of brightness.
        """
        rows, columns = _bounds(mask)
        cover = mask[rows, columns]
        for plane, value in zip(self.colour[:, rows, columns], colour, strict=True):
            tint = value if value.ndim == 0 else value[rows, columns]
            plane += cover * ((tint if shade is None else tint * shade[rows, columns]) - plane)
        alpha = self.alpha[rows, columns]
        alpha += cover * (1 - alpha)


def _bounds(mask: Array) -> tuple[slice, slice]:
    """Rows and columns that hold all of a mask."""
    rows, columns = np.flatnonzero(mask.max(1) > 0), np.flatnonzero(mask.max(0) > 0)
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _pick(rng: Generator, palette: list[tuple[float, float, float]], spread: float = 0.05) -> Array:
    colour = np.array(palette[rng.integers(len(palette))]) * rng.uniform(0.88, 1.1) + rng.normal(
        0, spread / 2, 3
    )
    return np.clip(colour, 0.02, 0.98).astype(np.float32)


def _any_colour(rng: Generator) -> Array:
    """Cloth, wall or leaf: a third from the skin and hair palettes, else of any hue, mostly muted."""
    if rng.random() < 0.33:
        return _pick(rng, SKIN + HAIR, 0.1)
    hue, saturation, value = rng.uniform(0, 360), rng.beta(1.6, 2.6), rng.uniform(0.12, 0.95)
    hsv = np.array([[[hue, saturation, value]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0])


def _noise(rng: Generator, cells: int, octaves: int = 3, stretch: float = 1.0) -> Array:
    """Smooth noise [H, W] of mean 0 and deviation about 1; ``cells`` is the coarsest grid's width, ``stretch`` makes it longer
    down than across."""
    shrink = (
        4 if cells * 2**octaves <= WIDTH // 2 else 2
    )  # the octaves are added up at no more pixels than they need
    height, width = HEIGHT // shrink, WIDTH // shrink
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        across = cells * 2**octave
        down = max(2, round(across * HEIGHT / WIDTH / stretch))
        grid = rng.standard_normal((down, across + 1), np.float32) * np.float32(1.2 * 0.6**octave)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(total, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def _planes(colour: Array) -> Array:
    """A picture of one colour, [3, H, W]."""
    return np.broadcast_to(np.asarray(colour, np.float32)[:, None, None], (3, HEIGHT, WIDTH)).copy()


def _mix(scene: Array, colour: Array, share: Array) -> None:
    """Move a picture [3, H, W] towards a colour [3] by ``share`` [H, W], in place."""
    for plane, value in zip(scene, colour, strict=True):
        plane += share * (value - plane)


def _fixed(points: Array) -> NDArray[np.int32]:
    return np.round(points * (1 << SUBPIXEL)).astype(np.int32)


def _polygon(points: list[Array] | Array, roundness: float, edge: float = 1.6) -> Array:
    """Filled polygon as a mask [H, W] with corners rounded by ``roundness`` pixels and an edge ``edge`` pixels soft.

    Drawn at half size, blurred, and made steep again: the 0.5 level of a blurred corner is a round one.
    """
    mask = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    cv2.fillPoly(mask, [_fixed(np.asarray(points, np.float32) / 2)], 255, cv2.LINE_AA, SUBPIXEL)
    return _rounded(mask, roundness, edge)


def _limb(points: list[Array], thickness: float, edge: float = 1.6) -> Array:
    """A thick bent line as a mask [H, W]."""
    mask = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    line = _fixed(np.asarray(points, np.float32) / 2)
    cv2.polylines(mask, [line], False, 255, max(1, round(thickness / 2)), cv2.LINE_AA, SUBPIXEL)
    return _rounded(mask, thickness * 0.12, edge)


def _rounded(half: NDArray[np.uint8], roundness: float, edge: float) -> Array:
    sigma = max(0.8, roundness / 2, edge / 4)  # a quarter, so that the edge reaches both 0 and 1
    reach = int(4 * sigma + edge) + 2  # half pixels; outside of it the mask is 0
    left, top, width, height = cv2.boundingRect(half)
    rows = slice(max(0, top - reach), min(HEIGHT // 2, top + height + reach))
    columns = slice(max(0, left - reach), min(WIDTH // 2, left + width + reach))
    full = np.zeros((HEIGHT, WIDTH), np.float32)
    if width and height:
        # A blurred mask falls off at the border of the picture unless the border is continued.
        part = half[rows, columns].astype(np.float32) / 255
        smooth = cv2.GaussianBlur(part, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        steep = 2 * sigma * np.sqrt(2 * np.pi) / edge
        large = cv2.resize(smooth, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
        large = np.clip((large - 0.5) * np.float32(steep) + 0.5, 0, 1)
        full[2 * rows.start : 2 * rows.stop, 2 * columns.start : 2 * columns.stop] = large
    return full


def _ellipse(
    figure: Figure,
    across: float,
    down: float,
    half_width: float,
    half_height: float,
    edge: float = 1.6,
) -> Array:
    """An ellipse in the head's own coordinates (see ``Figure.at``) as a mask [H, W]."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = [
        figure.at(across + half_width * np.cos(a), down + half_height * np.sin(a)) for a in angles
    ]
    return _polygon(ring, roundness=1.0, edge=edge)


def draw_background(rng: Generator) -> Array:
    """A wall, street, room, or foliage, sharp or out of focus: [3, H, W] in 0..1."""
    scene = _planes(_any_colour(rng))
    ramp = np.linspace(0, rng.uniform(0.1, 1), HEIGHT, dtype=np.float32)[:, None]
    _mix(scene, _any_colour(rng), ramp)
    painter = (_stripes, _clutter, _foliage, _bokeh, _glow)[
        rng.choice(5, p=[0.15, 0.3, 0.2, 0.2, 0.15])
    ]
    painter(rng, scene)
    scene += _noise(rng, int(rng.integers(4, 40)), 4) * np.float32(rng.uniform(0.01, 0.07))
    focus = rng.choice([0.0, 1.2, 3.0, 7.0], p=[0.35, 0.3, 0.25, 0.1])
    if focus:
        for plane in scene:
            cv2.GaussianBlur(plane, (0, 0), focus, dst=plane)
    return np.clip(scene, 0, 1, out=scene)


def _coordinates() -> tuple[Array, Array]:
    """y [H, 1] and x [1, W], in pixels."""
    return np.arange(HEIGHT, dtype=np.float32)[:, None], np.arange(WIDTH, dtype=np.float32)[None]


def _glow(rng: Generator, scene: Array) -> None:
    y, x = _coordinates()
    spread = np.float32(2 * rng.uniform(150, 500) ** 2)
    across = np.exp(-((x - np.float32(rng.uniform(0, WIDTH))) ** 2) / spread)
    scene *= 0.75 + 0.4 * across * np.exp(-((y - np.float32(rng.uniform(0, HEIGHT))) ** 2) / spread)


def _stripes(rng: Generator, scene: Array) -> None:
    y, x = _coordinates()
    angle, period = (
        np.float32(rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])),
        np.float32(rng.uniform(14, 120)),
    )
    wave = np.sin(
        (x * np.cos(angle) + y * np.sin(angle)) * np.float32(2 * np.pi) / period
        + np.float32(rng.uniform(0, 6))
    )
    if rng.random() < 0.5:
        other = period * np.float32(rng.uniform(0.5, 2))
        wave *= np.sin((y * np.cos(angle) - x * np.sin(angle)) * np.float32(2 * np.pi) / other)
    band = np.clip(wave * np.float32(rng.uniform(1, 20)) + np.float32(0.5), 0, 1)
    _mix(scene, _any_colour(rng), band * np.float32(rng.uniform(0.2, 1)))


def _clutter(rng: Generator, scene: Array) -> None:
    """Frames, books, windows, doors, balls: boxes and discs of any colour, some in rows."""
    for _ in range(rng.integers(6, 40)):
        centre = np.array([rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)])
        half = np.exp(rng.uniform(np.log(8), np.log(130), 2))
        colour = _any_colour(rng)
        if rng.random() < 0.65:
            corners = cv2.boxPoints(
                (centre.tolist(), (2 * half).tolist(), rng.choice([0.0, rng.uniform(-20, 20)]))
            )
            copies = rng.choice([1, 1, 1, 6])
            boxes = [_fixed(corners + [row * 2.2 * half[0], 0]) for row in range(copies)]
            for plane, value in zip(scene, colour, strict=True):
                cv2.fillPoly(plane, boxes, float(value), cv2.LINE_AA, SUBPIXEL)
        else:
            axes, turn = np.round(half).astype(int).tolist(), rng.uniform(0, 180)
            for plane, value in zip(scene, colour, strict=True):
                cv2.ellipse(
                    plane,
                    centre.astype(int).tolist(),
                    axes,
                    turn,
                    0,
                    360,
                    float(value),
                    -1,
                    cv2.LINE_AA,
                )


def _foliage(rng: Generator, scene: Array) -> None:
    leaf, shadow = _any_colour(rng), _any_colour(rng) * 0.5
    for colour in (shadow, leaf, leaf * 1.3):
        _mix(scene, colour, np.clip(_noise(rng, int(rng.integers(8, 30)), 3) * 3 - 0.5, 0, 1))


def _bokeh(rng: Generator, scene: Array) -> None:
    """Discs of light that add up."""
    scene *= 0.7
    for _ in range(rng.integers(15, 70)):
        left, top, radius = (
            int(rng.integers(-50, WIDTH)),
            int(rng.integers(-50, HEIGHT)),
            int(rng.uniform(8, 60)),
        )
        disc: Array = np.zeros((125, 125), np.float32)
        cv2.circle(disc, (62, 62), radius, 0.6, -1, cv2.LINE_AA)
        rows, columns = slice(max(0, top), top + 125), slice(max(0, left), left + 125)
        part = scene[:, rows, columns]
        seen = disc[rows.start - top :, columns.start - left :][: part.shape[1], : part.shape[2]]
        part += seen * (_any_colour(rng) * np.float32(rng.uniform(0.2, 0.8)))[:, None, None]


def draw_figure(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    """Paint one person, from the hair behind the neck to the hand before the face."""
    style = _hair_style(rng)
    cloth = _cloth(rng)
    _paint_hair(rng, canvas, figure, style, front=False)
    _paint_body(rng, canvas, figure, cloth)
    _paint_head(rng, canvas, figure)
    _paint_hair(rng, canvas, figure, style, front=True)
    _paint_accessories(rng, canvas, figure)
    if rng.random() < 0.55:
        _paint_arms(rng, canvas, figure, cloth)


def _figure(rng: Generator, width: float, centre: float) -> Figure:
    height = width * rng.uniform(1.22, 1.45)
    top = rng.uniform(0.02, 0.30) * HEIGHT
    return Figure(
        head=np.array([centre, top + height * 1.15], np.float32),
        width=width,
        height=height,
        tilt=float(np.clip(rng.normal(0, 9), -28, 28)),
        shoulders=width * rng.uniform(1.8, 2.8),
        lean=rng.normal(0, 0.45) * width,
        skin=_pick(rng, SKIN),
        hair=_pick(rng, HAIR) if rng.random() < 0.9 else _any_colour(rng),
    )


def _light(rng: Generator, figure: Figure) -> Array:
    """Brightness factor [H, W] of the figures: brighter from one side, uneven as on a body."""
    x = (np.arange(WIDTH, dtype=np.float32) - figure.head[0]) / np.float32(2.5 * figure.width)
    ramp = 1 + np.float32(rng.uniform(-0.35, 0.35)) * np.tanh(x)
    return (ramp[None] + np.float32(0.05) * _noise(rng, 3, 2)) * np.float32(rng.uniform(0.8, 1.1))


def _cloth(rng: Generator) -> Array:
    """Colour of the clothes, [3, H, W]: plain, striped, checked or printed, with folds."""
    cloth, second = _planes(_any_colour(rng)), _any_colour(rng)
    kind = rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])
    if kind in (1, 2):
        y, x = _coordinates()
        wave_number = np.float32(2 * np.pi / rng.uniform(8, 50))
        phase = (y if rng.random() < 0.6 else x) * wave_number + _noise(rng, 4, 2) * np.float32(0.8)
        band = np.sin(phase) > rng.uniform(-0.5, 0.7)
        if kind == 2:
            band = band ^ (np.sin(x * wave_number) > 0.2)
        _mix(cloth, second, band.astype(np.float32))
    elif kind == 3:
        _mix(cloth, second, (_noise(rng, int(rng.integers(10, 30)), 2) > 0.5).astype(np.float32))
    cloth *= 1 + _noise(rng, int(rng.integers(4, 10)), 3, stretch=2.5) * np.float32(
        rng.uniform(0.04, 0.13)
    )
    return cloth


def _paint_body(rng: Generator, canvas: Canvas, figure: Figure, cloth: Array) -> None:
    w, h, s = figure.width, figure.height, figure.shoulders
    neck, x = figure.at(0, 1.25), float(figure.head[0])
    line = float(neck[1]) + h * rng.uniform(0.12, 0.4)  # height of the shoulders
    drop, waist = h * rng.uniform(0.25, 0.6), s * rng.uniform(0.68, 1.0)
    hips = x + figure.lean
    slope = rng.normal(0, 0.12) * h
    torso: list[Array] = [
        np.array(p)
        for p in (
            (neck[0] - 0.75 * w, neck[1] - 0.02 * h),
            (neck[0] + 0.75 * w, neck[1] - 0.02 * h),
            (x + s, line + drop + slope),
            (x + s * 1.03, line + drop + 1.5 * h),
            (hips + waist, line + 4.2 * h),
            (hips + waist * 1.15, line + 9 * h),
            (hips - waist * 1.15, line + 9 * h),
            (hips - waist, line + 4.2 * h),
            (x - s * 1.03, line + drop + 1.5 * h),
            (x - s, line + drop - slope),
        )
    ]
    canvas.paint(_polygon(torso, roundness=0.28 * w, edge=rng.uniform(1.4, 3)), cloth)
    throat: list[Array] = [
        figure.at(-0.55, 0.4),
        figure.at(0.55, 0.4),
        neck + [0.62 * w, 0.15 * h],
        neck + [0, 0.6 * h * rng.uniform(0.4, 1.6)],
    ]
    throat.append(neck + [-0.62 * w, 0.15 * h])
    canvas.paint(_polygon(throat, roundness=0.15 * w), np.asarray(figure.skin * 0.86, np.float32))
    if rng.random() < 0.3:  # a jacket over it
        inner: list[Array] = [
            neck + [-0.75 * w, 0],
            neck + [0.75 * w, 0],
            neck + [0.1 * w, 3.2 * h],
            neck + [-0.1 * w, 3.2 * h],
        ]
        opening = (
            _polygon(inner, roundness=3)
            * (canvas.alpha > 0.98)
            * (1 - _polygon(throat, roundness=0.15 * w))
        )
        canvas.paint(opening, _any_colour(rng))


def _paint_head(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    skin = figure.skin
    for side in (-1, 1):
        canvas.paint(
            _ellipse(figure, side * 0.98, 0.08, 0.16, 0.22), np.asarray(skin * 0.9, np.float32)
        )
    jaw = rng.uniform(0.72, 1.0)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    narrow = np.where(np.sin(angles) > 0, 1 - (1 - jaw) * np.sin(angles) ** 2, 1)
    outline = np.array(
        [figure.at(np.cos(a) * n, np.sin(a)) for a, n in zip(angles, narrow, strict=True)]
    )
    face = _polygon(outline, roundness=2.0)
    canvas.paint(face, skin)
    # Darker towards the rim, as a round thing is.
    middle = _ellipse(figure, rng.uniform(-0.2, 0.2), 0, 0.75, 0.8, edge=figure.width * 0.5)
    canvas.paint(
        np.asarray(face * (1 - middle) * 0.35, np.float32),
        np.asarray(figure.skin * 0.55, np.float32),
    )
    turn = rng.uniform(-0.25, 0.25)
    dark = np.asarray(figure.hair * 0.7, np.float32)
    for side in (-1, 1):
        x = turn + side * 0.42
        canvas.paint(
            _ellipse(figure, x, -0.08, 0.17, 0.065), np.array([0.92, 0.9, 0.88], np.float32)
        )
        canvas.paint(_ellipse(figure, x, -0.08, 0.075, 0.065), _pick(rng, HAIR))
        canvas.paint(_ellipse(figure, x, -0.25, 0.24, 0.035), dark)
    canvas.paint(
        _ellipse(figure, turn * 1.2, 0.22, 0.13, 0.06, edge=5),
        np.asarray(figure.skin * 0.72, np.float32),
    )
    lips = np.clip(figure.skin * [1.0, 0.62, 0.62], 0, 1).astype(np.float32)
    canvas.paint(
        _ellipse(figure, turn, 0.52, rng.uniform(0.22, 0.36), rng.uniform(0.04, 0.1), edge=2.5),
        lips,
    )
    if rng.random() < 0.2:  # beard
        beard = _ellipse(figure, turn * 0.5, 0.62, 0.72, 0.42, edge=7) * (
            1 - _ellipse(figure, turn, 0.5, 0.3, 0.12)
        )
        canvas.paint(np.asarray(beard * face * 0.8, np.float32), dark)


@dataclass
class HairStyle:
    length: float  # of the strands, in half heights of the head
    volume: float  # how far they stand off, in half widths
    curl: float
    strands: int
    hairline: float  # height of the forehead's upper end, in half heights from the centre


def _hair_style(rng: Generator) -> HairStyle:
    length = rng.choice([0.0, rng.uniform(0.15, 0.5), rng.uniform(0.8, 2.6)], p=[0.07, 0.48, 0.45])
    return HairStyle(
        length,
        rng.uniform(0.05, 0.4),
        rng.choice([0.02, 0.08, 0.2]),
        int(rng.integers(250, 700)),
        rng.uniform(-0.75, -0.45),
    )


def _paint_hair(
    rng: Generator, canvas: Canvas, figure: Figure, style: HairStyle, front: bool
) -> None:
    """The hair behind the head and neck, or the cap over the forehead, each with single strands at its edge."""
    if style.length == 0:
        return
    if front:
        cap = _ellipse(
            figure, 0, -0.12, 1.06 + style.volume * 0.4, 1.0 + style.volume * 0.35, edge=3
        )
        bare = _ellipse(figure, rng.uniform(-0.15, 0.15), style.hairline + 1.0, 0.86, 1.0, edge=4)
        below = _polygon(
            [figure.at(-3, 0.15), figure.at(3, 0.15), figure.at(3, 4), figure.at(-3, 4)],
            roundness=6,
            edge=20,
        )
        solid = np.asarray(cap * (1 - bare) * (1 - below), np.float32)
        paths = _strands(rng, figure, style, style.strands // 2, min(style.length, 0.45))
    else:
        fall = min(style.length, 2.4) if style.length > 0.6 else 0.1
        sides = 1.05 + style.volume * 0.6
        mass = [
            figure.at(-sides, -0.3),
            figure.at(-0.7, -1.1),
            figure.at(0.7, -1.1),
            figure.at(sides, -0.3),
        ]
        mass += [figure.at(sides * 1.02, fall * 0.75), figure.at(-sides * 1.02, fall * 0.75)]
        solid = _polygon(mass, roundness=0.3 * figure.width, edge=3)
        paths = _strands(rng, figure, style, style.strands, style.length)
    mask, shade = _draw_strands(rng, paths)
    canvas.paint(np.maximum(solid, mask), figure.hair, shade)


def _strands(rng: Generator, figure: Figure, style: HairStyle, count: int, length: float) -> Array:
    """Curves [count, 9, 2] from the scalp outwards, then down by their weight."""
    root = rng.uniform(-2.1, 2.1, count)  # angle from the crown
    outward = np.stack([np.sin(root), -np.cos(root)], 1)
    start = outward * [1.0, 0.95]
    reach = length * rng.uniform(0.5, 1.15, count)[:, None]
    t = np.linspace(0, 1, 9)[None]
    stray = np.where(rng.random((count, 1)) < 0.25, 2.5, 1.0)
    sideways = outward[:, :1] * (
        1 + style.volume * (np.sqrt(t) * 0.8 + rng.normal(0, 0.2, (count, 1)) * stray * t)
    )
    weight = (
        reach
        * t
        * (0.35 + 0.65 * min(1.0, length))
        * np.clip(0.25 + np.abs(root)[:, None] * 0.6, 0, 1)
    )
    down = start[:, 1:] - style.volume * 0.3 * np.sin(np.pi * t) + weight
    wave = (
        style.curl * np.sin(t * rng.uniform(4, 12, (count, 1)) + rng.uniform(0, 6, (count, 1))) * t
    )
    across = sideways + wave + rng.normal(0, 0.03, (count, 1))
    angle = np.deg2rad(figure.tilt)
    x, y = across * figure.width, down * figure.height
    return np.asarray(
        np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], -1)
        + figure.head,
        np.float32,
    )


def _draw_strands(rng: Generator, paths: Array) -> tuple[Array, Array]:
    """Coverage and factor of brightness, [H, W] each, of strands in five shades and widths."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    shade = np.full((HEIGHT, WIDTH), 100, np.uint8)  # per cent
    for part, width in zip(
        np.array_split(_fixed(paths), 5), rng.permutation([1, 1, 1, 2, 3]).tolist(), strict=True
    ):
        opacity = int(rng.uniform(70, 220)) if width == 1 else 255
        layer = np.zeros_like(mask)
        cv2.polylines(layer, list(part), False, opacity, width, cv2.LINE_AA, SUBPIXEL)
        np.maximum(mask, layer, out=mask)
        cv2.polylines(
            shade, list(part), False, int(rng.uniform(65, 145)), width + 2, cv2.LINE_8, SUBPIXEL
        )
    soft = cv2.GaussianBlur(mask, (0, 0), 0.7)
    return soft * np.float32(1 / 255), shade * np.float32(0.01)


def _paint_accessories(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    if rng.random() < 0.2:  # glasses
        frame = _pick(rng, HAIR)
        for side in (-1, 1):
            ring = _ellipse(figure, side * 0.42, -0.06, 0.3, 0.2) - _ellipse(
                figure, side * 0.42, -0.06, 0.26, 0.165
            )
            canvas.paint(np.clip(ring, 0, 1), frame)
        canvas.paint(
            _limb([figure.at(-0.14, -0.1), figure.at(0.14, -0.1)], figure.width * 0.06), frame
        )
    if rng.random() < 0.14:  # hat: a crown and a brim
        colour = _any_colour(rng)
        crown = [
            figure.at(-1.1, -0.5),
            figure.at(-0.95, -1.45),
            figure.at(0.95, -1.45),
            figure.at(1.1, -0.5),
        ]
        canvas.paint(_polygon(crown, roundness=0.2 * figure.width), colour)
        brim = rng.uniform(1.15, 1.9)
        canvas.paint(_ellipse(figure, 0, -0.52, brim, 0.13), np.asarray(colour * 0.8, np.float32))


def _paint_arms(rng: Generator, canvas: Canvas, figure: Figure, cloth: Array) -> None:
    """One or two arms: hanging, on the hip (with a gap to the body), crossed, or raised to the head."""
    thick, h = figure.width * rng.uniform(0.5, 0.75), figure.height
    bare = figure.skin * np.float32(0.97)
    sleeve = cloth * np.float32(0.93)
    for side in (-1, 1) if rng.random() < 0.6 else (rng.choice([-1, 1]),):
        shoulder = np.array(
            [
                figure.head[0] + side * figure.shoulders * 0.86,
                figure.head[1] + h * rng.uniform(1.9, 2.1),
            ]
        )
        out = rng.choice([0.15, 0.6, 1.1]) * side
        elbow = shoulder + [out * figure.width, h * rng.uniform(1.4, 2.1)]
        wrist_ends = (
            elbow + [side * 0.1 * figure.width, 2.0 * h],
            figure.head + [side * 0.4 * figure.width + figure.lean, h * 4.2],
            figure.head + [-side * 0.3 * figure.width, h * 3.4],
            figure.head + [side * figure.width * rng.uniform(0.9, 1.6), h * rng.uniform(-0.2, 1.0)],
        )
        wrist = np.asarray(wrist_ends[rng.choice(4, p=[0.3, 0.25, 0.2, 0.25])])
        short = rng.random() < 0.4
        canvas.paint(_limb([shoulder, elbow], thick), sleeve)
        canvas.paint(_limb([elbow, wrist], thick * 0.8), bare if short else sleeve)
        hand = np.array(
            [
                wrist + thick * 0.55 * np.array([np.cos(a), 1.25 * np.sin(a)])
                for a in np.linspace(0, 6.28, 16)
            ]
        )
        canvas.paint(_polygon(hand, roundness=3), bare)


def _camera(rng: Generator, image: Array) -> NDArray[np.uint8]:
    """Exposure, white balance, vignette, lens blur and sensor noise: from [3, H, W] in 0..1 to RGB [H, W, 3] uint8."""
    y = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]
    image *= 1 - np.float32(rng.uniform(0, 0.25)) * (x * x + y * y)
    image *= (rng.uniform(0.9, 1.1, 3) * rng.uniform(0.95, 1.4)).astype(np.float32)[:, None, None]
    blur = rng.uniform(0.4, 1.0) if rng.random() < 0.4 else 0
    luma = rng.standard_normal((HEIGHT, WIDTH), np.float32) * np.float32(rng.uniform(0.008, 0.022))
    for plane in image:
        if blur:
            cv2.GaussianBlur(plane, (0, 0), blur, dst=plane)
        plane += luma
        plane += cv2.resize(
            rng.standard_normal((HEIGHT // 2, WIDTH // 2), np.float32) * np.float32(0.006),
            (WIDTH, HEIGHT),
        )
    return np.asarray(
        cv2.convertScaleAbs(cv2.merge(list(np.maximum(image, 0, out=image))), alpha=255)
    )


def draw_portrait(rng: Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One portrait: RGB [800, 600, 3] uint8 and alpha [800, 600] uint8, a pure function of the generator's state."""
    image, canvas = draw_background(rng), Canvas()
    width = float(np.exp(rng.uniform(np.log(60), np.log(125))))
    centre = float(np.clip(rng.normal(WIDTH / 2, 60), 0.25 * WIDTH, 0.75 * WIDTH))
    if rng.random() < 0.08:  # somebody else beside them
        beside = centre + rng.choice([-1, 1]) * width * rng.uniform(3, 4.5)
        draw_figure(rng, canvas, _figure(rng, width * rng.uniform(0.8, 1.0), beside))
    figure = _figure(rng, width, centre)
    draw_figure(rng, canvas, figure)
    image *= 1 - canvas.alpha
    image += canvas.colour * _light(rng, figure)
    return _camera(rng, image), np.asarray(canvas.alpha * 255 + 0.5, np.uint8)
