"""Queries of the demo page: images, embedded names and detections are cached; thresholds only filter.

Requests share the models and leave nothing behind in them: the names are part of a query.
"""

# N detections of an image, D embedding size
from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from torch import Tensor

from clip_base.images.decode import Pixels
from clip_base.images.inputs import read_upright
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.categories import parse_typed_names
from regionclip.inference.predictor import Predictor
from regionclip.inference.region_query import RegionQuery, vocabulary_of
from regionclip.structures.boxes import nms, smallest_at, xyxy_to_xywh
from regionclip.structures.detections import Detections
from regionclip.structures.drawing import draw, fit_page

T = TypeVar("T")

MAX_NAMES = 2000  # that are typed; embedding more takes minutes on a CPU
NEAREST = 10  # names told of a clicked box
TYPED = "the names above"
REGION = "like "  # how the name of a chosen box begins
MAX_REGIONS = 500


class UploadedImage(NamedTuple):
    """An uploaded image."""

    pixels: Pixels  # [h, w, 3] uint8 RGB, upright; reduced when the image is very large
    size: tuple[int, int]  # the image's own (height, width)
    shown: Pixels  # at the size for the page, see `fit_page`


class Query(NamedTuple):
    """What a page asks: an uploaded file, the names to look for, and which detections to show."""

    path: str
    names: tuple[str, ...]
    score: float  # the lowest, in [0, 1]
    overlap: float  # the largest IoU of two shown boxes of one name, in [0, 1]; 1 drops none
    max_boxes: int  # the best ones


class LoadedModel(NamedTuple):
    """A detector, and what it is called on the page."""

    title: str
    predictor: Predictor


class Answer:
    """What one model finds for a query, best first. The shown boxes are numbered from 0."""

    def __init__(self, query: Query, image: UploadedImage, found: Detections) -> None:
        self.query, self.image = query, image
        self.found = found  # all of them, in pixels of the original image
        above = (found.scores >= query.score).nonzero().flatten()
        kept = above[nms(found.boxes[above], found.scores[above], found.labels[above], query.overlap)]
        self.rows: list[int] = kept[: query.max_boxes].tolist()  # of `found`: those that are shown
        self.shown = found[self.rows]
        self.boxes = range(len(self.rows))

    def drawn(self, chosen: int | None = None) -> Image.Image:
        """Returns the image with the shown boxes; with a chosen one, that one alone in its color."""
        return draw(self.image.shown, self.shown, highlight=chosen if chosen in self.boxes else None)

    def table(self) -> list[list[Any]]:
        """Returns one row per shown box: number from 1, name, score; left, top, width, height in pixels."""
        sides = xyxy_to_xywh(self.shown.boxes.round()).int().tolist()
        rows = zip(self.shown.class_names, self.shown.scores.tolist(), sides, strict=True)
        return [[number, name, f"{score:.2f}", *box] for number, (name, score, box) in enumerate(rows, 1)]

    def summary(self) -> str:
        """Returns one line on what is shown and what is not."""
        (height, width), captions = self.found.size, self.found.captions
        if not captions:
            return f"Nothing was found in {width} × {height} pixels."
        if not self.rows:
            return f"No box reaches {self.query.score:.2f}; the best is {captions[0]}. Lower the score."
        return f"{len(self.rows)} of {len(captions)} boxes in {width} × {height} pixels."

    def results(self) -> list[dict[str, Any]]:
        """Returns the shown boxes in COCO's results format; category ids count the names from 1."""
        entries = self.shown.to_coco(1, range(1, len(self.query.names) + 1))
        named = zip(entries, self.shown.class_names, strict=True)
        file = Path(self.query.path).name
        return [{**entry, "category_name": name, "file_name": file} for entry, name in named]

    def box_at(self, x: float, y: float) -> int | None:
        """Returns the smallest shown box that holds a point of `drawn()`, in its pixels, or None."""
        height, width = self.image.shown.shape[:2]
        return smallest_at(self.shown.resized((height, width)).boxes, x, y)


