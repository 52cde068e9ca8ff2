"""One rule for images with an EXIF orientation: the annotated size decides, else they are upright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_base.images.decode import as_rgb, decode, decode_stored
from clip_base.images.orientation import turned_as_annotated, turned_upright
from clip_base.runtime.errors import InputError

ORIENTATIONS = range(1, 9)
FORMATS = ("jpg", "png", "webp", "tif")


def stored(height: int = 40, width: int = 60) -> Image.Image:
    """Four corners of different brightness, so that each way of turning is another image."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 250
    pixels[: height // 2, width // 2 :] = 170
    pixels[height // 2 :, : width // 2] = 90
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, orientation: int) -> Path:
    note = Image.Exif()
    note[0x0112] = orientation
    image.save(path, exif=note, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return path


def shown(image: Image.Image, orientation: int) -> np.ndarray:
    """What Pillow makes of the note."""
    note = image.copy()
    note.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(note))


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and bool(np.abs(found.astype(int) - wanted).mean() < 8)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_upright_is_what_pillow_shows(kind: str, orientation: int, tmp_path: Path) -> None:
    file = save(tmp_path / f"image.{kind}", stored(), orientation)
    assert same(turned_upright(decode(file), file), shown(stored(), orientation))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_annotated_size_decides(kind: str, orientation: int, tmp_path: Path) -> None:
    file = save(tmp_path / f"image.{kind}", stored(), orientation)
    assert same(turned_as_annotated(decode(file), file, (40, 60)), np.asarray(stored()))
    assert same(turned_as_annotated(decode(file), file, (60, 40)), shown(stored(), orientation))
    with pytest.raises(InputError, match="its annotations say 20x30; has it been resized"):
        turned_as_annotated(decode(file), file, (30, 20))


@pytest.mark.parametrize(("orientation", "width"), [(2, 60), (3, 60), (4, 60), (6, 40), (8, 40)])
@pytest.mark.parametrize("kind", FORMATS)
def test_where_the_size_cannot_decide_the_image_is_upright(
    kind: str, orientation: int, width: int, tmp_path: Path
) -> None:
    file = save(tmp_path / f"image.{kind}", stored(40, width), orientation)
    assert same(turned_as_annotated(decode(file), file, (40, width)), shown(stored(40, width), orientation))


def test_an_undecided_image_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_base.images.orientation.notes_given", set())
    for number in range(3):
        file = save(tmp_path / f"{number}.jpg", stored(), 3)
        turned_as_annotated(decode(file), file, (40, 60))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "0.jpg has EXIF orientation 3" in said
    assert "rotated by their orientation" in said


def test_images_without_or_with_a_senseless_note_are_left_alone(tmp_path: Path) -> None:
    file = save(tmp_path / "image.jpg", stored(), 77)
    assert same(turned_upright(decode(file), file), np.asarray(stored()))
    stored().save(tmp_path / "plain.png")
    assert same(turned_upright(decode(tmp_path / "plain.png"), tmp_path / "plain.png"), np.asarray(stored()))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_images_in_other_modes_are_turned_likewise(mode: str, orientation: int, tmp_path: Path) -> None:
    original = stored().convert(mode)
    file, plain = save(tmp_path / "image.png", original, orientation), original.convert("RGB")
    image = decode_stored(file)
    assert isinstance(image, Image.Image)
    assert same(as_rgb(turned_upright(image, file)), shown(plain, orientation))
    assert same(as_rgb(turned_as_annotated(image, file, None)), shown(plain, orientation))
    if orientation > 4:
        assert same(as_rgb(turned_as_annotated(image, file, (40, 60))), np.asarray(plain))


def test_without_an_annotated_size_an_image_is_upright_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_base.images.orientation.notes_given", set())
    for orientation in (1, 6):
        file = save(tmp_path / "image.png", stored(), orientation)
        assert same(turned_as_annotated(decode(file), file, None), shown(stored(), orientation))
        assert ("and no size is annotated" in capsys.readouterr().err) == (orientation == 6)
