"""Detection in images: boxes drawn, results written, what cannot be read named, nothing overwritten."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import regionclip as package
from clip_base.images import decode
from clip_base.images.inputs import image_files, read_upright
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.inference import detect as job
from regionclip.inference.detection_files import targets_of
from regionclip.inference.predictor import Predictor

Command = Callable[..., tuple[int, str]]


def test_pictures_are_drawn_and_results_written(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    code, _ = regionclip("detect", photos, *options, "score_threshold=0.0")
    assert code == 0
    files = sorted(photos.iterdir())
    found = tmp_path / "found"
    assert {path.name for path in found.iterdir()} == {
        *(path.name for path in files), "detections.json", "detections.csv"
    }  # fmt: skip
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
    assert code == 0
    assert "note: 1 of 4 images could not be read" in told
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
        monkeypatch.setattr("clip_base.images.inputs.LARGE", 20_000)
        reduced, size = read_upright(file)
        assert size == found[name][1] == ((512, 256) if turn == 6 else (256, 512))
        assert reduced.shape[0] * reduced.shape[1] <= 20_000
        assert reduced.shape[0] / reduced.shape[1] == pytest.approx(size[0] / size[1], rel=0.05)
        out = tmp_path / "found"
        assert regionclip("detect", file, *options, "use_checkpoint_config=false")[0] == 0
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
    decode_file = decode.decode

    def noted(path: Path, least: int) -> np.ndarray:
        sizes.append(decode_file(path, least).shape)
        return decode_file(path, least)

    monkeypatch.setattr(decode, "decode", noted)
    monkeypatch.setattr("clip_base.images.inputs.LARGE", 20_000)
    assert read_upright(file)[1] == (400, 800)
    assert sizes == [(100, 200, 3)]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    file = tmp_path / f"large.{ending}"
    Image.open(sorted(photos.iterdir())[0]).convert("RGB").resize((200, 100)).save(file)
    monkeypatch.setenv("REGIONCLIP_MAX_MEGAPIXELS", "0.01")
    monkeypatch.setattr("clip_base.images.inputs.load_image", None)
    with pytest.raises(InputError, match=rf"large\.{ending} has 200 × 100 .*reduce it"):
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
    assert "would overwrite" in told
    assert "another out=" in told
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_folders_stand_for_their_pictures(photos: Path, tmp_path: Path) -> None:
    (photos / "notes.txt").write_text("no picture")
    assert len(image_files([str(photos)])) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        image_files([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="does not exist"):
        image_files([str(tmp_path / "nowhere.jpg")])


def test_a_clip_detects_with_a_proposer(
    photos: Path, options: list[str], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    others = [option for option in options if not option.startswith("weights=")]
    code, told = regionclip("detect", photos, *others, f"weights={clip_file}")
    assert code == 2
    assert "give, for example, proposer.name=grid" in told
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

    monkeypatch.setattr("regionclip.inference.detection_files.replacing", full)
    code, told = regionclip("detect", photos, *options)
    assert code == 1
    (line,) = (line for line in told.splitlines() if not line.startswith("note: "))
    assert "the disk is full" in line


def test_urls_are_refused(options: list[str], regionclip: Command) -> None:
    code, told = regionclip("detect", "https://example.org/cat.jpg", *options)
    assert code == 2
    assert "https://example.org/cat.jpg is a URL" in told
    assert "download it" in told


def test_patterns_stand_for_files_below(photos: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    first, second, *_ = sorted(photos.iterdir())
    shutil.copy(first, deep / "a.jpg")
    shutil.copy(second, tmp_path / "deep" / "b.JPG")
    (deep / "notes.txt").write_text("no picture")
    assert image_files([f"{tmp_path}/deep/**"]) == [tmp_path / "deep" / "b.JPG", deep / "a.jpg"]
    assert image_files([f"{tmp_path}/deep/**/*.jpg", str(deep / "a.jpg")]) == [deep / "a.jpg"]
    assert image_files([f"{photos}/*{first.stem[-2:]}.jp?"]) == [first]
    with pytest.raises(InputError, match=r"pattern '.*\*\.tiff' matches no file"):
        image_files([f"{tmp_path}/*.tiff"])


@pytest.mark.parametrize(("given", "count"), [("coco", 80), ("coco65", 65), ("lvis", 1203), ("file", 2)])
def test_vocabularies_are_lists_by_name_or_files(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, given: str, count: int
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red umbrella\nbow (weapon)\n")
    others = [option for option in options if not option.startswith("vocabulary=")]
    value = str(names) if given == "file" else given
    photo = sorted(photos.iterdir())[0]
    assert regionclip("detect", photo, *others, "--vocabulary", value, "--top-k", count)[0] == 0
    entry = read_json(tmp_path / "found" / "detections.json")[0]
    found = {one["name"] for one in entry["top"]}
    assert len(found) == count
    assert found >= {"red umbrella", "bow (weapon)"} if given == "file" else "cup" in found
    assert sum(one["probability"] for one in entry["top"]) == pytest.approx(1, abs=1e-3)


def test_the_most_probable_names_are_those_that_the_predictor_gives(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = sorted(photos.iterdir())[0]
    arguments = [*options, "vocabulary=cup, star, dog", "top_k=2", "score_threshold=0.0", "precision=fp32"]
    assert regionclip("detect", photo, *arguments)[0] == 0
    entries = read_json(tmp_path / "found" / "detections.json")
    weights = options[0].removeprefix("weights=")
    predictor = package.load(weights, ["cup", "star", "dog"], precision="fp32")
    x, y, w, h = entries[0]["bbox"]
    ranked = predictor.classify_embeddings(predictor.region_features(photo, [[x, y, x + w, y + h]]), 2)[0]
    assert [one["name"] for one in entries[0]["top"]] == [name for name, _ in ranked]
    for one, (_, value) in zip(entries[0]["top"], ranked, strict=True):
        assert one["probability"] == pytest.approx(value, abs=1e-3)


def test_the_table_says_what_the_json_says(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    assert regionclip("detect", photos, *options, "top_k=2")[0] == 0
    entries = read_json(tmp_path / "found" / "detections.json")
    with (tmp_path / "found" / "detections.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(entries) > 0
    for row, entry in zip(rows, entries, strict=True):
        assert row["file_name"] == entry["file_name"]
        assert [float(row[key]) for key in ("x", "y", "width", "height")] == entry["bbox"]
        assert (float(row["score"]), row["category_name"]) == (entry["score"], entry["category_name"])
        assert [row["name_1"], row["name_2"]] == [one["name"] for one in entry["top"]]
        assert float(row["probability_2"]) == entry["top"][1]["probability"]


def test_batches_find_what_single_pictures_do(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    """An image that is broken, and one that lies otherwise, part a batch and change nothing else."""
    files = sorted(photos.iterdir())
    Image.open(files[1]).crop((0, 0, 40, 64)).save(files[1])
    files[2].write_bytes(b"no picture")
    found = []
    for size in (1, 4):
        regionclip("detect", photos, *options, f"batch_size={size}", "precision=fp32")
        found.append(read_json(tmp_path / "found" / "detections.json"))
    assert {entry["image_id"] for entry in found[0]} == {1, 2, 4}
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.05)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["file_name"] == other["file_name"]


def stopping(after: int) -> Callable[..., object]:
    """Returns `Predictor.detect_loaded` that stops, as Ctrl-C does, before batch number `after`."""
    real, calls = Predictor.detect_loaded, []

    def detect_loaded(self: Predictor, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(self, *arguments)  # type: ignore[arg-type]

    return detect_loaded


def test_a_stopped_run_goes_on_and_ends_as_an_undisturbed_one(
    photos: Path,
    clip: Path,
    options: list[str],
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four images in two batches, then a video in five; stopped in the second batch, then in the video."""
    sorted(photos.iterdir())[0].write_bytes(b"no picture")
    arguments = ["detect", photos, clip, *options[:-1], "batch_size=2", "top_k=1", "score_threshold=0.1"]
    found, undisturbed = tmp_path / "found", tmp_path / "undisturbed"
    assert regionclip(*arguments, f"out={undisturbed}")[0] == 0
    for after in (1, 3):
        monkeypatch.setattr(Predictor, "detect_loaded", stopping(after))
        assert regionclip(*arguments, f"out={found}")[0] == 130
        monkeypatch.undo()
        with (found / job.JOURNAL).open("ab") as file:
            file.write(b'["found", {"image_id": 1')  # what a kill cuts off
    before = {path: path.stat().st_mtime_ns for path in found.glob("*.jpg")}
    assert len(before) == 3
    assert regionclip(*arguments, f"out={found}")[0] == 0
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == {
        path.name: path.read_bytes() for path in found.iterdir()
    }
    assert [path for path, time in before.items() if path.stat().st_mtime_ns != time] == []


