"""Regions of images as queries: what is found looks like a region that was shown, without a name for it.

CLIP's embeddings of two regions are nearer to each other than any text is to a region. So that a score means
something, a region competes with other parts of the image that it was shown in, and with no words.
"""

# n boxes, M parts beside a region, D embedding size
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clip_base.images.inputs import read_image
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import is_file
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.inference.predictor import Predictor

QUERY_HELP = (
    "a region of an image to look for instead of names: IMAGE:x1,y1,x2,y2 in pixels; NAME=IMAGE:… names it; "
    "several have ; between them, and those of one name are averaged"
)
GRIDS = (2, 3, 5)  # cells a side into which the image is cut for what is beside a region
TOUCHES = 0.1  # share of a cell, or of the region, above which the cell shows the region
_FORM = re.compile(r"(?:(?P<name>[^=;]+)=)?(?P<image>.+):(?P<box>[^:]+)", re.DOTALL)


@dataclass(frozen=True)
class RegionQuery:
    """A region that is shown.

    Attributes:
        name: what it is called in the results.
        image: the image's file.
        box: (x1, y1, x2, y2) in its pixels, rotated by its EXIF orientation.
    """

    name: str
    image: Path
    box: tuple[float, float, float, float]


def parse_queries(text: str) -> list[RegionQuery]:
    """Returns the regions that a user typed, see `QUERY_HELP`.

    Raises:
        InputError: one is of another form, its image does not exist, or its box has no area.
    """
    queries = []
    for part in (part.strip() for part in text.split(";")):
        if not part:
            continue
        found = _FORM.fullmatch(part)
        try:
            sides = [float(side) for side in found["box"].split(",")] if found else []
        except ValueError:
            sides = []
        if found is None or len(sides) != 4:
            raise InputError(f"query {quote(part)} is not IMAGE:x1,y1,x2,y2, such as photo.jpg:10,20,110,220")
        x1, y1, x2, y2 = sides
        image = Path(found["image"])
        if not is_file(image):
            raise InputError(f"query image {image} does not exist")
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise InputError(f"query {quote(part)}: a box is x1,y1,x2,y2 with 0 ≤ x1 < x2 and 0 ≤ y1 < y2")
        queries.append(RegionQuery((found["name"] or f"like {image.stem}").strip(), image, (x1, y1, x2, y2)))
    if not queries:
        raise InputError("query= names no region; give IMAGE:x1,y1,x2,y2")
    return queries


def vocabulary_of(predictor: Predictor, queries: Sequence[RegionQuery]) -> Vocabulary:
    """Returns what makes a predictor look for regions, see `Vocabulary.from_regions`.

    Raises:
        InputError: an image does not decode, or a box covers nothing of it.
    """
    shown: dict[str, list[Tensor]] = {}
    beside: list[Tensor] = []
    for query in queries:
        height, width = read_image(query.image)[1]
        boxes = torch.cat([torch.tensor([query.box]), parts_beside(query.box, height, width)])
        features = predictor.region_features(query.image, boxes)  # [1 + M, D]
        shown.setdefault(query.name, []).append(features[:1])
        beside.append(features[1:])
    regions = {name: torch.cat(features) for name, features in shown.items()}
    return Vocabulary.from_regions(regions, torch.cat(beside))


def parts_beside(box: Sequence[float], height: int, width: int) -> Tensor:
    """Returns [M, 4], the cells of coarse and fine grids over an image that show (nearly) nothing of a box.

    Args:
        box: (x1, y1, x2, y2) in pixels.
        height: the image's, in pixels.
        width: the image's.
    """
    cells = []
    for count in GRIDS:
        size = torch.tensor([width / count, height / count])
        corners = torch.cartesian_prod(torch.arange(count), torch.arange(count)) * size
        cells.append(torch.cat([corners, corners + size], 1))
    boxes, region = torch.cat(cells), torch.tensor(box, dtype=torch.float32)
    lower, upper = torch.maximum(boxes[:, :2], region[:2]), torch.minimum(boxes[:, 2:], region[2:])
    common = (upper - lower).clamp(min=0).prod(1)
    areas = torch.minimum((boxes[:, 2:] - boxes[:, :2]).prod(1), (region[2:] - region[:2]).prod())
    return boxes[common < TOUCHES * areas]
