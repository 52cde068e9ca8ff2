from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_base.errors import InputError
from clip_base.models.clip import CLIP, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights import load_clip, naming
from clip_base.weights.convert import ConvertConfig, convert
from clip_base.weights.native import save_clip
from clip_base.weights.reading import read_clip

TEXT = TextConfig(width=64, heads=1, layers=2, context_length=12, vocab_size=600)
TOWERS = {
    "vit": VisionConfig(kind="vit", layers=[2], width=64, patch=8, resolution=32),
    "resnet": VisionConfig(kind="resnet", layers=[1, 2, 1, 1], width=8, resolution=64),
}
OPENAI = "quick_gelu"


def make(kind: str, activation: str = OPENAI, vision: VisionConfig | None = None) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(32, vision or copy.deepcopy(TOWERS[kind]), copy.deepcopy(TEXT), activation)
    model = CLIP(config)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 1)
            nn.init.normal_(part.running_mean, std=0.1)
    return model.eval()


def theirs(model: CLIP) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in to_openai_names(model.state_dict()).items()}


def inputs(model: CLIP) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    side = model.config.vision.resolution
    tokens = torch.tensor(
        [[598, 5, 7, 599, 0, 0, 0, 0, 0, 0, 0, 0], [598, 9, 10, 11, 12, 599, 0, 0, 0, 0, 0, 0]]
    )
    return torch.randn(2, 3, side, side), tokens


def assert_same(found: CLIP, expected: CLIP, tolerance: float = 1e-6) -> None:
    pixels, tokens = inputs(expected)
    with torch.inference_mode():
        torch.testing.assert_close(
            found(pixels, tokens)[0], expected(pixels, tokens)[0], rtol=0, atol=tolerance
        )
        torch.testing.assert_close(
            found.encode_image(pixels), expected.encode_image(pixels), rtol=0, atol=tolerance
        )


def as_module(state: dict[str, Tensor]) -> nn.Module:
    """Returns a module tree with these parameter names, as openai/CLIP's own classes would have."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.logit_scale.float()

    root = Root()
    for name, value in state.items():
        *path, last = name.split(".")
        place: nn.Module = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        if last.startswith(("running", "num_batches", "input_", "context_", "vocab_")):
            place.register_buffer(last, value)
        else:
            place.register_parameter(last, nn.Parameter(value, requires_grad=value.is_floating_point()))
    return root


def archive(model: CLIP, path: Path, half: bool = True) -> Path:
    """Writes a TorchScript archive with OpenAI's names, types and extra numbers."""
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in theirs(model).items()}
    state["input_resolution"] = torch.tensor(model.config.vision.resolution)
    state["context_length"] = torch.tensor(model.config.text.context_length)
    state["vocab_size"] = torch.tensor(model.config.text.vocab_size)
    root = as_module(state)
    root.get_submodule("transformer.resblocks.0").register_buffer("attn_mask", torch.zeros(12, 12), False)
    torch.jit.trace(root, torch.ones(1), check_trace=False).save(str(path))
    return path


@pytest.mark.parametrize("kind", TOWERS)
def test_openais_archives_are_read_in_the_precision_asked_for(tmp_path: Path, kind: str):
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


def test_reading_an_archive_runs_nothing_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_archives_whose_pickle_holds_a_program_are_refused(tmp_path: Path):
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
@pytest.mark.parametrize("kind", TOWERS)
def test_state_dicts_are_read_plain_and_wrapped(tmp_path: Path, kind: str, legacy: bool):
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


def test_a_training_tasks_safetensors_are_read(tmp_path: Path):
    model = make("resnet")
    folder = tmp_path / "00000500"
    folder.mkdir()
    save_file(
        {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    assert_same(load_clip(folder), model)


def test_our_own_file_is_read_by_the_common_reader(tmp_path: Path):
    model = make("vit", "gelu")
    save_clip(model, tmp_path / "o.safetensors")
    found, report = read_clip(tmp_path / "o.safetensors")
    assert (report.form, report.notes, report.config) == ("clip_base", (), model.config)
    assert_same(found, model)
    assert not found.training


def test_the_activation_of_a_bare_file_can_be_given_and_a_known_one_not_changed(tmp_path: Path):
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


def test_missing_left_over_and_misshapen_keys_are_listed(tmp_path: Path):
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
def test_a_missing_key_that_sizes_come_from_is_named(tmp_path: Path, gone: str):
    state = theirs(make("vit"))
    del state[gone]
    torch.save(state, tmp_path / "s.pt")
    with pytest.raises(InputError, match=rf"no whole CLIP: (text\.)?{gone} is missing"):
        load_clip(tmp_path / "s.pt")


def test_quantised_weights_and_odd_contents_are_refused(tmp_path: Path):
    state = theirs(make("vit"))
    contents: list[tuple[Any, str]] = [
        ({**state, "ln_final.weight": torch.ones(64, dtype=torch.uint8)}, "no floating-point numbers"),
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


def test_a_cut_file_of_any_form_is_an_input_error(tmp_path: Path):
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
    with pytest.raises(InputError, match="no published model of that name; published are RN50"):
        load_clip("RN51")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_huggingface_folder_gives_transformers_features_both_ways(tmp_path: Path, activation: str):
    transformers = pytest.importorskip("transformers")
    model = make("vit", activation)
    save_clip(model, tmp_path / "own.safetensors")
    folder = tmp_path / "hf"
    convert(ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(folder), to="huggingface"))
    peer = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels, tokens = inputs(model)
    with torch.inference_mode():
        logits = peer(input_ids=tokens, pixel_values=pixels).logits_per_image
        torch.testing.assert_close(logits, model(pixels, tokens)[0], rtol=0, atol=1e-5)
    peer.save_pretrained(tmp_path / "again")
    torch.save(peer.state_dict(), tmp_path / "again" / "pytorch_model.bin")
    for path in (folder, tmp_path / "again", tmp_path / "again" / "pytorch_model.bin"):
        found, report = read_clip(path)
        assert report.form.startswith(("Hugging Face CLIP", "state dict: Hugging Face CLIP"))
        assert (report.config, report.notes) == (model.config, ())
        assert_same(found, model)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    assert processor.crop_size["height"] == 32


def test_sharded_huggingface_folders_are_read(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make("vit")
    save_clip(model, tmp_path / "own.safetensors")
    convert(ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(tmp_path / "hf"), to="huggingface"))
    peer = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert_same(load_clip(tmp_path / "sharded"), model)


def test_a_huggingface_file_without_one_of_query_key_value_is_refused(tmp_path: Path):
    state = naming.to_huggingface(make("vit").state_dict())
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"1 missing: text.transformer.resblocks.1.attn.in_proj_bias; 2 left over"
    ):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "of a 'siglip' model"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
    ],
)
def test_huggingface_configs_of_other_models_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
):
    torch.save(naming.to_huggingface(make("vit").state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **change}))
    with pytest.raises(InputError, match=message):
        load_clip(tmp_path)


