"""Evaluation by faster-coco-eval (`evaluator=fast`) and by pycocotools, side by side: same detections.

    python benchmarks/evaluation.py --write docs/benchmarks.md

Annotations and detections are generated: as many objects, categories and detections per image as COCO's
validation set has. "whole" is all that `regionclip evaluate results=FILE report=false` does: reading both
files, checking every entry, evaluating, and the means of base and novel categories. "LVIS" is the federated
protocol of `regionclip.metrics.lvis` against faster-coco-eval's. One thread. The figures must agree to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rounds import Row, alternate, command, compare, machine, markdown, put, versions

from regionclip.metrics.average_precision import Evaluation, Protocol, evaluate_detections

SIDES = (24, 60, 150, 320)
Entries = list[dict[str, Any]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--categories", type=int, default=80)
    parser.add_argument("--objects", type=int, default=7, help="an image")
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--lvis-images", type=int, default=500)
    parser.add_argument("--lvis-categories", type=int, default=1203)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round on little input: does it run?")
    parser.add_argument("--write", type=Path, help="Markdown page whose evaluation section takes the table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.quick:
        options.images, options.lvis_images, options.rounds = 50, 20, 1
    rows = coco(options) + lvis(options)
    print(table := markdown(rows))
    if options.write:
        used = versions("pycocotools", "faster-coco-eval", "numpy")
        facts = f"Machine: {machine(1)}.\nVersions: {used}.\nMedian of {options.rounds} alternating rounds."
        put(options.write, "evaluation", f"{facts}\n\n    {command()}\n\n{table}")


def coco(options: argparse.Namespace) -> list[Row]:
    truth, results = world(options.images, options.categories, options.objects, options.detections)
    found: dict[str, Evaluation] = {}

    def by(name: str, evaluator: str, one: Any, other: Any) -> None:
        found[name] = evaluate_detections(one, other, protocol=Protocol("coco", evaluator))

    note = f"{options.images:,} images, {len(results):,} detections, {options.categories} categories"
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "instances.json"), Path(folder, "results.json")
        for file, value in zip(files, (truth, results), strict=True):
            file.write_text(json.dumps(value), encoding="utf-8")
        whole = alternate(
            {
                "ours": lambda: by("fast", "fast", *files),
                "pycocotools": lambda: by("pycocotools", "pycocotools", *files),
            },
            options.rounds,
        )
    return compare("evaluation, complete", "images/s", options.images, whole, f"{note}; {agreement(found)}")


def lvis(options: argparse.Namespace) -> list[Row]:
    truth, results = world(options.lvis_images, options.lvis_categories, 12, 300, federated=True)
    found: dict[str, Evaluation] = {}

    def by(evaluator: str) -> None:
        found[evaluator] = evaluate_detections(truth, results, protocol=Protocol("lvis", evaluator))

    seconds = alternate(
        {"ours": lambda: by("pycocotools"), "faster-coco-eval": lambda: by("fast")}, options.rounds
    )
    note = (
        f"{options.lvis_images:,} images, {len(results):,} detections, {options.lvis_categories:,} categories"
    )
    return compare("LVIS's protocol", "images/s", options.lvis_images, seconds, f"{note}; {agreement(found)}")


def agreement(found: dict[str, Evaluation]) -> str:
    """Returns by how much the two differ at most; more than 1e-6 ends the benchmark."""
    one, other = found.values()
    furthest = float(np.abs(one.precision - other.precision).max())
    if furthest > 1e-6:
        raise SystemExit(f"the evaluators disagree by {furthest:.3g}")
    return f"precision differs by at most {furthest:.0e}, AP {one.metrics['AP']:.4f}"


def world(
    images: int, categories: int, objects: int, detections: int, federated: bool = False
) -> tuple[dict[str, Any], Entries]:
    """Draws annotations and detections, of which half lie near an object and most of those bear its name."""
    random = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [{"id": number, "height": 640, "width": 640} for number in range(1, images + 1)],
        "categories": [{"id": k + 1, "name": f"c{k}", "frequency": "rcf"[k % 3]} for k in range(categories)],
        "annotations": [],
    }
    results: Entries = []
    for image in truth["images"]:
        kinds = random.integers(categories, size=objects)
        sides = random.choice(SIDES, (objects, 2)).astype(float)
        boxes = np.hstack([random.uniform(0, 320, (objects, 2)), sides])
        if federated:
            image["neg_category_ids"] = (random.integers(categories, size=objects) + 1).tolist()
            image["not_exhaustive_category_ids"] = [int(kinds[0]) + 1]
        for kind, box in zip(kinds.tolist(), boxes.tolist(), strict=True):
            entry = {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": kind + 1}
            truth["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        near = random.integers(objects, size=detections)
        moved = boxes[near] + random.normal(0, 8, (detections, 4))
        moved[detections // 2 :, :2] = random.uniform(0, 320, (detections - detections // 2, 2))
        names = np.where(
            random.random(detections) < 0.6, kinds[near], random.integers(categories, size=detections)
        )
        for name, box, score in zip(
            names.tolist(), moved.clip(1).tolist(), random.random(detections).tolist(), strict=True
        ):
            entry = {"image_id": image["id"], "category_id": name + 1, "bbox": box, "score": score}
            results.append(entry)
    return truth, results


if __name__ == "__main__":
    main()
