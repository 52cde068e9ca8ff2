"""Peak memory of mining, its report, region pretraining and export, over the number of images.

    python benchmarks/memory.py --out runs/memory --images 1000 10000 100000

Images are generated once (500 scenes of 48 pixels) and repeated under other names, as files and in tars of
1,000. The models are tiny: what is measured is what grows with the data. Each job is a process of its own;
its peak is what the operating system says of it (`ru_maxrss`, in which every page counts that was mapped).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import nn

from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.storage.files import read_json, write_json
from clip_base.storage.tars import add_member
from clip_base.synthetic.scenes import ScenesConfig, generate
from clip_base.weights.native import save_clip
from regionclip.mining.shards import images_path, write_shard

PER_TAR = 1000
DRAWN = 500
SIZES = ["resize.short=[48]", "resize.long=48"]


def main() -> None:
    """Measures, prints a table in Markdown and writes `memory.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data and results")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000], help="numbers of images")
    parser.add_argument("--kinds", nargs="+", default=["tars", "folder"], help="tars, folder")
    parser.add_argument(
        "--mine", type=int, default=10_000, help="of more images, the shards of the first 1,000 are repeated"
    )
    options = parser.parse_args()
    drawn = options.out / "drawn"
    generate(ScenesConfig(out=str(drawn), images=DRAWN, size=48, object_min=0.3, workers=1))
    clip = options.out / "clip.safetensors"
    if not clip.exists():
        torch.manual_seed(0)
        vision = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=32)
        model = CLIP(CLIPConfig(32, vision, TextConfig(width=32, heads=1, layers=1, context_length=32)))
        nn.init.zeros_(model.logit_scale)
        save_clip(model, clip)
    pool = options.out / "concepts.jsonl"
    if not pool.exists():
        run("concepts", f"captions={drawn}/captions_train.json", "min_count=5", f"out={pool}")
    found: dict[str, dict[str, float]] = {}
    for kind in options.kinds:
        for count in options.images:
            folder = options.out / f"{kind}-{count}"
            given = as_tars(drawn, folder, count) if kind == "tars" else as_folder(drawn, folder, count)
            what = f"{count:,} images in {'a folder' if kind == 'folder' else kind}"
            repeated = count > options.mine
            if repeated:
                repeat_mined(options.out / f"{kind}-{PER_TAR}" / "mined", folder, count)
            found[what] = measure(folder, given, clip, pool, repeated)
            write_json(options.out / "memory.json", found, indent=2)
    jobs = ["mine", "report", "pretrain", "export"]
    print("| |", " | ".join(jobs), "|")
    print("|---|", "|".join("---" for _ in jobs), "|")
    for what, peaks in found.items():
        cells = (f"{peaks[job]:.0f} MB" if job in peaks else "not measured" for job in jobs)
        print(f"| {what} |", " | ".join(cells), "|")


def scenes(drawn: Path, count: int) -> list[tuple[str, Path, list[str]]]:
    """Returns (name, file, captions) of so many images."""
    content = read_json(drawn / "captions_train.json")
    texts: dict[int, list[str]] = {}
    for entry in content["annotations"]:
        texts.setdefault(entry["image_id"], []).append(entry["caption"])
    files = [(drawn / "images" / entry["file_name"], texts[entry["id"]]) for entry in content["images"]]
    return [(f"{number:09d}", *files[number % len(files)]) for number in range(count)]


def as_folder(drawn: Path, folder: Path, count: int) -> list[str]:
    """Makes a folder of links and its captions; returns mine's options."""
    images, file = folder / "images", folder / "captions.json"
    if not file.exists():
        images.mkdir(parents=True, exist_ok=True)
        listed, annotations = [], []
        for number, (name, source, captions) in enumerate(scenes(drawn, count), 1):
            link = images / f"{name}.jpg"
            if not link.exists():
                shutil.copyfile(source, link)
            listed.append({"id": number, "file_name": link.name, "height": 48, "width": 48})
            annotations += [{"image_id": number, "caption": text} for text in captions]
        write_json(file, {"images": listed, "annotations": annotations})
    return [f"images={images}", f"captions={file}"]


def as_tars(drawn: Path, folder: Path, count: int) -> list[str]:
    """Makes tars; returns mine's options."""
    folder.mkdir(parents=True, exist_ok=True)
    every = scenes(drawn, count)
    for start in range(0, count, PER_TAR):
        path = folder / f"{start // PER_TAR:05d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for name, source, captions in every[start : start + PER_TAR]:
                for ending, data in (("jpg", source.read_bytes()), ("txt", "\n".join(captions).encode())):
                    add_member(tar, f"{name}.{ending}", data)
        path.with_suffix(".part").rename(path)
    return [f"images={folder}/*.tar"]


def repeat_mined(one: Path, folder: Path, count: int) -> None:
    """Makes the mined folder of more images from that of PER_TAR images: all tars have the same layout."""
    manifest = read_json(one / "manifest.json")
    name, mined = manifest["shards"][0], folder / "mined"
    regions, images = pq.read_table(one / name), pq.read_table(images_path(one / name))
    parts = range(count // PER_TAR)
    for part in parts:
        path = mined / f"{part:05d}.parquet"
        if not path.exists():
            write_shard(path, [renamed(regions, part, folder)], [renamed(images, part, folder)])
    sizes = {str((folder / f"{part:05d}.tar").absolute()): 0 for part in parts} if manifest["tars"] else {}
    for tar in sizes:
        sizes[tar] = Path(tar).stat().st_size
    totals = {key: manifest[key] * len(parts) for key in ("images", "regions", "skipped")}
    lists = {"shards": [f"{part:05d}.parquet" for part in parts], "samples": manifest["samples"] * len(parts)}
    write_json(mined / "manifest.json", {**manifest, **totals, **lists, "tars": sizes})
    for file in ("vocabulary.safetensors", "skipped.jsonl"):
        shutil.copyfile(one / file, mined / file)


def renamed(table: pa.Table, part: int, folder: Path) -> pa.Table:
    """Returns rows of the first PER_TAR images as those of images further on."""
    ids = pc.add(table["image_id"], part * PER_TAR)
    names = [f"{int(name[:9]) + part * PER_TAR:09d}.jpg" for name in table["file_name"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("image_id"), "image_id", ids)
    table = table.set_column(table.schema.get_field_index("file_name"), "file_name", pa.array(names))
    if table["tar"].null_count == 0:
        tars = pa.array([str((folder / f"{part:05d}.tar").absolute())] * table.num_rows)
        table = table.set_column(table.schema.get_field_index("tar"), "tar", tars)
    return table


def measure(
    folder: Path, given: list[str], clip: Path, pool: Path, repeated: bool = False
) -> dict[str, float]:
    """Returns the peak memory of each job, in MB; without mining's for a folder made by repetition."""
    mined = f"mined={folder / 'mined'}"
    images = given[0]
    options = [*given, f"weights={clip}", f"concepts={pool}", f"out={folder / 'mined'}", "precision=fp32"]
    options += ["proposer.name=grid", "proposer.sizes=[0.5,1.0]", "matcher.name=caption", *SIZES]
    options += ["matcher.min_probability=0", "shard_images=1000", "batch_size=32"]
    start = [mined, images, f"weights={clip}", f"out={folder / 'pretrained'}", *SIZES]
    training = ["train.steps=50", "train.batch_size=32", "train.precision=fp32"]
    jobs = {
        **({} if repeated else {"mine": options}),
        "report": [mined, images, f"out={folder / 'report'}"],
        "pretrain": [*start, *training],
        "export": [mined, f"out={folder / 'instances.json'}", "classes=[]"],
    }
    peaks = folder / "peaks.json"
    found: dict[str, float] = read_json(peaks) if peaks.exists() else {}
    for job, call in jobs.items():
        if job not in found:
            found[job] = run(job, *call)
            write_json(peaks, found)
    return found


def run(*call: str) -> float:
    """Runs a command of regionclip and returns its peak memory in MB."""
    program = (
        "import sys\nfrom clip_base.jobs.cli import main_regionclip\nsys.exit(main_regionclip(sys.argv[1:]))"
    )
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", program, *call], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(call)} ended with {child.returncode}")
    peak = usage.ru_maxrss / 1024
    print(
        json.dumps({"job": call[0], "seconds": round(time.monotonic() - began), "MB": round(peak)}),
        flush=True,
    )
    return peak


if __name__ == "__main__":
    main()
