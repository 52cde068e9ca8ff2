"""How easy the categories of the synthetic dataset are to tell apart: a supervised classifier on true boxes.

    clip-base scenes out=all images=16000 val_images=8000 categories=77 objects_max=2 object_min=0.35
    clip-base scenes out=variants images=16000 val_images=8000 categories=35 "attributes=[striped, tall]" \\
        objects_max=2 object_min=0.35
    python benchmarks/distinctness.py all variants --write clip_base/data_files/distinctness.csv

A small convolutional network is trained on the true boxes of the training images, on all categories at once,
and names those of the validation images. The table, category,accuracy, is what `clip-base scenes
split=balanced` draws novel categories by. Where two datasets share a name, the first one counts. With
`--splits 48 12` the accuracy of base and novel categories is printed for draws with ten seeds.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.runtime.progress import track
from clip_base.storage.files import read_json, write_text
from clip_base.synthetic.pictograms import TABLE
from clip_base.synthetic.splits import balanced, distinctness

SIDE = 32  # pixels of a box, resized
CONTEXT = 1.15  # side of what is cut out, as a multiple of the box's


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("worlds", type=Path, nargs="*", help="folders of clip-base scenes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--classifiers", type=int, default=1, help="trainings with other weights, averaged")
    parser.add_argument("--write", type=Path, help="CSV file to write")
    parser.add_argument("--splits", type=int, nargs=2, help="categories and novel ones of draws to look at")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    found: dict[str, float] = {}
    for world in options.worlds:
        found = measure(world, options.epochs, options.classifiers) | found
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerows([("category", "accuracy"), *((name, f"{value:.3f}") for name, value in found.items())])
    if options.write and found:
        write_text(options.write, table.getvalue())
    elif found:
        print(table.getvalue())
    if options.splits:
        look_at_splits(*options.splits)


def measure(world: Path, epochs: int, classifiers: int) -> dict[str, float]:
    """Returns the accuracy of each category of a dataset, the mean of several classifiers."""
    train, val = (read_boxes(world, part) for part in ("train", "val"))
    names = [str(one["name"]) for one in read_json(world / "instances_train.json")["categories"]]
    right = torch.zeros(len(names))
    for seed in range(classifiers):
        torch.manual_seed(seed)
        network = classifier(len(names))
        fit(network, *train, epochs)
        with torch.no_grad():
            predicted = torch.cat([network(some).argmax(1) for some in in_batches(val[0])])
        right += torch.bincount(val[1][predicted == val[1]], minlength=len(names))
    accuracy = right / classifiers / torch.bincount(val[1], minlength=len(names))
    print(f"{world}: {100 * float(accuracy.mean()):.1f} % over {len(names)} categories, "
          f"{100 * float(accuracy.min()):.1f} to {100 * float(accuracy.max()):.1f}")  # fmt: skip
    return dict(zip(names, accuracy.tolist(), strict=True))


def read_boxes(world: Path, part: str) -> tuple[Tensor, Tensor]:
    """Returns true boxes as images [N, 3, 32, 32] in [-1, 1], and their categories [N]."""
    content = read_json(world / f"instances_{part}.json")
    index = {one["id"]: place for place, one in enumerate(content["categories"])}
    boxes: dict[int, list[tuple[list[float], int]]] = {one["id"]: [] for one in content["images"]}
    for one in content["annotations"]:
        boxes[one["image_id"]].append((one["bbox"], index[one["category_id"]]))
    crops, labels = [], []
    for image in track(content["images"], f"{world.name}, {part}"):
        pixels = cv2.imread(str(world / "images" / image["file_name"]))
        assert pixels is not None
        for (x, y, width, height), label in boxes[image["id"]]:
            side = max(width, height) * CONTEXT
            scale = SIDE / side
            shift = [SIDE / 2 - (x + width / 2) * scale, SIDE / 2 - (y + height / 2) * scale]
            affine = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
            crops.append(cv2.warpAffine(pixels, affine, (SIDE, SIDE), flags=cv2.INTER_AREA))
            labels.append(label)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def classifier(categories: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, categories))


def fit(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains the network, and leaves it in evaluation mode."""
    batch = 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in track(range(steps), "classifier"):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images))
        start = step % (len(images) // batch) * batch
        some = order[start : start + batch]
        loss = F.cross_entropy(network(images[some]), labels[some])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    network.eval()


def in_batches(images: Tensor) -> Sequence[Tensor]:
    return torch.split(images, 256)


def look_at_splits(categories: int, novel: int) -> None:
    """Prints how distinct base and novel categories of balanced draws are."""
    names, measured = [one.name for one in TABLE[:categories]], distinctness()
    gaps = []
    for seed in range(10):
        drawn = balanced(names, novel, seed)
        own, other = (
            [measured[name] for name in names if (name in drawn) is is_novel] for is_novel in (True, False)
        )
        gaps.append(statistics.mean(own) - statistics.mean(other))
        print(
            f"seed {seed}: base {100 * statistics.mean(other):.1f} %, "
            f"novel {100 * statistics.mean(own):.1f} %"
        )
    print(f"novel - base: {100 * statistics.mean(gaps):+.2f} ± {100 * statistics.stdev(gaps):.2f}")


if __name__ == "__main__":
    main()
