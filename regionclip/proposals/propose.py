"""The job `propose`: writes proposals in COCO's results format or as Parquet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from clip_base.data.coco import annotation_inputs
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import max_skipped_option, require_share
from clip_base.runtime.errors import JobError
from clip_base.runtime.precision import autocast
from clip_base.runtime.progress import Progress
from regionclip.data.annotations import AnnotatedImages, CocoDetection, ImageAnnotations
from regionclip.data.batches import LoadedBatch, note_skipped, read_batches, read_record
from regionclip.data.categories import load_split
from regionclip.metrics.recall import RecallMeter, described
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import build_proposer
from regionclip.proposals.storage import writing
from regionclip.structures.regions import Regions
from regionclip.structures.transforms import ResizeConfig


@everyday(
    "propose annotations=instances.json images=images proposer.name=grid out=boxes",
    input="annotations images split",
    output="out format",
    model="proposer.name",
    quality="resize.short resize.long",
    speed="batch_size device",
)
@dataclass(kw_only=True)
class ProposeConfig(AnnotatedImages, ComputeOptions):
    """Options of proposing."""

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


def propose(config: ProposeConfig) -> None:
    """Writes a proposer's boxes to `out/proposals.json` (COCO's results format) and measures recall."""
    read = annotation_inputs(config, "annotations") | files_of(config, "split", "proposer")
    run = RunFolder(config.out, config, "region-propose", read)
    path = run.path / f"proposals.{config.format}"
    if run.finished() is not None:
        print(f"{run.path} is complete: {path}")
        return
    dataset = CocoDetection(config.annotations, config.images)
    names, often = dataset.categories, dataset.frequencies
    split = load_split(config.split, names, often) if config.split else None
    if split is not None:
        dataset = dataset.restrict(split.all)
    print(dataset.report())
    device = config.pick_device()
    proposer = build_proposer(config.proposer, device)
    skipped: dict[int, str] = {}
    meter, images, count = RecallMeter(apart=split is not None), 0, 0
    is_novel = torch.tensor(
        split.is_novel(dataset.categories) if split else [False] * len(dataset.categories)
    )

    def propose_batch(batch: LoadedBatch[ImageAnnotations]) -> list[Regions]:
        with torch.no_grad(), autocast(config.precision, device):
            found = proposer(batch.images, batch.infos).to("cpu")
        per_image = [found.of_image(slot) for slot in range(len(batch.items))]
        return [
            replace(regions, boxes=transform.invert_boxes(regions.boxes))
            for regions, transform in zip(per_image, batch.transforms, strict=True)
        ]

    groups = read_batches(
        dataset,
        read_record,
        config.resize,
        config.batch_size,
        device,
        on_skip=lambda record, reason: skipped.update({record.image_id: reason}),
    )
    with writing(path) as file, Progress("proposals", len(dataset)) as progress:
        for group in groups:
            for record, _, regions in group.map(propose_batch):
                scores = torch.ones(len(regions)) if regions.scores is None else regions.scores
                file.add(record.image_id, regions.boxes, scores)
                single = record.without_crowds()
                meter.add(single.boxes, regions.boxes, is_novel[single.labels])
                count, images = count + len(regions), images + 1
            progress.advance(group.count)
        note_skipped(run.path / "skipped.jsonl", skipped, dataset, config.max_skipped)
        if not count:
            raise JobError(f"proposer.name={config.proposer['name']} proposed nothing in {images} images")
    metrics: dict[str, Any] = {"images": images, "proposals": count, "skipped": len(skipped)}
    recall = meter.metrics()
    run.finish(metrics | recall)
    print(f"{path}: {count} boxes of {images} images\n{described(recall)}")
