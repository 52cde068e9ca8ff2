"""Region embeddings here and by a loop over crops with open_clip_torch, and where mining's time goes.

    python benchmarks/mining.py --photos FOLDER --proposals FILE --captions FILE --write docs/benchmarks.md

Both sides begin with the same images on disk and the same boxes, with the same random weights. The loop
is what one writes who has open_clip: open the image, crop each box, preprocess it, encode the crops of a
image together. "default" is open_clip without options (float32); "bf16" is its `--precision
amp_bf16`. Ours runs with `precision=auto`, as mining does.
"""

# N regions of an image, D embedding size
from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import io
import itertools
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from rounds import Row, alternate, command, compare, machine, markdown, put, versions
from torch import Tensor, nn

from clip_base.images.decode import decode
from clip_base.models import zoo
from clip_base.models.clip import CLIP, from_openai_names
from clip_base.runtime.precision import autocast, computes_in_bf16
from clip_base.weights.native import save_clip
from regionclip.concepts.build import ConceptsConfig, build
from regionclip.mining.mine import mine
from regionclip.mining.miner import MineConfig
from regionclip.models.region_encoder import RegionEncoder, square_rois
from regionclip.structures.boxes import xywh_to_xyxy
from regionclip.structures.regions import Regions
from regionclip.structures.transforms import ResizeConfig, resize_shortest_edge, to_batch

DEFAULT, BF16 = "open_clip loop default", "open_clip loop bf16"
MODEL, SIDE = "RN50", 224
HEADS = {"": "per_region", " shared": "shared"}  # how a task names a region head
JOB_HEADS = PER_REGION, SHARED = "per_region", "shared"  # of the whole job
# Stage -> the functions that do it, as (end of the file's path, name).
STAGES = {
    "starting: weights, concepts, list of images": [
        ("weights/load.py", "load_clip"),
        ("concepts/vocabulary.py", "embed"),
        ("concepts/pool.py", "read_concepts"),
        ("data/caption_index.py", "write_caption_index"),
    ],
    "phrases of the captions": [("mining/miner.py", "captioned")],
    "proposals": [("proposals/precomputed.py", "__call__")],
    "teacher": [("models/region_encoder.py", "__call__")],
    "matching": [("matchers/caption.py", "__call__")],
    "writing": [("parquet/core.py", "write_table"), ("dataclasses.py", "asdict")],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--proposals", type=Path, required=True, help="their boxes, in COCO's results format")
    parser.add_argument("--captions", type=Path, required=True, help="their captions, in COCO's format")
    parser.add_argument("--count", type=int, default=4, help="photographs of the comparison of teachers")
    parser.add_argument("--boxes", type=int, default=100, help="boxes per image, the best scored ones")
    parser.add_argument("--short", type=int, nargs="+", default=[480, 800], help="short sides for roi_align")
    parser.add_argument("--job-count", type=int, default=100, help="photographs of the whole job")
    parser.add_argument("--job-short", type=int, default=480, help="short side of the whole job")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=["teachers", "job"], default=["teachers", "job"])
    parser.add_argument("--quick", action="store_true", help="one round on little input: does it run?")
    parser.add_argument("--write", type=Path, help="Markdown page whose mining section takes the tables")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds, options.count, options.boxes, options.job_count = 1, 1, 40, 4
    parts = []
    if "teachers" in options.only:
        parts.append(markdown(teachers(options)))
    if "job" in options.only:
        parts.append(job(options))
    print(text := "\n\n".join([described(options), *parts]))
    if options.write:
        put(options.write, "mining", text)


def described(options: argparse.Namespace) -> str:
    """Returns the machine, the versions and the command."""
    used = versions("torch", "torchvision", "open_clip_torch", "opencv-python-headless", "pillow", "spacy")
    rounds = f"Median of {options.rounds} alternating round{'s' * (options.rounds > 1)}"
    facts = f"Machine: {machine(options.threads)}.\nVersions: {used}.\n{rounds}; {MODEL}, random weights."
    return f"{facts}\n\n    {command()}"


