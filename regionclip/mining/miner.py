"""Mining one shard after another: proposals, a frozen teacher, a matcher."""

# N regions of a batch, D embedding size, C concepts of the vocabulary
from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, Plugin, build_plugin, option, plugin
from clip_base.jobs.skipped import max_skipped_option, require_share
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.runtime.workers import EXECUTORS, Report
from clip_base.storage.files import beside, existing
from clip_base.weights.load import load_clip
from regionclip.concepts.phrase_cache import PHRASES, StoredPhrases
from regionclip.concepts.phrases import Phrase, PhraseParser
from regionclip.concepts.pool import Concept, pool_language, read_concepts
from regionclip.concepts.synonyms import aliases_of
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.batches import DecodedImage, LoadedBatch, read_annotated, read_batches
from regionclip.data.caption_index import CaptionedImageEntry, CaptionIndex, ImageRange
from regionclip.mining.matchers.base import GROUP as MATCHERS
from regionclip.mining.matchers.base import Matcher, MatchInputs
from regionclip.mining.shards import VOCABULARY, MinedRegion, shard_path, write_shard
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.region_heads import PerRegionHead, RegionHeadOptions, choose_head
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import build_proposer
from regionclip.structures.transforms import ResizeConfig, ResizeTransform

UNREADABLE = "unreadable"  # in the entry of a skipped image: it could not be read, others have no region


