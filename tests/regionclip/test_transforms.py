"""Boxes follow their image into the batch's frame and back, whatever is done to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_base.errors import InputError
from regionclip.transforms import Frame, ResizeConfig, draw_placement, place, to_batch

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
    _, frame = place(np.zeros((height, width, 3), np.uint8), short, 2 * short, flip)
    box = data.draw(boxes(height, width))
    there = frame.boxes_in(box)
    torch.testing.assert_close(frame.boxes_out(there), box, atol=max(height, width) * 1e-5, rtol=1e-4)
    limits = torch.tensor([frame.size[1], frame.size[0]] * 2)
    assert bool((there >= -1e-3).all())
    assert bool((there <= limits + 1e-3).all())
    assert bool((there[:, 2:] - there[:, :2] >= -1e-3).all())


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(16, 300), st.integers(16, 500))
def test_the_short_side_is_met_unless_the_long_one_would_be_exceeded(
    height: int, width: int, short: int, long: int
) -> None:
    pixels, frame = place(np.zeros((height, width, 3), np.uint8), short, long)
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
    placed, frame = place(image, 80, 120, flip)
    x1, y1, x2, y2 = frame.boxes_in(torch.tensor([[6.0, 10, 24, 20]])).int()[0].tolist()
    inside = placed[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
    assert inside.min() > 250
    placed[y1 - 2 : y2 + 2, x1 - 2 : x2 + 2] = 0
    assert placed.max() < 10
    assert x1 == (120 - 48 if flip else 12)


def test_mirroring_twice_is_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    once, frame = place(image, 20, 30, flip=True)
    twice, _ = place(once, 20, 30, flip=True)
    assert (twice == image).all()
    box = torch.tensor([[1.0, 2, 13, 14]])
    assert torch.equal(frame.boxes_in(frame.boxes_in(box)), box)


def test_no_boxes_stay_no_boxes() -> None:
    assert Frame((10, 10), (20, 20), True).boxes_in(torch.zeros(0, 4)).shape == (0, 4)


def test_placements_are_drawn_from_the_generator_alone() -> None:
    config = ResizeConfig([64, 80, 96], 128)

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
