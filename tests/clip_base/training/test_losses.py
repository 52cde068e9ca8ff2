from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clip_base.training.losses import contrastive

SAME = [0, 1, 0, 2, 0, 1]  # which captions are equal


def naive(images: list[list[float]], texts: list[list[float]], scale: float, names: list[int]) -> float:
    """The loss by its definition, in plain Python floats; a row's target is spread over equal captions."""
    logits = [[scale * sum(a * b for a, b in zip(i, t, strict=True)) for t in texts] for i in images]
    columns = [list(column) for column in zip(*logits, strict=True)]

    def mean_entropy(rows: list[list[float]]) -> float:
        total = 0.0
        for row, own in zip(rows, names, strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            equal = [value for value, name in zip(row, names, strict=True) if name == own]
            total -= sum(value - log_sum for value in equal) / len(equal)
        return total / len(rows)

    return (mean_entropy(logits) + mean_entropy(columns)) / 2


@pytest.fixture
def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 8, dtype=torch.float64, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def test_the_loss_is_its_definition(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, texts = embeddings
    scale = torch.tensor(9.0, dtype=torch.float64)
    expected = naive(images.tolist(), texts.tolist(), 9.0, list(range(6)))
    assert contrastive(images, texts, scale).item() == pytest.approx(expected, rel=1e-12)
    single = contrastive(images.float(), texts.float(), scale.float())
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_are_no_negatives_of_each_other(
    embeddings: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, texts = embeddings
    texts = texts[torch.tensor(SAME)]  # equal captions have one embedding
    expected = naive(images.tolist(), texts.tolist(), 5.0, SAME)
    loss = contrastive(images, texts, torch.tensor(5.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_equal_captions_pull_their_image_as_one_shared_target_would(
    embeddings: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, captions = (part.clone().requires_grad_() for part in embeddings)
    names = torch.tensor(SAME)
    spread = (names[:, None] == names).double()
    spread /= spread.sum(1, keepdim=True)
    logits = 5 * images @ captions[names].T
    merged = (F.cross_entropy(logits, spread) + F.cross_entropy(logits.T, spread)) / 2
    expected = torch.autograd.grad(merged, (images, captions))
    loss = contrastive(images, captions[names], torch.tensor(5.0, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(loss, (images, captions)), expected)


def test_all_captions_equal_leaves_nothing_to_tell_apart() -> None:
    images = F.normalize(torch.ones(4, 3), dim=-1)
    assert contrastive(images, images, torch.tensor(10.0)).item() == pytest.approx(math.log(4), rel=1e-6)
