"""CLIP here and in open_clip_torch, side by side: same weights, batch and threads, alternating rounds.

    python benchmarks/clip.py --photos FOLDER --captions FILE --write docs/benchmarks.md

"default" is open_clip without options (float32); "bf16" is its `--precision amp_bf16`. Ours runs with
`precision=auto`, as the jobs do. `--device cuda` compares with open_clip under bf16, channels-last and
`torch.compile`, its own fastest options, and adds the share of the card's measured matrix rate.
"""

# B images in a batch, R resolution, T token positions, D embedding size
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from rates import matrix_rate, operations_of, waiting
from rounds import Row, Work, alternate, command, compare, machine, markdown, put, versions
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch, ImageTextBatch
from clip_base.data.sources import Pair
from clip_base.images.decode import decode, middle_square, normalize, to_tensor
from clip_base.models import zoo
from clip_base.models.clip import CLIP, from_openai_names
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.precision import autocast, computes_in_bf16
from clip_base.training.loop import TrainConfig, make_optimizer
from clip_base.training.losses import Chunked, ChunkedConfig, PairEmbeddings, contrastive
from clip_base.training.pretrain import CaptionedImages
from clip_base.training.tasks import ContrastiveTask

DEFAULT, BF16, FASTEST = (
    "open_clip default",
    "open_clip bf16",
    "open_clip bf16, channels-last, compiled",
)
SIDE = 224
BATCHES = 4  # of one round of encoding


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["RN50", "ViT-B/32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--photos", type=Path, help="folder of JPEG images, for preprocessing")
    parser.add_argument("--captions", type=Path, help="text file with a caption a line, for the tokenizer")
    parser.add_argument("--loss-batch", type=int, default=8192, help="pairs in the comparison of loss memory")
    parser.add_argument("--only", nargs="+", choices=["towers", "preprocessing", "tokenizer", "loss"])
    parser.add_argument("--quick", action="store_true", help="one round each on little input: does it run?")
    parser.add_argument("--write", type=Path, help="Markdown page whose clip section takes the table")
    parser.add_argument("--loss-peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.loss_peak:
        print(loss_peak(options.loss_peak, options.loss_batch))
        return
    if options.quick:
        options.rounds, options.loss_batch = 1, min(options.loss_batch, 2048)
    parts = options.only or ["towers", "preprocessing", "tokenizer", "loss"]
    rows: list[Row] = []
    # First, while this process is small: the plain loss takes most of a machine's memory.
    memory = loss_memory(options) if "loss" in parts else []
    if "towers" in parts:
        for name in options.models:
            rows += towers(name, options)
    if "preprocessing" in parts and options.photos:
        rows += preprocessing(options)
    if "tokenizer" in parts and options.captions:
        rows += tokenizing(options)
    print(markdown(rows + memory))
    for section, measured in (("clip", rows), ("loss", memory)):
        if options.write and measured:
            put(options.write, section, described(markdown(measured), options))


def described(table: str, options: argparse.Namespace) -> str:
    """Returns the table with the machine, the versions and the command."""
    kind = machine(options.threads)
    if options.device == "cuda":
        kind = f"{torch.cuda.get_device_name()}; {kind}"
    used = versions("torch", "open_clip_torch", "opencv-python-headless", "pillow")
    rounds = f"median of {options.rounds} alternating round{'s' * (options.rounds > 1)}"
    facts = f"Machine: {kind}.\nVersions: {used}.\nBatch {options.batch}; {rounds}."
    return f"{facts}\n\n    {command()}\n\n{table}"


def pair_of_models(name: str, device: str) -> tuple[CLIP, nn.Module]:
    """Returns ours and open_clip's with the same random weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name.replace("/", "-"), force_quick_gelu=True).to(device)
    ours = CLIP(zoo.config(name))
    ours.load_state_dict(from_openai_names(theirs.state_dict()))
    return ours.to(device).to(memory_format=torch.channels_last), theirs


def towers(name: str, options: argparse.Namespace) -> list[Row]:
    """Compares a training step, image encoding and text encoding."""
    device, rows = options.device, []
    wait = waiting(device)
    pixels = torch.randn(options.batch, 3, SIDE, SIDE, device=device)
    texts = [f"a photo of {number} things" for number in range(options.batch)]
    tokens = Tokenizer(77)(texts).to(device)
    bf16 = torch.autocast(device, torch.bfloat16)
    ours, theirs = pair_of_models(name, device)
    rivals: dict[str, Any] = {DEFAULT: contextlib.nullcontext()}
    if computes_in_bf16(torch.device(device)):
        rivals[BF16] = bf16
    fast: nn.Module | None = None
    if device == "cuda":
        plain = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        fast = cast(nn.Module, torch.compile(plain))
        rivals = {BF16: bf16, FASTEST: bf16}

    # A model for each: what one leaves behind shall not change another's work.
    steps = {"ours": our_step(copy.deepcopy(ours), pixels, tokens, device == "cuda")}
    for rival, context in rivals.items():
        model = fast if fast is not None and rival == FASTEST else copy.deepcopy(theirs)
        steps[rival] = their_step(model, pixels, tokens, context)
    seconds = alternate(steps, options.rounds, wait)
    note = matrix_share(ours, pixels, tokens, seconds["ours"]) if device == "cuda" else ""
    rows += compare(f"training step, {name}", "images/s", options.batch, seconds, note)

    ours.eval()
    theirs.eval()
    for what, mine, other, inputs in (
        ("image encoding", ours.encode_image, "encode_image", pixels),
        ("text encoding", ours.encode_text, "encode_text", tokens),
    ):
        works = {"ours": encoding(mine, inputs, autocast("auto", torch.device(device)))}
        for rival, context in rivals.items():
            model = fast.eval() if rival == FASTEST and fast is not None else theirs
            works[rival] = encoding(getattr(model, other), inputs, context)
        seconds = alternate(works, options.rounds, wait)
        note = f"largest difference in fp32 {difference(mine, getattr(theirs, other), inputs):.0e}"
        unit = "images/s" if inputs is pixels else "texts/s"
        rows += compare(f"{what}, {name}", unit, BATCHES * options.batch, seconds, note)
    return rows


def our_step(model: CLIP, pixels: Tensor, tokens: Tensor, compiled: bool) -> Callable[[], None]:
    """Returns one step as `clip_base.training.loop.fit` makes it."""
    config = TrainConfig(steps=1, batch_size=len(pixels))
    task = ContrastiveTask(model.train())
    optimizer = make_optimizer(task, config)
    forward: Any = torch.compile(task) if compiled else task
    batch = ImageTextBatch(ImageBatch.whole(pixels), tokens)

    def step() -> None:
        with autocast(config.precision, pixels.device):
            loss = torch.stack(list(forward(batch).values())).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.after_step()

    return step


def their_step(model: nn.Module, pixels: Tensor, tokens: Tensor, context: Any) -> Callable[[], None]:
    """Returns one step as open_clip's own training script makes it, with the same optimizer settings."""
    config = TrainConfig()
    model.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    chosen = {id(p) for p in plain}
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for _, p in named if id(p) not in chosen], "weight_decay": config.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps)
    criterion = open_clip.ClipLoss()

    def step() -> None:
        optimizer.zero_grad()
        with context:
            images, texts, scale = model(pixels, tokens)[:3]
            loss = criterion(images, texts, scale)
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            inner = getattr(model, "_orig_mod", model)
            inner.get_parameter("logit_scale").clamp_(0, np.log(100))

    return step


