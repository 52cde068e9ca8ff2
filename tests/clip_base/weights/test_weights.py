from __future__ import annotations

import dataclasses
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip
from clip_base.weights.reading import read_clip


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openais_archives_are_read_in_the_precision_asked_for(
    tmp_path: Path, kind: str, make: Any, assert_same: Any, archive: Any
):
    model = make(kind)
    path = archive(model, tmp_path / "a.pt")
    found, report = read_clip(path)
    rounded = make(kind).half().float()
    assert report.form == "OpenAI's TorchScript archive"
    assert report.config == model.config
    assert report.precision["float16"] > 10_000
    assert not any("activation" in note for note in report.notes)
    assert_same(found, rounded)
    assert read_clip(path, precision="stored")[0].logit_scale.dtype == torch.float16
    assert read_clip(path, precision="bf16")[0].logit_scale.dtype == torch.bfloat16


def test_reading_an_archive_runs_nothing_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, assert_same: Any, archive: Any
):
    path = archive(make("vit"), tmp_path / "a.pt")

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the interpreter was asked to run the archive")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            code = name.endswith(".py")
            new.writestr(name, b"raise SystemExit('ran')" if code else old.read(name))
    assert_same(load_clip(tmp_path / "b.pt"), load_clip(path))


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def pickled_program(place: Path) -> bytes:
    return pickle.dumps({"visual.proj": Bomb(place)}, protocol=2)


def test_archives_whose_pickle_holds_a_program_are_refused(tmp_path: Path, make: Any, archive: Any):
    path = archive(make("vit"), tmp_path / "a.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            bad = name.endswith("/data.pkl")
            new.writestr(name, pickled_program(tmp_path / "ran") if bad else old.read(name))
    with pytest.raises(InputError, match=rf"refused: its pickle holds {os.mkdir.__module__}\.mkdir"):
        load_clip(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "OrderedDict", "build_intlist", "restore_type_tag"])
def test_allowed_names_cannot_be_bent_to_reach_others(tmp_path: Path, name: str):
    modules = {"_rebuild_tensor_v2": "torch._utils", "OrderedDict": "collections"}
    module = modules.get(name, "torch.jit._pickle")
    # BUILD with a state on the callable itself: sets attributes of what find_class gave out.
    bad = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}X\x08\x00\x00\x00__code__K\x01s\x86b."
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as new:
        new.writestr("c/data.pkl", bad)
        new.writestr("c/constants.pkl", b"")
    with pytest.raises(InputError, match=r"c\.pt"):
        load_clip(tmp_path / "c.pt")


