"""The job `features`: embeddings of the regions of many images, for search, clustering or training.

Images are described in shards, in the order of the list. A shard depends on the options and on its images
alone, so that interruptions and numbers of processes change nothing about the files.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clip_base.images.inputs import image_files
from clip_base.jobs.run import Inputs, RunFolder
from clip_base.jobs.skipped import require_usable, write_skipped
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import Progress, rate
from clip_base.runtime.workers import run
from clip_base.storage.files import existing, read_json, write_json
from clip_base.storage.hashing import text_hash
from clip_base.storage.json_stream import stream_entries
from regionclip.data.annotations import CocoDetection
from regionclip.data.file_names import FileNames
from regionclip.inference.feature_extractor import FeaturesConfig, RegionFeatureExtractor, Shard, record_path
from regionclip.mining.shards import MANIFEST, shard_path
from regionclip.proposals.precomputed import checked_proposal
from regionclip.proposals.storage import ProposalTable, writing
from regionclip.structures.boxes import xywh_to_xyxy

VERSION = 1
BOXES = ".boxes.parquet"


def features(config: FeaturesConfig) -> None:
    """Embeds the regions of many images and writes Parquet or npz files; a stopped run resumes."""
    files = [] if config.annotations else image_files(config.images)
    inputs: Inputs = {**config.inputs(), "list of images": text_hash(files)}
    folder = RunFolder(config.out, config, "region-features", inputs)
    if folder.finished() is not None:
        held = read_json(folder.path / MANIFEST, "manifest")
        print(f"{folder.path} is complete: {held['regions']} regions of {held['images']} images")
        return
    count = len(files)
    if not files:
        dataset = CocoDetection(config.annotations, config.image_folder)
        print(dataset.report())
        count = len(dataset)
    boxes = _boxes(config, files, folder.path)
    shards = [
        Shard(number, start, min(start + config.shard_images, count))
        for number, start in enumerate(range(0, count, config.shard_images))
    ]
    try:
        speed = _describe_all(config, files, boxes, shards)
    finally:
        # If it failed at once, nothing may be left that a corrected call would have to equal.
        if not any(record_path(folder.path, one.number).exists() for one in shards):
            (folder.path / BOXES).unlink(missing_ok=True)
    manifest = _finish(folder, config, shards)
    print(
        f"{folder.path}: {manifest['regions']} regions of {manifest['images']} images, "
        f"{manifest['skipped']} skipped, {speed}"
    )


def _describe_all(
    config: FeaturesConfig,
    files: Sequence[Path],
    boxes: str,
    shards: Sequence[Shard],
) -> str:
    """Describes the shards that are not there yet; returns how fast it was."""
    missing = [one for one in shards if not record_path(Path(config.out), one.number).exists()]
    total, left = (sum(one.stop - one.start for one in some) for some in (shards, missing))
    begun, seen = time.monotonic(), 0
    with Progress("describing", total, total - left) as progress:

        def watch(_: Shard, images: int, __: str) -> None:
            nonlocal seen
            seen += images
            progress.advance(images, rate(seen, time.monotonic() - begun))

        start = functools.partial(RegionFeatureExtractor, config, files, boxes)
        gpus = torch.cuda.device_count() if config.pick_device().type == "cuda" else 0
        for _ in run(config.executor, start, missing, config.workers, watch, gpus):
            pass
    return rate(seen, time.monotonic() - begun)


def _boxes(config: FeaturesConfig, files: Sequence[Path], out: Path) -> str:
    """Returns the file of boxes by image id, made of one by file name where there are no ids; "" for none."""
    if not config.boxes_file or config.annotations:
        return config.boxes_file
    path = existing(config.boxes_file, "boxes file")
    if path.suffix != ".json":
        if ProposalTable(path).origins.names:
            return config.boxes_file
        raise InputError(
            f"regions_from={path} identifies images by id, which images in folders do not have; give "
            "annotations=, or boxes with file_name"
        )
    known = FileNames({number: str(file) for number, file in enumerate(files, 1)}, "the images given")
    found: dict[str, int | None] = {}
    with writing(out / BOXES) as table:
        for number, (_, entry) in enumerate(stream_entries(path, "boxes file")):
            where = f"boxes file {path}, entry {number}"
            name = str(entry.get("file_name", "")) if isinstance(entry, dict) else ""
            if not name:
                raise InputError(f"{where}: has no file_name; or give annotations=")
            if name not in found:
                found[name] = known.find(name)
            if found[name] is not None:
                image_id, row = checked_proposal({**entry, "image_id": found[name]}, where)
                values = torch.tensor(row, dtype=torch.float64)
                table.add(image_id, xywh_to_xyxy(values[None, :4]).float(), values[4:].float())
    strangers = [name for name, image_id in found.items() if image_id is None]
    if len(strangers) == len(found):
        raise InputError(f"boxes file {path} has no box in any of the {len(files)} images; see its file_name")
    if strangers:
        print(f"note: {len(strangers)} images of {path} are not among the given ones, first {strangers[0]}")
    return str(out / BOXES)


def _finish(folder: RunFolder, config: FeaturesConfig, shards: Sequence[Shard]) -> dict[str, Any]:
    """Writes what makes a folder of shards a finished one: skipped images, manifest, metrics."""
    parts = [read_json(record_path(folder.path, shard.number), "record of a shard") for shard in shards]
    skipped = [entry for part in parts for entry in part["skipped"]]
    if skipped:
        write_skipped(folder.path / "skipped.jsonl", skipped)
    counts = {key: sum(part[key] for part in parts) for key in ("images", "regions")}
    total = counts["images"] + len(skipped)
    reasons = [entry["reason"] for entry in skipped]
    require_usable(reasons, total, config.max_skipped, folder.path / "skipped.jsonl")
    if not counts["regions"] and config.regions_from != "truth":
        raise JobError(f"regions_from={config.regions_from} gives no region in any of {total} images")
    tables = [shard_path(folder.path, shard.number).name for shard in shards]
    manifest = {
        "version": VERSION,
        **({"shards": tables} if config.format == "parquet" else {}),
        **counts,
        "skipped": len(skipped),
        **folder.inputs,
        "config": config.identity(),
    }
    write_json(folder.path / MANIFEST, manifest, indent=2)
    folder.finish({**counts, "skipped": len(skipped)})
    # What killed processes were writing, and what only unfinished runs need.
    for leftover in (*folder.path.glob(".shard-*"), *folder.path.glob(".*.tmp"), folder.path / BOXES):
        leftover.unlink(missing_ok=True)
    return manifest
