"""Scores and suppression: what is fused, what is left out, and that nothing is lost on the way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clip_base.runtime.errors import InputError
from regionclip.models.postprocess import (
    DetectorConfig,
    fuse,
    fuse_logits,
    postprocess,
    score,
    to_unit_interval,
)
from regionclip.structures import boxes as B
from regionclip.structures.regions import Regions

ALPHA = torch.tensor([0.3, 0.3, 0.7])


def random_boxes(count: int, side: float = 100.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * side / 2], 1)


def regions_of(scores: Tensor | None, logits: Tensor | None = None, count: int = 4) -> Regions:
    return Regions(random_boxes(count), torch.zeros(count, dtype=torch.int64), scores, logits=logits)


def whole_result(boxes: Tensor, scores: Tensor, config: DetectorConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What suppression over every pair above the threshold gives, one name after the other."""
    found = []
    for label in range(scores.shape[1]):
        rows = (scores[:, label] >= config.min_score).nonzero()[:, 0]
        mine, same = scores[rows, label], torch.zeros(len(rows), dtype=torch.int64)
        if config.nms_type == "soft":
            kept, values = B.soft_nms(
                boxes[rows], mine, same, config.soft_nms_sigma, config.soft_nms_min_score
            )
        else:
            kept = B.nms(boxes[rows], mine, same, config.nms)
            values = mine[kept]
        found += [
            (float(v), label, tuple(boxes[rows[k]].tolist())) for v, k in zip(values, kept, strict=True)
        ]
    found.sort(key=lambda one: -one[0])
    found = found[: config.max_detections]
    return (
        torch.tensor([box for _, _, box in found]).reshape(-1, 4),
        torch.tensor([value for value, _, _ in found]),
        torch.tensor([label for _, label, _ in found]),
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8),
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
)
def test_fused_scores_lie_between_what_they_fuse(
    objectness: list[float], probabilities: list[float], alpha: list[float]
) -> None:
    o, p = torch.tensor(objectness), torch.tensor(probabilities).expand(len(objectness), 3)
    scores = fuse(o, p, torch.tensor(alpha))
    assert scores.shape == (len(objectness), 3)
    assert bool(scores.isfinite().all())
    assert bool((scores >= torch.minimum(o[:, None], p) - 1e-6).all())
    assert bool((scores <= torch.maximum(o[:, None], p) + 1e-6).all())


def test_fusion_weighs_by_alpha() -> None:
    scores = fuse(torch.tensor([0.25]), torch.tensor([[0.81, 0.81, 0.81]]), torch.tensor([0.0, 1.0, 0.5]))
    assert scores[0].tolist() == pytest.approx([0.81, 0.25, (0.25 * 0.81) ** 0.5])


def test_the_released_fusion_is_the_root_of_logit_times_probability() -> None:
    scores = fuse_logits(torch.tensor([4.0, 0.25]), torch.tensor([[0.5, 0.02], [0.64, 0.0]]))
    assert scores[0].tolist() == pytest.approx([math.sqrt(2), math.sqrt(0.08)])
    assert scores[1].tolist() == pytest.approx([0.4, 0.0])


def test_the_released_fusion_drops_whole_regions_of_negative_logit() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 40], [60, 60, 80, 80]])
    probabilities = torch.full((3, 2), 0.5)
    scores = fuse_logits(torch.tensor([2.0, -0.1, 1.0]), probabilities)
    found, values, labels = postprocess(boxes, scores, DetectorConfig(fusion="legacy_logit"))
    assert found.tolist() == [[0, 0, 9, 9]] * 2 + [[60, 60, 80, 80]] * 2
    assert values.tolist() == pytest.approx([1, 1, math.sqrt(0.5), math.sqrt(0.5)])
    assert labels.tolist() == [0, 1, 0, 1]


def test_the_default_fusion_loses_no_region_of_negative_logit() -> None:
    logits = torch.tensor([2.0, -3.0, -0.1, 1.0])
    scores = score(regions_of(logits.sigmoid(), logits), torch.full((4, 3), 0.3), ALPHA, "geometric")
    assert bool((scores > 0).all())
    assert bool((scores <= 1).all())
    torch.testing.assert_close(scores, fuse(logits.sigmoid(), torch.full((4, 3), 0.3), ALPHA))


def test_large_logits_are_not_rounded_by_the_sigmoid() -> None:
    logits = torch.tensor([15.0, 20.0, 25.0, 30.0])  # the sigmoid of the last three is 1 in float32
    scores = score(regions_of(logits.sigmoid(), logits), torch.full((4, 1), 0.5), ALPHA[:1], "legacy_logit")
    assert scores[:, 0].tolist() == pytest.approx((logits / 2).sqrt().tolist())


