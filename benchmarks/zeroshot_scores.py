"""What a zero-shot score means when 1, 2, 5 or 65 names are looked for: five ways to make it, side by side.

    python benchmarks/zeroshot_scores.py weights.safetensors network.safetensors world --images 100

The ways: a softmax over the names (as published), over names and a background of logit 0, over names and
generic negatives (the default of `detect`), over names and a background embedding (the mean of regions of
other images that are no object), and a sigmoid of cosines that is calibrated on other images of the same
world. For each: AP50 of the names looked for, and of the detections that score at least 0.3 how many there
are per image and which share of them is right (IoU 0.5). Names are drawn by seed, several draws each; up to
the world's own number they are its categories, further names are those of categories that it does not show.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clip_base.data.coco import coco_entry
from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.models.tokenizer import Tokenizer
from clip_base.synthetic.pictograms import TABLE
from regionclip.checkpoints.load import load_detector
from regionclip.concepts.negatives import embed_negatives
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.batches import read_batches, read_record
from regionclip.metrics.average_precision import evaluate_detections
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig, postprocess
from regionclip.proposals.rpn.proposer import load_network
from regionclip.structures.boxes import clip_boxes, iou, xyxy_to_xywh
from regionclip.structures.transforms import ResizeConfig

THRESHOLD = 0.3
Seen = tuple[ImageAnnotations, Tensor, Tensor, Tensor]  # boxes, objectness, unit-length embeddings
Way = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # cosines [N, C], negatives' [N, M], background's [N]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", type=Path, help="a CLIP with a ResNet tower")
    parser.add_argument("network", type=Path, help="a proposal network")
    parser.add_argument("world", type=Path, help="folder of `clip-base scenes`")
    parser.add_argument("--images", type=int, default=100, help="validation images")
    parser.add_argument("--draws", type=int, default=5, help="draws of names")
    parser.add_argument("--side", type=int, default=96, help="pixels of the images' longer side")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 5, 65], help="numbers of names")
    parser.add_argument(
        "--sigmoid", type=float, nargs=2, metavar=("FACTOR", "OFFSET"), help="of another CLIP's calibration"
    )
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


def calibrated(images: list[Seen], rows: Tensor) -> tuple[float, float]:
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
    fitted = LogisticRegression(C=1e6).fit(x[:, None].numpy(), y.numpy())
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def background_of(images: list[Seen]) -> Tensor:
    """Returns [D], the mean direction of the regions that overlap no object by 0.3."""
    found = [units[(iou(boxes, record.boxes) < 0.3).all(1)] for record, boxes, _, units in images]
    return torch.nn.functional.normalize(torch.cat(found).mean(0), dim=0)


def drawn(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns some of a world's names; where there are too few, others that it does not show."""
    if count <= len(names):
        return random.Random(seed).sample(names, count)
    others = [entry.name for entry in TABLE if entry.name not in names]
    return [*names, *random.Random(seed).sample(others, count - len(names))]


