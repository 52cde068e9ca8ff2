"""Images with boxes and readable names on them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clip_base.images.decode import Pixels, resize
from clip_base.images.inputs import ImageLike, read_image
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# What images are written as, by their ending.
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
# An image whose long side is shorter is enlarged by a whole factor until text can stand in it.
READABLE_SIDE = 384
# Pixels of the longer side of an image on a page: below, it is enlarged by a whole factor; above, reduced.
PAGE_SIDE = (640, 1280)
GRAY = (150, 150, 150)
GOLDEN_RATIO = 0.618034


class NamedBoxes(Protocol):
    """What `draw` needs of `Detections`: N boxes in one image, with scores and names."""

    @property
    def boxes(self) -> Tensor:
        """[N, 4] (x1, y1, x2, y2) in pixels of an image of `size`."""
        ...

    @property
    def scores(self) -> Tensor:
        """[N] in [0, 1]."""
        ...

    @property
    def labels(self) -> Tensor:
        """[N] int64; boxes of one label have one color."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        ...

    @property
    def captions(self) -> list[str]:
        """What is written at each box: its name and score."""
        ...


def draw(
    image: ImageLike,
    detections: NamedBoxes | None = None,
    *,
    boxes: Tensor | Sequence[Sequence[float]] | None = None,
    texts: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
    highlight: int | None = None,
) -> Image.Image:
    """Returns a copy of the image with boxes drawn and named; small ones are enlarged (`enlargement`).

    Args:
        image: in any form that `clip_base.images.inputs.read_image` takes.
        detections: what to draw; named "dog 0.91", one color per name. They may come from the same image at
            another size.
        boxes: instead of detections: [N, 4] (x1, y1, x2, y2) in pixels of `image`.
        texts: what to write at each box; an empty text writes nothing. With detections: instead of their
            names.
        colors: each box's color (red, green, blue), 0 to 255; else a color for each different text.
        highlight: the number of one box that is drawn on top, all others in gray and without text.

    Raises:
        InputError: the image does not decode, or has other proportions than that of the detections.
    """
    pixels, size = read_image(image)
    if detections is not None and boxes is None:
        boxes = detections.boxes
        frame = _same_proportions(detections.size, size)
        texts = detections.captions if texts is None else texts
        colors = colors or [color_of(label) for label in detections.labels.tolist()]
        order = detections.scores.argsort(stable=True).tolist()  # the best last, on top
    elif boxes is not None and detections is None:
        frame, order = size, list(range(len(boxes)))
    else:
        raise ValueError("draw needs either detections or boxes, not both")
    rectangles = boxes.tolist() if isinstance(boxes, Tensor) else boxes
    texts = [""] * len(rectangles) if texts is None else texts
    if colors is None:
        different = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        colors = [color_of(different[text]) for text in texts]
    if not len(rectangles) == len(texts) == len(colors):
        raise ValueError(
            f"{len(rectangles)} boxes, {len(texts)} texts, {len(colors)} colors: give one per box"
        )
    if highlight is not None:
        order = [*(number for number in order if number != highlight), highlight]
        texts = [text if number == highlight else "" for number, text in enumerate(texts)]
        colors = [color if number == highlight else GRAY for number, color in enumerate(colors)]

    canvas = Image.fromarray(pixels)
    factor = enlargement(canvas.width, canvas.height)
    if factor > 1:
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    wide, high = canvas.width / frame[1], canvas.height / frame[0]
    scaled = [
        _within((x1 * wide, y1 * high, x2 * wide, y2 * high), canvas.size) for x1, y1, x2, y2 in rectangles
    ]
    _draw_boxes(canvas, [scaled[i] for i in order], [colors[i] for i in order])
    _draw_texts(canvas, [scaled[i] for i in order], [texts[i] for i in order], [colors[i] for i in order])
    return canvas


def save_image(image: Image.Image, path: Path) -> None:
    """Writes an image in the form that its path's ending, one of `FORMATS`, says; whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, format=FORMATS[path.suffix.lower()], quality=92)


def enlargement(width: int, height: int) -> int:
    """Returns the whole factor by which `draw` enlarges an image: 3 for 128 pixels, 1 from 384 on."""
    return max(1, -(-READABLE_SIDE // max(width, height)))


def fit_page(pixels: Pixels) -> Pixels:
    """Returns an image [h, w, 3] whose longer side has a number of pixels within `PAGE_SIDE`."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    factor = min(-(-PAGE_SIDE[0] // longer), PAGE_SIDE[1] / longer)
    return resize(pixels, max(1, round(width * factor)), max(1, round(height * factor)))


