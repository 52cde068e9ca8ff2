"""The same weights in Hugging Face's CLIPModel and here give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.tokenizer import END, START, Tokenizer

transformers = pytest.importorskip("transformers")

SMALL = CLIPConfig(
    64,
    VisionConfig(kind="vit", layers=[3], width=128, patch=16, resolution=64),
    TextConfig(width=128, heads=2, layers=3, context_length=24),
)


def peer(config: CLIPConfig) -> torch.nn.Module:
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    text = transformers.CLIPTextConfig(
        hidden_size=config.text.width,
        intermediate_size=4 * config.text.width,
        num_hidden_layers=config.text.layers,
        num_attention_heads=config.text.heads,
        max_position_embeddings=config.text.context_length,
        vocab_size=config.text.vocab_size,
        bos_token_id=START,
        eos_token_id=END,
        **shared,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=config.vision.width,
        intermediate_size=4 * config.vision.width,
        num_hidden_layers=config.vision.layers[0],
        num_attention_heads=config.vision.heads,
        image_size=config.vision.resolution,
        patch_size=config.vision.patch,
        **shared,
    )
    both = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=config.embed_dim
    )
    return transformers.CLIPModel(both).eval()


def blocks_for_hugging_face(
    state: dict[str, Tensor], ours: str, theirs: str, layers: int
) -> dict[str, Tensor]:
    renamed = {}
    same = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    same["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(layers):
        source, target = f"{ours}.{layer}", f"{theirs}.{layer}"
        for kind in ("weight", "bias"):
            for mine, other in same.items():
                renamed[f"{target}.{other}.{kind}"] = state[f"{source}.{mine}.{kind}"]
            parts = state[f"{source}.attn.in_proj_{kind}"].chunk(3)
            for part, value in zip("qkv", parts, strict=True):
                renamed[f"{target}.self_attn.{part}_proj.{kind}"] = value
    return renamed


def for_hugging_face(model: CLIP) -> dict[str, Tensor]:
    state, config = model.state_dict(), model.config
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["text.positional_embedding"],
        "text_projection.weight": state["text.text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T,
    }
    norms = {
        "text_model.final_layer_norm": "text.ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    for theirs, ours in norms.items():
        for kind in ("weight", "bias"):
            renamed[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    text, vision = "text_model.encoder.layers", "vision_model.encoder.layers"
    renamed |= blocks_for_hugging_face(state, "text.transformer.resblocks", text, config.text.layers)
    renamed |= blocks_for_hugging_face(state, "visual.transformer.resblocks", vision, config.vision.layers[0])
    return renamed


@pytest.mark.parametrize("name", ["small", pytest.param("ViT-B/32", marks=pytest.mark.slow)])
def test_vits_give_hugging_faces_numbers(name: str):
    torch.manual_seed(0)
    config = SMALL if name == "small" else zoo.config(name)
    ours, theirs = CLIP(config).eval(), peer(config)
    theirs.load_state_dict(for_hugging_face(ours))
    side = config.vision.resolution
    pixels = torch.randn(2, 3, side, side)
    tokens = Tokenizer(config.text.context_length)(
        ["a photo of a cat", "two dogs run along the beach at sunset"]
    )
    with torch.inference_mode():
        logits, _ = ours(pixels, tokens)
        images, texts = ours.encode_image(pixels), ours.encode_text(tokens)
        expected = theirs(input_ids=tokens, pixel_values=pixels)
    close = {"rtol": 0, "atol": 1e-5}
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(logits, expected.logits_per_image, **close)
    torch.testing.assert_close(unit(images), expected.image_embeds, **close)
    torch.testing.assert_close(unit(texts), expected.text_embeds, **close)
