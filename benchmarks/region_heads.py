"""What the kinds of region heads can learn: a tower trained on true boxes with their categories, by head.

    clip-base scenes out=boxes images=6000 val_images=800 categories=10 objects_min=2 objects_max=3 \\
        object_min=0.2 object_max=0.5
    python benchmarks/region_heads.py boxes --heads per_region shared dense --seeds 0 1 2

A ResNet with random weights embeds the true boxes of the training images; the loss is the cross entropy over
fixed random embeddings of the categories. No captions, proposals or mining are involved, so that a difference
is one of the heads. Printed is the accuracy on the validation images' true boxes: of all, and of small ones,
whose area is that of a square of less than 0.3 of the image's side. A training takes about a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.models.configs import VisionConfig
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime.precision import autocast
from clip_base.storage.files import read_json
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.region_heads import REGION_HEADS
from regionclip.structures.regions import Regions

DIM = 256  # of the embeddings
SCALE = 20.0  # factor on cosines
SMALL = 0.3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("world", type=Path, help="folder of clip-base scenes")
    parser.add_argument("--heads", nargs="+", choices=REGION_HEADS, default=list(REGION_HEADS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--width", type=int, default=16, help="of the tower")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--batch", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    train, val = (Boxes.read(options.world, part, options.size) for part in ("train", "val"))
    for seed in options.seeds:
        for head in options.heads:
            start = time.process_time()
            encoder, names = fit(train, head, seed, options)
            every, small = accuracy(encoder, names, val)
            seconds = time.process_time() - start
            print(
                f"{head}, seed {seed}, {options.size} px: {100 * every:.1f} %, "
                f"small {100 * small:.1f} % ({seconds:.0f} s of processor time)",
                flush=True,
            )


@dataclass(frozen=True)
class Boxes:
    """Images of one part of a dataset with their true boxes.

    Attributes:
        images: [I, 3, S, S] uint8.
        boxes: by image, [n, 4] in pixels.
        labels: by image, [n].
        categories: how many there are.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    categories: int

    @classmethod
    def read(cls, world: Path, part: str, size: int) -> Boxes:
        content = read_json(world / f"instances_{part}.json")
        own: dict[int, list[tuple[list[float], int]]] = {one["id"]: [] for one in content["images"]}
        for one in content["annotations"]:
            x, y, width, height = one["bbox"]
            own[one["image_id"]].append(([x, y, x + width, y + height], one["category_id"] - 1))
        pixels, boxes, labels = [], [], []
        for image in content["images"]:
            if own[image["id"]]:
                read = cv2.imread(str(world / "images" / image["file_name"]))
                assert read is not None
                pixels.append(cv2.resize(read, (size, size), interpolation=cv2.INTER_LINEAR))
                boxes.append(torch.tensor([box for box, _ in own[image["id"]]]) * size / image["width"])
                labels.append(torch.tensor([label for _, label in own[image["id"]]]))
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return cls(images, boxes, labels, len(content["categories"]))

    def batch(self, chosen: list[int]) -> tuple[ImageBatch, Regions]:
        boxes, labels = (torch.cat([part[place] for place in chosen]) for part in (self.boxes, self.labels))
        index = torch.cat([torch.full_like(self.labels[place], slot) for slot, place in enumerate(chosen)])
        images = ImageBatch.whole((self.images[chosen].float() - 118) / 70)
        return images, Regions(boxes.float(), index, labels=labels)

    def batches(self, size: int) -> Iterator[tuple[ImageBatch, Regions]]:
        for start in range(0, len(self.boxes), size):
            yield self.batch(list(range(start, min(start + size, len(self.boxes)))))


def fit(data: Boxes, head: str, seed: int, options: argparse.Namespace) -> tuple[RegionEncoder, Tensor]:
    """Trains a tower with a head; returns its encoder and the categories' embeddings [C, 256]."""
    torch.manual_seed(seed)
    sizes = VisionConfig(layers=[1, 1, 1, 1], width=options.width, head_width=32, resolution=64)
    tower = ModifiedResNet(sizes, DIM).train()
    names = F.normalize(torch.randn(data.categories, DIM), dim=1)
    encoder = RegionEncoder(tower, region_head=head)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    for step in range(options.steps):
        places = [(step * options.batch + slot) % len(data.boxes) for slot in range(options.batch)]
        images, regions = data.batch(places)
        with autocast("auto", torch.device("cpu")):
            embeddings = encoder(images, regions)
        assert regions.labels is not None
        loss = F.cross_entropy(SCALE * embeddings @ names.T, regions.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    tower.eval()
    return encoder, names


@torch.no_grad()
def accuracy(encoder: RegionEncoder, names: Tensor, data: Boxes) -> tuple[float, float]:
    """Returns the share of true boxes whose category comes first: of all, and of small ones."""
    right, small = [], []
    side = data.images.shape[-1]
    for images, regions in data.batches(50):
        with autocast("auto", torch.device("cpu")):
            embeddings = encoder(images, regions)
        assert regions.labels is not None
        right.append((embeddings @ names.T).argmax(1) == regions.labels)
        width, height = (regions.boxes[:, 2:] - regions.boxes[:, :2]).unbind(1)
        small.append(width * height < (SMALL * side) ** 2)
    correct, is_small = torch.cat(right), torch.cat(small)
    return float(correct.float().mean()), float(correct[is_small].float().mean())


if __name__ == "__main__":
    main()
