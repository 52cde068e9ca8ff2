"""How fast pairs are mined and trained on, from a folder and from tars, and what large datasets would take.

    python benchmarks/scale.py --write docs/scaling.md

Generated images, random weights. Rates are per second of processor time of one thread, which on an idle core
is elapsed time: they hold on a machine that others use as well. What two processes gain over one is elapsed
time too, and is only told where the machine has nothing else to do. What CC3M, CC12M and LAION-400M take is
worked out from the rate of models of the published sizes (RN50 as the teacher, a C4 proposal network).
`--device cuda` measures those, and the training, on a GPU: one short run of some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import command, machine, put, shown, versions

from clip_base.data.loader import Loader
from clip_base.jobs.cli import main_regionclip
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.tokenizer import Tokenizer
from clip_base.synthetic.scenes import ScenesConfig, generate
from clip_base.weights.native import save_clip
from regionclip.data.pairs import pair_reader, write_index
from regionclip.mining.miner import MineConfig, Miner
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import save_network
from regionclip.structures.transforms import ResizeConfig, TrainingResizeConfig
from regionclip.training.mined import MinedSamples
from regionclip.training.samples import RegionDataset

SMALL = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
DATASETS = {"CC3M": 3.3e6, "CC12M": 12.4e6, "LAION-400M": 400e6}  # pairs
BYTES_PER_REGION, REGIONS = 51, 100  # of Parquet, measured on COCO's captions; regions kept per image
BYTES_PER_IMAGE = 30_000  # of a JPEG of 256 pixels in img2dataset's tars, and its text
Rate = tuple[float, float]  # images per second of processor time, and per second that passed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=400, help="small images, of 128 pixels")
    parser.add_argument("--real", type=int, default=4, help="images of 640 pixels for models of full size")
    parser.add_argument("--short", type=int, default=800, help="short side for models of full size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of models of full size")
    parser.add_argument("--write", type=Path, help="Markdown page whose section takes the tables")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        rows, real = measure(Path(name), options, busy=load > 0.5)
    facts = f"Machine: {machine(1)}; {load:.0f} other processes ran beside it.\n"
    facts += f"Versions: {versions('torch', 'pyarrow')}.\n"
    text = f"{facts}\n    {command()}\n\n" + "\n".join(rows) + "\n\n" + worked_out(*real, options.device)
    print(text)
    if options.write:
        put(options.write, "scale" if options.device == "cpu" else "scale cuda", text)


def measure(folder: Path, options: argparse.Namespace, busy: bool) -> tuple[list[str], Rate]:
    """Returns the rows of the table of measurements, and the rate of mining with models of full size."""
    world(folder, "small", options.images, 128)
    world(folder, "large", max(options.real, 4), 640)
    torch.manual_seed(0)
    embed = zoo.config("RN50").embed_dim
    save_clip(CLIP(CLIPConfig(embed, SMALL, TextConfig(32, 1, 1, 77))), folder / "small.safetensors")
    save_clip(CLIP(zoo.config("RN50")), folder / "RN50.safetensors")
    visual = zoo.config("RN50").vision
    save_network(ProposalNetwork(ProposalNetworkConfig(vision=visual)), folder / "rpn.safetensors")
    from_folder, from_tars = (mining_rates(folder, kind, options.rounds) for kind in ("folder", "tars"))
    ratio = median(a / b for a, b in zip((r[0] for r in from_tars), (r[0] for r in from_folder), strict=True))
    one, two = (workers_rate(folder, workers) for workers in (1, 2))
    loader, training = loader_rate(folder, options), training_rate(folder, options)
    real = real_rate(folder, options)
    together = f"{two[1] / one[1]:.2f} times as fast" if not busy else "not told: the machine was in use"
    times, on = f"{loader[0] / training[0]:.0f} times what training takes", f"on {options.device}"
    batches = f"loader of region pretraining at {options.short}"
    rows = [
        "| measured | rate | |",
        "|---|---|---|",
        f"| mining small images from a folder | {per_core(from_folder)} | |",
        f"| mining them from tars | {per_core(from_tars)} | {ratio:.2f} times the folder's |",
        f"| `mine workers=1`, start included | {shown(one[0])} images/s per core | |",
        f"| `mine workers=2` | {shown(two[0])} images/s per core | {together} |",
        f"| {batches} | {shown(loader[0])} images/s per core | {times} |",
        f"| region pretraining of RN50 {on}, loader included | {said(training, options)} | |",
        f"| mining with RN50 and C4 at {options.short} {on} | {said(real, options)} | |",
    ]
    return rows, real


def world(folder: Path, name: str, images: int, size: int) -> None:
    """Generates the same scenes as a folder and as tars, and their pool of concepts."""
    scenes: dict[str, Any] = {"images": images, "val_images": 2, "size": size, "workers": 1, "seed": 1}
    generate(ScenesConfig(out=str(folder / name / "folder"), **scenes))
    tars = ScenesConfig(
        out=str(folder / name / "tars"), format="webdataset", tar_images=max(images // 8, 2), **scenes
    )
    generate(tars)
    captions = folder / name / "folder" / "captions_train.json"
    run("concepts", f"captions={captions}", "min_count=1", f"out={folder / name / 'concepts.jsonl'}")


def run(*words: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = main_regionclip(list(words))
    if code:
        raise SystemExit(f"regionclip {words[0]} ended with {code}: {told.getvalue()[-500:]}")


def pairs_of(folder: Path, kind: str) -> dict[str, str]:
    if kind == "tars":
        return {"images": f"{folder}/tars/train-*.tar"}
    return {
        "images": str(folder / "folder" / "images"),
        "captions": str(folder / "folder" / "captions_train.json"),
    }


def small_config(folder: Path, kind: str, out: Path) -> MineConfig:
    pairs = pairs_of(folder / "small", kind)
    return MineConfig(
        images=pairs["images"],
        captions=pairs.get("captions", ""),
        weights=str(folder / "small.safetensors"),
        concepts=str(folder / "small" / "concepts.jsonl"),
        out=str(out),
        proposer={"name": "grid"},
        matcher={"name": "caption", "min_probability": 0.0},
        teacher="roi_align",
        resize=ResizeConfig(short=[128], long=128),
        precision="fp32",
        shard_images=50,
    )


def mining_rates(folder: Path, kind: str, rounds: int) -> list[Rate]:
    """Returns the rates of mining small images, without what happens once at the start."""
    config = small_config(folder, kind, folder / f"mined-{kind}")
    mine_job(config)
    spec, index = config.source_options(), folder / f"{kind}.db"
    if kind == "folder":
        write_index(spec, index)
    miner = Miner(config, index)
    rates = []
    for _ in range(rounds):
        for shard in Path(config.out).rglob("*.parquet"):
            shard.unlink()
        units, seen = pair_reader(spec, index, config.shard_images).units(), list[int]()

        def work(units: Any = units, seen: list[int] = seen) -> None:
            for unit in units:
                miner(unit, lambda number, _: seen.append(number))

        rates.append(timed(work, functools.partial(sum, seen)))
    return rates


def mine_job(config: MineConfig) -> None:
    words = [f"images={config.images}", f"weights={config.weights}", f"concepts={config.concepts}"]
    words += [f"captions={config.captions}"] if config.captions else []
    options = ["proposer.name=grid", "matcher.name=caption", "matcher.min_probability=0", "teacher=roi_align"]
    sizes = ["resize.short=[128]", "resize.long=128", "precision=fp32", "shard_images=50"]
    run("mine", *words, *options, *sizes, f"out={config.out}")


def workers_rate(folder: Path, workers: int) -> Rate:
    """Returns the rate of the whole job from tars in processes of its own, the start included."""
    config = small_config(folder, "tars", folder / f"workers-{workers}")
    options = ["proposer.name=grid", "matcher.name=caption", "matcher.min_probability=0", "teacher=roi_align"]
    options += ["resize.short=[128]", "resize.long=128", "precision=fp32", f"workers={workers}"]
    words = [f"images={config.images}", f"weights={config.weights}", f"concepts={config.concepts}"]
    code = (
        "import sys; from clip_base.jobs.cli import main_regionclip; sys.exit(main_regionclip(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, "mine", *words, *options, f"out={config.out}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(call, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    passed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    images = len(list((folder / "small" / "folder" / "images" / "train").iterdir()))
    return images / used, images / passed


def large_words(folder: Path, options: argparse.Namespace) -> list[str]:
    pairs = [f"{key}={value}" for key, value in pairs_of(folder / "large", "tars").items()]
    sizes = [f"resize.short=[{options.short}]", "resize.long=1333", f"device={options.device}"]
    return [*pairs, f"concepts={folder / 'large' / 'concepts.jsonl'}", *sizes]


def real_rate(folder: Path, options: argparse.Namespace) -> Rate:
    """Returns the rate of mining with models of full size, without what happens once at the start."""
    network = [f"proposer.weights={folder / 'rpn.safetensors'}", "proposer.limit=300"]
    words = [*large_words(folder, options), f"weights={folder / 'RN50.safetensors'}", *network]
    words += ["teacher=roi_align", "batch_size=4", "matcher.min_phrase=0", "matcher.min_probability=0"]
    found: dict[str, Rate] = {}
    call = Miner.__call__

    def measured(self: Miner, unit: Any, report: Any) -> int:
        images = 0

        def count(number: int, note: str) -> None:
            nonlocal images
            images += number
            report(number, note)

        regions: list[int] = []
        rate = timed(lambda: regions.append(call(self, unit, count)), lambda: images)
        found[unit.name] = rate
        return regions[0]

    Miner.__call__ = measured  # type: ignore[method-assign]
    try:
        run("mine", *words, f"out={folder / 'mined-real'}")
    finally:
        Miner.__call__ = call  # type: ignore[method-assign]
    return found[sorted(found)[-1]]  # the first one warms up


def training_words(folder: Path, options: argparse.Namespace, steps: int) -> list[str]:
    sizes = [f"resize.short=[{options.short}]", "resize.long=1333", f"train.device={options.device}"]
    train = [f"train.steps={steps}", "train.batch_size=2", "train.log_every=1", "max_regions=20"]
    weights = f"weights={folder / 'RN50.safetensors'}"
    return [f"mined={folder / 'mined-large'}", weights, *sizes, *train, f"out={folder / f'trained-{steps}'}"]


def training_rate(folder: Path, options: argparse.Namespace) -> Rate:
    """Returns what two further steps of region pretraining take, the loader included."""
    steps = {}
    for count in (1, 3):
        words = training_words(folder, options, count)
        steps[count] = timed(functools.partial(run, "pretrain", *words), lambda: 1)
    seconds = [1 / steps[3][kind] - 1 / steps[1][kind] for kind in (0, 1)]
    return 4 / seconds[0], 4 / seconds[1]


def loader_rate(folder: Path, options: argparse.Namespace) -> Rate:
    """Returns how fast batches for region pretraining are made, from tars."""
    words = [*large_words(folder, options), f"weights={folder / 'small.safetensors'}", "proposer.name=grid"]
    words += ["matcher.name=caption", "matcher.min_probability=0", "teacher=roi_align"]
    run("mine", *[word for word in words if not word.startswith("device=")], f"out={folder / 'mined-large'}")
    samples = MinedSamples(folder / "mined-large", folder / "samples")
    resize = TrainingResizeConfig(short=[options.short], long=1333)
    data = RegionDataset(samples, resize, 20, Tokenizer(77))
    batches: Any = iter(Loader(data, data.collate, 2, seed=0))
    next(batches)
    return timed(lambda: [next(batches) for _ in range(8)], lambda: 16)


def timed(work: Callable[[], object], count: Callable[[], int]) -> Rate:
    used, passed = time.process_time(), time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    used, passed = time.process_time() - used, time.perf_counter() - passed
    return count() / used, count() / passed


def median(values: Any) -> float:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2])


def per_core(rates: list[Rate]) -> str:
    used = sorted(rate for rate, _ in rates)
    return f"{shown(median(used))} images/s per core ({shown(used[0])} to {shown(used[-1])})"


def said(rate: Rate, options: argparse.Namespace) -> str:
    return f"{shown(rate[0])} images/s per core" if options.device == "cpu" else f"{shown(rate[1])} images/s"


def worked_out(used: float, passed: float, device: str) -> str:
    """Returns the table of what large datasets would take at a rate of mining."""
    what, rate = ("core-hours", used) if device == "cpu" else ("GPU-hours", passed)
    lines = [f"| worked out | {what} | tars that are read | Parquet that is written |", "|---|---|---|---|"]
    for name, pairs in DATASETS.items():
        read, written = pairs * BYTES_PER_IMAGE / 1e9, pairs * REGIONS * BYTES_PER_REGION / 1e9
        lines.append(f"| {name} | {pairs / rate / 3600:,.0f} | {read:,.0f} GB | {written:,.0f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
