"""Generic names beside those that are looked for, so that a score does not depend on how many are.

A softmax over one name gives it a probability of 1 in every region. Names of what else there may be take
their share: the background, materials, common things. They are embedded as all names are, and not reported.
"""

# C names, M negatives, D embedding size
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from clip_base.evaluation.prompts import TextEncoder, TextTokenizer, ensemble
from regionclip.concepts.vocabulary import Vocabulary

CHOICES = ("auto", "none", "generic")
# CLIP's embeddings of two words for one thing, or of a word and its plural, are about this near.
SAME = 0.93


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Returns the negatives by group."""
    text = (files("regionclip") / "data_files" / "negatives.txt").read_text(encoding="utf-8")
    lines = (line.partition(":") for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {group.strip(): tuple(word.strip() for word in words.split(",")) for group, _, words in lines}


def negatives_beside(names: Sequence[str]) -> list[str]:
    """Returns the negatives that compete with none of the names.

    Left out are groups that a name means as a whole ("animal", "animals"), and words that stand in a name or
    hold one ("dog" beside "hot dog" or "dogs").
    """
    spelled = {_singular(name) for name in names}
    words = {_singular(word) for name in names for word in name.replace("-", " ").split()} | spelled
    chosen = []
    for group, members in groups().items():
        if group not in spelled:
            chosen += [
                word for word in members if not ({_singular(part) for part in word.split()} | {word}) & words
            ]
    return list(dict.fromkeys(chosen))


def _singular(text: str) -> str:
    lowered = " ".join(text.lower().replace("_", " ").split())
    return lowered.removesuffix("s") if len(lowered) > 3 and not lowered.endswith("ss") else lowered


@torch.no_grad()
def embed_negatives(
    model: TextEncoder, tokenizer: TextTokenizer, vocabulary: Vocabulary, templates: Sequence[str]
) -> Tensor:
    """Returns [M, D] float32 unit-length embeddings of the negatives beside a vocabulary.

    Args:
        model: its text tower embeds them as it did the names.
        tokenizer: the tower's.
        vocabulary: C names; negatives whose embedding is nearly one of theirs are left out.
        templates: the prompts of the names.
    """
    found = ensemble(model, tokenizer, negatives_beside(vocabulary.names), templates)  # [M, D]
    nearest = (found @ vocabulary.embeddings.float().cpu().T).amax(1)  # [M]
    return found[nearest < SAME]
