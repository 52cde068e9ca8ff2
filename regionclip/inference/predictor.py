"""The Python interface of a detector: reads and batches images, embeds names."""

# B images, N regions, C names, D embedding size
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.images.decode import Pixels
from clip_base.images.inputs import ImageLike, read_image
from clip_base.jobs.config import Plugin
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast, pick_device
from clip_base.runtime.progress import track
from regionclip.checkpoints.load import load_detector, look_for, vocabulary_for
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.batches import (
    DecodedImage,
    LoadedBatch,
    ReadGroup,
    batch_of,
    read_batches,
    read_upright,
)
from regionclip.data.categories import check_names, parse_names
from regionclip.inference.arguments import (
    Boxes,
    Images,
    boxes_in,
    described_image,
    required_several,
    several_of,
)
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.student import StudentConfig
from regionclip.proposals.base import Proposer, build_proposer
from regionclip.structures.detections import Detections
from regionclip.structures.regions import Regions, whole_images
from regionclip.structures.transforms import ResizeConfig

Names = str | Path | Sequence[str] | Vocabulary


def load(
    weights: str | Path,
    vocabulary: Names | None = None,
    *,
    proposer: Plugin | str | Path | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    resize: ResizeConfig | None = None,
    config: DetectorConfig | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    embeddings: str = "",
    text_weights: str = "",
    region_head: str = "auto",
    compile: bool = False,
    multi_label: bool = False,
    student: str = "auto",
) -> Predictor:
    """Loads a detector, or a CLIP to detect with, ready for images.

    Args:
        weights: a detector's file (ours or RegionCLIP's), a CLIP's in any known format, or a published name.
        vocabulary: what to look for: "cat, dog", a list of names, a file with one per line, coco, coco65,
            lvis, or a Vocabulary. None: set it later.
        proposer: proposer of regions: the file of a proposal network, or a proposer's name with its
            options, such as {"name": "grid"}. None: the detector's own network.
        device: "auto" takes a GPU when there is one.
        precision: "auto" takes bf16 where the processor computes in it; "fp32", "bf16", or "fp16" on a GPU.
        resize: size at which images are seen; None: as the detector was trained, else 800 / 1333 pixels.
        config: how regions become detections; None: as the detector was trained, else the defaults.
        templates: prompts for the text tower, averaged; `{}` is the name, `{article}` "a" or "an".
        embeddings: file of the names' embeddings, such as RegionCLIP's `.pth`; "": names are embedded.
        text_weights: CLIP whose text tower embeds names, for RegionCLIP's detectors, which have none.
        region_head: a ResNet CLIP: "per_region" runs layer4 on each region, "shared" once per image; "auto":
            as the weights were trained, else per_region.
        compile: compiles a ResNet's trunk with torch.compile; pays off for many images of one size.
        multi_label: returns a region under every name that it scores with, not under its best alone.
        student: the frozen CLIP that is combined with a detector: "auto", the one in its file if training
            kept it there; "none"; or the file of the CLIP that the detector was trained from.

    Raises:
        InputError: a file is missing, damaged or does not fit; there is no such device or precision, or no
            way to the names' embeddings.
    """
    place_ = pick_device(str(device))
    detector = load_detector(
        str(weights),
        config,
        resize,
        use_checkpoint_config=False,
        text_weights=text_weights,
        region_head=region_head,
        student=StudentConfig(student),
    ).to(place_)
    source: Proposer | None = None
    if proposer is not None:
        spec = proposer if isinstance(proposer, dict) else {"name": "rpn", "weights": str(proposer)}
        source = build_proposer(spec, place_)
    if compile:
        detector.compile_trunks()
    predictor = Predictor(detector, source, precision, templates, multi_label)
    if vocabulary is not None:
        predictor.set_vocabulary(vocabulary, embeddings)
    return predictor


