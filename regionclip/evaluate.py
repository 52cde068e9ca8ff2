"""The evaluation job: a results file, or weights over true boxes or proposals; novel, base, all."""

# n boxes of one image, C names of the split
from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_base.checkpoint import read_weights
from clip_base.config import REQUIRED, Part, option, part
from clip_base.errors import InputError
from clip_base.files import write_json, write_text
from clip_base.progress import Progress
from clip_base.run import RunFolder
from clip_base.tokenizer import Tokenizer
from clip_base.train import autocast, pick_device
from clip_base.weights import load_clip
from regionclip.coco import read_instances
from regionclip.datasets import CocoDetection
from regionclip.detector import FORMAT as DETECTOR
from regionclip.detector import Detector, DetectorConfig, load_detector
from regionclip.evaluation import classification_accuracy, evaluate_detections
from regionclip.inference import RecordBatch, batches_of, build_proposer, write_skipped
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import Proposer
from regionclip.splits import Split, load_split
from regionclip.structures import Regions
from regionclip.transforms import ResizeConfig
from regionclip.vocabulary import embed

PER_CLASS = ("name", "category_id", "novel", "boxes", "detections", "AP", "AP50")


@dataclass
class EvaluateConfig:
    """Options of the evaluation."""

    annotations: str = option(REQUIRED, "instances_*.json in COCO's form")
    out: str = option(REQUIRED, "folder for metrics.json, per_class.csv and results.json", free=True)
    results: str = option("", "a results file in COCO's form to evaluate; then no weights are needed")
    split: str = option(
        "", "coco, or a JSON file with base and novel names; empty: all categories, none novel"
    )
    images: str = option("", "folder that the annotations' file names are relative to")
    weights: str = option("", "a detector, or a CLIP to evaluate without detector training")
    boxes: str = option(
        "proposals", "what is named: proposals, truth (the true boxes), or the boxes of a results file"
    )
    proposer: Part = part(
        PROPOSERS, "none", "for a CLIP: where regions come from; none: a detector's own network"
    )
    detector: DetectorConfig = option(
        DetectorConfig(), "scores and suppression, for a CLIP or with own_settings=false"
    )
    own_settings: bool = option(
        True, "a detector sees and scores as it was trained to, not as `resize` and `detector` say"
    )
    templates: list[str] = option(
        ["a photo of {article} {}.", "{}"], "prompts, averaged; {} is the class name"
    )
    resize: ResizeConfig = option(ResizeConfig(), "size of the images, for a CLIP or with own_settings=false")
    max_detections: int = option(100, "detections an image that count; LVIS: 300")
    batch_size: int = option(8, "images at once")
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one", free=True)

    def __post_init__(self) -> None:
        if bool(self.results) == bool(self.weights):
            raise InputError(
                "give either results=FILE (to evaluate it) or weights=FILE images=DIR (to detect first)"
            )
        if self.weights and not self.images:
            raise InputError("weights= needs images=DIR, the folder of the annotated images")


def evaluate(config: EvaluateConfig) -> None:
    """Measures detections: AP of novel, base and all classes, and with true boxes top-1 and top-5."""
    run = RunFolder(config.out, config, "region-evaluate")
    metrics = run.finished()
    if metrics is None:
        metrics = _measure(config, run)
        run.finish(metrics)
    for key, value in metrics.items():
        print(f"{key:<14} {value:.4f}" if isinstance(value, float) else f"{key:<14} {value}")


def _measure(config: EvaluateConfig, run: RunFolder) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    results = config.results
    if config.weights:
        results = str(run.path / "results.json")
        metrics |= _detect(config, Path(results))
    names = [str(entry["name"]) for entry in read_instances(config.annotations)["categories"]]
    split = load_split(config.split, names) if config.split else None
    evaluation = evaluate_detections(config.annotations, results, split, config.max_detections)
    _write_per_class(run.path / "per_class.csv", evaluation.per_class)
    if evaluation.ignored:
        metrics["ignored_results"] = evaluation.ignored
    return metrics | evaluation.metrics


