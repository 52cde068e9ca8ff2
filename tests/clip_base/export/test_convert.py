from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.export.convert import ConvertConfig, convert
from clip_base.models.configs import VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.weights import key_names
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip
from clip_base.weights.reading import read_clip


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_huggingface_folder_gives_transformers_features_both_ways(
    tmp_path: Path, activation: str, make: Any, inputs: Any, assert_same: Any
):
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


def test_sharded_huggingface_folders_are_read(tmp_path: Path, make: Any, assert_same: Any):
    transformers = pytest.importorskip("transformers")
    model = make("vit")
    save_clip(model, tmp_path / "own.safetensors")
    convert(ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(tmp_path / "hf"), to="huggingface"))
    peer = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert_same(load_clip(tmp_path / "sharded"), model)


def test_a_huggingface_file_without_one_of_query_key_value_is_refused(tmp_path: Path, make: Any):
    state = key_names.to_huggingface(make("vit").state_dict())
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
    tmp_path: Path, change: dict[str, Any], message: str, make: Any
):
    torch.save(key_names.to_huggingface(make("vit").state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **change}))
    with pytest.raises(InputError, match=message):
        load_clip(tmp_path)


def test_no_huggingface_folder_is_made_of_a_resnet(tmp_path: Path, make: Any):
    save_clip(make("resnet"), tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="no CLIP with a ResNet"):
        convert(
            ConvertConfig(file=str(tmp_path / "own.safetensors"), out=str(tmp_path / "hf"), to="huggingface")
        )
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_open_clip_folder_gives_open_clips_features_both_ways(
    tmp_path: Path, kind: str, activation: str, make: Any, inputs: Any, assert_same: Any
):
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, theirs: Any, assert_same: Any
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
def test_open_clip_configs_of_other_towers_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str, make: Any, theirs: Any
):
    torch.save(theirs(make("vit")), tmp_path / "w.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": change}))
    with pytest.raises(InputError, match=message):
        load_clip(tmp_path / "w.pt")


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_converting_an_archive_to_ours_keeps_half_precision(
    tmp_path: Path, kind: str, make: Any, assert_same: Any, archive: Any
):
    path = archive(make(kind), tmp_path / "a.pt")
    out = tmp_path / "own.safetensors"
    convert(ConvertConfig(file=str(path), out=str(out), to="native"))
    _, report = read_clip(out)
    assert set(report.precision) <= {"float16", "int64"}
    assert_same(load_clip(out), load_clip(path))


def test_convert_writes_neither_over_its_input_nor_under_a_wrong_name(tmp_path: Path, make: Any):
    path = tmp_path / "own.safetensors"
    save_clip(make("vit"), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="is the input file"):
        convert(ConvertConfig(file=str(path), out=str(path)))
    with pytest.raises(InputError, match=r"our format is a \.safetensors file"):
        convert(ConvertConfig(file=str(path), out=str(tmp_path / "x.pt")))
    with pytest.raises(InputError, match="open_clip reads"):
        convert(ConvertConfig(file=str(path), out=str(tmp_path / "x.onnx"), to="open_clip"))
    with pytest.raises(InputError, match="format is a folder"):
        convert(ConvertConfig(file=str(path), out=str(tmp_path / "x.safetensors"), to="huggingface"))
    assert path.read_bytes() == before


def test_huggingface_names_are_a_permutation_of_ours(make: Any):
    state = make("vit").state_dict()
    back = key_names.from_huggingface(key_names.to_huggingface(state))
    assert set(back) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)
