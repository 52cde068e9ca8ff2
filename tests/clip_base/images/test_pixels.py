"""Pictures in memory: every usual form means the same pixels, others are refused and told."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_base.images.inputs import pixels_of, read_upright
from clip_base.runtime.errors import InputError

COLOR = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
GREY = COLOR[..., 0]
ALPHA = np.concatenate([COLOR, np.full((5, 7, 1), 9, np.uint8)], 2)


def first(array: np.ndarray) -> torch.Tensor:
    """A tensor with the channels first."""
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize(
    "picture",
    [
        COLOR,
        COLOR / 255,
        (COLOR / 255).astype(np.float32),
        ALPHA,
        ALPHA / 255,
        COLOR[:, ::-1][:, ::-1],
        Image.fromarray(COLOR),
        Image.fromarray(ALPHA),
        first(COLOR),
        first(ALPHA),
        first(COLOR) / 255,
        first(COLOR).double() / 255,
        (first(COLOR) / 255).requires_grad_(),
    ],
)
def test_color_is_the_same_in_every_form(picture: object) -> None:
    pixels = pixels_of(picture)  # type: ignore[arg-type]
    assert pixels.dtype == np.uint8
    assert (pixels == COLOR).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(pixels)  # warns of what must not be written to


@pytest.mark.parametrize(
    "picture",
    [
        GREY,
        GREY / 255,
        GREY[..., None],
        Image.fromarray(GREY),
        torch.from_numpy(GREY),
        torch.from_numpy(GREY)[None] / 255,
    ],
)
def test_gray_becomes_color(picture: object) -> None:
    assert (pixels_of(picture) == GREY[..., None]).all()  # type: ignore[arg-type]
    assert pixels_of(picture).shape == (5, 7, 3)  # type: ignore[arg-type]


def test_a_pil_image_is_turned_as_its_note_says() -> None:
    image = Image.fromarray(COLOR)
    image.getexif()[0x0112] = 6  # turn by 90 degrees, clockwise
    assert (pixels_of(image) == np.rot90(COLOR, -1)).all()


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"got an array \[4, 4, 5\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got an array \[0, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got an array \[2, 4, 4, 3\]"),
        (torch.zeros(9, 9, 3), r"a tensor \[3, H, W\]; got a tensor \[9, 9, 3\]"),
        (np.zeros((4, 4, 3), np.int64), "uint8, or floating in .* got int64"),
        (Image.new("I;16", (4, 4)), "got uint16"),
        (np.full((4, 4, 3), 255.0), r"got 255…255; .*divided by 255"),
        (torch.full((3, 4, 4), -1.0), r"got -1…-1; was it normalized"),
        (np.full((4, 4, 3), np.nan), "got nan…nan"),
        (None, "got NoneType"),
        (7, "got int"),
    ],
)
def test_what_is_no_picture_is_refused(picture: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        pixels_of(picture)  # type: ignore[arg-type]


def test_a_limit_of_pixels_is_asked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.png"
    Image.new("L", (100, 60)).save(file)
    assert read_upright(file, 0.006)[1] == (60, 100)
    monkeypatch.setattr("clip_base.images.inputs.load_image", None)
    with pytest.raises(
        InputError, match=r"large\.png has 100 × 60 = 0\.0 million pixels, more than the 0\.005"
    ):
        read_upright(file, 0.005)
    file.write_bytes(b"no header says how large this is")
    with pytest.raises(InputError, match=r"large\.png does not decode: it is of no known format"):
        read_upright(file, 1)
