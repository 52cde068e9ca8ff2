"""The job `mine`: from captioned images to region-phrase pairs.

Images are mined in shards, in the order of their ids. A shard depends on the options and on its images alone,
so that executors, numbers of processes and interruptions change nothing about the result.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from clip_base.jobs.run import RunFolder
from clip_base.jobs.skipped import require_usable
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import Progress
from clip_base.runtime.workers import run
from clip_base.storage.files import existing, replacing, write_json
from clip_base.weights.fetching import download
from clip_base.weights.load import find, load_clip
from regionclip.concepts.pool import pool_language, read_concepts
from regionclip.concepts.spacy_models import model_name
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.caption_index import CaptionIndex, ImageRange, write_caption_index
from regionclip.mining.miner import UNREADABLE, MineConfig, Miner, teacher_head
from regionclip.mining.shards import MANIFEST, VERSION, VOCABULARY, read_manifest, read_skipped, shard_path
from regionclip.models.region_heads import KEY
from regionclip.proposals.base import build_proposer


def mine(config: MineConfig) -> None:
    """Mines region-phrase pairs from captioned images into Parquet shards with a manifest."""
    given, config = config, _fetched(config)
    head = teacher_head(config)  # which may raise, before anything is written
    first, shares = config.shares
    part = f"{first}-of-{shares}" if shares > 1 else ""
    folder = RunFolder(config.out, given, "region-mine", _inputs(config), part)
    if folder.finished() is not None and is_whole(folder.path):
        print(f"{folder.path} is complete: {read_manifest(folder.path)['regions']} regions")
        return
    existing(config.images, "images folder")
    path = folder.path / VOCABULARY
    if not path.exists():  # a proposer or matcher that cannot be made is told before names are embedded
        build_proposer(config.proposer, torch.device("cpu"))
    vocabulary = Vocabulary.load(path) if path.exists() else _embed(config)
    listed = folder.path / f".images-{first}-of-{shares}.db"
    if not listed.exists():
        write_caption_index(config.captions, listed, Path(config.images))
        _require_images(config, listed)
    # Only now, so that a call that failed at once leaves nothing that a fixed one would have to equal.
    vocabulary.save(path)
    images = CaptionIndex(listed)
    parts = images.slices(config.shard_images)
    mine_here = [one for one in parts if one.number % shares == first - 1]
    _mine_shards(config, listed, mine_here)
    shards = -(-len(images) // config.shard_images)
    missing = sum(not shard_path(folder.path, number).exists() for number in range(shards))
    if missing:
        print(
            f"{folder.path}: share {config.shard} is complete; {missing} of {shards} shards belong to other "
            "shares"
        )
        return
    manifest = _finish(folder, config, vocabulary, shards, len(images), head)
    print(
        f"{folder.path}: {manifest['regions']} regions of {manifest['images']} images, "
        f"{manifest['skipped']} skipped"
    )


def _require_images(config: MineConfig, listed: Path) -> None:
    """Raises an InputError, and leaves no list, when the folder holds none of the first images."""
    index = CaptionIndex(listed)
    first = next(index.slices(100), None)
    names = [entry.file_name for entry in index.read(first)] if first else []
    if names and not any((Path(config.images) / name).exists() for name in names):
        listed.unlink()
        raise JobError(
            f"images={config.images} holds none of the first {len(names)} images of {config.captions}, such "
            f"as {names[0]}; give the folder that the file names are relative to"
        )


def _mine_shards(config: MineConfig, listed: Path, parts: Sequence[ImageRange]) -> None:
    """Mines those of the shards that are not there yet."""
    folder = Path(config.out)
    missing = [one for one in parts if not shard_path(folder, one.number).exists()]
    total = sum(one.count for one in parts)
    seen: dict[int, int] = {}  # images that a shard under way has behind it
    with Progress("mining", total, total - sum(one.count for one in missing)) as progress:

        def watch(one: ImageRange, images: int, note: str) -> None:
            seen[one.number] = seen.get(one.number, 0) + images
            progress.advance(images, note)

        start = functools.partial(Miner, _anywhere(config), listed.absolute())
        gpus = torch.cuda.device_count() if config.pick_device().type == "cuda" else 0
        for one, regions in run(config.executor, start, missing, config.workers, watch, gpus):
            # Those that did not decode, or that an executor without reports mined.
            progress.advance(one.count - seen.pop(one.number, 0), f"{regions} regions in shard {one.number}")


def _fetched(config: MineConfig) -> MineConfig:
    """Returns the config with published models' names replaced by their files."""
    proposer = {
        key: str(find(value)) if isinstance(value, str) and value in download.files() else value
        for key, value in config.proposer.items()
    }
    return replace(config, weights=str(find(config.weights)), proposer=proposer)


