"""What a teacher may be beside a file: a published name, or a folder in transformers' form."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from clip_base.jobs.cli import main
from clip_base.models.clip import CLIP
from clip_base.storage.files import read_json
from clip_base.storage.hashing import content_hash, file_hash
from clip_base.weights.fetching import download
from clip_base.weights.native import read_weights, save_clip

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]


def test_a_published_name_is_a_teacher_and_its_content_is_noted(
    mining_options: list[str],
    clip_file: Path,
    tmp_path: Path,
    regionclip: Command,
    swapped: Swap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = download.Published("tiny.safetensors", file_hash(clip_file), page="a page")
    monkeypatch.setattr(download, "files", lambda: {"tiny": file})
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path))
    shutil.copy(clip_file, tmp_path / "tiny.safetensors")
    code, told = regionclip("mine", *swapped(mining_options, weights="tiny", out=tmp_path / "mined"))
    assert code == 0, told
    assert read_json(tmp_path / "mined" / ".inputs.json", "inputs")["teacher"] == content_hash(clip_file)


def test_a_folder_of_weights_is_a_teacher(
    mining_options: list[str],
    make_clip: Callable[..., CLIP],
    tmp_path: Path,
    regionclip: Command,
    swapped: Swap,
) -> None:
    save_clip(make_clip(kind="vit"), tmp_path / "vit.safetensors")
    folder, mined = tmp_path / "folder", tmp_path / "mined"
    assert main(["convert", str(tmp_path / "vit.safetensors"), "to=huggingface", f"out={folder}"]) == 0
    options = swapped(mining_options, weights=folder, teacher="crop", out=mined)
    code, told = regionclip("mine", *options)
    assert code == 0, told
    (folder / "model.safetensors").write_bytes(b"other weights")
    code, told = regionclip("mine", *options)
    assert code == 2
    assert f"teacher ({folder}) changed since the run" in told


def test_a_teacher_that_was_saved_again_is_the_same_teacher(
    mining_options: list[str], clip_file: Path, tmp_path: Path, regionclip: Command, swapped: Swap
) -> None:
    weights, mined = tmp_path / "clip.safetensors", tmp_path / "mined"
    shutil.copy(clip_file, weights)
    options = swapped(mining_options, weights=weights, out=mined, shard_images=12)
    assert regionclip("mine", *options)[0] == 0
    manifest = (mined / "manifest.json").read_bytes()
    for name in ("manifest.json", "metrics.json", "shard-00000.parquet"):
        (mined / name).unlink()
    tensors, metadata = read_weights(weights)
    save_file(tensors, weights, {**metadata, "config": metadata["config"]})  # in the library's own order
    assert regionclip("mine", *options)[0] == 0
    assert (mined / "manifest.json").read_bytes() == manifest
