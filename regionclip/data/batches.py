"""What jobs over images share: batches in order with the way back, and the proposer they name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import Pixels, decode
from clip_base.images.orientation import turned_as_annotated
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import write_text
from regionclip.data.annotations import ImageAnnotations
from regionclip.structures.regions import ImageInfo
from regionclip.structures.transforms import ResizeConfig, ResizeTransform, resize_shortest_edge, to_batch


@dataclass(frozen=True)
class AnnotatedBatch:
    """Records with their pixels.

    Attributes:
        records: B annotated images.
        images: their pixels, resized and padded.
        frames: how each lies in the batch's frame.
        keys: which images they are.
    """

    records: list[ImageAnnotations]
    images: ImageBatch
    frames: list[ResizeTransform]
    keys: list[ImageInfo]


def batches_of(
    records: Iterable[ImageAnnotations],
    resize: ResizeConfig,
    batch_size: int,
    device: torch.device,
    skipped: dict[int, str] | None = None,
) -> Iterator[AnnotatedBatch]:
    """Yields all records in order.

    Args:
        records: what to read.
        resize: the first of its short sides is used.
        batch_size: images at once.
        device: where the pixels go.
        skipped: takes the reason of every image that does not decode or has another size than annotated, by
            id; None: such an image is an error.
    """
    chunk: list[tuple[ImageAnnotations, Pixels, ResizeTransform]] = []
    for record in records:
        try:
            pixels = turned_as_annotated(decode(record.path), record.path, (record.height, record.width))
        except InputError as error:
            if skipped is None:
                raise
            skipped[record.image_id] = str(error)
            continue
        chunk.append(
            (record, *resize_shortest_edge(pixels, resize.short[0], resize.long, filter=resize.filter))
        )
        if len(chunk) == batch_size:
            yield _batch(chunk, device, resize.multiple)
            chunk = []
    if chunk:
        yield _batch(chunk, device, resize.multiple)


def _batch(
    chunk: list[tuple[ImageAnnotations, Pixels, ResizeTransform]], device: torch.device, multiple: int
) -> AnnotatedBatch:
    frames = [frame for _, _, frame in chunk]
    keys = [ImageInfo(record.image_id, *frame.original) for record, _, frame in chunk]
    images = to_batch([pixels for _, pixels, _ in chunk], multiple).to(device)
    return AnnotatedBatch([record for record, _, _ in chunk], images, frames, keys)


def write_skipped(path: Path, skipped: Mapping[int, str]) -> None:
    """Writes one line for every image that could not be read: its id and the reason. None: no file."""
    if skipped:
        lines = (json.dumps({"image_id": key, "reason": reason}) + "\n" for key, reason in skipped.items())
        write_text(path, "".join(lines))
