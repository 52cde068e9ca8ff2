"""Teachers of open_clip: CLIP, SigLIP, MetaCLIP, DFN, EVA, ConvNeXt and what else it can build.

Needs the extra `open_clip`: pip install 'regionclip[open-clip]'.
"""

# B images, n crops, N texts, t patches, C channels of a token, T token positions, D embedding size
from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError, quote, shortened
from regionclip.models.teachers.attention import alone, to_grid, values_only
from regionclip.models.teachers.base import Score, TeacherModel

_FOLDER, _HUB = "local-dir:", "hf-hub:"


@dataclass
class OpenClipConfig:
    """Options of open_clip's models."""

    model: str = option(
        "",
        "architecture of a weights file, such as ViT-B-16-SigLIP2; empty: weights= is MODEL/TAG, a folder "
        "with open_clip_config.json, or hf-hub:OWNER/NAME",
    )


class OpenClipTeacher(TeacherModel):
    """A model of open_clip with its own preprocessing, tokenizer, pooling and score.

    Args:
        config: which architecture.
        weights: MODEL/TAG of open_clip's list (ViT-B-16-SigLIP2/webli), a folder with
            `open_clip_config.json`, hf-hub:OWNER/NAME, or a weights file of the architecture `config.model`.

    Raises:
        InputError: open_clip is not installed, knows no such model, or cannot read the weights.
    """

    def __init__(self, config: OpenClipConfig, weights: str) -> None:
        super().__init__()
        name, tag = _model_and_tag(config.model, weights)
        self.model = _made(name, tag, weights)
        preprocessing = _package().get_model_preprocess_cfg(self.model)
        self.resolution = _side(preprocessing["size"], weights)
        self.mean, self.deviation = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        self.interpolation = preprocessing.get("interpolation", "bicubic")
        self.score = _score(self.model)
        self.tokenizer = _told(f"the tokenizer of {name}", _package().get_tokenizer, name)
        self.stride = _stride(self.model.visual, self.resolution)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """See `TeacherModel`."""
        features: Tensor = self.model.encode_image(pixels)
        return features

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """See `TeacherModel`; each patch is pooled as if it were all that the tower saw."""
        visual = self.model.visual
        return _timm_patches(visual, pixels) if hasattr(visual, "trunk") else _vit_patches(visual, pixels)

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """See `TeacherModel`."""
        if not truncate:
            for text in texts:
                _require_short(self.tokenizer, text)
        tokens: Tensor = self.tokenizer(texts)
        return tokens

    def encode_text(self, tokens: Tensor) -> Tensor:
        """See `TeacherModel`."""
        features: Tensor = self.model.encode_text(tokens)
        return features


def _package() -> Any:
    try:
        import open_clip  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"backend.name=open_clip needs open_clip ({error}); pip install 'regionclip[open-clip]'"
        ) from None
    return open_clip


def _model_and_tag(model: str, weights: str) -> tuple[str, str | None]:
    """Returns what open_clip calls a model, and its pretrained weights; None: they come with the name."""
    path = Path(weights)
    if path.is_dir():
        if not (path / "open_clip_config.json").exists():
            raise InputError(
                f"weights={weights} has no open_clip_config.json; give a folder that open_clip saved, or a "
                "file with backend.model="
            )
        return _FOLDER + str(path), None
    if path.is_file():
        if not model:
            raise InputError(
                f"weights={weights}: name the architecture of this file, such as "
                "backend.model=ViT-B-16-SigLIP2"
            )
        return model, str(path)
    if model:
        raise InputError(f"backend.model={model} is for a weights file, and there is none at {weights}")
    for prefix in (_HUB, "hf://"):
        if weights.startswith(prefix):
            return _HUB + weights.removeprefix(prefix), None
    name, slash, tag = weights.rpartition("/")
    if not slash or (name, tag) not in _package().list_pretrained():
        raise InputError(
            f"weights={weights} is no file, no folder, and no MODEL/TAG of open_clip, such as "
            'ViT-B-16-SigLIP2/webli; `python -c "import open_clip; print(open_clip.list_pretrained())"` '
            "lists them"
        )
    return name, tag


