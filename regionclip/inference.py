"""What jobs over images share: batches in order with the way back, and the proposer they name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_base import plugins
from clip_base.batch import ImageBatch
from clip_base.config import Part
from clip_base.data.images import Pixels, decode
from clip_base.errors import InputError
from clip_base.files import write_text
from regionclip.datasets import Record, as_annotated
from regionclip.proposals.base import GROUP, ImageKey, Proposer
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
        skipped: takes the reason of every image that does not decode or has another size than annotated, by
            id; None: such an image is an error.
    """
    chunk: list[tuple[Record, Pixels, Frame]] = []
    for record in records:
        try:
            pixels = as_annotated(decode(record.path), record.path, (record.height, record.width))
        except InputError as error:
            if skipped is None:
                raise
            skipped[record.image_id] = str(error)
            continue
        chunk.append((record, *place(pixels, resize.short[0], resize.long, filter=resize.filter)))
        if len(chunk) == batch_size:
            yield _batch(chunk, device, resize.multiple)
            chunk = []
    if chunk:
        yield _batch(chunk, device, resize.multiple)


def _batch(chunk: list[tuple[Record, Pixels, Frame]], device: torch.device, multiple: int) -> RecordBatch:
    frames = [frame for _, _, frame in chunk]
    keys = [ImageKey(record.image_id, *frame.original) for record, _, frame in chunk]
    images = to_batch([pixels for _, pixels, _ in chunk], multiple).to(device)
    return RecordBatch([record for record, _, _ in chunk], images, frames, keys)


def build_proposer(spec: Part, device: torch.device) -> Proposer:
    """Builds the proposer that a job's options name; `device` goes to those whose constructor takes one.

    Args:
        spec: the proposer's name and its own options.
        device: where a network is to run.

    Raises:
        InputError: no such proposer, or options that it does not have.
    """
    takes = inspect.signature(plugins.load(GROUP, str(spec.get("name", "")))).parameters
    context = {"device": device} if "device" in takes else {}
    proposer: Proposer = plugins.build(GROUP, spec, **context)
    return proposer


def write_skipped(path: Path, skipped: Mapping[int, str]) -> None:
    """Writes one line for every image that could not be read: its id and the reason. None: no file."""
    if skipped:
        lines = (json.dumps({"image_id": key, "reason": reason}) + "\n" for key, reason in skipped.items())
        write_text(path, "".join(lines))
