"""Draws one scene of the synthetic dataset: pictograms on a textured background, with exact visible masks.

Everything random about a scene comes from its own generator, so that scenes can be drawn in any order, by any
number of processes. Colors are BGR here, the order that OpenCV's encoders expect.
"""

# S the image's side in pixels
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from clip_base.synthetic.captions import Backdrop
from clip_base.synthetic.pictograms import Category, levels

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

COLORS: dict[str, tuple[int, int, int]] = {  # RGB
    "red": (210, 35, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 215, 45),
    "green": (45, 150, 60),
    "blue": (45, 90, 205),
    "purple": (130, 60, 165),
    "pink": (245, 135, 180),
    "brown": (125, 75, 35),
    "black": (28, 28, 30),
    "white": (246, 246, 244),
    "gray": (135, 135, 138),
}
BACKDROPS: dict[str, tuple[int, int, int]] = {  # RGB, duller than the objects
    "green": (122, 160, 112),
    "blue": (122, 152, 192),
    "gray": (152, 152, 152),
    "yellow": (226, 212, 140),
    "pink": (226, 182, 192),
    "brown": (132, 102, 78),
    "purple": (152, 132, 178),
    "white": (232, 232, 228),
    "black": (48, 48, 52),
    "beige": (214, 200, 170),
    "orange": (218, 164, 108),
    "red": (158, 78, 72),
}
TEXTURES: dict[str, tuple[str, ...]] = {
    "gradient": ("smooth", "soft"),
    "blotches": ("blotchy", "patchy"),
    "stripes": ("striped",),
    "grain": ("grainy", "rough"),
    "mottle": ("mottled", "uneven"),
    "waves": ("wavy", "rippled"),
    "weave": ("woven", "textured"),
}
"""Kinds of background and the adjectives that captions may give them."""

MIN_VISIBLE = 0.4
"""Least share of an object's pixels that later objects leave uncovered; with less it could not be named."""

_MAX_ANGLE = 30.0
_TALL = 1.4  # factor on the height, and divisor of the width, of what is called tall
_OVERLAP = 0.2  # share of objects that are put beside or upon another on purpose
_CROWDED = 0.08  # share of the smaller one's rectangle that two other objects may have in common
_REPEAT = 0.2  # share of objects that repeat a category of the same scene
_COVERED = 80  # of 255: how much of a pixel a thing must cover for the pixel to be its own
_CONTRAST = 42.0  # distance in CIE Lab that an object keeps from what is under it
_TRIES = 12


@dataclass
class Placed:
    """An object in an image.

    Attributes:
        category: what it is.
        color: the name of its color, a key of `COLORS`.
        mask: [S, S] bool, its pixels that no later object covers.
        box: (x, y, width, height) in pixels, the bounds of `mask`.
        behind: positions, in the scene's list, of the objects that cover a part of it.
    """

    category: Category
    color: str
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    behind: tuple[int, ...]


@dataclass
class Scene:
    """A drawn scene: [S, S, 3] BGR pixels, the objects from back to front, and what is behind them."""

    pixels: Bytes
    objects: list[Placed]
    backdrop: Backdrop


@dataclass
class _Patch:
    """A warped pictogram: [h, w, 2] coverage of body and lines, and where its top left pixel lies."""

    coverage: Bytes
    left: int = 0
    top: int = 0

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.coverage.shape[:2]
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def body(self) -> NDArray[np.bool_]:
        return np.asarray(self.coverage[..., 0] > _COVERED)


