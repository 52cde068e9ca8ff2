"""Region losses against float64 loops over single regions and concepts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.jobs.config import build_plugin
from clip_base.runtime import distributed
from regionclip.training.losses import (
    REGION_TEXT,
    CrossBatchMemory,
    RegionTextBatch,
    cosine_distance,
    distillation,
)

C, D, SCALE = 6, 8, 12.0
APART = [0, 1, 2, 3, 4, 5]


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=1)


def cosine(a: Tensor, b: Tensor) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def log_share(chosen: float, values: list[float]) -> float:
    top = max(values)
    return chosen - top - math.log(math.fsum(math.exp(value - top) for value in values))


def named(
    regions: Tensor,
    concepts: list[int],
    families: list[int] = APART,
    old: tuple[Tensor, list[int]] = (unit(0, 0), []),
    own: slice = slice(None),
) -> RegionTextBatch:
    """Regions of all processes, of which `own` are this one's, and a memory."""
    everyone = torch.tensor(concepts, dtype=torch.int64)
    old_concepts = torch.tensor(old[1], dtype=torch.int64)
    return RegionTextBatch(
        regions[own], everyone[own], regions, everyone, old[0], old_concepts, torch.tensor(families)
    )


def loss_of(spec: dict[str, Any], case: RegionTextBatch, texts: Tensor, scale: float = SCALE) -> Tensor:
    part = build_plugin(REGION_TEXT, spec).double()
    result: Tensor = part(case, texts[case.present], torch.tensor(scale, dtype=torch.float64))
    return result


def test_distillation_is_the_divergence_from_the_stored_concepts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, C, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [5, 2], [3, 0], [1, 4], [2, 0]])
    probs = torch.tensor([[0.7, 0.1], [0.4, 0.4], [0.2, 0.0], [0.9, 0.1], [0.5, 0.3]], dtype=torch.float64)
    total = 0.0
    for row in range(5):
        mass = float(probs[row].sum())
        for concept, prob in zip(ids[row].tolist(), probs[row].tolist(), strict=True):
            if prob:
                share = log_share(float(logits[row, concept]), logits[row].tolist())
                total += prob / mass * (math.log(prob / mass) - share)
    assert float(distillation(logits, ids, probs)) == pytest.approx(total, rel=1e-12)


def test_a_student_that_agrees_with_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(4, C, dtype=torch.float64)
    ids = torch.arange(C).repeat(4, 1)
    assert float(distillation(logits, ids, logits.softmax(1))) == pytest.approx(0, abs=1e-12)


def test_cosine_distance_is_a_sum_over_regions() -> None:
    a, b = unit(4, 1), unit(4, 2)
    expected = math.fsum(1 - cosine(x, y) for x, y in zip(a, b, strict=True))
    assert float(cosine_distance(a, b)) == pytest.approx(expected, rel=1e-12)


def naive_softmax(
    regions: Tensor, texts: Tensor, concepts: list[int], families: list[int], old: tuple[Tensor, list[int]]
) -> float:
    present, columns = sorted({*concepts, *old[1]}), [*concepts, *old[1]]
    everything = [*regions, *old[0]]

    def is_kin(one: int, other: int) -> bool:
        return one != other and families[one] == families[other]

    def logit(column: int, concept: int) -> float:
        return SCALE * cosine(everything[column], texts[concept])

    to_text = 0.0
    for row, own in enumerate(concepts):
        rivals = [logit(row, concept) for concept in present if not is_kin(own, concept)]
        to_text -= log_share(logit(row, own), rivals) / len(concepts)
    to_region, spoken = 0.0, sorted(set(concepts))
    for concept in spoken:
        mine = [row for row, own in enumerate(concepts) if own == concept]
        rivals = [row for row, own in enumerate(columns) if families[own] != families[concept]]
        values = [logit(row, concept) for row in mine + rivals]
        for row in mine:
            to_region -= log_share(logit(row, concept), values) / len(mine) / len(spoken)
    return (to_text + to_region) / 2


CASES = [
    ([0, 1, 2, 3], APART),
    ([0, 0, 2, 2, 2, 5], APART),
    ([0, 1, 1, 4, 5, 0], [0, 0, 2, 3, 4, 4]),
    ([3, 3, 3], APART),
    ([0, 1], [0, 0, 2, 3, 4, 5]),
]
MEMORIES = [[], [1, 4, 4, 3], [0, 0, 5]]


@pytest.mark.parametrize(("concepts", "families"), CASES)
@pytest.mark.parametrize("old", MEMORIES)
def test_the_softmax_is_the_naive_loop(concepts: list[int], families: list[int], old: list[int]) -> None:
    regions, texts, memory = unit(len(concepts), 1), unit(C, 2), (unit(len(old), 3), old)
    found = loss_of({"name": "softmax"}, named(regions, concepts, families, memory), texts)
    assert float(found) == pytest.approx(naive_softmax(regions, texts, concepts, families, memory), rel=1e-11)


