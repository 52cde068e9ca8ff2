"""Detection in pictures: boxes drawn, results written, what cannot be read named, nothing overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_base.errors import InputError
from clip_base.files import read_json
from regionclip import datasets
from regionclip.detect import targets_of
from regionclip.pictures import picture_files, read_upright

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """A folder of four pictures."""
    return shutil.copytree(world / "images" / "val", tmp_path / "photos")


@pytest.fixture
def options(detector_file: Path, tmp_path: Path) -> list[str]:
    out = f"out={tmp_path / 'found'}"
    return [f"weights={detector_file}", "vocabulary=cup, star", "resize.short=[64]", "resize.long=96", out]


def test_pictures_are_drawn_and_results_written(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    code, _ = regionclip("detect", photos, *options, "score=0.0")
    assert code == 0
    files = sorted(photos.iterdir())
    found = tmp_path / "found"
    assert {path.name for path in found.iterdir()} == {*(path.name for path in files), "detections.json"}
    drawn = np.asarray(Image.open(found / files[0].name).convert("RGB").resize((64, 64)), dtype=float)
    assert np.abs(drawn - np.asarray(Image.open(files[0]).convert("RGB"), dtype=float)).mean() > 2
    entries = read_json(found / "detections.json")
    assert {entry["file_name"] for entry in entries} == {str(file) for file in files}
    for entry in entries:
        assert entry["image_id"] == 1 + files.index(Path(entry["file_name"]))
        assert {"cup": 1, "star": 2}[entry["category_name"]] == entry["category_id"]
        x, y, w, h = entry["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + w <= 64.01
        assert y + h <= 64.01
        assert 0 <= entry["score"] <= 1


def test_a_broken_picture_is_named_and_the_others_are_done(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    first, *others = sorted(photos.iterdir())
    first.write_bytes(first.read_bytes()[:200])
    code, told = regionclip("detect", photos, *options)
    assert code == 2
    assert "1 of 4 pictures could not be read, the others are done" in told
    assert first.name in told
    entries = read_json(tmp_path / "found" / "detections.json")
    assert {entry["file_name"] for entry in entries} == {str(file) for file in others}
    assert not (tmp_path / "found" / first.name).exists()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_pictures_of_any_mode_are_read(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, mode: str
) -> None:
    ending = "jpg" if mode in ("L", "CMYK") else "png"
    file = tmp_path / f"one.{ending}"
    Image.open(sorted(photos.iterdir())[0]).convert(mode).save(file)
    assert regionclip("detect", file, *options)[0] == 0
    assert (tmp_path / "found" / "one.jpg").exists()


def test_a_picture_that_lies_on_its_side_is_turned(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    pixels = np.asarray(Image.open(sorted(photos.iterdir())[0]).convert("RGB"))[:32]  # 64 wide, 32 high
    file, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to show it
    Image.fromarray(pixels).save(file, exif=exif)
    assert regionclip("detect", file, *options)[0] == 0
    width, height = Image.open(tmp_path / "found" / "phone.jpg").size
    assert height == 2 * width
    for entry in read_json(tmp_path / "found" / "detections.json"):
        assert entry["bbox"][0] + entry["bbox"][2] <= 32.01


def test_large_pictures_are_read_reduced_and_keep_their_own_frame(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are lowered: it is a picture of 64 pixels in which 20 are many."""
    pixels = np.asarray(Image.open(sorted(photos.iterdir())[0]).convert("RGB"))
    found = {}
    for name, turn in (("upright.jpg", 1), ("turned.jpg", 6), ("plain.png", 1)):
        file, exif = tmp_path / name, Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)[:256]).save(file, exif=exif)  # 512 wide, 256 high
        found[name] = read_upright(file)
        monkeypatch.setattr("regionclip.pictures.LARGE", 20_000)
        reduced, size = read_upright(file)
        assert size == found[name][1] == ((512, 256) if turn == 6 else (256, 512))
        assert reduced.shape[0] * reduced.shape[1] <= 20_000
        assert reduced.shape[0] / reduced.shape[1] == pytest.approx(size[0] / size[1], rel=0.05)
        out = tmp_path / "found"
        assert regionclip("detect", file, *options, "own_settings=false")[0] == 0
        entries = read_json(out / "detections.json")
        assert max(entry["bbox"][0] + entry["bbox"][2] for entry in entries) > size[1] / 2
        assert max(entry["bbox"][1] + entry["bbox"][3] for entry in entries) <= size[0] + 0.01
        monkeypatch.undo()


def test_a_jpeg_is_never_decoded_at_its_whole_large_size(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.jpg"
    Image.open(sorted(photos.iterdir())[0]).resize((800, 400)).save(file)
    sizes: list[tuple[int, ...]] = []
    decode = datasets.decode

    def noted(path: Path, least: int) -> np.ndarray:
        sizes.append(decode(path, least).shape)
        return decode(path, least)

    monkeypatch.setattr(datasets, "decode", noted)
    monkeypatch.setattr("regionclip.pictures.LARGE", 20_000)
    assert read_upright(file)[1] == (400, 800)
    assert sizes == [(100, 200, 3)]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    file = tmp_path / f"large.{ending}"
    Image.open(sorted(photos.iterdir())[0]).convert("RGB").resize((200, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    monkeypatch.setattr("regionclip.pictures.load_image", None)
    with pytest.raises(InputError, match=rf"large\.{ending} is too large: .*20000 pixels.*make it smaller"):
        read_upright(file)


def test_pictures_of_one_name_get_places_of_their_own(tmp_path: Path) -> None:
    files = [Path("a/cat.jpg"), Path("b/cat.png"), Path("b/cat-2.jpg"), Path("c/cat.jpg")]
    targets = targets_of(files, tmp_path)
    assert len(set(targets)) == 4
    assert [target.name for target in targets] == ["cat.jpg", "cat-2.jpg", "cat-2-2.jpg", "cat-3.jpg"]


def test_what_was_given_is_never_written_over(photos: Path, options: list[str], regionclip: Command) -> None:
    before = {path: path.read_bytes() for path in photos.iterdir()}
    code, told = regionclip("detect", photos, *options[:-1], f"out={photos}")
    assert code == 2
    assert "would be written over" in told
    assert "another out=" in told
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_folders_stand_for_their_pictures(photos: Path, tmp_path: Path) -> None:
    (photos / "notes.txt").write_text("no picture")
    assert len(picture_files([str(photos)])) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        picture_files([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="does not exist"):
        picture_files([str(tmp_path / "nowhere.jpg")])


def test_a_clip_detects_with_a_proposer(
    photos: Path, options: list[str], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    others = [option for option in options if not option.startswith("weights=")]
    code, told = regionclip("detect", photos, *others, f"weights={clip_file}")
    assert code == 2
    assert "give proposer.name=grid" in told
    assert regionclip("detect", photos, *others, f"weights={clip_file}", "proposer.name=grid")[0] == 0
    assert read_json(tmp_path / "found" / "detections.json")


@pytest.mark.parametrize(("value", "told"), [("", "vocabulary"), ("cup, cup", "cup")])
def test_useless_vocabularies_are_refused(
    photos: Path, options: list[str], regionclip: Command, value: str, told: str
) -> None:
    others = [option for option in options if not option.startswith("vocabulary=")]
    code, error = regionclip("detect", photos, *others, f"vocabulary={value}")
    assert code == 2
    assert told in error


def test_a_full_disk_is_said_in_one_line(
    photos: Path, options: list[str], regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regionclip.detect.write_json", full)
    code, told = regionclip("detect", photos, *options)
    assert code == 1
    assert told.count("\n") == 1
    assert "the disk is full" in told
