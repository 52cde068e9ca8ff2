"""Pretraining tasks side by side: zero-shot accuracy over images seen and over processor time.

    python benchmarks/pretraining_tasks.py --seeds 0 1 2 --out tasks
    python benchmarks/pretraining_tasks.py --tables --write docs/pretraining_tasks.md --figure docs/images

arXiv 2103.00020, section 2.3 and figure 2, on generated images. The first command makes every run that
`benchmarks/pretraining_tasks/` lacks and leaves a small JSON file there for each task and seed, so that a
stopped one resumes; a finished run is not made again unless its options changed. The second reads the files
alone. The dataset of a seed is generated once, in `--out`. Processor time is that of training alone, with one
thread: what evaluation takes is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rounds import machine, put, shown, versions

from clip_base.jobs.cli import main as clip_base
from clip_base.jobs.config import resolve
from clip_base.storage.files import read_json, write_json
from clip_base.training import pretrain
from clip_base.training.pretrain import PretrainConfig
from clip_base.training.validation import Validation

FINISHED = Path(__file__).parent / "pretraining_tasks"
FIGURE = "pretraining_tasks.svg"
CLASSES, IMAGES_PER_CLASS = 12, 15
WORLD = (
    "images=4000",
    "size=64",
    f"categories={CLASSES}",
    "objects_min=1",
    "objects_max=1",
    "object_min=0.45",
    "object_max=0.65",
    "workers=1",
)
BATCH, STEPS, EVERY = 64, 500, 50
OPTIONS = (
    "tower.embed_dim=128",
    "tower.vision.layers=[1,1,1,1]",
    "tower.vision.width=8",
    "tower.vision.head_width=32",
    "tower.vision.resolution=32",
    "tower.text.width=64",
    "tower.text.context_length=24",
    "cache=true",
    f"train.steps={STEPS}",
    f"train.batch_size={BATCH}",
    f"train.evaluate_every={EVERY}",
    "train.lr=2e-3",
    "train.weight_decay=0.1",
    "train.warmup_steps=30",
    "train.schedule=constant",
    "train.precision=fp32",
    "train.save_every=3600",
)
TRANSFORMER = ("tower.text.heads=1", "tower.text.layers=2")


@dataclass(frozen=True)
class Task:
    """One way to pretrain.

    Attributes:
        title: for tables and the figure.
        options: `key=value` of `clip-base pretrain`.
        color: in the figure.
    """

    title: str
    options: tuple[str, ...]
    color: str


TASKS = {
    "captioning": Task("captioning", ("objective.name=captioning", *TRANSFORMER), "tab:blue"),
    "masked_lm": Task(
        "masked language model",
        ("objective.name=masked_lm", "objective.masked=0.5", *TRANSFORMER),
        "tab:purple",
    ),
    "bag_of_words": Task("bag of words", ("objective.name=bag_of_words", *TRANSFORMER), "tab:orange"),
    "contrastive_bow": Task("contrastive, bag-of-words text", ("tower.text.kind=bow",), "tab:green"),
    "contrastive": Task("contrastive, text transformer", TRANSFORMER, "tab:red"),
    "joint": Task(
        "contrastive and captioning",
        ("objective.name=captioning", "objective.contrastive=1", *TRANSFORMER),
        "tab:brown",
    ),
}
# What the paper says how many times as efficient the second is as the first (section 2.3).
PUBLISHED = {
    ("captioning", "bag_of_words"): "3",
    ("bag_of_words", "contrastive_bow"): "4",
    ("captioning", "contrastive_bow"): "12",
    ("contrastive", "contrastive_bow"): "",
    ("masked_lm", "captioning"): "",
    ("contrastive", "joint"): "",
}
Curve = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="folder for datasets and weights")
    parser.add_argument("--finished", type=Path, default=FINISHED, help="folder of the finished runs")
    parser.add_argument("--tables", action="store_true", help="make nothing, print what is finished")
    parser.add_argument("--write", type=Path, help="Markdown page whose section takes the tables")
    parser.add_argument("--figure", type=Path, help="folder for the figure")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if not options.tables:
        for seed in options.seeds:
            for name in options.tasks:
                make(name, seed, options.out / f"seed-{seed}", options.finished / f"seed-{seed}")
    found = read(options.finished)
    text = report(found)
    print(text)
    if options.write:
        put(options.write, "pretraining tasks", text)
    if options.figure:
        draw(found, options.figure / FIGURE)


def make(name: str, seed: int, folder: Path, finished: Path) -> None:
    """Trains with one task on the dataset of a seed, unless its file is there."""
    file = finished / f"{name}.json"
    key = " ".join((*WORLD, *OPTIONS, *TASKS[name].options))
    if file.exists() and read_json(file, "finished run")["options"] == key:
        return
    world(folder, seed)
    print(f"seed {seed}: {TASKS[name].title}", flush=True)
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    data = ["source.name=coco", f"source.captions={folder}/world/captions_train.json"]
    data += [f"source.images={folder}/world/images", f"evaluate.images={folder}/test", f"train.seed={seed}"]
    config = resolve(PretrainConfig, None, [*OPTIONS, *TASKS[name].options, *data, f"out={out}"])
    curve = trained(config)
    write_json(
        file, {"options": key, **curve, "machine": machine(1), "versions": versions("torch")}, indent=1
    )


def world(folder: Path, seed: int) -> None:
    """Generates the pairs, and images of one object each to classify; their seed is another."""
    if (folder / "test").exists():
        return
    generate(f"out={folder}/world", *WORLD, "val_images=2", f"seed={seed}")
    single = [option for option in WORLD if not option.startswith("images=")]
    sizes = ("images=2", f"val_images={2 * CLASSES * IMAGES_PER_CLASS}")
    generate(f"out={folder}/single", *single, *sizes, f"seed={seed + 1000}")
    held = json.loads((folder / "single" / "instances_val.json").read_text())
    names = {category["id"]: category["name"] for category in held["categories"]}
    files = {image["id"]: image["file_name"] for image in held["images"]}
    counts: dict[str, int] = {}
    part = folder / "test.part"
    for entry in held["annotations"]:
        name = names[entry["category_id"]]
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= IMAGES_PER_CLASS:
            (part / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "single" / "images" / files[entry["image_id"]], part / name)
    part.rename(folder / "test")


def generate(*words: str) -> None:
    if clip_base(["scenes", *words]):
        raise SystemExit("the dataset could not be generated")


def trained(config: PretrainConfig) -> Curve:
    """Returns the accuracy, images seen and seconds of processor time at each evaluation."""
    began, outside = time.process_time(), 0.0
    curve: Curve = {"images": [], "seconds": [], "accuracy": []}
    call = Validation.__call__

    def measured(self: Validation, step: int) -> dict[str, float]:
        nonlocal outside
        now = time.process_time()
        figures = call(self, step)
        curve["images"].append(step * BATCH)
        curve["seconds"].append(round(now - began - outside, 2))
        curve["accuracy"].append(round(figures["val_zeroshot_top1"], 4))
        outside += time.process_time() - now
        return figures

    Validation.__call__ = measured  # type: ignore[method-assign]
    try:
        pretrain.pretrain(config)
    finally:
        Validation.__call__ = call  # type: ignore[method-assign]
    return curve


def read(finished: Path) -> dict[str, dict[int, Curve]]:
    """Returns the finished curves by task and seed."""
    found: dict[str, dict[int, Curve]] = {}
    for name in TASKS:
        files = sorted(finished.glob(f"seed-*/{name}.json"))
        curves = {int(file.parent.name.removeprefix("seed-")): read_json(file, "run") for file in files}
        if curves:
            found[name] = curves
    return found


def needed(curve: Curve, accuracy: float, axis: str = "images") -> float | None:
    """Returns at which value of an axis a curve first has an accuracy, interpolated; None: never."""
    before = (0.0, 0.0)
    for place, height in zip(curve[axis], curve["accuracy"], strict=True):
        if height >= accuracy:
            share = (accuracy - before[1]) / (height - before[1])
            return float(before[0] + share * (place - before[0]))
        before = (place, height)
    return None


def target_of(curves: Sequence[dict[int, Curve]], seed: int) -> float | None:
    """Returns the accuracy at which two tasks are compared: nine tenths of the lower one's best.

    None when that one has not learned: its best is below twice what guessing gives.
    """
    best = min(max(curve[seed]["accuracy"]) for curve in curves)
    return 0.9 * best if best >= 2 / CLASSES else None


def ratios(found: dict[str, dict[int, Curve]], slow: str, fast: str, axis: str) -> list[float]:
    """Returns for each seed how many times as much of `axis` the first task needs for an equal accuracy.

    Seeds with which one of them has not learned are left out.
    """
    values = []
    for seed in sorted(found[slow].keys() & found[fast].keys()):
        target = target_of((found[slow], found[fast]), seed)
        if target is None:
            continue
        pair = [needed(found[name][seed], target, axis) for name in (slow, fast)]
        assert pair[0] is not None
        assert pair[1] is not None
        values.append(pair[0] / pair[1])
    return values


def report(found: dict[str, dict[int, Curve]]) -> str:
    """Returns the tables as Markdown."""
    lines = [
        "| task | top-1 at the end | best | processor time per 1,000 images | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, curves in found.items():
        ends = [100 * curve["accuracy"][-1] for curve in curves.values()]
        best = [100 * max(curve["accuracy"]) for curve in curves.values()]
        rates = [1000 * curve["seconds"][-1] / curve["images"][-1] for curve in curves.values()]
        lines.append(
            f"| {TASKS[name].title} | {spread(ends)} | {spread(best)} | "
            f"{shown(statistics.median(rates))} s | {len(curves)} |"
        )
    lines += [
        "",
        "| | times as many images | times as much processor time | the paper: images |",
        "|---|---|---|---|",
    ]
    for (slow, fast), said in PUBLISHED.items():
        if slow in found and fast in found:
            both = [spread(ratios(found, slow, fast, axis)) for axis in ("images", "seconds")]
            title = f"{TASKS[slow].title}, against {TASKS[fast].title}"
            lines.append(f"| {title} | {both[0]} | {both[1]} | {said or '–'} |")
    one = next((curve for curves in found.values() for curve in curves.values()), None)
    if one:
        lines += ["", f"Machine: {one['machine']}. {one['versions']}."]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Returns the median, and the lowest and highest value."""
    if not values:
        return "–"
    return f"{shown(statistics.median(values))} ({shown(min(values))} to {shown(max(values))})"


def draw(found: dict[str, dict[int, Curve]], path: Path) -> None:
    """Draws the mean of the seeds, and their range, over images and over processor time."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "tasks"  # equal curves give equal files
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for place, (axis, label) in zip(
        places, (("images", "images seen"), ("seconds", "processor time, s")), strict=True
    ):
        for name, curves in found.items():
            rows = [[100 * value for value in curve["accuracy"]] for curve in curves.values()]
            columns = list(zip(*rows, strict=True))
            across = [statistics.mean(v) for v in zip(*(c[axis] for c in curves.values()), strict=True)]
            color = TASKS[name].color
            place.plot(across, [statistics.mean(c) for c in columns], color=color, label=TASKS[name].title)
            place.fill_between(
                across, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.12
            )
        place.set_xlim(left=0)
        place.set_xlabel(label)
        place.xaxis.set_major_formatter("{x:,.0f}")
        place.grid(alpha=0.3)
    places[0].set_ylabel("zero-shot top-1, %")
    places[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
