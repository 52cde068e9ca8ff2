"""The same weights in open_clip and here give the same numbers, and the same texts the same ids."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clip_base.models import zoo
from clip_base.models.clip import CLIP, from_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.positions import resample_positions
from clip_base.models.tokenizer import Tokenizer, tokenize

open_clip = pytest.importorskip("open_clip")

TEXTS = ["a photo of a cat", "two dogs run along the beach at sunset, seen from a low-flying plane"]
QUICK = {"RN50", "ViT-B/32"}
TOLERANCE = 1e-5


def lively(model: nn.Module) -> nn.Module:
    """Makes a fresh open_clip model's batch norms matter: its residual blocks start as identities."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.2, 0.5)
            nn.init.normal_(part.bias, std=0.1)
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return model.eval()


def ours_with_weights_of(theirs: nn.Module, config: CLIPConfig) -> CLIP:
    """Builds our model around their tensors, so that the largest needs memory only once."""
    with torch.device("meta"):
        ours = CLIP(config)
    ours.load_state_dict(from_openai_names(theirs.state_dict()), assign=True)
    return ours.eval()


def assert_same_numbers(ours: CLIP, theirs: nn.Module, tokens: torch.Tensor) -> None:
    side = ours.config.vision.resolution
    pixels = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        logits, _ = ours(pixels, tokens)
        expected, _ = theirs.get_logits(pixels, tokens)
        torch.testing.assert_close(
            ours.encode_image(pixels), theirs.encode_image(pixels), rtol=0, atol=TOLERANCE
        )
        torch.testing.assert_close(
            ours.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=TOLERANCE
        )
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in zoo.available_models()]
)
def test_published_models_give_open_clips_numbers(name: str):
    torch.manual_seed(0)
    known = name.replace("/", "-").replace("@336px", "-336")
    theirs = lively(open_clip.create_model(known, force_quick_gelu=True))
    assert_same_numbers(ours_with_weights_of(theirs, zoo.config(name)), theirs, tokenize(TEXTS))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_small_models_give_open_clips_numbers(kind: str, activation: str):
    torch.manual_seed(0)
    vision = (
        VisionConfig(kind="resnet", layers=[1, 2, 1, 1], width=32, resolution=96)
        if kind == "resnet"
        else VisionConfig(kind="vit", layers=[3], width=128, patch=16, resolution=64)
    )
    text = TextConfig(width=128, heads=2, layers=3, context_length=24)
    config = CLIPConfig(256, vision, text, activation)
    layers = vision.layers if kind == "resnet" else vision.layers[0]
    theirs = open_clip.CLIP(
        embed_dim=256,
        vision_cfg={
            "layers": layers,
            "width": vision.width,
            "image_size": vision.resolution,
            "patch_size": vision.patch if kind == "vit" else None,
        },
        text_cfg={"width": 128, "heads": 2, "layers": 3, "context_length": 24},
        quick_gelu=activation == "quick_gelu",
    )
    assert_same_numbers(ours_with_weights_of(lively(theirs), config), theirs, Tokenizer(24)(TEXTS))


def test_gradients_are_open_clips():
    torch.manual_seed(0)
    theirs = lively(
        open_clip.CLIP(
            embed_dim=64,
            vision_cfg={"layers": [1, 1, 1, 1], "width": 32, "image_size": 64, "patch_size": None},
            text_cfg={"width": 128, "heads": 2, "layers": 2, "context_length": 24},
            quick_gelu=True,
        )
    ).train()
    config = CLIPConfig(
        64,
        VisionConfig(kind="resnet", layers=[1, 1, 1, 1], width=32, resolution=64),
        TextConfig(width=128, heads=2, layers=2, context_length=24),
    )
    ours = CLIP(config).train()
    ours.load_state_dict(from_openai_names(theirs.state_dict()))
    pixels, tokens = torch.randn(3, 3, 64, 64), Tokenizer(24)([*TEXTS, "a dog"])
    for logits in (ours(pixels, tokens)[0], theirs.get_logits(pixels, tokens)[0]):
        torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = from_openai_names({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert set(mine) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    moved = from_openai_names(dict(theirs.named_buffers()))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, moved[name], msg=name)


def test_resampled_positions_are_open_clips():
    theirs = nn.Module()
    theirs.visual = nn.Module()
    theirs.visual.grid_size = (4, 4)
    positions = torch.randn(37, 64)
    state = {"visual.positional_embedding": positions}
    open_clip.model.resize_pos_embed(state, theirs)
    torch.testing.assert_close(resample_positions(positions, 4, 4), state["visual.positional_embedding"])


def ids_of_open_clip(texts: list[str]) -> list[list[int]]:
    return [peer().encode(text) for text in texts]


@cache
def peer() -> Any:
    """open_clip's tokenizer with openai/CLIP's spelling of the two special tokens, which is ours."""
    found, pattern = open_clip.SimpleTokenizer(), open_clip.tokenizer._tokenizer.pat.pattern
    spellings = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    for theirs, ours in spellings.items():
        assert theirs in pattern
        pattern = pattern.replace(theirs, regex.escape(ours))
        token = found.encoder.pop(theirs)
        found.encoder[ours], found.decoder[token], found.cache[ours] = token, ours, ours
    found.pat = regex.compile(pattern, regex.IGNORECASE)
    return found


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    "name",
    ["coco_karpathy_captions.txt", pytest.param("cc3m_validation_captions.tsv", marks=pytest.mark.slow)],
)
def test_every_real_caption_has_open_clips_ids(shared_data: Path, name: str):
    texts = lines(shared_data / "metadata" / name)
    tokenizer = Tokenizer()
    assert [tokenizer.encode(text) for text in texts] == ids_of_open_clip(texts)
    assert torch.equal(tokenize(texts, truncate=True).long(), open_clip.tokenize(texts))


@given(st.text())
def test_any_text_has_open_clips_ids(text: str):
    assert [Tokenizer().encode(text)] == ids_of_open_clip([text])


PIECES = [
    "'s",
    "'S",
    "'\u017f",
    "&amp;",
    "&lt;",
    "&#x41;",
    "&amp;amp;",
    "<|startoftext|>",
    "<|ENDOFTEXT|>",
    "<start_of_text>",
    "</w>",
]
PIECES += [
    "\x00",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "\ufeff",
    "\ufb01",
]
PIECES += [
    "\u03a3",
    "\u0130",
    "\u2019",
    "\u201c",
    "Ã©",
    "â€™",
    "\u4e2d\u6587",
    "e\u0301",
    "\U0001f600",
    "²",
    "½",
    "_",
]


@given(st.lists(st.sampled_from([*PIECES, "a", "Dog", "7", " ", "\n", "\t", ",", "!", "-"])).map("".join))
def test_awkward_text_has_open_clips_ids(text: str):
    assert [Tokenizer().encode(text)] == ids_of_open_clip([text])


@given(st.lists(st.integers(0, 49407)))
def test_decoded_text_is_open_clips(ids: list[int]):
    assert Tokenizer().decode(ids) == peer().decode(ids)
