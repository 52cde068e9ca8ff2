"""A detector with everything around it: it reads pictures, batches them and takes names as words."""

# B images, N regions, C names, D embedding size
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.batch import ImageBatch
from clip_base.config import Part
from clip_base.data.images import Pixels
from clip_base.errors import InputError
from clip_base.train import autocast, pick_device
from regionclip.class_lists import parse_names
from regionclip.detector import Detector
from regionclip.evaluate import load_any
from regionclip.inference import build_proposer
from regionclip.pictures import Picture, picture_files, read_picture
from regionclip.proposals.base import ImageKey, Proposer
from regionclip.published.loading import vocabulary_for
from regionclip.scoring import DetectorConfig
from regionclip.structures import Detections, Regions, whole_images
from regionclip.transforms import Frame, ResizeConfig, place, to_batch
from regionclip.vocabulary import Vocabulary

TEMPLATES = ("a photo of {article} {}.", "{}")
Names = str | Sequence[str] | Vocabulary


def load(
    weights: str | Path,
    vocabulary: Names | None = None,
    *,
    proposer: Part | str | None = None,
    device: str = "auto",
    precision: str = "auto",
    resize: ResizeConfig | None = None,
    config: DetectorConfig | None = None,
    templates: Sequence[str] = TEMPLATES,
    embeddings: str = "",
    text: str = "",
) -> Predictor:
    """Loads a detector, or a CLIP to detect with, ready for pictures.

    Args:
        weights: a detector's file (ours or RegionCLIP's), a CLIP's in any known form, or a published name.
        vocabulary: what to look for: "cat, dog", a list of names, a file with one a line, coco, coco65, lvis,
            or a Vocabulary. None: set it later.
        proposer: where regions come from: the file of a proposal network, or a proposer's name with its
            options, such as {"name": "grid"}. None: the detector's own network.
        device: "auto" takes a GPU when there is one.
        precision: "auto" takes bf16 where the processor computes in it; "fp32" or "bf16".
        resize: size at which pictures are seen; None: as the detector was trained, else 800 / 1333 pixels.
        config: how regions become detections; None: as the detector was trained, else the defaults.
        templates: prompts for the text tower, averaged; `{}` is the name, `{article}` "a" or "an".
        embeddings: file of the names' embeddings, such as RegionCLIP's `.pth`; "": names are embedded.
        text: CLIP whose text tower embeds names, for RegionCLIP's detectors, which bring none.

    Raises:
        InputError: a file is missing, damaged or does not fit, or there is no way to the names' embeddings.
    """
    place_ = pick_device(device)
    detector = load_any(str(weights), config or DetectorConfig(), config is None, text).to(place_)
    source: Proposer | None = None
    if proposer is not None:
        spec = {"name": "rpn", "weights": proposer} if isinstance(proposer, str) else proposer
        source = build_proposer(spec, place_)
    size = resize or detector.resize or ResizeConfig()
    predictor = Predictor(detector, source, size, precision, templates)
    if vocabulary is not None:
        predictor.set_vocabulary(vocabulary, embeddings)
    return predictor