def pair_of_models() -> tuple[CLIP, nn.Module]:
    """Returns ours and open_clip's with the same random weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(MODEL, force_quick_gelu=True).eval()
    ours = CLIP(zoo.config(MODEL))
    ours.load_state_dict(from_openai_names(theirs.state_dict()))
    return ours.to(memory_format=torch.channels_last).eval(), theirs


def photographs(options: argparse.Namespace) -> list[tuple[Path, Tensor]]:
    """Returns the first images that have proposals, each with its [N, 4] boxes, the best scored ones."""
    scored: dict[int, list[tuple[float, list[float]]]] = {}
    for entry in json.loads(options.proposals.read_text()):
        scored.setdefault(entry["image_id"], []).append((entry["score"], entry["bbox"]))
    found = []
    for entry in sorted(json.loads(options.captions.read_text())["images"], key=lambda entry: entry["id"]):
        path = options.photos / entry["file_name"]
        if entry["id"] in scored and path.exists():
            best = sorted(scored[entry["id"]], key=lambda pair: -pair[0])[: options.boxes]
            found.append((path, xywh_to_xyxy(torch.tensor([box for _, box in best]))))
        if len(found) == options.count:
            return found
    raise SystemExit(f"{options.photos} and {options.proposals} share only {len(found)} photographs")


def teachers(options: argparse.Namespace) -> list[Row]:
    """Compares both teachers of ResNets with the loop over crops."""
    ours, theirs = pair_of_models()
    photos = photographs(options)
    regions = sum(len(boxes) for _, boxes in photos)
    rivals: dict[str, contextlib.AbstractContextManager[object]] = {DEFAULT: contextlib.nullcontext()}
    if computes_in_bf16(torch.device("cpu")):
        rivals[BF16] = torch.autocast("cpu", torch.bfloat16)
    works = {rival: functools.partial(their_loop, theirs, photos, each) for rival, each in rivals.items()}
    rows = []
    encoder = RegionEncoder(ours.visual, "crop")
    crops = functools.partial(our_regions, encoder, photos, min(options.short))
    tasks: dict[str, Callable[[], Any]] = {"regions by `crop`": crops}
    for short in options.short:
        for label, head in HEADS.items():
            mapped = RegionEncoder(ours.visual, "roi_align", region_head=head)
            task = f"regions by `roi_align`{label}, short side {short}"
            tasks[task] = functools.partial(our_regions, mapped, photos, short)
    # All in the same rounds, so that the loop is timed once.
    seconds = alternate(tasks | works, options.rounds)
    note = f"similarity of embeddings {similarity(encoder, theirs, photos):.4f}"
    for task in tasks:
        own = {"ours": seconds[task]} | {rival: seconds[rival] for rival in works}
        if " shared" in task:
            own["ours, a head per region"] = seconds[task.replace(" shared", "")]
        title = f"{task}; {regions / len(photos):.0f} boxes per image"
        rows += compare(title, "regions/s", regions, own, note if task.endswith("`crop`") else "")
    return rows


@torch.no_grad()
def our_regions(encoder: RegionEncoder, photos: list[tuple[Path, Tensor]], short: int) -> list[Tensor]:
    """Returns [N, D] of each image, as mining makes them: from the file on."""
    found = []
    for path, boxes in photos:
        pixels, frame = resize_shortest_edge(decode(path), short, 10**6)
        regions = Regions(frame.apply_boxes(boxes), torch.zeros(len(boxes), dtype=torch.int64))
        with autocast("auto", torch.device("cpu")):
            found.append(encoder(to_batch([pixels], multiple=32), regions))
    return found


def their_loop(model: Any, photos: list[tuple[Path, Tensor]], context: Any) -> list[Tensor]:
    """Returns [N, D] of each image: every square around a box is cropped, preprocessed and encoded."""
    preprocess = open_clip.image_transform(SIDE, is_train=False)
    found = []
    for path, boxes in photos:
        image = Image.open(path).convert("RGB")
        crops = torch.stack([preprocess(image.crop(square)) for square in squares(boxes)])
        with torch.no_grad(), context:
            features = [model.encode_image(part, normalize=True) for part in torch.split(crops, 32)]
        found.append(torch.cat(features).float())
    return found


def squares(boxes: Tensor) -> list[tuple[float, float, float, float]]:
    """Returns what the teacher `crop` looks at, in pixels of the image."""
    regions = Regions(boxes, torch.zeros(len(boxes), dtype=torch.int64))
    corners = square_rois(regions, 1.2)[:, 1:].round().tolist()
    return [(left, top, right, bottom) for left, top, right, bottom in corners]


@torch.no_grad()
def similarity(encoder: RegionEncoder, model: Any, photos: list[tuple[Path, Tensor]]) -> float:
    """Returns the mean cosine of our embeddings and theirs of the same crops in float32, less their mean.

    Only squares within the image count: what lies outside is black there and gray here.
    """
    path, boxes = photos[0]
    pixels = decode(path)
    corners = torch.tensor(squares(boxes))
    inside = (corners >= 0).all(1) & (corners[:, 2] <= pixels.shape[1]) & (corners[:, 3] <= pixels.shape[0])
    picked = boxes[inside][:16]
    theirs = their_loop(model, [(path, picked)], contextlib.nullcontext())[0]
    regions = Regions(picked, torch.zeros(len(picked), dtype=torch.int64))
    ours = encoder(to_batch([pixels], multiple=32), regions)
    return float(nn.functional.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0)).mean())


def job(options: argparse.Namespace) -> str:
    """Returns how fast `regionclip mine` is with either region head, and a table of its stages."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.manual_seed(0)
        save_clip(CLIP(zoo.config(MODEL)), out / "clip.safetensors")
        captions = json.loads(options.captions.read_text())
        captions["images"] = sorted(captions["images"], key=lambda entry: entry["id"])[: options.job_count]
        kept = {entry["id"] for entry in captions["images"]}
        captions["annotations"] = [entry for entry in captions["annotations"] if entry["image_id"] in kept]
        (out / "captions.json").write_text(json.dumps(captions))
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            build(
                ConceptsConfig(
                    captions=str(out / "captions.json"),
                    out=str(out / "concepts.jsonl"),
                    min_count=2,
                    classes=["coco65"],
                )
            )
            runs = itertools.count()

            def mined(head: str) -> None:
                mine(mining(options, out, head, next(runs)))

            works = {head: functools.partial(mined, head) for head in JOB_HEADS}
            rates = alternate(works, options.rounds, warm_up=False)
            stages = {head: profiled(mining(options, out, head, next(runs))) for head in JOB_HEADS}
        return job_table(options, rates, stages)


