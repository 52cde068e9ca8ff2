from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_base
from clip_base.images.preprocess import Preprocess
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.weights.native import save_clip


def save_tiny(path: Path) -> CLIP:
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    model = CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1))).eval()
    save_clip(model, path)
    return model


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_importing_the_package_loads_no_torch():
    code = "import sys, clip_base; clip_base.available_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_front_door_has_openais_names():
    assert {"available_models", "load", "tokenize"} <= set(clip_base.__all__)
    assert clip_base.available_models()[:2] == ["RN50", "RN101"]
    assert len(clip_base.available_models()) == 9
    tokens = clip_base.tokenize(["a photo of a cat"])
    assert (tokens.shape, tokens.dtype) == ((1, 77), torch.int32)
    assert tokens[0, 0] == 49406
    with pytest.raises(AttributeError, match="nothing"):
        clip_base.nothing  # noqa: B018


def test_load_returns_a_model_and_its_preprocessing(tmp_path: Path):
    expected = save_tiny(tmp_path / "w.safetensors")
    model, preprocess = clip_base.load(str(tmp_path / "w.safetensors"), device="cpu")
    assert not model.training
    pixels = preprocess(photograph(60, 41))[None]
    assert (pixels.shape, pixels.dtype) == ((1, 3, 32, 32), torch.float32)
    tokens = clip_base.tokenize(["a cat", "a dog"])
    with torch.no_grad():
        per_image, per_text = model(pixels, tokens)
        assert per_image.shape == (1, 2)
        torch.testing.assert_close(per_text, per_image.T)
        torch.testing.assert_close(per_image, expected(pixels, tokens)[0])


def test_a_model_has_the_attributes_that_openais_examples_print(tmp_path: Path):
    save_tiny(tmp_path / "w.safetensors")
    model, _ = clip_base.load(tmp_path / "w.safetensors", "cpu")
    assert (model.visual.input_resolution, model.context_length, model.vocab_size) == (32, 77, 49408)
    assert model.dtype == torch.float32


def test_load_gives_the_precision_asked_for_and_float32_on_the_cpu(tmp_path: Path):
    model = save_tiny(tmp_path / "w.safetensors")
    save_clip(model.half(), tmp_path / "h.safetensors")
    path = tmp_path / "h.safetensors"
    assert clip_base.load(path, "cpu")[0].logit_scale.dtype == torch.float32
    assert clip_base.load(path, "cpu", precision="fp16")[0].logit_scale.dtype == torch.float16
    assert clip_base.load(path, "meta")[0].logit_scale.dtype == torch.float16
    with pytest.raises(InputError, match="precision must be auto or one of"):
        clip_base.load(path, "cpu", precision="int8")


def test_load_runs_no_code_from_archives(tmp_path: Path):
    save_tiny(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="jit=True would run code"):
        clip_base.load(tmp_path / "w.safetensors", jit=True)


@pytest.mark.parametrize("size", [(60, 41), (41, 60), (32, 32), (20, 90), (33, 32), (640, 427)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_preprocessing_has_torchvisions_numbers(size: tuple[int, int], mode: str):
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [
            transforms.Resize(32, interpolation=bicubic),
            transforms.CenterCrop(32),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    image = photograph(*size, mode=mode)
    torch.testing.assert_close(Preprocess(32)(image), theirs(image), rtol=0, atol=1e-5)


def test_preprocessing_takes_palettes_and_transparency():
    for mode in ("P", "RGBA", "CMYK", "1"):
        assert Preprocess(32)(photograph(50, 40, mode)).shape == (3, 32, 32)