class Predictor:
    """Finds and describes things in pictures.

    Pictures are paths, PIL images, arrays [H, W, 3] uint8 (RGB) or tensors [3, H, W], uint8 or floating in
    [0, 1]. Boxes are (x1, y1, x2, y2) in pixels of the picture as it is given.

    Args:
        detector: in evaluation mode, on its device.
        proposer: where regions come from; None: the detector's own network.
        resize: size at which pictures are seen.
        precision: "auto", "fp32" or "bf16".
        templates: prompts for new names.
    """

    def __init__(
        self,
        detector: Detector,
        proposer: Proposer | None,
        resize: ResizeConfig,
        precision: str = "auto",
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        self.detector, self.proposer, self.resize = detector, proposer, resize
        self.precision, self.templates = precision, tuple(templates)

    def __repr__(self) -> str:
        names = self.names
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"Predictor(on {self.device}, looks for {shown or 'nothing yet'})"

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
        if not isinstance(names, Vocabulary):
            words = parse_names(names) if isinstance(names, str) else list(names)
            with autocast(self.precision, self.device):
                names = vocabulary_for(self.detector, words, words, self.templates, embeddings=embeddings)
        self.detector.set_vocabulary(names)

    def detect(self, images: Picture | Sequence[Picture], score: float = 0.0, batch_size: int = 8) -> Any:
        """Finds what the vocabulary names.

        Args:
            images: one picture, several, or a folder.
            score: detections that score less are left out.
            batch_size: pictures at once.

        Returns:
            The Detections of a single picture; of several, or of a folder's pictures in the order of their
                names, a list.

        Raises:
            InputError: a picture does not decode, no vocabulary is set, or a CLIP was given no proposer.
        """
        several = _several(images)
        found = list(self.detections([images] if several is None else several, score, batch_size))
        return found[0] if several is None else found

    def detections(
        self, images: Sequence[Any], score: float = 0.0, batch_size: int = 8
    ) -> Iterator[Detections]:
        """Yields the detections of one picture after another: for more of them than fit into memory."""
        for start in range(0, len(images), batch_size):
            pictures = [read_picture(image) for image in images[start : start + batch_size]]
            for found in self.in_pixels(pictures, start):
                yield found.above(score)

    def in_pixels(
        self, pictures: Sequence[tuple[Pixels, tuple[int, int]]], first: int = 0
    ) -> list[Detections]:
        """Returns the detections in a batch of pictures as `read_picture` gives them.

        Args:
            pictures: pixels, and the (height, width) in which boxes are wanted.
            first: the first picture's id, for proposers that look boxes up; the others count on.
        """
        if self.detector.vocabulary is None:
            raise InputError("no names to look for; give vocabulary= or call set_vocabulary first")
        if self.proposer is None and self.detector.network is None:
            raise InputError("a CLIP has no proposal network; load it with proposer={'name': 'grid'}, say")
        batch, frames = self._batch(pictures)
        keys = [ImageKey(first + slot, *frame.original) for slot, frame in enumerate(frames)]
        with torch.no_grad(), autocast(self.precision, self.device):
            return self.detector.detect_batch(batch, frames, keys, self.proposer)

    def region_features(self, image: Picture, boxes: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Returns [N, D] unit-length embeddings of regions of a picture, in the space of CLIP's texts.

        Args:
            image: one picture.
            boxes: [N, 4] (x1, y1, x2, y2) in its pixels.
        """
        batch, (frame,) = self._batch([read_picture(image)])
        given = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        regions = Regions(frame.boxes_in(given), torch.zeros(len(given), dtype=torch.int64))
        return self._embed(batch, regions.to(self.device))

    def image_features(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Returns unit-length embeddings of whole pictures: [D] of one, [B, D] of several."""
        several = _several(images)
        pictures: list[Any] = [images] if several is None else several
        batch, _ = self._batch([read_picture(picture) for picture in pictures])
        features = self._embed(batch, whole_images(batch))
        return features[0] if several is None else features

    def nearest_names(self, features: Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """Returns for each of [N, D] unit-length embeddings its k most probable names, best first."""
        if self.detector.vocabulary is None:
            raise InputError("no names to choose from; give vocabulary= or call set_vocabulary first")
        detector = self.detector
        probabilities = detector.logits(features, detector.classifier.cpu(), False).softmax(1)  # [N, C]
        values, labels = probabilities.topk(min(k, len(self.names)), dim=1)
        return [
            [(self.names[label], value) for label, value in zip(row, scores, strict=True)]
            for row, scores in zip(labels.tolist(), values.tolist(), strict=True)
        ]

    def _embed(self, batch: ImageBatch, regions: Regions) -> Tensor:
        with torch.no_grad(), autocast(self.precision, self.device):
            embeddings: Tensor = F.normalize(self.detector.encoder(batch, regions).float(), dim=-1)
        return embeddings.cpu()

    def _batch(self, pictures: Sequence[tuple[Pixels, tuple[int, int]]]) -> tuple[ImageBatch, list[Frame]]:
        resize, placed, frames = self.resize, [], []
        for pixels, size in pictures:
            resized, frame = place(pixels, resize.short[0], resize.long, filter=resize.filter)
            placed.append(resized)
            frames.append(replace(frame, original=size))
        return to_batch(placed, resize.multiple).to(self.device), frames


def _several(images: Any) -> list[Any] | None:
    """Returns the pictures of a list or a folder; None when one picture is given."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        return list(picture_files([str(images)]))
    return None
