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
from clip_base.runtime.errors import InputError

__all__ = ["CLIP", "CLIPConfig", "TextConfig", "VisionConfig", "from_openai_names", "to_openai_names"]

NO_TEXT_TOWER = (
    "these weights have no text tower to embed names: give text_weights=FILE, a CLIP with the same one "
    "(OpenAI's, or the pretrained RegionCLIP that the detector started from), or embeddings=FILE, as "
    "`regionclip embed` writes it with the model whose texts they were trained for"
)
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


class NoTextTowerError(InputError, AttributeError):
    """A text tower was asked for where there is none; `hasattr` is then false."""


class ImageTower(CLIP):
    """A CLIP whose file has no text tower: it embeds images, in the space of another model's texts."""

    def __init__(self, config: CLIPConfig) -> None:
        place = torch.get_default_device()
        with torch.device("meta"):  # no time is spent on random numbers that the file replaces
            super().__init__(config)
        del self.text
        if place.type != "meta":
            self.to_empty(device=place)

    @classmethod
    def of(cls, clip: CLIP, config: CLIPConfig) -> ImageTower:
        """Returns a CLIP's vision tower and logit scale without its text tower.

        Args:
            clip: its tower is taken, not copied.
            config: the CLIP's, with the embedding size that the tower has now.
        """
        tower = cls(config)
        tower.visual, tower.logit_scale = clip.visual, clip.logit_scale
        return tower

    def with_text_of(self, donor: CLIP) -> CLIP:
        """Returns a whole CLIP of this vision tower and another's text tower.

        Args:
            donor: embeds texts in the space that this tower embeds images in.

        Raises:
            InputError: its embeddings have another size.
        """
        wanted, found = self.config.embed_dim, donor.config.embed_dim
        if wanted != found:
            raise InputError(
                f"the text tower embeds names in {found} numbers, these weights images in {wanted}"
            )
        with torch.device("meta"):
            whole = CLIP(CLIPConfig(wanted, self.config.vision, donor.config.text, donor.config.activation))
        whole.visual, whole.text, whole.logit_scale = self.visual, donor.text, self.logit_scale
        return whole.train(self.training)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Raises an InputError that says how to come by embeddings of names."""
        raise NoTextTowerError(NO_TEXT_TOWER)

    def __getattr__(self, name: str) -> Any:
        """Returns a part; of the text tower there is none."""
        if name == "text":
            raise NoTextTowerError(NO_TEXT_TOWER)
        return super().__getattr__(name)


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
