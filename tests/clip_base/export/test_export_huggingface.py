"""A CLIP pretrained here is a CLIP of transformers: model, image processor and tokenizer, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_base.jobs.cli import main
from clip_base.models.tokenizer import tokenize
from clip_base.storage.files import write_text
from clip_base.weights.load import load

CAPTIONS = ["a photo of a small cat, don't!", "Zwei schöne Häuser 1907 & 猫"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT's weights after two steps of pretraining, and the folder made of them."""
    base = tmp_path_factory.mktemp("pretrained")
    for number in range(4):
        Image.new("RGB", (50, 40), (60 * number, 20, 90)).save(base / f"{number}.png")
    rows = [f"{number}.png,image number {number}" for number in range(4)]
    write_text(base / "pairs.csv", "\n".join(["image,caption", *rows]))
    tower = ["kind=vit", "layers=[1]", "width=64", "patch=16", "resolution=32"]
    options = [f"tower.vision.{option}" for option in tower]
    options += [
        "model=",
        "tower.embed_dim=32",
        "tower.text.width=64",
        "tower.text.heads=1",
        "tower.text.layers=1",
    ]
    options += ["source.name=csv", f"source.file={base / 'pairs.csv'}", f"source.images={base}"]
    options += ["train.steps=2", "train.batch_size=2", "train.warmup_steps=0", "train.precision=fp32"]
    assert main(["pretrain", *options, f"out={base / 'run'}"]) == 0
    weights = base / "run" / "model.safetensors"
    assert main(["convert", str(weights), "to=huggingface", f"out={base / 'hf'}"]) == 0
    return weights, base / "hf"


@pytest.mark.slow
def test_transformers_gives_a_photograph_and_captions_our_embeddings(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers: Any = pytest.importorskip("transformers")
    weights, folder = folders
    model, preprocess = load(weights, device="cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (5, 7, 3), generator=generator, dtype=torch.uint8).numpy()
    photo = Image.fromarray(noise).resize((70, 45), Image.Resampling.BICUBIC)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTIONS, images=photo, return_tensors="pt", padding=True)
    assert type(transformers.AutoProcessor.from_pretrained(folder)) is type(processor)
    with torch.no_grad():
        images = F.normalize(model.encode_image(preprocess(photo)[None]), dim=-1)
        texts = F.normalize(model.encode_text(tokenize(CAPTIONS)), dim=-1)
        for kind in (transformers.CLIPModel, transformers.AutoModel):
            found = kind.from_pretrained(folder).eval()(**inputs)
            torch.testing.assert_close(found.text_embeds, texts, rtol=0, atol=1e-5)
            # A pixel may be a level of 255 off: the processor rounds after its own resizing.
            torch.testing.assert_close(found.image_embeds, images, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_the_tokenizers_ids_are_ours_with_and_without_its_fast_file(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((folders[1] / name).read_bytes())
    wanted = tokenize(CAPTIONS)
    for folder in (folders[1], tmp_path):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == 77
        for row, text in zip(wanted, CAPTIONS, strict=True):
            assert tokenizer(text)["input_ids"] == row[row > 0].tolist()
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).split() != []