def test_objectness_without_logits_takes_the_inverse_sigmoid() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 4.0])
    probabilities = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    with_logits = score(regions_of(logits.sigmoid(), logits), probabilities, ALPHA, "legacy_logit")
    without = score(regions_of(logits.sigmoid()), probabilities, ALPHA, "legacy_logit")
    torch.testing.assert_close(without, with_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["geometric", "legacy_logit"])
def test_regions_without_objectness_keep_the_order_of_their_probabilities(fusion: str) -> None:
    probabilities = torch.tensor([[0.1], [0.7], [0.3], [0.2]])
    scores = score(regions_of(None), probabilities, ALPHA[:1], fusion)
    assert scores[:, 0].argsort().tolist() == probabilities[:, 0].argsort().tolist()


def test_reported_scores_are_in_range_and_in_order() -> None:
    raw = torch.tensor([4.0, 1.5, 1.0, 0.2, 0.001])
    shown = to_unit_interval(raw, "legacy_logit")
    assert bool(((shown > 0) & (shown < 1)).all())
    assert bool((shown.diff() < 0).all())
    assert torch.equal(to_unit_interval(raw, "geometric"), raw)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 60),
    st.integers(1, 9),
    st.sampled_from(["soft", "nms"]),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_looking_at_the_best_pairs_gives_what_all_pairs_give(
    seed: int, regions: int, names: int, suppression: str, detections: int, min_score: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Many boxes on few places: suppression lowers most pairs far below those that were not looked at.
    boxes = random_boxes(4, 30, seed).repeat(regions // 4 + 1, 1)[:regions]
    boxes = boxes + torch.rand(regions, 4, generator=generator)
    scores = torch.rand(regions, names, generator=generator) ** 2
    config = DetectorConfig(
        nms_type=suppression,
        max_detections=detections,
        min_score=min_score,
        soft_nms_min_score=0.001,
        nms=0.4,
    )
    found, values, labels = postprocess(boxes, scores, config)
    wanted_boxes, wanted_values, wanted_labels = whole_result(boxes, scores, config)
    assert len(values) == len(wanted_values)
    torch.testing.assert_close(values, wanted_values, atol=1e-6, rtol=1e-4)
    # Where two scores are equal but for rounding, either may come first.
    apart = torch.ones(len(values), dtype=torch.bool)
    near = wanted_values.diff().abs() < 1e-6
    apart[1:] &= ~near
    apart[:-1] &= ~near
    if len(values):
        apart[-1] = False
    assert torch.equal(labels[apart], wanted_labels[apart])
    torch.testing.assert_close(found[apart], wanted_boxes[apart])


@pytest.mark.parametrize("suppression", ["soft", "nms"])
def test_a_crowd_of_better_pairs_hides_no_other_object(suppression: str) -> None:
    crowd = torch.tensor([[0.0, 0, 50, 50]]) + torch.linspace(0, 0.5, 400)[:, None]
    boxes = torch.cat([crowd, torch.tensor([[60.0, 60, 90, 90]])])
    scores = torch.cat([torch.linspace(0.9, 0.8, 400), torch.tensor([0.7])])[:, None]
    found, values, _ = postprocess(boxes, scores, DetectorConfig(nms_type=suppression, max_detections=2))
    assert found[:2].tolist() == [[0, 0, 50, 50], [60, 60, 90, 90]]
    assert values[:2].tolist() == pytest.approx([0.9, 0.7])


def lines_run(work: Callable[[], object]) -> int:
    """Returns how many lines of Python a call runs: what it takes, however fast or busy the machine is."""
    count = 0

    def trace(frame: FrameType, event: str, given: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("nms_type", ["soft", "nms"])
def test_a_thousand_proposals_in_1203_classes_run_few_lines(nms_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(1000, 600)
    scores = (torch.randn(1000, 1203, generator=generator) * 3).softmax(1).sqrt()
    config = DetectorConfig(nms_type=nms_type, max_detections=300)
    assert (scores >= config.min_score).sum() > 300_000
    # A line for each pair above the threshold would be nearly a million.
    assert lines_run(lambda: postprocess(boxes, scores, config)) < 5_000


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"alpha_novel must be in \[0, 1\], found 1\.5"):
        DetectorConfig(alpha_novel=1.5)
    with pytest.raises(InputError, match="detections must be at least 1 per image, found 0"):
        DetectorConfig(max_detections=0)
    with pytest.raises(InputError, match="soft_nms_sigma=0 above 0"):
        DetectorConfig(soft_nms_sigma=0.0)