def _made(name: str, tag: str | None, weights: str) -> Any:
    package, quick = _package(), {}
    if tag is not None and not Path(tag).is_file():
        # The list says which activation the weights were trained with; the architecture alone does not.
        known = package.pretrained.get_pretrained_cfg(name, tag) or {}
        quick = {"force_quick_gelu": bool(known.get("quick_gelu"))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = _told(weights, package.create_model, name, pretrained=tag, **quick)
    wrong = [str(one.message) for one in caught if "QuickGELU mismatch" in str(one.message)]
    if wrong:
        raise InputError(f"weights={weights}: {shortened(wrong[0], 200)}; choose the other architecture")
    return model


def _told(what: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls open_clip; whatever it raises becomes an InputError in one line."""
    try:
        return make(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:  # of any kind: open_clip, torch, the hub's client
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise InputError(f"open_clip cannot load {what}: {reason}") from error


def _side(size: Any, weights: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise InputError(f"weights={weights}: its images are {quote(size)} pixels; a teacher's are square")
    return int(sides.pop())


def _score(model: Any) -> Score:
    bias = getattr(model, "logit_bias", None)
    return Score(float(model.logit_scale.detach().exp()), None if bias is None else float(bias.detach()))


def _stride(visual: nn.Module, resolution: int) -> int:
    """Returns the side of a patch in pixels; 0 where a tower's tokens cannot be embedded one by one."""
    if hasattr(visual, "trunk"):  # timm's
        embedding = getattr(visual.trunk, "patch_embed", None)
        size = getattr(embedding, "patch_size", None)
        if size is None or not hasattr(visual.trunk, "num_prefix_tokens"):
            return 0
        return int(size[0])
    single = getattr(visual, "pool_type", "") in ("tok", "avg") and getattr(visual, "attn_pool", 0) is None
    grid = getattr(visual, "grid_size", None)
    return resolution // int(grid[0]) if single and grid and hasattr(visual, "_embeds") else 0


def _vit_patches(visual: Any, pixels: Tensor) -> Tensor:
    """Returns [B, D, g, g] of open_clip's own vision transformer."""
    x = visual._embeds(pixels)
    with values_only(visual.transformer.resblocks[-1], "attn_mask"):
        x = visual.transformer(x)[:, 1:]  # [B, t, C]
    x = visual.ln_post(x)  # before or after pooling of a single token is the same
    return to_grid(x if visual.proj is None else x @ visual.proj)


def _timm_patches(visual: Any, pixels: Tensor) -> Tensor:
    """Returns [B, D, g, g] of one of timm's vision transformers."""
    trunk = visual.trunk
    last, first = trunk.blocks[-1], trunk.num_prefix_tokens
    if trunk.global_pool == "token" and "attn_mask" in inspect.signature(last.forward).parameters:
        with values_only(last, "attn_mask"):
            x = trunk.forward_features(pixels)
    else:  # an attention pool's values are those of the single token, too
        x = trunk.forward_features(pixels)
    patches = x[:, first:]  # [B, t, C]
    pooled = visual.head(trunk.forward_head(alone(patches, first + 1)))  # [B·t, D]
    return to_grid(pooled.unflatten(0, patches.shape[:2]))


def _require_short(tokenizer: Any, text: str) -> None:
    """Raises a ValueError for a text that the tokenizer would cut."""
    length = int(tokenizer.context_length)
    inner = getattr(tokenizer, "tokenizer", None)
    count = len(tokenizer.encode(text)) + 2 if inner is None else len(inner(text)["input_ids"])
    if count > length:
        raise ValueError(f"{quote(text)} has {count} tokens, the text tower reads {length}")
