"""The front door: `regionclip.load`, and what it returns, with images of every kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import regionclip
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.inference.predictor import Predictor
from regionclip.structures.detections import Detections


@pytest.fixture
def photo(world: Path) -> Path:
    return sorted((world / "images" / "val").iterdir())[0]


@pytest.fixture
def predictor(detector_file: Path) -> Predictor:
    return regionclip.load(detector_file, vocabulary="cup, star", precision="fp32")


def same(first: Detections, second: Detections) -> bool:
    return torch.equal(first.boxes, second.boxes) and torch.equal(first.scores, second.scores)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, regionclip; assert 'load' in dir(regionclip); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        regionclip.nothing  # noqa: B018


def test_a_picture_is_the_same_in_every_form(predictor: Predictor, photo: Path) -> None:
    image = Image.open(photo).convert("RGB")
    pixels = np.array(image)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = predictor.detect(photo)
    assert len(expected)
    for picture in (str(photo), image, pixels, tensor, tensor.float() / 255):
        assert same(predictor.detect(picture), expected)


def test_a_list_and_a_folder_give_a_list_whatever_the_batch(
    predictor: Predictor, world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(world / "images" / "val", tmp_path / "photos")
    files = sorted(folder.iterdir())
    found = predictor.detect_many(folder, batch_size=3)
    assert len(found) == len(files)
    for file, one in zip(files, found, strict=True):
        alone = predictor.detect(file)
        torch.testing.assert_close(one.boxes, alone.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.scores, alone.scores, rtol=0, atol=1e-5)
    assert len(predictor.detect_many([files[0]])) == 1
    assert all(float(one.scores.min()) >= 0.3 for one in predictor.detect_many(folder, score=0.3) if len(one))


def test_it_finds_what_the_job_finds(
    predictor: Predictor, photo: Path, detector_file: Path, tmp_path: Path, regionclip: Callable[..., object]
) -> None:
    options = [f"weights={detector_file}", "vocabulary=cup, star", "precision=fp32", f"out={tmp_path}"]
    regionclip("detect", photo, *options)
    entries = read_json(tmp_path / "detections.json")
    found = predictor.detect(photo)
    expected = found.to_coco(1, [1, 2])
    assert [entry["bbox"] for entry in entries] == [entry["bbox"] for entry in expected]


def test_a_pattern_a_batch_and_an_iterator_give_a_list_too(predictor: Predictor, world: Path) -> None:
    folder = world / "images" / "val"
    expected = predictor.detect_many(folder)
    assert len(expected) == 4
    files = sorted(folder.iterdir())
    pixels = np.stack([np.array(Image.open(file).convert("RGB")) for file in files])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for pictures in (f"{folder}/*", iter(files), pixels, tensor):
        found = predictor.detect_many(pictures)
        assert all(same(*pair) for pair in zip(found, expected, strict=True))
    whole, parts = (predictor.image_features(tensor, batch_size=size) for size in (8, 3))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    assert torch.equal(predictor.image_features(folder), whole)


def test_progress_is_shown_for_several_pictures_and_not_for_one(
    predictor: Predictor, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_base.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    capsys.readouterr()
    predictor.detect(photo)
    assert capsys.readouterr().err == ""
    predictor.detect_many([photo, photo])
    assert "detecting: 1/2" in capsys.readouterr().err


def test_pictures_are_read_as_they_are_needed(predictor: Predictor, photo: Path) -> None:
    read = []

    def stream() -> Iterator[Path]:
        for number in range(1000):
            read.append(number)
            yield photo

    found = predictor.iter_detect(stream(), batch_size=2)
    assert len(next(found).names) == 2
    assert len(read) < 50


def test_another_vocabulary_is_set_without_loading_again(predictor: Predictor, photo: Path) -> None:
    before = predictor.detect(photo)
    predictor.set_vocabulary(["tree"])
    assert predictor.names == ("tree",)
    assert predictor.detect(photo).names == ("tree",)
    predictor.set_vocabulary("cup, star")
    assert same(predictor.detect(photo), before)
    assert "looks for cup, star" in repr(predictor)


def test_names_come_from_a_file_and_from_a_vocabulary(
    predictor: Predictor, photo: Path, tmp_path: Path
) -> None:
    expected = predictor.detect(photo)
    whole = predictor.detector.vocabulary
    (tmp_path / "names.txt").write_text("cup\nstar\n")
    for names in (tmp_path / "names.txt", str(tmp_path / "names.txt"), ("cup", "star"), whole):
        predictor.set_vocabulary(["tree"])
        predictor.set_vocabulary(names)  # type: ignore[arg-type]
        assert same(predictor.detect(photo), expected)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "at least one name"),
        ("", "at least one name"),
        (["cup", "cup"], "'cup' occurs more than once"),
        (["cup", 3], "must be strings, got 3"),
        (Path("nothing.txt"), "class list nothing.txt does not exist"),
    ],
)
def test_names_that_cannot_be_looked_for_leave_the_old_ones(
    predictor: Predictor, names: object, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        predictor.set_vocabulary(names)  # type: ignore[arg-type]
    assert predictor.names == ("cup", "star")


def test_a_vocabulary_takes_no_other_embeddings(predictor: Predictor) -> None:
    assert predictor.detector.vocabulary is not None
    with pytest.raises(InputError, match=r"omit embeddings=some\.pth"):
        predictor.set_vocabulary(predictor.detector.vocabulary, "some.pth")


def test_region_features_are_of_unit_length_and_the_whole_picture_is_a_region(
    predictor: Predictor, photo: Path
) -> None:
    width, height = Image.open(photo).size
    features = predictor.region_features(photo, [[0, 0, width, height], [4, 4, 30, 40]])
    assert features.shape == (2, predictor.detector.clip.config.embed_dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(predictor.image_features(photo), features[:1], rtol=0, atol=1e-5)
    assert predictor.image_features([photo, photo]).shape == features.shape
    assert predictor.region_features(photo, []).shape == (0, features.shape[1])


def test_boxes_are_a_list_an_array_or_a_tensor_and_cut_at_the_edges(
    predictor: Predictor, photo: Path
) -> None:
    width, height = Image.open(photo).size
    whole = [[0.0, 0, width, height]]
    expected = predictor.region_features(photo, whole)
    beyond = [[-5.0, -9, width + 3, height + 1e6]]
    for boxes in (np.array(whole), torch.tensor(whole), beyond):
        assert torch.equal(predictor.region_features(photo, boxes), expected)


def test_a_detection_that_rounding_left_without_area_does_no_harm(predictor: Predictor, photo: Path) -> None:
    features = predictor.region_features(photo, [[0, 0, 9, 9], [5, 5, 5, 9], [64, 64, 64, 64]])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ([0, 0, 9, 9], r"\[N, 4\] \(x1, y1, x2, y2\) in pixels, got \[4\]"),
        (np.zeros((2, 5)), r"got \[2, 5\]"),
        ([[0, 0, 9, 9], [1, 2, 3]], "expected sequence of length 4"),
        ([["a", "b", "c", "d"]], "must be .* numbers"),
        ([[0, 0, 9, 9], [30, 30, 20, 20]], r"boxes\[1\] is \(30, 30, 20, 20\).* x1 < x2"),
        ([[900, 900, 950, 950]], "does not cover any part of the image of 64x64 pixels"),
        ([[64, 0, 70, 9]], "does not cover any part"),
        ([[0, 0, float("nan"), 9]], "does not cover any part"),
    ],
)
def test_boxes_that_are_none_are_refused(predictor: Predictor, photo: Path, boxes: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        predictor.region_features(photo, boxes)  # type: ignore[arg-type]


def test_the_nearest_names_of_a_name_begin_with_itself(predictor: Predictor) -> None:
    vocabulary = predictor.detector.vocabulary
    assert vocabulary is not None
    (first, second) = predictor.classify_embeddings(vocabulary.embeddings, k=2)
    assert (first[0][0], second[0][0]) == ("cup", "star")
    assert sum(value for _, value in first) == pytest.approx(1, abs=1e-5)
    (alone,) = predictor.classify_embeddings(vocabulary.embeddings[0], k=9)
    assert [name for name, _ in alone] == ["cup", "star"]
    assert alone[0][1] == pytest.approx(first[0][1], abs=1e-5)
    with pytest.raises(ValueError, match=r"got \[2, 3\] and 1"):
        predictor.classify_embeddings(torch.zeros(2, 3), k=1)


def test_regions_are_named_in_one_call(predictor: Predictor, photo: Path) -> None:
    boxes = predictor.detect(photo).top(3).boxes
    named = predictor.classify_regions(photo, boxes, k=1)
    assert named == predictor.classify_embeddings(predictor.region_features(photo, boxes), 1)
    assert [len(names) for names in named] == [1, 1, 1]


def test_what_is_missing_is_said(clip_file: Path, detector_file: Path, photo: Path, rpn_file: Path) -> None:
    with pytest.raises(InputError, match="no names to detect"):
        regionclip.load(detector_file).detect(photo)
    clip = regionclip.load(clip_file, vocabulary=["cup"])
    with pytest.raises(InputError, match="no proposal network"):
        clip.detect(photo)
    assert len(regionclip.load(clip_file, vocabulary=["cup"], proposer={"name": "grid"}).detect(photo))
    assert len(regionclip.load(clip_file, vocabulary=["cup"], proposer=str(rpn_file)).detect(photo))


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([], "no images were given"),
        ("nothing.jpg", "nothing.jpg .*(cannot be read: No such file|does not exist)"),
        (["nothing.jpg"], "nothing.jpg cannot be read: No such file"),
        ("nothing/*.jpg", "matches no file"),
        ([np.full((9, 9, 3), 200.0)], r"is in \[0, 1\], got 200…200; was it normalized"),
    ],
)
def test_pictures_that_are_none_are_refused(predictor: Predictor, images: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        predictor.detect_many(images)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=told):
        predictor.image_features(images)  # type: ignore[arg-type]


def test_a_folder_without_pictures_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        predictor.detect_many(tmp_path)


@pytest.mark.parametrize("form", ["folder", "pattern", "list", "iterator", "batch"])
def test_detect_refuses_several_images_and_names_the_call_for_them(
    predictor: Predictor, photo: Path, form: str
) -> None:
    forms: dict[str, Any] = {
        "folder": photo.parent,
        "pattern": f"{photo.parent}/*",
        "list": [photo],
        "iterator": iter([photo]),
        "batch": torch.zeros(2, 3, 64, 64),
    }
    with pytest.raises(InputError, match=r"detect takes one image.*call detect_many"):
        predictor.detect(forms[form])


def test_detect_many_and_iter_detect_refuse_one_image(predictor: Predictor, photo: Path) -> None:
    for call in (predictor.detect_many, predictor.iter_detect):
        with pytest.raises(InputError, match=r"expected several images.*call detect for one image"):
            call(photo)
        with pytest.raises(InputError, match=r"expected several images.*ndarray"):
            call(np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "gpu"}, "device=gpu is not a device; give auto"),
        ({"device": "cuda:99"}, "device=cuda:99: PyTorch .* finds"),
        ({"precision": "fp64"}, "precision=fp64 is not one of auto, fp32"),
        ({"weights": "nothing.safetensors"}, "nothing.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_once(
    detector_file: Path, options: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        regionclip.load(**{"weights": detector_file, **options})  # type: ignore[arg-type]


def test_a_batch_size_below_one_and_a_score_above_it_are_refused(predictor: Predictor, photo: Path) -> None:
    with pytest.raises(InputError, match="batch_size"):
        predictor.detect_many([photo], batch_size=0)
    with pytest.raises(InputError, match="got 30"):
        predictor.detect(photo, score=30)
