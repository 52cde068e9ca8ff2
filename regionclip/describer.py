"""Describing one shard of pictures after another: regions, their embeddings, their names."""

# B images of a batch, N regions of a batch, n regions of one image, D embedding size
from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_base.batch import ImageBatch
from clip_base.data.images import Pixels, decode
from clip_base.errors import InputError
from clip_base.files import write_json
from clip_base.train import autocast
from regionclip.boxes import clip_boxes
from regionclip.datasets import CocoDetection, Record, as_annotated
from regionclip.detect_files import unique_names
from regionclip.engines import Report, cores
from regionclip.feature_files import ImageFeatures, write_arrays, write_table
from regionclip.inference import build_proposer
from regionclip.pictures import in_turn, read_upright
from regionclip.proposals.base import ImageKey
from regionclip.proposals.truth import TruthProposer
from regionclip.shards import shard_path
from regionclip.structures import Regions, whole_images
from regionclip.transforms import Frame, place, to_batch

if TYPE_CHECKING:
    from regionclip.features import FeaturesConfig

READERS = min(8, cores())  # threads that decode and resize ahead
_NONE = torch.zeros(0, dtype=torch.int64)

Placed = tuple[Pixels, Frame] | InputError


@dataclass(frozen=True)
class Shard:
    """Pictures that follow each other in the list: from `start` to before `stop`."""

    number: int
    start: int
    stop: int


