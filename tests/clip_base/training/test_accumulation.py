from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clip_base.data.batch import ImageBatch, ImageTextBatch
from clip_base.models.bottleneck import freeze_batch_norm
from clip_base.models.clip import CLIP, set_checkpointing
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.training.pretrain import PretrainConfig
from clip_base.training.tasks import ContrastiveTask

TEXT = TextConfig(width=32, heads=2, layers=2, context_length=8, vocab_size=64)
TOWERS = {
    "vit": VisionConfig(kind="vit", layers=[2], width=32, patch=8, resolution=32, head_width=16),
    "resnet": VisionConfig(kind="resnet", layers=[1, 1, 1, 1], width=8, resolution=32, head_width=32),
}


def batch() -> ImageTextBatch:
    """Seven pairs, two of them with equal texts, of different lengths."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 62, (7, 8), generator=generator)
    for row, end in enumerate((7, 2, 4, 7, 1, 3, 5)):
        tokens[row, end], tokens[row, end + 1 :] = 63, 0
    tokens[6] = tokens[1]
    return ImageTextBatch(ImageBatch.whole(torch.randn(7, 3, 32, 32, generator=generator)), tokens)


def task(kind: str, accumulate: int, frozen: bool = True) -> ContrastiveTask:
    torch.manual_seed(11)
    model = CLIP(CLIPConfig(16, TOWERS[kind], TEXT))
    if kind == "resnet":
        for part in model.visual.modules():
            if isinstance(part, nn.BatchNorm2d):  # as in a trained tower: no block is the identity
                nn.init.uniform_(part.weight, 0.5, 1.5)
        if frozen:
            freeze_batch_norm(model.visual)
    return ContrastiveTask(model, accumulate=accumulate).train()


def gradients(trained: ContrastiveTask) -> dict[str, Any]:
    loss = trained(batch())["contrastive"]
    loss.backward()
    found = {name: parameter.grad for name, parameter in trained.named_parameters()}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("kind", list(TOWERS))
@pytest.mark.parametrize("accumulate", [2, 3, 7, 20])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(kind: str, accumulate: int) -> None:
    expected = gradients(task(kind, 1))
    assert all(gradient is not None for gradient in expected.values())
    torch.testing.assert_close(gradients(task(kind, accumulate)), expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", list(TOWERS))
def test_parts_and_gradient_checkpointing_go_together(kind: str) -> None:
    expected, both = gradients(task(kind, 1)), task(kind, 3)
    set_checkpointing(both)
    torch.testing.assert_close(gradients(both), expected, rtol=1e-3, atol=2e-5)


def test_parts_keep_no_activations_of_the_towers() -> None:
    def kept(accumulate: int) -> int:
        sizes: list[int] = []
        trained = task("vit", accumulate)
        own = {parameter.data_ptr() for parameter in trained.parameters()}

        def count(value: torch.Tensor) -> torch.Tensor:
            if value.data_ptr() not in own:
                sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            trained(batch())
        return sum(sizes)

    assert kept(3) < kept(1) / 5  # what is left are the pixels


def test_each_part_counts_once_in_the_statistics_of_batch_norms() -> None:
    trained = task("resnet", 2, frozen=False)
    trained(batch())["contrastive"].backward()
    norm = trained.model.visual.bn1
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 2
    before = norm.running_mean.clone() if norm.running_mean is not None else None
    trained = task("resnet", 2, frozen=False)
    with torch.no_grad():
        trained(batch())
    assert torch.equal(trained.model.visual.bn1.running_mean, before)


def test_parts_are_at_least_one() -> None:
    with pytest.raises(InputError, match="accumulate must be at least 1, found 0"):
        PretrainConfig(out="x", accumulate=0)
