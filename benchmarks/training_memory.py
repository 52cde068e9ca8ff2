"""What CLIP's training keeps in memory: worked out by a trace at full size, checked against a process's own.

    python benchmarks/training_memory.py --write docs/training_memory.md

Worked out: one training step of `clip-base pretrain` is traced with tensors that have shapes and no content
(`FakeTensorMode`), and every live storage is counted (torch's `MemTracker`): nothing is computed, so that a
batch of 32,768 on 256 processes can be traced on a laptop. Each process holds its share of the images; the
embeddings of the others are there with their size. Checked: the same trace of small models against how much
the peak resident memory of a process grows when it really makes the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rounds import command, machine, put, versions
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from clip_base.data.batch import ImageBatch, ImageTextBatch
from clip_base.models import zoo
from clip_base.models.clip import CLIP, set_checkpointing
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime import distributed
from clip_base.training.losses import Chunked, ChunkedConfig, Contrastive, ContrastiveConfig
from clip_base.training.tasks import ContrastiveTask

BATCH, RANKS = 32_768, 256
MODELS = ("RN50", "ViT-L/14")
GB, MB = 1e9, 1e6
# Bytes of an optimizer's statistics for each weight; 8 bits have a float32 scale for every 256.
STATISTICS = {"adamw": 8.0, "adamw_bf16": 4.0, "adamw_8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        sizes: of the CLIP.
        images: of this process.
        ranks: processes.
        checkpointing: whether activations are recomputed.
        chunked: rows of similarities computed at a time; 0: all.
        bf16: whether the forward pass is.
    """

    sizes: CLIPConfig
    images: int
    ranks: int = 1
    checkpointing: bool = False
    chunked: int = 0
    bf16: bool = True


_TEXT = TextConfig(width=256, heads=4, layers=4)
SMALL = {
    "ResNet of width 32, 64 images of 128 pixels": Step(
        CLIPConfig(256, VisionConfig(layers=[2, 2, 2, 2], width=32, resolution=128), _TEXT), 64
    ),
    "ViT of width 256, 8 blocks, 64 images of 128 pixels": Step(
        CLIPConfig(256, VisionConfig("vit", [8], 256, 16, 128), _TEXT), 64
    ),
    "512 small images and texts, batch of 16,384": Step(
        CLIPConfig(256, VisionConfig("vit", [1], 64, 32, 64), TextConfig(64, 1, 1, 16)), 512, ranks=32
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="only the check, not the table of full sizes")
    parser.add_argument("--write", type=Path, help="Markdown page whose section takes the tables")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(grown(named(options.measure))))
        return
    text = checked() if options.small else f"{full_sizes()}\n\n{checked()}"
    text += f"\n\nMachine: {machine(1)}. {versions('torch')}.\n\n    {command()}"
    print(text)
    if options.write:
        put(options.write, "training memory", text)