def test_another_command_does_not_take_a_stopped_run_away(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["detect", photos, *options, "batch_size=1"]
    monkeypatch.setattr(Predictor, "detect_loaded", stopping(2))
    assert regionclip(*arguments)[0] == 130
    monkeypatch.undo()
    journal = (tmp_path / "found" / job.JOURNAL).read_bytes()
    for other in (["vocabulary=cup"], ["score_threshold=0.5", "top_k=1"]):
        code, told = regionclip(*arguments, *other)
        assert code == 2
        assert other[0].partition("=")[0] in told
        assert "give the same command to resume" in told
    (photos / "another.jpg").write_bytes(sorted(photos.iterdir())[0].read_bytes())
    code, told = regionclip(*arguments)
    assert code == 2
    assert "list of images" in told
    assert (tmp_path / "found" / job.JOURNAL).read_bytes() == journal
    (photos / "another.jpg").unlink()
    assert regionclip(*arguments)[0] == 0
    assert regionclip(*arguments, "vocabulary=cup")[0] == 0  # one that has ended is done anew


def test_settings_that_a_detector_replaces_by_its_own_are_named(
    photos: Path, detector_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    call = ("detect", photos, f"weights={detector_file}", "vocabulary=cup", f"out={tmp_path}", "draw=false")
    assert "not used" not in regionclip(*call)[1]
    sizes = ("resize.short=96", "detector.max_detections=7")
    code, told = regionclip(*call, *sizes)
    assert code == 0
    assert f"not used, since {detector_file} holds settings of its own: resize.short=[96] (" in told
    assert "detector.max_detections=7 (100 there); use_checkpoint_config=false takes" in told
    code, told = regionclip(*call, *sizes, "use_checkpoint_config=false")
    assert "not used" not in told
