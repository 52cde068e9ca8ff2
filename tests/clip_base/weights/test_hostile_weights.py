"""Weights files that ask for more than they hold: one line before anything is built or unpacked."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.load import load_clip
from clip_base.weights.native import load_clip as load_native
from clip_base.weights.native import read_weights, save_clip
from clip_base.weights.unpickle import read_pickle, read_torchscript

TEXT = TextConfig(width=32, heads=1, layers=1, context_length=16)
VIT = VisionConfig(kind="vit", layers=[2], width=32, head_width=16, patch=16, resolution=32)
RESNET = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=32)
SIZES: dict[str, Any] = {
    "text.layers": 10**7,
    "text.width": 10**7,
    "text.context_length": 10**9,
    "text.vocab_size": 10**12,
    "vision.resolution": 16 * 10**6,
    "vision.layers": [10**7],
    "embed_dim": 10**12,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    save_clip(CLIP(CLIPConfig(16, VIT, TEXT)), path)
    return path


def changed(file: Path, key: str, value: Any, out: Path) -> Path:
    weights, metadata = read_weights(file)
    config = json.loads(metadata["config"])
    *parts, last = key.split(".")
    target = config[parts[0]] if parts else config
    target[last] = value
    save_file(weights, out / "model.safetensors", {**metadata, "config": json.dumps(config)})
    return out / "model.safetensors"


@pytest.mark.parametrize("load", [load_clip, load_native])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_are_compared_with_the_tensors_before_a_model_is_built(
    key: str, load: Any, file: Path, tmp_path: Path
) -> None:
    path = changed(file, key, SIZES[key], tmp_path)
    with pytest.raises(InputError, match=r"its metadata asks for [\d,]+ (blocks|numbers), and") as caught:
        load(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "{", "[]", '{"embed_dim": "many"}', '{"text": {"layers": [[]]}}'])
def test_sizes_that_are_none_are_one_line(content: str, file: Path, tmp_path: Path) -> None:
    weights, metadata = read_weights(file)
    save_file(weights, tmp_path / "m.safetensors", {**metadata, "config": content})
    for load in (load_clip, load_native):
        with pytest.raises(InputError) as caught:
            load(tmp_path / "m.safetensors")
        assert "\n" not in str(caught.value)
        assert "m.safetensors" in str(caught.value)


@pytest.mark.parametrize("kind", ["vit", "resnet", "text"])
def test_a_block_of_a_high_number_is_not_counted_to(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = CLIP(CLIPConfig(16, RESNET if kind == "resnet" else VIT, TEXT)).state_dict()
    block = {"resnet": "visual.layer2.0.", "vit": "visual.transformer.resblocks.0.", "text": "text."}[kind]
    name = next(key for key in state if key.startswith(block) and ".0." in key)
    save_file({**state, name.replace(".0.", ".3000000.", 1): state[name].clone()}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"3000000.*, and nothing of block [12]"):
        load_clip(tmp_path / "m.safetensors")


def test_dictionaries_that_hold_themselves_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        load_clip(tmp_path / "a.pt")


@pytest.mark.parametrize("read", [read_pickle, read_torchscript])
def test_an_archive_that_unpacks_to_far_more_is_not_unpacked(read: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"a/{name}", b"")
        archive.writestr("a/data/0", bytes(120_000_000))
    assert (tmp_path / "a.pt").stat().st_size < 200_000
    with pytest.raises(InputError, match="and unpacks to more than 120 MB, as no data does"):
        read(tmp_path / "a.pt")


def test_gzipped_json_is_unpacked_as_far_as_is_likely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b" " * 120_000_000))
    with pytest.raises(InputError, match="as no data does"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(gzip.compress(b"[1]") + gzip.compress(b" "))
    assert read_json(tmp_path / "b.json") == [1]
    monkeypatch.setenv("REGIONCLIP_MAX_UNPACKED_GB", "1e-9")
    with pytest.raises(InputError, match="raise --max-unpacked-gb"):
        read_json(tmp_path / "b.json")


def test_few_numbers_that_are_repeated_billions_of_times_are_no_weights(tmp_path: Path) -> None:
    one = torch.zeros(1).as_strided((200_000, 200_000), (0, 0))  # 160 GB once it is copied
    torch.save({"text.layers": one, "more": [{"b": torch.zeros(2)}]}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"unpacks to 160\.0 GB, more than the 20 GB that are allowed"):
        read_pickle(tmp_path / "a.pt")
    torch.save({"a": torch.zeros(1).as_strided((20_000, 20_000), (0, 0))}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="as no data does"):
        read_pickle(tmp_path / "b.pt")
