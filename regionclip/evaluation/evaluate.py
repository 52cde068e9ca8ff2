"""The job `evaluate`: a results file, or weights on ground-truth boxes or proposals; novel, base, all."""

# n boxes of one image, C names of the split
from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_base.data.coco import annotation_inputs, coco_entry, read_instances
from clip_base.evaluation.tables import figure_lines
from clip_base.images.roots import ImageRoot
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import max_skipped_option, require_share
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.runtime.progress import Progress
from clip_base.storage.files import write_json, write_text
from clip_base.storage.tables import TableWriter
from clip_base.weights.load import weight_files
from regionclip.checkpoints.load import look_for, vocabulary_for
from regionclip.data.annotations import AnnotatedImages, CocoDetection, ImageAnnotations
from regionclip.data.batches import LoadedBatch, note_skipped, read_batches, read_record
from regionclip.data.categories import Split, load_split, parse_names
from regionclip.data.results import Results, numbered_by, read_results
from regionclip.evaluation.report_page import write_page
from regionclip.evaluation.results_checks import Measure, box_note, order_note
from regionclip.inference.options import DetectorOptions
from regionclip.metrics.average_precision import (
    Evaluation,
    Protocol,
    check_protocol,
    classification_accuracy,
    evaluate_detections,
)
from regionclip.metrics.matching import match_to_ground_truth
from regionclip.models.detector import Detector
from regionclip.proposals.base import Proposer, build_proposer
from regionclip.proposals.precomputed import TruthProposer
from regionclip.structures.boxes import xyxy_to_xywh
from regionclip.structures.detections import Detections
from regionclip.structures.regions import Regions

PAGE = "report.html"
PER_CLASS = ("name", "category_id", "novel", "boxes", "detections", "AP", "AP50")
DOUBTFUL = 0.02
_RENUMBER = (
    "if its category ids count a class list, say which: results_categories=coco, coco65 or a file, "
    "results_first_id=1 when they count from 1"
)


@everyday(
    "evaluate annotations=instances.json images=images weights=detector.safetensors out=evaluation",
    input="annotations images results split boxes",
    output="out report",
    model="weights proposer.name",
    speed="batch_size device",
)
@dataclass(kw_only=True)
class EvaluateConfig(AnnotatedImages, DetectorOptions):
    """Options of the evaluation."""

    out: str = option(
        REQUIRED, "folder for metrics.json, per_class.csv, results.json and report.html", runtime_only=True
    )
    results: str = option("", "a results file in COCO's format to evaluate; then no weights are needed")
    results_categories: str = option(
        "",
        "class list that the results' category ids count, such as coco65 or a file with one name per line; "
        "empty: they are the annotations' own ids",
        renamed_from="result_classes",
    )
    results_first_id: int = option(0, "category id of that list's first class", renamed_from="result_first")
    split: str = option(
        "",
        "coco, lvis, a JSON file with base and novel names, or class lists BASE.txt,NOVEL.txt; "
        "empty: all categories, none novel",
    )
    label_set: str = option(
        "all",
        "names that compete: all (the generalized setting), or only the split's base or novel ones",
        choices=("all", "base", "novel"),
        renamed_from="compete",
    )
    images: str = option(
        "",
        "folder that the annotations' file names are relative to; with results= for the images of the report",
    )
    weights: str = option("", "a detector (ours or RegionCLIP's), or a CLIP to evaluate without training")
    boxes: str = option(
        "proposals",
        "what is named: proposals; truth (the true boxes, the best five names of each); truth_suppressed "
        "(the true boxes as proposals, as RegionCLIP's authors test); or the boxes of a results file",
    )
    protocol: str = option(
        "auto",
        "coco; lvis (federated); auto uses lvis if the annotations say which categories were checked",
        choices=("auto", "coco", "lvis"),
    )
    evaluator: str = option(
        "pycocotools",
        "fast: faster-coco-eval, the same metrics, several times faster for COCO but not for LVIS "
        "(pip install 'regionclip[fast]')",
        choices=("pycocotools", "fast"),
    )
    max_detections: int = option(
        0, "detections that count per image and category (LVIS: per image); 0: 100 (LVIS: 300)"
    )
    max_skipped: float = max_skipped_option()
    report: bool = option(True, "write report.html: curves, confusions, images when images= is given")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.results) == bool(self.weights):
            raise InputError(
                "give either results=FILE (to evaluate it) or weights=FILE images=DIR (to detect first)"
            )
        require_share(self.max_skipped)
        if self.results and self.student.file:
            raise InputError("student.weights= is combined with weights=; results= are detections already")
        if self.weights and not self.images:
            raise InputError("weights= needs images=DIR, the folder of the annotated images")
        if self.label_set != "all" and not self.split:
            raise InputError(
                f"label_set={self.label_set} needs split=, which says which names are {self.label_set}"
            )
        if self.results_categories and not self.results:
            raise InputError("results_categories= describes results=; also give results=FILE")
        if self.results_first_id not in (0, 1) or self.max_detections < 0:
            raise InputError(
                f"results_first_id={self.results_first_id} must be 0 or 1, "
                f"max_detections={self.max_detections} not negative"
            )


