"""Batches of images for evaluation: in order, nothing mirrored, with the way back to the original frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from clip_base.batch import ImageBatch
from clip_base.data.images import Pixels, decode
from clip_base.errors import InputError
from regionclip.datasets import Record
from regionclip.proposals.base import ImageKey
from regionclip.transforms import Frame, ResizeConfig, place, to_batch


@dataclass(frozen=True)
class RecordBatch:
    """Records with their pixels.

    Attributes:
        records: B annotated images.
        images: their pixels, resized and padded.
        frames: how each lies in the batch's frame.
        keys: which images they are.
    """

    records: list[Record]
    images: ImageBatch
    frames: list[Frame]
    keys: list[ImageKey]


def batches_of(
    records: Iterable[Record],
    resize: ResizeConfig,
    batch_size: int,
    device: torch.device,
    skipped: dict[int, str] | None = None,
) -> Iterator[RecordBatch]:
    """Yields all records in order.

    Args:
        records: what to read.
        resize: the first of its short sides is used.
        batch_size: images at once.
        device: where the pixels go.
        skipped: takes the reason of every image that does not decode, by id; None: such an image is an error.
    """
    chunk: list[tuple[Record, Pixels, Frame]] = []
    for record in records:
        try:
            pixels = decode(record.path)
        except InputError as error:
            if skipped is None:
                raise
            skipped[record.image_id] = str(error)
            continue
        chunk.append((record, *place(pixels, resize.short[0], resize.long)))
        if len(chunk) == batch_size:
            yield _batch(chunk, device)
            chunk = []
    if chunk:
        yield _batch(chunk, device)


def _batch(chunk: list[tuple[Record, Pixels, Frame]], device: torch.device) -> RecordBatch:
    frames = [frame for _, _, frame in chunk]
    keys = [ImageKey(record.image_id, *frame.original) for record, _, frame in chunk]
    images = to_batch([pixels for _, pixels, _ in chunk], multiple=32).to(device)
    return RecordBatch([record for record, _, _ in chunk], images, frames, keys)
