"""Code written for openai/CLIP runs on our models and gives its numbers; open_clip is the peer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision import transforms

import clip_base
from clip_base.images.preprocess import Preprocess
from clip_base.models.clip import CLIP, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.tokenizer import Tokenizer

open_clip = pytest.importorskip("open_clip")

TEXT = {"width": 64, "heads": 1, "layers": 3, "context_length": 24}
VISION = {
    "resnet": VisionConfig(kind="resnet", layers=[1, 2, 1, 2], width=16, resolution=64),
    "vit": VisionConfig(kind="vit", layers=[3], width=64, patch=16, resolution=64),
}
TEXTS = ["a diagram", "a dog", "a cat on a mat"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair(kind: str) -> tuple[CLIP, Any]:
    """Returns our model and open_clip's with the same weights, both evaluating."""
    torch.manual_seed(0)
    vision = VISION[kind]
    ours = CLIP(CLIPConfig(32, vision, TextConfig(**TEXT)))
    for part in ours.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 0.8)
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    if kind == "resnet":  # so that what happens in front of it is seen behind it
        nn.init.normal_(ours.visual.attnpool.v_proj.weight, std=0.2)
        nn.init.normal_(ours.visual.attnpool.c_proj.weight, std=0.2)
    layers = vision.layers if kind == "resnet" else vision.layers[0]
    sizes = {"layers": layers, "width": vision.width, "image_size": 64}
    sizes["patch_size"] = vision.patch if kind == "vit" else None
    theirs = open_clip.CLIP(embed_dim=32, vision_cfg=sizes, text_cfg=TEXT, quick_gelu=True)
    theirs.load_state_dict(to_openai_names(ours.state_dict()))
    return ours.eval(), theirs.eval()


def disc(mode: str = "RGBA") -> Image.Image:
    """A drawing on a transparent ground, as the diagram that openai/CLIP's examples classify."""
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 30, 200, 190), (220, 20, 30, 255))
    draw.rectangle((180, 20, 290, 90), (20, 60, 200, 128))
    return image.convert(mode)


