"""Teachers of open_clip and transformers give those packages' own numbers, at small sizes and random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import normalize
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.weights.native import save_clip
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.teachers.base import RegionView, Score, TeacherModel, load_teacher
from regionclip.structures.regions import Regions, whole_images

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

TEXTS = ["a photo of a cat", "two dogs"]
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
WORDS = {
    word: place for place, word in enumerate(["[PAD]", "[END]", "[UNK]", "a", "photo", "of", "cat", "dogs"])
}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": {
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT,
        "quick_gelu": True,
    },
    "siglip": {
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit3",
            "timm_pool": "map",
            "timm_proj": "linear",
        },
        "text_cfg": {**TEXT, "vocab_size": 8, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "eva": {
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "eva02_tiny_patch14_224",
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": TEXT,
    },
    "convnext": {
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
}


def words_tokenizer(folder: Path) -> None:
    """Saves a tokenizer of eight words, as one of the hub would lie in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", WORDS["[END]"])]
    )
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]", model_max_length=16
    )
    whole.save_pretrained(folder)


def saved_open_clip(folder: Path, kind: str) -> Path:
    config = json.loads(json.dumps({"embed_dim": 24, **OPEN_CLIP[kind]}))
    mean, std = ([0.5] * 3, [0.5] * 3) if kind == "siglip" else ([0.48, 0.45, 0.40], [0.26, 0.26, 0.27])
    folder.mkdir()
    if kind == "siglip":
        words_tokenizer(folder)
        config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    written = {"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for weight in model.parameters():  # timm's towers start with heads and gains near zero
        if weight.ndim and weight.abs().max() < 1e-4:
            nn.init.normal_(weight, std=0.05)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def saved_transformers(folder: Path, kind: str) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 8, "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 48, "patch_size": 16}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(
            text_config={**text, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2},
            vision_config=vision,
            projection_dim=24,
        )
        model = transformers.CLIPModel(config)
    elif kind == "chinese_clip":
        config = transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.ChineseCLIPModel(config)
    else:
        config = transformers.SiglipConfig(
            text_config={**text, "projection_size": 32, "pad_token_id": 0, "eos_token_id": 1},
            vision_config=vision,
        )
        model = transformers.SiglipModel(config)
        nn.init.constant_(model.logit_bias, -12.0)
        nn.init.constant_(model.logit_scale, 4.7)
    model.save_pretrained(folder)
    words_tokenizer(folder)
    mean, std = ([0.5] * 3, [0.5] * 3) if kind == "siglip" else ([0.48, 0.45, 0.40], [0.26, 0.26, 0.27])
    transformers.CLIPImageProcessor(
        image_mean=mean,
        image_std=std,
        size={"height": 48, "width": 48},
        crop_size={"height": 48, "width": 48},
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(backend: str, kind: str) -> Path:
        if (backend, kind) not in made:
            place = tmp_path_factory.mktemp("teachers") / kind
            save = saved_open_clip if backend == "open_clip" else saved_transformers
            made[backend, kind] = save(place, kind)
        return made[backend, kind]

    return make


def picture(side: int) -> Image.Image:
    """A smooth image, in which filters differ little."""
    across, down = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    pixels = np.stack([across, down, (1 - across) * down], 2) * 200 + 30
    return Image.fromarray(pixels.astype(np.uint8))


def batch_of(image: Image.Image) -> ImageBatch:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return ImageBatch.whole(normalize(pixels)[None])


def whole(teacher: TeacherModel, image: Image.Image, mode: str = "crop") -> Tensor:
    images = batch_of(image)
    return teacher.region_embedder(RegionView(mode, 1.0))(images, whole_images(images))


def unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows.float(), dim=-1)