@dataclass(kw_only=True)
class MineConfig(RegionHeadOptions, ComputeOptions):
    """Options of mining."""

    images: str = option(REQUIRED, "folder that the captions' file names are relative to")
    captions: str = option(REQUIRED, "captions_*.json in COCO's format")
    weights: str = option(REQUIRED, "the teacher: a CLIP")
    concepts: str = option(REQUIRED, "concept pool from `regionclip concepts`")
    out: str = option(REQUIRED, "folder for shards and manifest", runtime_only=True)
    proposer: Plugin = plugin(PROPOSERS, "rpn", "proposer of regions")
    matcher: Plugin = plugin(MATCHERS, "hybrid", "how regions are matched with concepts")
    teacher: str = option("crop", "how the teacher sees a region", choices=("crop", "roi_align", "dense"))
    teacher_scale: float = option(
        1.0,
        "factor on the image size for the teacher (not for crops), which works best near its training "
        "resolution",
    )
    context: float = option(1.2, "teacher=crop: side of the square crop, in longer sides of the box")
    templates: list[str] = option(list(DEFAULT_TEMPLATES), "prompts, averaged; {} is the concept")
    temperature: float = option(0.0, "divisor of the cosines; 0: the teacher's own, 1 / exp(logit scale)")
    resize: ResizeConfig = option(ResizeConfig(), "size of the images")
    language: str = option("", "spaCy model for phrases; empty: the one used for the concept pool")
    batch_size: int = option(16, "images per batch")
    max_skipped: float = max_skipped_option()
    shard_images: int = option(2000, "images per shard")
    executor: str = option(
        "local",
        "where the processes are: local, on this machine; ray, on the Ray cluster that RAY_ADDRESS names or "
        "that runs here (its machines see the same files at the same paths)",
        runtime_only=True,
        choices=EXECUTORS,
        renamed_from="engine",
    )
    workers: int = option(
        1,
        "processes that mine shards in parallel; 0: one per core (ray: or one per GPU)",
        runtime_only=True,
    )
    shard: str = option(
        "1/1",
        "K/N mines only the K-th of N shares of the shards, into the same folder: each machine another, and "
        "the one that ends last writes the manifest",
        runtime_only=True,
        renamed_from="share",
    )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        super().__post_init__()
        require_share(self.max_skipped)
        if self.shard_images < 1:
            raise InputError(f"shard_images must be at least 1, found {self.shard_images}")
        if self.workers < 0:
            raise InputError(f"workers must be at least 0, got {self.workers}")
        if self.region_head != "auto" and self.teacher != "roi_align":
            raise InputError(
                f"region_head={self.region_head} is for teacher=roi_align, this is teacher={self.teacher}"
            )
        first, count = self.shares
        if not 1 <= first <= count:
            raise InputError(f"shard={self.shard} must be K/N with K from 1 to N, such as 2/8")

    @property
    def shares(self) -> tuple[int, int]:
        """K and N of `shard`; (0, 0) when it is of another form."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def teacher_head(config: MineConfig) -> str:
    """Returns the region head with which the teacher embeds regions.

    Raises:
        InputError: the teacher's weights were trained with another one than the options say.
    """
    if config.teacher != "roi_align":
        return PerRegionHead.kind
    return choose_head(config.region_head, config.weights)


@dataclass(frozen=True)
class CaptionedImage:
    """An image to mine.

    Attributes:
        image_id: its id in the captions file.
        file_name: relative to the images folder.
        caption_concepts: row of the vocabulary -> (phrase, caption) that names it first.
        unmatched_reason: why no concept is named.
        size: (height, width) in pixels as the captions file states them; None: it does not.
    """

    image_id: int
    file_name: str
    caption_concepts: dict[int, tuple[str, str]]
    unmatched_reason: str = ""
    size: tuple[int, int] | None = None


class Miner:
    """Everything that mining a shard needs, loaded once a process.

    Args:
        config: what to mine; its `out` holds the vocabulary.
        images: the list of all images, see `write_caption_index`.
    """

    def __init__(self, config: MineConfig, images: Path) -> None:
        self.config, self.device = config, config.pick_device()
        self.folder = existing(config.images, "images folder")
        self.images = CaptionIndex(images)
        self.pool = read_concepts(config.concepts)
        self.vocabulary = Vocabulary.load(Path(config.out) / VOCABULARY)
        self.concepts = self.vocabulary.embeddings.to(self.device)  # [C, D]
        teacher = load_clip(config.weights).to(self.device)
        self.temperature = config.temperature or float(torch.exp(-teacher.logit_scale.detach()))
        self.encoder = RegionEncoder(
            teacher.visual,
            config.teacher,
            config.context,
            scale=config.teacher_scale,
            region_head=teacher_head(config),
        )
        self.proposer = build_proposer(config.proposer, self.device)
        self.matcher: Matcher = build_plugin(MATCHERS, config.matcher, names=self.vocabulary.names)
        self.rows = rows_of(self.pool)

    def __call__(self, part: ImageRange, report: Report) -> int:
        """Mines a slice of the images into its shard and returns how many regions that holds."""
        skipped: list[dict[str, Any]] = []
        images = self.captioned(self.images.read(part))
        regions = self.mine(images, skipped, report)
        return write_shard(shard_path(Path(self.config.out), part.number), regions, skipped)

    @cached_property
    def parser(self) -> PhraseParser:
        """The parser that made the pool; what it found then is not parsed again."""
        return mining_parser(self.config.concepts, self.pool, self.config.language)

    def captioned(self, images: Sequence[CaptionedImageEntry]) -> list[CaptionedImage]:
        """Returns images with what their captions, if any, mention."""
        parsed = self.parser.parse(text for image in images for text in image.captions)
        found = []
        for image in images:
            caption_concepts: dict[int, tuple[str, str]] = {}
            unmatched_reason = "no caption holds a noun phrase" if image.captions else "it has no caption"
            for text in image.captions:
                for phrase in next(parsed):
                    unmatched_reason = "no caption names a concept of the pool"
                    row = row_of(phrase, self.rows)
                    if row is not None:
                        caption_concepts.setdefault(row, (phrase.text, text))
            found.append(
                CaptionedImage(
                    image.image_id, image.file_name, caption_concepts, unmatched_reason, image.size
                )
            )
        return found

    def mine(
        self, images: Sequence[CaptionedImage], skipped: list[dict[str, Any]], report: Report
    ) -> Iterator[MinedRegion]:
        """Yields the regions of some images, in their order.

        Args:
            images: what to mine.
            skipped: takes an entry for each image that gives no region.
            report: takes how many images more were looked at.
        """
        count = 0

        def skip(image: CaptionedImage, reason: str) -> None:
            skipped.append({**_entry(image, reason), UNREADABLE: True})

        groups = read_batches(
            images, self._read, self.config.resize, self.config.batch_size, self.device, on_skip=skip
        )
        for group in groups:
            for image, _, (regions, reason) in group.map(self._mine_batch):
                count += len(regions)
                yield from regions
                if not regions:
                    skipped.append(_entry(image, reason))
            report(group.count, f"{count} regions in this shard")

    def _read(self, image: CaptionedImage) -> DecodedImage:
        return read_annotated(image.image_id, self.folder / image.file_name, image.size)

    def _mine_batch(self, batch: LoadedBatch[CaptionedImage]) -> list[tuple[list[MinedRegion], str]]:
        """Returns for each image its regions, and why there are none."""
        with torch.no_grad(), autocast(self.config.precision, self.device):
            proposals = self.proposer(batch.images, batch.infos)
            embeddings = self.encoder(batch.images, proposals)  # [N, D]
            similarity = (embeddings @ self.concepts.T).float().cpu()  # [N, C]
            proposals = proposals.to("cpu")
            found = []
            for slot, (image, transform) in enumerate(zip(batch.items, batch.transforms, strict=True)):
                mask = proposals.image_index == slot
                scores = _scores(proposals.scores, mask)
                found.append(
                    self._of_image(image, transform, similarity[mask], proposals.boxes[mask], scores)
                )
        return found

    def _of_image(
        self,
        image: CaptionedImage,
        frame: ResizeTransform,
        similarity: Tensor,
        boxes: Tensor,
        objectness: Tensor,
    ) -> tuple[list[MinedRegion], str]:
        """Returns an image's regions, and why there is none."""
        if not len(boxes):
            return [], "no proposals"
        own = torch.tensor(sorted(image.caption_concepts), dtype=torch.int64)
        match = self.matcher(MatchInputs(similarity, objectness, own, self.temperature, boxes))
        originals = frame.invert_boxes(boxes)
        regions = []
        for row, ids, probs in zip(
            match.indices.tolist(), match.concept_ids.tolist(), match.concept_probs.tolist(), strict=True
        ):
            phrase, caption = image.caption_concepts.get(ids[0], (None, None))
            regions.append(
                MinedRegion(
                    image.image_id,
                    image.file_name,
                    *frame.original,
                    box=tuple(originals[row].tolist()),
                    objectness=float(objectness[row]),
                    concept_ids=ids,
                    concept_probs=probs,
                    concept=self.vocabulary.names[ids[0]],
                    phrase=phrase,
                    caption=caption,
                )
            )
        return regions, "no region matches a concept" if image.caption_concepts else image.unmatched_reason


