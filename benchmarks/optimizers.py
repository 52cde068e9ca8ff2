"""Optimizers that save memory: their statistics in bytes, and the loss against AdamW in float32.

    python benchmarks/optimizers.py --seeds 0 1 2 --out tasks
    python benchmarks/optimizers.py --tables --write docs/training_memory.md

Contrastive training of a small CLIP on the generated images of `pretraining_tasks.py`, in float32. The first
command leaves a small JSON file in `benchmarks/optimizers/` for each optimizer and seed and resumes; the
second reads them alone. Statistics of 8 bits are tried with captioning, which has no embeddings of 49,408
tokens: not compiled, as on a CPU, a step on those takes 0.7 s.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pretraining_tasks import OPTIONS, TRANSFORMER, WORLD, spread, world
from rounds import machine, put, versions
from torch import Tensor

from clip_base.jobs.config import resolve
from clip_base.storage.files import read_json, read_log, write_json
from clip_base.training import checkpoint
from clip_base.training.pretrain import PretrainConfig, pretrain

FINISHED = Path(__file__).parent / "optimizers"
STEPS, LAST = 500, 50
CAPTIONING = "objective.name=captioning"
VARIANTS = {
    "`adamw`": (),
    "`adamw_bf16`": ("train.optimizer=adamw_bf16",),
    "`adamw_bf16`, `text_precision=bf16`": ("train.optimizer=adamw_bf16", "text_precision=bf16"),
    "captioning: `adamw`": (CAPTIONING,),
    "captioning: `adamw_bf16`": ("train.optimizer=adamw_bf16", CAPTIONING),
    "captioning: `adamw_8bit`": ("train.optimizer=adamw_8bit", CAPTIONING),
}
AGAINST = (0, 0, 0, 3, 3, 3)  # the row that each is compared with
CHANGED = (
    f"train.steps={STEPS}",
    "train.batch_size=32",
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.schedule=cosine",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    numbers = range(len(VARIANTS))
    parser.add_argument("--rows", type=int, nargs="+", choices=numbers, default=numbers, help="of the table")
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="folder for datasets and weights")
    parser.add_argument("--finished", type=Path, default=FINISHED, help="folder of the finished runs")
    parser.add_argument("--tables", action="store_true", help="make nothing, print what is finished")
    parser.add_argument("--write", type=Path, help="Markdown page whose section takes the table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if not options.tables:
        for seed in options.seeds:
            for number in options.rows:
                file = options.finished / f"seed-{seed}-{number}.json"
                make(list(VARIANTS)[number], seed, options.out / f"seed-{seed}", file)
    text = report(options.finished, options.seeds)
    print(text)
    if options.write:
        put(options.write, "optimizers", text)


def make(name: str, seed: int, folder: Path, file: Path) -> None:
    """Trains with one optimizer on the dataset of a seed, unless its file is there."""
    words = [*OPTIONS, *TRANSFORMER, *CHANGED, *VARIANTS[name]]
    key = " ".join((*WORLD, *words))
    if file.exists() and read_json(file, "finished run")["options"] == key:
        return
    world(folder, seed)
    print(f"seed {seed}: {name}", flush=True)
    out = folder / "optimizer"
    shutil.rmtree(out, ignore_errors=True)
    data = ["source.name=coco", f"source.captions={folder}/world/captions_train.json", f"out={out}"]
    data += [f"source.images={folder}/world/images", f"evaluate.images={folder}/test", f"train.seed={seed}"]
    pretrain(resolve(PretrainConfig, None, [*words, *data]))
    loss = "captioning" if CAPTIONING in words else "contrastive"
    losses = [entry[loss] for entry in read_log(out / "log.jsonl", "log") if loss in entry]
    held = checkpoint.newest(out / "checkpoints")
    assert held is not None
    found = {
        "options": key,
        "loss": round(statistics.mean(losses[-LAST:]), 4),
        "accuracy": round(read_json(out / "metrics.json", "metrics")["val_zeroshot_top1"], 4),
        "statistics": sum(map(size_of, tensors(held[2]["optimizer"]["state"]))),
        "weights": sum(size_of(value) for key, value in held[1].items() if value.is_floating_point()),
        "machine": machine(1),
        "versions": versions("torch", "torchao"),
    }
    write_json(file, found, indent=1)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a state, without counters of steps."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "step":
                yield from tensors(inner)
    elif isinstance(value, Tensor):
        yield value


def size_of(value: Tensor) -> int:
    """Returns a tensor's bytes; of torchao's those of its codes and scales."""
    if hasattr(value, "codes"):
        return sum(size_of(getattr(value, name)) for name in ("codes", "scale", "qmap"))
    return value.numel() * value.element_size()


def report(finished: Path, seeds: list[int]) -> str:
    """Returns the table as Markdown."""
    found: dict[int, list[dict[str, Any]]] = {}
    for number in range(len(VARIANTS)):
        files = [finished / f"seed-{seed}-{number}.json" for seed in seeds]
        found[number] = [read_json(file, "finished run") for file in files if file.exists()]
    lines = [
        "| optimizer | weights | statistics | loss, mean of the last 50 of 500 steps | against `adamw` | "
        "zero-shot top-1, % |",
        "|---|---|---|---|---|---|",
    ]
    for number, name in enumerate(VARIANTS):
        runs = found[number]
        if not runs:
            continue
        plain = found[AGAINST[number]]
        against = [run["loss"] / other["loss"] for run, other in zip(runs, plain, strict=False)]
        cells = [f"{runs[0][kind] / 1e6:.2f} MB" for kind in ("weights", "statistics")]
        cells += [
            spread([run["loss"] for run in runs]),
            f"{spread(against)} times" if AGAINST[number] != number else "–",
        ]
        cells.append(spread([100 * run["accuracy"] for run in runs]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    one = next((runs[0] for runs in found.values() if runs), None)
    if one:
        count = max(map(len, found.values()))
        lines += ["", f"Median of {count} seeds (lowest to highest)."]
        lines.append(f"Machine: {one['machine']}. {one['versions']}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