@dataclass
class _Drawing:
    """A scene while it is being drawn: `owner` holds for each pixel the object on top, or -1."""

    pixels: Bytes
    ground: Bytes
    owner: NDArray[np.int8]
    categories: list[Category] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    patches: list[_Patch] = field(default_factory=list)
    behind: list[set[int]] = field(default_factory=list)
    distractors: list[tuple[_Patch, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """What scenes are made of; see `ScenesConfig` for the options of the same names."""

    size: int
    categories: Sequence[Category]
    objects: tuple[int, int]
    side: tuple[float, float]
    distractors: int


class Painter:
    """Draws scenes of one recipe on a bank of background textures that is made once."""

    def __init__(self, recipe: Recipe, seed: Sequence[int], textures: int = 56) -> None:
        """Makes the bank.

        Args:
            recipe: what to draw.
            seed: determines the bank, which all scenes share.
            textures: how many different textures the bank holds.
        """
        self.recipe = recipe
        kinds = list(TEXTURES)
        self._kinds = [kinds[i % len(kinds)] for i in range(textures)]
        side = recipe.size * 3 // 2
        self._bank = [
            _texture(kind, side, recipe.size, np.random.default_rng([*seed, index]))
            for index, kind in enumerate(self._kinds)
        ]
        rng = np.random.default_rng([*seed, textures])
        self._noise = rng.normal(0, 6, (side, side, 3)).round().astype(np.int16)
        self._names = list(COLORS)
        self._palette = np.array([COLORS[name][::-1] for name in self._names], np.float32)
        self._palette_lab = _lab(self._palette)

    def scene(self, rng: np.random.Generator, chances: NDArray[np.float64] | None = None) -> Scene:
        """Draws the scene that `rng` determines.

        Args:
            rng: the scene's own.
            chances: for each category, the probability that an object is of it or of one before it; None: all
                are equally frequent.
        """
        ground, backdrop = self.background(rng)
        size = self.recipe.size
        drawing = _Drawing(ground.copy(), ground, np.full((size, size), -1, np.int8))
        for _ in range(int(rng.random() * (self.recipe.distractors + 1))):
            self._distractor(drawing, rng)
        fewest, most = self.recipe.objects
        for _ in range(fewest + int(rng.random() * (most - fewest + 1))):
            self._object(drawing, rng, chances)
        return Scene(self.camera(drawing.pixels, rng), _visible(drawing), backdrop)

    def background(self, rng: np.random.Generator) -> tuple[Bytes, Backdrop]:
        """Draws what the objects stand before: [S, S, 3] pixels, and what they are called."""
        index = int(rng.random() * len(self._bank))
        texture, size = self._bank[index], self.recipe.size
        top, left = (int(rng.random() * (len(texture) - size + 1)) for _ in range(2))
        crop = texture[top : top + size, left : left + size]
        crop = crop[:: 1 if rng.random() < 0.5 else -1, :: 1 if rng.random() < 0.5 else -1]
        if rng.random() < 0.5:
            crop = crop.T
        name = list(BACKDROPS)[int(rng.random() * len(BACKDROPS))]
        base = np.array(BACKDROPS[name][::-1], np.float32) + rng.uniform(-12, 12) + rng.uniform(-7, 7, 3)
        reach = rng.uniform(8, 30) + rng.uniform(-8, 8, 3)
        ramp = np.linspace(-1, 1, 256)[:, None]
        table = np.clip(base + ramp * reach, 0, 255).astype(np.uint8)  # [256, 3]
        return np.take(table, crop, axis=0), Backdrop(name, TEXTURES[self._kinds[index]])

    def _distractor(self, drawing: _Drawing, rng: np.random.Generator) -> None:
        """A disc, a bar or a blob: something to see that has no name."""
        size = self.recipe.size
        side = int(size * rng.uniform(0.08, 0.28)) + 2
        shape = np.zeros((2 * side, 2 * side), np.uint8)
        kind = rng.random()
        if kind < 0.35:
            axes = (side * 9 // 20, int(side * rng.uniform(0.25, 0.45)))
            cv2.ellipse(shape, (side, side), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
        elif kind < 0.65:
            turn, reach = rng.uniform(0, math.pi), side * 0.45
            tip = np.array([math.cos(turn), math.sin(turn)]) * reach
            ends = [(side + int(sign * tip[0]), side + int(sign * tip[1])) for sign in (-1, 1)]
            cv2.line(shape, ends[0], ends[1], 255, max(2, int(side * rng.uniform(0.1, 0.3))), cv2.LINE_AA)
        else:
            angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
            waves = sum(rng.uniform(-0.12, 0.12) * np.sin(k * angles + rng.uniform(0, 6)) for k in (2, 3))
            radius = side * 0.36 * (1 + np.asarray(waves))
            points = np.stack([side + radius * np.cos(angles), side + radius * np.sin(angles)], -1)
            cv2.fillPoly(shape, [points.round().astype(np.int32)], 255, cv2.LINE_AA)
        patch = _trimmed(np.stack([shape, np.zeros_like(shape)], -1))
        self._somewhere(patch, rng)
        drawing.distractors.append((patch, self._paint(drawing, patch, rng)))

    def _object(
        self, drawing: _Drawing, rng: np.random.Generator, chances: NDArray[np.float64] | None
    ) -> None:
        """Adds one more object where it can be found; leaves it out when there is no room."""
        kinds = self.recipe.categories
        if drawing.categories and rng.random() < _REPEAT:
            category = drawing.categories[int(rng.random() * len(drawing.categories))]
        elif chances is None:
            category = kinds[int(rng.random() * len(kinds))]
        else:
            category = kinds[int(np.searchsorted(chances, rng.random(), "right"))]
        smallest, largest = (share * self.recipe.size for share in self.recipe.side)
        side, upon = rng.uniform(smallest, largest), bool(drawing.patches) and rng.random() < _OVERLAP
        patch = warped(category, side, rng)
        for attempt in range(_TRIES):
            if attempt in (4, 7, 9) and side > smallest:
                side = max(smallest, side * 0.75)
                patch = warped(category, side, rng)
            if upon and attempt < _TRIES // 2:
                self._beside(patch, drawing.patches[int(rng.random() * len(drawing.patches))], rng)
            else:
                self._somewhere(patch, rng)
            covered = self._covers(drawing, patch, upon)
            if covered is not None:
                break
        else:
            return
        index = len(drawing.patches)
        for other in covered:
            drawing.behind[other].add(index)
        under = [drawing.colors[other] for other in covered]
        under += [name for other, name in drawing.distractors if _shared(patch, other)]
        color = self._paint(drawing, patch, rng, under)
        drawing.owner[patch.window][patch.body] = index
        drawing.categories.append(category)
        drawing.colors.append(color)
        drawing.areas.append(int(patch.body.sum()))
        drawing.patches.append(patch)
        drawing.behind.append(set())

    def _somewhere(self, patch: _Patch, rng: np.random.Generator) -> None:
        height, width = patch.coverage.shape[:2]
        patch.left = int(rng.random() * (self.recipe.size - width + 1))
        patch.top = int(rng.random() * (self.recipe.size - height + 1))

    def _beside(self, patch: _Patch, other: _Patch, rng: np.random.Generator) -> None:
        size, (height, width) = self.recipe.size, patch.coverage.shape[:2]
        other_height, other_width = other.coverage.shape[:2]
        x = other.left + other_width / 2 + rng.uniform(-0.55, 0.55) * (width + other_width)
        y = other.top + other_height / 2 + rng.uniform(-0.55, 0.55) * (height + other_height)
        patch.left = min(max(int(x - width / 2), 0), size - width)
        patch.top = min(max(int(y - height / 2), 0), size - height)

    def _covers(self, drawing: _Drawing, patch: _Patch, may: bool) -> list[int] | None:
        """Returns which objects the patch would cover a part of; None where it must not lie."""
        if not may:
            for other in drawing.patches:
                if _shared(patch, other) > _CROWDED * min(patch.coverage.size, other.coverage.size) / 2:
                    return None
        under = drawing.owner[patch.window][patch.body]
        lost = np.bincount(under[under >= 0], minlength=len(drawing.patches))
        touched = [int(index) for index in np.flatnonzero(lost)]
        for index in touched:
            seen = int((drawing.owner[drawing.patches[index].window] == index).sum())
            if seen - int(lost[index]) < MIN_VISIBLE * drawing.areas[index]:
                return None
        return touched

    def _paint(
        self, drawing: _Drawing, patch: _Patch, rng: np.random.Generator, under: Sequence[str] = ()
    ) -> str:
        """Blends a patch into the image in a color that stands out; returns the color's name."""
        window = drawing.pixels[patch.window]
        near = [_lab(np.array([cv2.mean(drawing.ground[patch.window])[:3]], np.float32))[0]]
        near += [self._palette_lab[self._names.index(name)] for name in under]
        distances = np.min([np.linalg.norm(self._palette_lab - lab, axis=1) for lab in near], axis=0)
        fitting = np.flatnonzero(distances >= _CONTRAST)
        index = int(fitting[int(rng.random() * len(fitting))]) if len(fitting) else int(distances.argmax())
        color = np.clip(self._palette[index] + rng.uniform(-14, 14, 3).astype(np.float32), 0, 255)
        bright = float(color @ np.array([0.114, 0.587, 0.299], np.float32)) > 80
        lines = color * 0.35 if bright else color + (255 - color) * 0.6
        share = patch.coverage.astype(np.float32) * (1 / 255)
        body, inner = share[..., :1], share[..., 1:]
        paint = color + inner * (lines - color)
        window[...] = (window + body * (paint - window) + 0.5).astype(np.uint8)
        return self._names[index]

    def camera(self, pixels: Bytes, rng: np.random.Generator) -> Bytes:
        """Now and then a little blur, now and then a little noise."""
        if rng.random() < 0.15:
            pixels = np.asarray(cv2.GaussianBlur(pixels, (3, 3), 0), np.uint8)
        if rng.random() < 0.3:
            size = self.recipe.size
            top, left = (int(rng.random() * (len(self._noise) - size + 1)) for _ in range(2))
            noisy = pixels + self._noise[top : top + size, left : left + size]
            pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        return pixels


def _visible(drawing: _Drawing) -> list[Placed]:
    placed = []
    for index, (category, color) in enumerate(zip(drawing.categories, drawing.colors, strict=True)):
        mask = drawing.owner == index
        left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
        box, behind = (left, top, width, height), tuple(sorted(drawing.behind[index]))
        placed.append(Placed(category, color, mask, box, behind))
    return placed


def _shared(patch: _Patch, other: _Patch) -> int:
    """Returns how many pixels two patches' rectangles have in common."""
    (rows, columns), (other_rows, other_columns) = patch.window, other.window
    down = min(rows.stop, other_rows.stop) - max(rows.start, other_rows.start)
    across = min(columns.stop, other_columns.stop) - max(columns.start, other_columns.start)
    return int(max(down, 0) * max(across, 0))


def warped(category: Category, side: float, rng: np.random.Generator) -> _Patch:
    """Scales a pictogram to about `side` pixels, turns it a little and stretches it less."""
    choices = levels(category)
    level = next((one for one in reversed(choices) if max(one.shape) >= side), choices[0])
    height, width = level.shape[:2]
    turn, stretch = math.radians(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)), rng.uniform(0.9, 1.1)
    cos, sin, scale = math.cos(turn), math.sin(turn), side / max(height, width)
    if category.attribute == "tall":
        scale = side / max(height * _TALL, width / _TALL)
        stretch /= _TALL
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.diag([scale * stretch, scale / stretch])
    reach = np.abs(matrix) @ np.array([width, height])
    columns, rows = math.ceil(reach[0]) + 2, math.ceil(reach[1]) + 2
    shift = np.array([columns, rows]) / 2 - matrix @ np.array([width, height]) / 2
    affine = np.concatenate([matrix, shift[:, None]], axis=1)
    return _trimmed(np.asarray(cv2.warpAffine(level, affine, (columns, rows), flags=cv2.INTER_LINEAR)))


def _trimmed(coverage: NDArray[Any]) -> _Patch:
    """Cuts a patch to its body's bounds and one pixel of soft edge around them."""
    body = np.ascontiguousarray(coverage[..., 0] > _COVERED).view(np.uint8)
    left, top, width, height = cv2.boundingRect(body)
    rows = slice(max(top - 1, 0), top + height + 1)
    columns = slice(max(left - 1, 0), left + width + 1)
    return _Patch(np.asarray(coverage[rows, columns], np.uint8))


def _lab(colors: Floats) -> Floats:
    """Converts [N, 3] BGR, 0 to 255, to CIE Lab."""
    lab = cv2.cvtColor(colors[None] / np.float32(255), cv2.COLOR_BGR2LAB)[0]
    return np.asarray(lab, np.float32)


def _texture(kind: str, side: int, size: int, rng: np.random.Generator) -> Bytes:
    """Returns [side, side] of one kind of texture, full range, for images of `size` pixels."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    turn = rng.uniform(0, math.pi)
    along = columns * math.cos(turn) + rows * math.sin(turn)
    across = rows * math.cos(turn) - columns * math.sin(turn)
    period = rng.uniform(size / 14, size / 5)
    if kind == "gradient":
        field = along + 0.3 * size * _smooth(side, 2, rng)
    elif kind == "blotches":
        field = np.tanh(rng.uniform(1, 4) * _smooth(side, int(rng.integers(5, 14)), rng))
    elif kind == "stripes":
        field = np.tanh(rng.uniform(0.5, 3) * np.sin(2 * math.pi * along / period))
    elif kind == "grain":
        field = cv2.GaussianBlur(rng.normal(size=(side, side)), (0, 0), rng.uniform(0.5, 1.2))
    elif kind == "mottle":
        field = sum((_smooth(side, 3 * 2**k, rng) / 1.6**k for k in range(4)), np.zeros((side, side)))
    elif kind == "waves":
        bend = period * 0.5 * np.sin(2 * math.pi * across / (period * rng.uniform(2, 4)))
        field = np.sin(2 * math.pi * (along + bend) / period)
    else:
        fine = 2 * math.pi / max(3.0, period / 3)
        field = np.sin(fine * along) * np.sin(fine * across)
    low, high = np.percentile(field, (1, 99))
    return np.asarray(np.clip((field - low) / max(high - low, 1e-6), 0, 1) * 255, np.uint8)


def _smooth(side: int, cells: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth noise of about unit deviation with `cells` bumps to a side."""
    coarse = rng.normal(size=(cells + 3, cells + 3))
    return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), np.float64)