def evaluate(config: EvaluateConfig) -> None:
    """Evaluates detections: AP of novel, base and all classes; for ground-truth boxes top-1 and top-5."""
    files = ("results", "results_categories", "boxes", "split", "embeddings", "proposer")
    inputs = annotation_inputs(config, "annotations") | files_of(config, *files)
    inputs |= weight_files(config, "weights", "text_weights") | config.student_file()
    run = RunFolder(config.out, config, "region-evaluate", inputs)
    metrics = run.finished()
    if metrics is None:
        metrics = _measure(config, run)
        run.finish(metrics)
    print("\n".join(figure_lines(metrics)))
    if (run.path / PAGE).exists():
        print(f"open {run.path / PAGE} in a browser")


def _measure(config: EvaluateConfig, run: RunFolder) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if config.images:
        ImageRoot(config.images)
    content = read_instances(config.annotations)
    truth = CocoDetection(config.annotations, None, content=content)
    print(truth.report())
    if not truth.categories:
        raise InputError(
            f"annotations file {config.annotations} lists no categories, so there is nothing to classify"
        )
    split = load_split(config.split, truth.categories, truth.frequencies) if config.split else None
    names = truth.categories if split is None else split.competing(config.label_set)
    if not names:
        raise InputError(
            f"label_set={config.label_set}: split {config.split} has no {config.label_set} categories"
        )
    protocol = Protocol(config.protocol, config.evaluator, config.max_detections, config.label_set)
    check_protocol(content, config.annotations, split, protocol)

    def measure(results: str | list[dict[str, Any]]) -> Evaluation:
        return evaluate_detections(config.annotations, results, split, protocol, content)

    read, entries = None, list[dict[str, Any]]()
    if config.weights:
        results = run.path / "results.json"
        metrics |= _detect(config, content, split, names, results)
        evaluation = measure(str(results))
    else:
        read = _read(config, truth)
        entries = _renumbered(read.entries, config, truth)
        evaluation = measure(entries)
    _write_per_class(run.path / "per_class.csv", evaluation.per_class)
    if evaluation.ignored or (read and read.unknown):
        metrics["ignored_results"] = evaluation.ignored + (read.unknown if read else 0)
    metrics |= evaluation.metrics
    if read is not None:
        _say_doubts(
            config, truth, read, entries, metrics["AP50"], lambda tried: measure(tried).metrics["AP50"]
        )
    if config.report or (config.results and metrics["AP50"] < DOUBTFUL):
        matches = match_to_ground_truth(truth.restrict(names), evaluation.counted)
        if config.results and metrics["AP50"] < DOUBTFUL and matches.names_do_not_fit():
            print(
                f"note: the boxes of {config.results} match objects, but their names hardly ever do; "
                f"{_RENUMBER}"
            )
        if config.report:
            images = ImageRoot(config.images) if config.images else None
            write_page(run.path / PAGE, evaluation, matches, truth, images, metrics)
    return metrics


def _read(config: EvaluateConfig, truth: CocoDetection) -> Results:
    """Reads the results file, and prints what was found by name."""
    images = {record.image_id: str(record.path) for record in truth}
    ids = None if config.results_categories else _ids(truth)
    read = read_results(config.results, images, config.annotations, ids)
    if config.results_categories and read.named:
        raise InputError(
            f"{config.results} gives a category_name for each detection: omit results_categories="
        )
    for note in read.notes:
        print(f"note: {note}")
    return read


def _ids(truth: CocoDetection) -> dict[str, int]:
    return dict(zip(truth.categories, truth.category_ids, strict=True))


def _renumbered(
    entries: list[dict[str, Any]], config: EvaluateConfig, truth: CocoDetection
) -> list[dict[str, Any]]:
    """Returns results with the annotations' category ids instead of places in a class list."""
    if not config.results_categories:
        return entries
    return numbered_by(entries, parse_names(config.results_categories), config.results_first_id, _ids(truth))


def _say_doubts(
    config: EvaluateConfig,
    truth: CocoDetection,
    read: Results,
    entries: list[dict[str, Any]],
    ap50: float,
    measure: Measure,
) -> None:
    """Prints in which order a class list was counted, and that boxes seem to be in another form.

    Args:
        config: the options.
        truth: the annotations.
        read: the results with the numbers of the file.
        entries: the same with the annotations' numbers.
        ap50: what they give.
        measure: gives the AP50 of others.
    """
    sizes = {record.image_id: (record.height, record.width) for record in truth}
    note = box_note(entries, sizes, ap50, measure)
    if note:
        print(f"note: {config.results}: {note}")
    if config.results_categories:
        names = parse_names(config.results_categories)
        note = order_note(read.entries, names, config.results_first_id, _ids(truth), ap50, measure)
        print(f"note: results_categories={config.results_categories}: {note}")