def _write_per_class(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(PER_CLASS)
    for row in rows:
        table.writerow([f"{row[key]:.6f}" if key.startswith("AP") else row[key] for key in PER_CLASS])
    write_text(path, text.getvalue())


def load_any(weights: str, config: DetectorConfig, own_settings: bool = True) -> Detector:
    """Returns a detector from a detector's file, or a zero-shot one from a CLIP's."""
    is_ours = weights.endswith(".safetensors")
    if is_ours and read_weights(weights)[1].get("format") == DETECTOR:
        detector = load_detector(weights, None if own_settings else config)[0]
        detector.resize = detector.resize if own_settings else None
        return detector
    return Detector(load_clip(weights), config).eval()


def _detect(config: EvaluateConfig, results: Path) -> dict[str, Any]:
    dataset = CocoDetection(config.annotations, config.images)
    split = load_split(config.split, dataset.categories) if config.split else Split(dataset.categories, ())
    dataset = dataset.restrict(split.all)
    device = pick_device(config.device)
    detector = load_any(config.weights, config.detector, config.own_settings).to(device)
    proposer: Proposer | None = None
    if config.proposer["name"] != "none":
        proposer = build_proposer(config.proposer, device)
    elif config.boxes not in ("proposals", "truth"):
        proposer = build_proposer({"name": "precomputed", "file": config.boxes}, device)
    elif config.boxes == "proposals" and detector.network is None:
        raise InputError(
            f"{config.weights} is a CLIP without a proposal network; give proposer.name=rpn, say"
        )
    tokenizer = Tokenizer(detector.clip.config.text.context_length)
    novel = torch.tensor(split.is_novel(split.all))
    detector.set_vocabulary(
        embed(detector.clip, tokenizer, split.all, config.templates, novel), config.weights
    )
    entries: list[dict[str, Any]] = []
    skipped: dict[int, str] = {}
    named: list[tuple[torch.Tensor, torch.Tensor]] = []
    with Progress("detecting", len(dataset)) as progress:
        for batch in batches_of(
            dataset, detector.resize or config.resize, config.batch_size, device, skipped
        ):
            with torch.no_grad(), autocast(config.precision, device):
                if config.boxes == "truth":
                    found, scores = name_true_boxes(detector, batch, dataset.category_ids)
                    entries += found
                    named.append(scores)
                else:
                    for record, one in zip(
                        batch.records,
                        detector.detect_batch(batch.images, batch.frames, batch.keys, proposer),
                        strict=True,
                    ):
                        entries += one.to_coco(record.image_id, dataset.category_ids)
            progress.advance(len(batch.records))
    write_skipped(results.with_name("skipped.jsonl"), skipped)
    write_json(results, entries)
    metrics: dict[str, Any] = {"images": len(dataset) - len(skipped), "skipped": len(skipped)}
    if named:
        probabilities, labels = (torch.cat(column) for column in zip(*named, strict=True))
        metrics |= classification_accuracy(probabilities, labels, novel if config.split else None)
    return metrics


def name_true_boxes(
    detector: Detector, batch: RecordBatch, category_ids: tuple[int, ...]
) -> tuple[list[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]:
    """Names the true boxes of a batch; crowds are left out.

    Returns:
        COCO results, one for each name of a box; and [n, C] probabilities with the [n] true labels.
    """
    records = [record.without_crowds() for record in batch.records]
    boxes = [frame.boxes_in(record.boxes) for record, frame in zip(records, batch.frames, strict=True)]
    counts = torch.tensor([len(part) for part in boxes])
    index = torch.repeat_interleave(torch.arange(len(boxes)), counts)
    regions = Regions(torch.cat(boxes), index).to(batch.images.pixels.device)
    probabilities = detector.classify(batch.images, regions, background=False)[0].cpu()
    labels = torch.cat([record.labels for record in records])
    entries = []
    for row, (image, box) in enumerate(
        zip(index.tolist(), torch.cat([r.boxes for r in records]), strict=True)
    ):
        x1, y1, x2, y2 = box.tolist()
        best = probabilities[row].topk(min(5, probabilities.shape[1]))
        entries += [
            {
                "image_id": records[image].image_id,
                "category_id": category_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return entries, (probabilities, labels)
