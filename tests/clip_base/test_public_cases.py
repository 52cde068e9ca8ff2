"""Reports from public trackers, each tried on this code; `tests/README.md` lists all of them."""

from __future__ import annotations

import io
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from clip_base.data.sources import SOURCES
from clip_base.evaluation.datasets import folder_images
from clip_base.evaluation.prompts import classifier
from clip_base.jobs.config import build_plugin
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputNote


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    vision = VisionConfig(kind="vit", layers=[1], width=32, head_width=16, patch=16, resolution=32)
    return CLIP(CLIPConfig(16, vision, TextConfig(width=32, heads=2, layers=2, context_length=16))).eval()


@pytest.mark.parametrize(
    ("folders", "wanted"),
    [
        (["10", "2", "0", "1"], ["0", "1", "2", "10"]),
        (["010", "002", "000"], ["000", "002", "010"]),
        (["10", "2", "cat"], ["10", "2", "cat"]),
    ],
)
def test_numbered_classes_stand_in_the_order_of_their_numbers(
    folders: list[str], wanted: list[str], pictures: Path, tmp_path: Path
) -> None:
    """pytorch/vision#714, modestyachts/ImageNetV2#10: names given for 0, 1, 2, … went to 0, 1, 10, …"""
    for name in folders:
        (tmp_path / "classes" / name).mkdir(parents=True)
        shutil.copy(pictures / "0.png", tmp_path / "classes" / name / "a.png")
    names, found = folder_images(str(tmp_path / "classes"))
    assert names == wanted
    assert {(Path(str(one.path)).parent.name, names[one.label]) for one in found} == {
        (name, name) for name in folders
    }


def test_images_whose_names_have_dots_are_missed_aloud(pictures: Path, tmp_path: Path) -> None:
    """webdataset/webdataset#237, huggingface/datasets#7150: `22.05.png` is record `22` with a `05.png`."""
    data = (pictures / "0.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("22.05.png", "22.05.txt", "22.06.png", "22.06.txt", "7.png", "7.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(data) if name.endswith("png") else 5
            tar.addfile(info, io.BytesIO(data if name.endswith("png") else b"a cup"))
    with pytest.warns(InputNote, match=r"2 images are not found, .* such as '05.png'"):
        found = build_plugin(SOURCES, {"name": "webdataset", "shards": str(tmp_path / "a.tar")}).pairs()
    assert found[len(found) - 1].captions == ("a cup",)


def test_a_name_that_is_cut_is_told(model: CLIP) -> None:
    """facebookresearch/Detic#94: a class described in three lines was classified by its first words."""
    with pytest.warns(InputNote, match="1 prompts are longer than what the text tower reads"):
        long = classifier(model, ["cup " * 30, "cup"], ["{}"], truncate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Start, end and fourteen words just fit.
        classifier(model, ["cup " * 14], ["{}"], truncate=True)
    assert long.shape == (2, 16)


def test_fewer_tokens_than_the_context_give_the_same_embedding(model: CLIP) -> None:
    """openai/CLIP#432: tokens for a shorter context ended in an error about shapes."""
    tokens = Tokenizer(16)(["a red cup", "star"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), model.encode_text(tokens[:, :8]))


def test_a_text_that_is_cut_keeps_its_end_token(model: CLIP) -> None:
    """mlfoundations/open_clip#130: the embedding was read at another token."""
    tokens = Tokenizer(16)(["cup " * 40], truncate=True)
    assert tokens[0].argmax() == 15
    assert tokens[0, 15] == Tokenizer(16)(["a"]).max()