def _write_per_class(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = TableWriter(text)
    table.writerow(PER_CLASS)
    for row in rows:
        table.writerow([f"{row[key]:.6f}" if key.startswith("AP") else row[key] for key in PER_CLASS])
    write_text(path, text.getvalue())


def _detect(
    config: EvaluateConfig, content: dict[str, Any], split: Split | None, names: Sequence[str], results: Path
) -> dict[str, Any]:
    whole = CocoDetection(config.annotations, config.images, content=content)
    dataset = whole.restrict(names)
    device = config.pick_device()
    detector = config.load().to(device)
    proposer: Proposer | None = None
    if config.proposer["name"] != "none":
        proposer = build_proposer(config.proposer, device)
    elif config.boxes == "truth_suppressed":
        proposer = TruthProposer(dataset)
    elif config.boxes not in ("proposals", "truth"):
        proposer = build_proposer({"name": "precomputed", "file": config.boxes}, device)
    elif config.boxes == "proposals" and detector.network is None:
        raise InputError(
            f"{config.weights} is a CLIP without a proposal network; give, for example, proposer.name=rpn"
        )
    novel = torch.tensor(split.is_novel(names)) if split else None
    vocabulary = vocabulary_for(detector, names, whole.categories, config.templates, novel, config.embeddings)
    look_for(detector, vocabulary, config.templates, own_words=False, source=config.weights)
    entries: list[dict[str, Any]] = []
    skipped: dict[int, str] = {}
    named: list[tuple[torch.Tensor, torch.Tensor]] = []

    def detect_batch(batch: LoadedBatch[ImageAnnotations]) -> Sequence[Detections]:
        return detector.detect_batch(batch.images, batch.transforms, batch.infos, proposer)

    groups = read_batches(
        dataset,
        read_record,
        detector.resize,
        config.batch_size,
        device,
        on_skip=lambda record, reason: skipped.update({record.image_id: reason}),
    )
    with Progress("detecting", len(dataset)) as progress:
        for group in groups:
            with torch.no_grad(), autocast(config.precision, device):
                if config.boxes == "truth":
                    for batch in group.batches:
                        found, scores = name_true_boxes(detector, batch, dataset.category_ids)
                        entries += found
                        named.append(scores)
                else:
                    for record, _, detections in group.map(detect_batch):
                        entries += detections.to_coco(record.image_id, dataset.category_ids)
            progress.advance(group.count)
    note_skipped(results.with_name("skipped.jsonl"), skipped, dataset, config.max_skipped)
    write_json(results, entries)
    metrics: dict[str, Any] = {"images": len(dataset) - len(skipped), "skipped": len(skipped)}
    if dataset.missing:
        metrics["missing"] = len(dataset.missing)
        print(
            f"note: {len(dataset.missing)} annotated images are not in {config.images}, first "
            f"{dataset.missing[0].name}; their objects count as missed"
        )
    if named:
        probabilities, labels = (torch.cat(column) for column in zip(*named, strict=True))
        metrics |= classification_accuracy(probabilities, labels, novel)
    return metrics


def name_true_boxes(
    detector: Detector, batch: LoadedBatch[ImageAnnotations], category_ids: tuple[int, ...]
) -> tuple[list[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]:
    """Names the true boxes of a batch; crowds are left out.

    Returns:
        COCO results, one for each name of a box; and [n, C] probabilities with the [n] true labels.
    """
    records = [record.without_crowds() for record in batch.items]
    boxes = [
        transform.apply_boxes(record.boxes)
        for record, transform in zip(records, batch.transforms, strict=True)
    ]
    counts = torch.tensor([len(rows) for rows in boxes])
    index = torch.repeat_interleave(torch.arange(len(boxes)), counts)
    regions = Regions(torch.cat(boxes), index).to(batch.images.pixels.device)
    probabilities = detector.classify(detector.feature_maps(batch.images), regions, background=False)[0].cpu()
    labels = torch.cat([record.labels for record in records])
    entries = []
    for row, (image, box) in enumerate(
        zip(index.tolist(), torch.cat([r.boxes for r in records]), strict=True)
    ):
        sides = xyxy_to_xywh(box.double()).tolist()
        best = probabilities[row].topk(min(5, probabilities.shape[1]))
        entries += [
            coco_entry(records[image].image_id, category_ids[label], sides, score)
            for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return entries, (probabilities, labels)
