"""Proposals from a file, or the ground-truth boxes of a dataset."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.data.coco import box_of, checked_entry
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.json_stream import stream_entries
from regionclip.data.annotations import ImageAnnotations
from regionclip.data.box_format import other_forms
from regionclip.proposals.base import BoxLimits, collect, frame_scale
from regionclip.proposals.origins import Origins
from regionclip.proposals.storage import ProposalTable
from regionclip.structures.boxes import xywh_to_xyxy, xyxy_to_xywh
from regionclip.structures.regions import ImageInfo, Regions


class TruthProposer:
    """Proposes each image's true boxes, all with objectness 1; crowds are left out.

    Args:
        records: the annotated images.
    """

    def __init__(self, records: Iterable[ImageAnnotations]) -> None:
        self.boxes = {record.image_id: record.without_crowds().boxes for record in records}

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """See `Proposer`. The pixels are not looked at."""
        scales = frame_scale(images, keys)
        boxes = [self.boxes[key.image_id] * scale for key, scale in zip(keys, scales, strict=True)]
        return collect(boxes, [torch.ones(len(rows)) for rows in boxes], images.pixels.device)


# Looked at before boxes in another form than x, y, width, height in pixels are refused.
FIRST_IMAGES, FEW = 100, 10


@dataclass
class PrecomputedConfig(BoxLimits):
    """Options of the proposer `precomputed`."""

    file: str = option(
        REQUIRED,
        "JSON list of {image_id, bbox: [x, y, width, height] in original pixels, score in 0…1}, such as "
        "`detect` writes; or what `propose format=parquet`, `mine` or `features` wrote: a .parquet file or a "
        "folder of them. Images are found by file_name where the file has them, "
        "else by key (a tar's __key__), else by image_id",
    )


class PrecomputedProposer:
    """Looks each image's boxes up in a file and scales them to the batch's frame.

    The file's images are found as `Origins` says: numbers that it gave by itself, as `detect` does, are not
    the dataset's. An image that the file does not mention has no regions. Boxes are
    cut at the image's edges; what lies outside it altogether, or has no area, is left out.
    """

    def __init__(self, config: PrecomputedConfig) -> None:
        self.config = config
        path = Path(config.file)
        table = path.suffix == ".parquet" or path.is_dir()
        self._source: _Results | ProposalTable = ProposalTable(path) if table else _Results(path)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """See `Proposer`. The pixels are not looked at."""
        boxes, scores = [], []
        for key, scale in zip(keys, frame_scale(images, keys), strict=True):
            rows, values = self._of_image(key)
            boxes.append(rows * scale)
            scores.append(values)
        return collect(boxes, scores, images.pixels.device)

    def _of_image(self, key: ImageInfo) -> tuple[Tensor, Tensor]:
        """Returns an image's [n, 4] boxes in original pixels and their [n] scores, best first."""
        image_id = self._source.origins.find(key)
        if image_id is None:
            return torch.zeros(0, 4), torch.zeros(0)
        boxes, scores = self._source.of_image(image_id)
        self._check_form(boxes, key)
        order = scores.argsort(descending=True, stable=True)
        boxes, scores = boxes[order], scores[order]
        limits = torch.tensor([key.width, key.height, key.width, key.height], dtype=torch.float32)
        boxes = torch.minimum(boxes, limits).clamp(min=0)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (scores >= self.config.min_score)
        return boxes[keep][: self.config.limit], scores[keep][: self.config.limit]

    def _check_form(self, boxes: Tensor, key: ImageInfo) -> None:
        """Raises an InputError when the first boxes are not x, y, width, height in pixels."""
        if len(self._seen) >= FIRST_IMAGES or not len(boxes):
            return
        self._seen.append(
            (xyxy_to_xywh(boxes.double()), torch.tensor([[key.height, key.width]] * len(boxes)))
        )
        first, sizes = (torch.cat(parts).double().numpy() for parts in zip(*self._seen, strict=True))
        forms = other_forms(first, sizes) if len(first) >= FEW else {}
        if forms:
            raise InputError(
                f"the boxes of {self.config.file} seem to be {next(iter(forms))}; proposals have x, y, "
                "width, height in pixels of the original image: convert them"
            )


class _Results:
    """Each image's boxes out of a JSON file, 40 bytes a box.

    Attributes:
        origins: what each image is found by.
    """

    def __init__(self, path: Path) -> None:
        self._rows: dict[int, array[float]] = {}
        where, nameless = f"proposals file {path}", 0
        self.origins = Origins(where)
        for number, (key, entry) in enumerate(stream_entries(path, "proposals file")):
            if key:
                raise InputError(
                    f"proposals file {path} holds a JSON object; expected a list of boxes in COCO's results "
                    "format"
                )
            image_id, row = checked_proposal(entry, f"{where}, entry {number}")
            self._rows.setdefault(image_id, array("d")).extend(row)
            nameless += not entry.get("file_name")
            self.origins.add(entry, f"{where}, entry {number}")
        if self.origins.names and nameless:
            raise InputError(
                f"{where}: {nameless} boxes have no file_name, but the others do; give all or none"
            )

    def of_image(self, image_id: int) -> tuple[Tensor, Tensor]:
        """Returns an image's [n, 4] boxes (x1, y1, x2, y2) in original pixels and their [n] scores."""
        table = torch.tensor(self._rows.get(image_id, ()), dtype=torch.float64).reshape(-1, 5)
        return xywh_to_xyxy(table[:, :4]).float(), table[:, 4].float()


def checked_proposal(entry: Any, where: str) -> tuple[int, tuple[float, ...]]:
    """Returns an entry's image id and (x, y, width, height, score); InputError when it is malformed."""
    entry = checked_entry(entry, where, ("image_id",))
    box = box_of(entry, where)
    try:
        score = float(entry["score"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: needs image_id, bbox and score, found {quote(entry)}") from None
    if min(box[2:]) < 0:
        raise InputError(f"{where}: bbox must be four finite numbers x, y, width, height, found {list(box)}")
    if not 0 <= score <= 1:
        raise InputError(
            f"{where}: score is {score}, expected objectness in 0…1; apply a sigmoid if these are logits"
        )
    return entry["image_id"], (*box, score)
