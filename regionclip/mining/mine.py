"""The job `mine`: from captioned images to region-phrase pairs.

Images are mined in units: a tar, or a range of ids. A unit's shard depends on the options and on its images
alone, so that executors, numbers of processes and interruptions change nothing about the result.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clip_base.data.inputs import WEBDATASET, absolute, source_inputs, source_root
from clip_base.images.roots import ImageRoot
from clip_base.jobs.run import RunFolder
from clip_base.jobs.skipped import require_usable
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import Progress
from clip_base.runtime.workers import run
from clip_base.storage.files import absolute_path, existing, is_file, replacing, write_json
from clip_base.storage.remote import address_of
from clip_base.storage.tars import names_tars
from clip_base.weights.fetching import download, hub
from clip_base.weights.load import find
from regionclip.concepts.pool import pool_language, read_concepts
from regionclip.concepts.spacy_models import model_name
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.caption_index import CaptionIndex
from regionclip.data.entries import entry_root
from regionclip.data.pairs import (
    Unit,
    pair_reader,
    write_index,
)
from regionclip.mining.miner import MineConfig, Miner, teacher_head
from regionclip.mining.scale import with_scale
from regionclip.mining.shards import (
    MANIFEST,
    VERSION,
    VOCABULARY,
    image_rows,
    images_path,
    read_manifest,
    shard_path,
)
from regionclip.models.region_heads import KEY
from regionclip.models.teachers.base import load_teacher
from regionclip.models.teachers.identity import is_own, source_of
from regionclip.proposals.base import build_proposer


def mine(config: MineConfig) -> None:
    """Mines region-phrase pairs from captioned images into Parquet shards with a manifest."""
    given = config
    config = replace(_fetched(config), images="", captions="", source=config.source_options())
    head = teacher_head(config)  # which may raise, before anything is written
    first, shares = config.shares
    part = f"{first}-of-{shares}" if shares > 1 else ""
    folder = RunFolder(config.out, given, "region-mine", _inputs(config), part)
    if folder.finished() is not None and is_whole(folder.path):
        print(f"{folder.path} is complete: {read_manifest(folder.path)['regions']} regions")
        return
    root = entry_root(config.source)
    index = folder.path / f".images-{first}-of-{shares}.db"
    if config.source["name"] != WEBDATASET and not index.exists():
        write_index(config.source, index)
        _require_images(config, root or ImageRoot("/"), index)
    path = folder.path / VOCABULARY
    if not path.exists():  # a proposer or matcher that cannot be made is told before names are embedded
        build_proposer(config.proposer, torch.device("cpu"))
    vocabulary = Vocabulary.load(path) if path.exists() else _embed(config)
    # Only now, so that a call that failed at once leaves nothing that a fixed one would have to equal.
    vocabulary.save(path)
    reader = pair_reader(config.source, index, config.shard_images)
    units = reader.units()
    config, why = with_scale(config, reader, units)
    _mine_units(config, index, [unit for unit in units if unit.number % shares == first - 1])
    missing = sum(not shard_path(folder.path, unit.name).exists() for unit in units)
    if missing:
        print(
            f"{folder.path}: share {config.shard} is complete; {missing} of {len(units)} shards belong to "
            "other shares"
        )
        return
    manifest = _finish(folder, config, given, vocabulary, units, {KEY: head, "teacher_scale_reason": why})
    print(
        f"{folder.path}: {manifest['regions']} regions of {manifest['images']} images, "
        f"{manifest['skipped']} skipped"
    )


def _require_images(config: MineConfig, source: ImageRoot, index: Path) -> None:
    """Raises an InputError, and leaves no index, when none of the first images exists."""
    reader = CaptionIndex(index)
    first = next(reader.slices(100), None)
    entries = [entry for entry in reader.read(first) if not entry.tar] if first else []
    if not first:
        index.unlink()
        raise InputError(f"the source {config.source['name']} has no image; check its options")
    if entries and not any(source.path(entry.file_name).exists() or source.tars for entry in entries):
        index.unlink()
        what = config.source.get("captions") or config.source.get("file") or "the source"
        raise JobError(
            f"images={source} holds none of the first {len(entries)} images of {what}, such as "
            f"{entries[0].file_name}; give the folder that the file names are relative to"
        )


def _mine_units(config: MineConfig, index: Path, units: Sequence[Unit]) -> None:
    """Mines those of the units whose shards are not there yet."""
    folder = Path(config.out)
    missing = [unit for unit in units if not shard_path(folder, unit.name).exists()]
    counts = [unit.count for unit in units if unit.count is not None]
    total = sum(counts) if len(counts) == len(units) else None  # what tars hold is known once they are read
    done = 0 if total is None else total - sum(unit.count or 0 for unit in missing)
    print(f"mining {len(missing):,} of {len(units):,} shards", file=sys.stderr, flush=True)
    seen: dict[int, int] = {}  # images that a unit under way has behind it
    with Progress("mining", total, done) as progress:

        def watch(unit: Unit, images: int, note: str) -> None:
            seen[unit.number] = seen.get(unit.number, 0) + images
            progress.advance(images, note)

        start = functools.partial(Miner, _anywhere(config), index.absolute())
        gpus = torch.cuda.device_count() if config.pick_device().type == "cuda" else 0
        ended = len(units) - len(missing)
        for unit, regions in run(config.executor, start, missing, config.workers, watch, gpus):
            # Those that an executor without reports mined.
            behind, ended = seen.pop(unit.number, 0), ended + 1
            note = f"{regions} regions in {unit.name}, {ended} of {len(units)} shards"
            progress.advance((unit.count or behind) - behind, note)


def _fetched(config: MineConfig) -> MineConfig:
    """Returns the config with published models' names replaced by their files."""
    proposer = {
        key: str(find(value)) if isinstance(value, str) and value in download.files() else value
        for key, value in config.proposer.items()
    }
    if not is_own(config.backend):  # another package fetches its models itself
        return replace(config, proposer=proposer)
    # Each machine fetches what is at an address for itself.
    is_address = address_of(config.weights) is not None and not hub.is_model(config.weights)
    weights = config.weights if is_address else str(find(config.weights))
    return replace(config, weights=weights, proposer=proposer)


