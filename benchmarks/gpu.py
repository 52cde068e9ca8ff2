"""One run on a GPU, under ten minutes: detection, mining's teacher and CLIP's training, and the card's share.

    python benchmarks/gpu.py --write docs/benchmarks.md

Random weights, bf16. Each rate stands beside the share of the matrix rate that the device reaches here with
one large bf16 product, worked out from the floating-point operations that PyTorch counts. Training stands
beside open_clip's fastest: bf16, channels-last, `torch.compile`. `--device cpu --quick` shows that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clip import BF16, FASTEST, our_step, pair_of_models, their_step
from rates import matrix_rate, operations_of, waiting
from rivals import IMAGE, Design, ours
from rounds import alternate, command, machine, put_kind, shown, versions

from clip_base.data.batch import ImageBatch
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.precision import autocast
from regionclip.models.region_encoder import RegionEncoder
from regionclip.structures.regions import Regions

SIDE, BOXES = 224, 100


@dataclass(frozen=True)
class Line:
    """One measured work: `count` images in `seconds`, with `operations` of them counted."""

    task: str
    count: int
    seconds: list[float]
    operations: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256, help="pairs of a training step")
    parser.add_argument("--images", type=int, default=32, help="images that are detected, or mined, at once")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new comparison begins after so long")
    parser.add_argument("--quick", action="store_true", help="one round on little input: does it run?")
    parser.add_argument("--write", type=Path, help="Markdown page whose section takes the table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU found; --device cpu --quick shows that this script runs")
    if options.quick:
        options.rounds, options.batch, options.images = 1, 2, 1
    ends = time.monotonic() + 60 * options.minutes
    peak = matrix_rate(options.device, "bf16")
    lines: list[Line] = []
    left_out: list[str] = []
    for title, measure in works(options).items():
        if time.monotonic() > ends:
            left_out.append(title)
            continue
        found = measure()
        lines += found
        print("\n".join(table(found, peak).splitlines()[2:]), flush=True)
    text = described(options, peak, left_out) + table(lines, peak)
    print(text)
    if options.write:
        kind = torch.cuda.get_device_name() if options.device == "cuda" else machine(torch.get_num_threads())
        put_kind(options.write, "gpu", kind, text)


def described(options: argparse.Namespace, peak: float, left_out: list[str]) -> str:
    """Returns the device, the versions, the command and what the time did not suffice for."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "the processor"
    facts = f"Machine: {device}; {machine(torch.get_num_threads())}.\n"
    facts += f"Versions: {versions('torch', 'torchvision', 'open_clip_torch')}.\n"
    facts += f"A bf16 product of two square matrices reaches {peak / 1e12:.3g} TFLOP/s; "
    facts += f"median of {options.rounds} rounds."
    if left_out:
        facts += f" Not measured, since the time was over: {', '.join(left_out)}."
    return f"{facts}\n\n    {command()}\n\n"


def works(options: argparse.Namespace) -> dict[str, Callable[[], list[Line]]]:
    """Returns what is measured, the most wanted first."""
    found: dict[str, Callable[[], list[Line]]] = {}
    for design in (Design(480, 300, False, "shared"), Design(480, 300, True, "per_region")):
        found[f"detection: {design}"] = lambda design=design: [detection(design, options)]  # type: ignore[misc]
    found["training RN50"] = lambda: training("RN50", options)
    for head in ("shared", "per_region"):
        found[f"teacher: {head}"] = lambda head=head: [teacher(head, options)]  # type: ignore[misc]
    found["training ViT-B/32"] = lambda: training("ViT-B/32", options)
    for design in (Design(800, 1000, False, "shared"), Design(800, 1000, True, "per_region")):
        found[f"detection: {design}"] = lambda design=design: [detection(design, options)]  # type: ignore[misc]
    return found


def detection(design: Design, options: argparse.Namespace) -> Line:
    """Detects 65 names, from pixels on the device to boxes."""
    device = torch.device(options.device)
    detect = ours(design, 65, device)

    def work() -> object:
        with torch.no_grad(), autocast("bf16", device):
            return detect(options.images)

    task = f"detection, {design} ({IMAGE[0]} x {IMAGE[1]} px photograph)"
    return timed(task, options.images, work, options)


def teacher(head: str, options: argparse.Namespace) -> Line:
    """Embeds the boxes of images as mining's teacher does, without reading files or matching."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = CLIP(zoo.config("RN50")).eval().to(device).to(memory_format=torch.channels_last)
    encoder = RegionEncoder(model.visual, "roi_align", region_head=head)
    pixels = torch.randn(options.images, 3, *IMAGE, device=device)
    corners = torch.rand(options.images * BOXES, 2) * torch.tensor([400.0, 300.0])
    boxes = torch.cat([corners, corners + 40 + torch.rand(len(corners), 2) * 130], 1)
    regions = Regions(boxes, torch.arange(options.images).repeat_interleave(BOXES)).to(device)
    images = ImageBatch.whole(pixels)

    def work() -> object:
        with torch.no_grad(), autocast("bf16", device):
            return encoder(images, regions)

    return timed(f"teacher RN50, {head} head, {BOXES} boxes an image", options.images, work, options)


def training(name: str, options: argparse.Namespace) -> list[Line]:
    """Returns a training step here and in open_clip, in alternating rounds."""
    device, compiled = options.device, options.device == "cuda"
    mine, theirs = pair_of_models(name, device)
    pixels = torch.randn(options.batch, 3, SIDE, SIDE, device=device)
    tokens = Tokenizer(77)([f"a photo of {number} things" for number in range(options.batch)]).to(device)
    few = 2  # operations grow with the batch

    def both_ways() -> None:
        images, texts = mine.encode_image(pixels[:few]), mine.encode_text(tokens[:few])
        torch.autograd.backward(images.sum() + texts.sum())

    operations = operations_of(both_ways) / few * options.batch
    mine.zero_grad(set_to_none=True)
    rival: Any = torch.compile(theirs.to(memory_format=torch.channels_last)) if compiled else theirs
    steps = {
        f"training step of {name}, ours": our_step(mine, pixels, tokens, compiled),
        f"training step of {name}, {FASTEST if compiled else BF16}": their_step(
            rival, pixels, tokens, torch.autocast(device, torch.bfloat16)
        ),
    }
    seconds = alternate(steps, options.rounds, waiting(options.device))
    return [Line(task, options.batch, taken, operations) for task, taken in seconds.items()]


def timed(task: str, count: int, work: Callable[[], object], options: argparse.Namespace) -> Line:
    """Returns the seconds of some rounds after one that counts the operations."""
    operations = operations_of(work)
    (seconds,) = alternate({task: work}, options.rounds, waiting(options.device)).values()
    return Line(task, count, seconds, operations)


def table(lines: list[Line], peak: float) -> str:
    """Returns the lines as a Markdown table."""
    rows = ["| task | images/s | spread | share of the matrix rate |", "|---|---|---|---|"]
    for line in lines:
        rates = [line.count / taken for taken in line.seconds]
        share = line.operations / statistics.median(line.seconds) / peak
        spread = f"{shown(min(rates))} to {shown(max(rates))}"
        rows.append(f"| {line.task} | **{shown(statistics.median(rates))}** | {spread} | {share:.0%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
