"""Images are indexed, found and classified as a user types it."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_base.evaluation.prompts import classifier, read_templates
from clip_base.jobs.cli import main
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.search.classify import class_names
from clip_base.search.gallery import Thumbnail
from clip_base.search.images import members_of
from clip_base.search.index import Index
from clip_base.weights.load import load
from clip_base.weights.native import load_clip, save_clip


def make_clip(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    save_clip(CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1))).eval(), path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip.safetensors", 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images, two of them below, and a file that is none."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number in range(6):
        pixels = random.integers(0, 256, (4, 5, 3), np.uint8)
        place = folder / "below" if number > 3 else folder
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.NEAREST).save(place / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def found(printed: str) -> list[str]:
    lines = (re.fullmatch(r"-?[01]\.\d{4}  (.+)", line) for line in printed.splitlines())
    return [Path(match[1]).name for match in lines if match]


def test_an_image_finds_itself_and_words_find_what_the_model_says(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"
    assert call("index", photos, f"weights={weights}", f"out={out}", "max_skipped=0.5", "precision=fp32") == 0
    assert "6 images; 6 new, 0 kept, 0 dropped, 1 unreadable" in capsys.readouterr().out
    assert call("search", out, photos / "3.png", "top_k=2", "precision=fp32") == 0
    assert found(capsys.readouterr().out)[0] == "3.png"
    model, preprocess = load(weights, device="cpu")
    files = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]))
        import clip_base

        texts = model.encode_text(clip_base.tokenize(["a red cup", "snow"]))
    units = [torch.nn.functional.normalize(rows, dim=1) for rows in (images, texts)]
    for words, direction in (
        (["a red cup"], units[1][0]),
        (["a red cup", "snow"], units[1].sum(0)),
        (["a red cup", "minus=[snow]"], units[1][0] - units[1][1]),
    ):
        order = (units[0] @ direction).argsort(descending=True).tolist()
        assert call("search", out, *words, "precision=fp32") == 0
        assert found(capsys.readouterr().out) == [files[row].name for row in order]


def test_only_what_is_new_or_changed_is_embedded_again(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").unlink()
    command = ["index", photos, f"weights={weights}", f"out={tmp_path / 'index'}"]
    assert call(*command) == 0
    (photos / "0.png").unlink()
    shutil.copy(photos / "2.png", photos / "1.png")
    shutil.copy(photos / "2.png", photos / "new.png")
    capsys.readouterr()
    assert call(*command) == 0
    assert "6 images; 2 new, 4 kept, 2 dropped" in capsys.readouterr().out
    assert call("search", tmp_path / "index", "duplicates=0.999", f"out={tmp_path / 'page'}") == 0
    printed = capsys.readouterr().out
    assert "3 pairs of 6 images" in printed  # 1, 2 and new are the same
    assert (tmp_path / "page" / "search.html").read_text().count("data:image/jpeg;base64,") == 6


def test_images_in_a_tar_are_found_there(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted(photos.glob("*.png")):
            tar.add(file, f"a/{file.name}")
    out = tmp_path / "index"
    assert call("index", tmp_path / "shard.tar", f"weights={weights}", f"out={out}", "precision=fp32") == 0
    assert set(Index.load(out).keys) == {f"{tmp_path}/shard.tar/a/{number}.png" for number in range(4)}
    page = tmp_path / "page"
    assert call("search", out, photos / "2.png", "top_k=1", f"out={page}", "precision=fp32") == 0
    assert found(capsys.readouterr().out) == ["2.png"]
    assert "data:image/jpeg;base64," in (page / "search.html").read_text()


def test_a_thumbnail_of_an_image_in_a_tar_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (200, 100), "red").save(tmp_path / "one.jpg", exif=exif)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "one.jpg", "one.jpg")
    member = next(members_of(tmp_path / "shard.tar")).place
    source = Thumbnail("one", "", member).source
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == (100, 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights=other.safetensors", "a cup"], "is an index of another model"),
        (["a cup", "minus=[a cup]"], "nothing is left to look for"),
        ([], "give the index and what to look for"),
        (["none.jpg"], "query image none.jpg does not exist"),
        (["a cup", "top_k=0"], "top_k must be at least 1"),
        (["duplicates=2"], "duplicates must be a cosine"),
        (["a cup", "duplicates=0.9"], "give no query"),
    ],
)
def test_a_query_that_has_no_answer_is_one_line(
    arguments: list[str],
    message: str,
    photos: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_clip(tmp_path / "other.safetensors", 1)
    monkeypatch.chdir(tmp_path)
    assert call("index", photos / "0.png", f"weights={weights}", "out=index") == 0
    assert call("search", "index", *arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]


def test_classes_are_those_of_the_prompt_ensemble(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["classes=cat, dog, star", f"weights={weights}", f"out={out}", "max_skipped=0.5"]
    assert call("classify", photos, *options, "precision=fp32", "top_k=2") == 0
    with (out / "predictions.csv").open(newline="") as file:
        rows = {Path(row["file_name"]).name: row for row in csv.DictReader(file)}
    assert set(rows) == {f"{number}.png" for number in range(6)}
    model = load_clip(weights)
    _, preprocess = load(weights, device="cpu")
    directions = classifier(model, ["cat", "dog", "star"], read_templates("published"), 64)
    for file in photos.rglob("*.png"):
        with torch.no_grad():
            image = model.encode_image(preprocess(Image.open(file))[None])
        unit = torch.nn.functional.normalize(image, dim=1)
        probabilities = (model.logit_scale.detach().exp() * unit @ directions.T).softmax(1)[0]
        value, label = probabilities.topk(2)
        row = rows[file.name]
        assert row["name_1"] == ["cat", "dog", "star"][int(label[0])]
        assert float(row["probability_1"]) == pytest.approx(float(value[0]), abs=2e-2)
        assert float(row["probability_2"]) == pytest.approx(float(value[1]), abs=2e-2)
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert "broken.jpg" in (out / "skipped.jsonl").read_text()


def test_class_lists_are_typed_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("hot dog\nice, cream\n")
    assert class_names(str(tmp_path / "names.txt")) == ["hot dog", "ice"]
    assert class_names("a cat , a dog") == ["a cat", "a dog"]
    for text in ("cat", "cat, cat", str(tmp_path / "none.txt")):
        with pytest.raises(InputError):
            class_names(text)


HOLD = (
    "import sys; from clip_base.storage.lock import lock_file; l = lock_file(sys.argv[1]); print(1); input()"
)


def test_a_second_index_into_one_folder_is_refused(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"
    command = ("index", photos, f"weights={weights}", f"out={out}", "max_skipped=0.5")
    start = [sys.executable, "-u", "-c", HOLD, str(out)]
    other = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    try:
        assert call(*command) == 2
        assert f"{out} is in use by process {other.pid}" in capsys.readouterr().err
        assert not out.exists()
    finally:
        other.communicate(b"\n")
    assert call(*command) == 0