class DemoSession:
    """Answers the page's queries with one model, or two to compare; keeps what was computed last.

    `lists` has more names for a clicked region, by title; larger images than `max_megapixels` are refused.
    """

    def __init__(
        self, models: Sequence[LoadedModel], lists: Mapping[str, Sequence[str]], max_megapixels: float
    ) -> None:
        self.models, self.lists, self.max_megapixels = models, lists, max_megapixels
        # A predictor looks for one vocabulary at a time: the holder of the lock sets it.
        self._lock = threading.RLock()
        self._regions: dict[str, RegionQuery] = {}  # what names stand for boxes
        self._numbers = itertools.count(1)
        self.image = cached(4, self._read, threading.RLock())
        self._vocabulary = cached(64, self._embed_names, self._lock)
        self._found = cached(128, self._detect, self._lock)
        self._features = cached(128, self._embed_regions, self._lock)

    def query(self, path: str, text: str, score: float, overlap: float, max_boxes: float) -> Query:
        """Returns a query that can be answered; an InputError tells what is wrong with image or names."""
        if not path:
            raise InputError("drop an image, or choose one of the examples")
        query = Query(path, tuple(parse_typed_names(text, MAX_NAMES)), score, overlap, int(max_boxes))
        self.image(path)
        return query

    def answer(self, query: Query, which: int) -> Answer:
        """Returns what model number `which` finds."""
        return Answer(query, self.image(query.path), self._found(which, query.path, query.names))

    def region_name(self, query: Query, which: int, box: int) -> str:
        """Returns a name that stands for a shown box, to look for what it shows in other images."""
        answer = self.answer(query, which)
        corners = tuple(answer.shown.boxes[box].tolist())
        label = f"{REGION}{answer.shown.class_names[box]} in {Path(query.path).stem}"
        name = f"{label.replace(',', ' ')[:80]} #{next(self._numbers)}"
        x1, y1, x2, y2 = corners
        self._regions[name] = RegionQuery(name, Path(query.path), (x1, y1, x2, y2))
        if len(self._regions) > MAX_REGIONS:
            del self._regions[next(iter(self._regions))]
        return name

    def nearest(self, query: Query, which: int, box: int, title: str) -> tuple[str, dict[str, float]]:
        """Returns a line on a shown box, and its nearest names in a list, or `TYPED`, with probabilities."""
        answer, among = self.answer(query, which), query.names if title == TYPED else self.lists[title]
        features = self._features(which, query.path, query.names)
        with self._lock:
            predictor = self._looking_for(which, tuple(among))
            (names,) = predictor.classify_embeddings(features[answer.rows[box]], NEAREST)
        line = f"**Box {box + 1}: {answer.shown.captions[box]}.** Nearest among {len(among)} names:"
        return line, dict(names)

    def _read(self, path: str) -> UploadedImage:
        file = Path(path)
        if not file.exists():
            raise InputError(f"{file.name} has been deleted; drop it again")
        try:
            pixels, size = read_upright(file, self.max_megapixels)
        except InputError as error:  # who asks need not know the folder
            raise InputError(str(error).replace(path, file.name)) from None
        return UploadedImage(pixels, size, fit_page(pixels))

    def _looking_for(self, which: int, names: tuple[str, ...]) -> Predictor:
        self.models[which].predictor.set_vocabulary(self._vocabulary(which, names))
        return self.models[which].predictor

    def _embed_names(self, which: int, names: tuple[str, ...]) -> Vocabulary:
        predictor = self.models[which].predictor
        regions = [self._regions[name] for name in names if name in self._regions]
        if regions and len(regions) < len(names):
            raise InputError(
                "boxes that were chosen and words cannot be looked for together; remove one kind"
            )
        if not regions and any(name.startswith(REGION) and "#" in name for name in names):
            raise InputError(f"{names[0]!r} stands for a box that is no longer known; choose it again")
        for region in regions:
            self.image(str(region.image))  # which says when it has been deleted
        predictor.set_vocabulary(vocabulary_of(predictor, regions) if regions else names)
        vocabulary = self.models[which].predictor.detector.vocabulary
        assert vocabulary is not None
        return vocabulary

    def _detect(self, which: int, path: str, names: tuple[str, ...]) -> Detections:
        image = self.image(path)
        return self._looking_for(which, names).detect_batch([(image.pixels, image.size)])[0]

    def _embed_regions(self, which: int, path: str, names: tuple[str, ...]) -> Tensor:  # [N, D]
        pixels, found = self.image(path).pixels, self._found(which, path, names)
        boxes = found.resized((pixels.shape[0], pixels.shape[1])).boxes
        return self.models[which].predictor.region_features(pixels, boxes)


def cached(size: int, compute: Callable[..., T], lock: threading.RLock) -> Callable[..., T]:
    """Returns `compute` with an LRU cache whose known values are returned without waiting.

    A value that several want at once is computed once; `lru_cache` alone computes it for each of them.
    """
    latest = lru_cache(size)(compute)

    def once(*key: Any) -> T:
        with lock:
            return latest(*key)

    return lru_cache(size)(once)
