"""Drawn images: boxes where they belong, labels inside the image, small images enlarged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from regionclip.structures.detections import Detections
from regionclip.structures.drawing import color_of, draw, enlargement, fit_page


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    assert draw(Image.new("RGB", (128, 96)), boxes=[]).size == (384, 288)
    assert draw(np.zeros((480, 640, 3), dtype=np.uint8), boxes=[]).size == (640, 480)
    assert enlargement(64, 32) == 6


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (400, 300)),
        np.zeros((300, 400), dtype=np.uint8),
        np.zeros((300, 400, 3), dtype=np.uint8),
        np.zeros((300, 400, 4)),
        torch.zeros(3, 300, 400, dtype=torch.uint8),
    ],
)
def test_a_box_is_drawn_in_its_color_on_any_kind_of_picture(image: object):
    drawn = draw(image, boxes=torch.tensor([[50.0, 60, 200, 250]]), colors=[(255, 0, 0)])  # type: ignore[arg-type]
    assert drawn.size == (400, 300)
    for corner in ((50, 60), (200, 250), (50, 250), (120, 60)):
        assert drawn.getpixel(corner) == (255, 0, 0)
    assert drawn.getpixel((120, 150)) == (0, 0, 0)


def test_the_picture_given_is_not_changed():
    image = Image.new("RGB", (400, 300))
    draw(image, boxes=[[0, 0, 100, 100]], texts=["cat"])
    assert image.getextrema() == ((0, 0), (0, 0), (0, 0))


def test_detections_are_named_and_colored_by_label():
    boxes = torch.tensor([[10.0, 50, 100, 140], [200, 50, 300, 140], [10, 180, 100, 260]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
    drawn = draw(Image.new("RGB", (400, 300)), Detections(boxes, scores, labels, ("cat", "dog"), (300, 400)))
    assert drawn.getpixel((100, 100)) == drawn.getpixel((100, 220)) == color_of(0)
    assert drawn.getpixel((300, 100)) == color_of(1)


def test_labels_stay_inside_and_find_free_places():
    boxes = [[0, 0, 40, 40], [0, 2, 42, 44], [380, 290, 399, 299], [1, 1, 41, 41]]
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]

    def painted(numbers: list[int]) -> list[int]:
        """How many pixels the label of each box covers."""
        found = []
        for text in ("a long label", ""):
            drawn = draw(
                Image.new("RGB", (400, 300)),
                boxes=[boxes[number] for number in numbers],
                texts=[text] * len(numbers),
                colors=[colors[number] for number in numbers],
            )
            found.append([int((np.asarray(drawn) == colors[number]).all(-1).sum()) for number in numbers])
        return [labeled - plain for labeled, plain in zip(*found, strict=True)]

    alone = [painted([number])[0] for number in range(4)]
    assert max(alone) < 1.1 * min(alone)  # the label of the box in the corner is not cut off
    for together, whole in zip(painted([0, 1, 2, 3]), alone, strict=True):
        assert together > 0.75 * whole  # lines of boxes may cross it, other labels do not


def test_a_label_longer_than_the_picture_and_boxes_beyond_it_do_no_harm():
    drawn = draw(
        Image.new("RGB", (60, 400)), boxes=[[-50, -50, 1000, 1000]], texts=["a very long name " * 10]
    )
    assert drawn.size == (60, 400)
    assert drawn.getpixel((0, 399)) != (0, 0, 0)


def test_first_colors_are_far_from_each_other():
    colors = np.array([color_of(number) for number in range(8)], dtype=float)
    apart = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1000 * np.eye(8)
    assert apart.min() > 60


def test_what_does_not_fit_together_is_refused():
    image = Image.new("RGB", (400, 300))
    with pytest.raises(ValueError, match="either detections or boxes"):
        draw(image)
    with pytest.raises(ValueError, match="1 boxes, 2 texts"):
        draw(image, boxes=[[0, 0, 5, 5]], texts=["a", "b"])
    with pytest.raises(ValueError, match="uint8"):
        draw(np.zeros((300, 400, 3), np.int64), boxes=[])


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 32), (640, 320)), ((640, 480), (640, 480)), ((2560, 1280), (1280, 640)), ((5000, 1), (1280, 1))],
)
def test_images_come_to_a_page_in_a_readable_size(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert fit_page(np.zeros((*size, 3), np.uint8)).shape[:2] == shown


def test_a_highlighted_box_is_on_top_in_its_color_and_the_others_are_gray() -> None:
    boxes = torch.tensor([[50.0, 50, 200, 200], [50, 50, 150, 150]])
    scores, labels = torch.tensor([0.5, 0.9]), torch.tensor([0, 1])
    found = Detections(boxes, scores, labels, ("cat", "dog"), (300, 400))
    drawn = draw(Image.new("RGB", (400, 300)), found, highlight=0)
    assert drawn.getpixel((50, 100)) == drawn.getpixel((200, 190)) == color_of(0)
    assert drawn.getpixel((150, 100)) == (150, 150, 150)
    assert color_of(1) not in {color for _, color in drawn.getcolors(2**16)}
    assert found.captions == ["cat 0.50", "dog 0.90"]
