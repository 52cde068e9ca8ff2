"""The front door: `regionclip.load`, and what it returns, with pictures of every kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regionclip
from clip_base.errors import InputError
from clip_base.files import read_json
from regionclip.pictures import read_picture
from regionclip.predictor import Predictor
from regionclip.structures import Detections


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
    found = predictor.detect(folder, batch_size=3)
    assert len(found) == len(files)
    for file, one in zip(files, found, strict=True):
        alone = predictor.detect(file)
        torch.testing.assert_close(one.boxes, alone.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.scores, alone.scores, rtol=0, atol=1e-5)
    assert len(predictor.detect([files[0]])) == 1
    assert all(float(one.scores.min()) >= 0.3 for one in predictor.detect(folder, score=0.3) if len(one))


def test_it_finds_what_the_job_finds(
    predictor: Predictor, photo: Path, detector_file: Path, tmp_path: Path, regionclip: Callable[..., object]
) -> None:
    options = [f"weights={detector_file}", "vocabulary=cup, star", "precision=fp32", f"out={tmp_path}"]
    regionclip("detect", photo, *options)
    entries = read_json(tmp_path / "detections.json")
    found = predictor.detect(photo)
    expected = found.to_coco(1, [1, 2])
    assert [entry["bbox"] for entry in entries] == [entry["bbox"] for entry in expected]


def test_another_vocabulary_is_set_without_loading_again(predictor: Predictor, photo: Path) -> None:
    before = predictor.detect(photo)
    predictor.set_vocabulary(["tree"])
    assert predictor.names == ("tree",)
    assert predictor.detect(photo).names == ("tree",)
    predictor.set_vocabulary("cup, star")
    assert same(predictor.detect(photo), before)
    assert "looks for cup, star" in repr(predictor)


def test_region_features_are_of_unit_length_and_the_whole_picture_is_a_region(
    predictor: Predictor, photo: Path
) -> None:
    width, height = Image.open(photo).size
    features = predictor.region_features(photo, [[0, 0, width, height], [4, 4, 30, 40]])
    assert features.shape == (2, predictor.detector.clip.config.embed_dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(predictor.image_features(photo), features[0], rtol=0, atol=1e-5)
    assert predictor.image_features([photo, photo]).shape == features.shape
    assert predictor.region_features(photo, []).shape == (0, features.shape[1])


def test_the_nearest_names_of_a_name_begin_with_itself(predictor: Predictor) -> None:
    vocabulary = predictor.detector.vocabulary
    assert vocabulary is not None
    (first, second) = predictor.nearest_names(vocabulary.embeddings, k=2)
    assert (first[0][0], second[0][0]) == ("cup", "star")
    assert sum(value for _, value in first) == pytest.approx(1, abs=1e-5)


def test_what_is_missing_is_said(clip_file: Path, detector_file: Path, photo: Path, rpn_file: Path) -> None:
    with pytest.raises(InputError, match="no names to look for"):
        regionclip.load(detector_file).detect(photo)
    clip = regionclip.load(clip_file, vocabulary=["cup"])
    with pytest.raises(InputError, match="no proposal network"):
        clip.detect(photo)
    assert len(regionclip.load(clip_file, vocabulary=["cup"], proposer={"name": "grid"}).detect(photo))
    assert len(regionclip.load(clip_file, vocabulary=["cup"], proposer=str(rpn_file)).detect(photo))


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"\[H, W, 3\] uint8, got \[4, 4, 4\]"),
        (np.zeros((4, 4, 3)), "float64"),
        (torch.zeros(4, 4), r"\[3, H, W\], got \[4, 4\]"),
        (torch.full((3, 4, 4), -1.0), "was it normalised"),
    ],
)
def test_arrays_of_another_form_are_refused(picture: np.ndarray | torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_picture(picture)


def test_grey_arrays_become_colour() -> None:
    pixels, size = read_picture(np.full((4, 6), 7, np.uint8))
    assert (pixels.shape, size) == ((4, 6, 3), (4, 6))
