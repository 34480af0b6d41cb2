"""Pictures of the demo catalogue: one product, drawn by OpenCV before a background.

    picture = draw(Look("shoe", "red", "striped", "cluttered"), side=160, rng=rng)

A product type is a handful of parts: polygons and thick lines in a unit square (x right, y down),
stretched to the type's aspect ratio. Three planes are drawn from them: what the product covers,
how light each part is, and where it has a material of its own (wood, metal, rubber) in place of
the product's colour and pattern. The true box of the product is that of the first plane.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

from acebert.data.image import Box

COLOURS: dict[str, tuple[int, int, int]] = {  # RGB
    "black": (38, 38, 42),
    "blue": (40, 84, 190),
    "white": (240, 240, 236),
    "red": (200, 34, 40),
    "grey": (140, 143, 148),
    "green": (42, 138, 66),
    "brown": (120, 74, 40),
    "pink": (238, 130, 170),
    "yellow": (244, 200, 40),
    "purple": (116, 54, 150),
    "orange": (238, 120, 28),
}
PATTERNS = ("plain", "striped", "checked", "dotted")
BACKGROUNDS = ("plain", "shaded", "cluttered")
TONE = 128  # a part's brightness factor 1, as it is drawn

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Part:
    """A filled polygon, or a line `width` thick (a share of the picture's longer side)."""

    points: Points
    tone: float = 1.0
    """brightness factor"""
    own: bool = False
    """has its own material, not the product's colour"""
    width: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What a product type looks like."""

    aspect: float
    """width / height"""
    parts: list[Part]
    material: tuple[int, int, int] = (120, 120, 124)
    """RGB of the parts that have their own"""


@dataclass(frozen=True)
class Look:
    """Everything that a picture of a product shows on purpose."""

    kind: str
    colour: str
    pattern: str
    background: str


@dataclass(frozen=True)
class Picture:
    image: np.ndarray = field(repr=False)
    """RGB uint8 [H, W, 3]"""
    box: Box
    """the product's true box [px]"""


def _ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360
) -> Points:
    angles = np.radians(np.linspace(start, end, 33))
    return [(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in angles]


def _slab(x0: float, y0: float, x1: float, y1: float, r: float = 0.04) -> Points:
    """A rectangle with its corners cut."""
    return [
        (x0 + r, y0), (x1 - r, y0), (x1, y0 + r), (x1, y1 - r),
        (x1 - r, y1), (x0 + r, y1), (x0, y1 - r), (x0, y0 + r),
    ]  # fmt: skip


WOOD, RUBBER, METAL = (150, 104, 62), (214, 212, 206), (168, 170, 176)

# fmt: off
SHAPES: dict[str, Shape] = {
    "shirt": Shape(1.1, [
        Part([(.36, .02), (.5, .09), (.64, .02), (.80, .08), (1, .38), (.85, .48), (.77, .38),
              (.77, 1), (.23, 1), (.23, .38), (.15, .48), (0, .38), (.20, .08)]),
        Part([(.36, .02), (.5, .09), (.42, .17)], .75),
        Part([(.64, .02), (.5, .09), (.58, .17)], .75),
        Part([(.5, .1), (.5, 1)], .7, width=.006),
        *(Part(_ellipse(.53, y, .012, .012), .45) for y in (.28, .45, .62, .79)),
    ]),
    "dress": Shape(.62, [
        Part([(.30, 0), (.37, 0), (.40, .11), (.5, .14), (.60, .11), (.63, 0), (.70, 0), (.73, .2),
              (.65, .40), (.85, .7), (1, .97), (.75, 1), (.5, .985), (.25, 1), (0, .97), (.15, .7),
              (.35, .40), (.27, .2)]),
        Part([(.345, .38), (.655, .38), (.66, .43), (.34, .43)], .6),
        Part([(.44, .45), (.36, .97)], .8, width=.006),
        Part([(.56, .45), (.64, .97)], .8, width=.006),
    ]),
    "trousers": Shape(.56, [
        Part([(.16, 0), (.84, 0), (.95, .3), (1, 1), (.62, 1), (.5, .40), (.38, 1), (0, 1),
              (.05, .3)]),
        Part([(.16, 0), (.84, 0), (.86, .055), (.14, .055)], .65),
        Part([(.5, .06), (.5, .36)], .65, width=.007),
        Part([(.22, .08), (.12, .2)], .65, width=.007),
        Part([(.78, .08), (.88, .2)], .65, width=.007),
    ]),
    "shoe": Shape(2.0, [
        Part([(.02, .84), (.03, .2), (.09, .06), (.2, .14), (.3, .08), (.38, 0), (.46, .12),
              (.6, .36), (.84, .50), (.96, .62), (.99, .84)]),
        Part([(0, .8), (1, .8), (1, .92), (.97, 1), (.03, 1), (0, .92)], own=True),
        *(Part([(.37 + d, .25 + 1.4 * d), (.45 + d, .14 + 1.5 * d)], 1.1, True, .014)
          for d in (0, .06, .12)),
        Part([(.82, .5), (.76, .8)], .7, width=.01),
    ], RUBBER),
    "boot": Shape(.86, [
        Part([(.1, 0), (.60, 0), (.58, .5), (.74, .60), (.93, .68), (1, .82), (1, .93),
              (.06, .93)]),
        Part([(.04, .90), (1, .90), (1, .96), (.42, .96), (.38, 1), (.04, 1)], .5, True),
        Part([(.1, 0), (.60, 0), (.60, .07), (.1, .07)], .65),
        *(Part([(.42, y), (.58, y + .03)], .5, width=.012) for y in (.2, .3, .4, .5)),
    ], WOOD),
    "bag": Shape(1.08, [
        Part(_ellipse(.5, .38, .24, .35, 180, 360), .7, width=.035),
        Part([(.08, .36), (.92, .36), (1, .95), (.96, 1), (.04, 1), (0, .95)]),
        Part([(.07, .40), (.93, .40), (.80, .66), (.2, .66)], .8),
        Part(_slab(.44, .60, .56, .72, .02), 1.2, True),
    ], METAL),
    "watch": Shape(.52, [
        Part([(.30, 0), (.70, 0), (.76, .3), (.76, .7), (.70, 1), (.30, 1), (.24, .7), (.24, .3)]),
        Part(_ellipse(.5, .5, .5, .26), 1, True), Part(_ellipse(.5, .5, .40, .208), 1.4, True),
        Part([(.5, .5), (.5, .36)], .25, True, .014), Part([(.5, .5), (.68, .54)], .25, True, .014),
        *(Part(_ellipse(.5, y, .035, .012), .5) for y in (.06, .12, .88, .94)),
    ], METAL),
    "hat": Shape(1.75, [
        Part(_ellipse(.5, .80, .5, .2), .9),
        Part([(.22, .80), (.27, .12), (.36, 0), (.5, .07), (.64, 0), (.73, .12), (.78, .80),
              (.64, .87), (.36, .87)]),
        Part([(.235, .60), (.765, .60), (.78, .80), (.64, .87), (.36, .87), (.22, .80)], .5),
    ]),
    "mug": Shape(1.2, [
        Part(_ellipse(.74, .5, .22, .27, -100, 100), .8, width=.05),
        Part([(0, .07), (.76, .07), (.74, .9), (.68, 1), (.08, 1), (.02, .9)]),
        Part(_ellipse(.38, .08, .38, .08), .6), Part(_ellipse(.38, .09, .32, .055), .35),
    ]),
    "lamp": Shape(.66, [
        Part([(.5, .4), (.5, .95)], 1, True, .03),
        Part(_ellipse(.5, .95, .28, .05), .9, True),
        Part([(.27, 0), (.73, 0), (1, .46), (0, .46)]),
        Part([(.27, 0), (.73, 0), (.745, .03), (.255, .03)], .7),
        Part([(.018, .43), (.982, .43), (1, .46), (0, .46)], .7),
    ], WOOD),
    "chair": Shape(.62, [
        *(Part([(x, .5), (x2, 1)], .9, True, .03) for x, x2 in ((.12, .05), (.88, .95))),
        *(Part([(x, .5), (x2, .9)], .7, True, .026) for x, x2 in ((.28, .26), (.72, .74))),
        Part(_slab(.12, 0, .88, .42, .07)),
        Part([(.12, .44), (.88, .44), (1, .58), (1, .62), (0, .62), (0, .58)], .85),
        Part([(.38, .05), (.38, .38)], .7, width=.01),
        Part([(.62, .05), (.62, .38)], .7, width=.01),
    ], WOOD),
    "glasses": Shape(2.5, [
        Part([(.06, .3), (0, .04)], .8, width=.03), Part([(.94, .3), (1, .04)], .8, width=.03),
        Part([(.44, .4), (.5, .32), (.56, .4)], .8, width=.03),
        *(Part(_ellipse(x, .58, .21, .42), .8) for x in (.25, .75)),
        *(Part(_ellipse(x, .58, .175, .35), 1.15) for x in (.25, .75)),
        *(Part([(x - .06, .66), (x + .04, .4)], 1.7, width=.012) for x in (.25, .75)),
    ]),
}
# fmt: on


def draw(look: Look, side: int, rng: np.random.Generator) -> Picture:
    """A picture of that look: place, size, tilt, light and background are drawn from `rng`.

    `side` [px] is its longer side; one in four is upright, 3:4.
    """
    H, W = side, side if rng.random() < 0.75 else side * 3 // 4
    shape = SHAPES[look.kind]
    planes = _planes(shape, H, W, rng)
    ground = _background(look.background, H, W, rng)
    _cast_shadow(ground, planes[0], rng)
    x, y, w, h = cv2.boundingRect(planes[0])
    within = slice(y, y + h), slice(x, x + w)
    cover, tone, own = (plane[within].astype(np.float32)[:, :, None] for plane in planes)
    cloth = _pattern(look.pattern, _jitter(COLOURS[look.colour], rng), max(H, W), (h, w), rng)
    cloth += (np.array(shape.material, np.float32) - cloth) * (own / 255)
    light = np.linspace(1.08, 0.9, w, dtype=np.float32)[None, :, None]  # a lamp on the left
    ground[within] += (cloth * (tone / TONE * light) - ground[within]) * (cover / 255)
    ground += rng.standard_normal((H, W, 1), dtype=np.float32) * 2.5  # camera noise
    x, y, w, h = cv2.boundingRect((planes[0] > 127).astype(np.uint8))
    return Picture(ground.clip(0, 255).astype(np.uint8), (x, y, x + w, y + h))


def _planes(
    shape: Shape, H: int, W: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cover, tone (TONE is 1) and own material, each uint8 [H, W]."""
    height = min(1.0, 1 / shape.aspect * W / H)  # the largest that fits, as a share of H
    size = np.array([height * shape.aspect * H, height * H]) * rng.uniform(0.45, 0.86)
    turn = np.radians(rng.normal(0, 5))
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    flip = np.array([1.0 if rng.random() < 0.5 else -1.0, 1.0])
    free = np.maximum(np.array([W, H]) * 0.97 - size, 0)
    centre = np.array([W, H]) / 2 + rng.uniform(-0.5, 0.5, 2) * free * 0.85

    cover, tone, own = (np.zeros((H, W), np.uint8) for _ in range(3))
    shift = 4  # fixed-point bits of a pixel
    outline = max(1, max(H, W) // 130)
    for part in shape.parts:
        place = ((np.array(part.points) - 0.5) * size * flip) @ rotation + centre
        points = [np.round(place * 2**shift).astype(np.int32)]
        value = int(np.clip(part.tone * TONE, 0, 255))
        if part.width:
            width = max(1, round(part.width * float(size.max())))
            for plane, ink in ((cover, 255), (tone, value), (own, 255 * part.own)):
                cv2.polylines(plane, points, False, ink, width, cv2.LINE_AA, shift)
        else:
            for plane, ink in ((cover, 255), (tone, value), (own, 255 * part.own)):
                cv2.fillPoly(plane, points, ink, cv2.LINE_AA, shift)
            cv2.polylines(tone, points, True, int(value * 0.62), outline, cv2.LINE_AA, shift)
    return cover, tone, own


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """No two reds are the same: float32 [3]."""
    return np.clip(np.array(colour) * rng.uniform(0.9, 1.1) + rng.normal(0, 5, 3), 8, 246).astype(
        np.float32
    )


def _pattern(
    pattern: str, base: np.ndarray, side: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """The cloth as float32 [h, w, 3], size = (h, w), in a picture of that side; the pattern's
    second colour is light on dark, else dark."""
    cloth = np.broadcast_to(base, (*size, 3)).copy()
    if pattern == "plain":
        return cloth
    second = np.float32(60) if base.mean() > 170 else np.float32(245)
    period = max(4, int(side * rng.uniform(0.06, 0.09)))
    y, x = (np.arange(n, dtype=np.float32) + rng.uniform(0, period) for n in size)
    y, x = y[:, None] % period, x[None, :] % period
    if pattern == "striped":
        weight = np.broadcast_to(y < period * 0.42, size).astype(np.float32)
    elif pattern == "checked":
        weight = 0.5 * ((y < period / 2).astype(np.float32) + (x < period / 2))
    else:
        weight = np.clip(period * 0.29 - np.hypot(y - period / 2, x - period / 2) + 0.5, 0, 1)
    return cloth + (second - cloth) * (weight * 0.85)[:, :, None]


def _background(kind: str, H: int, W: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [H, W, 3]: a white sweep, a lit studio wall, or a room that is out of focus."""
    if kind == "plain":
        return np.full((H, W, 3), rng.choice([255.0, 252.0, 246.0]), np.float32)
    wall = rng.uniform(185, 235) + rng.normal(0, 7, 3)
    y = np.arange(H, dtype=np.float32)[:, None] / max(H, W) - 0.5
    x = np.arange(W, dtype=np.float32)[None, :] / max(H, W) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    slope = (x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(20, 70)
    vignette = (x**2 + y**2) * 60
    ground = wall.astype(np.float32) + (slope - vignette).astype(np.float32)[:, :, None]
    if kind == "cluttered":
        _clutter(ground, rng)
    return ground


def _clutter(ground: np.ndarray, rng: np.random.Generator) -> None:
    """Furniture out of focus behind the product, small things in focus beside it, in place."""
    H, W = ground.shape[:2]
    side = max(H, W)
    mean = float(ground.mean())
    edge = int(H * rng.uniform(0.6, 0.85))
    ground[edge:] -= rng.uniform(12, 40)  # a table
    for _ in range(rng.integers(3, 7)):
        ink = np.clip(mean + rng.normal(0, 32, 3), 0, 255).tolist()
        x, y = int(rng.integers(0, W)), int(rng.integers(0, H))
        w, h = (int(v) for v in rng.uniform(0.08, 0.35, 2) * side)
        if rng.random() < 0.5:
            cv2.rectangle(ground, (x, y), (x + w, y + h), ink, -1)
        else:
            cv2.circle(ground, (x, y), w // 2, ink, -1)
    reach = side // 10 | 1
    cv2.GaussianBlur(ground, (reach, reach), 0, dst=ground)
    for _ in range(rng.integers(2, 6)):
        ink = (np.array(list(COLOURS.values()))[rng.integers(len(COLOURS))] * 1.0).tolist()
        x, y = int(rng.integers(0, W)), int(rng.integers(0, H))
        r = int(max(1, rng.uniform(0.012, 0.035) * side))
        if rng.random() < 0.6:
            cv2.circle(ground, (x, y), r, ink, -1, cv2.LINE_AA)
        else:
            cv2.line(
                ground, (x, y), (x + 3 * r, y + int(rng.integers(-r, r + 1))), ink, 1, cv2.LINE_AA
            )


def _cast_shadow(ground: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> None:
    """A soft shadow below the product, in place. Drawn small: it is blurred anyway."""
    H, W = cover.shape
    small = cv2.resize(cover, (W // 4, H // 4), interpolation=cv2.INTER_AREA)
    move = np.array([[1, 0, rng.uniform(-1, 1)], [0, 1, H * 0.008]], np.float32)
    moved = cv2.warpAffine(small, move, (W // 4, H // 4))
    soft = cv2.GaussianBlur(moved, (0, 0), max(1.0, max(H, W) / 90))
    dark = cv2.resize(soft, (W, H), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
    ground *= 1 - rng.uniform(0.1, 0.3) * dark[:, :, None]
