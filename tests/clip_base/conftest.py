"""Fixtures of the tests of the base package."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clip_base.models.clip import CLIP, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig

_TEXT = TextConfig(width=64, heads=1, layers=2, context_length=12, vocab_size=600)
_TOWERS = {
    "vit": VisionConfig(kind="vit", layers=[2], width=64, patch=8, resolution=32),
    "resnet": VisionConfig(kind="resnet", layers=[1, 2, 1, 1], width=8, resolution=64),
}
_OPENAI = "quick_gelu"


def _make(kind: str, activation: str = _OPENAI, vision: VisionConfig | None = None) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(32, vision or copy.deepcopy(_TOWERS[kind]), copy.deepcopy(_TEXT), activation)
    model = CLIP(config)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 1)
            nn.init.normal_(part.running_mean, std=0.1)
    return model.eval()


def _theirs(model: CLIP) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in to_openai_names(model.state_dict()).items()}


def _inputs(model: CLIP) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    side = model.config.vision.resolution
    tokens = torch.tensor(
        [[598, 5, 7, 599, 0, 0, 0, 0, 0, 0, 0, 0], [598, 9, 10, 11, 12, 599, 0, 0, 0, 0, 0, 0]]
    )
    return torch.randn(2, 3, side, side), tokens


def _assert_same(found: CLIP, expected: CLIP, tolerance: float = 1e-6) -> None:
    pixels, tokens = _inputs(expected)
    with torch.inference_mode():
        torch.testing.assert_close(
            found(pixels, tokens)[0], expected(pixels, tokens)[0], rtol=0, atol=tolerance
        )
        torch.testing.assert_close(
            found.encode_image(pixels), expected.encode_image(pixels), rtol=0, atol=tolerance
        )


def _as_module(state: dict[str, Tensor]) -> nn.Module:
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


def _archive(model: CLIP, path: Path, half: bool = True) -> Path:
    """Writes a TorchScript archive with OpenAI's names, types and extra numbers."""
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in _theirs(model).items()}
    state["input_resolution"] = torch.tensor(model.config.vision.resolution)
    state["context_length"] = torch.tensor(model.config.text.context_length)
    state["vocab_size"] = torch.tensor(model.config.text.vocab_size)
    root = _as_module(state)
    root.get_submodule("transformer.resblocks.0").register_buffer("attn_mask", torch.zeros(12, 12), False)
    torch.jit.trace(root, torch.ones(1), check_trace=False).save(str(path))
    return path


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; tests that use it are skipped where none can be mounted."""
    folder = tmp_path / "tiny_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    # Lazily: weights that were read from it may still be mapped into memory.
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve small images, `0.png` to `11.png`, each of one color with a bright square."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        pixels = np.full((40, 48, 3), (20 * index, 255 - 20 * index, 60), np.uint8)
        pixels[10:20, 3 * index : 3 * index + 10] = 255
        cv2.imwrite(str(folder / f"{index}.png"), pixels)
    return folder


@pytest.fixture(scope="session")
def make() -> Callable[..., CLIP]:
    """Makes a small CLIP, "vit" or "resnet": make(kind, activation="quick_gelu", vision=None)."""
    return _make


@pytest.fixture(scope="session")
def theirs() -> Callable[[CLIP], dict[str, Tensor]]:
    """Gives a CLIP's state dict by OpenAI's names."""
    return _theirs


@pytest.fixture(scope="session")
def inputs() -> Callable[[CLIP], tuple[Tensor, Tensor]]:
    """Gives two images and two texts for a small CLIP."""
    return _inputs


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Checks that two CLIPs compute the same: assert_same(found, expected, tolerance=1e-6)."""
    return _assert_same


@pytest.fixture(scope="session")
def archive() -> Callable[..., Path]:
    """Writes a TorchScript archive as OpenAI's: archive(model, path, half=True)."""
    return _archive
