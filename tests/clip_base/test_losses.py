from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clip_base.losses import contrastive, equal_rows


def naive(images: list[list[float]], texts: list[list[float]], scale: float, same: list[list[bool]]) -> float:
    """The loss by its definition, in plain Python floats."""
    logits = [[scale * sum(a * b for a, b in zip(i, t, strict=True)) for t in texts] for i in images]
    columns = [list(column) for column in zip(*logits, strict=True)]

    def mean_entropy(rows: list[list[float]]) -> float:
        entropies = []
        for row, equal in zip(rows, same, strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            entropies.append(-sum((v - log_sum) / sum(equal) for v, e in zip(row, equal, strict=True) if e))
        return sum(entropies) / len(entropies)

    return (mean_entropy(logits) + mean_entropy(columns)) / 2


@pytest.fixture
def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 8, dtype=torch.float64, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def test_the_loss_is_its_definition(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, texts = embeddings
    scale = torch.tensor(9.0, dtype=torch.float64)
    alone = torch.eye(6, dtype=torch.bool)
    expected = naive(images.tolist(), texts.tolist(), 9.0, alone.tolist())
    assert contrastive(images, texts, scale).item() == pytest.approx(expected, rel=1e-12)
    assert contrastive(images, texts, scale, alone).item() == pytest.approx(expected, rel=1e-12)
    single = contrastive(images.float(), texts.float(), scale.float())
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_share_the_target(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, texts = embeddings
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [1, 2], [3, 4]])
    same = equal_rows(tokens)
    assert same.tolist() == [[bool((a == b).all()) for b in tokens] for a in tokens]
    expected = naive(images.tolist(), texts.tolist(), 5.0, same.tolist())
    actual = contrastive(images, texts, torch.tensor(5.0, dtype=torch.float64), same)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_all_captions_equal_leaves_nothing_to_tell_apart() -> None:
    images = F.normalize(torch.ones(4, 3), dim=-1)
    loss = contrastive(images, images, torch.tensor(10.0), torch.ones(4, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
