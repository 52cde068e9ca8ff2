"""Tensor names of openai/CLIP, open_clip and Hugging Face, and of wrappers, mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_base.models.clip import from_openai_names
from clip_base.runtime.errors import InputError

# Where training loops put the weights, beside epochs and optimizers.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights")
# What DDP, torch.compile and tasks put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip.", "clip_model.")
# Constants that some versions store beside the weights: masks and 0, 1, 2, …
_CONSTANTS = ("attn_mask", "position_ids")

_HF_ROOTS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # their spelling
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.encoder.layers": "text.transformer.resblocks",
}
_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# Linear layers there, matrices that are multiplied from the right here.
_HF_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text.text_projection"}
_HF_PROJECTION = re.compile(r"(.*\.resblocks\.\d+\.)self_attn\.([qkv])_proj\.(weight|bias)")


def unwrap(content: Any, path: object) -> tuple[dict[str, Tensor], bool]:
    """Returns the state dict in what a pickle held, without prefixes, and whether it was wrapped.

    Raises:
        InputError: there is none, or it holds values that are no tensors.
    """
    wrapped, seen = False, set[int]()
    while isinstance(content, dict) and id(content) not in seen:
        seen.add(id(content))
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content, wrapped = inner, True
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(
            f"{path} holds no state dict: {len(odd)} of {len(content)} values are not tensors "
            f"({', '.join(odd[:4])}); save model.state_dict()"
        )
    return strip(content), wrapped


def strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict without prefixes that all names share, and without stored constants."""
    state = dict(state)
    while state:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in _CONSTANTS}


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers' CLIPModel."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in state)


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames any known state dict to ours; names that are not known stay as they are."""
    return from_huggingface(state) if is_huggingface(state) else from_openai_names(state)


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of transformers' CLIPModel to ours: query, key and value become one matrix."""
    ours: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name in _HF_TRANSPOSED:
            ours[_HF_TRANSPOSED[name]] = value.T if value.ndim == 2 else value
            continue
        renamed = _renamed(name, _HF_ROOTS)
        if ".resblocks." in renamed:
            head, number, tail = re.split(r"(\.resblocks\.\d+\.)", renamed, maxsplit=1)
            renamed = head + number + _renamed(tail, _HF_BLOCK)
        projection = _HF_PROJECTION.fullmatch(renamed)
        if projection is None:
            ours[renamed] = value
        else:
            split.setdefault(f"{projection[1]}attn.in_proj_{projection[3]}", {})[projection[2]] = value
    for name, parts in split.items():
        if set(parts) == {"q", "k", "v"}:
            ours[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
        else:  # left over under the name it came with, so that the error says which is missing
            stem, kind = name.rsplit("attn.in_proj_", 1)
            ours |= {f"{stem}self_attn.{part}_proj.{kind}": value for part, value in parts.items()}
    return ours


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames our state dict (vision transformers only) to that of transformers' CLIPModel."""
    roots = {ours: theirs for theirs, ours in _HF_ROOTS.items()}
    inside = {ours: theirs for theirs, ours in _HF_BLOCK.items()}
    transposed = {ours: theirs for theirs, ours in _HF_TRANSPOSED.items()}
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in transposed:
            theirs[transposed[name]] = value.T
            continue
        renamed = _renamed(name, roots)
        fused = re.fullmatch(r"(.*\.layers\.\d+\.)attn\.in_proj_(weight|bias)", renamed)
        if fused is not None:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                theirs[f"{fused[1]}self_attn.{part}_proj.{fused[2]}"] = piece
            continue
        block = re.fullmatch(r"(.*\.layers\.\d+\.)(.*)", renamed)
        theirs[f"{block[1]}{_renamed(block[2], inside)}" if block else renamed] = value
    return theirs


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for before, after in table.items():
        if name == before or name.startswith(f"{before}."):
            return after + name[len(before) :]
    return name
