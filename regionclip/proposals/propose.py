"""The job `propose`: writes proposals in COCO's results format or as Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clip_base.data.coco import annotation_inputs
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import max_skipped_option, require_share, require_usable, write_skipped
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.precision import autocast
from clip_base.runtime.progress import Progress
from clip_base.storage.hashing import text_hash
from clip_base.storage.tars import names_tars
from regionclip.data.annotations import CocoDetection
from regionclip.data.batches import DecodedImage, LoadedBatch, note_skipped, read_batches, read_record
from regionclip.data.caption_index import CaptionedImageEntry
from regionclip.data.categories import load_split
from regionclip.data.entries import ListedImages, SourceImages, images_below, read_entry
from regionclip.data.pairs import PairOptions
from regionclip.metrics.recall import RecallMeter, described
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import build_proposer
from regionclip.proposals.storage import writing
from regionclip.structures.regions import Regions
from regionclip.structures.transforms import ResizeConfig

Item = TypeVar("Item")


@everyday(
    "propose annotations=instances.json images=images proposer.name=grid out=boxes",
    input="annotations images captions split",
    output="out format",
    model="proposer.name",
    quality="resize.short resize.long",
    speed="batch_size device",
)
@dataclass(kw_only=True)
class ProposeConfig(PairOptions, ComputeOptions):
    """Options of proposing."""

    images: str = option(
        "",
        "folder (with those below), pattern such as 'photos/*.jpg', or webdataset tars; with annotations= or "
        "captions=: what their file names are relative to",
    )
    annotations: str = option("", "instances_*.json in COCO's format: which images; recall is measured")
    captions: str = option(
        "", "instead of annotations=: a captions file whose images are to be used, see `regionclip mine`"
    )
    split: str = option(
        "", "coco or a JSON file: separate recall for base and novel classes; empty: for all together"
    )
    out: str = option(REQUIRED, "folder for the proposals and metrics.json", runtime_only=True)
    format: str = option(
        "json",
        "json: proposals.json in COCO's results format; parquet: proposals.parquet, smaller and faster to "
        "read",
        choices=("json", "parquet"),
    )
    proposer: Plugin = plugin(PROPOSERS, "rpn", "proposer of regions")
    resize: ResizeConfig = option(ResizeConfig(), "size of the images")
    batch_size: int = option(16, "images per batch")
    max_skipped: float = max_skipped_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self.max_skipped)

    @property
    def is_listing(self) -> bool:
        """Whether `images` alone says which: a folder or a pattern."""
        return not (self.annotations or self.captions or names_tars(self.images)) and bool(self.images)

    def inputs(self) -> dict[str, Path | str]:
        """Returns what decides the result besides the options.

        Raises:
            InputError: no images are given, or they are not there.
        """
        if self.annotations and (self.captions or self.source["name"] != "none"):
            raise InputError("give annotations=, or captions= or source.name=…, not both")
        if self.split and not self.annotations:
            raise InputError(f"split={self.split} is for recall, which needs annotations=")
        if self.annotations and not self.images:
            raise InputError(f"annotations={self.annotations} need images=, what their names are relative to")
        if not (self.images or self.captions or self.source["name"] != "none"):
            raise InputError("give images= (a folder, pattern or tars), captions= or source.name=…")
        if self.annotations:
            read = annotation_inputs(self, "annotations")
        else:
            listing = self.is_listing
            read = {"image_list": text_hash(images_below(self.images))} if listing else self.pair_inputs()
        return read | files_of(self, "split", "proposer")


def propose(config: ProposeConfig) -> None:
    """Writes a proposer's boxes to `out/proposals.json` (COCO's results format), and measures recall.

    Without annotations there is no recall, and each box says what its image is found by: its file name, its
    key in the source and its size.
    """
    run = RunFolder(config.out, config, "region-propose", config.inputs())
    path = run.path / f"proposals.{config.format}"
    if run.finished() is not None:
        print(f"{run.path} is complete: {path}")
        return
    device = config.pick_device()
    if config.annotations:
        metrics, told = _of_annotations(config, run.path, path, device)
    else:
        metrics, told = _of_images(config, run.path, path, device), ""
    run.finish(metrics)
    print(f"{path}: {metrics['proposals']} boxes of {metrics['images']} images{told}")


def _of_annotations(
    config: ProposeConfig, folder: Path, path: Path, device: torch.device
) -> tuple[dict[str, Any], str]:
    """Writes proposals of annotated images; returns counts with recall, and recall in words."""
    dataset = CocoDetection(config.annotations, config.images)
    names, often = dataset.categories, dataset.frequencies
    split = load_split(config.split, names, often) if config.split else None
    if split is not None:
        dataset = dataset.restrict(split.all)
    print(dataset.report())
    meter, images, count = RecallMeter(apart=split is not None), 0, 0
    is_novel = torch.tensor(
        split.is_novel(dataset.categories) if split else [False] * len(dataset.categories)
    )
    skipped: dict[int, str] = {}
    found = _proposed(
        config,
        device,
        dataset,
        read_record,
        on_skip=lambda record, reason: skipped.update({record.image_id: reason}),
    )
    with writing(path) as file, Progress("proposals", len(dataset)) as progress:
        for done, group in found:
            for record, regions, _ in group:
                file.add(record.image_id, regions.boxes, _scores(regions))
                single = record.without_crowds()
                meter.add(single.boxes, regions.boxes, is_novel[single.labels])
                count, images = count + len(regions), images + 1
            progress.advance(done)
        note_skipped(folder / "skipped.jsonl", skipped, dataset, config.max_skipped)
        _require_some(config, count, images)
    recall = meter.metrics()
    counts: dict[str, Any] = {"images": images, "proposals": count, "skipped": len(skipped)}
    return counts | recall, f"\n{described(recall)}"


def _of_images(config: ProposeConfig, folder: Path, path: Path, device: torch.device) -> dict[str, Any]:
    """Writes proposals of images without annotations, with what these are found by; returns counts."""
    index, listed = folder / ".images.db", folder / "skipped.jsonl"
    source: ListedImages | SourceImages
    if config.is_listing:
        source = ListedImages(config.images)
    else:
        source = SourceImages(config.source_options(), index)
    skipped: list[dict[str, Any]] = []

    def skip(entry: CaptionedImageEntry, reason: str) -> None:
        skipped.append({"image_id": entry.image_id, "file_name": source.name(entry), "reason": reason})

    found = _proposed(config, device, source, lambda entry: read_entry(entry, source.root), skip)
    images = count = 0
    with writing(path, with_origins=True) as file, Progress("proposals", source.total) as progress:
        for done, group in found:
            for entry, regions, (height, width) in group:
                origin: dict[str, str | int]
                origin = {"file_name": source.name(entry), "key": entry.key, "height": height, "width": width}
                file.add(entry.image_id, regions.boxes, _scores(regions), **origin)
                count, images = count + len(regions), images + 1
            progress.advance(done)
        if skipped:
            write_skipped(listed, skipped)
        reasons = [entry["reason"] for entry in skipped]
        require_usable(reasons, images + len(skipped), config.max_skipped, listed if skipped else None)
        _require_some(config, count, images)
    index.unlink(missing_ok=True)
    return {"images": images, "proposals": count, "skipped": len(skipped)}


def _proposed(
    config: ProposeConfig,
    device: torch.device,
    items: Iterable[Item],
    read: Callable[[Item], DecodedImage],
    on_skip: Callable[[Item, str], None],
) -> Iterator[tuple[int, list[tuple[Item, Regions, tuple[int, int]]]]]:
    """Yields, some images at a time, how many were read, and of each readable one its regions and size."""
    proposer = build_proposer(config.proposer, device)

    def propose_batch(batch: LoadedBatch[Item]) -> list[tuple[Regions, tuple[int, int]]]:
        with torch.no_grad(), autocast(config.precision, device):
            found = proposer(batch.images, batch.infos).to("cpu")
        per_image = [found.of_image(slot) for slot in range(len(batch.items))]
        return [
            (replace(regions, boxes=transform.invert_boxes(regions.boxes)), transform.original)
            for regions, transform in zip(per_image, batch.transforms, strict=True)
        ]

    for group in read_batches(items, read, config.resize, config.batch_size, device, on_skip=on_skip):
        yield group.count, [(item, *result) for item, _, result in group.map(propose_batch)]


def _scores(regions: Regions) -> Tensor:
    return torch.ones(len(regions)) if regions.scores is None else regions.scores


def _require_some(config: ProposeConfig, count: int, images: int) -> None:
    if not count:
        raise JobError(f"proposer.name={config.proposer['name']} proposed nothing in {images} images")
