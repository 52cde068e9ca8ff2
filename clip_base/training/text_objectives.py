"""Objectives that predict captions from images: as a bag of words, word by word, or what is hidden of them.

The comparison is that of arXiv 2103.00020, section 2.3. All take their sizes from `tower.text`.
"""

# B images, N texts, T token positions, G cells of an image, C channels, D embedding size, V vocabulary rows
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.models.configs import CLIPConfig
from clip_base.models.decoder import CaptionDecoder
from clip_base.models.predictor import (
    MASK,
    PADDING,
    TextObjective,
    TextObjectiveConfig,
    TokenVocabulary,
    in_pairs,
)
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError

PAIRS_AT_ONCE = 2048  # of an image and a text that a decoder reads
BAG_LOSSES = ("softmax", "sigmoid")


@dataclass(kw_only=True)
class BagOfWordsConfig(TextObjectiveConfig):
    """How a caption's words are predicted."""

    loss: str = option(
        "softmax",
        "softmax: words compete, the target is spread evenly over the caption's; sigmoid: each word alone",
        choices=BAG_LOSSES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in BAG_LOSSES:
            raise InputError(f"objective.loss must be one of {', '.join(BAG_LOSSES)}, found {self.loss!r}")


class BagOfWords(TextObjective):
    """Predicts which words a caption has, in no order (Joulin et al., arXiv 1511.02251).

    A word is a token of CLIP's vocabulary. A linear layer reads the image's embedding.
    """

    name, reads = "bag_of_words", "embedding"

    def __init__(
        self, config: BagOfWordsConfig, sizes: CLIPConfig, cell_channels: int, vocabulary: TokenVocabulary
    ) -> None:
        super().__init__(vocabulary)
        self.config = config
        self.classifier = nn.Linear(sizes.embed_dim, vocabulary.rows)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean over captions of their loss; of a caption without words it is 0."""
        logits, target = self._logits(images), self._words(tokens)  # [B, V]
        if self.config.loss == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
        share = target / target.sum(1, keepdim=True).clamp_min(1)
        return -(share * logits.log_softmax(1)).sum(1).mean()

    def log_likelihood(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns [B, N]: the sum of the log-probabilities of each text's distinct words."""
        logits, words = self._logits(images), self._words(tokens)
        known = F.logsigmoid(logits) if self.config.loss == "sigmoid" else logits.log_softmax(1)
        with torch.autocast(known.device.type, enabled=False):
            return known @ words.T

    def _logits(self, images: Tensor) -> Tensor:
        """Returns [B, V] float32; bfloat16's few digits would let different words score the same."""
        if self.training:
            logits: Tensor = self.classifier(images)
            return logits.float()
        with torch.autocast(images.device.type, enabled=False):
            return F.linear(images.float(), self.classifier.weight.float(), self.classifier.bias.float())

    def _words(self, tokens: Tensor) -> Tensor:
        """Returns [N, V] float32: 1 where a text has a word, without its start and end."""
        rows = _without_ends(self.vocabulary(tokens))
        found = torch.zeros(len(rows), self.vocabulary.rows, device=rows.device).scatter_(1, rows, 1.0)
        found[:, PADDING] = 0
        return found


def _without_ends(rows: Tensor) -> Tensor:
    """Returns rows with `PADDING` in the place of each text's first and last."""
    lengths = (rows != PADDING).sum(1, keepdim=True)  # [N, 1]
    places = torch.arange(rows.shape[1], device=rows.device)
    return rows.masked_fill((places == 0) | (places >= lengths - 1), PADDING)


@dataclass(kw_only=True)
class CaptioningConfig(TextObjectiveConfig):
    """Options of captioning."""


class Captioning(TextObjective):
    """Predicts a caption word by word from the image's map (VirTex, arXiv 2006.06666, left to right)."""

    name = "captioning"

    def __init__(
        self, config: CaptioningConfig, sizes: CLIPConfig, cell_channels: int, vocabulary: TokenVocabulary
    ) -> None:
        super().__init__(vocabulary)
        self.decoder = CaptionDecoder(sizes.text, cell_channels, vocabulary.rows, causal=True)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean over the batch's tokens of the cross entropy of each by those before it."""
        rows = self.vocabulary(tokens)
        losses = self._losses(images, rows)  # [B, T - 1]
        return losses.sum() / _mean_count((rows[:, 1:] != PADDING).sum())

    def log_likelihood(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns [B, N]: the sum of the log-probabilities of each text's tokens, its end included."""
        rows = self.vocabulary(tokens)
        found = [
            -self._losses(cells, rows[some].repeat(len(images), 1)).sum(1).view(len(images), -1)
            for cells, some in in_pairs(images, len(rows), PAIRS_AT_ONCE)
        ]
        return torch.cat(found, 1)

    def _losses(self, cells: Tensor, rows: Tensor) -> Tensor:
        """Returns [B, T - 1]: the cross entropy of each token but the first; 0 for padding."""
        logits = self.decoder(cells, rows[:, :-1], rows[:, :-1] == PADDING).float()
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], ignore_index=PADDING, reduction="none")


