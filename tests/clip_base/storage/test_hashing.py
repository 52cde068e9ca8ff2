"""Identity by content: what is the same weights, and what is not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clip_base.runtime.errors import InputError
from clip_base.storage.hashing import content_hash, file_hash
from clip_base.weights.native import write_weights

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.int64), "c": torch.zeros(0)}
METADATA = {f"key {number}": f'"quoted" \n\t\x01 žluť {number}' for number in range(12)}


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for number in range(5):
        metadata = dict(sorted(METADATA.items(), reverse=bool(number % 2)))
        write_weights(tmp_path / f"{number}.safetensors", TENSORS, metadata)
    files = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert dict(file.metadata()) == METADATA
        assert all(torch.equal(file.get_tensor(name), value) for name, value in TENSORS.items())


def rewritten(path: Path, target: Path) -> Path:
    """Writes the same tensors in another order and place, with another header, as other programs may."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata = header.pop("__metadata__")
    blob, entries = b"", {}
    for name in sorted(header, reverse=True):
        begin, end = header[name]["data_offsets"]
        entries[name] = {**header[name], "data_offsets": [len(blob), len(blob) + end - begin]}
        blob += data[begin:end]
    text = json.dumps({**entries, "__metadata__": dict(reversed(metadata.items()))}, indent=1).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + blob)
    return target


def test_weights_that_were_saved_again_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, TENSORS, METADATA)
    again = rewritten(path, tmp_path / "again.bin")
    assert again.read_bytes() != path.read_bytes()
    assert content_hash(again) == content_hash(path) != file_hash(path)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "metadata"])
def test_other_weights_are_others(tmp_path: Path, change: str) -> None:
    tensors, metadata = {name: value.clone() for name, value in TENSORS.items()}, dict(METADATA)
    match change:
        case "value":
            tensors["b"][1, 2] += 1
        case "name":
            tensors["d"] = tensors.pop("b")
        case "shape":
            tensors["b"] = tensors["b"].reshape(3, 2)
        case "dtype":
            tensors["a"] = tensors["a"].view(torch.float64)
        case _:
            metadata["key 3"] = ""
    write_weights(tmp_path / "w.safetensors", TENSORS, METADATA)
    write_weights(tmp_path / "other.safetensors", tensors, metadata)
    assert content_hash(tmp_path / "w.safetensors") != content_hash(tmp_path / "other.safetensors")


@pytest.mark.parametrize("cut", [3, 20, -2])
def test_a_file_that_was_cut_off_has_a_hash_of_its_own(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:cut])
    assert content_hash(path) == file_hash(path)


def test_what_follows_the_tensors_counts(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes() + b"\n")
    assert content_hash(path) == file_hash(path)


def test_a_folder_counts_by_the_contents_of_its_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_weights(tmp_path / name / "model.safetensors", TENSORS, METADATA)
        (tmp_path / name / "config.json").write_text("{}")
    rewritten(tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")
    (tmp_path / "two" / "config.json").write_text("{ }")
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")


def test_what_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        content_hash(tmp_path / "nothing")