def _anywhere(config: MineConfig) -> MineConfig:
    """Returns the config with absolute paths: processes on other machines begin in other folders."""
    changes: dict[str, Any] = {key: absolute_path(getattr(config, key)) for key in ("concepts", "out")}
    if is_own(config.backend) or Path(config.weights).exists():
        changes["weights"] = absolute_path(config.weights)
    changes["source"] = absolute(config.source)
    for key in ("proposer", "matcher"):
        options = getattr(config, key).items()
        changes[key] = {name: absolute_path(it) if _is_file(it) else it for name, it in options}
    return replace(config, **changes)


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and is_file(value)


def is_whole(folder: Path) -> bool:
    """Whether a finished folder still holds every shard of its manifest; a deleted one is mined again."""
    return (folder / MANIFEST).exists() and all(
        (folder / name).exists() for name in read_manifest(folder)["shards"]
    )


def _inputs(config: MineConfig) -> dict[str, Path | str]:
    """Returns what decides the result besides the options: all files, and the spaCy model."""
    own = is_own(config.backend)
    teacher = existing(config.weights) if own else source_of(config.backend, config.weights)
    files = {"concepts": config.concepts}
    files |= {f"proposer_{key}": value for key, value in config.proposer.items() if _is_file(value)}
    paths = {what: existing(file) for what, file in files.items()}
    language = model_name(config.language or pool_language(config.concepts))
    return {"teacher": teacher, **paths, **source_inputs(config.source), "language_model": language}


