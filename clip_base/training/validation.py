"""Evaluation of retrieval and zero-shot classification during training."""

# N images, M texts, D embedding size, R resolution
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.sources import SOURCES, Pair, Pairs
from clip_base.evaluation.datasets import folder_images
from clip_base.evaluation.likelihood import PromptScorer
from clip_base.evaluation.prompts import classifier, read_templates
from clip_base.evaluation.ranking import ranks_of_best, ranks_of_classes, require_finite
from clip_base.evaluation.retrieval import embed_texts, recall_at
from clip_base.images.decode import Stored, decode_stored, normalize
from clip_base.images.preprocess import square_view
from clip_base.jobs.config import Plugin, build_plugin, option, plugin
from clip_base.jobs.run import files_of, hashes_of
from clip_base.jobs.skipped import MAX_SKIPPED, require_present, require_usable
from clip_base.models.clip import CLIP
from clip_base.models.predictor import TextPredictor
from clip_base.runtime.errors import InputError, note
from clip_base.storage.hashing import text_hash

_THREADS = 2


@dataclass
class ValidationConfig:
    """What is measured every `train.evaluate_every` steps and at the end."""

    source: Plugin = plugin(SOURCES, "none", "image-text pairs to measure retrieval on; none: not measured")
    images: str = option(
        "", "folder with one subfolder of images per class, for zero-shot accuracy; empty: none"
    )
    templates: str = option("simple", "prompts: published (CLIP's 80), simple (one) or a file of them")
    limit: int = option(5000, "maximum number of pairs and of images, spread evenly over all; 0: all")
    batch_size: int = option(128, "images or texts embedded at once", runtime_only=True)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.limit < 0:
            raise InputError("evaluate.batch_size must be at least 1 and evaluate.limit at least 0")

    def identity(self) -> str:
        """Returns a hash of what decides the figures; "" when nothing is measured."""
        if self.source["name"] == "none" and not self.images:
            return ""
        options = {key: value for key, value in asdict(self).items() if key != "batch_size"}
        files = hashes_of(files_of(self, "source", "templates"))
        return text_hash([json.dumps(options, sort_keys=True), json.dumps(files, sort_keys=True)])


class Validation:
    """Measures a model on data that it is not trained on; called with the step, it returns the figures.

    Args:
        config: what is measured.
        model: the model in training, in evaluation mode whenever this is called.
    """

    def __init__(self, config: ValidationConfig, model: CLIP | TextPredictor) -> None:
        self.config, self.model = config, model
        self.pairs: list[Pair] = []
        if config.source["name"] != "none":
            pairs = build_plugin(SOURCES, config.source).pairs()
            self.pairs = _usable(pairs, spread_over(len(pairs), config.limit))
            require_present([pair.image for pair in self.pairs], MAX_SKIPPED, "evaluate.source")
        self.names: list[str] = []
        if config.images:
            self.names, examples = folder_images(config.images)
            self.examples = [examples[index] for index in spread_over(len(examples), config.limit)]
            self.templates = read_templates(config.templates)

    def __bool__(self) -> bool:
        return bool(self.pairs or self.names)

    def __call__(self, step: int) -> dict[str, float]:
        """Returns shares in [0, 1]: `val_{image_to_text,text_to_image}_R@1`, `val_zeroshot_top1`.

        Raises:
            InputError: an embedding is not finite.
            JobError: too few of the images decode.
        """
        figures: dict[str, float] = {}
        source = f"the model at step {step}"
        if self.pairs:
            figures |= self._retrieval(source)
        if self.names:
            figures["val_zeroshot_top1"] = self._zeroshot(source)
        return figures

    def _retrieval(self, source: str) -> dict[str, float]:
        assert isinstance(self.model, CLIP)
        images, kept = self._embed_images([pair.image for pair in self.pairs], self._embed)  # [N, D]
        require_finite(images, "images", self.model, source)
        captions = [(place, text) for place, index in enumerate(kept) for text in self.pairs[index].captions]
        texts = embed_texts(self.model, [text for _, text in captions], self.config.batch_size)  # [M, D]
        require_finite(texts, "captions", self.model, source)
        owner = torch.tensor([place for place, _ in captions], device=images.device)
        found = recall_at(images, texts.to(images.device), owner, (1,))
        return {f"val_{name}": value for name, value in found.items()}

    def _zeroshot(self, source: str) -> float:
        paths = [example.path for example in self.examples]
        if isinstance(self.model, TextPredictor):
            scorer = PromptScorer(self.model, self.names, self.templates, truncate=True)
            scores, kept = self._embed_images(paths, scorer)  # [N, C]
            require_finite(scores, "images", self.model, source)
            right = F.one_hot(torch.tensor([self.examples[index].label for index in kept]), len(self.names))
            return float((ranks_of_best(scores, right.bool().to(scores.device)) < 1).double().mean())
        directions = classifier(self.model, self.names, self.templates, self.config.batch_size, truncate=True)
        require_finite(directions, "class names", self.model, source)
        images, kept = self._embed_images(paths, self._embed)  # [N, D]
        require_finite(images, "images", self.model, source)
        labels = torch.tensor([self.examples[index].label for index in kept], device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            return float((ranks_of_classes(images, directions, labels) < 1).double().mean())

    def _embed(self, pixels: Tensor) -> Tensor:
        """Returns [B, D], unit length."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def _embed_images(
        self, images: Sequence[Stored], embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[int]]:
        """Returns [N, D] of `embed`, and which images they are: those that do not decode are left out."""
        side = self.model.visual.resolution

        def load(image: Stored) -> Tensor | str:
            try:
                pixels = square_view(decode_stored(image, least=2 * side), side)  # [R, R, 3]
            except InputError as error:
                return str(error)
            return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, R, R]

        features: list[Tensor] = []
        kept: list[int] = []
        reasons: list[str] = []
        size, device = self.config.batch_size, next(self.model.parameters()).device
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(images), size):
                loaded = list(pool.map(load, images[start : start + size]))
                kept += [start + place for place, pixels in enumerate(loaded) if isinstance(pixels, Tensor)]
                whole = [pixels for pixels in loaded if isinstance(pixels, Tensor)]
                reasons += [pixels for pixels in loaded if isinstance(pixels, str)]
                if whole:
                    features.append(embed(normalize(torch.stack(whole).to(device))))
        require_usable(reasons, len(images), MAX_SKIPPED, what="images to evaluate on")
        if reasons:
            note(
                f"{len(reasons):,} of {len(images):,} images to evaluate on are skipped, the first: "
                f"{reasons[0]}"
            )
        return torch.cat(features), kept


def _usable(pairs: Pairs, indices: list[int]) -> list[Pair]:
    """Returns some of the pairs, without those that have no caption, whose number is noted."""
    found, reasons = [], []
    for index in indices:
        try:
            found.append(pairs[index])
        except InputError as error:
            reasons.append(str(error))
    require_usable(reasons, len(indices), MAX_SKIPPED, what="pairs to evaluate on")
    if reasons:
        note(
            f"{len(reasons):,} of {len(indices):,} pairs to evaluate on are skipped, the first: {reasons[0]}"
        )
    return found


def spread_over(size: int, limit: int) -> list[int]:
    """Returns at most `limit` numbers below `size`, evenly spread; all of them when `limit` is 0."""
    if not limit or size <= limit:
        return list(range(size))
    return [place * size // limit for place in range(limit)]