@pytest.mark.parametrize(("concepts", "families"), CASES)
@pytest.mark.parametrize("old", MEMORIES)
def test_the_sigmoid_is_the_naive_loop(concepts: list[int], families: list[int], old: list[int]) -> None:
    regions, texts = unit(len(concepts), 1), unit(C, 2)
    part = build_plugin(REGION_TEXT, {"name": "sigmoid", "scale": 7.0, "bias": -3.0}).double()
    scale, expected = float(part.log_scale.detach().exp()), 0.0
    for region, own in zip(regions, concepts, strict=True):
        for other in sorted({*concepts, *old}):
            if other == own or families[other] != families[own]:
                label = 1 if other == own else -1
                logit = scale * cosine(region, texts[other]) - 3
                expected += math.log(1 + math.exp(-label * logit)) / len(concepts)
    case = named(regions, concepts, families, (unit(len(old), 3), old))
    found = part(case, texts[case.present], torch.tensor(1.0))
    assert found.item() == pytest.approx(expected, rel=1e-11)


def test_scale_and_bias_of_the_sigmoid_are_learned() -> None:
    part = build_plugin(REGION_TEXT, {"name": "sigmoid"})
    case, texts = named(unit(3, 1).float(), [0, 1, 1]), unit(C, 2).float()
    part(case, texts[case.present], torch.tensor(1.0)).backward()
    assert float(part.log_scale.detach().exp()) == pytest.approx(10)
    assert float(part.bias.detach()) == -10
    assert float(part.log_scale.grad) != 0
    assert float(part.bias.grad) != 0


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_relative_is_neither_pushed_away_nor_pulled(name: str) -> None:
    regions, texts = unit(1, 1).requires_grad_(), unit(C, 2)
    alone = loss_of({"name": name}, named(regions, [0]), texts)
    expected = torch.autograd.grad(alone, regions)[0]
    kin = [0, 0, 2, 3, 4, 5]
    memory = (unit(3, 3), [1, 1, 0])  # a relative, and an older region of the same concept
    beside = loss_of({"name": name}, named(regions, [0], kin, memory), texts)
    torch.testing.assert_close(torch.autograd.grad(beside, regions)[0], expected)
    stranger = loss_of({"name": name}, named(regions, [0], kin, (unit(1, 3), [4])), texts)
    assert not torch.allclose(torch.autograd.grad(stranger, regions)[0], expected)


def test_regions_that_match_their_text_have_nearly_no_loss() -> None:
    texts = torch.eye(C, D, dtype=torch.float64)
    concepts = [0, 1, 1, 5]
    right = loss_of({"name": "softmax"}, named(texts[concepts], concepts), texts, 100)
    wrong = loss_of({"name": "softmax"}, named(texts[[5, 0, 1, 1]], concepts), texts, 100)
    # A text whose two regions match equally well shares its mass: ln 2 for one of three texts, halved.
    assert float(right) == pytest.approx(math.log(2) / 3 / 2, abs=1e-4)
    assert float(wrong) > 10


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("cut", [0, 1, 4, 6])
def test_the_mean_of_two_processes_is_the_loss_of_all_their_regions(
    name: str, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions, texts, memory = unit(6, 1).requires_grad_(), unit(C, 2).requires_grad_(), (unit(2, 3), [1, 3])
    concepts, families = [0, 1, 1, 4, 5, 0], [0, 0, 2, 3, 4, 4]
    whole = loss_of({"name": name}, named(regions, concepts, families, memory), texts)
    expected = torch.autograd.grad(whole, (regions, texts))
    monkeypatch.setattr(distributed, "world", lambda: 2)
    shares = []
    for rank, own in enumerate((slice(0, cut), slice(cut, 6))):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(loss_of({"name": name}, named(regions, concepts, families, memory, own), texts))
    mean = (shares[0] + shares[1]) / 2
    assert float(mean.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(mean, (regions, texts)), expected)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_no_regions_are_no_loss_and_can_be_gone_back_through(name: str) -> None:
    logits = torch.zeros(0, C, requires_grad=True)
    distillation(logits, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)).backward()
    regions = unit(0, 0).requires_grad_()
    loss = loss_of({"name": name}, named(regions, []), unit(C, 0))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert regions.grad is not None


def test_the_memory_holds_what_was_pushed_last() -> None:
    memory = CrossBatchMemory(4, D)
    assert [len(part) for part in memory.held()] == [0, 0]
    memory.push(unit(3, 1), torch.tensor([5, 6, 7]))
    memory.push(unit(2, 2), torch.tensor([8, 9]))
    regions, concepts = memory.held()
    assert concepts.tolist() == [8, 9, 5, 6]
    torch.testing.assert_close(regions, torch.cat([unit(2, 2), unit(3, 1)[:2]]).float())
    memory.push(unit(6, 3), torch.arange(6))
    assert memory.held()[1].tolist() == [0, 1, 2, 3]
    restored = CrossBatchMemory(4, D)
    restored.load_state_dict(memory.state_dict())
    assert torch.equal(restored.held()[0], memory.held()[0])


def test_a_memory_of_no_size_stays_empty() -> None:
    memory = CrossBatchMemory(0, D)
    memory.push(unit(3, 1), torch.tensor([5, 6, 7]))
    assert [len(part) for part in memory.held()] == [0, 0]