def _embed(config: MineConfig) -> Vocabulary:
    """Returns the pool's vocabulary, embedded once for all processes and restarts."""
    names = [concept.concept for concept in read_concepts(config.concepts)]
    if not names:
        raise InputError(f"concept pool {config.concepts} is empty; lower min_count of `regionclip concepts`")
    teacher = load_teacher(config.backend, config.weights).to(config.pick_device())
    what = f"{len(names):,} concepts in {len(config.templates)} templates"
    print(f"embedding {what}", file=sys.stderr, flush=True)
    return embed(teacher, teacher.tokenize, names, config.templates)


def _finish(
    folder: RunFolder,
    config: MineConfig,
    given: MineConfig,
    vocabulary: Vocabulary,
    units: Sequence[Unit],
    teacher: dict[str, str],
) -> dict[str, Any]:
    """Writes what makes a folder of shards a finished one: skipped images, manifest, metrics."""
    paths = [shard_path(folder.path, unit.name) for unit in units]
    listed = folder.path / "skipped.jsonl"
    found = _gather(paths, listed)
    require_usable(found.unreadable, found.images, config.max_skipped, listed)
    if not found.regions:
        raise JobError(
            f"no region was mined from {found.images} images, whose reasons are in {listed}; loosen the "
            "matcher or give another concept pool, and another out="
        )
    root = source_root(config.source)
    manifest = {
        "version": VERSION,
        "shards": [path.name for path in paths],
        "samples": found.samples,
        "max_concepts": found.concepts,
        "images": found.images,
        "images_folder": str(Path(root).absolute()) if root and not names_tars(root) else root,
        "source": absolute(config.source),
        "tars": found.tars,
        "regions": found.regions,
        "skipped": found.skipped,
        **folder.inputs,
        **{key: value for key, value in teacher.items() if value},
        "vocabulary": vocabulary.fingerprint,
        "proposer": config.proposer,
        "matcher": config.matcher,
        "synonyms": {one.concept: one.synonyms for one in read_concepts(config.concepts) if one.synonyms},
        "config": {**asdict(config), "images": given.images, "captions": given.captions},
    }
    write_json(folder.path / MANIFEST, manifest, indent=2)
    # What killed processes were writing, and what only unfinished runs need.
    for leftover in (*folder.path.rglob(".*.parquet.*.tmp"), *folder.path.glob(".images-*")):
        leftover.unlink(missing_ok=True)
    figures = {"images": found.images, "regions": found.regions, "skipped": found.skipped}
    folder.finish(figures)
    return manifest


@dataclass
class _Found:
    """What all shards hold together.

    Attributes:
        images: how many there are.
        regions: how many they have.
        skipped: images without a region.
        samples: for each shard, how many images have regions.
        concepts: the most concepts that a region keeps.
        unreadable: why each image that could not be read was not.
        tars: size in bytes of each tar that an image is in.
    """

    images: int = 0
    regions: int = 0
    skipped: int = 0
    concepts: int = 0
    samples: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    tars: dict[str, int] = field(default_factory=dict)


def _gather(shards: Sequence[Path], listed: Path) -> _Found:
    """Counts what the shards hold, and lists the skipped images of all of them in a file."""
    found = _Found()
    with replacing(listed) as temporary, temporary.open("w", encoding="utf-8") as file:
        for shard in shards:
            samples = 0
            for image in image_rows(images_path(shard)):
                found.images, found.regions = found.images + 1, found.regions + image.regions
                samples += image.regions > 0
                found.concepts = max(found.concepts, image.concepts)
                if image.tar and image.tar not in found.tars:
                    found.tars[image.tar] = os.stat(image.tar).st_size if os.path.exists(image.tar) else 0
                if not image.regions:
                    found.skipped += 1
                    file.write(json.dumps(image.skipped, ensure_ascii=False) + "\n")
                if image.unreadable:
                    found.unreadable.append(image.reason or "")
            found.samples.append(samples)
    return found
