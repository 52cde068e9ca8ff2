"""The categories of the synthetic dataset: pictograms of DejaVu Sans, which ships with matplotlib.

Every entry was looked at: the name says what the glyph shows, which is not always the name that Unicode gave
it (the fleur-de-lis of this font is a turtle, the chess queen a crown). The first are the easiest to tell
apart, so that a small dataset (the first N) is easy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LARGEST_LEVEL = 256
"""Longest side, in pixels, of the sharpest rendering of a pictogram."""

_SMALLEST_LEVEL = 16
_MARGIN = 2


@dataclass(frozen=True)
class Category:
    """A kind of thing that a scene can show.

    Attributes:
        name: English singular, as prompts and category lists use it ("scissors" stands as it is).
        code: the glyph's code point.
        group: COCO's `supercategory`.
        hollow: the glyph is a line drawing; it is painted as a filled body with darker lines.
        filled: the glyph is an outline with nothing inside; it is painted as one solid body.
        single: only the glyph's largest connected part is used (the snowman without its snow).
        paired: the noun is counted in pairs ("two pairs of scissors").
        bold: pixels by which thin lines are thickened on either side, of a font size of 512.
        irregular: the plural where adding s or es does not make it.
        synonyms: other nouns for it, with regular plurals; captions use them where the dataset has synonyms.
        attribute: one of `ATTRIBUTES` that is drawn and that the name begins with, or nothing.
    """

    name: str
    code: int
    group: str
    hollow: bool = False
    filled: bool = False
    single: bool = False
    paired: bool = False
    bold: int = 0
    irregular: str = ""
    synonyms: tuple[str, ...] = ()
    attribute: str = ""

    @property
    def plural(self) -> str:
        """The noun for several of them; a paired noun is its own plural."""
        if self.irregular or self.paired:
            return self.irregular or self.name
        return self.name + ("es" if self.name.endswith(("s", "x", "ch", "sh")) else "s")


TABLE: tuple[Category, ...] = (
    Category("airplane", 0x2708, "vehicle", synonyms=("plane",)),
    Category("anchor", 0x2693, "vehicle"),
    Category("umbrella", 0x2602, "household", bold=4, synonyms=("parasol",)),
    Category("scissors", 0x2702, "tool", paired=True),
    Category("snowflake", 0x2744, "weather"),
    Category("heart", 0x2665, "shape"),
    Category("skull", 0x2620, "body", hollow=True),
    Category("star", 0x2605, "shape"),
    Category("telephone", 0x260E, "household", synonyms=("phone",)),
    Category("sun", 0x2600, "weather"),
    Category("cup", 0x2615, "household", hollow=True, single=True, synonyms=("mug",)),
    Category("clover", 0x2618, "plant", synonyms=("shamrock",)),
    Category("envelope", 0x2709, "office", hollow=True),
    Category("flag", 0x2691, "sign", synonyms=("banner",)),
    Category("gear", 0x2699, "tool", synonyms=("cogwheel",)),
    Category("cat", 0x1F431, "animal", hollow=True, synonyms=("kitten",)),
    Category("cloud", 0x2601, "weather"),
    Category("hand", 0x261B, "body"),
    Category("crown", 0x265B, "clothing", synonyms=("diadem",)),
    Category("horse", 0x265E, "animal", synonyms=("stallion",)),
    Category("wheel", 0x2638, "vehicle"),
    Category("pencil", 0x270E, "office", hollow=True),
    Category("hammer", 0x2692, "tool"),
    Category("moon", 0x263D, "weather", filled=True, synonyms=("crescent",)),
    Category("house", 0x2302, "building", filled=True, synonyms=("cottage",)),
    Category("wheelchair", 0x267F, "vehicle"),
    Category("sword", 0x2694, "tool", bold=6, synonyms=("blade",)),
    Category("flower", 0x273F, "plant", synonyms=("blossom",)),
    Category("note", 0x266A, "music", synonyms=("quaver",)),
    Category("snowman", 0x2603, "weather", hollow=True, single=True, irregular="snowmen"),
    Category("arrow", 0x27A1, "sign", synonyms=("pointer",)),
    Category("mouse", 0x1F42D, "animal", hollow=True, irregular="mice", synonyms=("rodent",)),
    Category("balance", 0x2696, "tool", bold=5),
    Category("tulip", 0x2698, "plant"),
    Category("atom", 0x269B, "science", bold=9),
    Category("turtle", 0x269C, "animal", hollow=True, synonyms=("tortoise",)),
    Category("warning sign", 0x26A0, "sign", hollow=True, synonyms=("danger sign",)),
    Category("bolt", 0x26A1, "weather", bold=6, synonyms=("thunderbolt",)),
    Category("vase", 0x26B1, "household", filled=True, synonyms=("urn",)),
    Category("chain", 0x26AD, "tool"),
    Category("drum", 0x26C1, "music", hollow=True),
    Category("pen", 0x2712, "office"),
    Category("checkmark", 0x2714, "sign", synonyms=("tick",)),
    Category("asterisk", 0x2731, "sign"),
    Category("keyboard", 0x2328, "office", hollow=True),
    Category("bowtie", 0x22C8, "clothing", filled=True),
    Category("target", 0x25CE, "game", hollow=True, synonyms=("bullseye",)),
    Category("domino", 0x1F081, "game", hollow=True, irregular="dominoes"),
    Category("card", 0x1F0A1, "game", hollow=True, synonyms=("playing card",)),
    Category("cow", 0x1F42E, "animal", hollow=True, synonyms=("heifer",)),
    Category("monkey", 0x1F435, "animal", hollow=True, synonyms=("ape",)),
    Category("smiley", 0x263A, "face", hollow=True, synonyms=("smiling face",)),
    Category("devil", 0x1F608, "face", hollow=True, synonyms=("demon",)),
    Category("angel", 0x1F607, "face", hollow=True),
    Category("dart", 0x27B5, "game", bold=4),
    Category("leaf", 0x2766, "plant", irregular="leaves", bold=3),
    Category("trident", 0x2646, "tool", bold=3, synonyms=("pitchfork",)),
    Category("spade", 0x2660, "game"),
    Category("diamond", 0x2666, "game", synonyms=("rhombus",)),
    Category("pawn", 0x265F, "game"),
    Category("tower", 0x265C, "building", synonyms=("rook",)),
    Category("bishop", 0x265D, "game"),
    Category("biohazard", 0x2623, "science", bold=4),
    Category("fan", 0x2622, "household", synonyms=("ventilator",)),
    Category("snake", 0x2695, "animal", bold=9, synonyms=("serpent",)),
    Category("peace sign", 0x262E, "sign"),
    Category("triangle", 0x25B2, "shape"),
    Category("mirror", 0x2640, "household", hollow=True, synonyms=("looking glass",)),
    Category("horseshoe", 0x03A9, "household"),
    Category("pinwheel", 0x2743, "shape", synonyms=("whirligig",)),
    Category("ampersand", 0x0026, "sign"),
    Category("question mark", 0x003F, "sign"),
    Category("coffin", 0x26B0, "household", filled=True),
    Category("king", 0x265A, "game"),
    Category("ankh", 0x2625, "shape", bold=3),
    Category("bull", 0x2649, "animal"),
    Category("cross", 0x271A, "shape", synonyms=("plus sign",)),
)
"""All categories, the easiest to tell apart first."""

ATTRIBUTES = ("striped", "tall")
"""How a variant of a category may look: painted with diagonal stripes, or stretched in height."""

_STRIPES = 5  # pairs of stripes along the longest side


def with_variants(categories: Sequence[Category], attributes: Sequence[str]) -> tuple[Category, ...]:
    """Returns the categories, followed for each attribute by variants of all of them.

    Args:
        categories: without attributes.
        attributes: some of `ATTRIBUTES`. "tall" makes "star" another category, "tall star".
    """
    variants = [
        replace(
            category,
            name=f"{attribute} {category.name}",
            irregular=f"{attribute} {category.irregular}" if category.irregular else "",
            synonyms=tuple(f"{attribute} {noun}" for noun in category.synonyms),
            attribute=attribute,
        )
        for attribute in attributes
        for category in categories
    ]
    return (*categories, *variants)


def font_path() -> Path:
    """Returns where matplotlib keeps DejaVu Sans."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def levels(category: Category) -> tuple[NDArray[np.uint8], ...]:
    """Returns a pictogram at falling resolutions, the longest side 256, 128, 64, 32 and 16 pixels.

    Each is [h, w, 2] uint8 with an empty margin of two pixels: how much of the pixel the body covers, and how
    much its inner lines do (zero everywhere for a solid pictogram).
    """
    body = _glyph(category.code, category.bold)
    if category.single:
        body = _largest_part(body)
    drawn = body
    if category.hollow or category.filled:
        body = np.maximum(body, _silhouette(body))
    lines = drawn if category.hollow else np.zeros_like(body)
    if category.attribute == "striped":
        rows, columns = np.indices(body.shape)
        stripes = ((rows + columns) * _STRIPES / max(body.shape)) % 1 < 0.5
        lines = np.maximum(lines, np.minimum(body, stripes * np.uint8(255)))
    both = np.stack([body, lines], axis=-1)
    made, side = [], LARGEST_LEVEL
    while side >= _SMALLEST_LEVEL:
        made.append(_shrunk(both, side))
        side //= 2
    return tuple(made)


