"""Draw one synthetic portrait with its alpha: a figure with soft hair before a textured background.

The images are learnable but not trivial: scale, pose, hair, clothes and light vary, and the
background takes its colours from the same palettes as skin, hair and cloth, so that colour alone
does not tell the figure from what is behind it. ``draw_portrait`` is a pure function of its
generator: whoever changes the order of draws here changes every generated set.

Images are drawn as planes, [3, H, W] float32 in 0..1, which numpy adds and multiplies several times
faster than [H, W, 3].
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
    """Where the parts of a person are, in pixels; x to the right, y down.

    Args:
        head: centre of the head, [2].
        width: half width of the head.
        height: half height of the head.
        tilt: of the head, in degrees.
        shoulders: half width of the shoulders.
        lean: shift of the hips against the head.
        skin: RGB.
        hair: RGB.
    """

    head: Array
    width: float
    height: float
    tilt: float
    shoulders: float
    lean: float
    skin: Array
    hair: Array

    def at(self, across: float, down: float) -> Array:
        """Return the point ``across`` half widths and ``down`` half heights from the head's centre.

        The axes are tilted as the head is.
        """
        angle = np.deg2rad(self.tilt)
        x, y = across * self.width, down * self.height
        tilted = [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)]
        return np.asarray(self.head + tilted, np.float32)

    def dark(self, colour: Array, brightness: float) -> Array:
        """Return a colour of the figure at a brightness below 1."""
        return np.asarray(colour * brightness, np.float32)


class Canvas:
    """Premultiplied colour [3, H, W] (colour times coverage) and coverage [H, W]."""

    def __init__(self) -> None:
        self.colour = np.zeros((3, HEIGHT, WIDTH), np.float32)
        self.alpha = np.zeros((HEIGHT, WIDTH), np.float32)

    def paint(self, mask: Array, colour: Array, shade: Array | None = None) -> None:
        """Lay a colour over what is there.

        Args:
            mask: coverage, [H, W] in 0..1.
            colour: [3] or [3, H, W].
            shade: factor of brightness, [H, W].
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
    """Cloth, wall or leaf: a third of the palettes of skin and hair, else any hue, mostly muted."""
    if rng.random() < 0.33:
        return _pick(rng, SKIN + HAIR, 0.1)
    hue, saturation, value = rng.uniform(0, 360), rng.beta(1.6, 2.6), rng.uniform(0.12, 0.95)
    hsv = np.array([[[hue, saturation, value]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0])


def _noise(rng: Generator, cells: int, octaves: int = 3, stretch: float = 1.0) -> Array:
    """Smooth noise [H, W] of mean 0 and deviation about 1.

    ``cells`` is the coarsest grid's width, ``stretch`` makes it longer down than across.
    """
    # The octaves are added up at no more pixels than they need.
    shrink = 4 if cells * 2**octaves <= WIDTH // 2 else 2
    height, width = HEIGHT // shrink, WIDTH // shrink
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        across = cells * 2**octave
        down = max(2, round(across * HEIGHT / WIDTH / stretch))
        grid = rng.standard_normal((down, across + 1), np.float32) * np.float32(1.2 * 0.6**octave)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(total, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def _planes(colour: Array) -> Array:
    """Return an image of one colour, [3, H, W]."""
    return np.broadcast_to(np.asarray(colour, np.float32)[:, None, None], (3, HEIGHT, WIDTH)).copy()


def _mix(scene: Array, colour: Array, fraction: Array) -> None:
    """Move an image [3, H, W] towards a colour [3] by a fraction [H, W], in place."""
    for plane, value in zip(scene, colour, strict=True):
        plane += fraction * (value - plane)


def _fixed(points: Array) -> NDArray[np.int32]:
    return np.round(points * (1 << SUBPIXEL)).astype(np.int32)


def _polygon(points: list[Array] | Array, roundness: float, edge: float = 1.6) -> Array:
    """Draw a filled polygon as a mask [H, W].

    Its corners are rounded by ``roundness`` pixels, its edge is ``edge`` pixels soft. Drawn at half
    size, blurred, and made steep again: the 0.5 level of a blurred corner is a round one.
    """
    mask = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    cv2.fillPoly(mask, [_fixed(np.asarray(points, np.float32) / 2)], 255, cv2.LINE_AA, SUBPIXEL)
    return _rounded(mask, roundness, edge)


def _limb(points: list[Array], thickness: float, edge: float = 1.6) -> Array:
    """Draw a thick bent line as a mask [H, W]."""
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
        # A blurred mask falls off at the border of the image unless the border is continued.
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
    """Draw an ellipse in the head's own coordinates (see ``Figure.at``) as a mask [H, W]."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = [
        figure.at(across + half_width * np.cos(a), down + half_height * np.sin(a)) for a in angles
    ]
    return _polygon(ring, roundness=1.0, edge=edge)


def draw_background(rng: Generator) -> Array:
    """Draw a wall, street, room, or foliage, sharp or out of focus: [3, H, W] in 0..1."""
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
    """Coordinates y [H, 1] and x [1, W], in pixels."""
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
            axes, angle = np.round(half).astype(int).tolist(), rng.uniform(0, 180)
            for plane, value in zip(scene, colour, strict=True):
                middle = centre.astype(int).tolist()
                cv2.ellipse(plane, middle, axes, angle, 0, 360, float(value), -1, cv2.LINE_AA)


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
        visible = disc[rows.start - top :, columns.start - left :][: part.shape[1], : part.shape[2]]
        part += visible * (_any_colour(rng) * np.float32(rng.uniform(0.2, 0.8)))[:, None, None]


def draw_figure(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    """Paint one person, from the hair behind the neck to the hand before the face."""
    style = _hair_style(rng)
    cloth = _cloth(rng)
    _paint_hair_behind(rng, canvas, figure, style)
    _paint_body(rng, canvas, figure, cloth)
    _paint_head(rng, canvas, figure)
    _paint_fringe(rng, canvas, figure, style)
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
    """Torso, throat, and sometimes the opening of a jacket."""
    w, h = figure.width, figure.height
    neck = figure.at(0, 1.25)
    torso = _torso(rng, figure, neck)
    canvas.paint(_polygon(torso, roundness=0.28 * w, edge=rng.uniform(1.4, 3)), cloth)
    throat = [
        figure.at(-0.55, 0.4),
        figure.at(0.55, 0.4),
        neck + [0.62 * w, 0.15 * h],
        neck + [0, 0.6 * h * rng.uniform(0.4, 1.6)],
        neck + [-0.62 * w, 0.15 * h],
    ]
    canvas.paint(_polygon(throat, roundness=0.15 * w), figure.dark(figure.skin, 0.86))
    if rng.random() < 0.3:
        opening = [
            neck + [-0.75 * w, 0],
            neck + [0.75 * w, 0],
            neck + [0.1 * w, 3.2 * h],
            neck + [-0.1 * w, 3.2 * h],
        ]
        inner = (
            _polygon(opening, roundness=3)
            * (canvas.alpha > 0.98)
            * (1 - _polygon(throat, roundness=0.15 * w))
        )
        canvas.paint(inner, _any_colour(rng))


def _torso(rng: Generator, figure: Figure, neck: Array) -> list[Array]:
    """Outline of the trunk: from the neck over shoulder, armpit and waist to below the picture."""
    w, h, s = figure.width, figure.height, figure.shoulders
    x = float(figure.head[0])
    line = float(neck[1]) + h * rng.uniform(0.12, 0.4)  # height of the shoulders
    drop, waist = h * rng.uniform(0.25, 0.6), s * rng.uniform(0.68, 1.0)
    hips = x + figure.lean
    slope = rng.normal(0, 0.12) * h
    neckline, armpit = neck[1] - 0.02 * h, line + drop + 1.5 * h
    waistline, below = line + 4.2 * h, line + 9 * h
    outline = (
        (neck[0] - 0.75 * w, neckline),
        (neck[0] + 0.75 * w, neckline),
        (x + s, line + drop + slope),
        (x + s * 1.03, armpit),
        (hips + waist, waistline),
        (hips + waist * 1.15, below),
        (hips - waist * 1.15, below),
        (hips - waist, waistline),
        (x - s * 1.03, armpit),
        (x - s, line + drop - slope),
    )
    return [np.array(point) for point in outline]


# Parts of the face as ellipses in the head's own coordinates (see ``Figure.at``): distance of the
# centre from the middle line, height, half width, half height.
EAR = (0.98, 0.08, 0.16, 0.22)
EYE = (0.42, -0.08, 0.17, 0.065)
IRIS = (0.42, -0.08, 0.075, 0.065)
BROW = (0.42, -0.25, 0.24, 0.035)
NOSE = (0.0, 0.22, 0.13, 0.06)
MOUTH_HEIGHT, BEARD_HEIGHT = 0.52, 0.62
EYE_WHITE = (0.92, 0.9, 0.88)
LIPS = (1.0, 0.62, 0.62)  # factors of the skin's colour


def _paint_head(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    """Ears, face, eyes, nose, mouth, and sometimes a beard."""
    for side in (-1, 1):
        across, down, width, height = EAR
        ear = _ellipse(figure, side * across, down, width, height)
        canvas.paint(ear, figure.dark(figure.skin, 0.9))
    face = _face(rng, figure)
    canvas.paint(face, figure.skin)
    # Darker towards the rim, as a round thing is.
    middle = _ellipse(figure, rng.uniform(-0.2, 0.2), 0, 0.75, 0.8, edge=figure.width * 0.5)
    rim = np.asarray(face * (1 - middle) * 0.35, np.float32)
    canvas.paint(rim, figure.dark(figure.skin, 0.55))
    gaze = rng.uniform(-0.25, 0.25)  # of the whole face to one side
    _paint_eyes(rng, canvas, figure, gaze)
    _, down, width, height = NOSE
    nose = _ellipse(figure, gaze * 1.2, down, width, height, edge=5)
    canvas.paint(nose, figure.dark(figure.skin, 0.72))
    lips = np.clip(figure.skin * LIPS, 0, 1).astype(np.float32)
    width, height = rng.uniform(0.22, 0.36), rng.uniform(0.04, 0.1)
    canvas.paint(_ellipse(figure, gaze, MOUTH_HEIGHT, width, height, edge=2.5), lips)
    if rng.random() < 0.2:
        beard = _ellipse(figure, gaze * 0.5, BEARD_HEIGHT, 0.72, 0.42, edge=7) * (
            1 - _ellipse(figure, gaze, 0.5, 0.3, 0.12)
        )
        canvas.paint(np.asarray(beard * face * 0.8, np.float32), figure.dark(figure.hair, 0.7))


def _face(rng: Generator, figure: Figure) -> Array:
    """Mask of the face: a circle in the head's coordinates that is narrower at the jaw."""
    jaw = rng.uniform(0.72, 1.0)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    narrow = np.where(np.sin(angles) > 0, 1 - (1 - jaw) * np.sin(angles) ** 2, 1)
    outline = np.array(
        [figure.at(np.cos(a) * n, np.sin(a)) for a, n in zip(angles, narrow, strict=True)]
    )
    return _polygon(outline, roundness=2.0)


def _paint_eyes(rng: Generator, canvas: Canvas, figure: Figure, gaze: float) -> None:
    """Eyes with irises of any hair colour, and brows."""
    brow_colour = figure.dark(figure.hair, 0.7)
    for side in (-1, 1):
        eye, iris, brow = (
            _ellipse(figure, gaze + side * across, down, width, height)
            for across, down, width, height in (EYE, IRIS, BROW)
        )
        canvas.paint(eye, np.array(EYE_WHITE, np.float32))
        canvas.paint(iris, _pick(rng, HAIR))
        canvas.paint(brow, brow_colour)


@dataclass
class HairStyle:
    """How the hair of a figure is.

    Args:
        length: of the strands, in half heights of the head.
        volume: how far they stand off, in half widths.
        curl: amplitude of their waves, in half widths.
        strands: number of single ones.
        hairline: height of the forehead's upper end, in half heights from the head's centre.
    """

    length: float
    volume: float
    curl: float
    strands: int
    hairline: float


def _hair_style(rng: Generator) -> HairStyle:
    length = rng.choice([0.0, rng.uniform(0.15, 0.5), rng.uniform(0.8, 2.6)], p=[0.07, 0.48, 0.45])
    return HairStyle(
        length,
        rng.uniform(0.05, 0.4),
        rng.choice([0.02, 0.08, 0.2]),
        int(rng.integers(250, 700)),
        rng.uniform(-0.75, -0.45),
    )


def _paint_hair_behind(rng: Generator, canvas: Canvas, figure: Figure, style: HairStyle) -> None:
    """Draw the hair behind the head and neck, with single strands at its edge."""
    if style.length == 0:
        return
    fall = min(style.length, 2.4) if style.length > 0.6 else 0.1
    sides = 1.05 + style.volume * 0.6
    outline = [
        figure.at(-sides, -0.3),
        figure.at(-0.7, -1.1),
        figure.at(0.7, -1.1),
        figure.at(sides, -0.3),
        figure.at(sides * 1.02, fall * 0.75),
        figure.at(-sides * 1.02, fall * 0.75),
    ]
    solid = _polygon(outline, roundness=0.3 * figure.width, edge=3)
    _paint_strands(rng, canvas, figure, style, solid, style.strands, style.length)


def _paint_fringe(rng: Generator, canvas: Canvas, figure: Figure, style: HairStyle) -> None:
    """Draw the cap over the forehead: an ellipse without the face, cut off below the temples."""
    if style.length == 0:
        return
    width, height = 1.06 + style.volume * 0.4, 1.0 + style.volume * 0.35
    cap = _ellipse(figure, 0, -0.12, width, height, edge=3)
    bare = _ellipse(figure, rng.uniform(-0.15, 0.15), style.hairline + 1.0, 0.86, 1.0, edge=4)
    temples = [figure.at(-3, 0.15), figure.at(3, 0.15), figure.at(3, 4), figure.at(-3, 4)]
    below = _polygon(temples, roundness=6, edge=20)
    solid = np.asarray(cap * (1 - bare) * (1 - below), np.float32)
    length = min(style.length, 0.45)
    _paint_strands(rng, canvas, figure, style, solid, style.strands // 2, length)


def _paint_strands(
    rng: Generator,
    canvas: Canvas,
    figure: Figure,
    style: HairStyle,
    solid: Array,
    count: int,
    length: float,
) -> None:
    """Draw a solid mass of hair, [H, W] in 0..1, and single strands that stand off from it."""
    mask, shade = _draw_strands(rng, _strands(rng, figure, style, count, length))
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
    """Glasses and a hat, each now and then."""
    if rng.random() < 0.2:
        _paint_glasses(rng, canvas, figure)
    if rng.random() < 0.14:
        _paint_hat(rng, canvas, figure)


def _paint_glasses(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    frame = _pick(rng, HAIR)
    for side in (-1, 1):
        outer = _ellipse(figure, side * 0.42, -0.06, 0.3, 0.2)
        inner = _ellipse(figure, side * 0.42, -0.06, 0.26, 0.165)
        canvas.paint(np.clip(outer - inner, 0, 1), frame)
    bridge = _limb([figure.at(-0.14, -0.1), figure.at(0.14, -0.1)], figure.width * 0.06)
    canvas.paint(bridge, frame)


def _paint_hat(rng: Generator, canvas: Canvas, figure: Figure) -> None:
    colour = _any_colour(rng)
    crown = [
        figure.at(-1.1, -0.5),
        figure.at(-0.95, -1.45),
        figure.at(0.95, -1.45),
        figure.at(1.1, -0.5),
    ]
    canvas.paint(_polygon(crown, roundness=0.2 * figure.width), colour)
    brim = _ellipse(figure, 0, -0.52, rng.uniform(1.15, 1.9), 0.13)
    canvas.paint(brim, figure.dark(colour, 0.8))


def _paint_arms(rng: Generator, canvas: Canvas, figure: Figure, cloth: Array) -> None:
    """One or two arms: hanging, on the hip (with a gap to the body), crossed, or raised."""
    thick, h = figure.width * rng.uniform(0.5, 0.75), figure.height
    bare = figure.skin * np.float32(0.97)
    sleeve = cloth * np.float32(0.93)
    for side in (-1, 1) if rng.random() < 0.6 else (rng.choice([-1, 1]),):
        across, down = side * figure.shoulders * 0.86, h * rng.uniform(1.9, 2.1)
        shoulder = np.array([figure.head[0] + across, figure.head[1] + down])
        out = rng.choice([0.15, 0.6, 1.1]) * side
        elbow = shoulder + [out * figure.width, h * rng.uniform(1.4, 2.1)]
        wrist = _wrist(rng, figure, side, elbow)
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


def _wrist(rng: Generator, figure: Figure, side: int, elbow: Array) -> Array:
    """Where a hand is: beside the body, on the hip, before the chest, or at the head."""
    w, h = figure.width, figure.height
    poses = (
        elbow + [side * 0.1 * w, 2.0 * h],
        figure.head + [side * 0.4 * w + figure.lean, h * 4.2],
        figure.head + [-side * 0.3 * w, h * 3.4],
        figure.head + [side * w * rng.uniform(0.9, 1.6), h * rng.uniform(-0.2, 1.0)],
    )
    return np.asarray(poses[rng.choice(4, p=[0.3, 0.25, 0.2, 0.25])])


def _camera(rng: Generator, image: Array) -> NDArray[np.uint8]:
    """Exposure, white balance, vignette, lens blur and sensor noise.

    From [3, H, W] in 0..1 to RGB [H, W, 3] uint8.
    """
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
    """Draw one portrait, a pure function of the generator's state.

    Returns:
        RGB uint8 [800, 600, 3] and alpha uint8 [800, 600].
    """
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
