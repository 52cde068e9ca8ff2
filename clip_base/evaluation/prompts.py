"""Prompt templates, and the classifier that they make of class names."""

# C classes, K templates, D embedding size
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import existing, read_text
from clip_base.runtime.progress import track

SIMPLE = "a photo of a {}."  # arXiv 2103.00020, section 3.1.4
_PUBLISHED = Path(__file__).parent.parent / "data_files" / "templates.txt"


def read_templates(name: str) -> list[str]:
    """Returns prompt templates with `{}` for the class name.

    Args:
        name: "published" for CLIP's 80 ImageNet templates, "simple" for one, or a text file with one a line
            (lines that begin with # are comments).

    Raises:
        InputError: the file is missing, holds no template or one without `{}`.
    """
    if name == "simple":
        return [SIMPLE]
    path = _PUBLISHED if name == "published" else existing(name, "templates (published, simple or a file)")
    lines = [line.strip() for line in read_text(path, "templates").splitlines()]
    templates = [line for line in lines if line and not line.startswith("#")]
    wrong = next((line for line in templates if "{}" not in line), None)
    if wrong is not None:
        raise InputError(f"template {wrong!r} in {path} has no {{}} where the class name goes")
    if not templates:
        raise InputError(f"{path} holds no templates; write one a line, with {{}} for the class name")
    return templates


@torch.no_grad()
def classifier(
    model: CLIP, names: Sequence[str], templates: Sequence[str], batch_size: int = 256, truncate: bool = False
) -> Tensor:
    """Returns one direction a class: the mean of its prompts' embeddings (arXiv 2103.00020, 3.1.4).

    Args:
        model: in evaluation mode; texts are embedded where it is.
        names: C class names.
        templates: K prompts with `{}` for the name.
        batch_size: texts embedded at once.
        truncate: cut prompts that are too long instead of refusing them.

    Returns:
        [C, D] float32, unit length.

    Raises:
        InputError: a prompt is too long.
    """
    tokenizer = Tokenizer(model.config.text.context_length)
    device = model.logit_scale.device
    distinct = list(dict.fromkeys(names))  # equal names get equal embeddings, wherever they stand
    texts = [template.replace("{}", name) for name in distinct for template in templates]
    parts = []
    for start in track(range(0, len(texts), batch_size), "class names"):
        tokens = tokenizer(texts[start : start + batch_size], truncate).to(device)
        parts.append(F.normalize(model.encode_text(tokens).float(), dim=-1))
    embeddings = torch.cat(parts).view(len(distinct), len(templates), -1)  # [C, K, D] of the distinct names
    place = {name: row for row, name in enumerate(distinct)}
    return F.normalize(embeddings.mean(1), dim=-1)[[place[name] for name in names]]
