"""Training samples of the region stages: images with boxes and their labels or concepts."""

# n boxes of one image, K concepts kept a box, N boxes of a batch
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_base.data.loader import Loader
from clip_base.images.decode import ImageStore, Pixels, Stored
from clip_base.images.orientation import turned_as_annotated
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.run import RunFolder
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.training.loop import TrainConfig, fit
from regionclip.data.annotations import AnnotatedImages, CocoDetection, ImageAnnotations
from regionclip.data.categories import Split, load_split
from regionclip.structures.regions import RegionBatch, Regions
from regionclip.structures.transforms import ResizeTransform, TrainingResizeConfig, random_resize, to_batch


@dataclass(kw_only=True)
class BaseClassImages(AnnotatedImages):
    """What a training on base classes sees."""

    annotations: str = option(
        REQUIRED, "instances_*.json in COCO's format; only boxes of base classes are read"
    )
    split: str = option(
        "",
        "coco (48 base, 17 novel), lvis, a JSON file with base and novel names, or class lists "
        "BASE.txt,NOVEL.txt; empty: all annotated categories are base",
    )
    keep_empty: bool = option(False, "also train on images without base boxes")

    def read(self) -> tuple[CocoDetection, Split]:
        """Reads the images and their single objects of base classes, and prints how many there are.

        Raises:
            InputError: a malformed file, a split that does not fit it, or no image that is left.
        """
        everything = CocoDetection(self.annotations, self.images)
        split = load_split(self.split, everything.categories, everything.frequencies)
        if not self.split:
            print(f"no split given: all {len(split.base)} annotated categories are base")
        dataset = everything.restrict(split.base, self.keep_empty).without_crowds()
        print(dataset.report())
        if not len(dataset):
            raise InputError(
                f"nothing to train on: no image of {self.annotations} has a usable box of the "
                f"{len(split.base)} base classes; keep_empty=true trains on images without boxes too"
            )
        return dataset, split


@dataclass(frozen=True)
class Sample:
    """One image and its boxes, in pixels of the original image.

    Attributes:
        path: the image's file, or its place in a tar.
        boxes: [n, 4] float32 (x1, y1, x2, y2).
        labels: [n] int64, or None.
        concept_ids: [n, K] int64, or None.
        concept_probs: [n, K], or None.
        captions: of which one is drawn; may be empty when no tokenizer is used.
        size: (height, width) that the boxes were drawn in, which the image must have; None: not known.
        objectness: [n] in [0, 1], or None.
    """

    path: Path | Stored
    boxes: Tensor
    labels: Tensor | None = None
    concept_ids: Tensor | None = None
    concept_probs: Tensor | None = None
    captions: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    objectness: Tensor | None = None

    @classmethod
    def of_record(cls, record: ImageAnnotations) -> Sample:
        """Makes a sample of an annotated image."""
        return cls(record.path, record.boxes, record.labels, size=(record.height, record.width))


class RegionDataset:
    """Samples as a Loader takes them: resized, mirrored, boxes sampled.

    Args:
        samples: the images.
        resize: their size in training.
        max_boxes: most boxes per image; more are sampled at random. 0: all.
        tokenizer: given, every batch carries the tokens of one caption an image, zeros where it has none.
        cache: keep decoded images in memory.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        resize: TrainingResizeConfig,
        max_boxes: int = 0,
        tokenizer: Tokenizer | None = None,
        cache: bool = False,
    ) -> None:
        self.samples, self.resize, self.max_boxes, self.tokenizer = samples, resize, max_boxes, tokenizer
        self.store = ImageStore(keep=cache)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Returns what the image of a sample is called."""
        return str(self.samples[index].path)

    def item(self, index: int, generator: torch.Generator) -> tuple[Pixels, Regions, str]:
        """Returns the image in its frame, its regions there (image_index 0) and a caption."""
        sample = self.samples[index]
        stored = self.store(sample.path)
        if sample.size is not None:
            stored = turned_as_annotated(stored, sample.path, sample.size)
        pixels, frame = random_resize(stored, self.resize, generator)
        chosen = torch.nonzero(frame.visible(sample.boxes) >= self.resize.jitter.visible)[:, 0]
        if self.max_boxes and len(chosen) > self.max_boxes:
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[: self.max_boxes]]
        caption = ""
        if sample.captions:
            caption = sample.captions[int(torch.randint(len(sample.captions), (1,), generator=generator))]
        return pixels, _regions(sample, frame, chosen), caption

    def collate(self, items: list[tuple[Pixels, Regions, str]]) -> RegionBatch:
        """Makes a batch; images of unlike size are padded to a multiple of 32 pixels."""
        images = to_batch([pixels for pixels, _, _ in items], self.resize.training_multiple)
        regions = Regions.cat([_moved(regions, slot) for slot, (_, regions, _) in enumerate(items)])
        tokens = None
        if self.tokenizer is not None:
            captions = [caption for _, _, caption in items]
            tokens = self.tokenizer(captions, truncate=True)
            tokens[torch.tensor([not caption for caption in captions])] = 0
        return RegionBatch(images, regions, tokens)


