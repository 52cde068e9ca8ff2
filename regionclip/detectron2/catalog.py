"""Datasets with base and novel categories in detectron2's catalogs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from detectron2.structures import BoxMode

from clip_base.data.coco import read_instances
from clip_base.runtime.errors import InputError
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split, load_split, parse_names
from regionclip.data.coco import category_ids_by_name, frequencies

EVALUATOR = "open_vocabulary"
# How RegionCLIP's configs call the parts, and what they are.
PARTS = {"b": "base", "t": "novel", "all": "all"}
# Annotations and images below the folder of detectron2's datasets.
COCO = {
    "train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "test": ("coco/annotations/instances_val2017.json", "coco/val2017"),
}
LVIS = {"train": ("lvis/lvis_v1_train.json", "coco"), "test": ("lvis/lvis_v1_val.json", "coco")}


@dataclass(frozen=True)
class OpenVocabularyDataset:
    """Boxes of some categories of a file in COCO's instances form.

    Attributes:
        annotations: the JSON file.
        images: the folder that its file names are relative to.
        split: which of its categories are base and which are novel.
        part: whose boxes are in the dataset: "base" (what training may see), "novel", or "all".
    """

    annotations: Path
    images: Path
    split: Split
    part: str

    def __post_init__(self) -> None:
        if self.part not in PARTS.values():
            raise InputError(
                f"{self.part!r} is not a part of a split; give one of {', '.join(PARTS.values())}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The categories, as classes count them."""
        names: tuple[str, ...] = getattr(self.split, self.part)
        return names

    def register(self, name: str) -> None:
        """Enters it into detectron2's catalogs; what stood there under `name` is replaced."""
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(self.load, name))
        MetadataCatalog.get(name).set(
            thing_classes=list(self.names),
            split=self.split,
            part=self.part,
            json_file=str(self.annotations),
            image_root=str(self.images),
            evaluator_type=EVALUATOR,
        )

    def load(self, name: str) -> list[dict[str, Any]]:
        """Returns detectron2's dataset dicts; images without boxes of the part are among them.

        Raises:
            InputError: the annotations are missing or malformed, or lack a name of the split.
        """
        dataset = CocoDetection(self.annotations, self.images, self.names)
        ids = {category: label for label, category in enumerate(dataset.category_ids)}
        MetadataCatalog.get(name).set(thing_dataset_id_to_contiguous_id=ids)
        return [
            {
                "file_name": str(record.path),
                "image_id": record.image_id,
                "height": record.height,
                "width": record.width,
                "annotations": [
                    {
                        "bbox": box,
                        "bbox_mode": BoxMode.XYXY_ABS,
                        "category_id": label,
                        "iscrowd": int(crowd),
                    }
                    for box, label, crowd in zip(
                        record.boxes.tolist(), record.labels.tolist(), record.iscrowd.tolist(), strict=True
                    )
                ],
            }
            for record in dataset
        ]


def register_dataset(
    name: str, annotations: str | Path, images: str | Path, split: str, part: str = "all"
) -> None:
    """Registers a dataset.

    Args:
        name: in detectron2's catalogs.
        annotations: a file in COCO's instances form.
        images: the folder that its file names are relative to.
        split: "coco", "lvis", or a file with base and novel names; see `load_split`.
        part: "base", "novel" or "all".

    Raises:
        InputError: the annotations are missing or malformed, or do not have the split's names.
    """
    entries = read_instances(annotations)["categories"]
    chosen = load_split(split, tuple(category_ids_by_name(entries, annotations)), frequencies(entries))
    OpenVocabularyDataset(Path(annotations), Path(images), chosen, part).register(name)


def register_listed(name: str, annotations: str, images: str, split: str, part: str = "all") -> None:
    """Registers a dataset that a config lists; its paths lie below $DETECTRON2_DATASETS."""
    file = root() / split
    register_dataset(
        name, root() / annotations, root() / images, str(file) if file.is_file() else split, part
    )


def root() -> Path:
    """Returns the folder of detectron2's datasets: $DETECTRON2_DATASETS, or `datasets` without it."""
    return Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def register_published() -> None:
    """Registers COCO's 48/17/65 split and LVIS's frequent-and-common/rare one.

    The names are `coco_2017_ovd_b_train` and so on: b, t or all (base, novel or both categories), train or
    test; for LVIS `lvis_v1_ovd_b_train`. Files are looked for below $DETECTRON2_DATASETS as detectron2 itself
    does, when a dataset is first used.
    """
    coco = Split(tuple(parse_names("coco_base")), tuple(parse_names("coco_novel")))
    entries = sorted(LVIS_CATEGORIES, key=lambda entry: int(entry["id"]))
    lvis = load_split("lvis", [entry["name"] for entry in entries], frequencies(entries))
    for prefix, files, split in (("coco_2017", COCO, coco), ("lvis_v1", LVIS, lvis)):
        for use, (file, images) in files.items():
            for short, part in PARTS.items():
                dataset = OpenVocabularyDataset(root() / file, root() / images, split, part)
                dataset.register(f"{prefix}_ovd_{short}_{use}")


def class_names(dataset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns a registered dataset's class names, and those of them that are novel.

    Raises:
        InputError: it is not registered, or its classes have no names yet.
    """
    metadata = MetadataCatalog.get(dataset) if dataset in MetadataCatalog.list() else None
    names, split = getattr(metadata, "thing_classes", ()), getattr(metadata, "split", None)
    if not names:
        raise InputError(
            f"detectron2's catalog has no class names of dataset {dataset!r}; register it, "
            "or name the classes with model.set_vocabulary([...])"
        )
    return tuple(names), tuple(name for name in names if split is not None and name in split.novel)
