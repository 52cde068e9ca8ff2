"""Teachers of transformers: CLIP, SigLIP, MetaCLIP 2, ALIGN and other models with image and text features.

Needs the extra `transformers`: pip install 'regionclip[transformers]'.
"""

# B images, n crops, N texts, t patches, C channels of a token, T token positions, D embedding size
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError, quote, shortened
from regionclip.models.teachers.attention import alone, to_grid, values_only
from regionclip.models.teachers.base import Score, TeacherModel

_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers of the filters
_FILTERS = {_BILINEAR: "bilinear", _BICUBIC: "bicubic"}
_LOWER_CASED = ("siglip", "siglip2")  # whose texts were lower-cased in training


@dataclass
class TransformersConfig:
    """Options of transformers' models."""

    revision: str = option("main", "branch, tag or commit of a model on the hub")


class TransformersTeacher(TeacherModel):
    """A model of transformers that has `get_image_features` and `get_text_features`.

    Its preprocessing, tokenizer and score are those of its own files.

    Args:
        config: which revision.
        weights: a folder that `save_pretrained` wrote (model, tokenizer, image processor), or OWNER/NAME on
            the hub.

    Raises:
        InputError: transformers is not installed, the files are missing or damaged, or the model has no
            features of images and texts in one space.
    """

    def __init__(self, config: TransformersConfig, weights: str) -> None:
        super().__init__()
        package, name = _package(), weights.removeprefix("hf://")
        if Path(name).exists() and not Path(name).is_dir():
            raise InputError(
                f"weights={weights} is a file; give the folder with config.json that it is in, with "
                "backend.name=transformers"
            )
        more = {} if Path(name).is_dir() else {"revision": config.revision}
        self.model = _loaded(package.AutoModel, name, **more)
        _require_features(self.model, weights)
        self.tokenizer = _loaded(package.AutoTokenizer, name, **more)
        processor = _loaded(package.AutoImageProcessor, name, **more)
        vision = self.model.config.vision_config
        self.resolution, self.kind = _side(vision, weights), self.model.config.model_type
        self.mean, self.deviation = tuple(processor.image_mean), tuple(processor.image_std)
        self.interpolation = _FILTERS.get(int(processor.resample), "another filter")
        self.score = _score(self.model, weights)
        self.stride = int(vision.patch_size) if self._has_patches() else 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        """See `TeacherModel`."""
        return _features(self.model.get_image_features(pixel_values=pixels))

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """See `TeacherModel`; each patch is pooled as if it were all that the tower saw."""
        tower = self.model.vision_model
        if self._is_siglip():  # what its attention pool takes of a single token is that token's value
            tokens = tower(pixel_values=pixels).last_hidden_state  # [B, t, C]
            return to_grid(tower.head(alone(tokens)).unflatten(0, tokens.shape[:2]))
        with values_only(tower.encoder.layers[-1], "attention_mask", batched=True):
            tokens = tower(pixel_values=pixels).last_hidden_state[:, 1:]
        return to_grid(self.model.visual_projection(tower.post_layernorm(tokens)))

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """See `TeacherModel`."""
        if self.kind in _LOWER_CASED:
            texts = [text.lower() for text in texts]
        length = self._length()
        if not truncate:
            for text in texts:
                count = len(self.tokenizer(text)["input_ids"])
                if count > length:
                    raise ValueError(f"{quote(text)} has {count} tokens, the text tower reads {length}")
        found = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = found["input_ids"]
        return ids

    def encode_text(self, tokens: Tensor) -> Tensor:
        """See `TeacherModel`."""
        mask = {}
        padding, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        # SigLIP's were trained without a mask; of a padding that is the end token no mask can be told, and
        # the causal towers that have it need none.
        if not self._is_siglip() and padding is not None and padding != end:
            mask["attention_mask"] = (tokens != padding).long()
        return _features(self.model.get_text_features(input_ids=tokens, **mask))

    def _is_siglip(self) -> bool:
        return str(self.kind) == "siglip"

    def _has_patches(self) -> bool:
        tower = getattr(self.model, "vision_model", None)
        if self._is_siglip():
            return hasattr(tower, "head")
        return hasattr(self.model, "visual_projection") and hasattr(tower, "post_layernorm")

    def _length(self) -> int:
        positions = getattr(self.model.config.text_config, "max_position_embeddings", 77)
        return int(min(positions, self.tokenizer.model_max_length))


def _package() -> Any:
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"backend.name=transformers needs transformers ({error}); pip install 'regionclip[transformers]'"
        ) from None
    return transformers


def _loaded(kind: Any, name: str, **more: Any) -> Any:
    """Calls `from_pretrained`; whatever it raises becomes an InputError in one line."""
    try:
        return kind.from_pretrained(name, **more)
    except Exception as error:  # of any kind: transformers, torch, the hub's client
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise InputError(f"transformers cannot read {name} ({kind.__name__}): {reason}") from error


def _require_features(model: Any, weights: str) -> None:
    lacking = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    vision = getattr(model.config, "vision_config", None)
    if lacking or vision is None:
        raise InputError(
            f"weights={weights} is a {type(model).__name__}, which has no "
            f"{' and no '.join(lacking) or 'vision_config'}; a teacher embeds images and texts, as CLIPModel "
            "and SiglipModel do"
        )


def _side(vision: Any, weights: str) -> int:
    size = getattr(vision, "image_size", None)
    if not isinstance(size, int):
        raise InputError(
            f"weights={weights} takes images of any size ({type(vision).__name__}); a teacher's are squares "
            "of one size: choose a variant of a fixed resolution"
        )
    return size


def _score(model: Any, weights: str) -> Score:
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    if isinstance(scale, Tensor):
        return Score(float(scale.detach().exp()), None if bias is None else float(bias.detach()))
    temperature = getattr(model, "temperature", None)  # ALIGN's
    if isinstance(temperature, Tensor):
        return Score(1 / float(temperature.detach()))
    raise InputError(
        f"weights={weights}: {type(model).__name__} does not say how cosines become probabilities; it has "
        "no logit_scale"
    )


def _features(found: Any) -> Tensor:
    """Returns [N, D], whichever way a version of transformers returns features."""
    features: Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return features
