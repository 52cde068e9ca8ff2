"""The job `convert-data`: annotations or detections from one format to another.

regionclip convert-data annotations=instances.json images=images format=yolo out=dataset
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_base.images.roots import ImageRoot
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import track
from clip_base.storage.hashing import text_hash
from clip_base.storage.paths import name_in
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.results import Results, read_results
from regionclip.structures.labels import LABEL_FILES, LabeledImage, LabelTarget, write_labels


@everyday(
    "convert-data annotations=instances.json images=images format=yolo out=dataset",
    input="annotations images results",
    output="out format",
    quality="score_threshold",
)
@dataclass
class ConvertDataConfig:
    """Options of converting annotations and detections."""

    annotations: str = option(
        REQUIRED, "COCO's JSON, or VOC, YOLO, CVAT, Label Studio: whatever `train-detector` reads"
    )
    images: str = option(REQUIRED, "folder that its file names are relative to")
    out: str = option(REQUIRED, "folder to write; coco, csv: a file, or a folder for one", runtime_only=True)
    format: str = option("coco", "coco, yolo, voc, csv, fiftyone, or another label writer that is installed")
    results: str = option(
        "", "a results file in COCO's format: its boxes are written instead of the annotations'"
    )
    score_threshold: float = option(0.3, "results=: boxes that score less are left out, in [0, 1]")

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold <= 1:
            raise InputError(f"score_threshold must be in [0, 1], found {self.score_threshold}")


def convert_data(config: ConvertDataConfig) -> None:
    """Converts annotations, or detections in their images, to the format of another program."""
    ImageRoot(config.images)
    dataset = CocoDetection(config.annotations, config.images)
    print(dataset.report())
    results = _results(config, dataset) if config.results else None
    out = Path(config.out)
    if not out.suffix:
        out /= LABEL_FILES.get(config.format, "")
    info = {key: value for key, value in asdict(config).items() if key != "out"}
    info |= {"description": "boxes converted by regionclip", "content": _content(dataset, results)}
    target = LabelTarget(out, dataset.categories, config.images, info)
    counts = Counter[int]()
    label_of = {category: label for label, category in enumerate(dataset.category_ids)}

    def counted() -> Iterator[LabeledImage]:
        for record in track(dataset, "converting", len(dataset)):
            image = _labeled(record, Path(config.images), label_of, results, config.score_threshold)
            counts.update(image.labels)
            yield image

    if not write_labels(config.format, target, counted()):
        print(f"{out} already exists and was made with the same options")
        return
    print(f"{out}: {counts.total():,} boxes of {len(counts):,} categories in {len(dataset):,} images")


def _content(dataset: CocoDetection, results: dict[int, list[dict[str, Any]]] | None) -> str:
    """Returns a hash of what will be written: the same command after a change of the data is another run."""
    rows = ([r.path, r.boxes.tolist(), r.labels.tolist(), r.iscrowd.tolist()] for r in dataset)
    return text_hash([dataset.categories, *rows, json.dumps(results)])


def _results(config: ConvertDataConfig, dataset: CocoDetection) -> dict[int, list[dict[str, Any]]]:
    """Returns the results' entries by image."""
    names = {record.image_id: str(record.path) for record in dataset}
    ids = dict(zip(dataset.categories, dataset.category_ids, strict=True))
    found: Results = read_results(config.results, names, config.annotations, ids)
    for told in found.notes:
        print(f"note: {told}")
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in found.entries:
        by_image.setdefault(entry["image_id"], []).append(entry)
    return by_image


def _labeled(
    record: ImageAnnotations,
    folder: Path,
    label_of: dict[int, int],
    results: dict[int, list[dict[str, Any]]] | None,
    threshold: float,
) -> LabeledImage:
    """Returns an image with its annotations, or with its results of at least `threshold`."""
    name = name_in(folder, record.path)
    place = (record.image_id, name, record.height, record.width)
    if results is None:
        crowds = record.iscrowd.tolist()
        return LabeledImage(*place, record.boxes.tolist(), record.labels.tolist(), None, crowds)
    boxes, labels, scores = list[list[float]](), list[int](), list[float]()
    for entry in results.get(record.image_id, ()):
        if entry["score"] >= threshold and entry["category_id"] in label_of:
            x, y, width, height = entry["bbox"]
            boxes.append([x, y, x + width, y + height])
            labels.append(label_of[entry["category_id"]])
            scores.append(float(entry["score"]))
    return LabeledImage(*place, boxes, labels, scores)
