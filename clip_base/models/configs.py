"""The sizes of CLIP's towers, as dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError

VISION_KINDS = ("resnet", "vit")
TEXT_KINDS = ("transformer", "bow")
ACTIVATIONS = ("quick_gelu", "gelu")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass
class VisionConfig:
    """One vision tower: CLIP's modified ResNet, or a vision transformer (arXiv 2103.00020, section 2.4)."""

    kind: str = option("resnet", "architecture of the tower", choices=VISION_KINDS)
    layers: list[int] = option([3, 4, 6, 3], "blocks: four numbers for a resnet, one for a vit")
    width: int = option(64, "channels after the resnet's stem, or of each vit token")
    patch: int = option(32, "side of a vit's patch in pixels; a resnet has none")
    resolution: int = option(224, "side of the square image in pixels")
    head_width: int = option(64, "channels of one attention head")

    def __post_init__(self) -> None:
        """Checks that the tower can be built."""
        _require(self.kind in VISION_KINDS, f"vision.kind must be resnet or vit, got {self.kind!r}")
        wanted = 4 if self.kind == "resnet" else 1
        _require(
            len(self.layers) == wanted and min(self.layers) > 0,
            f"vision.layers of a {self.kind} must be {wanted} positive number(s), got {self.layers}",
        )
        for name in ("width", "patch", "resolution", "head_width"):
            _require(getattr(self, name) > 0, f"vision.{name} must be above 0, got {getattr(self, name)}")
        step, channels = (32, self.width * 32) if self.kind == "resnet" else (self.patch, self.width)
        _require(
            self.resolution % step == 0,
            f"vision.resolution must be a multiple of {step} for this {self.kind}, got {self.resolution}",
        )
        _require(
            channels % self.heads == 0,
            f"vision.width {self.width} cannot be split into heads of {self.head_width} channels",
        )
        _require(
            self.kind == "vit" or self.width % 2 == 0, f"vision.width of a resnet is even, got {self.width}"
        )

    @property
    def heads(self) -> int:
        """Heads of the resnet's attention pool (32 times `width` channels), or of each vit block."""
        channels = self.width * 32 if self.kind == "resnet" else self.width
        return max(1, channels // self.head_width)


@dataclass
class TextConfig:
    """The text tower: a causal transformer over byte-pair ids, or the mean of their embeddings.

    The pseudo-code of arXiv 2103.00020 (figure 3) names both. A bag of words has neither heads nor blocks:
    both numbers are 0.
    """

    width: int = option(512, "channels of each token")
    heads: int = option(8, "attention heads of each block")
    layers: int = option(12, "transformer blocks")
    context_length: int = option(77, "maximum length of a text in tokens, start and end tokens included")
    vocab_size: int = option(49408, "token ids")
    kind: str = option(
        "transformer",
        "transformer, or bow: the mean of the tokens' embeddings, without heads and layers",
        choices=TEXT_KINDS,
    )

    def __post_init__(self) -> None:
        """Checks that the tower can be built."""
        _require(self.kind in TEXT_KINDS, f"text.kind must be transformer or bow, got {self.kind!r}")
        for name in ("width", "heads", "layers", "vocab_size"):
            value = getattr(self, name)
            if self.kind == "bow" and name in ("heads", "layers"):
                unset = value in (0, type(self).__dataclass_fields__[name].default)
                _require(unset, f"text.{name} does nothing with text.kind=bow, got {value}; omit it")
                setattr(self, name, 0)
            else:
                _require(value > 0, f"text.{name} must be above 0, got {value}")
        _require(
            self.kind == "bow" or self.width % self.heads == 0,
            f"text.width must be a multiple of text.heads, got {self.width} and {self.heads}",
        )
        _require(
            self.context_length >= 2,
            f"text.context_length must hold the start and end token (2), got {self.context_length}",
        )


@dataclass
class CLIPConfig:
    """Both towers and the size of the space they share. The defaults are RN50."""

    embed_dim: int = option(1024, "size of the shared embedding")
    vision: VisionConfig = option(VisionConfig(), "the vision tower")
    text: TextConfig = option(TextConfig(), "the text tower")
    activation: str = option("quick_gelu", "transformers' activation", choices=ACTIVATIONS)

    def __post_init__(self) -> None:
        """Checks what is not one tower's own matter."""
        _require(self.embed_dim > 0, f"embed_dim must be above 0, got {self.embed_dim}")
        _require(
            self.activation in ACTIVATIONS,
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}",
        )
