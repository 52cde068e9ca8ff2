"""Our evaluation as one of detectron2's evaluators."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from clip_base.files import write_json
from regionclip.detectron2.catalog import class_names
from regionclip.detectron2.structures import from_instances
from regionclip.evaluation import Protocol, evaluate_detections


class OpenVocabularyEvaluator(DatasetEvaluator):  # type: ignore[misc]
    """Average precision of base, novel and all classes in percent, as `regionclip evaluate` computes it.

    Args:
        dataset: a dataset of the catalogs, with its annotations in COCO's form as `json_file`.
        out: folder for `results.json` in COCO's results form; None: it is not written.
        max_detections: best scored detections an image that count; 0: 100 (COCO), 300 (LVIS).
    """

    def __init__(self, dataset: str, out: str | Path | None = None, max_detections: int = 0) -> None:
        self.dataset, self.out, self.max_detections = dataset, out, max_detections
        self.entries: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forgets what was processed."""
        self.entries = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Takes a batch's detections."""
        metadata = MetadataCatalog.get(self.dataset)
        names, _ = class_names(self.dataset)
        ids = {label: category for category, label in metadata.thing_dataset_id_to_contiguous_id.items()}
        for image, output in zip(inputs, outputs, strict=True):
            detections = from_instances(output["instances"], names)
            self.entries += detections.to_coco(image["image_id"], [ids[label] for label in range(len(names))])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns {"bbox": metrics} in the first process, None in the others."""
        gathered = comm.gather(self.entries, dst=0)
        if not comm.is_main_process():
            return None
        entries = list(itertools.chain.from_iterable(gathered))
        if self.out is not None:
            Path(self.out).mkdir(parents=True, exist_ok=True)
            write_json(Path(self.out) / "results.json", entries)
        metadata = MetadataCatalog.get(self.dataset)
        protocol = Protocol(max_detections=self.max_detections, compete=getattr(metadata, "part", "all"))
        found = evaluate_detections(metadata.json_file, entries, getattr(metadata, "split", None), protocol)
        return {"bbox": {key: 100 * value if value >= 0 else value for key, value in found.metrics.items()}}
