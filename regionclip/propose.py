"""Proposals of any proposer, written in COCO's results form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clip_base.config import REQUIRED, Part, option, part
from clip_base.files import write_json
from clip_base.progress import Progress
from clip_base.run import RunFolder
from clip_base.train import autocast, pick_device
from regionclip.boxes import xyxy_to_xywh
from regionclip.datasets import CocoDetection
from regionclip.evaluation import proposal_recall
from regionclip.inference import batches_of, build_proposer, write_skipped
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.splits import load_split
from regionclip.transforms import ResizeConfig


@dataclass
class ProposeConfig:
    """Options of proposing."""

    annotations: str = option(
        REQUIRED, "instances_*.json in COCO's form: which images, and true boxes for recall"
    )
    images: str = option(REQUIRED, "folder that its file names are relative to")
    split: str = option(
        "", "coco or a JSON file: recall of base and novel classes apart; empty: of all together"
    )
    out: str = option(REQUIRED, "folder for proposals.json and metrics.json", free=True)
    proposer: Part = part(PROPOSERS, "rpn", "where regions come from")
    resize: ResizeConfig = option(ResizeConfig(), "size of the images")
    batch_size: int = option(16, "images at once")
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one", free=True)


def propose(config: ProposeConfig) -> None:
    """Writes a proposer's boxes as `out/proposals.json` in COCO's results form, and measures their recall."""
    run = RunFolder(config.out, config, "region-propose")
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'proposals.json'}")
        return
    dataset = CocoDetection(config.annotations, config.images)
    split = load_split(config.split, dataset.categories) if config.split else None
    if split is not None:
        dataset = dataset.restrict(split.all)
    device = pick_device(config.device)
    proposer = build_proposer(config.proposer, device)
    skipped: dict[int, str] = {}
    results: list[dict[str, Any]] = []
    truth, boxes, novel = [], [], []
    is_novel = torch.tensor(
        split.is_novel(dataset.categories) if split else [False] * len(dataset.categories)
    )
    with Progress("proposals", len(dataset)) as progress:
        for batch in batches_of(dataset, config.resize, config.batch_size, device, skipped):
            with torch.no_grad(), autocast(config.precision, device):
                found = proposer(batch.images, batch.keys).to("cpu")
            for slot, record in enumerate(batch.records):
                mine = found.of_image(slot)
                originals = batch.frames[slot].boxes_out(mine.boxes)
                scores = torch.ones(len(mine)) if mine.scores is None else mine.scores
                results += _entries(record.image_id, originals, scores)
                single = record.without_crowds()
                truth.append(single.boxes)
                novel.append(is_novel[single.labels])
                boxes.append(originals)
            progress.advance(len(batch.records))
    write_skipped(run.path / "skipped.jsonl", skipped)
    write_json(run.path / "proposals.json", results)
    metrics: dict[str, Any] = {"images": len(truth), "proposals": len(results), "skipped": len(skipped)}
    metrics |= proposal_recall(truth, boxes, novel if split else None)
    run.finish(metrics)
    shown = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if key.startswith("recall"))
    print(f"{run.path / 'proposals.json'}: {len(results)} boxes of {len(truth)} images; {shown}")


def _entries(image_id: int, boxes: torch.Tensor, scores: torch.Tensor) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image_id,
            "category_id": 1,
            "bbox": [round(side, 2) for side in box],
            "score": round(score, 5),
        }
        for box, score in zip(xyxy_to_xywh(boxes.double()).tolist(), scores.tolist(), strict=True)
    ]