def test_no_huggingface_folder_is_made_of_a_resnet(tmp_path: Path):
    save_clip(make("resnet"), tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="no CLIP with a ResNet"):
        convert(
            ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(tmp_path / "hf"), to="huggingface")
        )
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", TOWERS)
def test_an_open_clip_folder_gives_open_clips_features_both_ways(tmp_path: Path, kind: str, activation: str):
    open_clip = pytest.importorskip("open_clip")
    model = make(kind, activation)
    save_clip(model, tmp_path / "own.safetensors")
    folder = tmp_path / "oc"
    convert(ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(folder), to="open_clip"))
    peer = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels, tokens = inputs(model)
    with torch.inference_mode():
        torch.testing.assert_close(
            peer.get_logits(pixels, tokens)[0], model(pixels, tokens)[0], rtol=0, atol=1e-5
        )
    torch.save(peer.state_dict(), folder / "epoch_1.pt")
    for path in (folder, folder / "epoch_1.pt"):
        found, report = read_clip(path)
        assert (report.config, report.notes) == (model.config, ())
        assert_same(found, model)


def test_single_open_clip_files_load_there_and_keep_their_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    open_clip = pytest.importorskip("open_clip")
    model = make(
        "vit", "gelu", VisionConfig(kind="vit", layers=[1], width=64, patch=8, resolution=32, head_width=32)
    )
    save_clip(model, tmp_path / "own.safetensors")
    for name in ("w.safetensors", "w.pt"):
        convert(
            ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(tmp_path / name), to="open_clip")
        )
        assert "force_quick_gelu=False" in capsys.readouterr().out
        state = open_clip.factory.load_state_dict(str(tmp_path / name))
        assert set(state) == set(theirs(model))
    found, report = read_clip(tmp_path / "w.safetensors")
    assert (report.config, report.notes) == (model.config, ())
    assert_same(found, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "convnext"}}, "timm_model_name"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type='avg'"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask=True"),
    ],
)
def test_open_clip_configs_of_other_towers_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    torch.save(theirs(make("vit")), tmp_path / "w.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": change}))
    with pytest.raises(InputError, match=message):
        load_clip(tmp_path / "w.pt")


@pytest.mark.parametrize("kind", TOWERS)
def test_converting_an_archive_to_ours_keeps_half_precision(tmp_path: Path, kind: str):
    path = archive(make(kind), tmp_path / "a.pt")
    out = tmp_path / "own.safetensors"
    convert(ConvertConfig(file=str(path), out=str(out), to="native"))
    _, report = read_clip(out)
    assert set(report.precision) <= {"float16", "int64"}
    assert_same(load_clip(out), load_clip(path))


def test_convert_writes_neither_over_its_input_nor_under_a_wrong_name(tmp_path: Path):
    path = tmp_path / "own.safetensors"
    save_clip(make("vit"), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="is the file that is read"):
        convert(ConvertConfig(file=str(path), out=str(path)))
    with pytest.raises(InputError, match=r"our form is a \.safetensors file"):
        convert(ConvertConfig(file=str(path), out=str(tmp_path / "x.pt")))
    with pytest.raises(InputError, match="open_clip reads"):
        convert(ConvertConfig(file=str(path), out=str(tmp_path / "x.onnx"), to="open_clip"))
    with pytest.raises(InputError, match="form is a folder"):
        convert(ConvertConfig(file=str(path), out=str(tmp_path / "x.safetensors"), to="huggingface"))
    assert path.read_bytes() == before


def test_huggingface_names_are_a_permutation_of_ours():
    state = make("vit").state_dict()
    back = naming.from_huggingface(naming.to_huggingface(state))
    assert set(back) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)