def main() -> None:
    options = arguments()
    config = DetectorConfig(max_proposals=30, nms_type="nms")
    resize = ResizeConfig(short=[options.side], long=options.side)
    clip = load_detector(str(options.weights), config, resize, use_checkpoint_config=False).clip
    network = load_network(options.network)
    detector = Detector(clip, config, network, resize=resize).eval()
    folder = options.world / "images"
    dataset = CocoDetection(options.world / "instances_val.json", folder)
    held_out = CocoDetection(options.world / "instances_train.json", folder)
    images = list(seen(detector, dataset[: options.images]))
    wanted = drawn(dataset.categories, max(len(dataset.categories), *options.counts), 0)
    tokenizer = Tokenizer(clip.config.text.context_length)
    known = embed(clip, tokenizer, dataset.categories)
    others = list(seen(detector, held_out[: options.images]))
    factor, offset = calibrated(others, known.embeddings)
    background = background_of(others)  # [D]
    every = embed(clip, tokenizer, [*wanted, *(one.name for one in TABLE if one.name not in wanted)])

    def softmax(*logits: Tensor) -> Tensor:
        return torch.cat(logits, 1).softmax(1)

    ways: dict[str, Way] = {
        "softmax over the names": lambda cosines, _, __, scale: softmax(scale * cosines),
        "and a background of logit 0": lambda cosines, _, __, scale: softmax(
            scale * cosines, torch.zeros(len(cosines), 1)
        ),
        "and a background embedding": lambda cosines, _, none, scale: softmax(
            scale * cosines, scale * none[:, None]
        ),
        "and generic negatives": lambda cosines, others, _, scale: softmax(scale * cosines, scale * others),
        "sigmoid, calibrated": lambda cosines, *_: (factor * cosines + offset).sigmoid(),
    }
    if options.sigmoid:
        other, shift = options.sigmoid
        ways["sigmoid of another CLIP"] = lambda cosines, *_: (other * cosines + shift).sigmoid()
    print(f"sigmoid, calibrated: factor {factor:.2f}, offset {offset:.2f}\n")
    print(f"| scores | names | AP50 | right above {THRESHOLD} | objects found | such boxes per image |")
    print("|---|---|---|---|---|---|")
    for name, way in ways.items():
        for count in options.counts:
            draws = [drawn(dataset.categories, count, seed) for seed in range(options.draws)]
            rows = [figures(detector, images, dataset, every.subset(some), background, way) for some in draws]
            columns = zip(*rows, strict=True)
            told = [f"{statistics.mean(column):.3f} ± {statistics.pstdev(column):.3f}" for column in columns]
            print(f"| {name} | {count} | " + " | ".join(told) + " |", flush=True)


def figures(
    detector: Detector,
    images: list[Seen],
    dataset: CocoDetection,
    vocabulary: Vocabulary,
    background: Tensor,
    way: Way,
) -> tuple[float, float, float, float]:
    """Returns AP50; of the boxes above the threshold the right share, what they find, and their number."""
    tokenizer = Tokenizer(detector.clip.config.text.context_length)
    beside = embed_negatives(detector.clip, tokenizer, vocabulary, DEFAULT_TEMPLATES)
    ids = dict(zip(dataset.categories, dataset.category_ids, strict=True))
    looked_for = [name for name in vocabulary.names if name in ids]
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": ids[name], "name": name} for name in looked_for]
    results, right, many, found, objects = [], 0, 0, 0, 0
    for record, boxes, objectness, units in images:
        size = {"height": record.height, "width": record.width}
        content["images"].append({"id": record.image_id, "file_name": record.path.name, **size})
        truths = [dataset.categories[label] for label in record.labels.tolist()]
        for side, truth in zip(xyxy_to_xywh(record.boxes).tolist(), truths, strict=True):
            if truth in looked_for:
                more = {"id": 1 + len(content["annotations"]), "area": side[2] * side[3], "iscrowd": 0}
                content["annotations"].append(coco_entry(record.image_id, ids[truth], side, **more))
        cosines = units @ vocabulary.embeddings.T
        chances = way(cosines, units @ beside.T, units @ background, detector.scale)
        scores = (objectness[:, None] * chances[:, : len(vocabulary)]).sqrt()
        hit = [False] * len(truths)
        for box, value, label in zip(*postprocess(boxes, scores, detector.config), strict=True):
            name = vocabulary.names[int(label)]
            if name in ids:
                sides = xyxy_to_xywh(box[None])[0].tolist()
                results.append(coco_entry(record.image_id, ids[name], sides, float(value)))
            if value >= THRESHOLD:
                overlap = iou(box[None], record.boxes)[0].tolist()
                same = [n for n, one in enumerate(truths) if one == name and overlap[n] >= 0.5]
                right, many = right + bool(same), many + 1
                for n in same:
                    hit[n] = True
        found += sum(hit)
        objects += sum(truth in looked_for for truth in truths)
    measured = evaluate_detections(content, results).metrics["AP50"]
    return measured, right / max(many, 1), found / max(objects, 1), many / len(images)


if __name__ == "__main__":
    main()