def captured(module: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a forward hook on the module sees, its gradient, and the embeddings, as Grad-CAM does."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        value.retain_grad()
        seen.append(value)

    handle = module.register_forward_hook(keep)
    out = run()
    (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
    handle.remove()
    (value,) = seen
    assert value.grad is not None
    return value.detach(), value.grad, out.detach()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_consistency_test_of_the_published_code(kind: str, tmp_path: Path) -> None:
    """An image and three texts: the model read from the peer's file gives the peer's probabilities."""
    _, theirs = pair(kind)
    path = tmp_path / "theirs.pt"
    torch.save(theirs.state_dict(), path)
    model, preprocess = clip_base.load(path, "cpu", activation="quick_gelu")
    image = preprocess(disc()).unsqueeze(0)
    text = clip_base.tokenize(TEXTS, context_length=24)
    with torch.no_grad():
        logits, _ = model(image, text)
        found = logits.softmax(dim=-1).cpu().numpy()
        expected = theirs.get_logits(image, text)[0].softmax(-1).numpy()
    assert np.allclose(found, expected, atol=1e-4, rtol=1e-3)
    assert abs(found.sum() - 1) < 1e-5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK"])
def test_preprocessing_is_the_published_pipeline_in_every_mode(mode: str) -> None:
    published = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    image = disc(mode)
    torch.testing.assert_close(Preprocess(64)(image), published(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["layer4", "conv1", "layer1", "layer4.1.bn3", "layer2.0.downsample", "bn2"])
def test_grad_cam_of_a_resnet_sees_what_it_sees_in_the_peer(name: str) -> None:
    ours, theirs = pair("resnet")
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = ours.encode_image(image)
    found = captured(ours.visual.get_submodule(name), lambda: ours.encode_image(image))
    # The peer's rectifiers write over their input, which is what a hook on a batch norm has kept.
    for part in theirs.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    expected = captured(theirs.visual.get_submodule(name), lambda: theirs.encode_image(image))
    for one, two in zip(
        found[1:] if name.endswith("bn3") else found,
        expected[-2:] if name.endswith("bn3") else expected,
        strict=True,
    ):
        torch.testing.assert_close(one, two, **CLOSE)
    torch.testing.assert_close(found[2], plain, **CLOSE)
    with torch.no_grad():
        assert torch.equal(ours.encode_image(image), plain)  # the hook is gone, the folded path is back


def test_the_class_map_of_layer4_is_the_peers() -> None:
    """Grad-CAM (arXiv 1610.02391): layer4's maps, weighted by the mean gradient of the score of one text."""
    maps = []
    image, tokens = torch.randn(1, 3, 64, 64), Tokenizer(24)(TEXTS)
    for model in pair("resnet"):
        target = F.normalize(model.encode_text(tokens), dim=-1)[1].detach()
        seen: dict[str, Tensor] = {}

        def keep_value(_: nn.Module, __: Any, output: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["value"] = output.detach()

        def keep_gradient(_: nn.Module, __: Any, grads: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["gradient"] = grads[0].detach()

        layer = model.visual.layer4
        handles = [layer.register_forward_hook(keep_value), layer.register_full_backward_hook(keep_gradient)]
        (F.normalize(model.encode_image(image), dim=-1) @ target).sum().backward()
        for handle in handles:
            handle.remove()
        maps.append((seen["gradient"].mean((2, 3), keepdim=True) * seen["value"]).sum(1))
    assert maps[0].abs().max() > 0
    torch.testing.assert_close(maps[0], maps[1], **CLOSE)


@pytest.mark.parametrize("name", ["attn", "ln_1", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu", ""])
@pytest.mark.parametrize("block", [0, 2])
def test_hooks_on_a_transformers_block_see_the_published_layout(name: str, block: int) -> None:
    """openai/CLIP's blocks work on [positions, batch, channels]; open_clip's on the batch first."""
    ours, theirs = pair("vit")
    image, tokens = torch.randn(2, 3, 64, 64), Tokenizer(24)(TEXTS)
    for ours_in, theirs_in, run in (
        (ours.visual.transformer, theirs.visual.transformer, lambda model: model.encode_image(image)),
        (ours.transformer, theirs.transformer, lambda model: model.encode_text(tokens)),
    ):
        path = f"{block}.{name}" if name else str(block)
        found = captured(ours_in.resblocks.get_submodule(path), lambda run=run: run(ours))
        expected = captured(theirs_in.resblocks.get_submodule(path), lambda run=run: run(theirs))
        for one, two in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one.transpose(0, 1), two, **CLOSE)
        torch.testing.assert_close(found[2], expected[2], **CLOSE)


@pytest.mark.parametrize("name", ["visual.conv1", "visual.ln_pre", "ln_final", "token_embedding"])
def test_hooks_around_the_transformers_fire(name: str) -> None:
    ours, theirs = pair("vit")
    image, tokens = torch.randn(2, 3, 64, 64), Tokenizer(24)(TEXTS)

    def run(model: Any) -> Tensor:
        return torch.as_tensor(
            model.encode_image(image) if name.startswith("visual") else model.encode_text(tokens)
        )

    mine = ours.text if not name.startswith("visual") else ours
    found = captured(mine.get_submodule(name), lambda: run(ours))
    expected = captured(theirs.get_submodule(name), lambda: run(theirs))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_prompt_learning_runs_the_text_tower_by_its_parts() -> None:
    """CoOp's forward (arXiv 2109.01134): vectors instead of words, then the tower's parts one by one."""
    ours, theirs = pair("vit")
    tokens = Tokenizer(24)(TEXTS)
    prompts = ours.token_embedding(tokens).type(ours.dtype).detach().requires_grad_()
    x = (prompts + ours.positional_embedding.type(ours.dtype)).permute(1, 0, 2)
    x = ours.transformer(x).permute(1, 0, 2)
    x = ours.ln_final(x).type(ours.dtype)
    features = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ ours.text_projection
    torch.testing.assert_close(features, theirs.encode_text(tokens), **CLOSE)
    torch.testing.assert_close(features, ours.encode_text(tokens), **CLOSE)
    features.sum().backward()
    assert prompts.grad is not None
    assert prompts.grad[0, 1].abs().max() > 0
    assert prompts.grad[0, 10:].abs().max() == 0  # causal: nothing after the end of a text counts


def test_visual_prompting_runs_the_image_tower_by_its_parts() -> None:
    ours, theirs = pair("vit")
    visual, image = ours.visual, torch.randn(2, 3, 64, 64)
    x = visual.conv1(image).flatten(2).permute(0, 2, 1)
    first = visual.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, x.shape[-1])
    x = visual.ln_pre(torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)).permute(1, 0, 2)
    for block in visual.transformer.resblocks:
        x = block(x)
    x = visual.ln_post(x.permute(1, 0, 2)[:, 0]) @ visual.proj
    torch.testing.assert_close(x, theirs.encode_image(image), **CLOSE)
    assert visual.output_dim == x.shape[1] == 32


class Doubled(nn.Module):
    """Stands for an adapter put around a layer (LoRA): the layer's weights alone are not what it computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns twice the layer's output."""
        return torch.as_tensor(2 * self.inner(x))


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("vit", "visual.transformer.resblocks.2.mlp.c_fc"),
        ("vit", "visual.transformer.resblocks.0.mlp.c_proj"),
        ("vit", "visual.ln_post"),
        ("vit", "visual.conv1"),
        ("vit", "text.transformer.resblocks.1.mlp.c_fc"),
        ("vit", "text.ln_final"),
        ("resnet", "visual.conv2"),
        ("resnet", "visual.layer4.0.conv1"),
        ("resnet", "visual.layer3.0.downsample.0"),
    ],
)
def test_a_replaced_or_pruned_layer_counts(kind: str, path: str) -> None:
    image, tokens = torch.randn(2, 3, 64, 64), Tokenizer(24)(TEXTS)
    changes: list[Callable[[nn.Module, str], object]] = [
        lambda parent, name: setattr(parent, name, Doubled(getattr(parent, name))),
        lambda parent, name: prune.random_unstructured(getattr(parent, name), "weight", 0.5),
    ]
    for change in changes:
        found = []
        for model, place in zip(pair(kind), (path, path.removeprefix("text.")), strict=True):
            torch.manual_seed(0)
            parent, _, name = place.rpartition(".")
            change(model.get_submodule(parent), name)
            run = model.encode_text if path.startswith("text") else model.encode_image
            with torch.no_grad():
                found.append(run(tokens if path.startswith("text") else image))
        torch.testing.assert_close(found[0], found[1], **CLOSE)
        with torch.no_grad():
            before = pair(kind)[0]
            plain = before.encode_text(tokens) if path.startswith("text") else before.encode_image(image)
        assert (found[0] - plain).abs().max() > 2e-4
