"""Detection in bf16 against fp32, where its time goes, and suppression against plain loops, in one run.

    python benchmarks/detector.py --write docs/benchmarks.md
    python benchmarks/detector.py --only rivals --rounds 5 --write docs/benchmarks.md
    python benchmarks/detector.py --weights detector/model.safetensors \\
        --annotations world/instances_val.json --images world/images \\
        --split world/split.json --write docs/benchmarks.md

The sizes are the published ones: RN50, its own frozen C4 proposal network on a ResNet-50, images of 800 x
1333 pixels. The weights are random; how fast a network is does not depend on them. With `--weights` and
annotated images the AP of both precisions is measured too.
"""

# N regions of a batch, C names
from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rates import matrix_rate, operations_of, waiting
from rivals import make_detector, side_by_side, spread, vocabulary_of
from rounds import (
    Row,
    alternate,
    command,
    compare,
    machine,
    markdown,
    processor,
    put,
    put_kind,
    shown,
    versions,
)
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.runtime.precision import autocast, computes_in_bf16
from clip_base.storage.files import read_json
from regionclip.evaluation.evaluate import EvaluateConfig, evaluate
from regionclip.models.detector import DELTA_WEIGHTS, Detector
from regionclip.models.postprocess import postprocess, score
from regionclip.structures.boxes import decode_deltas, iou, soft_nms
from regionclip.structures.regions import ImageInfo, Regions
from regionclip.structures.transforms import ResizeTransform

