"""Image features for the evaluation jobs, cached between runs."""

# N images, K usable ones, R resolution, C channels of the feature
from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clip_base.evaluation.datasets import EvaluationImage, prepare_image
from clip_base.evaluation.ranking import require_finite
from clip_base.images.decode import Decoded, decode_stored, normalize
from clip_base.images.orientation import turned_as_annotated
from clip_base.images.preprocess import square_view
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.skipped import max_skipped_option, require_share, require_usable, write_skipped
from clip_base.models.clip import CLIP
from clip_base.models.configs import ACTIVATIONS
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.runtime.progress import Progress
from clip_base.runtime.workers import in_turn
from clip_base.storage.files import replacing
from clip_base.storage.tars import Member
from clip_base.weights.load import find, load_clip
from clip_base.weights.native import open_safetensors

LAYERS = ("embedding", "penultimate")
_READING = "2"  # of images; to be counted on when other pixels are made of a file than before


@dataclass(kw_only=True)
class FeatureConfig(ComputeOptions):
    """Options of every job that embeds images."""

    weights: str = option(REQUIRED, "weights in any known format, or a published model's name")
    out: str = option(REQUIRED, "folder for metrics and tables", runtime_only=True)
    activation: str = option("", "activation of weights that do not state it", choices=("", *ACTIVATIONS))
    features: str = option(
        "", "folder that caches image features between runs; empty: out/features", runtime_only=True
    )
    batch_size: int = option(64, "images embedded at once", runtime_only=True)
    workers: int = option(2, "threads that decode images", runtime_only=True)
    max_skipped: float = max_skipped_option(0.1, renamed_from="max_broken")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise InputError(f"workers must be at least 1, found {self.workers}")
        require_share(self.max_skipped)


@dataclass(frozen=True)
class Features:
    """What a tower made of images.

    Attributes:
        values: [K, C] float32, not normalized.
        kept: [K] int64, index of each among the images.
        skipped: the images that cannot be used, with the reason.
    """

    values: Tensor
    kept: Tensor
    skipped: list[dict[str, Any]]


class Embedder:
    """Embeds images with one model, and keeps what it has embedded.

    The pixels are those of `Preprocess`: exactly, or of RGB and gray files up to two of 255 levels; see
    `resize_bicubic`.

    Args:
        config: the weights and how to compute.
        out: the run's folder, which keeps the features unless the config names another.
        layer: "embedding", or "penultimate" for what a ViT has before its projection.
    """

    def __init__(self, config: FeatureConfig, out: Path, layer: str = "embedding") -> None:
        self.config, self.layer = config, layer
        self.folder = Path(config.features) if config.features else out / "features"
        self.device = config.pick_device()
        self.path = find(config.weights)

    @functools.cached_property
    def model(self) -> CLIP:
        """The model, read when it is first needed."""
        return load_clip(self.path, self.config.activation).to(self.device)

    def __call__(self, examples: list[EvaluationImage], description: str) -> Features:
        """Returns the features of the images, from the folder when they are there.

        Raises:
            InputError: a feature is not finite; the message names the weights.
        """
        kept = self.folder / f"{self._key(examples)}.safetensors"
        features = _read(kept)
        if features is None:
            features = self.embed(examples, description)
            self.require_finite(features.values, description)
            with replacing(kept) as temporary:
                tensors = {"values": features.values, "kept": features.kept}
                save_file(tensors, temporary, {"skipped": json.dumps(features.skipped)})
        return features

    def require_finite(self, features: Tensor, what: str) -> None:
        """Raises an InputError that names the weights when embeddings of theirs hold NaN or infinity."""
        require_finite(features, what, self.model, self.path)

    def _key(self, examples: list[EvaluationImage]) -> str:
        """Returns a digest of all that the features depend on."""
        digest = hashlib.sha256()
        config = self.config
        model = (str(self.path.absolute()), config.activation, config.precision, self.layer)
        for entry in (*model, _READING):
            digest.update(f"{entry}\n".encode())
        for path in [self.path, *self.path.glob("*")] if self.path.is_dir() else [self.path]:
            digest.update(_stamp(path).encode())
        for example in examples:
            place = f"{identity(example.path)} {example.box} {example.size}\n"
            digest.update(place.encode(errors="surrogateescape"))
        return digest.hexdigest()[:24]

    # Not inference_mode: in it autocast casts the weights again for every batch.
    @torch.no_grad()
    def embed(self, examples: list[EvaluationImage], description: str) -> Features:
        """Returns the features of the images, computed and not cached."""
        config, side = self.config, self.model.visual.resolution
        boxes = any(example.box is not None for example in examples)

        # Boxes are in the pixels of the whole image, which several of them may share.
        @functools.lru_cache(4 * config.workers)
        def whole(path: Path, size: tuple[int, int] | None) -> Decoded:
            return turned_as_annotated(decode_stored(path), path, size)

        def read(example: EvaluationImage) -> Decoded:
            if boxes and isinstance(example.path, Path):
                return whole(example.path, example.size)
            return decode_stored(example.path, 2 * side)

        load = functools.partial(prepare_image, read, functools.partial(_square, side))
        parts: list[Tensor] = []
        kept: list[int] = []
        skipped: list[dict[str, Any]] = []
        start = 0
        with Progress(description, len(examples)) as progress, autocast(config.precision, self.device):
            # A batch is decoded while the one before is embedded.
            decoded = in_turn(load, examples, config.workers, ahead=config.batch_size)
            while loaded := list(itertools.islice(decoded, config.batch_size)):
                usable = [item for item in loaded if isinstance(item, Tensor)]
                if usable:
                    pixels = normalize(torch.stack(usable).to(self.device))  # [B, 3, R, R]
                    parts.append(self._features(pixels).float().cpu())  # [B, C]
                for index, item in enumerate(loaded, start):
                    if isinstance(item, Tensor):
                        kept.append(index)
                    else:
                        example = examples[index]
                        skipped.append({"image": str(example.path), "box": example.box, "reason": item})
                start += len(loaded)
                progress.advance(len(loaded))
        values = torch.cat(parts) if parts else torch.empty(0, 0)
        return Features(values, torch.tensor(kept, dtype=torch.int64), skipped)

    def _features(self, pixels: Tensor) -> Tensor:
        if self.layer == "penultimate":
            return self.model.visual.pooled(pixels)
        return self.model.encode_image(pixels)


def note_skipped(skipped: list[dict[str, Any]], total: int, max_skipped: float, path: Path) -> None:
    """Lists unusable images in `path`; JobError when they are too many of `total`."""
    write_skipped(path, skipped)
    require_usable([entry["reason"] for entry in skipped], total, max_skipped, path)


def _square(side: int, image: Decoded) -> Tensor:
    return torch.from_numpy(square_view(image, side)).permute(2, 0, 1)  # [3, R, R]


def identity(image: Path | Member) -> str:
    """Returns where an image is and when it was written."""
    if isinstance(image, Member):
        return f"{image.tar.absolute()} {image.offset} {image.size} {_stamp(image.tar)}"
    return f"{image.absolute()} {_stamp(image)}"


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _read(path: Path) -> Features | None:
    if not path.exists():
        return None
    with (
        contextlib.suppress(SafetensorError, OSError, KeyError, ValueError),
        open_safetensors(path, "features") as file,
    ):
        skipped = json.loads(file.metadata()["skipped"])
        features = Features(file.get_tensor("values"), file.get_tensor("kept"), skipped)
        if bool(features.values.isfinite().all()):
            return features
    path.unlink()  # damaged: the features are recomputed
    return None
