"""Prompt templates, and the prompt ensemble that embeds class names."""

# C classes, K templates, D embedding size
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError, note, quote
from clip_base.runtime.progress import Progress
from clip_base.storage.files import existing, read_text

# What names are embedded with wherever nothing else is asked for.
DEFAULT_TEMPLATES = ("a photo of {article} {}.", "{}")
SIMPLE = "a photo of a {}."  # arXiv 2103.00020, section 3.1.4
_PUBLISHED = Path(__file__).parent.parent / "data_files" / "templates.txt"


class TextEncoder(Protocol):
    """What `ensemble` needs of a model: an `nn.Module` whose `encode_text` maps tokens [N, T] to [N, D]."""

    training: bool

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns [N, D] embeddings of tokens [N, T]."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Returns the weights by name; their hash tells models apart."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Returns the weights; the first one's device is where texts go."""

    def train(self, mode: bool = True) -> Any:
        """Switches dropout and batch statistics on or off."""


class TextTokenizer(Protocol):
    """What `ensemble` needs of a tokenizer: texts in, int64 [N, T] out."""

    def __call__(self, texts: list[str], truncate: bool = False) -> Tensor:
        """Returns int64 [N, T]; too long texts are cut when `truncate` says so."""


def read_templates(name: str) -> list[str]:
    """Returns prompt templates with `{}` for the class name.

    Args:
        name: "published" for CLIP's 80 ImageNet templates, "simple" for one, or a text file with one per line
            (lines that begin with # are comments).

    Raises:
        InputError: the file is missing, holds no template or one without `{}`.
    """
    if name == "simple":
        return [SIMPLE]
    path = _PUBLISHED if name == "published" else existing(name, "templates (published, simple or a file)")
    lines = [line.strip() for line in read_text(path, "templates").splitlines()]
    # CLIP_benchmark writes {c} where the name goes.
    templates = [line.replace("{c}", "{}") for line in lines if line and not line.startswith("#")]
    wrong = next((line for line in templates if "{}" not in line), None)
    if wrong is not None:
        raise InputError(f"template {quote(wrong)} in {path} has no {{}} where the class name goes")
    if not templates:
        raise InputError(f"{path} has no templates; write one per line, with {{}} for the class name")
    return templates


def fill(template: str, name: str) -> str:
    """Returns a template with the name in it; `{article}` becomes "a" or "an" by the name's first letter.

    Underscores in the name are read as spaces.
    """
    readable = name.replace("_", " ").strip()
    article = "an" if readable[:1].lower() in set("aeiou") else "a"
    return template.replace("{article}", article).replace("{}", readable)


@torch.no_grad()
def ensemble(
    model: TextEncoder,
    tokenizer: TextTokenizer,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 256,
    truncate: bool = True,
) -> Tensor:
    """Returns one direction per name: the mean of its prompts' unit-length embeddings, at length 1.

    The ensemble in embedding space is CLIP's (arXiv 2103.00020, section 3.1.4).

    Args:
        model: gives [N, D] for tokens [N, T]; put into evaluation mode meanwhile.
        tokenizer: makes int64 [N, T] of texts.
        names: C names; equal names get equal embeddings, wherever they stand.
        templates: K prompts with `{}` where the name goes, and `{article}` where "a" or "an" should stand.
        batch_size: texts that are encoded at once.
        truncate: cut prompts that are too long instead of refusing them.

    Returns:
        [C, D] float32, on the CPU.

    Raises:
        InputError: no template, one without `{}`, or a prompt that is too long.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        found = repr(wrong[0]) if wrong else "none"
        raise InputError(f"every prompt template needs {{}} where the name goes, found {found}")
    # Not by its state_dict, which takes the gathered weights of a sharded model away again.
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    distinct = list(dict.fromkeys(names))
    step = max(1, batch_size // len(templates))  # names at once; a mean is made as soon as it can be
    means: list[Tensor] = []
    cut: list[str] = []
    was_training = model.training
    model.train(False)
    try:
        with Progress("embedding names", len(distinct)) as progress:
            for start in range(0, len(distinct), step):
                some = distinct[start : start + step]
                texts = [fill(template, name) for name in some for template in templates]  # n·K
                parts = []
                for first in range(0, len(texts), batch_size):
                    prompts = texts[first : first + batch_size]
                    tokens = tokenizer(prompts, truncate)  # [N, T]
                    cut += cut_texts(tokenizer, prompts, tokens)
                    embedded = model.encode_text(tokens.to(device)).float()
                    parts.append(F.normalize(embedded, dim=-1).cpu())  # [N, D]
                means.append(torch.cat(parts).reshape(len(some), len(templates), -1).mean(1))  # [n, D]
                progress.advance(len(some))
    finally:
        model.train(was_training)
    if cut:
        note(
            f"{len(cut)} prompts are longer than what the text tower reads and are cut there; the first: "
            f"{quote(cut[0])}"
        )
    row_of = {name: row for row, name in enumerate(distinct)}
    directions = torch.cat(means)  # [C, D] of the distinct names
    directions /= directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return directions[[row_of[name] for name in names]]


def cut_texts(tokenizer: TextTokenizer, texts: list[str], tokens: Tensor) -> list[str]:
    """Returns the texts that were cut: of those that fill their row, which the tokenizer else refuses."""
    found = []
    for text, last in zip(texts, tokens[:, -1].tolist(), strict=True):
        if last:
            try:
                tokenizer([text])
            except ValueError:
                found.append(text)
    return found


def classifier(
    model: CLIP, names: Sequence[str], templates: Sequence[str], batch_size: int = 256, truncate: bool = False
) -> Tensor:
    """Returns the `ensemble` of class names by a CLIP and its own tokenizer: [C, D] float32 on its device.

    Raises:
        InputError: see `ensemble`.
    """
    tokenizer = Tokenizer(model.config.text.context_length)
    return ensemble(model, tokenizer, names, templates, batch_size, truncate).to(model.logit_scale.device)