def full_sizes() -> str:
    """Returns the table of peak memory per process at the published batch."""
    lines = [
        "| | | all else at the peak | optimizer `adamw` | `adamw_bf16` | `adamw_bf16`, text weights in "
        "bfloat16 | `adamw_8bit` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for title, checkpointing, chunked in (
            ("plain", False, 0),
            ("`objective.name=chunked`", False, 1024),
            ("`chunked`, `train.checkpointing=true`", True, 1024),
        ):
            step = Step(zoo.config(name), BATCH // RANKS, RANKS, checkpointing, chunked)
            peak, weights, text = traced(step)
            rest = peak - 8 * weights
            cells = [rest + weights * (8 + STATISTICS[kind]) for kind in ("adamw", "adamw_bf16")]
            # Text weights and their gradients take two bytes instead of four.
            cells += [cells[1] - 4 * text, rest + weights * (8 + STATISTICS["adamw_8bit"])]
            shown = " | ".join(f"{value / GB:.1f} GB" for value in cells)
            lines.append(f"| {name} | {title} | {rest / GB:.1f} GB | {shown} |")
    columns = "weights | of them in the text tower | gradients | statistics: `adamw` | `adamw_bf16` | "
    lines += ["", f"| | {columns}`adamw_8bit` |", "|---|---|---|---|---|---|---|"]
    for name in MODELS:
        with torch.device("meta"):
            model = CLIP(zoo.config(name))
        count = sum(p.numel() for p in model.parameters())
        text = sum(p.numel() for p in model.text.parameters())
        sizes = [4 * count, 4 * text, 4 * count, *(count * STATISTICS[kind] for kind in STATISTICS)]
        lines.append(f"| {name} | " + " | ".join(f"{size / GB:.2f} GB" for size in sizes) + " |")
    return "\n".join(lines)


def checked() -> str:
    """Returns the table that compares traces with what processes take."""
    lines = ["| step | traced | measured | measured / traced |", "|---|---|---|---|"]
    for name, plain in SMALL.items():
        for title, step in variants(plain).items():
            peak = traced(step)[0]
            call = [sys.executable, __file__, "--measure", f"{name}: {title}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            told = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
            found = float(json.loads(told.splitlines()[-1]))
            lines.append(
                f"| {name}: {title} | {peak / MB:,.0f} MB | {found / MB:,.0f} MB | {found / peak:.2f} |"
            )
    return "\n".join(lines)


def variants(step: Step) -> dict[str, Step]:
    """Returns a step without and with what saves memory; a batch of many processes by the loss alone."""
    facts = {key: getattr(step, key) for key in ("sizes", "images", "ranks")}
    if step.ranks > 1:
        return {"all similarities": Step(**facts), "chunked": Step(**facts, chunked=64)}
    return {
        "plain": Step(**facts),
        "checkpointing": Step(**facts, checkpointing=True),
    }


def named(name: str) -> Step:
    model, _, title = name.rpartition(": ")
    return variants(SMALL[model])[title]


def prepared(step: Step) -> tuple[ContrastiveTask, ImageTextBatch]:
    """Returns the task, with gradients that exist from the start as in buckets of DDP, and a batch."""
    loss = Chunked(ChunkedConfig(step.chunked)) if step.chunked else Contrastive(ContrastiveConfig())
    task = ContrastiveTask(CLIP(step.sizes), loss).train()
    if step.checkpointing:
        set_checkpointing(task)
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side, length = step.sizes.vision.resolution, step.sizes.text.context_length
    tokens = torch.ones(step.images, length, dtype=torch.int64)
    tokens[:, -1] = step.sizes.text.vocab_size - 1  # texts that fill all positions
    return task, ImageTextBatch(ImageBatch.whole(torch.zeros(step.images, 3, side, side)), tokens)


@contextlib.contextmanager
def as_one_of(ranks: int) -> Iterator[None]:
    """While it lasts, the embeddings of other processes are there, and the similarities to them."""
    gather = distributed.gather

    def gathered(rows: Tensor, counts: list[int] | None = None) -> Tensor:
        return torch.cat([rows, rows.new_zeros((ranks - 1) * len(rows), *rows.shape[1:])])

    distributed.gather = gathered if ranks > 1 else gather
    try:
        yield
    finally:
        distributed.gather = gather


def make_step(task: ContrastiveTask, batch: ImageTextBatch, step: Step) -> None:
    """Makes the forward and backward pass."""
    with as_one_of(step.ranks):
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
            loss = torch.stack(list(task(batch).values())).sum()
        torch.autograd.backward(loss)


def traced(step: Step) -> tuple[int, int, int]:
    """Returns the peak of all live tensors in bytes, the number of weights, and those of the text tower.

    Optimizer statistics are not among them.
    """
    compiling = torch.compiler.is_compiling
    with FakeTensorMode(allow_non_fake_inputs=True):
        task, batch = prepared(step)
        tracker = MemTracker()
        tracker.track_external(task, batch.images.pixels, batch.tokens)
        torch.compiler.is_compiling = lambda: True  # no text's length is looked at, which has no value here
        try:
            with tracker:
                make_step(task, batch, step)
        finally:
            torch.compiler.is_compiling = compiling
        peak = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
    text = sum(parameter.numel() for parameter in task.model.text.parameters())
    return peak, sum(parameter.numel() for parameter in task.parameters()), text


def grown(step: Step) -> int:
    """Returns by how many bytes the peak of this process grows when it makes the step."""
    with torch.random.fork_rng():  # loads what the first step of any size loads
        few = Step(step.sizes, 2, step.ranks, step.checkpointing, step.chunked, step.bf16)
        make_step(*prepared(few), few)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    task, batch = prepared(step)
    make_step(task, batch, step)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


if __name__ == "__main__":
    main()