@dataclass(kw_only=True)
class MaskedLMConfig(TextObjectiveConfig):
    """How much of a caption is hidden."""

    masked: float = option(0.15, "share of a caption's words that are hidden; one at least")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked <= 1:
            raise InputError(f"objective.masked must be in (0, 1], found {self.masked:g}")


class MaskedLM(TextObjective):
    """Predicts hidden words of a caption from the others and the image's map (ICMLM, arXiv 2008.01392).

    The text is read by the same decoder as in `Captioning`, in both directions and from scratch, where ICMLM
    begins with a trained BERT. The likelihood of a text is that of each of its words when it alone is hidden
    (pseudo-likelihood, arXiv 1910.14659).
    """

    name = "masked_lm"

    def __init__(
        self, config: MaskedLMConfig, sizes: CLIPConfig, cell_channels: int, vocabulary: TokenVocabulary
    ) -> None:
        super().__init__(vocabulary)
        self.masked = config.masked
        self.decoder = CaptionDecoder(sizes.text, cell_channels, vocabulary.rows, causal=False)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean over the batch's hidden words of their cross entropy."""
        rows = self.vocabulary(tokens)
        hidden = self._draw(rows, tokens.shape[1])
        logits = self.decoder(images, rows.masked_fill(hidden, MASK), rows == PADDING)[hidden]  # [n, V]
        total = F.cross_entropy(logits.float(), rows[hidden], reduction="sum")
        return total / _mean_count(hidden.sum())

    def log_likelihood(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns [B, N]: the sum of the log-probabilities of each text's words, each hidden alone."""
        rows = self.vocabulary(tokens)
        owner, place = (_without_ends(rows) != PADDING).nonzero(as_tuple=True)  # [M], one per word
        right, copies = rows[owner, place], rows[owner]
        copies[torch.arange(len(copies), device=rows.device), place] = MASK  # [M, T]
        found = images.new_zeros(len(images), len(rows), dtype=torch.float32)
        for cells, some in in_pairs(images, len(copies), PAIRS_AT_ONCE):
            texts = copies[some].repeat(len(images), 1)
            logits = self.decoder(cells, texts, texts == PADDING)
            where = place[some].repeat(len(images))
            known = logits[torch.arange(len(texts), device=rows.device), where].float().log_softmax(1)
            words = known.gather(1, right[some].repeat(len(images))[:, None]).view(len(images), -1)
            found.index_add_(1, owner[some], words)
        return found

    def _draw(self, rows: Tensor, length: int) -> Tensor:
        """Returns [B, T] bool: which words are hidden.

        Every process draws for all rows of the batch and keeps its own, so that their number changes nothing.
        """
        count = len(rows)
        drawn = torch.rand(distributed.world() * count, length)  # on the CPU, whose state is in checkpoints
        mine = drawn[distributed.rank() * count :][:count, : rows.shape[1]].to(rows.device)
        words = _without_ends(rows) != PADDING
        mine = mine.masked_fill(~words, 2.0)
        least = F.one_hot(mine.argmin(1), rows.shape[1]).bool()
        return words & ((mine < self.masked) | least)


def _mean_count(count: Tensor) -> Tensor:
    """Returns how many tokens a process predicts on average; 1 when it is none."""
    return distributed.mean(count.detach().float()).clamp_min(1)
