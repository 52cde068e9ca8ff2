"""Region losses against float64 loops over single regions and concepts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regionclip.losses import distillation, region_text_contrastive

C, D, SCALE = 6, 8, 12.0


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def cosine(a: Tensor, b: Tensor) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def log_share(chosen: float, values: list[float]) -> float:
    top = max(values)
    return chosen - top - math.log(math.fsum(math.exp(value - top) for value in values))


def test_distillation_is_the_cross_entropy_of_the_stored_concepts() -> None:
    logits = torch.randn(5, C, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1], [5, 2], [3, 0], [1, 4], [2, 0]])
    probs = torch.tensor([[0.7, 0.1], [0.4, 0.4], [0.2, 0.0], [0.9, 0.1], [0.5, 0.3]])
    total = 0.0
    for row in range(5):
        mass = float(probs[row].sum())
        for concept, prob in zip(ids[row].tolist(), probs[row].tolist(), strict=True):
            share = log_share(float(logits[row, concept]), logits[row].tolist())
            total -= prob / mass * share
    assert float(distillation(logits, ids, probs)) == pytest.approx(total / 5, rel=1e-5)


def test_distillation_differs_from_kl_by_the_teachers_entropy_alone() -> None:
    logits = torch.randn(4, C, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, C, dtype=torch.float64).softmax(1)
    ids = torch.arange(C).repeat(4, 1)
    mine = torch.autograd.grad(distillation(logits, ids, teacher), logits)[0]
    kl = F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")
    torch.testing.assert_close(mine, torch.autograd.grad(kl, logits)[0])


def naive_contrastive(regions: Tensor, texts: Tensor, concepts: list[int], families: list[int]) -> float:
    present = sorted(set(concepts))
    logits = {
        (row, concept): SCALE * cosine(regions[row], texts[concept])
        for row in range(len(concepts))
        for concept in present
    }

    def is_kin(row: int, concept: int) -> bool:
        return concepts[row] != concept and families[concepts[row]] == families[concept]

    to_text = 0.0
    for row, own in enumerate(concepts):
        rivals = [logits[row, concept] for concept in present if not is_kin(row, concept)]
        to_text -= log_share(logits[row, own], rivals) / len(concepts)
    to_region = 0.0
    for concept in present:
        rows = [row for row in range(len(concepts)) if not is_kin(row, concept)]
        mine = [row for row in rows if concepts[row] == concept]
        for row in mine:
            share = log_share(logits[row, concept], [logits[other, concept] for other in rows])
            to_region -= share / len(mine) / len(present)
    return (to_text + to_region) / 2


@pytest.mark.parametrize(
    ("concepts", "families"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
        ([0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 1, 4, 5, 0], [0, 0, 2, 3, 4, 4]),
        ([3, 3, 3], [0, 1, 2, 3, 4, 5]),
        ([0, 1], [0, 0, 2, 3, 4, 5]),
    ],
)
def test_contrastive_is_the_naive_loop(concepts: list[int], families: list[int]) -> None:
    regions, texts = unit(len(concepts), 1), unit(C, 2)
    found = region_text_contrastive(regions, texts, torch.tensor(concepts), SCALE, torch.tensor(families))
    assert float(found) == pytest.approx(naive_contrastive(regions, texts, concepts, families), rel=1e-4)


def test_a_relative_is_neither_pushed_away_nor_pulled() -> None:
    regions, texts = unit(2, 1).requires_grad_(), unit(C, 2).requires_grad_()
    loss = region_text_contrastive(
        regions, texts, torch.tensor([0, 1]), SCALE, torch.tensor([0, 0, 2, 3, 4, 5])
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert regions.grad is not None
    assert bool(regions.grad.isfinite().all())
    assert float(regions.grad.abs().max()) < 1e-6


def test_regions_that_match_their_text_have_nearly_no_loss() -> None:
    texts = torch.eye(C, D)
    concepts = torch.tensor([0, 1, 1, 5])
    right = region_text_contrastive(texts[concepts], texts, concepts, 100.0, torch.arange(C))
    wrong = region_text_contrastive(texts[concepts.roll(1)], texts, concepts, 100.0, torch.arange(C))
    # A text whose two regions match equally well shares its mass: ln 2 for one of three texts, halved.
    assert float(right) == pytest.approx(math.log(2) / 3 / 2, abs=1e-4)
    assert float(wrong) > 10


def test_no_regions_are_no_loss_and_can_be_gone_back_through() -> None:
    logits = torch.zeros(0, C, requires_grad=True)
    distillation(logits, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)).backward()
    regions = torch.zeros(0, D, requires_grad=True)
    loss = region_text_contrastive(
        regions, unit(C, 0), torch.zeros(0, dtype=torch.int64), SCALE, torch.arange(C)
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert regions.grad is not None
