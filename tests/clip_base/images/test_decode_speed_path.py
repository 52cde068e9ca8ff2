from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from clip_base.images.decode import (
    DEVIATION,
    Pixels,
    decode,
    decode_bytes,
    jpeg_size,
    middle_square,
    normalize,
    resize_bicubic,
)
from clip_base.images.preprocess import Preprocess


def photograph(height: int, width: int) -> Pixels:
    """Smooth shapes with some grain, as images have them."""
    noise = np.random.default_rng(0).normal(size=(height // 16 + 1, width // 16 + 1, 3))
    smooth = cv2.resize(128 + 60 * noise, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = np.random.default_rng(1).normal(scale=4, size=smooth.shape)
    return np.asarray(np.clip(smooth + grain, 0, 255), dtype=np.uint8)


def jpeg(pixels: Pixels, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"comment": b"x" * 3000}])
def test_the_size_of_a_jpeg_is_read_from_its_header(options: dict[str, object]) -> None:
    assert jpeg_size(jpeg(photograph(50, 70), **options)) == (50, 70)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\x89PNG\r\n", b"\xff\xd8\xff\xe0\x00\x00" * 3, b"\xff\xd8\xff\xda12345678"]
)
def test_what_is_no_jpeg_has_no_size(data: bytes) -> None:
    assert jpeg_size(data) is None


@pytest.mark.parametrize(
    ("least", "expected"),
    [(0, (301, 403)), (152, (301, 403)), (151, (151, 202)), (76, (76, 101)), (38, (38, 51)), (1, (38, 51))],
)
def test_a_jpeg_shrinks_only_as_far_as_its_short_side_allows(least: int, expected: tuple[int, int]) -> None:
    assert decode_bytes(jpeg(photograph(301, 403)), "x", least).shape[:2] == expected


def test_other_formats_and_rotated_jpegs_keep_their_frame(tmp_path: Path) -> None:
    Image.fromarray(photograph(64, 96)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", least=8).shape == (64, 96, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    assert decode_bytes(jpeg(photograph(64, 96), exif=exif), "x", least=32).shape == (32, 48, 3)


def test_a_reduced_decoding_is_nearly_the_area_average() -> None:
    data = jpeg(photograph(320, 480))
    whole, half = decode_bytes(data, "x"), decode_bytes(data, "x", 160)
    average = cv2.resize(whole, (240, 160), interpolation=cv2.INTER_AREA)
    assert np.abs(average.astype(int) - half).mean() < 1


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (224, 300), (500, 333), (32, 32), (20, 31)])
def test_the_fast_view_is_the_published_one_within_two_levels(size: tuple[int, int]) -> None:
    pixels = photograph(*size)
    fast = torch.from_numpy(middle_square(pixels, 32).copy()).permute(2, 0, 1)
    exact = Preprocess(32)(Image.fromarray(pixels))
    levels = 255 * torch.tensor(DEVIATION).view(3, 1, 1)
    off = ((normalize(fast) - exact) * levels).abs().round()
    assert off.max() <= 2
    assert off.double().mean() < 0.05


def test_a_cut_out_piece_is_resized_as_if_it_stood_alone() -> None:
    pixels = photograph(60, 80)
    piece = resize_bicubic(pixels[10:50, 5:45], 20, 20)
    np.testing.assert_array_equal(piece, resize_bicubic(pixels[10:50, 5:45].copy(), 20, 20))
    assert piece.shape == (20, 20, 3)
    assert resize_bicubic(pixels, 80, 60) is pixels


def test_real_photographs_are_open_clips_within_a_hundredth_of_a_level(shared_data: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.image_transform(224, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    errors = []
    for path in sorted((shared_data / "coco_mini/val").glob("*.jpg"))[:12]:
        expected = (theirs(Image.open(path)) * 255).round()
        found = torch.from_numpy(middle_square(decode(path, 448), 224).copy()).permute(2, 0, 1)
        errors.append(float((found - expected).abs().double().mean()))
        assert float((found - expected).abs().max()) <= 2
    assert max(errors) < 0.02
    assert sum(errors) / len(errors) < 0.01
