"""The protocol of teachers, which packages declare in the group `regionclip.teachers`.

A teacher is a `TeacherModel`: it embeds square images and texts in one space, and says how a cosine becomes
a probability. How regions are cut out of images and embedded is the same for all of them; see
`regionclip.models.teachers.regions`.
"""

# B images, n crops, N regions or texts, C names, T token positions, D embedding size, S side of the input,
# g side of the grid of patches
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN
from clip_base.jobs import plugins
from clip_base.jobs.config import Plugin, build_plugin
from clip_base.runtime.errors import InputError
from regionclip.structures.regions import Regions

GROUP = "regionclip.teachers"
CLIP_BACKEND = "clip"  # the one of this package
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Score:
    """How a teacher turns a cosine into a probability.

    Attributes:
        scale: factor on the cosine, above 0; CLIP ends its training near 100.
        bias: added to the scaled cosine, whose sigmoid is the probability of each name by itself (SigLIP,
            arXiv 2303.15343); None: a softmax over all names (CLIP).
    """

    scale: float
    bias: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"a teacher's factor on the cosines must be above 0, found {self.scale}")

    @property
    def temperature(self) -> float:
        """What cosines are divided by."""
        return 1 / self.scale

    def with_temperature(self, temperature: float) -> Score:
        """Returns the same kind of score at another temperature; 0 leaves the teacher's own."""
        return Score(1 / temperature, self.bias) if temperature else self

    def probabilities(self, cosines: Tensor) -> Tensor:
        """Returns [N, C] probabilities of cosines [N, C]; see `probabilities_of`."""
        return probabilities_of(cosines, self.temperature, self.bias)


def probabilities_of(cosines: Tensor, temperature: float, bias: float | None) -> Tensor:
    """Returns [N, C] probabilities of names, whose rows sum to at most 1.

    Args:
        cosines: [N, C].
        temperature: what the cosines are divided by.
        bias: None: a softmax, whose rows sum to 1. Else each name is decided by itself, by the sigmoid of the
            cosine / temperature + bias; where the decisions of a region sum to more than 1 they are divided
            by the sum, so that a region is one thing, and else the rest is what matches no name.
    """
    if bias is None:
        return (cosines.float() / temperature).softmax(1)
    alone = torch.sigmoid(cosines.float() / temperature + bias)  # [N, C]
    return alone / alone.sum(1, keepdim=True).clamp(min=1)


class RegionEmbedder(Protocol):
    """Embeds regions of images.

    Attributes:
        visual: the module with the weights, to be moved to a device.
    """

    @property
    def visual(self) -> nn.Module:
        """The module with the weights."""
        ...

    def __call__(self, images: ImageBatch, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of the regions."""
        ...


@dataclass(frozen=True)
class RegionView:
    """How a teacher sees regions.

    Attributes:
        mode: "crop", "dense" or "roi_align", see `regionclip.models.region_encoder`; or "mixed", see
            `regionclip.models.teachers.mixed`.
        context: crop: side of the crop as a multiple of the box's longer side.
        scale: factor on the images' size, of modes that look at whole images.
        region_head: roi_align: which head pools a ResNet's map.
        crop_below: mixed: regions whose longer side is shorter, in pixels of the scaled image, are cropped.
    """

    mode: str = "crop"
    context: float = 1.2
    scale: float = 1.0
    region_head: str = "per_region"
    crop_below: float = 32.0


class TeacherModel(nn.Module):
    """A frozen image-text model. A subclass takes `config`, its options, and `weights`, what `weights=` says.

    Attributes:
        resolution: S, side in pixels of the square images that it was trained on.
        stride: pixels from one patch to the next; 0: it has no patch embeddings, and no mode "dense".
        mean: of each color channel, in [0, 1], which its preprocessing subtracts.
        deviation: what that is divided by.
        interpolation: filter of its preprocessing: "bicubic" or "bilinear".
        score: how its cosines become probabilities.
    """

    resolution: int
    stride: int = 0
    mean: tuple[float, float, float] = MEAN
    deviation: tuple[float, float, float] = DEVIATION
    interpolation: str = "bicubic"
    score: Score

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns [n, D] embeddings of [n, 3, S, S] pixels, normalized with its own mean and deviation."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_image")

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Returns [B, D, g, g]: for each patch of [B, 3, S, S] an embedding in the space of the images."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_patches, as its stride is not 0")

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """Returns [N, T] int64, what `encode_text` takes; a text that is too long is a ValueError, or cut."""
        raise NotImplementedError(f"{type(self).__name__} must define tokenize")

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns [N, D] embeddings of tokens [N, T]."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_text")

    def region_embedder(self, view: RegionView) -> RegionEmbedder:
        """Returns what embeds regions; a teacher with ways of its own defines it anew.

        Raises:
            InputError: the teacher cannot see regions that way.
        """
        from regionclip.models.teachers.regions import TeacherRegions  # noqa: PLC0415

        return TeacherRegions(self, view)


def load_teacher(backend: Plugin, weights: str) -> TeacherModel:
    """Returns a frozen teacher in evaluation mode.

    Args:
        backend: name in `regionclip.teachers`, or an import path, and its options.
        weights: what the backend reads: a file, a folder, or a name.

    Raises:
        InputError: there is no such backend, its package is missing, or it cannot read the weights.
    """
    teacher = build_plugin(GROUP, backend, weights=weights)
    if not isinstance(teacher, TeacherModel):
        raise TypeError(f"{GROUP}: {backend['name']!r} makes a {type(teacher).__name__}, no TeacherModel")
    if teacher.interpolation not in INTERPOLATIONS:
        raise InputError(
            f"backend.name={backend['name']}: interpolation {teacher.interpolation!r} is not one of "
            f"{', '.join(INTERPOLATIONS)}"
        )
    return teacher.eval().requires_grad_(False)


def known_backends() -> list[str]:
    """Returns the names of all backends that are installed."""
    return sorted(plugins.found(GROUP))
