"""Images of every kind that Pillow opens: what commands read of a file is what Python makes of the image.

Readers covered: `decode` (all region jobs, exports), `decode_stored` (zero-shot, retrieval, probe), the views
of training and validation, `Preprocess`.
"""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from clip_base.images.decode import (
    DEVIATION,
    ImageStore,
    as_rgb,
    cut,
    decode,
    decode_stored,
    normalize,
    size_of,
)
from clip_base.images.preprocess import Preprocess, cut_and_resize, square_view
from clip_base.runtime.errors import InputError

SIDE = 32


def drawing() -> Image.Image:
    """Smooth colors with soft edges of transparency; what is transparent is bright beneath."""
    y, x = np.mgrid[:70, :90]
    pixels = np.stack([255 - 2 * x, 3 * y, 60 + x + y], -1).clip(0, 255).astype(np.uint8)
    far = np.hypot(x - 40, y - 30)
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray((255 * (30 - far) / 8).clip(0, 255).astype(np.uint8)))
    return image


def by_opencv(channels: int, form: str = ".png", dtype: type = np.uint16) -> bytes:
    """Returns a file of 16 bits per channel, which Pillow does not write."""
    shape = (70, 90) if channels == 1 else (70, 90, channels)
    numbers: npt.NDArray[np.int64] = np.random.default_rng(0).integers(0, 65536, shape)
    return bytes(cv2.imencode(form, numbers.astype(dtype))[1])


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    rgba = drawing()
    rgb, palette = rgba.convert("RGB"), rgba.convert("RGB").quantize(40)
    found = {
        "RGB.jpg": encoded(rgb, "JPEG", quality=95),
        "L.jpg": encoded(rgb.convert("L"), "JPEG", quality=95),
        "CMYK.jpg": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "CMYK.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "LAB.tif": encoded(rgb.convert("LAB"), "TIFF"),
        "RGB.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "P_one.png": encoded(palette, "PNG", transparency=3),
        "P_all.png": encoded(palette, "PNG", transparency=bytes(6 * k for k in range(40))),
        "RGB_one.png": encoded(rgb, "PNG", transparency=(255, 0, 60)),
        "P.gif": encoded(palette, "GIF", transparency=3),
        "RGBA.webp": encoded(rgba, "WEBP", lossless=True),
        "RGB.webp": encoded(rgb, "WEBP", quality=95),
        "48bit.png": by_opencv(3),
        "64bit.png": by_opencv(4),
        "48bit.tif": by_opencv(3, ".tiff"),
        "RGB.bmp": encoded(rgb, "BMP"),
        "RGBA.bmp": encoded(rgba, "BMP"),
    }
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        found[f"{mode}.png"] = encoded((palette if mode == "P" else rgba).convert(mode), "PNG")
    return found


FILES = files()
DEEP = {
    "I;16.png": by_opencv(1),
    "I;16.tif": by_opencv(1, ".tiff"),
    "I.tif": encoded(Image.fromarray(np.arange(6300, dtype=np.int32).reshape(70, 90)), "TIFF"),
    "F.tif": encoded(Image.fromarray(np.ones((70, 90), np.float32)), "TIFF"),
    "I.pgm": encoded(Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90)), "PPM"),
}


@pytest.fixture(params=sorted(FILES))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    path.write_bytes(FILES[request.param])
    return path


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference in levels of 255."""
    return float(((found - expected) * 255 * torch.tensor(DEVIATION).view(3, 1, 1)).abs().max())


def test_a_file_decodes_to_pillows_rgb(file: Path) -> None:
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(file), expected)


def test_the_view_of_a_file_is_the_preprocessing_of_its_image(file: Path) -> None:
    with Image.open(file) as image:
        expected, mode = Preprocess(SIDE)(image), image.mode
    seen = normalize(torch.from_numpy(np.array(square_view(decode_stored(file), SIDE))).permute(2, 0, 1))
    fast = mode in ("RGB", "L")
    assert off(seen, expected) <= (2.01 if fast else 0.01)


def test_a_part_of_a_file_is_the_preprocessing_of_that_part(file: Path) -> None:
    box = (12, 9, 71, 57)
    with Image.open(file) as image:
        expected, fast = Preprocess(SIDE)(image.crop(box)), image.mode in ("RGB", "L")
    part = cut(decode_stored(file), *box)
    assert size_of(part) == (48, 59)
    seen = normalize(torch.from_numpy(np.array(square_view(part, SIDE))).permute(2, 0, 1))
    assert off(seen, expected) <= (2.01 if fast else 0.01)


def test_a_training_crop_is_filtered_in_the_files_mode(file: Path) -> None:
    with Image.open(file) as image:
        crop = image.crop((5, 5, 65, 65)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
    found = cut_and_resize(ImageStore(keep=True).stored(file), 5, 5, 60, SIDE)
    assert np.abs(found.astype(int) - np.asarray(crop)).max() <= 2


def test_transparent_ground_is_not_seen_through() -> None:
    """The difference that matters: RGB first, and the hidden bright color bleeds into the edge."""
    image = drawing()
    right, wrong = Preprocess(SIDE)(image), Preprocess(SIDE)(image.convert("RGB"))
    assert off(right, wrong) > 100


@pytest.mark.parametrize("name", sorted(DEEP))
def test_one_channel_of_more_than_eight_bits_is_refused_everywhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DEEP[name])
    message = "has one channel of more than 8 bits"
    for read in (decode, decode_stored, ImageStore(keep=True)):
        with pytest.raises(InputError, match=message):
            read(path)
    with Image.open(path) as image, pytest.raises(InputError, match=message):
        Preprocess(SIDE)(image)


def test_transparency_of_a_palette_gives_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "P_all.png"
    path.write_bytes(FILES["P_all.png"])
    image = decode_stored(path)
    assert isinstance(image, Image.Image)
    as_rgb(image)
    assert "transparency" in image.info
    assert not [warning for warning in recwarn if "Transparency" in str(warning.message)]


def test_large_pictures_are_kept_small_in_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "RGBA.png"
    path.write_bytes(FILES["RGBA.png"])
    store = ImageStore(side=35, keep=True)
    assert size_of(store.stored(path)) == (35, 45)
    path.unlink()
    assert store(path).shape == (35, 45, 3)
