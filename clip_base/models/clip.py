"""CLIP: a vision tower and a text tower with a shared embedding space (arXiv 2103.00020)."""

# B images, N texts, T token positions, D embedding size
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.decoder import CaptionDecoder
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.text import BagOfWordsTower, TextTower, make_text_tower
from clip_base.models.transformer import Transformer
from clip_base.models.vit import VisionTransformer

__all__ = ["CLIP", "CLIPConfig", "TextConfig", "VisionConfig", "from_openai_names", "to_openai_names"]

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
_TEXT_ROOTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
# Numbers beside the weights in OpenAI's archives; the weights' shapes say the same.
_OPENAI_NOTES = ("input_resolution", "context_length", "vocab_size")
VisionTower = ModifiedResNet | VisionTransformer


class CLIP(nn.Module):
    """Both towers and the temperature between them.

    Attributes:
        config: what it was built from.
        visual: the vision tower.
        text: the text tower.
        logit_scale: scalar, natural logarithm of the factor on the cosine; starts at ln(1 / 0.07).
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual: VisionTower = make_vision_tower(config)
        self.text: TextTower | BagOfWordsTower = make_text_tower(
            config.text, config.embed_dim, config.activation
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    # openai/CLIP's names of the text tower's parts; code reads them, and sets them, on the model itself.
    # A bag of words has only the first and the last of them; asking for another is an AttributeError.
    @property
    def token_embedding(self) -> nn.Embedding:
        """[vocab_size, width]: a row for each token id."""
        return self.text.token_embedding

    @property
    def positional_embedding(self) -> nn.Parameter:
        """[context_length, width], added to the tokens' embeddings."""
        return cast(TextTower, self.text).positional_embedding

    @property
    def transformer(self) -> Transformer:
        """The text tower's blocks: [T, B, width] to the same; a token sees only those before it."""
        return cast(TextTower, self.text).transformer

    @property
    def ln_final(self) -> nn.LayerNorm:
        """The layer norm after the blocks."""
        return cast(TextTower, self.text).ln_final

    @property
    def text_projection(self) -> nn.Parameter:
        """[width, D], multiplied from the right."""
        return self.text.text_projection

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a part of the text tower there, so that it is stored once, under this package's name."""
        if name in _TEXT_ROOTS:
            setattr(self.text, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes openai/CLIP's (and open_clip's) names too, wherever the model is part of another."""
        own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        renamed = from_openai_names({name.removeprefix(prefix): value for name, value in own.items()})
        for name in own:
            del state_dict[name]
        state_dict.update({prefix + name: value for name, value in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def map_tower(self) -> ModifiedResNet | None:
        """The vision tower where its head pools any part of its trunk's map; None for a ViT."""
        return self.visual if isinstance(self.visual, ModifiedResNet) else None

    @property
    def context_length(self) -> int:
        """Token positions of a text, as openai/CLIP's attribute of that name."""
        return self.config.text.context_length

    @property
    def vocab_size(self) -> int:
        """Token ids, as openai/CLIP's attribute of that name."""
        return self.config.text.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type, as openai/CLIP's attribute of that name."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns [B, D] image embeddings, not normalized, of [B, 3, H, W] normalized pixels."""
        features: Tensor = self.visual(pixels)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns [N, D] text embeddings, not normalized, of [N, T] int64 token ids."""
        features: Tensor = self.text(tokens)
        return features

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines times exp(logit_scale): [B, N] a row per image, and [N, B] a row per text."""
        images = F.normalize(self.encode_image(pixels), dim=-1)
        texts = F.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp().to(images.dtype) * images @ texts.T
        return logits, logits.T


def make_vision_tower(config: CLIPConfig) -> VisionTower:
    """Returns the vision tower that a config asks for, with random weights."""
    if config.vision.kind == "resnet":
        return ModifiedResNet(config.vision, config.embed_dim)
    return VisionTransformer(config.vision, config.embed_dim, config.activation)


def set_checkpointing(module: nn.Module, enabled: bool = True) -> None:
    """Makes every tower below `module` save memory by recomputing blocks in the backward pass, or stop."""
    for part in module.modules():
        if isinstance(part, ModifiedResNet | Transformer | CaptionDecoder):
            part.checkpointing = enabled


def from_openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames openai/CLIP's (and open_clip's) state dict to ours: text keys get the prefix `text.`.

    The three scalars that OpenAI's archives carry beside the weights are dropped; every other key is kept.
    """
    return {
        f"text.{name}" if name.split(".")[0] in _TEXT_ROOTS else name: value
        for name, value in state.items()
        if name not in _OPENAI_NOTES
    }


def to_openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames our state dict to openai/CLIP's (and open_clip's) names."""
    return {name.removeprefix("text."): value for name, value in state.items()}
