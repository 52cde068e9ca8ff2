"""Inference of a CLIP's sizes from tensor shapes and from config files next to the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clip_base.images.decode import DEVIATION, MEAN
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError, quote

# Widths of vision transformers whose heads are not 64 channels wide: open_clip's ViT-H-14.
_HEAD_WIDTHS = {1280: 80}
# Settings of an open_clip config that change the numbers but not the shapes, and what these towers do.
_OPEN_CLIP_TOWERS: dict[str, dict[str, Any]] = {
    "vision_cfg": {"pool_type": "tok", "final_ln_after_pool": False, "mlp_ratio": 4.0, "no_ln_pre": False},
    "text_cfg": {"pool_type": "argmax", "no_causal_mask": False, "mlp_ratio": 4.0, "proj_type": "linear"},
}
_OPEN_CLIP_REFUSED = ("timm_model_name", "hf_model_name", "act_kwargs", "norm_kwargs", "attentional_pool")


@dataclass(frozen=True)
class Hints:
    """What shapes cannot tell.

    Attributes:
        activation: of both transformers; "" when it is not known.
        head_width: channels of a vision head; 0 when it is not known.
        text_heads: heads of a text block; 0 when it is not known.
        source: the file that said so.
    """

    activation: str = ""
    head_width: int = 0
    text_heads: int = 0
    source: str = ""


def infer(state: Mapping[str, Tensor], hints: Hints, path: object) -> CLIPConfig:
    """Returns the sizes of the CLIP whose tensors (by our names) `state` holds.

    Raises:
        InputError: a tensor that sizes are read from is missing or has another number of dimensions.
    """

    def shape(name: str, dimensions: int) -> list[int]:
        return _shape(state, name, dimensions, path)

    text_width, embed_dim = shape("text.text_projection", 2)
    vocab_size, _ = shape("text.token_embedding.weight", 2)
    context_length, _ = shape("text.positional_embedding", 2)
    text = TextConfig(
        width=text_width,
        heads=hints.text_heads or max(1, text_width // 64),
        layers=_count(state, r"text\.transformer\.resblocks\.(\d+)\."),
        context_length=context_length,
        vocab_size=vocab_size,
    )
    return CLIPConfig(embed_dim, infer_vision(state, hints, path), text, hints.activation or "quick_gelu")


def infer_vision(state: Mapping[str, Tensor], hints: Hints, path: object) -> VisionConfig:
    """Returns the sizes of the vision tower whose tensors `state` holds as `visual.*`.

    Raises:
        InputError: a tensor that sizes are read from is missing or has another number of dimensions.
    """

    def side(name: str) -> int:
        cells = _shape(state, name, 2, path)[0] - 1
        if math.isqrt(cells) ** 2 != cells:
            raise InputError(f"{path}: {name} has {cells} cells, which is not a square number")
        return math.isqrt(cells)

    if any(name.startswith("visual.layer1.") for name in state):
        return VisionConfig(
            kind="resnet",
            layers=[_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
            width=_shape(state, "visual.layer1.0.conv1.weight", 4, path)[0],
            resolution=32 * side("visual.attnpool.positional_embedding"),
            head_width=hints.head_width or 64,
        )
    width, _, patch, _ = _shape(state, "visual.conv1.weight", 4, path)
    return VisionConfig(
        kind="vit",
        layers=[_count(state, r"visual\.transformer\.resblocks\.(\d+)\.")],
        width=width,
        patch=patch,
        resolution=patch * side("visual.positional_embedding"),
        head_width=hints.head_width or _HEAD_WIDTHS.get(width, 64),
    )


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int, path: object) -> list[int]:
    if name not in state:
        shown = ", ".join(sorted(state)[:4])
        raise InputError(
            f"{path} is not a complete CLIP: {name} is missing ({len(state)} tensors found: {shown}, …)"
        )
    if state[name].ndim != dimensions:
        raise InputError(
            f"{path}: {name} has shape {list(state[name].shape)}, expected {dimensions} dimensions"
        )
    return list(state[name].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Returns how many blocks the names tell of.

    Raises:
        InputError: a block before the last is missing.
    """
    numbers = {int(found[1]) for found in (re.match(pattern, name) for name in state) if found}
    hole = next((number for number in range(len(numbers)) if number not in numbers), None)
    if hole is not None:
        last = next(name for name in state if (found := re.match(pattern, name)) and int(found[1]) > hole)
        raise InputError(f"the weights hold {last}, and nothing of block {hole}: that part is missing")
    return len(numbers)


