"""Files of every format, damaged: each failure is an InputError that names the file in one short line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_base.evaluation.prompts import read_templates
from clip_base.jobs.cli import main_regionclip
from clip_base.jobs.resume_log import ResumeLog
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, read_json_lines
from clip_base.storage.json_stream import stream_entries
from clip_base.storage.tables import open_table, read_class_list, read_yaml
from clip_base.storage.tars import scan
from clip_base.training.checkpoint import newest
from clip_base.weights.infer_config import from_huggingface, from_open_clip
from clip_base.weights.native import read_weights
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.categories import parse_names

NOISE = bytes(range(256)) * 8
DEEP = b"[" * 100_000
DIGITS = b"[" + b"9" * 5000 + b"]"


def checkpoint(path: Path) -> object:
    folder = path.with_name("checkpoints") / "00000001"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "training.pt").write_bytes(path.read_bytes())
    return newest(folder.parent)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "JSON": ("a.json", read_json),
    "JSON in a stream": ("a.json", lambda path: list(stream_entries(path))),
    "JSON Lines": ("a.jsonl", lambda path: list(read_json_lines(path))),
    "YAML": ("a.yaml", read_yaml),
    "class list in YAML": ("b.yaml", read_class_list),
    "CSV": ("a.csv", lambda path: list(open_table(path, wanted=[("image",)]).records())),
    "templates": ("a.txt", lambda path: read_templates(str(path))),
    "tar": ("a.tar", scan),
    "safetensors": ("a.safetensors", read_weights),
    "vocabulary": ("v.safetensors", lambda path: Vocabulary.load(path)),
    "checkpoint": ("training.pt", checkpoint),
    "log of a stopped run": ("log.jsonl", lambda path: ResumeLog(path, {})),
}
DAMAGE = {
    "noise": NOISE,
    "nested": DEEP,
    "digits": DIGITS,
    "nested keys": b'{"a":' * 20_000,
    "a quote": b'"' * 5000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_one_short_line_that_names_the_file(reader: str, damage: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(DAMAGE[damage] + (b"\n" if reader == "log of a stopped run" else b""))
    try:
        read(path)
    except InputError as error:
        told = str(error)
        assert "\n" not in told
        assert len(told) < 500 + len(str(tmp_path))
        assert str(tmp_path) in told


@pytest.mark.parametrize("reader", READERS)
def test_noise_is_refused_by_every_reader(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(NOISE)
    with pytest.raises(InputError):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "clip", "vision_config": [1]},
        {"model_type": "clip", "vision_config": {"num_attention_heads": 0.5}},
        {"model_type": "clip", "vision_config": {"hidden_size": "wide" * 100}},
        {"model_type": "clip", "text_config": {"layer_norm_eps": "small"}},
        {"model_type": "clip", "text_config": {"num_attention_heads": -3}},
    ],
)
def test_a_config_of_hugging_face_that_is_none(config: Any) -> None:
    with pytest.raises(InputError, match=r"^config\.json") as caught:
        from_huggingface(config, "config.json")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "model", [{"vision_cfg": [1]}, {"vision_cfg": {"head_width": "a"}}, {"text_cfg": {"heads": 1e300}}]
)
def test_a_config_of_open_clip_that_is_none(model: Any) -> None:
    with pytest.raises(InputError, match=r"^open_clip_config\.json"):
        from_open_clip({"model_cfg": model}, "open_clip_config.json")


@pytest.mark.parametrize(
    "metadata",
    [
        {"names": "[", "provenance": "{}"},
        {"names": "{}", "provenance": "{}"},
        {"names": '["a"]'},
        {"provenance": "{}"},
    ],
)
def test_a_vocabulary_whose_names_are_damaged(metadata: dict[str, str], tmp_path: Path) -> None:
    whole = {"format": "regionclip.vocabulary", "version": "1", **metadata}
    path = tmp_path / "v.safetensors"
    save_file({"embeddings": torch.eye(1)}, path, whole)
    with pytest.raises(InputError, match=r"names|provenance"):
        Vocabulary.load(path)


def test_an_array_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 4), np.float32))
    data = (tmp_path / "a.npy").read_bytes()
    for shape in (b"(2, 99999999999)", b"(2, 4, __import__)"):
        changed = data.replace(b"(2, 4), }" + b" " * (len(shape) - 6), shape + b", }")
        assert len(changed) == len(data)
        (tmp_path / "b.npy").write_bytes(changed)
        with pytest.raises(InputError, match=r"b\.npy is not a complete"):
            Vocabulary.load(tmp_path / "b.npy", ["a", "b"])


def test_a_run_folder_whose_config_is_damaged(mining_options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("# region-mine\n{a: [")
    (out / "log.jsonl").write_text("{}\n")
    assert main_regionclip(["mine", *mining_options, f"out={out}"]) == 2


def test_twenty_names_are_no_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"a thing of kind {number:03d}" for number in range(60)]
    assert len(", ".join(names)) > 255
    assert parse_names(", ".join(names)) == names
    with pytest.raises(InputError) as caught:
        parse_names("x" * 5000 + ".txt")
    assert len(str(caught.value)) < 300


def test_json_that_ends_in_infinity_is_no_box(tmp_path: Path, regionclip: Any, world: Path) -> None:
    truth = read_json(world / "instances_val.json")
    entry = {"image_id": truth["images"][0]["id"], "category_id": 1, "score": 0.5}
    content = json.dumps([{**entry, "bbox": [1, 2, float("inf"), 3]}])
    assert "Infinity" in content
    (tmp_path / "r.json").write_text(content)
    given = [f"annotations={world / 'instances_val.json'}", f"results={tmp_path / 'r.json'}"]
    code, told = regionclip("evaluate", *given, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "must have four finite box numbers" in told
