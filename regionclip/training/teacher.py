"""Frozen towers within a training step: the teacher that mined, and what a tower makes of regions."""

# n regions, C concepts of the pool, D embedding size
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.vit import VisionTransformer
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.region_heads import KEY, PerRegionHead
from regionclip.models.teachers.base import RegionEmbedder, RegionView, Score, load_teacher
from regionclip.models.teachers.identity import require_mined_by
from regionclip.structures.regions import Regions


@dataclass(frozen=True)
class Teacher:
    """A frozen tower that names regions within the step.

    Attributes:
        encoder: embeds regions as mining did.
        score: how cosines become probabilities over the pool.
        concepts: [C, D] of the pool, by its own text tower; None: the student's are in its space.
    """

    encoder: RegionEmbedder
    score: Score
    concepts: Tensor | None = None
    NEEDS: ClassVar = (
        "teacher",
        *(f"config.{key}" for key in ("weights", "teacher", "context", "teacher_scale", "temperature")),
    )

    @classmethod
    def from_manifest(cls, weights: str, manifest: dict[str, Any], pool: Vocabulary | None = None) -> Teacher:
        """Returns the teacher as a folder of shards was mined with it.

        Args:
            weights: the teacher's, as it was mined with.
            manifest: the folder's.
            pool: the concepts as it was mined with; None: the student's are the same.

        Raises:
            InputError: the file is not the one that mined.
        """
        backend, mined = require_mined_by(weights, manifest), manifest["config"]
        teacher = load_teacher(backend, weights)
        head = manifest.get(KEY, PerRegionHead.kind)
        scale, below = float(mined["teacher_scale"]), float(mined.get("crop_below", RegionView.crop_below))
        view = RegionView(mined["teacher"], mined["context"], scale, head, below)
        score = teacher.score.with_temperature(mined["temperature"])
        return cls(teacher.region_embedder(view), score, None if pool is None else pool.embeddings)


def frozen(visual: ModifiedResNet | VisionTransformer) -> ModifiedResNet | VisionTransformer:
    """Returns the tower in evaluation mode, its weights without gradients."""
    visual.eval().requires_grad_(False)
    return visual


def seen_by(encoder: RegionEmbedder, images: ImageBatch, regions: Regions) -> Tensor:
    """Returns [n, D], what a frozen tower makes of regions."""
    encoder.visual.to(images.pixels.device)
    with torch.no_grad():
        return encoder(images, regions)
