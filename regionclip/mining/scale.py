"""At which size the teacher sees images: chosen from its training resolution and the sizes of proposals.

A CLIP knows things at the size at which it saw them in training: there an image's short side was the tower's
resolution. So the images to mine are shown at that size, too, unless the proposals in them would then be
smaller than one cell of the tower's map, of which several proposals would share one.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from clip_base.runtime.errors import JobError
from clip_base.storage.files import is_file, read_json, write_json
from clip_base.weights.load import find
from clip_base.weights.reading import is_safetensors, read_notes
from regionclip.data.batches import read_batches
from regionclip.data.caption_index import CaptionedImageEntry
from regionclip.data.entries import entry_root, read_entry
from regionclip.data.pairs import PairReader, Unit
from regionclip.mining.miner import AUTO, MineConfig
from regionclip.models.teachers.base import load_teacher
from regionclip.models.teachers.identity import is_own
from regionclip.proposals.base import build_proposer

FILE = "teacher_scale.json"
TRAINED_AT = "trained_at"  # in the metadata of weights files: short side in pixels of the training images
UNITS, IMAGES = 8, 8  # shards that are looked at, and images of each
CELL = 16  # pixels of a cell of a ResNet's map


@dataclass(frozen=True)
class ScaleChoice:
    """The factor on the image size, and why it was chosen.

    Attributes:
        scale: the factor.
        reason: in a sentence.
    """

    scale: float
    reason: str


def choose_scale(trained: int, image_side: float, box_side: float, cell: int) -> ScaleChoice:
    """Chooses the factor on the images' size.

    Args:
        trained: short side of the images that the teacher was trained on, in pixels.
        image_side: median short side of the images to mine, in pixels.
        box_side: median of the proposals' longer sides in them, in pixels.
        cell: side of a cell of the tower's map, in pixels; 0: how small proposals are does not matter.
    """
    as_trained, least = trained / image_side, cell / box_side
    # Never larger than the images are, unless the teacher saw larger ones: that would add no detail.
    scale = round(min(max(as_trained, least), max(as_trained, 1.0)), 3)
    reason = (
        f"the teacher was trained on images of {trained} pixels, these have {image_side:g}: {as_trained:.3g}"
    )
    if least > as_trained:
        reason += (
            f"; at that size half of the proposals, {box_side:.3g} pixels here, would be smaller than the "
            f"{cell} pixels of a cell of its map, so {scale:g}"
        )
    return ScaleChoice(scale, reason)


def with_scale(config: MineConfig, reader: PairReader, units: Sequence[Unit]) -> tuple[MineConfig, str]:
    """Returns the config with a number as `teacher_scale`, and why it was chosen; "" where it was given.

    The choice is kept in the run's folder, so that restarts and other machines take the same.

    Args:
        config: what to mine.
        reader: of the images.
        units: all of them.

    Raises:
        JobError: none of the images that are looked at has a proposal.
    """
    if config.teacher_scale != AUTO:
        return config, ""
    file = Path(config.out) / FILE
    if not is_file(str(file)):
        write_json(file, asdict(_chosen(config, reader, units)))
    choice = ScaleChoice(**read_json(file, "choice of teacher_scale"))
    print(f"teacher_scale={AUTO}: {choice.scale:g}; {choice.reason}", file=sys.stderr, flush=True)
    return replace(config, teacher_scale=choice.scale), choice.reason


def _chosen(config: MineConfig, reader: PairReader, units: Sequence[Unit]) -> ScaleChoice:
    if config.teacher == "crop":
        return ScaleChoice(1.0, "crops are resized to the teacher's own size, whatever the images' is")
    if not is_own(config.backend):
        return ScaleChoice(1.0, "a teacher of another package sees each image at its own size")
    teacher = load_teacher(config.backend, config.weights)
    image_side, box_side = _sizes(config, reader, units)
    trained = trained_at(config.weights, teacher.resolution)
    cell = 0 if config.teacher == "mixed" else teacher.stride or CELL  # small regions are cropped there
    return choose_scale(trained, image_side, box_side, cell)


def trained_at(weights: str, resolution: int) -> int:
    """Returns the short side in pixels of the images that a file's CLIP was trained on last.

    Args:
        weights: file, folder or published name.
        resolution: the tower's, which counts where the file does not say more.
    """
    path = find(weights)
    told = read_notes(path).get(TRAINED_AT, "") if path.is_file() and is_safetensors(path) else ""
    return int(told) if told.isdigit() and int(told) > 0 else resolution


@torch.no_grad()
def _sizes(config: MineConfig, reader: PairReader, units: Sequence[Unit]) -> tuple[float, float]:
    """Returns the medians of the images' short sides and of the proposals' longer sides, in pixels."""
    device, root = config.pick_device(), entry_root(config.source_options())
    proposer = build_proposer(config.proposer, device)
    images, boxes = list[float](), list[float]()

    def entries() -> Iterator[CaptionedImageEntry]:
        for unit in units[:: max(len(units) // UNITS, 1)][:UNITS]:
            yield from itertools.islice(reader.read(unit), IMAGES)

    def skip(entry: CaptionedImageEntry, reason: str) -> None:
        """Mining tells of it."""

    groups = read_batches(
        entries(),
        lambda entry: read_entry(entry, root),
        config.resize,
        config.batch_size,
        device,
        on_skip=skip,
    )
    for batch in (batch for group in groups for batch in group.batches):
        images += batch.images.sizes.amin(1).tolist()
        found = proposer(batch.images, batch.infos).boxes
        boxes += (found[:, 2:] - found[:, :2]).amax(1).tolist()
    boxes = [side for side in boxes if side > 0]
    if not boxes:
        raise JobError(
            f"teacher_scale={AUTO}: there are no proposals in the {len(images)} images that were looked at; "
            "give a number, or another proposer"
        )
    return statistics.median(images), statistics.median(boxes)