def encoding(encode: Callable[[Tensor], Tensor], inputs: Tensor, context: Any) -> Callable[[], None]:
    """Returns the work of `BATCHES` batches under one autocast, which then casts the weights once.

    Without gradients by `no_grad`, as both packages' own code does it.
    """

    def work() -> None:
        with torch.no_grad(), context:
            for _ in range(BATCHES):
                encode(inputs)

    return work


@torch.no_grad()
def difference(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Returns the largest difference of unit-length features, relative to their length."""
    return float((F.normalize(ours(inputs[:2])) - F.normalize(theirs(inputs[:2]))).abs().max())


def matrix_share(model: CLIP, pixels: Tensor, tokens: Tensor, seconds: list[float]) -> str:
    """Returns which share of the device's bf16 matrix rate, measured here, a training step reaches."""

    def both_ways() -> None:
        images, texts = model.encode_image(pixels), model.encode_text(tokens)
        torch.autograd.backward(images.sum() + texts.sum())

    operations, rate = operations_of(both_ways), matrix_rate("cuda", "bf16")
    model.zero_grad(set_to_none=True)
    share = operations / sorted(seconds)[len(seconds) // 2] / rate
    return f"{share:.0%} of the {rate / 1e12:.0f} TFLOP/s that a bf16 matrix product reaches here"


def preprocessing(options: argparse.Namespace) -> list[Row]:
    """Compares decoding, resizing and normalizing on one thread, from files that are in memory already."""
    files = sorted(options.photos.glob("*.jpg"))[: 8 if options.quick else 100]
    if not files:
        raise SystemExit(f"{options.photos} holds no .jpg files")
    torch.set_num_threads(1)
    view = open_clip.image_transform(SIDE, is_train=False)
    augmented = open_clip.image_transform(SIDE, is_train=True)
    data = CaptionedImages([Pair(file, ("",)) for file in files], Tokenizer(77), SIDE, 0.9, cache=False)

    def ours_view() -> Tensor:
        return normalize(to_tensor([middle_square(decode(file, 2 * SIDE), SIDE) for file in files]))

    def ours_training() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        items = [data.item(index, generator)[0] for index in range(len(files))]
        return normalize(to_tensor(items))

    def theirs(transform: Callable[[Image.Image], Tensor]) -> Tensor:
        return torch.stack([transform(Image.open(file)) for file in files])

    rows = []
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) * 255
    off = ((ours_view() - theirs(view)) * deviation).abs()
    note = f"pixels differ by {off.mean():.3f} of 255 on average, {off.max():.0f} at most"
    for what, ours, transform, remark in (
        ("evaluation view of an image", ours_view, view, note),
        ("training crop of an image", ours_training, augmented, ""),
    ):
        works: dict[str, Work] = {"ours": ours, DEFAULT: functools.partial(theirs, transform)}
        seconds = alternate(works, options.rounds)
        rows += compare(f"{what}, one thread", "images/s", len(files), seconds, remark)
    torch.set_num_threads(options.threads)
    return rows


def tokenizing(options: argparse.Namespace) -> list[Row]:
    texts = options.captions.read_text(encoding="utf-8").splitlines()
    texts = texts[:2000] if options.quick else texts

    def theirs() -> Tensor:
        # What it remembers of words is its own; a new one each round starts as ours does.
        ids: Tensor = open_clip.SimpleTokenizer()(texts)
        return ids

    def ours() -> Tensor:
        return Tokenizer(77)(texts, truncate=True)

    same = "the same ids" if torch.equal(ours(), theirs()) else "OTHER IDS"
    seconds = alternate({"ours": ours, DEFAULT: theirs}, options.rounds)
    return compare(
        "tokenizer without cache", "texts/s", len(texts), seconds, f"{len(texts):,} captions, {same}"
    )


def loss_memory(options: argparse.Namespace) -> list[Row]:
    """Compares the peak memory of the loss and its gradient, each in a process of its own."""

    def peak(kind: str) -> float:
        call = [sys.executable, __file__, "--loss-peak", kind, "--loss-batch", str(options.loss_batch)]
        call += ["--threads", str(options.threads)]
        return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout) / 2**20

    peaks = {kind: peak(kind) for kind in ("chunked", "plain", "open_clip")}
    task = f"peak memory of the chunked loss, {options.loss_batch:,} x 1,024"
    return [
        Row(task, label, "MiB", peaks["chunked"], peaks[kind], [peaks[kind] / peaks["chunked"]])
        for kind, label in (("plain", "our plain loss"), ("open_clip", DEFAULT))
    ]


def loss_peak(kind: str, size: int) -> int:
    """Returns by how many bytes the process grew at most over its inputs and their gradients (Linux)."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(size, 1024, generator=generator), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(50.0, requires_grad=True)
    for features in (images, texts):
        features.grad = torch.zeros_like(features)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew with what is there now
    before = peak_bytes()
    if kind == "chunked":
        loss = Chunked(ChunkedConfig())(PairEmbeddings.gathered(images, texts, None), scale)
    elif kind == "plain":
        loss = contrastive(images, texts, scale)
    else:
        loss = open_clip.ClipLoss()(images, texts, scale)
    torch.autograd.backward(loss)
    return peak_bytes() - before


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
