"""Mined regions as training data for any detector: COCO annotations, YOLO's text files, a FiftyOne folder.

regionclip export mined=runs/mined out=pseudo/instances.json classes=[coco65] min_probability=0.5
"""

# N candidate boxes of an image
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import existing, replacing, write_text
from clip_base.runtime.json_stream import stream_entries
from clip_base.runtime.progress import Progress
from clip_base.weights.native import file_hash
from regionclip.concepts.synonyms import aliases_of, given_classes
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining.shards import MANIFEST, MinedRegion, read_manifest, read_regions
from regionclip.structures.boxes import nms


@dataclass
class ExportConfig:
    """Options of exporting."""

    mined: str = option(REQUIRED, "folder of mined pairs from `regionclip mine`")
    out: str = option(REQUIRED, "format=coco: JSON file to write; other formats: folder", runtime_only=True)
    format: str = option(
        "coco",
        "coco: one file of annotations; yolo: labels/*.txt and data.yaml; fiftyone: labels.json and data/",
        choices=("coco", "yolo", "fiftyone"),
    )
    classes: list[str] = option(
        [], "class lists whose classes are the categories (coco, coco65, files …); empty: the mined concepts"
    )
    min_probability: float = option(0.0, "labels that the teacher finds less probable are left out, 0…1")
    min_objectness: float = option(0.0, "regions with less objectness are left out, 0…1")
    labels: int = option(1, "concepts of a region that may become its labels, the most probable ones")
    nms: float = option(
        0.5, "IoU above which the lower scored of two boxes of a category is dropped; 1: none"
    )
    keep_empty: bool = option(False, "keep images of which no box is left: a detector takes them for empty")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in ("min_probability", "min_objectness", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in 0…1, got {getattr(self, name)}")
        if self.labels < 1:
            raise InputError(f"labels must be at least 1 a region, got {self.labels}")


@dataclass(frozen=True)
class LabeledImage:
    """An image with its labels.

    Attributes:
        image: any of its regions, for what they say of the image.
        boxes: N boxes (x1, y1, x2, y2) in pixels of the original image.
        labels: of each box, into the categories.
        scores: of each box: probability times objectness.
    """

    image: MinedRegion
    boxes: list[list[float]]
    labels: list[int]
    scores: list[float]


class Categories:
    """Which category a mined concept is: its own, or the class of a list that it or a synonym names.

    Args:
        config: names the class lists, if any.
        concepts: names of the vocabulary's rows.
    """

    def __init__(self, config: ExportConfig, concepts: tuple[str, ...]) -> None:
        if not config.classes:
            self.names, self.of_concept = list(concepts), list[int | None](range(len(concepts)))
            return
        classes = given_classes(config.classes)
        self.names = [entry[0] for entry in classes]
        labels, aliases = {name: label for label, name in enumerate(self.names)}, aliases_of(classes)
        self.of_concept = [labels.get(aliases.get(name, name)) for name in concepts]
        if all(label is None for label in self.of_concept):
            raise InputError(
                f"none of the {len(concepts)} mined concepts is a class of {', '.join(config.classes)}; "
                "mine with a pool that holds them (`regionclip concepts classes=…`)"
            )


def export(config: ExportConfig) -> None:
    """Writes mined regions as COCO annotations, YOLO labels or a FiftyOne folder, to train on or look at."""
    manifest = read_manifest(config.mined)
    options = {key: value for key, value in asdict(config).items() if key != "out"}
    made = {
        "description": "region-phrase pairs mined by regionclip; no box was drawn by hand",
        "manifest_sha256": file_hash(Path(config.mined) / MANIFEST),
        "options": options,
    }
    concepts = Vocabulary.load(Path(config.mined) / "vocabulary.safetensors").names
    categories = Categories(config, concepts)
    write = {"coco": _write_coco, "yolo": _write_yolo, "fiftyone": _write_fiftyone}[config.format]
    found = write(config, manifest, categories, made)
    if found is None:
        print(f"{config.out} is there already, made with the same options")
        return
    counts, images = found
    often = ", ".join(f"{categories.names[label]} {count:,}" for label, count in counts.most_common(5))
    print(
        f"{config.out}: {counts.total():,} boxes of {len(counts):,} of {len(categories.names):,} categories "
        f"in {images:,} images; most frequent: {often or 'none'}"
    )


def labelled(config: ExportConfig, of_concept: list[int | None]) -> Iterator[LabeledImage]:
    """Yields the mined images with the labels that pass the thresholds."""
    regions = read_regions(config.mined)
    for _, group in groupby(regions, key=lambda region: region.image_id):
        rows, candidates = list(group), []
        for region in rows:
            if region.objectness < config.min_objectness:
                continue
            named: dict[int, float] = {}  # several concepts may be names of one class
            pairs = zip(region.concept_ids, region.concept_probs, strict=True)
            for concept, probability in list(pairs)[: config.labels]:
                label = of_concept[concept]
                # A probability of 0 fills up rows; it says nothing.
                if label is not None and probability and probability >= config.min_probability:
                    named[label] = max(named.get(label, 0.0), probability)
            candidates += [
                (list(region.box), label, probability * region.objectness)
                for label, probability in named.items()
            ]
        chosen = _without_doubles(candidates, config.nms)
        if chosen or config.keep_empty:
            boxes, labels, scores = (
                (list(column) for column in zip(*chosen, strict=True)) if chosen else ([],) * 3
            )
            yield LabeledImage(rows[0], boxes, labels, scores)


Candidate = tuple[list[float], int, float]


def _without_doubles(candidates: list[Candidate], threshold: float) -> list[Candidate]:
    if threshold >= 1 or len(candidates) < 2:
        return candidates
    boxes, labels, scores = (torch.tensor(column) for column in zip(*candidates, strict=True))
    return [candidates[row] for row in sorted(nms(boxes, scores, labels, threshold).tolist())]


def _write_coco(
    config: ExportConfig, manifest: dict[str, Any], categories: Categories, made: dict[str, Any]
) -> tuple[Counter[int], int] | None:
    """Writes the annotations one by one; returns boxes by category and the number of images."""
    out = Path(config.out)
    if out.is_dir():
        raise InputError(f"out={out} is a folder; give a file, such as {out / 'instances.json'}")
    if out.exists():
        if next(stream_entries(out, "annotations file"), None) == ("info", made):
            return None
        raise InputError(
            f"{out} is there and was not made so (other options or pairs); delete it or give another out="
        )
    listed = [{"id": label + 1, "name": name} for label, name in enumerate(categories.names)]
    counts: Counter[int] = Counter()
    images, number = list[dict[str, Any]](), 0
    with (
        replacing(out) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        Progress("exporting", manifest["images"] - manifest["skipped"]) as progress,
    ):
        file.write(f'{{"info": {_json(made)},\n"categories": {_json(listed)},\n"annotations": [')
        for found in labelled(config, categories.of_concept):
            of_image = found.image
            images.append(
                {
                    "id": of_image.image_id,
                    "file_name": of_image.file_name,
                    "height": of_image.height,
                    "width": of_image.width,
                }
            )
            for (x1, y1, x2, y2), label, score in zip(found.boxes, found.labels, found.scores, strict=True):
                file.write(",\n" if number else "\n")
                counts[label], number = counts[label] + 1, number + 1
                annotation = {
                    "id": number,
                    "image_id": of_image.image_id,
                    "category_id": label + 1,
                    "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": round((x2 - x1) * (y2 - y1), 3),
                    "iscrowd": 0,
                    "score": round(score, 5),
                }
                file.write(_json(annotation))
            progress.advance()
        file.write(f'],\n"images": {_json(images)}}}\n')
    return counts, len(images)


def _write_fiftyone(
    config: ExportConfig, manifest: dict[str, Any], categories: Categories, made: dict[str, Any]
) -> tuple[Counter[int], int] | None:
    """Writes the folder that FiftyOne reads as a COCODetectionDataset; scores become confidences there."""
    folder = Path(config.out)
    if folder.is_file():
        raise InputError(f"out={folder} is a file; format=fiftyone makes a folder, give another out=")
    found = _write_coco(replace(config, out=str(folder / "labels.json")), manifest, categories, made)
    _link_images(folder / "data", manifest)
    return found


def _link_images(link: Path, manifest: dict[str, Any]) -> None:
    if not link.is_symlink():
        target = existing(manifest["images_folder"], "images folder").absolute()
        link.symlink_to(target, target_is_directory=True)


def _write_yolo(
    config: ExportConfig, manifest: dict[str, Any], categories: Categories, made: dict[str, Any]
) -> tuple[Counter[int], int] | None:
    """Writes a text file an image, with `category x y width height` of each box as shares of the image."""
    run = RunFolder(config.out, config, "region-export")
    if run.finished() is not None:
        if run.finished() == made:
            return None
        raise InputError(f"{run.path} was made of other pairs; delete it or give another out=")
    folder, names = run.path.absolute(), list[str]()
    counts: Counter[int] = Counter()
    # YOLO's programs look for the labels of images/a/b.jpg in labels/a/b.txt.
    _link_images(folder / "images", manifest)
    with Progress("exporting", manifest["images"] - manifest["skipped"]) as progress:
        for found in labelled(config, categories.of_concept):
            height, width = found.image.height, found.image.width
            lines = []
            for (x1, y1, x2, y2), label in zip(found.boxes, found.labels, strict=True):
                counts[label] += 1
                shares = (
                    (x1 + x2) / 2 / width,
                    (y1 + y2) / 2 / height,
                    (x2 - x1) / width,
                    (y2 - y1) / height,
                )
                lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in shares) + "\n")
            file_name = Path(found.image.file_name)
            write_text(folder / "labels" / file_name.with_suffix(".txt"), "".join(lines))
            names.append(f"./images/{file_name}\n")
            progress.advance()
    write_text(folder / "train.txt", "".join(names))
    listed = "".join(f"  {label}: {_json(name)}\n" for label, name in enumerate(categories.names))
    write_text(
        folder / "data.yaml",
        f"path: {_json(str(folder))}\ntrain: train.txt\nval: train.txt\nnames:\n{listed}",
    )
    run.finish(made)
    return counts, len(names)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
