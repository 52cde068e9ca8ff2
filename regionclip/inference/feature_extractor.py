"""Extraction of region features, shard by shard: regions, embeddings, names."""

# B images of a batch, N regions of a batch, n regions of one image, D embedding size
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.data.coco import annotation_inputs
from clip_base.jobs.config import option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import files_of
from clip_base.jobs.skipped import max_skipped_option, require_share
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.runtime.workers import EXECUTOR_HELP, EXECUTORS, Report
from clip_base.storage.files import write_json
from clip_base.storage.paths import name_in
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.batches import (
    DecodedImage,
    LoadedBatch,
    read_batches,
    read_record,
    read_upright,
)
from regionclip.inference.detection_files import unique_names
from regionclip.inference.feature_files import ImageFeatures, write_arrays, write_table
from regionclip.inference.options import DetectorOptions
from regionclip.mining.shards import shard_path
from regionclip.proposals.base import build_proposer
from regionclip.proposals.precomputed import TruthProposer
from regionclip.structures.boxes import clip_boxes
from regionclip.structures.regions import FeatureMaps, ImageInfo, Regions, whole_images

_NONE = torch.zeros(0, dtype=torch.int64)


@everyday(
    "features photos weights=detector.safetensors out=features",
    input="images annotations regions_from vocabulary",
    output="out format whole_image",
    model="weights proposer.name",
    quality="max_regions",
    speed="batch_size device",
    unused="detector.allow_background detector.alpha_base detector.alpha_novel detector.fusion "
    "detector.max_detections detector.max_embedded detector.max_proposals detector.min_score "
    "detector.negatives detector.nms detector.nms_type detector.soft_nms_min_score detector.soft_nms_sigma "
    "student.base student.novel student.weights",
)
@dataclass
class FeaturesConfig(DetectorOptions):
    """Options of describing regions."""

    images: list[str] = option(
        [],
        "images, folders of them, or quoted patterns such as 'photos/**/*.jpg'; with annotations=: the "
        "folder that its file names are relative to",
        positional=True,
        renamed_from="photos",
    )
    vocabulary: str = option(
        "",
        'names from which each region gets its most probable ones: "cat, dog", a file with one per line, '
        "coco, coco65, lvis; empty: none",
    )
    annotations: str = option("", "instances_*.json in COCO's format: which images, and their true boxes")
    regions_from: str = option(
        "proposals",
        "which regions: proposals; truth, the annotations' boxes; none; or a file of boxes in COCO's "
        "results format, matched by image_id with annotations=, else by file_name",
        renamed_from="boxes",
    )
    max_regions: int = option(
        100, "maximum number of regions per image, by score (regions_from=truth: all)", renamed_from="regions"
    )
    whole_image: bool = option(False, "also one row for the whole image, before its regions")
    top_k: int = option(
        5, "with vocabulary=: number of names per region, the most probable first", renamed_from="top"
    )
    out: str = option("features", "folder for the files and manifest.json", runtime_only=True)
    format: str = option(
        "parquet",
        "parquet: shards with one row per region; npz: NumPy arrays, one file per image",
        choices=("parquet", "npz"),
    )
    dtype: str = option("float16", "of the embeddings in the files", choices=("float16", "float32"))
    max_skipped: float = max_skipped_option()
    shard_images: int = option(
        256, "images per shard: the amount of work that a stopped run repeats, and that is held in memory"
    )
    executor: str = option("local", EXECUTOR_HELP, runtime_only=True, choices=EXECUTORS)
    workers: int = option(
        1,
        "parallel processes, each on the next GPU; 0: one per core (ray: or one per GPU)",
        runtime_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise InputError("give images (files, folders, patterns), or annotations=FILE images=DIR")
        if self.annotations and len(self.images) > 1:
            raise InputError(
                "annotations=FILE needs the one folder that its file names are relative to: images=DIR; "
                f"found {len(self.images)} images or folders"
            )
        if self.regions_from == "truth" and not self.annotations:
            raise InputError("regions_from=truth needs annotations=FILE images=DIR")
        if self.regions_from == "none" and not self.whole_image:
            raise InputError("regions_from=none leaves nothing to embed; add whole_image=true")
        if self.regions_from != "proposals" and self.proposer["name"] != "none":
            raise InputError(
                f"regions_from={self.regions_from} and proposer.name={self.proposer['name']}: "
                "give one of them"
            )
        require_share(self.max_skipped)
        if min(self.max_regions, self.shard_images, self.top_k) < 1 or self.workers < 0:
            raise InputError("max_regions, shard_images and top_k must be at least 1, workers not negative")

    def inputs(self) -> dict[str, Path | str]:
        """See `DetectorOptions`; and the annotations, the file of boxes, the list of names."""
        annotations = annotation_inputs(self, "annotations")
        return super().inputs() | annotations | files_of(self, "regions_from", "vocabulary")

    @property
    def image_folder(self) -> str:
        """The folder that the annotations' file names are relative to; "" without annotations."""
        return self.images[0] if self.annotations else ""

    @property
    def boxes_file(self) -> str:
        """The file of boxes; "" when they come from elsewhere."""
        return "" if self.regions_from in ("proposals", "truth", "none") else self.regions_from


@dataclass(frozen=True)
class Shard:
    """Images that follow each other in the list: from `start` to before `stop`."""

    number: int
    start: int
    stop: int


class FolderImages(Sequence[ImageAnnotations]):
    """Images without annotations as records without boxes; their ids count them from 1.

    Args:
        files: the images.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        """Returns an `ImageAnnotations`; its height and width, which are not known yet, are 0."""
        return ImageAnnotations(index + 1, self.files[index], 0, 0, torch.zeros(0, 4), _NONE, _NONE.bool())


def record_path(out: Path, number: int) -> Path:
    """Returns the file that says that a shard is done, and what is to be known of it."""
    return out / f".shard-{number:05d}.json"


class RegionFeatureExtractor:
    """Everything that describing a shard needs, loaded once a process.

    Args:
        config: what to describe.
        files: the images, when there are no annotations.
        boxes: a file of boxes that knows images by their ids here; "" when they come from elsewhere.
    """

    def __init__(self, config: FeaturesConfig, files: Sequence[Path], boxes: str) -> None:
        self.config = config
        self.predictor = config.predictor(proposes=config.regions_from == "proposals")
        if config.vocabulary:
            self.predictor.set_vocabulary(config.vocabulary, config.embeddings)
        self.detector, self.device = self.predictor.detector, self.predictor.device
        dataset = CocoDetection(config.annotations, config.image_folder) if config.annotations else None
        self.records: Sequence[ImageAnnotations] = FolderImages(files) if dataset is None else dataset
        self.categories = () if dataset is None else dataset.categories
        if boxes:
            spec = {"name": "precomputed", "file": boxes, "limit": config.max_regions}
            self.predictor.proposer = build_proposer(spec, self.device)
        elif config.regions_from == "truth":
            self.predictor.proposer = TruthProposer(self.records)
        self.names = list(unique_names((record.path, ".npz") for record in self.records))

    def __call__(self, shard: Shard, report: Report) -> None:
        """Writes a shard's files, and at last the record that says so."""
        out, done = Path(self.config.out), dict[int, ImageFeatures]()
        skipped: list[dict[str, Any]] = []

        def skip(row: int, reason: str) -> None:
            skipped.append({"file_name": self._name(self.records[row]), "reason": reason})

        groups = read_batches(
            range(shard.start, shard.stop),
            self._read,
            self.predictor.resize,
            self.config.batch_size,
            self.device,
            on_skip=skip,
        )
        for group in groups:
            done |= {row: features for row, _, features in group.map(self.describe)}
            report(group.count, "")
        found = [done[row] for row in sorted(done)]
        if self.config.format == "npz":
            for row in sorted(done):
                write_arrays(out / self.names[row], done[row])
        else:
            width = self.detector.clip.config.embed_dim
            write_table(shard_path(out, shard.number), found, width, self.config.dtype)
        record = {"images": len(found), "regions": sum(map(len, found)), "skipped": skipped}
        write_json(record_path(out, shard.number), record)

    def _read(self, row: int) -> DecodedImage:
        """Reads an annotated image as its boxes lie, others as people see them."""
        record = self.records[row]
        return read_record(record) if record.height else read_upright(record.path, record.image_id)

    def _name(self, record: ImageAnnotations) -> str:
        folder = self.config.image_folder
        return name_in(Path(folder), record.path) if folder else str(record.path)

    def describe(self, batch: LoadedBatch[int]) -> list[ImageFeatures]:
        """Returns what is to be written of each image of a batch, whose items are rows of `records`."""
        images, records = batch.images, [self.records[row] for row in batch.items]
        with torch.no_grad(), autocast(self.config.precision, self.device):
            regions, embeddings = self._embedded(images, batch.infos)
        regions, features = regions.to("cpu"), embeddings.cpu()
        ranked: list[list[tuple[str, float]]] = []
        if self.config.vocabulary:
            ranked = self.predictor.classify_embeddings(features, self.config.top_k)
        whole = len(images) if self.config.whole_image else 0
        found = []
        for slot, (record, frame) in enumerate(zip(records, batch.transforms, strict=True)):
            mine = torch.nonzero(regions.image_index == slot).flatten()
            boxes = clip_boxes(frame.invert_boxes(regions.boxes[mine]), frame.original)
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

    def _categories(self, record: ImageAnnotations) -> list[str | None]:
        if self.config.regions_from != "truth":
            return []
        names = [self.categories[label] for label in record.without_crowds().labels.tolist()]
        return [None, *names] if self.config.whole_image else [*names]

    def _embedded(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> tuple[Regions, Tensor]:
        """Returns the regions of a batch, whole images first, and their [N, D] unit-length embeddings."""
        detector, limit = self.detector, self.config.max_regions
        maps = FeatureMaps(images)
        if self.config.regions_from == "none":
            regions = Regions.cat([]).to(self.device)
        elif self.predictor.proposer is not None:
            regions = self.predictor.proposer(images, keys)
            if self.config.regions_from != "truth":
                regions = _best(regions, len(images), limit)
        else:
            if detector.shares_trunk:  # the map that the proposals come from is the regions' as well
                maps = detector.feature_maps(images)
            regions = detector.propose(maps, limit)
        scores = regions.scores if regions.scores is not None else regions.boxes.new_ones(len(regions))
        regions = Regions(regions.boxes, regions.image_index, scores.float())
        if self.config.whole_image:
            covering = whole_images(images)
            ones = covering.boxes.new_ones(len(covering))
            regions = Regions.cat([replace(covering, scores=ones), regions])
        if not len(regions):
            return regions, images.pixels.new_zeros(0, detector.clip.config.embed_dim)
        return regions, detector.encoder.embed_maps(maps, regions)


def _best(regions: Regions, images: int, limit: int) -> Regions:
    """Returns at most `limit` regions of each image, the first, which are the best scored."""
    index = regions.image_index.cpu().numpy()
    starts = np.searchsorted(index, np.arange(images))
    within = np.arange(len(index)) - starts[index]
    return regions[torch.from_numpy(within < limit).to(regions.boxes.device)]