def from_open_clip(config: Any, source: str) -> Hints:
    """Returns what `open_clip_config.json` says beyond shapes.

    Raises:
        InputError: it asks for something these towers do not compute.
    """
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{source} is not an open_clip config: it has no model_cfg")
    for part, fixed in _OPEN_CLIP_TOWERS.items():
        tower = _object(model, part, source)
        wrong = [f"{key}={tower[key]!r}" for key, value in fixed.items() if tower.get(key, value) != value]
        wrong += [f"{key}={tower[key]!r}" for key in _OPEN_CLIP_REFUSED if tower.get(key)]
        if wrong:
            raise InputError(
                f"{source}: {part} has {', '.join(wrong)}, which CLIP's published towers do not have"
            )
    vision, text = _object(model, "vision_cfg", source), _object(model, "text_cfg", source)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    head_width, heads = _whole(vision, "head_width", 64, source), _whole(text, "heads", 8, source)
    return Hints(activation, head_width, heads, source)


def _object(config: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """Returns the object under a key, {} for none."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{source}: {key} must be an object, found {quote(value)}")
    return value


def _whole(config: Mapping[str, Any], key: str, default: int, source: str) -> int:
    """Returns the whole number above 0 under a key."""
    value = config.get(key) or default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise InputError(f"{source}: {key} must be a whole number above 0, found {quote(value)}")
    return value


def require_transformer(config: CLIPConfig, form: str) -> None:
    """Raises an InputError when a text tower is none that another package's form has."""
    if config.text.kind != "transformer":
        raise InputError(
            f"{form} has no text tower of kind {config.text.kind}, the mean of token embeddings; only our "
            "own format has it (to=native), and `clip-base export` writes it as ONNX"
        )


def to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """Returns the content of `open_clip_config.json`.

    Raises:
        InputError: the text tower is no transformer.
    """
    require_transformer(config, "open_clip")
    vision, text = config.vision, config.text
    sizes: dict[str, Any] = {
        "image_size": vision.resolution,
        "layers": vision.layers if vision.kind == "resnet" else vision.layers[0],
        "width": vision.width,
        "head_width": vision.head_width,
        "patch_size": None if vision.kind == "resnet" else vision.patch,
    }
    texts = {key: getattr(text, key) for key in ("context_length", "vocab_size", "width", "heads", "layers")}
    model: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": sizes, "text_cfg": texts}
    model["quick_gelu"] = config.activation == "quick_gelu"
    return {"model_cfg": model, "preprocess_cfg": {"mean": list(MEAN), "std": list(DEVIATION)}}


def from_huggingface(config: Any, source: str) -> Hints:
    """Returns what a Hugging Face CLIP folder's `config.json` says beyond shapes.

    Raises:
        InputError: it is another model's, or asks for something these towers do not compute.
    """
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{source} is of a {quote(found)} model, expected model_type 'clip'")
    # Old files repeat a tower's settings under `…_dict`; there the repetition wins.
    text = {**_object(config, "text_config", source), **_object(config, "text_config_dict", source)}
    vision = {**_object(config, "vision_config", source), **_object(config, "vision_config_dict", source)}
    activations = {str(tower.get("hidden_act", "quick_gelu")) for tower in (text, vision)}
    if len(activations) > 1 or not activations <= {"quick_gelu", "gelu"}:
        raise InputError(
            f"{source} has hidden_act {quote(sorted(activations))}; both towers must have quick_gelu, "
            "or both gelu"
        )
    for tower in (text, vision):
        eps = tower.get("layer_norm_eps", 1e-5)
        if not isinstance(eps, int | float) or not math.isclose(eps, 1e-5, rel_tol=1e-3):
            raise InputError(f"{source} has layer_norm_eps {quote(eps)}, these towers have 1e-5")
    width = _whole(vision, "hidden_size", 768, source)
    heads = _whole(vision, "num_attention_heads", 12, source)
    return Hints(activations.pop(), width // heads, _whole(text, "num_attention_heads", 8, source), source)


def to_huggingface(config: CLIPConfig) -> dict[str, Any]:
    """Returns the content of a Hugging Face CLIP folder's `config.json`.

    Raises:
        InputError: the vision tower is a ResNet, which transformers' CLIPModel does not have, or the text
            tower is no transformer.
    """
    require_transformer(config, "transformers")
    vision, text = config.vision, config.text
    if vision.kind != "vit":
        raise InputError(
            "transformers has no CLIP with a ResNet; convert this one with to=open_clip or to=native"
        )

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": config.activation,
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim,
        }

    # CLIP's start and end tokens are the two last ids; texts are padded with what follows the end unseen.
    ids = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1, "pad_token_id": 0}
    texts = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, **ids}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            **tower(text.width, text.layers, text.heads),
            **texts,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower(vision.width, vision.layers[0], vision.heads),
            "image_size": vision.resolution,
            "patch_size": vision.patch,
            "num_channels": 3,
        },
    }
