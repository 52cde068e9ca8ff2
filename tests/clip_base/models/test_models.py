from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clip_base.models import zoo
from clip_base.models.bottleneck import FrozenBatchNorm2d, freeze_batch_norm
from clip_base.models.clip import CLIP, from_openai_names, set_checkpointing, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.positions import resample_positions
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.text import TextTower
from clip_base.models.tokenizer import Tokenizer
from clip_base.models.transformer import ALL, Attention, ResidualBlock
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError

TEXT = TextConfig(width=128, heads=2, layers=3, context_length=24)
RESNET = VisionConfig(kind="resnet", layers=[1, 1, 1, 1], width=32, resolution=96)
VIT = VisionConfig(kind="vit", layers=[2], width=128, patch=16, resolution=64)

# Millions of parameters, from open_clip's table of model profiles.
PARAMETERS = {
    "RN50": 102.01,
    "RN101": 119.69,
    "RN50x4": 178.30,
    "RN50x16": 290.98,
    "RN50x64": 623.26,
    "ViT-B/32": 151.28,
    "ViT-B/16": 149.62,
    "ViT-L/14": 427.62,
    "ViT-L/14@336px": 427.94,
}


def lively(module: nn.Module) -> nn.Module:
    """Gives batch norms statistics and gains that matter; a fresh block is the identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 1)
            nn.init.normal_(part.bias, std=0.1)
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module


def make(vision: VisionConfig, activation: str = "quick_gelu") -> CLIP:
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(256, copy.deepcopy(vision), copy.deepcopy(TEXT), activation))
    return lively(model).eval()


@pytest.fixture(scope="module")
def resnet() -> ModifiedResNet:
    visual = make(RESNET).visual
    assert isinstance(visual, ModifiedResNet)
    return visual


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    visual = make(VIT).visual
    assert isinstance(visual, VisionTransformer)
    return visual


@pytest.fixture(scope="module")
def text() -> TextTower:
    return make(VIT).text


@pytest.mark.parametrize("name", zoo.available_models())
def test_published_models_have_the_published_number_of_parameters(name: str):
    with torch.device("meta"):
        model = CLIP(zoo.config(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PARAMETERS[name]


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'ViT-B/32'"):
        zoo.config("ViT-B-32")


def test_configs_are_fresh_copies():
    zoo.config("RN50").vision.layers.append(1)
    assert zoo.config("RN50").vision.layers == [3, 4, 6, 3]


def test_configs_import_without_torch():
    code = "import sys, clip_base.models.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: VisionConfig(kind="convnet"), "resnet or vit"),
        (lambda: VisionConfig(kind="resnet", layers=[12]), "4 positive"),
        (lambda: VisionConfig(kind="vit", layers=[2, 2], width=64), "1 positive"),
        (lambda: VisionConfig(resolution=100), "multiple of 32"),
        (lambda: VisionConfig(kind="vit", layers=[2], width=100, head_width=33), "heads of 33"),
        (lambda: VisionConfig(width=33, head_width=33), "even"),
        (lambda: TextConfig(width=100, heads=3), "multiple of text.heads"),
        (lambda: TextConfig(context_length=1), "context_length"),
        (lambda: CLIPConfig(embed_dim=0), "embed_dim"),
        (lambda: CLIPConfig(activation="relu"), "activation"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(make_config, message: str):
    with pytest.raises(InputError, match=message):
        make_config()


@pytest.mark.parametrize("vision", [RESNET, VIT], ids=["resnet", "vit"])
def test_logits_are_scaled_cosines_both_ways(vision: VisionConfig):
    model = make(vision)
    pixels = torch.randn(2, 3, vision.resolution, vision.resolution)
    tokens = Tokenizer(TEXT.context_length)(["a cat", "a dog", "two birds on a wire"])
    with torch.no_grad():
        per_image, per_text = model(pixels, tokens)
        cosine = F.cosine_similarity(
            model.encode_image(pixels)[:, None], model.encode_text(tokens)[None], dim=-1
        )
    torch.testing.assert_close(per_image, cosine / 0.07, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(per_text, per_image.T)


def test_the_logit_scale_starts_at_the_published_value():
    assert make(VIT).logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_a_fresh_resnet_block_is_the_identity():
    torch.manual_seed(0)
    block = ModifiedResNet(VisionConfig(layers=[2, 1, 1, 1], width=32, resolution=96), 64).layer1[1]
    x = torch.rand(1, 128, 6, 6)
    torch.testing.assert_close(block(x), x)


def test_openai_names_return_unchanged():
    state = make(RESNET).state_dict()
    theirs = to_openai_names(state)
    assert {"token_embedding.weight", "visual.layer1.0.downsample.1.running_mean", "logit_scale"} <= set(
        theirs
    )
    back = from_openai_names({**theirs, "input_resolution": torch.tensor(96)})
    assert list(back) == list(state)


def test_stages_have_strides_4_8_16(resnet: ModifiedResNet):
    shapes = [tuple(stage.shape) for stage in resnet.stages(torch.randn(1, 3, 96, 128))]
    assert shapes == [(1, 128, 24, 32), (1, 256, 12, 16), (1, 512, 6, 8)]
    assert (resnet.trunk_channels, resnet.stride, resnet.region_size, resnet.embed_dim) == (512, 16, 6, 256)


def test_the_image_is_the_head_of_its_trunk(resnet: ModifiedResNet):
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(resnet.head(resnet.trunk(images)), resnet(images))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 7), (6, 6), (14, 14)])
def test_the_head_takes_maps_of_any_size(resnet: ModifiedResNet, size: tuple[int, int]):
    out = resnet.head(torch.randn(2, 512, *size))
    assert out.shape == (2, 256)
    assert out.isfinite().all()


def test_the_head_of_no_regions_is_empty(resnet: ModifiedResNet):
    assert resnet.head(torch.randn(0, 512, 6, 6)).shape == (0, 256)


def test_evaluation_equals_convolution_then_batch_norm(resnet: ModifiedResNet):
    block, x = resnet.layer2[0], torch.randn(2, 128, 8, 8)
    out = F.relu(block.bn1(block.conv1(x)))
    out = F.avg_pool2d(F.relu(block.bn2(block.conv2(out))), 2)
    out = block.bn3(block.conv3(out)) + block.downsample(x)
    torch.testing.assert_close(block(x), F.relu(out), rtol=1e-4, atol=1e-5)


def test_a_frozen_batch_norm_keeps_names_and_never_moves():
    free = make(RESNET).visual
    frozen = freeze_batch_norm(copy.deepcopy(free)).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    assert list(before) == list(free.state_dict())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in frozen.modules())
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(frozen(images), free(images))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    trained = {name for name, _ in frozen.named_parameters()}
    assert "layer1.0.conv1.weight" in trained
    assert "bn1.weight" not in trained


def test_a_frozen_batch_norm_alone_is_the_evaluated_one(resnet: ModifiedResNet):
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(FrozenBatchNorm2d(resnet.bn1)(x), resnet.bn1(x))


@pytest.mark.parametrize("vision", [RESNET, VIT], ids=["resnet", "vit"])
def test_checkpointing_changes_neither_gradients_nor_statistics(vision: VisionConfig):
    plain = make(vision).train()
    saving = copy.deepcopy(plain)
    set_checkpointing(saving)
    pixels = torch.randn(3, 3, vision.resolution, vision.resolution)
    tokens = Tokenizer(TEXT.context_length)(["a cat", "a dog", "two birds"])
    for model in (plain, saving):
        F.cross_entropy(model(pixels, tokens)[0], torch.arange(3)).backward()
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    for (name, one), two in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


@pytest.mark.parametrize("vision", [RESNET, VIT], ids=["resnet", "vit"])
def test_every_parameter_receives_a_gradient(vision: VisionConfig):
    model = make(vision).train()
    pixels = torch.randn(2, 3, vision.resolution, vision.resolution)
    F.cross_entropy(model(pixels, Tokenizer(24)(["a cat", "a dog"]))[0], torch.arange(2)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_attention_of_one_query_equals_attention_of_all():
    torch.manual_seed(0)
    ours, theirs = Attention(64, 4), nn.MultiheadAttention(64, 4, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 64)
    expected, _ = theirs(x, x, x)
    torch.testing.assert_close(ours.whole(x, causal=False), expected)
    torch.testing.assert_close(ours.once(x[:, 2], x, None), expected[:, 2])
    hidden = (torch.arange(7) > 2).expand(3, -1)
    torch.testing.assert_close(ours.once(x[:, 2], x, hidden), ours.whole(x, causal=True)[:, 2])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_block_is_attention_and_mlp_with_the_named_activation(activation: str):
    torch.manual_seed(0)
    block, x = ResidualBlock(64, 1, activation), torch.randn(2, 5, 64)
    act = F.gelu if activation == "gelu" else lambda value: value * torch.sigmoid(1.702 * value)
    expected = x + block.attn.whole(block.ln_1(x), causal=False)
    expected = expected + block.mlp.c_proj(act(block.mlp.c_fc(block.ln_2(expected))))
    torch.testing.assert_close(block(x, ALL), expected)
    torch.testing.assert_close(block(x.transpose(0, 1)).transpose(0, 1), expected)


def test_what_follows_the_end_of_text_changes_nothing(text: TextTower):
    tokens = Tokenizer(24)(["a cat", "two birds on a wire"])
    noise = tokens.clone()
    noise[0, 4:] = 7
    with torch.no_grad():
        torch.testing.assert_close(text(noise), text(tokens))
        torch.testing.assert_close(text(tokens[:, :10]), text(tokens))
        torch.testing.assert_close(text(tokens[:1]), text(tokens)[:1])


def test_a_text_longer_than_the_tower_is_refused(text: TextTower):
    with pytest.raises(InputError, match="context_length=24"):
        text(torch.zeros(1, 77, dtype=torch.int64))


def test_an_image_of_another_size_has_a_dense_map_of_its_own_grid(vit: VisionTransformer):
    images = torch.randn(2, 3, 48, 100)
    assert vit(images).shape == (2, 256)
    assert vit.trunk(images).shape == (2, 128, 3, 6)
    assert vit.dense(images).shape == (2, 256, 3, 6)


def test_an_image_smaller_than_a_patch_is_refused(vit: VisionTransformer):
    with pytest.raises(InputError, match="smaller than a patch of 16"):
        vit(torch.randn(1, 3, 8, 64))


def test_patches_are_what_the_strided_convolution_sees(vit: VisionTransformer):
    images = torch.randn(2, 3, 64, 64)
    tokens = vit.conv1(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([vit.class_embedding.expand(2, 1, -1), tokens], 1) + vit.positional_embedding
    expected = vit.ln_post(vit.transformer.run(vit.ln_pre(tokens))[:, 0]) @ vit.proj
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-5)


def test_a_dense_embedding_of_the_last_block_sees_only_its_own_patch():
    torch.manual_seed(0)
    vit = VisionTransformer(VisionConfig(kind="vit", layers=[1], width=128, patch=16, resolution=64), 32)
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., :16, :16] = 0
    moved = (vit.dense(images) - vit.dense(changed)).abs().sum(1)[0]
    assert moved[0, 0] > 0
    assert moved.flatten()[1:].max() == 0


@pytest.mark.parametrize("vision", [RESNET, VIT], ids=["resnet", "vit"])
def test_bfloat16_stays_near_float32(vision: VisionConfig):
    model = make(vision)
    pixels = torch.randn(2, 3, vision.resolution, vision.resolution)
    tokens = Tokenizer(24)(["a cat", "a dog"])
    with torch.no_grad():
        exact = model.encode_image(pixels), model.encode_text(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.encode_image(pixels), model.encode_text(tokens)
        model.bfloat16()
        low = model.encode_image(pixels), model.encode_text(tokens)
    for one, *others in zip(exact, mixed, low, strict=True):
        for other in others:
            assert other.dtype == torch.bfloat16
            assert F.cosine_similarity(one, other.float()).min() > 0.999


def test_position_embeddings_of_the_trained_grid_are_kept_exactly():
    positions = torch.randn(17, 8)
    assert resample_positions(positions, 4, 4) is positions


def test_resampled_position_embeddings_follow_the_grid():
    ramp = torch.arange(6.0).repeat_interleave(6)  # the row's number in each cell
    positions = torch.cat([torch.tensor([9.0]), ramp])[:, None]
    resampled = resample_positions(positions, 12, 3)
    assert resampled.shape == (37, 1)
    assert resampled[0] == 9
    rows = resampled[1:].reshape(12, 3)
    torch.testing.assert_close(rows[:, 0], rows[:, 2])
    torch.testing.assert_close(rows[3:9, 0], torch.arange(3, 9) / 2 - 0.25, rtol=0, atol=0.02)