class GridPatchDataset(RegionDataset):
    """Images cut evenly into m × n patches, sampled again each time (arXiv 2310.01403, section 3.2).

    Args:
        samples: the images; what boxes they have are not used.
        max_grid: m and n are drawn from 1 to this.
        resize: see `RegionDataset`, as are the rest.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        max_grid: int,
        resize: TrainingResizeConfig,
        max_boxes: int = 0,
        cache: bool = False,
    ) -> None:
        super().__init__(samples, resize, max_boxes, cache=cache)
        self.max_grid = max_grid

    def item(self, index: int, generator: torch.Generator) -> tuple[Pixels, Regions, str]:
        """Returns the image in its frame and its patches there (image_index 0), without a caption."""
        pixels, _, _ = super().item(index, generator)
        rows, columns = torch.randint(1, self.max_grid + 1, (2,), generator=generator).tolist()
        height, width = pixels.shape[:2]
        boxes = patches(height, width, rows, columns)
        if self.max_boxes:
            boxes = boxes[torch.randperm(len(boxes), generator=generator)[: self.max_boxes]]
        return pixels, Regions(boxes, torch.zeros(len(boxes), dtype=torch.int64)), ""


def patches(height: int, width: int, rows: int, columns: int) -> Tensor:
    """Returns [rows · columns, 4], the boxes of equal size that an image of these pixels is cut into."""
    size = torch.tensor([width / columns, height / rows])
    corner = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)) * size
    return torch.cat([corner, corner + size], 1)


def fit_on(
    data: RegionDataset,
    task: nn.Module,
    train: TrainConfig,
    run: RunFolder,
    weights: Tensor | None = None,
    order: Callable[[torch.Generator], Tensor] | None = None,
) -> int:
    """Trains a task on samples, shuffled by the training's seed; returns the steps made in all. See `fit`.

    Args:
        data: the samples.
        task: trained in place.
        train: how to train.
        run: takes the log and the checkpoints.
        weights: how often an epoch shows each sample on average; None: once.
        order: of the samples in an epoch, see `Loader`; None: any.
    """
    loader: Loader[RegionBatch] = Loader(
        data,
        data.collate,
        train.batch_size,
        seed=train.seed,
        workers=train.workers,
        skipped=run.path / "skipped.jsonl",
        max_skipped=train.max_skipped,
        weights=weights,
        order=order,
    )
    return fit(task, loader, train, run)


def _regions(sample: Sample, frame: ResizeTransform, chosen: Tensor) -> Regions:
    def pick(column: Tensor | None) -> Tensor | None:
        return None if column is None else column[chosen]

    return Regions(
        frame.apply_boxes(sample.boxes[chosen]),
        torch.zeros(len(chosen), dtype=torch.int64),
        labels=pick(sample.labels),
        concept_ids=pick(sample.concept_ids),
        concept_probs=pick(sample.concept_probs),
        scores=pick(sample.objectness),
    )


def _moved(regions: Regions, slot: int) -> Regions:
    index = torch.full_like(regions.image_index, slot)
    return Regions(
        regions.boxes,
        index,
        labels=regions.labels,
        concept_ids=regions.concept_ids,
        concept_probs=regions.concept_probs,
        scores=regions.scores,
    )