@pytest.mark.parametrize("whole_module", [True, False])
def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path: Path, whole_module: bool):
    path = tmp_path / "m.pt"
    if whole_module:
        torch.save(nn.Linear(2, 2), path)
    else:
        path.write_bytes(pickled_program(tmp_path / "ran"))
    with pytest.raises(InputError, match="is refused: its pickle holds"):
        load_clip(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_state_dicts_are_read_plain_and_wrapped(
    tmp_path: Path, kind: str, legacy: bool, make: Any, theirs: Any, assert_same: Any
):
    model = make(kind)
    state = theirs(model)
    wrapped = {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    compiled = {"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}}
    for index, content in enumerate([state, wrapped, compiled, dict(model.state_dict())]):
        path = tmp_path / f"{index}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        found, report = read_clip(path)
        assert report.config == model.config
        assert ("training checkpoint" in report.form) == (index in (1, 2))
        assert "quick_gelu is assumed" in report.notes[0]
        assert_same(found, model)


def test_a_training_tasks_safetensors_are_read(tmp_path: Path, make: Any, assert_same: Any):
    model = make("resnet")
    folder = tmp_path / "00000500"
    folder.mkdir()
    save_file(
        {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    assert_same(load_clip(folder), model)


def test_our_own_file_is_read_by_the_common_reader(tmp_path: Path, make: Any, assert_same: Any):
    model = make("vit", "gelu")
    save_clip(model, tmp_path / "o.safetensors")
    found, report = read_clip(tmp_path / "o.safetensors")
    assert (report.form, report.notes, report.config) == ("clip_base", (), model.config)
    assert_same(found, model)
    assert not found.training


@pytest.mark.parametrize("low", [0x50, 0x80, 0xB0])
def test_a_safetensors_file_is_known_whatever_its_header_is_long(tmp_path: Path, make: Any, low: int):
    """A header of 0x80 bytes, and of any length that ends so, begins as a pickle does."""
    model, path = make("vit", "gelu"), tmp_path / "w.safetensors"
    metadata = {"format": "clip_base.clip/1", "config": json.dumps(dataclasses.asdict(model.config))}
    for padding in range(0, 256, 8):
        save_file(model.state_dict(), path, {**metadata, "padding": "x" * padding})
        if path.read_bytes()[0] == low:
            break
    assert path.read_bytes()[0] == low
    found, report = read_clip(path)
    assert (report.form, report.notes, found.config) == ("clip_base", (), model.config)


def test_a_safetensors_file_whose_headers_length_reads_as_a_tag_is_no_web_page(tmp_path: Path, make: Any):
    """The length 0x3C20 is a space and "<" on disk."""
    model, path = make("vit", "gelu"), tmp_path / "w.safetensors"
    metadata = {"format": "clip_base.clip/1", "config": json.dumps(dataclasses.asdict(model.config))}
    save_file(model.state_dict(), path, {**metadata, "padding": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(model.state_dict(), path, {**metadata, "padding": "x" * (0x3C20 - length)})
    assert path.read_bytes()[:2] == b" <"
    found, report = read_clip(path)
    assert (report.form, report.notes, found.config) == ("clip_base", (), model.config)
    path.write_bytes(b" <html><body>quota exceeded</body></html>")
    with pytest.raises(InputError, match="is a web page, not weights"):
        read_clip(path)


def test_the_activation_of_a_bare_file_can_be_given_and_a_known_one_not_changed(
    tmp_path: Path, make: Any, theirs: Any, assert_same: Any
):
    model = make("vit", "gelu")
    torch.save(theirs(model), tmp_path / "bare.pt")
    found, report = read_clip(tmp_path / "bare.pt", activation="gelu")
    assert not any("assumed" in note for note in report.notes)
    assert_same(found, model)
    save_clip(model, tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="was trained with gelu"):
        read_clip(tmp_path / "own.safetensors", activation="quick_gelu")
    with pytest.raises(InputError, match="activation must be one of"):
        read_clip(tmp_path / "bare.pt", activation="relu")
    with pytest.raises(InputError, match="precision must be one of"):
        read_clip(tmp_path / "bare.pt", precision="int8")


def test_missing_left_over_and_misshapen_keys_are_listed(tmp_path: Path, make: Any, theirs: Any):
    state = theirs(make("vit"))
    del state["ln_final.bias"]
    state["visual.head.weight"] = torch.ones(2)
    state["visual.ln_post.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "s.pt")
    with pytest.raises(InputError) as raised:
        load_clip(tmp_path / "s.pt")
    message = str(raised.value)
    assert "1 missing: text.ln_final.bias" in message
    assert "1 left over: visual.head.weight" in message
    assert "1 misshapen: visual.ln_post.weight [3] for [64]" in message


@pytest.mark.parametrize("gone", ["text_projection", "visual.conv1.weight", "visual.positional_embedding"])
def test_a_missing_key_that_sizes_come_from_is_named(tmp_path: Path, gone: str, make: Any, theirs: Any):
    state = theirs(make("vit"))
    del state[gone]
    torch.save(state, tmp_path / "s.pt")
    with pytest.raises(InputError, match=rf"not a complete CLIP: (text\.)?{gone} is missing"):
        load_clip(tmp_path / "s.pt")


def test_quantized_weights_and_odd_contents_are_refused(tmp_path: Path, make: Any, theirs: Any):
    state = theirs(make("vit"))
    contents: list[tuple[Any, str]] = [
        ({**state, "ln_final.weight": torch.ones(64, dtype=torch.uint8)}, "not floating-point"),
        ({**state, "epoch": 3}, "no state dict: 1 of"),
        ([1, 2], "holds a list"),
        ({}, "holds a dict"),
        ({"state_dict": {}}, "holds a dict"),
    ]
    for content, message in contents:
        torch.save(content, tmp_path / "s.pt")
        with pytest.raises(InputError, match=message):
            load_clip(tmp_path / "s.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello, these are no weights at all", "cannot be read"),
        (b"\x80\x02}q", "cannot be read"),
        (b"PK\x03\x04 broken", "cannot be read"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_clip(path)


def test_a_cut_file_of_any_form_is_an_input_error(tmp_path: Path, make: Any, theirs: Any, archive: Any):
    model = make("vit")
    torch.save(theirs(model), tmp_path / "state.pt")
    save_clip(model, tmp_path / "own.safetensors")
    for path in (archive(model, tmp_path / "a.pt"), tmp_path / "state.pt", tmp_path / "own.safetensors"):
        whole = path.read_bytes()
        for share in (0.2, 0.9):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(InputError):
                load_clip(path)


def test_missing_files_and_names_say_what_is_published():
    with pytest.raises(InputError, match=r"no published model of that name; .*`clip-base fetch --list`"):
        load_clip("RN51")
