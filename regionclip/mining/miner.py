"""Mining one shard after another: proposals, a frozen teacher, a matcher."""

# N regions of a batch, D embedding size, C concepts of the vocabulary
from __future__ import annotations

import itertools
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, Plugin, build_plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.jobs.skipped import max_skipped_option, require_share
from clip_base.runtime.errors import InputError, quote
from clip_base.runtime.precision import autocast
from clip_base.runtime.workers import EXECUTORS, Report
from clip_base.storage.files import beside
from regionclip.concepts.phrase_cache import PHRASES, StoredPhrases
from regionclip.concepts.phrases import Phrase, PhraseParser
from regionclip.concepts.pool import Concept, pool_language, read_concepts
from regionclip.concepts.synonyms import aliases_of
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.batches import DecodedImage, LoadedBatch, read_batches
from regionclip.data.caption_index import CaptionedImageEntry
from regionclip.data.captions import cleaned
from regionclip.data.entries import entry_root, read_entry
from regionclip.data.pairs import PairOptions, Unit, pair_reader
from regionclip.mining.matchers.base import GROUP as MATCHERS
from regionclip.mining.matchers.base import Matcher, MatchInputs
from regionclip.mining.shard_writer import ShardWriter
from regionclip.mining.shards import VOCABULARY, MinedImage, MinedRegion, shard_path
from regionclip.models.region_heads import PerRegionHead, RegionHeadOptions, choose_head
from regionclip.models.teachers.base import CLIP_BACKEND, RegionView, load_teacher
from regionclip.models.teachers.base import GROUP as TEACHERS
from regionclip.models.teachers.identity import require_same_teacher
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import build_proposer
from regionclip.structures.transforms import ResizeConfig, ResizeTransform

AUTO = "auto"
POOLING = ("roi_align", "mixed")  # views that pool a ResNet's map
CAPTIONED_AT_ONCE = 256  # images whose captions are parsed together, and whose encoded bytes wait in memory


@everyday(
    "mine images=images captions=captions.json weights=RN50 concepts=concepts.jsonl "
    "proposer.name=grid matcher.name=hybrid out=mined",
    input="images captions concepts",
    output="out",
    model="weights proposer.name matcher.name",
    quality="resize.short resize.long",
    speed="batch_size workers device",
)
@dataclass(kw_only=True)
class MineConfig(PairOptions, RegionHeadOptions, ComputeOptions):
    """Options of mining."""

    weights: str = option(REQUIRED, "the teacher: a CLIP; of another backend, what that reads")
    backend: Plugin = plugin(
        TEACHERS,
        CLIP_BACKEND,
        "whose model the teacher is: clip (what this package reads), open_clip (SigLIP, EVA, ConvNeXt, …), "
        "transformers",
    )
    concepts: str = option(REQUIRED, "concept pool from `regionclip concepts`")
    out: str = option(REQUIRED, "folder for shards and manifest", runtime_only=True)
    proposer: Plugin = plugin(PROPOSERS, "rpn", "proposer of regions")
    matcher: Plugin = plugin(MATCHERS, "hybrid", "how regions are matched with concepts")
    teacher: str = option(
        "crop",
        "how the teacher sees a region; mixed: crop below a size, else roi_align",
        choices=("crop", "roi_align", "dense", "mixed"),
    )
    crop_below: float = option(
        32.0, "teacher=mixed: pixels of the longer side, at the teacher's scale, below which it is cropped"
    )
    teacher_scale: int | float | str = option(
        1.0,
        "factor on the image size for the teacher (not for crops), which works best near its training "
        "resolution; auto: chosen from that resolution and the sizes of images and proposals",
    )
    context: float = option(1.2, "teacher=crop: side of the square crop, in longer sides of the box")
    templates: list[str] = option(list(DEFAULT_TEMPLATES), "prompts, averaged; {} is the concept")
    temperature: float = option(0.0, "divisor of the cosines; 0: the teacher's own, 1 / exp(logit scale)")
    resize: ResizeConfig = option(ResizeConfig(), "size of the images")
    language: str = option("", "spaCy model for phrases; empty: the one used for the concept pool")
    batch_size: int = option(16, "images per batch")
    max_skipped: float = max_skipped_option()
    shard_images: int = option(2000, "images per shard; of tars each makes a shard of its own")
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
        if isinstance(self.teacher_scale, str) and self.teacher_scale != AUTO:
            raise InputError(f"teacher_scale must be a number or {AUTO}, found {quote(self.teacher_scale)}")
        if self.region_head != "auto" and self.teacher not in POOLING:
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
    if config.teacher not in POOLING or config.backend["name"] != CLIP_BACKEND:
        return PerRegionHead.kind
    return choose_head(config.region_head, config.weights)