PARTS = ("trunk", "proposals", "region head", "classifier", "suppression")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="RN50")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, nargs="+", default=[65, 1203])
    parser.add_argument("--proposals", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--weights", type=Path, help="a trained detector, for the AP of both precisions")
    parser.add_argument("--annotations", type=Path, help="instances_*.json to measure AP on")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--split", default="", help="coco, lvis, or a file with base and novel names")
    parser.add_argument("--only", nargs="+", choices=["detection", "suppression", "ap", "rivals"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rivals: images at once")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="rivals: all by default")
    parser.add_argument("--detectors", nargs="+", help="rivals: only those whose names hold one of these")
    parser.add_argument("--note", default="", help="rivals: a sentence about the machine, for the page")
    parser.add_argument("--quick", action="store_true", help="one round on little input: does it run?")
    parser.add_argument("--write", type=Path, help="Markdown page whose detector section takes the tables")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds, options.size, options.proposals = 1, [128, 160], [10, 20]
    parts = options.only or ["detection", "suppression", "ap"]
    if "rivals" in parts:
        write_rivals(options)
    if parts == ["rivals"]:
        return
    rows: list[Row] = []
    shares: list[str] = []
    if "detection" in parts:
        rows, shares = detection(options)
    if "suppression" in parts:
        rows += suppression(options)
    if "ap" in parts and options.weights:
        rows += average_precision(options)
    text = "\n\n".join([markdown(rows), *(["\n".join(shares)] if shares else [])])
    print(text)
    if options.write:
        put(options.write, "detector", described(text, options))


def write_rivals(options: argparse.Namespace) -> None:
    """Times all detectors side by side, and puts the table under the processor's heading."""
    table = side_by_side(options)
    facts = f"Machine: {machine(options.threads)}. {options.note}".strip()
    facts += f"\nVersions: {versions('torch', 'torchvision', 'transformers')}.\n"
    facts += f"{options.classes[0]} names; seconds per image, median of {options.rounds} alternating "
    facts += f"round{'s' * (options.rounds > 1)} (lowest to highest), times those of OWL-ViT B/32."
    text = f"{facts}\n\n    {command()}\n\n{table}"
    print(text)
    if options.write:
        put_kind(options.write, "rivals", processor(options.device), text)


def described(tables: str, options: argparse.Namespace) -> str:
    """Returns the tables with the machine, the versions and the command."""
    kind = machine(options.threads)
    if options.device == "cuda":
        kind = f"{torch.cuda.get_device_name()}; {kind}"
    height, width = options.size
    facts = f"Machine: {kind}.\nVersions: {versions('torch', 'torchvision')}.\n"
    facts += f"{options.model}, images of {height} x {width} pixels, batch {options.batch}; "
    facts += f"median of {options.rounds} alternating round{'s' * (options.rounds > 1)}."
    return f"{facts}\n\n    {command()}\n\n{tables}"


def detection(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Compares precisions and designs, and tells where the time goes in the faster precision."""
    device = torch.device(options.device)
    wait = waiting(options.device)
    height, width = options.size
    generator = torch.Generator().manual_seed(0)
    images = ImageBatch.pad([torch.randn(3, height, width, generator=generator)] * options.batch, 32)
    images = images.to(device)
    frames = [ResizeTransform((height, width), (height, width))] * options.batch
    keys = [ImageInfo(slot, height, width) for slot in range(options.batch)]
    count = options.proposals[0]
    designs = {
        "two backbones": make_detector(options.model, count, True, device=options.device),
        "one backbone": make_detector(options.model, count, False, device=options.device),
        "one backbone, shared head": make_detector(options.model, count, False, "shared", options.device),
    }
    rows: list[Row] = []
    precisions = ["bf16", "fp32"] if computes_in_bf16(device) else ["fp32"]
    peaks = {precision: matrix_rate(options.device, precision) for precision in precisions}
    shares = [
        f"A {kind} product of two matrices reaches {rate / 1e9:,.0f} GFLOP/s." for kind, rate in peaks.items()
    ]
    shares += ["", "Share of the time; in brackets, of that rate:", ""]
    shares += ["| design | classes | proposals | s/image | " + " | ".join(PARTS) + " |"]
    shares.append("|---" * (4 + len(PARTS)) + "|")
    for detector in designs.values():
        spread(detector, images)
    for proposals in options.proposals:
        for classes in options.classes:
            works: dict[str, Callable[[], object]] = {}
            for design, detector in designs.items():
                detector.config.max_proposals = proposals
                detector.config.max_detections = 300 if classes > 1000 else 100
                detector.set_vocabulary(vocabulary_of(classes, detector.clip.config.embed_dim))
                for precision in precisions:
                    works[f"{design} {precision}"] = functools.partial(
                        detect, detector, precision, images, frames, keys
                    )
            seconds = alternate(works, options.rounds, wait)
            task = f"detection, {classes:,} classes, {proposals:,} proposals"
            best = precisions[0]
            for design in designs:
                taken = {"ours": seconds[f"{design} {best}"]}
                if "bf16" in precisions:
                    taken["ours in fp32"] = seconds[f"{design} fp32"]
                if design != "two backbones":
                    taken["two backbones"] = seconds[f"two backbones {best}"]
                rows += compare(f"{task}, {design}", "images/s", options.batch, taken)
            for design, detector in designs.items():
                for precision in precisions:
                    parts = time_parts(detector, precision, images, frames, options.rounds, wait)
                    label = f"{design}, {precision}"
                    shares.append(
                        share_row(label, classes, proposals, parts, options.batch, peaks[precision])
                    )
    return rows, shares


def detect(
    detector: Detector,
    precision: str,
    images: ImageBatch,
    frames: list[ResizeTransform],
    keys: list[ImageInfo],
) -> object:
    with torch.no_grad(), autocast(precision, images.pixels.device):
        return detector.detect_batch(images, frames, keys)


@torch.no_grad()
def time_parts(
    detector: Detector,
    precision: str,
    images: ImageBatch,
    frames: list[ResizeTransform],
    rounds: int,
    wait: Callable[[], object],
) -> dict[str, tuple[float, float]]:
    """Returns the median seconds of each part of a detection, and the floating-point operations in it.

    Each part is fed what the one before it gave.
    """
    context = functools.partial(autocast, precision, images.pixels.device)
    with context():
        maps = detector.feature_maps(images)
        regions = detector.propose(maps)
        if len(regions) != len(frames) * detector.config.max_proposals:
            raise SystemExit(
                f"{len(regions)} proposals, {detector.config.max_proposals} an image were asked for"
            )
        embeddings, moves = detector.roi_heads(maps, regions)
    assert moves is not None
    boxes, scores = classify(detector, regions, embeddings, moves)

    def inside(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), context():
                return work()

        return run

    works = {
        "trunk": inside(lambda: detector.feature_maps(images)),
        "proposals": inside(lambda: detector.propose(maps)),
        "region head": inside(lambda: detector.roi_heads(maps, regions)),
        "classifier": lambda: classify(detector, regions, embeddings, moves),
        "suppression": lambda: [
            postprocess(boxes[mine], scores[mine], detector.config)
            for mine in (regions.image_index == slot for slot in range(len(frames)))
        ],
    }
    seconds = {name: statistics.median(taken) for name, taken in alternate(works, rounds, wait).items()}
    return {name: (seconds[name], operations_of(work)) for name, work in works.items()}


@torch.no_grad()
def classify(
    detector: Detector, regions: Regions, embeddings: Tensor, moves: Tensor
) -> tuple[Tensor, Tensor]:
    probabilities = detector.logits(embeddings, detector.classifier, True).softmax(1)[:, :-1]
    boxes = decode_deltas(regions.boxes, moves, DELTA_WEIGHTS)
    return boxes, score(regions, probabilities, detector.alpha, detector.config.fusion)


def share_row(
    design: str, classes: int, proposals: int, parts: dict[str, tuple[float, float]], batch: int, peak: float
) -> str:
    whole = sum(seconds for seconds, _ in parts.values())
    cells = []
    for name in PARTS:
        seconds, operations = parts[name]
        rate = f" ({operations / seconds / peak:.0%})" if operations / peak > 0.001 else ""
        cells.append(f"{seconds / whole:.1%}{rate}")
    return f"| {design} | {classes:,} | {proposals:,} | {shown(whole / batch)} | {' | '.join(cells)} |"


def suppression(options: argparse.Namespace) -> list[Row]:
    """Compares soft-NMS of 20,000 boxes in 65 classes with a loop that takes one box after the other."""
    count = 2_000 if options.quick else 20_000
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 600
    boxes = torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * 300], 1)
    scores = torch.rand(count, generator=generator)
    labels = torch.randint(65, (count,), generator=generator)
    arrays = boxes.numpy(), scores.numpy(), labels.numpy()
    looped = soft_nms_loop(*arrays)
    kept, values = soft_nms(boxes, scores, labels)
    same = len(looped) == len(kept) and all(
        abs(looped[index] - value) < 1e-5 for index, value in zip(kept.tolist(), values.tolist(), strict=True)
    )
    note = "the same result" if same else "ANOTHER RESULT"
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: soft_nms(boxes, scores, labels),
        "a PyTorch loop over all boxes": lambda: soft_nms_of_all(boxes, scores, labels),
        "a NumPy loop, class by class": lambda: soft_nms_loop(*arrays),
    }
    seconds = alternate(works, options.rounds)
    rows = compare(f"soft-NMS, {count:,} boxes, 65 classes", "boxes/s", count, seconds, note)
    best = {**works, "ours": lambda: soft_nms(boxes, scores, labels, limit=100)}
    seconds = alternate(best, options.rounds)
    return rows + compare("the same, the best 100", "boxes/s", count, seconds)


def soft_nms_of_all(boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[int, float]:
    """Soft-NMS as detectors commonly have it: classes moved apart, the best box of all taken at each step."""
    kept: dict[int, float] = {}
    index, left = torch.arange(len(boxes)), scores.clone()
    apart = boxes + (labels * (boxes.max() + 1))[:, None]
    while len(left):
        best = int(left.argmax())
        kept[int(index[best])] = float(left[best])
        left = left * (-(iou(apart[best : best + 1], apart)[0] ** 2) / 0.5).exp()
        stays = left >= 0.001
        stays[best] = False
        index, apart, left = index[stays], apart[stays], left[stays]
    return kept


def soft_nms_loop(
    boxes: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> dict[int, float]:
    """Soft-NMS as its paper writes it (arXiv 1704.04503, figure 2), a class at a time, with NumPy's rows."""
    kept: dict[int, float] = {}
    for label in np.unique(labels):
        index = np.flatnonzero(labels == label)
        mine, left = boxes[index], scores[index].copy()
        while len(left):
            best = int(left.argmax())
            box, kept[int(index[best])] = mine[best], float(left[best])
            width = np.minimum(box[2], mine[:, 2]) - np.maximum(box[0], mine[:, 0])
            height = np.minimum(box[3], mine[:, 3]) - np.maximum(box[1], mine[:, 1])
            shared = width.clip(0) * height.clip(0)
            areas = (mine[:, 2] - mine[:, 0]) * (mine[:, 3] - mine[:, 1])
            left *= np.exp(-((shared / (areas + areas[best] - shared)) ** 2) / 0.5)
            stays = left >= 0.001
            stays[best] = False
            index, mine, left = index[stays], mine[stays], left[stays]
    return kept


def average_precision(options: argparse.Namespace) -> list[Row]:
    """Compares AP of the given detector in both precisions."""
    found: dict[str, dict[str, float]] = {}
    for precision in ("bf16", "fp32"):
        with tempfile.TemporaryDirectory() as folder, silence():
            evaluate(
                EvaluateConfig(
                    annotations=str(options.annotations),
                    images=str(options.images),
                    weights=str(options.weights),
                    split=options.split,
                    out=f"{folder}/out",
                    precision=precision,
                    device=options.device,
                )
            )
            found[precision] = read_json(Path(folder) / "out" / "metrics.json")
    rows = []
    for name in ("AP", "AP50", "AP50_novel"):
        if name in found["fp32"]:
            ours, theirs = (100 * found[precision][name] for precision in ("bf16", "fp32"))
            ratio = ours / theirs if theirs else float("nan")
            rows.append(
                Row(
                    f"{name} of {options.weights.name}",
                    "fp32",
                    "%",
                    ours,
                    theirs,
                    [ratio],
                    f"{ours - theirs:+.2f}",
                )
            )
    return rows


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    main()
