"""What is trained on image-text pairs: a batch in, a dict of named losses out."""

# b images of this process, D embedding size
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_base.data.batch import ImageTextBatch
from clip_base.jobs.config import Plugin
from clip_base.models.bottleneck import recompute_contexts
from clip_base.models.clip import CLIP
from clip_base.models.predictor import TextObjective, TextPredictor
from clip_base.training.losses import Contrastive, ContrastiveConfig, PairEmbeddings
from clip_base.weights.native import save_clip
from clip_base.weights.predictors import save_predictor

MAX_LOGIT_SCALE = math.log(100)  # arXiv 2103.00020, section 2.5


class ContrastiveTask(nn.Module):
    """CLIP's training task.

    With `accumulate` a batch is embedded part by part. What the towers computed on the way is not kept: each
    part is embedded once more in the backward pass, when the gradient of the whole batch's loss with respect
    to its embeddings is known (GradCache, arXiv 2101.06983). Gradients are those of the undivided batch, but
    for batch norms that take statistics: theirs are a part's, not the batch's.

    Args:
        model: trained in place.
        objective: the loss; None: CLIP's.
        accumulate: parts that a process's share of the batch is embedded in.
    """

    def __init__(self, model: CLIP, objective: nn.Module | None = None, accumulate: int = 1) -> None:
        super().__init__()
        self.model, self.accumulate = model, accumulate
        self.objective = objective or Contrastive(ContrastiveConfig())

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Returns the loss of the batch, named as the objective is."""
        images = self._embed(self.model.encode_image, batch.images.pixels)
        texts = self._embed(self.model.encode_text, batch.tokens)
        return {str(self.objective.name): self.pair_loss(images, texts, batch.tokens)}

    def pair_loss(self, images: Tensor, texts: Tensor, tokens: Tensor) -> Tensor:
        """Returns the scalar loss of this process's embeddings [b, D], of unit length, among those of all."""
        with torch.autocast(images.device.type, enabled=False):
            wanted = tokens if getattr(self.objective, "merge_equal", False) else None
            pairs = PairEmbeddings.gathered(images, texts, wanted)
            loss: Tensor = self.objective(pairs, self.model.logit_scale.exp())
            return loss

    def _embed(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Returns [b, D], unit length."""
        if self.accumulate == 1:
            return F.normalize(encode(inputs).float(), dim=-1)
        parts = [
            checkpoint(encode, part, use_reentrant=False, context_fn=recompute_contexts)
            for part in inputs.chunk(self.accumulate)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def log_scalars(self) -> dict[str, float]:
        """Returns what the log shows beside the loss: the factor on the cosines, the sigmoid loss's bias."""
        figures = {"logit_scale": float(self.model.logit_scale.detach().exp())}
        bias = getattr(self.objective, "bias", None)
        return figures if bias is None else {**figures, "bias": float(bias.detach())}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the logit scale in its published range."""
        self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def save(self, path: Path) -> None:
        """Writes the CLIP."""
        save_clip(self.model, path)


class PredictionTask(nn.Module):
    """Training of a vision tower by predicting captions, without a text tower.

    Args:
        model: trained in place.
        spec: name and options of its objective; `weight` is the factor on the loss.
    """

    def __init__(self, model: TextPredictor, spec: Plugin) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Returns the loss of the batch, named as the objective is."""
        images = self.model.encode_image(batch.images.pixels)
        objective = self.model.objective
        return {objective.name: self.spec["weight"] * objective(images, batch.tokens)}

    def log_scalars(self) -> dict[str, float]:
        """Returns what the log shows beside the loss: nothing."""
        return {}

    def save(self, path: Path) -> None:
        """Writes tower and objective."""
        save_predictor(path, self.model.config, self.model.visual, self.model.objective, self.spec)


class JointTask(ContrastiveTask):
    """CLIP's training with the prediction of captions beside it, from one pass of the vision tower.

    Args:
        model: trained in place.
        predictor: reads the vision tower's output.
        spec: name and options of that objective; `weight` and `contrastive` are the factors on the losses.
    """

    def __init__(self, model: CLIP, predictor: TextObjective, spec: Plugin) -> None:
        super().__init__(model)
        self.predictor, self.spec = predictor, spec

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Returns both losses of the batch."""
        if self.predictor.reads == "cells":
            read, images = self.model.visual.cells_and_embedding(batch.images.pixels)
        else:
            read = images = self.model.encode_image(batch.images.pixels)
        texts = F.normalize(self.model.encode_text(batch.tokens).float(), dim=-1)
        contrastive = self.pair_loss(F.normalize(images.float(), dim=-1), texts, batch.tokens)
        predicted = self.spec["weight"] * self.predictor(read, batch.tokens)
        name = str(self.objective.name)
        return {name: self.spec["contrastive"] * contrastive, self.predictor.name: predicted}

    def save(self, path: Path) -> None:
        """Writes the CLIP, and beside it the vision tower with the objective, as `predictor.safetensors`."""
        super().save(path)
        beside = path.with_name(path.name.replace("model", "predictor", 1))
        save_predictor(beside, self.model.config, self.model.visual, self.predictor, self.spec)
