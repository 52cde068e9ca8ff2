"""Image models that tell how likely a text is: what CLIP's paper compares contrastive training with.

arXiv 2103.00020, section 2.3 and figure 2: predicting a caption, exactly or as a bag of words, against
telling which caption belongs to which image. A `TextObjective` is what is trained beside the vision tower; a
`TextPredictor` is both of them, and classifies by the likelihood of prompts.
"""

# B images, N texts, T token positions, G cells of an image, V rows of the vocabulary
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.models.clip import VisionTower, make_vision_tower
from clip_base.models.configs import CLIPConfig
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError

OBJECTIVES = "clip_base.objectives"
PADDING, UNKNOWN, MASK, FIRST = 0, 1, 2, 3
"""Rows of a vocabulary before its tokens: after a text's end, a token that it lacks, one that is hidden."""
_COUNTED_AT_ONCE = 4096


@dataclass(kw_only=True)
class TextObjectiveConfig:
    """Options of every objective that predicts words of captions."""

    weight: float = option(1.0, "factor on this loss")
    contrastive: float = option(
        0.0, "factor on CLIP's contrastive loss beside it, which trains a text tower as well; 0: none"
    )
    words: int = option(
        0, "most frequent tokens that are told apart, all others count as one; 0: all that occur"
    )
    count_from: int = option(
        100_000, "pairs whose captions' tokens are counted, spread evenly over all; 0: all"
    )

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise InputError(f"objective.weight must be above 0, found {self.weight:g}")
        for name in ("contrastive", "words", "count_from"):
            if getattr(self, name) < 0:
                raise InputError(f"objective.{name} must be at least 0, found {getattr(self, name):g}")


class TokenVocabulary(nn.Module):
    """The tokens that an objective tells apart.

    Args:
        ids: [K] int64, ascending: token ids that occur in captions, the start and end token among them.

    Attributes:
        rows: V, K and the rows before them: `PADDING`, `UNKNOWN`, `MASK`.
    """

    ids: Tensor

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.rows = FIRST + len(ids)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns [N, T'] int64 rows of [N, T] token ids, up to the end of the longest text.

        A text ends with its largest id, as CLIP's vocabulary has it; what follows is `PADDING`.
        """
        ends = tokens.argmax(-1, keepdim=True)  # [N, 1]
        tokens = tokens[:, : int(ends.max()) + 1] if len(tokens) else tokens
        places = torch.searchsorted(self.ids, tokens.contiguous()).clamp_max(len(self.ids) - 1)
        rows = torch.where(self.ids[places] == tokens, places + FIRST, UNKNOWN)
        return rows.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) > ends, PADDING)


def frequent_tokens(texts: Iterable[str], context_length: int, limit: int = 0) -> Tensor:
    """Returns the ids of the most frequent tokens of some texts, ascending; of equally frequent the smaller.

    Args:
        texts: captions; each is cut at `context_length` tokens, as in training.
        context_length: token positions.
        limit: how many ids at most; 0: all that occur.

    Raises:
        InputError: there are no texts.
    """
    tokenizer, counts = Tokenizer(context_length), np.zeros(0, np.int64)
    left = iter(texts)
    while some := list(islice(left, _COUNTED_AT_ONCE)):
        tokens = tokenizer(some, truncate=True).numpy()
        own = np.bincount(tokens[np.arange(tokens.shape[1]) <= tokens.argmax(1)[:, None]])
        longer, shorter = (own, counts) if len(own) > len(counts) else (counts, own)
        counts = longer + np.pad(shorter, (0, len(longer) - len(shorter)))
    if not counts.any():
        raise InputError("there are no captions in which to count tokens")
    order = np.argsort(-counts, kind="stable")[: limit or None]
    return torch.from_numpy(np.sort(order[counts[order] > 0]).astype(np.int64))


class TextObjective(nn.Module, ABC):
    """What is learned from captions by predicting their words.

    A part of the group `clip_base.objectives`. Its constructor takes `config`, whose class is derived from
    `TextObjectiveConfig`, the towers' `sizes`, `cell_channels` (of what the vision tower gives it) and the
    `vocabulary`, and calls this one. Its losses must be those of the whole batch, divided by its share in
    each process: `distributed.mean` of a count helps.

    Attributes:
        name: what the loss is called in the log.
        reads: "cells": [B, G, channels], the tower's last map; or "embedding": [B, D], what CLIP embeds.
        vocabulary: the tokens it tells apart.
    """

    name = ""
    reads = "cells"

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    @abstractmethod
    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the scalar loss of images, as `reads` says, and of [B, T] token ids of their captions."""

    @abstractmethod
    def log_likelihood(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns [B, N]: the logarithm of how likely each of [N, T] texts is for each image.

        Constants that are the same for all texts may be left out.
        """


class TextPredictor(nn.Module):
    """A vision tower, and what tells from its output how likely a text is.

    Args:
        config: sizes; those of the text tower are the objective's.
        objective: what reads the tower.
        visual: the tower; it loses its head when the objective reads cells. None: one with random weights.
    """

    def __init__(
        self, config: CLIPConfig, objective: TextObjective, visual: VisionTower | None = None
    ) -> None:
        super().__init__()
        self.config, self.objective = config, objective
        self.visual: VisionTower = visual or make_vision_tower(config)
        if objective.reads == "cells":
            self.visual.drop_head()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns what the objective reads of [B, 3, H, W] normalized pixels."""
        if self.objective.reads == "cells":
            return self.visual.cells(pixels)
        embeddings: Tensor = self.visual(pixels)
        return embeddings

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Returns [B, N]: the logarithm of how likely each of [N, T] texts is for each image."""
        return self.objective.log_likelihood(self.encode_image(pixels), tokens)


def in_pairs(cells: Tensor, texts: int, at_once: int) -> Iterator[tuple[Tensor, slice]]:
    """Yields image features repeated for some texts at a time, and which texts: rows are image by image.

    Args:
        cells: [B, …], of the images.
        texts: how many texts there are.
        at_once: pairs of an image and a text, at most (one text at least).
    """
    step = max(1, at_once // max(len(cells), 1))
    for start in range(0, texts, step):
        some = slice(start, min(start + step, texts))
        yield cells.repeat_interleave(some.stop - some.start, 0), some