def _entry(image: CaptionedImage, reason: str) -> dict[str, Any]:
    return {"image_id": image.image_id, "file_name": image.file_name, "reason": reason}


def _scores(scores: Tensor | None, mask: Tensor) -> Tensor:
    return torch.ones(int(mask.sum())) if scores is None else scores[mask].float()


def rows_of(pool: Sequence[Concept]) -> dict[str, int]:
    """Returns form in a caption -> row of the vocabulary: the concepts' names and given classes' synonyms."""
    rows = {concept.concept: row for row, concept in enumerate(pool)}
    return rows | {form: rows[name] for form, name in aliases_of(_given(pool)).items()}


def row_of(phrase: Phrase, rows: dict[str, int]) -> int | None:
    """Returns the vocabulary's row for a phrase: its head noun's, else the whole phrase's, else None.

    The head comes first since a detector is asked for things, and since what describes them ("red") is seldom
    said.
    """
    return rows.get(phrase.head, rows.get(phrase.text))


def _given(pool: Sequence[Concept]) -> list[tuple[str, ...]]:
    return [(concept.concept, *concept.synonyms) for concept in pool if concept.kind == "given"]


def mining_parser(path: str, pool: Sequence[Concept], language: str, workers: int = 1) -> PhraseParser:
    """Returns the parser that made a pool of concepts; phrases that are kept beside it are not parsed again.

    What is invisible needs no list here: it is not in the pool.

    Args:
        path: the pool's file.
        pool: its concepts.
        language: a spaCy model; "" is the one that the pool was made with.
        workers: processes.
    """
    # The concepts job keeps given names of several words whole, so this one must too.
    names = [name for entry in _given(pool) for name in entry]
    parser = PhraseParser(
        language or pool_language(path), workers=workers, stop_words=frozenset(), names=names
    )
    kept = beside(path, PHRASES)
    if kept:
        try:
            parser.memory = StoredPhrases(kept, parser.fingerprint)
        except InputError as error:
            print(f"captions are parsed again: {error}", file=sys.stderr)
    return parser
