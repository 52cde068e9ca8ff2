"""What the page asks: pictures read and looked at once, names embedded once, thresholds moved at will.

Requests share the checkpoints and leave nothing behind in them: what one looks for is part of its question.
"""

# N detections of a picture, C names, D embedding size
from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from clip_base.images.decode import Pixels, resize
from clip_base.images.inputs import read_upright
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.categories import CLASS_LISTS, check_names, parse_names
from regionclip.inference.predictor import Predictor
from regionclip.structures.boxes import area, nms
from regionclip.structures.detections import Detections
from regionclip.structures.drawing import Color, color_of, draw

K = TypeVar("K")
V = TypeVar("V")

MOST_NAMES = 2000  # that are typed; embedding more takes minutes on a CPU
LONGEST_NAME = 100  # characters
# Pixels of the longer side of the picture on the page: fewer are enlarged by a whole factor, more reduced.
SHOWN = (640, 1280)
NEAREST = 10
GREY = (150, 150, 150)
MILLION = 1e6
TYPED = "the names above"


class Kept(Generic[K, V]):
    """Answers to the latest questions; one that several ask at once is worked out once.

    Args:
        most: how many answers are kept; the oldest goes first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._answers: dict[K, V] = {}
        self._lock = threading.Lock()

    def __call__(self, question: K, work_out: Callable[[], V]) -> V:
        """Returns the kept answer, else what `work_out` returns. Known answers wait for nobody."""
        if question in (answers := self._answers):
            return answers[question]
        with self._lock:
            if question not in self._answers:
                answer = work_out()
                kept = list(self._answers.items())[-self.most + 1 :] if self.most > 1 else []
                self._answers = {**dict(kept), question: answer}
            return self._answers[question]


@dataclass(frozen=True)
class Limits:
    """What may be uploaded.

    Attributes:
        megabytes: of a file, in millions of bytes.
        megapixels: of a picture, in millions.
    """

    megabytes: float
    megapixels: float


@dataclass(frozen=True, eq=False)
class Photo:
    """An uploaded picture.

    Attributes:
        key: sha256 of the file.
        pixels: [h, w, 3] uint8 RGB, upright; reduced when the picture is very large.
        size: the picture's own (height, width).
        shown: `pixels` in the size for the page, see `for_page`.
    """

    key: str
    pixels: Pixels
    size: tuple[int, int]
    shown: Pixels


@dataclass(frozen=True)
class Thresholds:
    """Which of the detections are shown.

    Attributes:
        score: the least score, in [0, 1].
        overlap: the largest IoU of two shown boxes of a name, in [0, 1]; 1 drops none.
        most: how many boxes at most, the best.
    """

    score: float
    overlap: float
    most: int


@dataclass(frozen=True)
class View:
    """What a page shows: an uploaded file, the names looked for, and which detections are shown."""

    path: str
    names: tuple[str, ...]
    thresholds: Thresholds


class Checkpoint:
    """A detector whose answers are kept.

    The predictor looks for one vocabulary at a time; the lock lets one question at a time set it.

    Args:
        title: what it is called on the page.
        predictor: ready for pictures.
    """

    def __init__(self, title: str, predictor: Predictor) -> None:
        self.title, self.predictor = title, predictor
        self._lock = threading.Lock()
        self._vocabularies: Kept[tuple[str, ...], Vocabulary] = Kept(32)
        self._found: Kept[tuple[str, tuple[str, ...]], Detections] = Kept(64)
        self._features: Kept[tuple[str, tuple[str, ...]], Tensor] = Kept(64)

    def detections(self, photo: Photo, names: tuple[str, ...]) -> Detections:
        """Returns everything it finds, best first, in pixels of the picture."""

        def look() -> Detections:
            vocabulary = self._vocabulary(names)
            with self._lock:
                self.predictor.set_vocabulary(vocabulary)
                (found,) = self.predictor.detect_batch([(photo.pixels, photo.size)])
            return found

        return self._found((photo.key, names), look)

    def nearest(
        self, photo: Photo, names: tuple[str, ...], row: int, among: tuple[str, ...]
    ) -> dict[str, float]:
        """Returns the names nearest to what lies in a found box, with their probabilities among all of them.

        Args:
            photo: the picture.
            names: what was looked for in it.
            row: which of `detections(photo, names)`.
            among: the names to choose from.
        """

        def embed() -> Tensor:
            height, width = photo.pixels.shape[:2]
            found = self.detections(photo, names).resized((height, width))
            with self._lock:
                return self.predictor.region_features(photo.pixels, found.boxes)

        features = self._features((photo.key, names), embed)  # [N, D]
        vocabulary = self._vocabulary(among)
        with self._lock:
            self.predictor.set_vocabulary(vocabulary)
            (best,) = self.predictor.classify_embeddings(features[row : row + 1], NEAREST)
        return dict(best)

    def _vocabulary(self, names: tuple[str, ...]) -> Vocabulary:
        def embed() -> Vocabulary:
            with self._lock:
                self.predictor.set_vocabulary(names)
                vocabulary = self.predictor.detector.vocabulary
            assert vocabulary is not None
            return vocabulary

        return self._vocabularies(names, embed)


class Desk:
    """Answers the page's questions in plain values.

    Args:
        checkpoints: one detector, or two to compare.
        limits: of uploads.
        lists: names by the title of their list, for a region's nearest names.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], limits: Limits, lists: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.checkpoints, self.limits, self.lists = tuple(checkpoints), limits, dict(lists)
        self._photos: Kept[str, Photo] = Kept(8)

    def view(self, path: str | None, text: str, thresholds: Thresholds) -> View:
        """Returns what is to be shown, once it is sure that it can be.

        Raises:
            InputError: no picture, none that can be read, one over the limits, or useless names.
        """
        if not path:
            raise InputError("drop a picture, or take one of the examples")
        names = typed_names(text)
        self.photo(path)
        return View(path, names, thresholds)

    def photo(self, path: str) -> Photo:
        """Reads an uploaded file.

        Raises:
            InputError: it is over the limits, no picture, or no longer there.
        """
        data = upload(Path(path), self.limits.megabytes)
        key = hashlib.sha256(data).hexdigest()
        return self._photos(key, lambda: read_photo(key, Path(path), self.limits.megapixels))

    def rows(self, view: View, which: int) -> list[int]:
        """Returns which detections of checkpoint number `which` are shown, best first."""
        return rows_shown(self._found(view, which), view.thresholds)

    def picture(self, view: View, which: int, chosen: int | None = None) -> Image.Image:
        """Returns the picture with the shown boxes; with a chosen row, that one alone in its colour."""
        photo, found = self.photo(view.path), self._found(view, which)
        rows = self.rows(view, which)
        height, width = photo.shown.shape[:2]
        found = found[torch.tensor(rows, dtype=torch.int64)].resized((height, width))
        if chosen is None or chosen not in rows:
            return draw(photo.shown, found)
        place = rows.index(chosen)
        order = [*(row for row in range(len(rows)) if row != place), place]  # the chosen one on top
        name, colour = _name(found, place), color_of(int(found.labels[place]))
        texts = ["" if row != place else f"{name} {float(found.scores[place]):.2f}" for row in order]
        colours: list[Color] = [GREY if row != place else colour for row in order]
        return draw(photo.shown, boxes=found.boxes[order], texts=texts, colours=colours)

    def table(self, view: View, which: int) -> list[list[Any]]:
        """Returns a line for each shown box: number, name, score, and left, top, width, height in pixels."""
        found = self._found(view, which)
        lines = []
        for number, row in enumerate(self.rows(view, which), 1):
            x1, y1, x2, y2 = (round(side) for side in found.boxes[row].tolist())
            lines.append([number, _name(found, row), f"{found.scores[row]:.2f}", x1, y1, x2 - x1, y2 - y1])
        return lines

    def summary(self, view: View, which: int) -> str:
        """Returns one line on what is shown and what is not."""
        found, rows = self._found(view, which), self.rows(view, which)
        height, width = found.size
        if not len(found):
            return f"Nothing was found in {width} × {height} pixels."
        if not rows:
            best = f"{_name(found, 0)} {float(found.scores[0]):.2f}"
            return f"No box reaches {view.thresholds.score:.2f}; the best is {best}. Lower the score."
        return f"{len(rows)} of {len(found)} boxes in {width} × {height} pixels."

    def results(self, view: View, which: int) -> list[dict[str, Any]]:
        """Returns the shown boxes in COCO's results form; category ids count the names from 1."""
        found = self._found(view, which)[torch.tensor(self.rows(view, which), dtype=torch.int64)]
        entries = found.to_coco(1, range(1, len(view.names) + 1))
        file = Path(view.path).name
        return [
            {**entry, "category_name": view.names[entry["category_id"] - 1], "file_name": file}
            for entry in entries
        ]

    def row_at(self, view: View, which: int, x: float, y: float) -> int | None:
        """Returns the shown row whose box is the smallest that holds a point of `picture`; None: no box does.

        Args:
            view: what is shown.
            which: the checkpoint's number.
            x: pixels from the left of `picture(view, which)`.
            y: pixels from its top.
        """
        found, rows = self._found(view, which), self.rows(view, which)
        height, width = self.photo(view.path).shown.shape[:2]
        place = smallest_at(found.resized((height, width)).boxes[rows], x, y)
        return None if place is None else rows[place]

    def nearest(self, view: View, which: int, row: int, title: str) -> tuple[str, dict[str, float]]:
        """Returns a line on a shown row, and its nearest names in a list, with their probabilities."""
        found = self._found(view, which)
        among = view.names if title == TYPED else self.lists[title]
        checkpoint = self.checkpoints[which]
        number = self.rows(view, which).index(row) + 1
        line = (
            f"**Box {number}: {_name(found, row)} {float(found.scores[row]):.2f}.** "
            f"What lies in it, among {len(among)} names:"
        )
        return line, checkpoint.nearest(self.photo(view.path), view.names, row, among)

    def _found(self, view: View, which: int) -> Detections:
        return self.checkpoints[which].detections(self.photo(view.path), view.names)


