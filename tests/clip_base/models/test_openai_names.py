"""Names and behaviors of openai/CLIP that code written for it relies on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clip_base.images.preprocess import Preprocess
from clip_base.models.clip import to_openai_names
from clip_base.models.resnet import AttentionPool
from clip_base.models.transformer import untouched
from clip_base.runtime.errors import InputError


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_text_towers_parts_stand_on_the_model(kind: str, make: Any) -> None:
    model = make(kind)
    assert model.token_embedding is model.text.token_embedding
    assert model.transformer is model.text.transformer
    assert model.ln_final is model.text.ln_final
    assert model.text_projection is model.text.text_projection
    assert model.positional_embedding is model.text.positional_embedding
    assert model.visual.output_dim == model.text_projection.shape[1] == 32
    assert model.transformer.width == 64
    # They are names, not second copies: what files hold stays as it is.
    assert not any(name.startswith(("transformer", "ln_final")) for name in model.state_dict())
    assert len(list(model.parameters())) == len(set(model.parameters()))


def test_a_part_that_is_set_takes_effect(make: Any, inputs: Any) -> None:
    model = make("vit")
    _, tokens = inputs(model)
    before = model.encode_text(tokens)
    model.text_projection = nn.Parameter(2 * model.text_projection.detach())
    torch.testing.assert_close(model.encode_text(tokens), 2 * before)
    longer = torch.cat([model.positional_embedding.detach(), torch.zeros(4, 64)])
    model.positional_embedding = nn.Parameter(longer)
    assert model.state_dict()["text.positional_embedding"].shape == (16, 64)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_state_dicts_by_openais_names_reach_both_towers(
    kind: str, strict: bool, make: Any, theirs: Any, assert_same: Any
) -> None:
    expected = make(kind)
    other = copy.deepcopy(expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12)}
    result = other.load_state_dict({**theirs(expected), **sizes}, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(other, expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_openais_names_are_taken_where_the_model_is_a_part(make: Any, theirs: Any, assert_same: Any) -> None:
    expected, wrapped = make("vit"), nn.Module()
    wrapped.clip = copy.deepcopy(expected)
    nn.init.zeros_(wrapped.clip.text_projection)
    state = {f"clip.{name}": value for name, value in theirs(expected).items()}
    wrapped.load_state_dict(state)
    assert_same(wrapped.clip, expected)
    state["clip.text_projections"] = state.pop("clip.text_projection")
    with pytest.raises(RuntimeError, match=r'Missing key.*"clip.text.text_projection"'):
        wrapped.load_state_dict(state)


def test_own_names_load_as_before_and_odd_ones_are_reported(make: Any) -> None:
    model = make("resnet")
    state = model.state_dict()
    assert list(state) == list(copy.deepcopy(model).state_dict())
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "extra.weight": torch.zeros(1)})
    assert set(to_openai_names(state)) != set(state)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_model_without_hooks_takes_the_folded_path(kind: str, make: Any) -> None:
    model = make(kind)
    parts = [part for part in model.visual.children() if not isinstance(part, AttentionPool)]
    assert all(untouched(part) for part in [model.transformer, model.ln_final, *parts])
    handle = next(iter(model.transformer.resblocks)).mlp.register_forward_hook(lambda *_: None)
    assert not untouched(model.transformer)
    handle.remove()
    assert untouched(model.transformer)


def test_models_with_hooks_and_without_can_be_copied_and_pickled(make: Any, assert_same: Any) -> None:
    for kind in ("vit", "resnet"):
        model = make(kind)
        assert_same(copy.deepcopy(model), model)
        assert_same(pickle.loads(pickle.dumps(model)), model)


def photograph(width: int = 80, height: int = 60) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_steps_of_preprocessing_can_be_looked_at_and_changed() -> None:
    preprocess, image = Preprocess(32), photograph()
    plain = preprocess(image)
    resize, crop, to_rgb, to_tensor, normalize = preprocess.transforms
    assert (resize.size, crop.size) == (32, (32, 32))
    torch.testing.assert_close(preprocess(image), plain, rtol=0, atol=1e-6)
    by_hand = normalize(to_tensor(to_rgb(crop(resize(image)))))
    torch.testing.assert_close(by_hand, plain, rtol=0, atol=1e-6)
    preprocess.transforms.pop()  # without normalization, as people do to look at the image
    shown = preprocess(image)
    assert 0 <= shown.min() <= shown.max() <= 1
    assert pickle.loads(pickle.dumps(Preprocess(32))).resolution == 32


def test_preprocessing_says_what_it_takes() -> None:
    with pytest.raises(InputError, match=r"takes a PIL image, got ndarray; .*fromarray"):
        Preprocess(32)(np.zeros((40, 40, 3), np.uint8))  # type: ignore[arg-type]
