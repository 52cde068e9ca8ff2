from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_base.images.decode import (
    DEVIATION,
    MEAN,
    ImageStore,
    Pixels,
    decode,
    decode_bytes,
    normalize,
    resize,
    to_tensor,
)
from clip_base.runtime.errors import InputError


def gradient(height: int = 24, width: int = 32) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)], -1).astype(
        np.uint8
    )


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_file_decodes_to_its_rgb_pixels(form: str) -> None:
    pixels = gradient()
    np.testing.assert_array_equal(decode_bytes(encoded(Image.fromarray(pixels), form), "x"), pixels)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_a_lossy_file_decodes_to_nearly_its_pixels(form: str) -> None:
    decoded = decode_bytes(encoded(Image.fromarray(gradient()), form, quality=95), "x")
    assert np.abs(decoded.astype(int) - gradient()).mean() < 4


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_every_color_mode_becomes_rgb(mode: str, form: str) -> None:
    decoded = decode_bytes(encoded(Image.fromarray(gradient()).convert(mode), form), "x")
    assert decoded.shape == (24, 32, 3)
    assert decoded.dtype == np.uint8


def test_an_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    decoded = decode_bytes(encoded(Image.fromarray(gradient()), "JPEG", exif=exif), "x")
    assert decoded.shape == (24, 32, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_file_cut_off_in_the_middle_is_refused_by_name(form: str) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), form)
    with pytest.raises(InputError, match=r"image cat\.img does not decode"):
        decode_bytes(whole[: len(whole) // 3], "cat.img")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jpg does not decode"):
        decode(path)


def test_a_missing_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.jpg cannot be read: No such file"):
        decode(tmp_path / "no.jpg")
    with pytest.raises(InputError, match="cannot be read: it is a folder"):
        decode(tmp_path)


def test_shrinking_averages() -> None:
    checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((2, 2)))[..., None].repeat(3, -1) * 200
    assert np.unique(resize(checks.astype(np.uint8), 4, 4)).tolist() == [100]
    assert resize(gradient(), 10, 7).shape == (7, 10, 3)
    assert resize(gradient(), 64, 48).shape == (48, 64, 3)


def test_normalized_pixels_are_centered_and_scaled_by_channel() -> None:
    pixels = to_tensor([gradient(), gradient()])
    assert pixels.shape == (2, 3, 24, 32)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    expected = (pixels[0, 1].double() / 255 - MEAN[1]) / DEVIATION[1]
    torch.testing.assert_close(normalize(pixels)[0, 1].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_store_limits_the_short_side_and_keeps_what_it_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(gradient(24, 32)).save(path)
    store = ImageStore(side=12, keep=True)
    assert store(path).shape == (12, 16, 3)
    path.unlink()
    assert store(path).shape == (12, 16, 3)
    with pytest.raises(InputError):
        ImageStore()(path)