def typed_names(text: str) -> tuple[str, ...]:
    """Returns the names that someone typed, parted by commas or lines; a published list's name stands for it.

    Unlike on the command line a path is a name like any other: no file is read.

    Raises:
        InputError: no name, too many or too long ones, or repeated names.
    """
    if text.strip() in CLASS_LISTS:
        return tuple(parse_names(text.strip()))
    names = [name.strip() for line in text.splitlines() for name in line.split(",") if name.strip()]
    if len(names) > MOST_NAMES:
        raise InputError(f"{len(names)} names are too many for this page; give up to {MOST_NAMES}")
    long = next((name for name in names if len(name) > LONGEST_NAME), None)
    if long is not None:
        raise InputError(f"{long[:30]!r}… has {len(long)} letters; part names by commas")
    check_names(names)
    return tuple(names)


def upload(path: Path, megabytes: float) -> bytes:
    """Returns an uploaded file's bytes; an InputError when there are too many or the file has gone."""
    try:
        size = path.stat().st_size
        if size > megabytes * MILLION:
            raise InputError(
                f"{path.name} has {size / MILLION:.1f} MB; this page takes up to {megabytes:g} MB"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path.name} is no longer here; drop it again") from None


def read_photo(key: str, path: Path, megapixels: float) -> Photo:
    """Decodes an uploaded file once its header has said that it is not too large.

    Raises:
        InputError: too many pixels, or no picture.
    """
    try:
        with Image.open(path) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise InputError(f"{path.name} has far more than {megapixels:g} million pixels") from None
    except (OSError, ValueError, SyntaxError):
        raise InputError(f"{path.name} is no picture that can be read; give a JPEG or PNG") from None
    if width * height > megapixels * MILLION:
        raise InputError(
            f"{path.name} has {width} × {height} = {width * height / MILLION:.1f} million pixels; "
            f"this page takes up to {megapixels:g} million"
        )
    try:
        pixels, size = read_upright(path)
    except InputError:  # its message names the folder too
        raise InputError(f"{path.name} is a damaged picture: only its header can be read") from None
    return Photo(key, pixels, size, for_page(pixels))


def for_page(pixels: Pixels) -> Pixels:
    """Returns a picture whose longer side has a number of pixels within `SHOWN`."""
    height, width = pixels.shape[:2]
    least, most = SHOWN
    longer = max(height, width)
    factor = min(-(-least // longer), most / longer)
    return resize(pixels, max(1, round(width * factor)), max(1, round(height * factor)))


def rows_shown(found: Detections, thresholds: Thresholds) -> list[int]:
    """Returns which detections the thresholds leave, best first."""
    able = (found.scores >= thresholds.score).nonzero().flatten()
    kept = able[nms(found.boxes[able], found.scores[able], found.labels[able], thresholds.overlap)]
    rows: list[int] = kept[: thresholds.most].tolist()
    return rows


def smallest_at(boxes: Tensor, x: float, y: float) -> int | None:
    """Returns which of [N, 4] boxes is the smallest that holds a point; None when none does."""
    holds = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
    if not bool(holds.any()):
        return None
    return int(area(boxes).masked_fill(~holds, float("inf")).argmin())


def _name(found: Detections, row: int) -> str:
    return found.names[int(found.labels[row])]
