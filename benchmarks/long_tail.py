"""Zero-shot accuracy on rare and frequent names, with and without `clip-base curate`, in a generated world.

    python benchmarks/long_tail.py folder --seeds 0 1 2

Of each seed: training images whose categories' frequencies fall as 1 / rank^tail, one object each; validation
images have all alike. Three sets of pairs train the same towers for the same number of steps: all pairs; the
subset that `curate` chooses with the categories' names as queries; and as many pairs drawn at random, to tell
balance from size. The table has the accuracy on the frequent, middle and rare third of names.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from rounds import processor
from worlds import PLAIN, by_class, coco, job, same, training

SETS = ("all pairs", "random subset", "curated subset")
THIRDS = ("frequent", "middle", "rare")
Scores = dict[str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for worlds and runs; what is there already is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--categories", type=int, default=12)
    parser.add_argument("--tail", type=float, default=1.5)
    parser.add_argument("--per-query", type=int, default=200)
    parser.add_argument("--per-class", type=int, default=40, help="validation images of each category")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    return parser.parse_args()


def accuracies(folder: Path, seed: int, options: argparse.Namespace) -> tuple[dict[str, Scores], int]:
    """Returns by set of pairs the accuracy by third of names, and how many pairs the subset has."""
    world = job(
        "scenes",
        out=folder / "world",
        images=options.images,
        val_images=3 * options.per_class * options.categories,
        seed=seed,
        categories=options.categories,
        tail=options.tail,
        **PLAIN,
    )
    if not (folder / "val.done").exists():
        by_class(world, "val", options.per_class, folder / "val", same)
        (folder / "val.done").touch()
    content = json.loads((world / "instances_train.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names.values()))
    count = Counter(names[entry["category_id"]] for entry in content["annotations"])
    order = sorted(names.values(), key=lambda name: -count[name])
    all_pairs = coco(world)
    queries = {"queries": folder / "names.txt", "per_query": options.per_query, "seed": seed}
    curated = job("curate", **all_pairs, **queries, out=folder / "curated") / "pairs.jsonl"
    size = len(curated.read_text().splitlines())
    sources = {
        "all pairs": all_pairs,
        "random subset": {"source__name": "jsonl", "source__file": _random(folder, world, size, seed)},
        "curated subset": {"source__name": "jsonl", "source__file": curated},
    }
    runs = {name: folder / name.replace(" ", "_") for name in SETS}
    return {name: _scores(sources[name], runs[name], order, seed, options) for name in SETS}, size


def _scores(
    source: dict[str, Any], run: Path, order: list[str], seed: int, options: argparse.Namespace
) -> Scores:
    """Trains on some pairs; returns the accuracy on validation images by third of names."""
    clip = job("pretrain", **source, **training(options.steps, options.batch_size, seed), out=run)
    scored = job(
        "zeroshot",
        images=run.with_name("val"),
        templates="simple",
        weights=clip / "model.safetensors",
        out=run.with_name(f"{run.name}_zeroshot"),
    )
    with (scored / "per_class.csv").open() as file:
        top1 = {row["name"]: float(row["top1"]) for row in csv.DictReader(file)}
    third = len(order) // 3
    parts = dict(zip(THIRDS, (order[:third], order[third:-third], order[-third:]), strict=True))
    found = {part: statistics.fmean(top1[name] for name in own) for part, own in parts.items()}
    return found | {"all": statistics.fmean(top1.values())}


def _random(folder: Path, world: Path, count: int, seed: int) -> Path:
    """Writes as many pairs as the curated subset has, drawn at random."""
    content = json.loads((world / "captions_train.json").read_text())
    texts: dict[int, list[str]] = {}
    for entry in content["annotations"]:
        texts.setdefault(entry["image_id"], []).append(entry["caption"])
    path = folder / "random.jsonl"
    with path.open("w") as file:
        for entry in random.Random(seed).sample(content["images"], count):
            image = str((world / "images" / entry["file_name"]).absolute())
            file.write(json.dumps({"image": image, "caption": texts[entry["id"]]}) + "\n")
    return path


def main() -> None:
    options = arguments()
    found, sizes = [], []
    for seed in options.seeds:
        folder = options.folder / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        scores, size = accuracies(folder, seed, options)
        found.append(scores)
        sizes.append(size)
    print(f"{processor()}; seeds {options.seeds}, {options.images:,} pairs, subsets of {sizes}")
    columns = (*THIRDS, "all")
    print(f"| pairs | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in SETS:
        cells = []
        for column in columns:
            values = [100 * scores[name][column] for scores in found]
            cells.append(f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
