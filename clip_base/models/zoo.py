"""The nine published CLIP models by name (sizes: arXiv 2103.00020, appendix F, tables 19 and 20)."""

from __future__ import annotations

import copy

from clip_base.jobs.plugins import did_you_mean
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError


def _resnet(layers: list[int], width: int, resolution: int, embed_dim: int, text_width: int) -> CLIPConfig:
    vision = VisionConfig(kind="resnet", layers=layers, width=width, resolution=resolution)
    return CLIPConfig(embed_dim, vision, TextConfig(width=text_width, heads=text_width // 64))


def _vit(layers: int, width: int, patch: int, resolution: int, embed_dim: int) -> CLIPConfig:
    vision = VisionConfig(kind="vit", layers=[layers], width=width, patch=patch, resolution=resolution)
    return CLIPConfig(embed_dim, vision, TextConfig(width=embed_dim, heads=embed_dim // 64))


_CONFIGS = {
    "RN50": _resnet([3, 4, 6, 3], width=64, resolution=224, embed_dim=1024, text_width=512),
    "RN101": _resnet([3, 4, 23, 3], width=64, resolution=224, embed_dim=512, text_width=512),
    "RN50x4": _resnet([4, 6, 10, 6], width=80, resolution=288, embed_dim=640, text_width=640),
    "RN50x16": _resnet([6, 8, 18, 8], width=96, resolution=384, embed_dim=768, text_width=768),
    "RN50x64": _resnet([3, 15, 36, 10], width=128, resolution=448, embed_dim=1024, text_width=1024),
    "ViT-B/32": _vit(12, width=768, patch=32, resolution=224, embed_dim=512),
    "ViT-B/16": _vit(12, width=768, patch=16, resolution=224, embed_dim=512),
    "ViT-L/14": _vit(24, width=1024, patch=14, resolution=224, embed_dim=768),
    "ViT-L/14@336px": _vit(24, width=1024, patch=14, resolution=336, embed_dim=768),
}


def available_models() -> list[str]:
    """Returns the names of the published models, in the order of the paper's tables."""
    return list(_CONFIGS)


def config(name: str) -> CLIPConfig:
    """Returns a fresh config of the published model called `name`, e.g. "RN50" or "ViT-B/32".

    Raises:
        InputError: there is no such model; the message names the nearest.
    """
    if name not in _CONFIGS:
        raise InputError(f"{name!r} is not a published CLIP model; {did_you_mean(name, available_models())}")
    return copy.deepcopy(_CONFIGS[name])
