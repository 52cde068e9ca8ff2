"""What the contrastive loss may read besides a region's first concept, against loops over single regions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError
from regionclip.training.losses import REGION_TEXT, RegionTextBatch, SoftNames

C, D, SCALE = 6, 8, 12.0
IDS = torch.tensor([[0, 1, 2], [1, 0, 0], [3, 4, 0], [0, 2, 5]])
PROBS = torch.tensor([[0.6, 0.2, 0.0], [0.5, 0.5, 0.0], [0.9, 0.0, 0.0], [0.4, 0.3, 0.1]]).double()
IMAGES = torch.tensor([0, 0, 1, 1])
FAMILIES = [0, 1, 2, 3, 4, 4]


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=1)


def batch(regions: Tensor, weights: Tensor | None = None, families: list[int] = FAMILIES) -> RegionTextBatch:
    soft = SoftNames.gathered(IDS, PROBS, IMAGES, weights, [len(IDS)])
    none = torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    first = IDS[:, 0].contiguous()
    return RegionTextBatch(regions, first, regions, first, *none, torch.tensor(families), soft)


def loss_of(spec: dict[str, Any], case: RegionTextBatch, texts: Tensor) -> float:
    part = build_plugin(REGION_TEXT, {"name": "softmax", **spec}).double()
    return float(part(case, texts[case.present], torch.tensor(SCALE, dtype=torch.float64)))


def held(row: int) -> dict[int, float]:
    """The concepts of a region that have a probability."""
    pairs = zip(IDS[row].tolist(), PROBS[row].tolist(), strict=True)
    return {concept: prob for concept, prob in pairs if prob}


def naive(
    regions: Tensor, texts: Tensor, soft: bool, hard: float, weights: list[float], families: list[int]
) -> float:
    def logit(row: int, concept: int) -> float:
        return SCALE * float(regions[row] @ texts[concept])

    rows = range(len(IDS))
    present = sorted({concept for row in rows for concept in held(row)})
    mean = sum(weights) / len(weights)
    weights = [weight / mean for weight in weights]
    to_text = 0.0
    for row in rows:
        own = int(IDS[row, 0])
        kin = {c for c in present if c != own and families[c] == families[own]}
        target = {c: p for c, p in held(row).items() if c not in kin} if soft else {own: 1.0}
        beside = {c for other in rows if IMAGES[other] == IMAGES[row] for c in held(other)} - target.keys()
        shares = {
            c: math.exp(logit(row, c)) * (hard if hard and c in beside else 1)
            for c in present
            if c not in kin
        }
        for concept, prob in target.items():
            share = shares[concept] / sum(shares.values())
            to_text -= weights[row] * prob / sum(target.values()) * math.log(share) / len(IDS)
    to_region, spoken = 0.0, sorted(set(IDS[:, 0].tolist()))
    for concept in spoken:
        mine = {row: held(row)[concept] if soft else 1.0 for row in rows if concept in held(row)}
        if not soft:
            mine = {row: 1.0 for row in rows if int(IDS[row, 0]) == concept}
        rivals = [row for row in rows if row not in mine and families[int(IDS[row, 0])] != families[concept]]
        total = sum(math.exp(logit(row, concept)) for row in [*mine, *rivals])
        mass = sum(prob * weights[row] for row, prob in mine.items())
        for row, prob in mine.items():
            share = math.exp(logit(row, concept)) / total
            to_region -= prob * weights[row] / mass * math.log(share) / len(spoken)
    return (to_text + to_region) / 2


@pytest.mark.parametrize("families", [[0, 1, 2, 3, 4, 4], [0, 0, 2, 3, 4, 5]])
@pytest.mark.parametrize("hard", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_naive_loop(soft: bool, hard: float, weighted: bool, families: list[int]) -> None:
    regions, texts = unit(4, 1), unit(C, 2)
    weights = [0.5, 0.1, 0.9, 0.3] if weighted else [1.0] * 4
    spec = {"soft_labels": soft, "hard_negatives": hard, "localization": weighted}
    case = batch(regions, torch.tensor(weights, dtype=torch.float64) if weighted else None, families)
    assert loss_of(spec, case, texts) == pytest.approx(
        naive(regions, texts, soft, hard, weights, families), rel=1e-9
    )


def test_names_of_an_image_are_negatives_although_no_region_was_sampled_for_them() -> None:
    regions, texts = unit(4, 1), unit(C, 2)
    assert batch(regions).present.tolist() == [0, 1, 2, 3, 5]  # 4 has no probability
    plain = loss_of({}, batch(regions), texts)
    assert loss_of({"hard_negatives": 5.0}, batch(regions), texts) > plain


def test_a_region_that_shows_two_things_is_pulled_to_both() -> None:
    texts = unit(C, 2)
    middle = F.normalize(texts[0] + texts[1], dim=0)
    regions = unit(4, 1)
    both, first = regions.clone(), regions.clone()
    both[1], first[1] = middle, texts[1]  # the teacher says half and half
    soft = {"soft_labels": True}
    assert loss_of(soft, batch(both), texts) < loss_of(soft, batch(first), texts)


def test_a_negative_number_of_hard_negatives_is_refused() -> None:
    with pytest.raises(InputError, match="hard_negatives"):
        build_plugin(REGION_TEXT, {"name": "softmax", "hard_negatives": -1.0})