class FolderPictures(Sequence[Record]):
    """Pictures without annotations as records without boxes; their ids count them from 1.

    Args:
        files: the pictures.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        """Returns a `Record`; its height and width, which nobody has looked at yet, are 0."""
        return Record(index + 1, self.files[index], 0, 0, torch.zeros(0, 4), _NONE, _NONE.bool())


def record_path(out: Path, number: int) -> Path:
    """Returns the file that says that a shard is done, and what is to be known of it."""
    return out / f".shard-{number:05d}.json"


class Describer:
    """Everything that describing a shard needs, loaded once a process.

    Args:
        config: what to describe.
        files: the pictures, when there are no annotations.
        boxes: a file of boxes that knows pictures by their ids here; "" when they come from elsewhere.
    """

    def __init__(self, config: FeaturesConfig, files: Sequence[Path], boxes: str) -> None:
        self.config = config
        self.predictor = config.predictor(proposes=config.boxes == "proposals")
        if config.vocabulary:
            self.predictor.set_vocabulary(config.vocabulary, config.embeddings)
        self.detector, self.device = self.predictor.detector, self.predictor.device
        dataset = CocoDetection(config.annotations, config.images) if config.annotations else None
        self.records: Sequence[Record] = FolderPictures(files) if dataset is None else dataset
        self.categories = () if dataset is None else dataset.categories
        if boxes:
            spec = {"name": "precomputed", "file": boxes, "limit": config.regions}
            self.predictor.proposer = build_proposer(spec, self.device)
        elif config.boxes == "truth":
            self.predictor.proposer = TruthProposer(self.records)
        self.names = list(unique_names((record.path, ".npz") for record in self.records))

    def __call__(self, shard: Shard, report: Report) -> None:
        """Writes a shard's files, and at last the record that says so."""
        out, done = Path(self.config.out), dict[int, ImageFeatures]()
        skipped: list[dict[str, Any]] = []
        for rows, images, frames in self._batches(shard, skipped, report):
            records = [self.records[row] for row in rows]
            done |= zip(rows, self.describe(records, images, frames), strict=True)
            report(len(rows), "")
        found = [done[row] for row in sorted(done)]
        if self.config.format == "npz":
            for row in sorted(done):
                write_arrays(out / self.names[row], done[row])
        else:
            width = self.detector.clip.config.embed_dim
            write_table(shard_path(out, shard.number), found, width, self.config.dtype)
        record = {"images": len(found), "regions": sum(map(len, found)), "skipped": skipped}
        write_json(record_path(out, shard.number), record)

    def _batches(
        self, shard: Shard, skipped: list[dict[str, Any]], report: Report
    ) -> Iterator[tuple[list[int], ImageBatch, list[Frame]]]:
        """Yields batches of pictures of like shape, so that there is little padding."""
        steep = {row: self._steepness(self.records[row]) for row in range(shard.start, shard.stop)}
        ordered = sorted(steep, key=steep.__getitem__)
        stream = in_turn(self._placed, (self.records[row] for row in ordered), READERS)
        for _, group in itertools.groupby(ordered, lambda row: steep[row] > 1):
            while some := list(itertools.islice(group, self.config.batch_size)):
                good: list[tuple[int, Pixels, Frame]] = []
                for row, placed in zip(some, itertools.islice(stream, len(some)), strict=True):
                    if isinstance(placed, InputError):
                        skipped.append({"file_name": self._name(self.records[row]), "reason": str(placed)})
                        report(1, "")
                    else:
                        good.append((row, *placed))
                if good:
                    rows, pixels, frames = (list(column) for column in zip(*good, strict=True))
                    images = to_batch(pixels, self.predictor.resize.multiple)
                    yield rows, images.to(self.device), frames

    def _placed(self, record: Record) -> Placed:
        """Returns a picture in its frame: an annotated one as its boxes lie, others as one sees them."""
        resize = self.predictor.resize
        try:
            if record.height:
                size = (record.height, record.width)
                pixels = as_annotated(decode(record.path), record.path, size)
            else:
                pixels, size = read_upright(record.path)
        except InputError as error:
            return error
        placed, frame = place(pixels, resize.short[0], resize.long, filter=resize.filter)
        return placed, replace(frame, original=size)

    def _steepness(self, record: Record) -> float:
        """Returns height / width, of the stored pixels where the file alone tells; 0: it does not."""
        if record.height:
            return record.height / record.width
        try:
            with Image.open(record.path) as header:
                return header.height / header.width
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return 0.0

    def _name(self, record: Record) -> str:
        folder = self.config.images
        return str(record.path.relative_to(folder) if folder else record.path)

    def describe(
        self, records: Sequence[Record], images: ImageBatch, frames: Sequence[Frame]
    ) -> list[ImageFeatures]:
        """Returns what is to be written of each picture of a batch.

        Args:
            records: B pictures.
            images: their pixels, on the device.
            frames: how each lies in the batch's frame.
        """
        keys = [
            ImageKey(record.image_id, *frame.original) for record, frame in zip(records, frames, strict=True)
        ]
        with torch.no_grad(), autocast(self.config.precision, self.device):
            regions, embeddings = self._embedded(images, keys)
        regions, features = regions.to("cpu"), embeddings.cpu()
        ranked: list[list[tuple[str, float]]] = []
        if self.config.vocabulary:
            ranked = self.predictor.nearest_names(features, self.config.top)
        whole = len(images) if self.config.whole_image else 0
        found = []
        for slot, (record, frame) in enumerate(zip(records, frames, strict=True)):
            mine = torch.nonzero(regions.image_index == slot).flatten()
            boxes = clip_boxes(frame.boxes_out(regions.boxes[mine]), frame.original)
            assert regions.scores is not None
            found.append(
                ImageFeatures(
                    record.image_id,
                    self._name(record),
                    frame.original,
                    boxes.numpy(),
                    regions.scores[mine].float().numpy(),
                    features[mine].numpy().astype(self.config.dtype),
                    (mine < whole).numpy(),
                    self._categories(record),
                    [ranked[row] for row in mine.tolist()] if ranked else (),
                )
            )
        return found

    def _categories(self, record: Record) -> list[str | None]:
        if self.config.boxes != "truth":
            return []
        names = [self.categories[label] for label in record.without_crowds().labels.tolist()]
        return [None, *names] if self.config.whole_image else [*names]

    def _embedded(self, images: ImageBatch, keys: Sequence[ImageKey]) -> tuple[Regions, Tensor]:
        """Returns the regions of a batch, whole images first, and their [N, D] unit-length embeddings."""
        detector, limit = self.detector, self.config.regions
        stages = None
        if self.config.boxes == "none":
            regions = Regions.cat([]).to(self.device)
        elif self.predictor.proposer is not None:
            regions = self.predictor.proposer(images, keys)
            if self.config.boxes != "truth":
                regions = _best(regions, len(images), limit)
        else:
            stages = detector.stages(images) if detector.shares_trunk else None
            regions = detector.propose(images, stages, limit)
        scores = regions.scores if regions.scores is not None else regions.boxes.new_ones(len(regions))
        regions = Regions(regions.boxes, regions.image_index, scores.float())
        if self.config.whole_image:
            covering = whole_images(images)
            ones = covering.boxes.new_ones(len(covering))
            regions = Regions.cat([replace(covering, scores=ones), regions])
        if not len(regions):
            return regions, images.pixels.new_zeros(0, detector.clip.config.embed_dim)
        if stages is None:
            return regions, detector.encoder(images, regions)
        # The map that the proposals came from is the regions' as well.
        return regions, F.normalize(detector.encoder.of_map(stages[-1], regions).float(), dim=-1)


def _best(regions: Regions, images: int, limit: int) -> Regions:
    """Returns at most `limit` regions of each image, the first, which are the best scored."""
    index = regions.image_index.cpu().numpy()
    starts = np.searchsorted(index, np.arange(images))
    within = np.arange(len(index)) - starts[index]
    return regions[torch.from_numpy(within < limit).to(regions.boxes.device)]
