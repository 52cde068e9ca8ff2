"""What a zero-shot score means when 1, 2, 5 or all names are looked for: four ways to make it, side by side.

    python benchmarks/zeroshot_scores.py weights.safetensors network.safetensors world --images 100

The ways: a softmax over the names (as published), over names and a background of logit 0, over names and
generic negatives (the default of `detect`), and a sigmoid of cosines that is calibrated on other images of
the same world. For each: AP50 of the names looked for, and of the detections that score at least 0.3 how many
there are per image and which share of them is right (IoU 0.5). Names are drawn by seed, several draws each.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.data.coco import coco_entry
from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.models.tokenizer import Tokenizer
from regionclip.checkpoints.load import load_detector
from regionclip.concepts.negatives import embed_negatives
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.batches import read_batches, read_record
from regionclip.metrics.average_precision import evaluate_detections
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig, postprocess
from regionclip.structures.boxes import clip_boxes, iou, xyxy_to_xywh
from regionclip.structures.transforms import ResizeConfig

THRESHOLD = 0.3
Seen = tuple[ImageAnnotations, Tensor, Tensor, Tensor]  # boxes, objectness, unit-length embeddings
Way = Callable[[Tensor, Tensor, float], Tensor]  # cosines [N, C], of negatives [N, M], scale -> [N, C…]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", type=Path, help="a CLIP with a ResNet tower")
    parser.add_argument("network", type=Path, help="a detector whose proposal network is taken")
    parser.add_argument("world", type=Path, help="folder of `clip-base scenes`")
    parser.add_argument("--images", type=int, default=100, help="validation images")
    parser.add_argument("--draws", type=int, default=5, help="draws of names")
    parser.add_argument("--side", type=int, default=96, help="pixels of the images' longer side")
    return parser.parse_args()


@torch.no_grad()
def seen(detector: Detector, records: list[ImageAnnotations]) -> Iterator[Seen]:
    """Yields each image with its proposals' boxes [N, 4] in it, objectness [N] and unit embeddings [N, D]."""
    for group in read_batches(records, read_record, detector.resize, 8, torch.device("cpu")):
        for batch in group.batches:
            maps = detector.feature_maps(batch.images)
            regions = detector.propose(maps)
            found = torch.nn.functional.normalize(detector.roi_heads(maps, regions)[0].float(), dim=1)
            for slot, (record, frame) in enumerate(zip(batch.items, batch.transforms, strict=True)):
                mine = regions.image_index == slot
                boxes = clip_boxes(frame.invert_boxes(regions.boxes[mine]), frame.original)
                assert regions.scores is not None
                yield record, boxes, regions.scores[mine], found[mine]


def calibrated(images: list[Seen], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factor and the offset of a sigmoid that tells a region's true name from others."""
    cosines, truths = [], []
    for record, boxes, _, found in images:
        cosines.append(found @ rows.T)  # [N, C]
        truth = torch.zeros_like(cosines[-1])
        overlap = iou(boxes, record.boxes)  # [N, n]
        for place, label in enumerate(record.labels.tolist()):
            truth[overlap[:, place] >= 0.5, label] = 1
        truths.append(truth)
    x, y = torch.cat(cosines).flatten(), torch.cat(truths).flatten()
    factor, offset = torch.tensor(20.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([factor, offset], max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(factor * x + offset, y)
        value.backward()
        return value

    optimizer.step(loss)
    return factor.detach(), offset.detach()


def main() -> None:
    options = arguments()
    config = DetectorConfig(max_proposals=30, nms_type="nms")
    resize = ResizeConfig(short=[options.side], long=options.side)
    clip = load_detector(str(options.weights), config, resize, use_checkpoint_config=False).clip
    network = load_detector(str(options.network), None, None).network
    assert network is not None
    detector = Detector(clip, config, network, resize=resize).eval()
    folder = options.world / "images"
    dataset = CocoDetection(options.world / "instances_val.json", folder)
    held_out = CocoDetection(options.world / "instances_train.json", folder)
    images = list(seen(detector, dataset[: options.images]))
    every = embed(clip, Tokenizer(clip.config.text.context_length), dataset.categories)
    factor, offset = calibrated(list(seen(detector, held_out[: options.images])), every.embeddings)

    def with_background(cosines: Tensor, _: Tensor, scale: float) -> Tensor:
        return torch.cat([scale * cosines, torch.zeros(len(cosines), 1)], 1).softmax(1)

    ways: dict[str, Way] = {
        "softmax over the names": lambda cosines, _, scale: (scale * cosines).softmax(1),
        "and a background of logit 0": with_background,
        "and generic negatives": lambda cosines, others, scale: (
            scale * torch.cat([cosines, others], 1)
        ).softmax(1),
        "sigmoid, calibrated": lambda cosines, *_: (factor * cosines + offset).sigmoid(),
    }
    print(f"{'':<28} names   AP50             right above {THRESHOLD}   such per image")
    for name, way in ways.items():
        for count in sorted({1, 2, 5, len(dataset.categories)}):
            draws = [random.Random(seed).sample(dataset.categories, count) for seed in range(options.draws)]
            rows = [figures(detector, images, dataset, every.subset(names), way) for names in draws]
            columns = zip(*rows, strict=True)
            told = [f"{statistics.mean(column):6.3f} ± {statistics.pstdev(column):.3f}" for column in columns]
            print(f"{name:<28} {count:>5}   " + "   ".join(told))


def figures(
    detector: Detector, images: list[Seen], dataset: CocoDetection, vocabulary: Vocabulary, way: Way
) -> tuple[float, float, float]:
    """Returns AP50, the right share of the detections above the threshold, and their number per image."""
    tokenizer = Tokenizer(detector.clip.config.text.context_length)
    beside = embed_negatives(detector.clip, tokenizer, vocabulary, DEFAULT_TEMPLATES)
    ids = dict(zip(dataset.categories, dataset.category_ids, strict=True))
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": ids[name], "name": name} for name in vocabulary.names]
    results, right, many = [], 0, 0
    for record, boxes, objectness, found in images:
        size = {"height": record.height, "width": record.width}
        content["images"].append({"id": record.image_id, "file_name": record.path.name, **size})
        for side, label in zip(xyxy_to_xywh(record.boxes).tolist(), record.labels.tolist(), strict=True):
            if dataset.categories[label] in vocabulary.names:
                more = {"id": 1 + len(content["annotations"]), "area": side[2] * side[3], "iscrowd": 0}
                category = ids[dataset.categories[label]]
                content["annotations"].append(coco_entry(record.image_id, category, side, **more))
        chances = way(found @ vocabulary.embeddings.T, found @ beside.T, detector.scale)
        scores = (objectness[:, None] * chances[:, : len(vocabulary)]).sqrt()
        for box, value, label in zip(*postprocess(boxes, scores, detector.config), strict=True):
            name = vocabulary.names[int(label)]
            sides = xyxy_to_xywh(box[None])[0].tolist()
            results.append(coco_entry(record.image_id, ids[name], sides, float(value)))
            if value >= THRESHOLD:
                same = record.labels == dataset.categories.index(name)
                right += bool(same.any() and (iou(box[None], record.boxes[same]) >= 0.5).any())
                many += 1
    measured = evaluate_detections(content, results).metrics["AP50"]
    return measured, right / max(many, 1), many / len(images)


if __name__ == "__main__":
    main()