@pytest.mark.parametrize("kind", OPEN_CLIP)
@torch.no_grad()
def test_open_clips_models_embed_as_open_clip_does(kind: str, folder: Callable[..., Path]) -> None:
    place = folder("open_clip", kind)
    teacher = load_teacher({"name": "open_clip"}, str(place))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{place}")
    model.eval()
    image = picture(teacher.resolution)
    expected = unit(model.encode_image(preprocess(image)[None]))
    torch.testing.assert_close(whole(teacher, image), expected, rtol=0, atol=1e-4)
    tokens = open_clip.get_tokenizer(f"local-dir:{place}")(TEXTS)
    found = unit(teacher.encode_text(teacher.tokenize(TEXTS)))
    torch.testing.assert_close(found, unit(model.encode_text(tokens)), rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (teacher.score.bias is None) == (kind != "siglip")
    assert teacher.score.scale == pytest.approx(float(model.logit_scale.exp()))


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip"])
@torch.no_grad()
def test_transformers_models_embed_as_transformers_does(kind: str, folder: Callable[..., Path]) -> None:
    place = folder("transformers", kind)
    teacher = load_teacher({"name": "transformers"}, str(place))
    model = transformers.AutoModel.from_pretrained(place).eval()
    image = picture(48)
    pixels = transformers.AutoImageProcessor.from_pretrained(place)(image, return_tensors="pt").pixel_values
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    given = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    if kind == "siglip":
        del given["attention_mask"]  # as its documentation calls it
    both = model(pixel_values=pixels, **given)
    torch.testing.assert_close(whole(teacher, image), unit(both.image_embeds), rtol=0, atol=1e-4)
    found = unit(teacher.encode_text(teacher.tokenize(TEXTS)))
    torch.testing.assert_close(found, unit(both.text_embeds), rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3
    cosines = unit(both.image_embeds) @ found.T
    expected = torch.sigmoid(both.logits_per_image) if kind == "siglip" else both.logits_per_image.softmax(1)
    torch.testing.assert_close(teacher.score.probabilities(cosines), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", [100, 371])
@torch.no_grad()
def test_crops_are_resized_as_by_the_models_own_preprocessing(side: int, folder: Callable[..., Path]) -> None:
    place = folder("open_clip", "vit")
    teacher = load_teacher({"name": "open_clip"}, str(place))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{place}")
    image = picture(side)
    expected = unit(model.eval().encode_image(preprocess(image)[None]))
    torch.testing.assert_close(whole(teacher, image), expected, rtol=0, atol=3e-3)  # of 8-bit rounding


@pytest.mark.parametrize("backend", ["open_clip", "transformers"])
@torch.no_grad()
def test_dense_embeddings_of_a_clip_are_this_packages(
    backend: str, tmp_path: Path, make_clip: Callable[..., CLIP]
) -> None:
    from clip_base.jobs.cli import main

    clip = make_clip(kind="vit")
    save_clip(clip, tmp_path / "clip.safetensors")
    form = "open_clip" if backend == "open_clip" else "huggingface"
    place = tmp_path / form
    assert main(["convert", str(tmp_path / "clip.safetensors"), f"to={form}", f"out={place}"]) == 0
    if backend == "transformers" and not (place / "tokenizer_config.json").exists():
        words_tokenizer(place)
    teacher = load_teacher({"name": backend}, str(place))
    images = batch_of(picture(64))
    regions = Regions(torch.tensor([[0.0, 0, 64, 64], [5, 7, 30, 60]]), torch.zeros(2, dtype=torch.int64))
    found = teacher.region_embedder(RegionView("dense"))(images, regions)
    expected = RegionEncoder(clip.visual, "dense")(images, regions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    crops = teacher.region_embedder(RegionView("crop", 1.0))(images, regions)
    assert (found - crops).abs().max() > 1e-3


@pytest.mark.parametrize(("backend", "kind"), [("open_clip", "siglip"), ("transformers", "siglip")])
@torch.no_grad()
def test_a_patch_of_a_siglip_is_pooled_as_if_it_were_alone(
    backend: str, kind: str, folder: Callable[..., Path]
) -> None:
    teacher = load_teacher({"name": backend}, str(folder(backend, kind)))
    side = teacher.resolution
    pixels = torch.randn(2, 3, side, side)
    found = teacher.encode_patches(pixels)
    cells = side // teacher.stride
    assert list(found.shape) == [2, teacher.encode_image(pixels).shape[1], cells, cells]
    model: Any = teacher.model
    if backend == "open_clip":
        trunk = model.visual.trunk
        token = trunk.forward_features(pixels)[1:, trunk.num_prefix_tokens + cells + 2]  # row 1, column 2
        expected = model.visual.head(trunk.attn_pool(token[:, None]))
    else:
        token = model.vision_model(pixel_values=pixels).last_hidden_state[1:, cells + 2]
        expected = model.vision_model.head(token[:, None])
    torch.testing.assert_close(found[1, :, 1, 2], expected[0], rtol=1e-4, atol=1e-5)


def test_a_boxs_patches_are_those_under_it(folder: Callable[..., Path]) -> None:
    teacher = load_teacher({"name": "open_clip"}, str(folder("open_clip", "vit")))
    cells = torch.eye(9).reshape(1, 9, 3, 3)  # each patch has a direction of its own
    teacher.encode_patches = lambda pixels: cells.expand(len(pixels), -1, -1, -1)  # type: ignore[method-assign]
    images = ImageBatch.pad([torch.zeros(3, 60, 120), torch.zeros(3, 90, 30)], 32)
    boxes = torch.tensor(
        [[42.0, 1, 78, 19], [21, 61, 29, 89]]
    )  # top middle of the wide, bottom right of the tall
    found = teacher.region_embedder(RegionView("dense"))(images, Regions(boxes, torch.tensor([0, 1])))
    assert found.argmax(1).tolist() == [1, 8]


def test_no_region_gives_no_embedding(folder: Callable[..., Path]) -> None:
    teacher = load_teacher({"name": "open_clip"}, str(folder("open_clip", "vit")))
    nothing = Regions(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    for mode in ("crop", "dense"):
        assert teacher.region_embedder(RegionView(mode))(batch_of(picture(64)), nothing).shape == (0, 24)


def test_sigmoid_decisions_of_a_region_are_a_share_of_one() -> None:
    score = Score(10.0, -5.0)
    cosines = torch.tensor([[0.2, 0.1], [0.9, 0.9]])
    found = score.probabilities(cosines)
    torch.testing.assert_close(found[0], torch.sigmoid(torch.tensor([-3.0, -4.0])))
    torch.testing.assert_close(found[1], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(Score(10.0).probabilities(cosines).sum(1), torch.ones(2))


def test_what_a_teacher_cannot_do_is_told(folder: Callable[..., Path], tmp_path: Path) -> None:
    plain = load_teacher({"name": "open_clip"}, str(folder("open_clip", "convnext")))
    faults = [
        (lambda: plain.region_embedder(RegionView("dense")), "patch embeddings"),
        (lambda: plain.region_embedder(RegionView("roi_align")), "ResNet of this package"),
        (lambda: plain.region_embedder(RegionView("crop", scale=0.5)), "teacher_scale"),
        (lambda: load_teacher({"name": "open_clip"}, "ViT-B-16-SigLIP2/nothing"), "MODEL/TAG"),
        (lambda: load_teacher({"name": "open_clip"}, str(tmp_path)), "open_clip_config.json"),
        (lambda: load_teacher({"name": "transformers"}, str(tmp_path)), "cannot read"),
        (lambda: load_teacher({"name": "open_cilp"}, "x"), "did you mean 'open_clip'"),
    ]
    for call, words in faults:
        with pytest.raises(InputError, match=words):
            call()
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"backend\.model="):
        load_teacher({"name": "open_clip"}, str(file))
    with pytest.raises(InputError, match="give the folder"):
        load_teacher({"name": "transformers"}, str(file))


def test_texts_that_are_too_long_are_refused_or_cut(folder: Callable[..., Path]) -> None:
    long = "cat " * 40
    for backend, kind in (("open_clip", "vit"), ("open_clip", "siglip"), ("transformers", "clip")):
        teacher = load_teacher({"name": backend}, str(folder(backend, kind)))
        assert teacher.tokenize([long], truncate=True).shape == (1, 16)
        assert teacher.tokenize(["a cat"]).shape == (1, 16)
        with pytest.raises(ValueError, match="the text tower reads 16"):
            teacher.tokenize([long])
