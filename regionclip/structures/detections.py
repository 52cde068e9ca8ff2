"""Detections of one image: filtering, drawing, writing, conversion to other packages."""

# N detections
from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_base.data.coco import coco_entry
from clip_base.images.inputs import ImageLike
from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_json, write_text
from clip_base.storage.tables import TableWriter
from regionclip.structures.boxes import nms, xywh_to_xyxy, xyxy_to_xywh
from regionclip.structures.checks import check_tensor, rows
from regionclip.structures.drawing import FORMATS, draw, save_image

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, repr=False)
class Detections:
    """What was found in one image.

    `len`, `[…]` and `for` go by detections; what they and the filters give are `Detections` again:

        found.with_min_score(0.5).with_classes("dog", "cat").top(10).plot("photo.jpg")

    Attributes:
        boxes: [N, 4] float32 (x1, y1, x2, y2) in pixels of the original image.
        scores: [N] float32 in [0, 1].
        labels: [N] int64 into `names`.
        names: the vocabulary's names.
        size: (height, width) of the original image, in pixels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_tensor("boxes", self.boxes, (None, 4), torch.float32)
        count = len(self.boxes)
        check_tensor("scores", self.scores, (count,), torch.float32)
        check_tensor("labels", self.labels, (count,), torch.int64)
        if not isinstance(self.names, tuple):
            raise ValueError(f"names must be a tuple of strings, got {type(self.names).__name__}")
        if not count:
            return
        if not bool(self.boxes.isfinite().all()):
            raise ValueError("boxes hold NaN or infinite corners")
        # Written so that NaN fails too.
        if not bool(((self.scores >= 0) & (self.scores <= 1)).all()):
            raise ValueError(f"scores must be in [0, 1], got {_span(self.scores)}")
        if not bool(((self.labels >= 0) & (self.labels < len(self.names))).all()):
            raise ValueError(f"labels must be in 0…{len(self.names) - 1}, got {_span(self.labels)}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Tensor | Sequence[int] | slice | int) -> Detections:
        """Returns the detections that a mask [N] bool, indices [M] int64, a slice or one number picks."""
        picked = rows(which, len(self))
        return replace(self, boxes=self.boxes[picked], scores=self.scores[picked], labels=self.labels[picked])

    def __iter__(self) -> Iterator[Detections]:
        """Yields each detection by itself."""
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.size
        found = self.top(5).captions
        rest = [f"and {len(self) - len(found)} more"] if len(self) > len(found) else []
        return f"Detections({len(self)} in {width}x{height}: {', '.join([*found, *rest]) or 'nothing found'})"

    @property
    def class_names(self) -> list[str]:
        """The name of each of the N detections."""
        return [self.names[label] for label in self.labels.tolist()]

    @property
    def captions(self) -> list[str]:
        """The name and the score of each of the N detections, as they stand beside its box."""
        scores = self.scores.tolist()
        return [f"{name} {score:.2f}" for name, score in zip(self.class_names, scores, strict=True)]

    def with_min_score(self, score: float) -> Detections:
        """Returns the detections whose score is at least `score`.

        Raises:
            InputError: `score` does not are in [0, 1].
        """
        if not 0 <= score <= 1:
            raise InputError(f"scores are in [0, 1], got {score:g}; 0.5 means 50 percent")
        return self[self.scores >= score]

    def with_classes(self, *names: str) -> Detections:
        """Returns the detections that have one of these names.

        Raises:
            InputError: a name is not in the vocabulary.
        """
        unknown = next((name for name in names if name not in self.names), None)
        if unknown is not None:
            raise InputError(
                f"{unknown!r} is not in the vocabulary; {did_you_mean(unknown, list(self.names))}"
            )
        wanted = torch.tensor([self.names.index(name) for name in names], dtype=torch.int64)
        return self[torch.isin(self.labels, wanted.to(self.labels.device))]

    def top(self, k: int) -> Detections:
        """Returns the k detections of the highest scores, best first; all of them when there are fewer.

        Raises:
            ValueError: k is below 0.
        """
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        return self[self.scores.argsort(descending=True, stable=True)[:k]]

    def with_nms(self, threshold: float = 0.5) -> Detections:
        """Returns what is left when the lower scored of two overlapping boxes is dropped, of any names.

        Args:
            threshold: the largest IoU that two boxes may have, in [0, 1]; 1: nothing is dropped.

        Raises:
            ValueError: the threshold is not in [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        if threshold == 1:
            return self
        return self[nms(self.boxes, self.scores, torch.zeros_like(self.labels), threshold)]

    def resized(self, size: tuple[int, int]) -> Detections:
        """Returns the same detections in pixels of the same image at another size, (height, width)."""
        (height, width), (old_height, old_width) = size, self.size
        factors = self.boxes.new_tensor([width / old_width, height / old_height]).repeat(2)
        return replace(self, boxes=self.boxes * factors, size=(height, width))

    def plot(self, image: ImageLike) -> Image.Image:
        """Returns the image with the boxes, names and scores on it; small ones are enlarged.

        Args:
            image: what was looked at, in any form that `Predictor.detect` takes. It may be smaller or larger
                than it was then; files of more than 25 million pixels are reduced.

        Raises:
            InputError: the image is missing, does not decode, or is of another shape than `size`.
        """
        return draw(image, self)

    def save(self, path: str | Path, image: ImageLike | None = None) -> None:
        """Writes the detections to a file, which appears whole or not at all; folders are made.

        Args:
            path: its ending says what is written. `.json`: the list that `to_dicts` returns. `.csv`: the same
                as a table with the columns name, score, x1, y1, x2, y2. `.jpg`, `.png`, `.webp`: `image` with
                the boxes drawn, see `plot`.
            image: what to draw on; for images only.

        Raises:
            InputError: another ending, an image without `image` or the other way round.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".json", ".csv", *FORMATS):
            raise InputError(
                f"{path} must end in .json, .csv (boxes), {', '.join(FORMATS)} (image with boxes)"
            )
        if (image is not None) != (ending in FORMATS):
            wanted = "give image=, what to draw on" if ending in FORMATS else "leave image= out"
            raise InputError(f"{path} is for {'an image' if ending in FORMATS else 'boxes only'}: {wanted}")
        if image is not None:
            save_image(self.plot(image), path)
        elif ending == ".json":
            write_json(path, self.to_dicts(), indent=1)
        else:
            write_text(path, self._table())

    def _table(self) -> str:
        text = io.StringIO()
        writer = TableWriter(text)
        writer.writerow(["name", "score", "x1", "y1", "x2", "y2"])
        writer.writerows([entry["name"], entry["score"], *entry["box"]] for entry in self.to_dicts())
        return text.getvalue()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns a plain dict for each detection, as JSON and data frames take them.

        name; score to a millionth; box [x1, y1, x2, y2] to a thousandth of a pixel.
        """
        return [
            {"name": name, "score": round(score, 6), "box": [round(side, 3) for side in box]}
            for name, score, box in zip(
                self.class_names, self.scores.tolist(), self.boxes.tolist(), strict=True
            )
        ]

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Returns entries of a COCO results file.

        Args:
            image_id: the image's id in the annotations.
            category_ids: the annotations' category id of each name.

        Returns:
            A dict for each detection: image_id, category_id, bbox [x, y, width, height] to a thousandth of a
                pixel, score.

        Raises:
            ValueError: there are more or fewer category ids than names.
        """
        if len(category_ids) != len(self.names):
            raise ValueError(
                f"{len(self.names)} names need the same number of category ids, got {len(category_ids)}"
            )
        boxes = xyxy_to_xywh(self.boxes.double()).tolist()
        return [
            coco_entry(image_id, category_ids[label], box, score, digits=3)
            for box, score, label in zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        ]

    @classmethod
    def from_coco(
        cls,
        results: Sequence[dict[str, Any]],
        category_ids: Sequence[int],
        names: Sequence[str],
        size: tuple[int, int],
    ) -> Detections:
        """Reads one image's entries of a COCO results file.

        Args:
            results: entries of one image.
            category_ids: the category id of each name.
            names: the vocabulary's names.
            size: (height, width) of the image, in pixels.

        Raises:
            ValueError: an entry's category is not among `category_ids`.
        """
        label_of = {category: label for label, category in enumerate(category_ids)}
        unknown = {entry["category_id"] for entry in results} - set(label_of)
        if unknown:
            raise ValueError(f"category ids {sorted(unknown)} have no name here; known: {sorted(label_of)}")
        boxes = torch.tensor([entry["bbox"] for entry in results], dtype=torch.float64).reshape(-1, 4)
        return cls(
            xywh_to_xyxy(boxes).float(),
            torch.tensor([entry["score"] for entry in results], dtype=torch.float32),
            torch.tensor([label_of[entry["category_id"]] for entry in results], dtype=torch.int64),
            tuple(names),
            size,
        )

    def to_supervision(self) -> supervision.Detections:
        """Returns the same as `supervision.Detections`, for its annotators, trackers and counters.

        xyxy [N, 4] float32 in pixels, confidence [N] float32, class_id [N] int64 into `names`, and
        data["class_name"] [N], the names.

        Raises:
            InputError: the package supervision is not installed.
        """
        try:
            import supervision  # noqa: PLC0415 (optional)
        except ImportError:
            raise InputError(
                "to_supervision needs the package supervision: pip install 'regionclip[supervision]'"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy().copy(),
            confidence=self.scores.cpu().numpy().copy(),
            class_id=self.labels.cpu().numpy().copy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )


def _span(values: Tensor) -> str:
    return f"{values.min().item():g}…{values.max().item():g}"