def color_of(number: int) -> Color:
    """Returns a strong color; neighboring numbers get very different ones (hues a golden section apart)."""
    hue = (0.03 + number * GOLDEN_RATIO) % 1.0
    lightness, saturation = ((0.50, 0.95), (0.62, 0.85), (0.40, 0.90))[number // 13 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the sans-serif font that ships with matplotlib, `size` pixels high."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _same_proportions(wanted: tuple[int, int], found: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) as wanted when an image of the size found may be that one at another size."""
    (height, width), (h, w) = wanted, found
    if abs(h * width - w * height) > height + width:  # more than a size rounded to whole pixels explains
        raise InputError(
            f"the detections belong to an image of {width}x{height} pixels, this one has {w}x{h}; give that "
            "image"
        )
    return wanted


def _within(box: Rectangle, size: tuple[int, int]) -> Rectangle:
    """Cuts a box at the image's edges, so that all its sides can be seen."""
    x1, y1, x2, y2 = box
    width, height = size
    left, right = sorted((min(max(x1, 0), width - 1), min(max(x2, 0), width - 1)))
    top, bottom = sorted((min(max(y1, 0), height - 1), min(max(y2, 0), height - 1)))
    return round(left), round(top), round(right), round(bottom)


def _draw_boxes(canvas: Image.Image, boxes: Sequence[Rectangle], colors: Sequence[Color]) -> None:
    pen = ImageDraw.Draw(canvas)
    thick = max(2, round(min(canvas.size) / 220))
    for box, color in zip(boxes, colors, strict=True):
        # A dark line around the colored one keeps it visible on any ground.
        outer = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        pen.rectangle(outer, outline=(20, 20, 20), width=1)
        pen.rectangle(box, outline=color, width=thick)


def _draw_texts(
    canvas: Image.Image, boxes: Sequence[Rectangle], texts: Sequence[str], colors: Sequence[Color]
) -> None:
    pen = ImageDraw.Draw(canvas)
    letters = font(max(11, round(max(canvas.size) / 50)))
    pad = max(2, letters.size // 5)
    ascent, descent = letters.getmetrics()
    high = ascent + descent + pad
    taken: list[Rectangle] = []
    # The last box is the most important one: it chooses its place first.
    for box, text, color in reversed(list(zip(boxes, texts, colors, strict=True))):
        if not text:
            continue
        wide = min(pen.textlength(text, font=letters) + 2 * pad, canvas.width)
        place = _place(box, wide, high, canvas.size, taken)
        taken.append(place)
        pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
        ink = (0, 0, 0) if _luminance(color) > 0.45 else (255, 255, 255)
        pen.text((place[0] + pad, place[1] + pad / 2), text, fill=ink, font=letters)


def _place(
    box: Rectangle, wide: float, high: float, size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Returns where a label goes: near its box, inside the image, off other labels if there is room."""
    x1, y1, x2, y2 = box
    width, height = size
    tops = (y1 - high, y1, y2, y2 - high, y1 + high, y1 - 2 * high, y2 + high)
    best, least = None, 0.0
    small = (x2 - x1) * (y2 - y1) < 4 * wide * high
    for top in tops:
        for left in (x1, x2 - wide):
            left = min(max(left, 0), max(width - wide, 0))
            inside = min(max(top, 0), max(height - high, 0))
            place = (round(left), round(inside), round(left + wide), round(inside + high))
            # Moved into the image it would stand away from where it was meant to; another place may be
            # better.
            cost = sum(_shared(place, other) for other in taken) + abs(inside - top) * wide / 4
            if small:  # a label must not hide the object it names
                cost += _shared(place, box)
            if best is None or cost < least:
                best, least = place, cost
            if not cost:
                return place
    assert best is not None
    return best


def _shared(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _luminance(color: Color) -> float:
    """Relative luminance, roughly (the weights of ITU-R BT.709)."""
    red, green, blue = (float((side / 255) ** 2.2) for side in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
