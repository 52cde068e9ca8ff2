"""Boxes follow their image into the batch's frame and back, whatever is done to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_base.runtime.errors import InputError
from regionclip.structures.transforms import (
    JitterConfig,
    ResizeConfig,
    ResizeTransform,
    TrainingResizeConfig,
    draw_placement,
    random_resize,
    resize_shortest_edge,
    to_batch,
)
from regionclip.training.samples import RegionDataset, Sample

sides = st.integers(8, 400)


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> torch.Tensor:
    corners = [
        sorted(draw(st.lists(st.floats(0, limit, width=32), min_size=2, max_size=2)))
        for limit in (width, height)
    ]
    (x1, x2), (y1, y2) = corners
    return torch.tensor([[x1, y1, x2, y2]])


@settings(max_examples=100, deadline=None)
@given(st.data(), sides, sides, st.integers(16, 300), st.booleans())
def test_boxes_go_there_and_back(
    data: st.DataObject, height: int, width: int, short: int, flip: bool
) -> None:
    _, frame = resize_shortest_edge(np.zeros((height, width, 3), np.uint8), short, 2 * short, flip)
    box = data.draw(boxes(height, width))
    there = frame.apply_boxes(box)
    torch.testing.assert_close(frame.invert_boxes(there), box, atol=max(height, width) * 1e-5, rtol=1e-4)
    limits = torch.tensor([frame.size[1], frame.size[0]] * 2)
    assert bool((there >= -1e-3).all())
    assert bool((there <= limits + 1e-3).all())
    assert bool((there[:, 2:] - there[:, :2] >= -1e-3).all())


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(16, 300), st.integers(16, 500))
def test_the_short_side_is_met_unless_the_long_one_would_be_exceeded(
    height: int, width: int, short: int, long: int
) -> None:
    pixels, frame = resize_shortest_edge(np.zeros((height, width, 3), np.uint8), short, long)
    assert pixels.shape == (*frame.size, 3)
    assert max(frame.size) <= long
    assert min(frame.size) == short or max(frame.size) == long
    for placed, original in zip(frame.size, frame.original, strict=True):
        scale = min(short / min(height, width), long / max(height, width))
        assert abs(placed - original * scale) <= 0.5 or placed == 1


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_holds_the_same_pixels_before_and_after(flip: bool) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 6:24] = 255
    placed, frame = resize_shortest_edge(image, 80, 120, flip)
    x1, y1, x2, y2 = frame.apply_boxes(torch.tensor([[6.0, 10, 24, 20]])).int()[0].tolist()
    inside = placed[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
    assert inside.min() > 250
    placed[y1 - 2 : y2 + 2, x1 - 2 : x2 + 2] = 0
    assert placed.max() < 10
    assert x1 == (120 - 48 if flip else 12)


def test_mirroring_twice_is_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    once, frame = resize_shortest_edge(image, 20, 30, flip=True)
    twice, _ = resize_shortest_edge(once, 20, 30, flip=True)
    assert (twice == image).all()
    box = torch.tensor([[1.0, 2, 13, 14]])
    assert torch.equal(frame.apply_boxes(frame.apply_boxes(box)), box)


def test_no_boxes_stay_no_boxes() -> None:
    assert ResizeTransform((10, 10), (20, 20), True).apply_boxes(torch.zeros(0, 4)).shape == (0, 4)


def test_placements_are_drawn_from_the_generator_alone() -> None:
    config = TrainingResizeConfig([64, 80, 96], 128)

    def draws(seed: int) -> list[tuple[int, bool]]:
        generator = torch.Generator().manual_seed(seed)
        return [draw_placement(config, generator) for _ in range(200)]

    assert draws(3) == draws(3)
    assert {short for short, _ in draws(3)} == {64, 80, 96}
    assert 60 < sum(flip for _, flip in draws(3)) < 140
    config.flip = False
    assert not any(flip for _, flip in draws(3))


def test_batches_are_padded_to_the_multiple_only_where_needed() -> None:
    def image(height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), 255, np.uint8)

    even = to_batch([image(64, 96)] * 2, 32)
    assert even.pixels.shape == (2, 3, 64, 96)
    mixed = to_batch([image(50, 96), image(64, 70)], 32)
    assert mixed.pixels.shape == (2, 3, 64, 96)
    assert mixed.sizes.tolist() == [[50, 96], [64, 70]]
    assert not bool(mixed.pixels[0, :, 50:].any())
    assert not bool(mixed.pixels[1, :, :, 70:].any())
    torch.testing.assert_close(mixed.pixels[0, :, :50], even.pixels[0, :, :50])
    assert to_batch([image(40, 40)], 32).pixels.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("short", "long"), [([], 100), ([8], 100), ([120], 100)])
def test_sizes_that_cannot_be_are_refused(short: list[int], long: int) -> None:
    with pytest.raises(InputError, match=r"resize\.short"):
        ResizeConfig(short, long)


def jittered(
    low: float, high: float, side: int = 64, flip: bool = False, visible: float = 0.25
) -> TrainingResizeConfig:
    return TrainingResizeConfig([32], 64, flip=flip, jitter=JitterConfig(side, low, high, visible))


def marked(height: int, width: int) -> tuple[np.ndarray, torch.Tensor]:
    """Returns an image with a bright block, and the block's box."""
    image = np.zeros((height, width, 3), np.uint8)
    image[height // 4 : height // 2, width // 4 : width // 2] = 255
    return image, torch.tensor([[width // 4, height // 4, width // 2, height // 2]]).float()


@pytest.mark.parametrize("flip", [False, True])
def test_jitter_draws_scales_evenly_and_never_leaves_the_square(flip: bool) -> None:
    config, generator = jittered(0.1, 2.0, flip=flip), torch.Generator().manual_seed(0)
    image, _ = marked(80, 160)
    frames = [random_resize(image, config, generator)[1] for _ in range(400)]
    scales = [frame.window[3] / 64 for frame in frames if frame.window is not None]
    assert len(scales) == 400
    assert 0.1 - 0.5 / 64 <= min(scales) < 0.15  # sides are whole pixels
    assert 1.95 < max(scales) <= 2.0 + 0.5 / 64
    assert abs(sum(scales) / 400 - 1.05) < 0.08
    assert max(max(frame.size) for frame in frames) == 64
    assert len({frame.window[:2] for frame in frames if frame.window is not None}) > 50
    assert (120 < sum(frame.flipped for frame in frames) < 280) == flip


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(40, 160), st.integers(40, 160), st.booleans())
def test_boxes_follow_what_jitter_does(seed: int, height: int, width: int, flip: bool) -> None:
    image, box = marked(height, width)
    pixels, frame = random_resize(image, jittered(0.5, 2.0, flip=flip), torch.Generator().manual_seed(seed))
    there = frame.apply_boxes(box)
    assert pixels.shape == (*frame.size, 3)
    limits = torch.tensor([frame.size[1], frame.size[0]] * 2)
    assert bool((there >= 0).all() & (there <= limits).all())
    share = float(frame.visible(box))
    assert 0 <= share <= 1 + 1e-6
    x1, y1, x2, y2 = there.round().int()[0].tolist()
    if min(x2 - x1, y2 - y1) > 6:  # away from edges, which are blurred, all is bright inside and dark outside
        assert pixels[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3].min() > 240
        pixels[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = 0
        assert pixels.max() < 20
    if share > 1 - 1e-6:
        torch.testing.assert_close(frame.invert_boxes(there), box, atol=1e-2, rtol=1e-4)


def test_boxes_with_too_little_left_go_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    boxes = torch.tensor([[0.0, 0, 8, 8], [56, 56, 64, 64], [0, 0, 64, 64], [28, 28, 36, 36]])
    known = torch.arange(4)
    sample = Sample(path, boxes, known, known[:, None], torch.ones(4, 1))
    data = RegionDataset([sample], jittered(2.0, 2.0, visible=0.25))
    seen = set()
    for seed in range(60):
        batch = data.collate([data.item(0, torch.Generator().manual_seed(seed))])
        assert batch.images.pixels.shape == (1, 3, 64, 64)
        regions, frame = (
            batch.regions,
            random_resize(data.store(path), data.resize, torch.Generator().manual_seed(seed))[1],
        )
        wanted = known[frame.visible(boxes) >= 0.25]
        assert regions.labels is not None
        assert regions.concept_ids is not None
        assert torch.equal(regions.labels, wanted)
        assert torch.equal(regions.concept_ids[:, 0], wanted)
        assert torch.equal(regions.boxes, frame.apply_boxes(boxes[wanted]))
        seen.add(tuple(wanted.tolist()))
    assert len(seen) > 2


def test_jittered_batches_fill_the_square() -> None:
    config = jittered(0.1, 0.3)
    image, _ = marked(50, 90)
    placed = [random_resize(image, config, torch.Generator().manual_seed(seed))[0] for seed in range(3)]
    assert max(max(pixels.shape[:2]) for pixels in placed) < 32
    assert to_batch(placed, config.training_multiple).pixels.shape == (3, 3, 64, 64)


def test_without_jitter_training_images_are_placed_as_ever() -> None:
    config, image = TrainingResizeConfig([32, 48], 64), marked(50, 90)[0]
    pixels, frame = random_resize(image, config, torch.Generator().manual_seed(4))
    short, flip = draw_placement(config, torch.Generator().manual_seed(4))
    wanted, wanted_frame = resize_shortest_edge(image, short, 64, flip)
    assert (pixels == wanted).all()
    assert frame == wanted_frame
    assert frame.visible(torch.zeros(2, 4)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 100}, "multiple of 32"),
        ({"low": 0.0}, "low"),
        ({"low": 3.0}, "low"),
        ({"visible": 0.0}, "visible"),
    ],
)
def test_impossible_jitter_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        JitterConfig(**options)  # type: ignore[arg-type]