def region_view(config: MineConfig) -> RegionView:
    """Returns how the teacher sees regions; `teacher_scale` is a number by now."""
    scale, head = float(config.teacher_scale), teacher_head(config)
    return RegionView(config.teacher, config.context, scale, head, config.crop_below)


@dataclass(frozen=True)
class CaptionedImage:
    """An image to mine.

    Attributes:
        entry: where it is, and its captions.
        caption_concepts: row of the vocabulary -> (phrase, caption) that names it first.
        unmatched_reason: why no concept is named.
    """

    entry: CaptionedImageEntry
    caption_concepts: dict[int, tuple[str, str]]
    unmatched_reason: str = ""


class Miner:
    """Everything that mining a shard needs, loaded once a process.

    Args:
        config: what to mine; its `out` holds the vocabulary.
        index: the index of all images, see `regionclip.data.pairs.write_index`; of tars there is none.
    """

    def __init__(self, config: MineConfig, index: Path) -> None:
        self.config, self.device = config, config.pick_device()
        spec = config.source_options()
        self.pairs = pair_reader(spec, index, config.shard_images)
        self.root = entry_root(spec)
        self.pool = read_concepts(config.concepts)
        self.vocabulary = Vocabulary.load(Path(config.out) / VOCABULARY)
        self.concepts = self.vocabulary.embeddings.to(self.device)  # [C, D]
        teacher = load_teacher(config.backend, config.weights).to(self.device)
        require_same_teacher(teacher, config.backend, config.weights, self.vocabulary)
        self.score = teacher.score.with_temperature(config.temperature)
        self.encoder = teacher.region_embedder(region_view(config))
        self.proposer = build_proposer(config.proposer, self.device)
        self.matcher: Matcher = build_plugin(MATCHERS, config.matcher, names=self.vocabulary.names)
        self.rows = rows_of(self.pool)

    def __call__(self, unit: Unit, report: Report) -> int:
        """Mines a unit into its shard and returns how many regions that holds.

        Raises:
            KeyboardInterrupt, SystemExit: the process was told to stop; what was mined is saved.
        """
        writer = ShardWriter(shard_path(Path(self.config.out), unit.name))
        if writer.done:
            report(writer.done, f"{writer.regions} regions in {unit.name}")
        entries = itertools.islice(self.pairs.read(unit), writer.done, None)
        try:
            for images, regions in self.mine(self.captioned(entries)):
                writer.add(images, regions)
                report(len(images), f"{writer.regions} regions in {unit.name}")
        except (KeyboardInterrupt, SystemExit):
            writer.save()
            print(f"{unit.name}: {writer.done} images are saved", file=sys.stderr)
            raise
        return writer.finish()

    @cached_property
    def parser(self) -> PhraseParser:
        """The parser that made the pool; what it found then is not parsed again."""
        return mining_parser(self.config.concepts, self.pool, self.config.language)

    def captioned(self, entries: Iterable[CaptionedImageEntry]) -> Iterator[CaptionedImage]:
        """Yields images with what their captions, if any, mention; some hundred are read ahead."""
        entries = iter(entries)
        while some := list(itertools.islice(entries, CAPTIONED_AT_ONCE)):
            yield from self._captioned(some)

    def _captioned(self, images: Sequence[CaptionedImageEntry]) -> Iterator[CaptionedImage]:
        cleaned_captions = [[text for text in map(cleaned, image.captions) if text] for image in images]
        parsed = self.parser.parse(text for captions in cleaned_captions for text in captions)
        for image, captions in zip(images, cleaned_captions, strict=True):
            caption_concepts: dict[int, tuple[str, str]] = {}
            unmatched_reason = "no caption holds a noun phrase" if captions else "it has no caption"
            for text in captions:
                for phrase in next(parsed):
                    unmatched_reason = "no caption names a concept of the pool"
                    row = row_of(phrase, self.rows)
                    if row is not None:
                        caption_concepts.setdefault(row, (phrase.text, text))
            yield CaptionedImage(image, caption_concepts, unmatched_reason)

    def mine(self, images: Iterable[CaptionedImage]) -> Iterator[tuple[list[MinedImage], list[MinedRegion]]]:
        """Yields some images that follow each other, and their regions, in order; no image is left out."""
        unreadable: dict[int, str] = {}
        order: deque[CaptionedImage] = deque()

        def taken() -> Iterator[CaptionedImage]:
            for image in images:
                order.append(image)
                yield image

        def skip(image: CaptionedImage, reason: str) -> None:
            unreadable[image.entry.image_id] = reason

        groups = read_batches(
            taken(), self._read, self.config.resize, self.config.batch_size, self.device, on_skip=skip
        )
        for group in groups:
            found = {image.entry.image_id: result for image, _, result in group.map(self._mine_batch)}
            rows: list[MinedImage] = []
            regions: list[MinedRegion] = []
            for _ in range(group.count):
                entry = order.popleft().entry
                if entry.image_id in found:
                    own, reason, size = found[entry.image_id]
                    rows.append(_image_row(entry, own, None if own else reason, size))
                    regions += own
                else:
                    rows.append(_image_row(entry, [], unreadable.pop(entry.image_id), None))
            yield rows, regions

    def _read(self, image: CaptionedImage) -> DecodedImage:
        return read_entry(image.entry, self.root)

    def _mine_batch(
        self, batch: LoadedBatch[CaptionedImage]
    ) -> list[tuple[list[MinedRegion], str, tuple[int, int]]]:
        """Returns for each image its regions, why there are none, and its (height, width)."""
        with torch.no_grad(), autocast(self.config.precision, self.device):
            proposals = self.proposer(batch.images, batch.infos)
            embeddings = self.encoder(batch.images, proposals)  # [N, D]
            similarity = (embeddings @ self.concepts.T).float().cpu()  # [N, C]
            proposals = proposals.to("cpu")
            found = []
            for slot, (image, transform) in enumerate(zip(batch.items, batch.transforms, strict=True)):
                mask = proposals.image_index == slot
                scores = _scores(proposals.scores, mask)
                regions, reason = self._of_image(
                    image, transform, similarity[mask], proposals.boxes[mask], scores
                )
                found.append((regions, reason, transform.original))
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
        score = self.score
        match = self.matcher(MatchInputs(similarity, objectness, own, score.temperature, boxes, score.bias))
        originals = frame.invert_boxes(boxes)
        regions = []
        for row, ids, probs in zip(
            match.indices.tolist(), match.concept_ids.tolist(), match.concept_probs.tolist(), strict=True
        ):
            phrase, caption = image.caption_concepts.get(ids[0], (None, None))
            regions.append(
                MinedRegion(
                    image.entry.image_id,
                    image.entry.file_name,
                    *frame.original,
                    box=tuple(originals[row].tolist()),
                    objectness=float(objectness[row]),
                    concept_ids=ids,
                    concept_probs=probs,
                    concept=self.vocabulary.names[ids[0]],
                    phrase=phrase,
                    caption=caption,
                    key=image.entry.key,
                    tar=image.entry.tar or None,
                )
            )
        return regions, "no region matches a concept" if image.caption_concepts else image.unmatched_reason


def _image_row(
    entry: CaptionedImageEntry,
    regions: Sequence[MinedRegion],
    reason: str | None,
    size: tuple[int, int] | None,
) -> MinedImage:
    """Returns an image's row; `size` is its (height, width), None when it could not be read."""
    offset, length = entry.place or (None, None)
    height, width = size or (None, None)
    return MinedImage(
        entry.image_id,
        entry.file_name,
        len(regions),
        entry.captions,
        key=entry.key,
        tar=entry.tar or None,
        offset=offset,
        size=length,
        height=height,
        width=width,
        reason=reason,
        unreadable=size is None,
        concepts=max((len(region.concept_ids) for region in regions), default=0),
    )


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