def _glyph(code: int, bold: int) -> NDArray[np.uint8]:
    """Renders a glyph well above the sharpest level and cuts it to its bounds: [h, w] coverage, 0 to 255."""
    font = ImageFont.truetype(str(font_path()), 2 * LARGEST_LEVEL)
    left, top, right, bottom = font.getbbox(chr(code), stroke_width=bold)
    canvas = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8), 0)
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), chr(code), font=font, fill=255, stroke_width=bold)
    pixels = np.asarray(canvas)
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        raise RuntimeError(f"{font_path()} has no image for U+{code:04X}; is this matplotlib's own font?")
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _largest_part(glyph: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keeps the connected part with the largest outer contour, and all that lies inside it."""
    outlines, _ = cv2.findContours((glyph > 64).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    keep = np.zeros_like(glyph)
    cv2.drawContours(keep, [max(outlines, key=cv2.contourArea)], -1, 255, cv2.FILLED)
    left, top, width, height = cv2.boundingRect(keep)
    return np.minimum(glyph, keep)[top : top + height, left : left + width]


def _silhouette(glyph: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fills everything that the glyph's outer lines enclose."""
    outlines, _ = cv2.findContours((glyph > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(glyph)
    cv2.drawContours(filled, outlines, -1, 255, cv2.FILLED)
    return filled


def _shrunk(both: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Averages [h, w, 2] down to a longest side of `side` pixels and adds the margin."""
    scale = side / max(both.shape[:2])
    width, height = max(1, round(both.shape[1] * scale)), max(1, round(both.shape[0] * scale))
    small = cv2.resize(both, (width, height), interpolation=cv2.INTER_AREA)
    padded = np.pad(small, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)))
    return padded.astype(np.uint8)
