"""From captioned images to region-phrase pairs: proposals, a frozen teacher, a matcher; restartable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base import plugins
from clip_base.batch import ImageBatch
from clip_base.config import REQUIRED, Part, option, part
from clip_base.data.images import Pixels, decode
from clip_base.data.sources import read_captions
from clip_base.errors import InputError
from clip_base.files import existing, read_json, write_json, write_text
from clip_base.models.clip import CLIP
from clip_base.progress import Progress
from clip_base.run import RunFolder
from clip_base.tokenizer import Tokenizer
from clip_base.train import autocast, pick_device
from clip_base.weights import load_clip
from clip_base.weights.native import file_hash
from regionclip.concepts import read_concepts
from regionclip.encoder import RegionEncoder
from regionclip.inference import build_proposer
from regionclip.matching.base import GROUP as MATCHERS
from regionclip.matching.base import Evidence, Matcher
from regionclip.phrases import Phrase, PhraseParser
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import ImageKey
from regionclip.shards import MANIFEST, VERSION, MinedRegion, read_manifest, shard_path, write_shard
from regionclip.transforms import Frame, ResizeConfig, place, to_batch
from regionclip.vocabulary import Vocabulary, embed


@dataclass
class MineConfig:
    """Options of mining."""

    images: str = option(REQUIRED, "folder that the captions' file names are relative to")
    captions: str = option(REQUIRED, "captions_*.json in COCO's form")
    weights: str = option(REQUIRED, "the teacher: a CLIP")
    concepts: str = option(REQUIRED, "concept pool from `regionclip concepts`")
    out: str = option(REQUIRED, "folder for shards and manifest", free=True)
    proposer: Part = part(PROPOSERS, "rpn", "where regions come from")
    matcher: Part = part(MATCHERS, "hybrid", "how regions find their concepts")
    teacher: str = option("crop", "how the teacher sees a region", choices=("crop", "roi_align", "dense"))
    teacher_scale: float = option(
        1.0,
        "factor on the images' size for the teacher (not for crops): it reads best near its own resolution",
    )
    context: float = option(1.2, "teacher=crop: side of the square crop, in longer sides of the box")
    templates: list[str] = option(["a photo of {article} {}.", "{}"], "prompts, averaged; {} is the concept")
    temperature: float = option(
        0.0, "what cosines are divided by; 0: the teacher's own, 1 / exp(logit scale)"
    )
    resize: ResizeConfig = option(ResizeConfig(), "size of the images; nothing is mirrored")
    language: str = option("", "spaCy model for phrases; empty: the small English one")
    batch_size: int = option(16, "images at once")
    shard_images: int = option(2000, "images a shard")
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one", free=True)
    workers: int = option(1, "processes that parse captions", free=True)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_images < 1:
            raise InputError("batch_size and shard_images must be at least 1")


@dataclass(frozen=True)
class CaptionedImage:
    """An image to mine.

    Attributes:
        image_id: its id in the captions file.
        file_name: relative to the images folder.
        mentions: row of the vocabulary -> (phrase, caption) that names it first.
    """

    image_id: int
    file_name: str
    mentions: dict[int, tuple[str, str]]


def mine(config: MineConfig) -> None:
    """Mines region-phrase pairs from captioned images into Parquet shards with a manifest."""
    run = RunFolder(config.out, config, "region-mine")
    if run.finished() is not None and is_whole(run.path):
        print(f"{run.path} is complete: {read_manifest(run.path)['regions']} regions")
        return
    hashes = _same_inputs(run.path / ".inputs.json", config)
    miner = Miner(config)
    images = miner.read_images()
    size = config.shard_images
    pieces = [images[start : start + size] for start in range(0, len(images), size)]
    done = sum(len(piece) for n, piece in enumerate(pieces) if shard_path(run.path, n).exists())
    with Progress("mining", len(images), done) as progress:
        for number, piece in enumerate(pieces):
            path = shard_path(run.path, number)
            if path.exists():
                continue
            regions, skipped = miner.mine(piece, progress)
            # The list goes first: where the shard is, its list is.
            write_text(_list_path(path), "".join(json.dumps(entry) + "\n" for entry in skipped))
            write_shard(path, regions)
    manifest = _finish(run, config, miner.vocabulary, len(pieces), len(images), hashes)
    print(
        f"{run.path}: {manifest['regions']} regions of {manifest['images']} images, "
        f"{manifest['skipped']} skipped"
    )


def _list_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.skipped.jsonl")


def is_whole(folder: Path) -> bool:
    """Whether a finished folder still holds every shard of its manifest; a deleted one is mined again."""
    return (folder / MANIFEST).exists() and all(
        (folder / name).exists() for name in read_manifest(folder)["shards"]
    )


def _same_inputs(record: Path, config: MineConfig) -> dict[str, str]:
    """Returns the hashes of the files that decide the result; a restarted run must find them as they were."""
    files = {"teacher": config.weights, "captions": config.captions, "concepts": config.concepts}
    hashes = {what: file_hash(file) for what, file in files.items()}
    if not record.exists():
        write_json(record, hashes)
        return hashes
    before = read_json(record, "record of the inputs")
    changed = [files[what] for what in files if before.get(what) != hashes[what]]
    if changed:
        raise InputError(
            f"{' and '.join(changed)} changed since mining into {record.parent} began; "
            "give another out= or delete that folder"
        )
    return hashes


def _finish(
    run: RunFolder,
    config: MineConfig,
    vocabulary: Vocabulary,
    shards: int,
    images: int,
    hashes: dict[str, str],
) -> dict[str, Any]:
    """Writes what makes a folder of shards a finished one: skipped images, vocabulary, manifest."""
    import pyarrow.parquet as pq

    paths = [shard_path(run.path, number) for number in range(shards)]
    for leftover in run.path.glob(".*.tmp"):  # what a killed run was writing
        leftover.unlink()
    lists = [_list_path(path).read_text(encoding="utf-8") for path in paths]
    write_text(run.path / "skipped.jsonl", "".join(lists))
    vocabulary.save(run.path / "vocabulary.safetensors")
    manifest = {
        "version": VERSION,
        "shards": [path.name for path in paths],
        "images": images,
        "images_folder": str(Path(config.images).absolute()),
        "regions": sum(pq.read_metadata(path).num_rows for path in paths),
        "skipped": sum(text.count("\n") for text in lists),
        **hashes,
        "vocabulary": vocabulary.fingerprint,
        "proposer": config.proposer,
        "matcher": config.matcher,
        "config": asdict(config),
    }
    write_json(run.path / MANIFEST, manifest, indent=2)
    run.finish({key: manifest[key] for key in ("images", "regions", "skipped")})
    return manifest


class Miner:
    """Everything that mining needs, loaded once."""

    def __init__(self, config: MineConfig) -> None:
        self.config, self.device = config, pick_device(config.device)
        self.folder = existing(config.images, "images folder")
        pool = read_concepts(config.concepts)
        self.names = [concept.concept for concept in pool]
        # The concepts job keeps given names of several words whole, so this one must too.
        self.given = [concept.concept for concept in pool if concept.kind == "given"]
        if not self.names:
            raise InputError(
                f"concept pool {config.concepts} is empty; lower min_count of `regionclip concepts`"
            )
        teacher: CLIP = load_clip(config.weights).to(self.device)
        tokenizer = Tokenizer(teacher.config.text.context_length)
        self.vocabulary = embed(teacher, tokenizer, self.names, config.templates)
        self.concepts = self.vocabulary.embeddings.to(self.device)  # [C, D]
        self.temperature = config.temperature or float(torch.exp(-teacher.logit_scale.detach()))
        self.encoder = RegionEncoder(
            teacher.visual, config.teacher, config.context, scale=config.teacher_scale
        )
        self.proposer = build_proposer(config.proposer, self.device)
        self.matcher: Matcher = plugins.build(MATCHERS, config.matcher, names=self.names)

    def read_images(self) -> list[CaptionedImage]:
        """Returns all images in the order of their ids, with what their captions, if any, mention."""
        captions, names = read_captions(self.config.captions)
        rows = {name: row for row, name in enumerate(self.names)}
        parser = PhraseParser(self.config.language, workers=self.config.workers, names=self.given)
        ids = sorted(names)
        texts = [text for key in ids for text in captions.get(key, ())]
        with Progress("phrases", len(texts)) as progress:
            parsed = []
            for phrases in parser.parse(texts):
                parsed.append(phrases)
                progress.advance()
        found = iter(parsed)
        images = []
        for key in ids:
            mentions: dict[int, tuple[str, str]] = {}
            for text, phrases in ((text, next(found)) for text in captions.get(key, ())):
                for phrase in phrases:
                    row = row_of(phrase, rows)
                    if row is not None:
                        mentions.setdefault(row, (phrase.text, text))
            images.append(CaptionedImage(key, names[key], mentions))
        return images

    def mine(
        self, images: Sequence[CaptionedImage], progress: Progress
    ) -> tuple[list[MinedRegion], list[Any]]:
        """Returns the regions of some images, in their order, and one entry for each that gave none."""
        regions: list[MinedRegion] = []
        skipped: list[dict[str, Any]] = []
        for chunk in self._batches(images, skipped):
            batch = to_batch([pixels for _, pixels, _ in chunk], multiple=32).to(self.device)
            with torch.no_grad(), autocast(self.config.precision, self.device):
                found = self._mine_batch(batch, [(image, frame) for image, _, frame in chunk])
            for (image, _, _), (rows, reason) in zip(chunk, found, strict=True):
                regions += rows
                if not rows:
                    skipped.append(
                        {"image_id": image.image_id, "file_name": image.file_name, "reason": reason}
                    )
            progress.advance(len(chunk), f"{len(regions)} regions in this shard")
        return regions, skipped

    def _batches(
        self, images: Sequence[CaptionedImage], skipped: list[dict[str, Any]]
    ) -> Iterator[list[tuple[CaptionedImage, Pixels, Frame]]]:
        chunk: list[tuple[CaptionedImage, Pixels, Frame]] = []
        for image in images:
            try:
                pixels = decode(self.folder / image.file_name)
            except InputError as error:
                skipped.append(
                    {"image_id": image.image_id, "file_name": image.file_name, "reason": str(error)}
                )
                continue
            chunk.append((image, *place(pixels, self.config.resize.short[0], self.config.resize.long)))
            if len(chunk) == self.config.batch_size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _mine_batch(
        self, batch: ImageBatch, images: list[tuple[CaptionedImage, Frame]]
    ) -> list[tuple[list[MinedRegion], str]]:
        keys = [ImageKey(image.image_id, *frame.original) for image, frame in images]
        proposals = self.proposer(batch, keys)
        embeddings = self.encoder(batch, proposals)  # [N, D]
        similarity = (embeddings @ self.concepts.T).float().cpu()  # [N, C]
        proposals = proposals.to("cpu")
        return [
            self._of_image(
                image, frame, similarity[mask], proposals.boxes[mask], _scores(proposals.scores, mask)
            )
            for (image, frame), mask in zip(
                images, (proposals.image_index == i for i in range(len(images))), strict=True
            )
        ]

    def _of_image(
        self, image: CaptionedImage, frame: Frame, similarity: Tensor, boxes: Tensor, objectness: Tensor
    ) -> tuple[list[MinedRegion], str]:
        if not len(boxes):
            return [], "no proposals"
        own = torch.tensor(sorted(image.mentions), dtype=torch.int64)
        match = self.matcher(Evidence(similarity, objectness, own, self.temperature))
        originals = frame.boxes_out(boxes)
        regions = []
        for place_, ids, probs in zip(
            match.kept.tolist(), match.concept_ids.tolist(), match.concept_probs.tolist(), strict=True
        ):
            phrase, caption = image.mentions.get(ids[0], (None, None))
            box = tuple(originals[place_].tolist())
            level = float(objectness[place_])
            name = self.names[ids[0]]
            height, width = frame.original
            regions.append(
                MinedRegion(
                    image.image_id,
                    image.file_name,
                    height,
                    width,
                    box,
                    level,
                    ids,
                    probs,
                    name,
                    phrase,
                    caption,
                )
            )
        reason = "no region matches a concept" if len(own) else "no caption names a concept of the pool"
        return regions, reason


def _scores(scores: Tensor | None, mask: Tensor) -> Tensor:
    return torch.ones(int(mask.sum())) if scores is None else scores[mask].float()


def row_of(phrase: Phrase, rows: dict[str, int]) -> int | None:
    """Returns the vocabulary's row for a phrase: its head noun's, else the whole phrase's, else None.

    The head comes first since a detector is asked for things, and since what describes them ("red") is seldom
    said.
    """
    return rows.get(phrase.head, rows.get(phrase.text))