def mining(options: argparse.Namespace, out: Path, head: str, run: int) -> MineConfig:
    return MineConfig(
        images=str(options.photos),
        captions=str(out / "captions.json"),
        weights=str(out / "clip.safetensors"),
        concepts=str(out / "concepts.jsonl"),
        out=str(out / f"{head}-{run}"),
        proposer={"name": "precomputed", "file": str(options.proposals), "limit": options.boxes},
        matcher={"name": "caption"},
        teacher="roi_align",
        region_head=head,
        resize=ResizeConfig(short=[options.job_short], long=1333),
        batch_size=4,
    )


def profiled(config: MineConfig) -> dict[str, float]:
    """Returns the seconds that each stage of a mining run takes while it is profiled."""
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.runcall(mine, config)
    seconds = time.perf_counter() - start
    rows: Any = vars(pstats.Stats(profile))["stats"]
    cumulative = {(file, name): row[3] for (file, _, name), row in rows.items()}
    stages = {
        stage: sum(_seconds(cumulative, end, name) for end, name in functions)
        for stage, functions in STAGES.items()
    }
    return stages | {"everything else": seconds - sum(stages.values())}


def _seconds(cumulative: dict[tuple[str, str], float], end: str, name: str) -> float:
    """Returns the seconds within a function; one that never ran has another name by now."""
    found = [
        value for (file, function), value in cumulative.items() if file.endswith(end) and function == name
    ]
    if not found:
        raise SystemExit(f"mining called no {name} of {end}: bring STAGES up to date")
    return sum(found)


def job_table(
    options: argparse.Namespace, rates: dict[str, list[float]], stages: dict[str, dict[str, float]]
) -> str:
    """Returns the rates of the whole job with both region heads, and where a profiled run spends its time.

    Args:
        options: the command's.
        rates: seconds of each round by region head.
        stages: seconds by region head and stage.
    """
    ours = {("ours" if head == SHARED else head): seconds for head, seconds in rates.items()}
    task = f"`regionclip mine teacher=roi_align`, short side {options.job_short}, `region_head=shared`"
    note = f"{options.job_count} images, up to {options.boxes} boxes each, starting included"
    table = markdown(compare(task, "images/s", options.job_count, ours, note))
    totals = {head: sum(seconds.values()) for head, seconds in stages.items()}
    lines = [f"| stage, one profiled run | {' | '.join(JOB_HEADS)} |", f"|{'---|' * (len(JOB_HEADS) + 1)}"]
    for stage in next(iter(stages.values())):
        cells = (
            f"{stages[head][stage]:.2f} s, {stages[head][stage] / totals[head]:.0%}" for head in JOB_HEADS
        )
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n\n".join([table, "\n".join(lines)])


if __name__ == "__main__":
    main()