class Predictor:
    """Finds and describes things in images.

    An image is a file's path, a PIL image, an array [H, W, 3] (RGB), [H, W, 4] or [H, W], or a tensor with
    the channels first; numbers are uint8, or floating in [0, 1]. Several images are a list, a tuple or an
    iterator, an array [B, H, W, 3] or tensor [B, 3, H, W], a folder, or a pattern such as "photos/*.jpg".

    Boxes are (x1, y1, x2, y2) in pixels of the image as it is given, rotated by its EXIF orientation. What is
    returned is on the CPU.

    Args:
        detector: in evaluation mode, on its device.
        proposer: proposer of regions; None: the detector's own network.
        precision: one of `clip_base.runtime.precision.PRECISIONS`.
        templates: prompts for new names.
        multi_label: see `load`.
    """

    def __init__(
        self,
        detector: Detector,
        proposer: Proposer | None,
        precision: str = "auto",
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        multi_label: bool = False,
    ) -> None:
        self.detector, self.proposer, self.multi_label = detector, proposer, multi_label
        self.precision, self.templates = precision, tuple(templates)
        autocast(precision, self.device)  # raises here and not at the first image

    def __repr__(self) -> str:
        names = self.names
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"Predictor(on {self.device}, looks for {shown or 'nothing yet'})"

    @property
    def resize(self) -> ResizeConfig:
        """The size at which it sees images."""
        return self.detector.resize

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.detector.classifier.device

    @property
    def names(self) -> tuple[str, ...]:
        """What it looks for."""
        vocabulary = self.detector.vocabulary
        return () if vocabulary is None else vocabulary.names

    def set_vocabulary(self, names: Names, embeddings: str = "") -> None:
        """Makes it look for other things from now on.

        Args:
            names: see `load`.
            embeddings: file of the names' embeddings; "": the text tower embeds them.

        Raises:
            InputError: no name, repeated names, or embeddings that do not fit.
        """
        if isinstance(names, Vocabulary):
            if embeddings:
                raise InputError(f"a Vocabulary has its own embeddings; omit embeddings={embeddings}")
            with autocast(self.precision, self.device):
                look_for(self.detector, names, self.templates, own_words=True, multi_label=self.multi_label)
            return
        words = parse_names(str(names)) if isinstance(names, str | Path) else list(names)
        if not all(isinstance(word, str) for word in words):
            raise InputError(
                f"names must be strings, got {next(w for w in words if not isinstance(w, str))!r}"
            )
        check_names(words)
        with autocast(self.precision, self.device):
            vocabulary = vocabulary_for(self.detector, words, words, self.templates, embeddings=embeddings)
            look_for(self.detector, vocabulary, self.templates, own_words=True, multi_label=self.multi_label)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Returns [C, D] float32 unit-length embeddings of names, in the space of its regions and images.

        Args:
            texts: C distinct names, which go into the prompts and are averaged over them.

        Raises:
            InputError: no name, repeated ones, or weights without a text tower.
        """
        words = [texts] if isinstance(texts, str) else list(texts)
        clip = self.detector.clip
        with autocast(self.precision, self.device):
            return embed(clip, Tokenizer(clip.config.text.context_length), words, self.templates).embeddings

    def detect(self, image: ImageLike, score: float = 0.0) -> Detections:
        """Finds what the vocabulary names in one image.

        Args:
            image: one image in any of the forms that the class knows.
            score: detections that score less, in [0, 1], are left out.

        Returns:
            Its detections, best first.

        Raises:
            InputError: several images were given, the image does not decode or is of no known format, no
                vocabulary is set, or a CLIP was given no proposer.
        """
        if several_of(image) is not None:
            raise InputError(
                f"detect takes one image, but {described_image(image)} is several; call detect_many for a "
                "list of their detections, or iter_detect for an iterator"
            )
        (found,) = self.detect_batch([read_image(image)])
        return found.with_min_score(score)

    def detect_many(self, images: Images, score: float = 0.0, batch_size: int = 8) -> list[Detections]:
        """Finds what the vocabulary names in several images, and shows how far it is.

        Args:
            images: several images in any of the forms that the class knows.
            score: detections that score less, in [0, 1], are left out.
            batch_size: most images at once.

        Returns:
            The detections of each image; a folder's or a pattern's in the order of the files' names.

        Raises:
            InputError: one image was given or none, an image does not decode or is of no known format, no
                vocabulary is set, or a CLIP was given no proposer.
        """
        several = required_several(images)
        total = len(several) if isinstance(several, Sized) else None
        return list(track(self.iter_detect(several, score, batch_size), "detecting", total))

    def iter_detect(self, images: Images, score: float = 0.0, batch_size: int = 8) -> Iterator[Detections]:
        """Returns an iterator over the images' detections: for more images than fit into memory.

        Args:
            images: see `detect_many`; they are read as they are needed.
            score: detections that score less, in [0, 1], are left out.
            batch_size: most images at once.

        Raises:
            InputError: see `detect_many`.
        """
        self._check_ready()
        groups = self._read(required_several(images), batch_size)
        return (
            found.with_min_score(score) for group in groups for _, _, found in group.map(self.detect_loaded)
        )

    def detect_batch(
        self, images: Sequence[tuple[Pixels, tuple[int, int]]], first: int = 0
    ) -> list[Detections]:
        """Returns the detections in decoded images, which are padded to one size.

        Args:
            images: pixels [H, W, 3], and the (height, width) in which boxes are wanted.
            first: the first image's id, for proposers that look boxes up; the others count on.

        Raises:
            InputError: no vocabulary is set, or a CLIP was given no proposer.
        """
        decoded = [DecodedImage(image_id, *image) for image_id, image in enumerate(images, first)]
        return self.detect_loaded(batch_of(decoded, self.resize, self.device))

    def detect_loaded(self, batch: LoadedBatch[Any]) -> list[Detections]:
        """Returns the detections in a batch of `read_batches`; see `detect_batch`."""
        self._check_ready()
        with torch.no_grad(), autocast(self.precision, self.device):
            return self.detector.detect_batch(batch.images, batch.transforms, batch.infos, self.proposer)

    def _check_ready(self) -> None:
        if self.detector.vocabulary is None:
            raise InputError("no names to detect; give vocabulary= or call set_vocabulary first")
        if self.proposer is None and self.detector.network is None:
            raise InputError("a CLIP has no proposal network; load it with proposer={'name': 'grid'}, say")

    def region_features(self, image: ImageLike, boxes: Boxes) -> Tensor:
        """Returns [N, D] float32 unit-length embeddings of regions, in the space of CLIP's texts.

        Args:
            image: one image.
            boxes: [N, 4] (x1, y1, x2, y2) in its pixels; what lies outside the image is cut off.

        Raises:
            InputError: the image does not decode, or a box covers nothing of it.
        """
        return self._embed(*self._regions(image, boxes))

    def _regions(self, image: ImageLike, boxes: Boxes) -> tuple[ImageBatch, Regions]:
        pixels, size = read_image(image)
        given = boxes_in(boxes, size)
        batch = batch_of([DecodedImage(0, pixels, size)], self.resize, self.device)
        index = torch.zeros(len(given), dtype=torch.int64)
        regions = Regions(batch.transforms[0].apply_boxes(given), index)
        return batch.images, regions.to(self.device)

    def image_features(self, images: ImageLike | Images, batch_size: int = 8) -> Tensor:
        """Returns [B, D] float32 unit-length embeddings of whole images: one row for each, also of one image.

        Args:
            images: one image or several, in any of the forms that the class knows.
            batch_size: most images at once.

        Raises:
            InputError: an image does not decode or is of no known format, or there are none.
        """

        def embed(batch: LoadedBatch[Any]) -> list[Tensor]:
            return list(self._embed(batch.images, whole_images(batch.images)))

        alone: list[Any] = [images]
        several = several_of(images)
        groups = self._read(alone if several is None else several, batch_size)
        return torch.stack([row for group in groups for _, _, row in group.map(embed)])

    def classify_regions(self, image: ImageLike, boxes: Boxes, k: int = 5) -> list[list[tuple[str, float]]]:
        """Returns for each region its k most probable names with their probabilities, best first.

        With a student, its probabilities are combined with the detector's, and all of them sum to 1 again.

        Args:
            image: one image.
            boxes: [N, 4] (x1, y1, x2, y2) in its pixels.
            k: how many names; all of them when there are fewer.

        Raises:
            InputError: the image does not decode, a box covers nothing of it, or no vocabulary is set.
        """
        images, regions = self._regions(image, boxes)
        probabilities = self._probabilities(self._embed(images, regions), k)
        if self.detector.asks_student and len(probabilities):
            with torch.no_grad(), autocast(self.precision, self.device):
                found = self.detector.combined(probabilities.to(self.device), images, regions).float().cpu()
            probabilities = found / found.sum(1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
        return self._best(probabilities, k)

    def classify_embeddings(self, features: Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """Returns for each embedding its k most probable names with their probabilities, best first.

        A student, which would need the image, is not asked; see `classify_regions`.

        Args:
            features: [N, D], or [D] of one, as `region_features` and `image_features` return them.
            k: how many names; all of them when there are fewer.

        Raises:
            InputError: no vocabulary is set.
            ValueError: features of another width, or k below 1.
        """
        return self._best(self._probabilities(features, k), k)

    def _probabilities(self, features: Tensor, k: int) -> Tensor:
        """Returns [N, C], the detector's own, without a background, for [N, D] or [D] embeddings."""
        if self.detector.vocabulary is None:
            raise InputError("no names to choose from; give vocabulary= or call set_vocabulary first")
        width = self.detector.clip.config.embed_dim
        if features.ndim not in (1, 2) or features.shape[-1] != width or k < 1:
            raise ValueError(
                f"features must be [N, {width}] and k above 0, got {list(features.shape)} and {k}"
            )
        features = features.reshape(-1, width).cpu()
        return self.detector.logits(features, self.detector.classifier.cpu(), False).softmax(1)

    def _best(self, probabilities: Tensor, k: int) -> list[list[tuple[str, float]]]:
        values, labels = probabilities.topk(min(k, len(self.names)), dim=1)
        return [
            [(self.names[label], value) for label, value in zip(row, scores, strict=True)]
            for row, scores in zip(labels.tolist(), values.tolist(), strict=True)
        ]

    def _embed(self, batch: ImageBatch, regions: Regions) -> Tensor:
        with torch.no_grad(), autocast(self.precision, self.device):
            embeddings: Tensor = self.detector.encoder(batch, regions)
        return embeddings.cpu()

    def _read(self, images: Iterable[Any], batch_size: int) -> Iterator[ReadGroup[tuple[int, ImageLike]]]:
        """Yields the batches of images, whose ids count from 0; none at all are an InputError."""
        groups = read_batches(enumerate(images), _read_numbered, self.resize, batch_size, self.device)
        first = next(groups, None)
        if first is None:
            raise InputError("no images were given: the list is empty")
        yield first
        yield from groups


def _read_numbered(item: tuple[int, ImageLike]) -> DecodedImage:
    return read_upright(item[1], item[0])
