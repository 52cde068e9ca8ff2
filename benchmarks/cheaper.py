"""What cheaper ways to a detector's boxes cost in AP: fewer embedded regions, 8-bit integers.

    python benchmarks/cheaper.py quickstart-0 quickstart-1 quickstart-2 --write docs/benchmarks.md

Each folder is one that `regionclip quickstart` has left: its detector finds the objects in its validation
images. Times are processor time of one thread for reading, resizing and detecting, one image at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results_tables import spread
from rounds import command, machine, put, shown, versions
from torch import Tensor

import regionclip
from clip_base.data.coco import coco_entry
from clip_base.export.graphs import onnx_run
from regionclip.data.annotations import CocoDetection
from regionclip.export.detector import ExportDetectorConfig, export_detector
from regionclip.metrics.average_precision import evaluate_detections
from regionclip.structures.boxes import xyxy_to_xywh

METRICS = ("AP", "AP50")
Entries = list[dict[str, Any]]
Detect = Callable[[Path], tuple[Tensor, Tensor, Tensor]]
"""An image's file in; boxes [N, 4] xyxy in its pixels, scores [N] and labels [N] out."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of the quickstart, one of each seed")
    parser.add_argument("--embedded", type=int, nargs="+", default=[15, 10, 5], help="regions of an image")
    parser.add_argument("--limit", type=int, default=0, help="images of each folder; 0: all")
    parser.add_argument("--write", type=Path, help="Markdown page whose `cheaper` section takes the table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {}
    for folder in options.folders:
        for name, detect in ways(folder, options.embedded).items():
            found.setdefault(name, []).append(measured(detect, folder, options.limit))
            print(name, found[name][-1], flush=True)
    rows = ["| | AP | AP50 | AP lost, by seed | time per image |", "|---|---|---|---|---|"]
    whole = next(iter(found.values()))
    for name, ones in found.items():
        lost = ", ".join(f"{before['AP'] - one['AP']:.1f}" for before, one in zip(whole, ones, strict=True))
        cells = [spread([one[metric] for one in ones]) for metric in METRICS]
        taken = statistics.median(one["seconds"] for one in ones)
        rows.append(f"| {name} | {' | '.join(cells)} | {lost} | {shown(1000 * taken)} ms |")
    print(table := "\n".join(rows))
    if options.write:
        used = versions("torch", "onnxruntime")
        facts = f"Machine: {machine(1)}.\nVersions: {used}."
        put(options.write, "cheaper", f"{facts}\n\n    {command()}\n\n{table}")


def ways(folder: Path, embedded: Sequence[int]) -> dict[str, Detect]:
    """Returns the ways to detect, by what the table calls them; the first is the one that costs nothing."""
    truth = CocoDetection(folder / "world" / "instances_val.json", None)
    weights = folder / "detector-regionclip" / "model.safetensors"
    every = regionclip.load(weights, list(truth.categories), precision="fp32")
    count = every.detector.config.max_proposals
    found: dict[str, Detect] = {f"all {count} proposals embedded": in_torch(every)}
    for few in embedded:
        config = replace(every.detector.config, max_embedded=few)
        fewer = regionclip.load(weights, list(truth.categories), precision="fp32", config=config)
        found[f"`max_embedded={few}`"] = in_torch(fewer)
    exported = folder / "exported"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        export_detector(
            ExportDetectorConfig(
                weights=str(weights),
                vocabulary=",".join(truth.categories),
                out=str(exported),
                int8=True,
                images=[str(path) for path in sorted((folder / "world/images/train").iterdir())[:100]],
            )
        )
    found["onnxruntime, float32"] = in_onnx(exported / "detector.onnx")
    found["onnxruntime, int8"] = in_onnx(exported / "detector.int8.onnx")
    return found


def in_torch(predictor: regionclip.Predictor) -> Detect:
    def detect(path: Path) -> tuple[Tensor, Tensor, Tensor]:
        found = predictor.detect(path)
        return found.boxes, found.scores, found.labels

    return detect


def in_onnx(path: Path) -> Detect:
    run = onnx_run(path, ["boxes", "scores", "labels"], threads=1)

    def detect(image: Path) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = run({"image": torch.from_numpy(np.array(Image.open(image).convert("RGB")))})
        return boxes, scores, labels

    return detect


def measured(detect: Detect, folder: Path, limit: int) -> dict[str, float]:
    """Returns the metrics in percent, and the seconds of processor time per image."""
    truth = CocoDetection(folder / "world" / "instances_val.json", folder / "world" / "images")
    entries: Entries = []
    records = list(truth)[: limit or None]
    start = time.process_time()
    for record in records:
        boxes, scores, labels = detect(record.path)
        for box, score, label in zip(
            xyxy_to_xywh(boxes).tolist(), scores.tolist(), labels.tolist(), strict=True
        ):
            entries.append(coco_entry(record.image_id, truth.category_ids[label], box, score))
    seconds = (time.process_time() - start) / len(records)
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluate_detections(folder / "world" / "instances_val.json", entries).metrics
    return {metric: 100 * metrics[metric] for metric in METRICS} | {"seconds": seconds}


if __name__ == "__main__":
    main()