def _anywhere(config: MineConfig) -> MineConfig:
    """Returns the config with absolute paths: processes on other machines begin in other folders."""
    changes: dict[str, Any] = {
        key: str(Path(getattr(config, key)).absolute()) for key in ("images", "weights", "concepts", "out")
    }
    for key in ("proposer", "matcher"):
        options = getattr(config, key).items()
        changes[key] = {name: str(Path(it).absolute()) if _is_file(it) else it for name, it in options}
    return replace(config, **changes)


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def is_whole(folder: Path) -> bool:
    """Whether a finished folder still holds every shard of its manifest; a deleted one is mined again."""
    return (folder / MANIFEST).exists() and all(
        (folder / name).exists() for name in read_manifest(folder)["shards"]
    )


def _inputs(config: MineConfig) -> dict[str, Path | str]:
    """Returns what decides the result besides the options: all files, and the spaCy model."""
    files = {"teacher": config.weights, "captions": config.captions, "concepts": config.concepts}
    files |= {f"proposer_{key}": value for key, value in config.proposer.items() if _is_file(value)}
    paths = {what: existing(file) for what, file in files.items()}
    return {**paths, "language_model": model_name(config.language or pool_language(config.concepts))}


def _embed(config: MineConfig) -> Vocabulary:
    """Returns the pool's vocabulary, embedded once for all processes and restarts."""
    names = [concept.concept for concept in read_concepts(config.concepts)]
    if not names:
        raise InputError(f"concept pool {config.concepts} is empty; lower min_count of `regionclip concepts`")
    teacher = load_clip(config.weights).to(config.pick_device())
    return embed(teacher, Tokenizer(teacher.config.text.context_length), names, config.templates)


def _finish(
    folder: RunFolder,
    config: MineConfig,
    vocabulary: Vocabulary,
    shards: int,
    images: int,
    head: str,
) -> dict[str, Any]:
    """Writes what makes a folder of shards a finished one: skipped images, manifest, metrics."""
    paths = [shard_path(folder.path, number) for number in range(shards)]
    listed = folder.path / "skipped.jsonl"
    regions, skipped = _gather(paths, listed)
    unreadable = [reason for reason, broken in skipped if broken]
    require_usable(unreadable, images, config.max_skipped, listed)
    if not regions:
        raise JobError(
            f"no region was mined from {images} images, whose reasons are in {listed}; loosen the matcher or "
            "give another concept pool, and another out="
        )
    manifest = {
        "version": VERSION,
        "shards": [path.name for path in paths],
        "images": images,
        "images_folder": str(Path(config.images).absolute()),
        "regions": regions,
        "skipped": len(skipped),
        **folder.inputs,
        KEY: head,
        "vocabulary": vocabulary.fingerprint,
        "proposer": config.proposer,
        "matcher": config.matcher,
        "synonyms": {one.concept: one.synonyms for one in read_concepts(config.concepts) if one.synonyms},
        "config": asdict(config),
    }
    write_json(folder.path / MANIFEST, manifest, indent=2)
    # What killed processes were writing, and what only unfinished runs need.
    for leftover in (*folder.path.glob(".shard-*.tmp"), *folder.path.glob(".images-*")):
        leftover.unlink(missing_ok=True)
    folder.finish({"images": images, "regions": regions, "skipped": len(skipped)})
    return manifest


def _gather(shards: Sequence[Path], listed: Path) -> tuple[int, list[tuple[str, bool]]]:
    """Lists the skipped images of all shards in a file.

    Returns:
        How many regions there are; and for each skipped image the reason, and whether it was unreadable.
    """
    regions, skipped = 0, list[tuple[str, bool]]()
    with replacing(listed) as temporary, temporary.open("w", encoding="utf-8") as file:
        for shard in shards:
            lines, count = read_skipped(shard)
            file.write(lines)
            entries = (json.loads(line) for line in lines.split("\n") if line)
            skipped += [(entry["reason"], UNREADABLE in entry) for entry in entries]
            regions += count
    return regions, skipped
