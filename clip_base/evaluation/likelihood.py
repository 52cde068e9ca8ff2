"""Classification by the likelihood of prompts, with models that were pretrained by predicting captions."""

# B images, C classes, K templates, T token positions
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clip_base.evaluation.features import Embedder, FeatureConfig
from clip_base.evaluation.prompts import cut_texts, fill
from clip_base.models.predictor import UNKNOWN, TextPredictor
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import note, quote
from clip_base.storage.hashing import text_hash
from clip_base.weights.predictors import load_predictor


class PromptScorer:
    """Scores images against class names by how likely the names' prompts are.

    A class's likelihood is the mean of its prompts' (arXiv 2103.00020, section 2.3, leaves open how; a prompt
    ensemble of likelihoods is a mixture). Equal names get equal scores.

    Args:
        model: in evaluation mode whenever this is called.
        names: of the C classes.
        templates: K prompts with `{}` for the name.
        truncate: cut prompts that are too long instead of refusing them.

    Raises:
        InputError: a prompt is too long.
    """

    def __init__(
        self, model: TextPredictor, names: Sequence[str], templates: Sequence[str], truncate: bool = False
    ) -> None:
        self.model, self.templates = model, len(templates)
        distinct = list(dict.fromkeys(names))
        self._places = [distinct.index(name) for name in names]
        texts = [fill(template, name) for name in distinct for template in templates]
        tokenizer = Tokenizer(model.config.text.context_length)
        tokens = tokenizer(texts, truncate)
        cut = cut_texts(tokenizer, texts, tokens)
        if cut:
            note(f"{len(cut)} prompts are too long for the model and are cut; the first: {quote(cut[0])}")
        self._tokens = tokens.to(next(model.parameters()).device)  # [distinct · K, T]
        self._note_unknown(distinct, tokenizer)

    def _note_unknown(self, names: list[str], tokenizer: Tokenizer) -> None:
        """Notes the names with words that no caption had, which all count as the same unknown one."""
        vocabulary = self.model.objective.vocabulary
        rows = vocabulary(tokenizer(names, truncate=True).to(vocabulary.ids.device))
        unknown = [name for name, row in zip(names, (rows == UNKNOWN).any(1).tolist(), strict=True) if row]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            shown = ", ".join(map(quote, unknown[:5]))
            note(
                f"{shown}{more}: no caption that the model was trained on had all of these words; they are "
                "scored as unknown ones"
            )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns [B, C] float32 logarithms of likelihoods for [B, 3, R, R] normalized pixels."""
        scores: Tensor = self.model(pixels, self._tokens).float()  # [B, distinct · K]
        mixed = scores.view(len(scores), -1, self.templates).logsumexp(2) - math.log(self.templates)
        by_name: Tensor = mixed[:, self._places]
        return by_name


class LikelihoodEmbedder(Embedder):
    """An `Embedder` whose features are scores of classes: [K, C] logarithms of likelihoods, cached as such.

    Args:
        config: the weights, of a `TextPredictor`, and how to compute.
        out: the run's folder.
        names: of the classes.
        templates: prompts with `{}` for the name.
    """

    def __init__(
        self, config: FeatureConfig, out: Path, names: Sequence[str], templates: Sequence[str]
    ) -> None:
        super().__init__(config, out, f"likelihood {text_hash([*names, '', *templates])}")
        predictor = load_predictor(self.path).to(self.device)
        self._scorer = PromptScorer(predictor, names, templates)

    @functools.cached_property
    def model(self) -> TextPredictor:  # type: ignore[override]
        """The model, read at once: a name that is too long for it shows before images are read."""
        return self._scorer.model

    def _features(self, pixels: Tensor) -> Tensor:
        return self._scorer(pixels)
