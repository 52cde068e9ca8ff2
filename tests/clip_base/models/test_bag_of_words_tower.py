from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_base.jobs import cli
from clip_base.jobs.config import check
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights, save_clip, write_weights

VISION = VisionConfig(kind="vit", layers=[1], width=32, patch=16, resolution=32, head_width=16)
START, END = 598, 599


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    text = TextConfig(width=24, context_length=8, vocab_size=600, kind="bow")
    return CLIP(CLIPConfig(16, VISION, text)).eval()


@pytest.fixture
def weights(model: CLIP, tmp_path: Path) -> Path:
    save_clip(model, tmp_path / "bow.safetensors")
    return tmp_path / "bow.safetensors"


def texts(*rows: list[int]) -> Tensor:
    return torch.tensor([[START, *row, END] + [0] * (6 - len(row)) for row in rows])


def test_an_embedding_is_the_projected_mean_of_its_tokens(model: CLIP) -> None:
    tokens = texts([5, 7, 5], [9], [])
    rows = [model.token_embedding(torch.tensor([*row, END])).mean(0) for row in ([5, 7, 5], [9], [])]
    expected = torch.stack(rows) @ model.text_projection
    torch.testing.assert_close(model.encode_text(tokens), expected)


def test_neither_order_nor_padding_counts(model: CLIP) -> None:
    one, other = model.encode_text(texts([5, 7, 3], [3, 5, 7]))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(model.encode_text(texts([5, 7, 3])[:, :5])[0], one)


def test_it_is_saved_and_loaded_with_its_kind(
    model: CLIP, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = load_clip(weights)
    assert again.config.text.kind == "bow"
    assert (again.config.text.layers, again.config.text.heads) == (0, 0)
    tokens = texts([5, 7, 3])
    torch.testing.assert_close(again.encode_text(tokens), model.encode_text(tokens))
    assert cli.main(["inspect", str(weights)]) == 0
    assert "mean of token embeddings, width 24, 8 positions" in capsys.readouterr().out


def test_a_file_without_a_kind_has_a_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = TextConfig(width=32, heads=2, layers=1, context_length=8, vocab_size=600)
    save_clip(CLIP(CLIPConfig(16, VISION, text)), tmp_path / "new.safetensors")
    state, metadata = read_weights(tmp_path / "new.safetensors")
    config = json.loads(metadata["config"])
    del config["text"]["kind"]
    write_weights(tmp_path / "old.safetensors", state, {**metadata, "config": json.dumps(config)})
    assert load_clip(tmp_path / "old.safetensors").config.text == text


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
def test_other_packages_forms_are_refused(
    form: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out.safetensors" if form == "open_clip" else "out")
    assert cli.main(["convert", str(weights), f"to={form}", f"out={out}"]) == 2
    assert "has no text tower of kind bow" in capsys.readouterr().err
    assert not out.exists()


def test_what_it_lacks_is_no_attribute(model: CLIP) -> None:
    for name in ("transformer", "positional_embedding", "ln_final"):
        assert not hasattr(model, name)
    assert model.token_embedding.weight.shape == (600, 24)


def test_heads_and_layers_are_refused() -> None:
    for options in ({"layers": 2}, {"heads": 4}):
        with pytest.raises(InputError, match=r"does nothing with text.kind=bow, got \d; omit it"):
            check(TextConfig, {"kind": "bow", **options}, "here")
    with pytest.raises(InputError, match=r"text.layers must be above 0"):
        check(TextConfig, {"layers": 0}, "here")


def test_too_long_a_text_is_refused(model: CLIP) -> None:
    with pytest.raises(InputError, match="at most 8"):
        model.encode_text(torch.tensor([[START, *range(1, 9), END]]))


@pytest.mark.slow
def test_it_is_exported(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert cli.main(["export", str(weights), "towers=[text]", "formats=[onnx]", f"out={out}"]) == 0
    assert max(json.loads((out / "metrics.json").read_text())["differences"].values()) < 1e-5
