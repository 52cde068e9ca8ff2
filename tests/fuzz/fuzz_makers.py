"""Whole files of every kind, as jobs and other programs write them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from clip_base.data.loader import Loader
from clip_base.export.convert import write_huggingface, write_open_clip
from clip_base.images.video import writing_video
from clip_base.jobs.resume_log import ResumeLog
from clip_base.jobs.run import RunFolder
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.search.index import Index
from clip_base.storage.files import write_json
from clip_base.storage.hashing import content_hash
from clip_base.training.loop import TrainConfig, fit
from clip_base.weights.native import save_clip
from regionclip.checkpoints.load import save_detector
from regionclip.concepts.phrase_cache import PhraseStore
from regionclip.concepts.phrases import Phrase
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining.shards import VERSION, MinedImage, MinedRegion, shard_path, write_rows
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import save_network
from regionclip.proposals.storage import writing

NAMES = ("red cup", "dog", "café", "tree")


def photo(side: int = 24) -> Image.Image:
    noise = np.random.default_rng(side).integers(0, 255, (side, side + 8, 3), np.uint8)
    return Image.fromarray(cv2.blur(noise, (3, 3)))


def coco(folder: Path) -> None:
    """Four images with boxes and captions."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, boxes = [], []
    for number in range(1, 5):
        photo().save(folder / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 24, "width": 32})
        boxes.append(
            {
                **{
                    "id": number,
                    "image_id": number,
                    "category_id": 1 + number % 2,
                    "bbox": [2.0, 3.0, 10.5, 9.0],
                },
                **{"area": 94.5, "iscrowd": 0, "caption": f"a red cup and a dog {number}"},
                "segmentation": [[2, 3, 12, 3, 12, 12]],
            }
        )
    categories = [{"id": 1, "name": "cup", "frequency": "f"}, {"id": 2, "name": "dog", "frequency": "r"}]
    write_json(folder / "a.json", {"images": images, "annotations": boxes, "categories": categories})


def detections(folder: Path) -> None:
    results = []
    for number in range(1, 5):
        box = {"image_id": number, "category_id": 1, "bbox": [2, 3, 10, 9], "score": 0.5}
        results.append({**box, "file_name": f"{number}.jpg", "category_name": "cup"})
    results[0]["segmentation"] = {"size": [24, 32], "counts": [100, 5, 663]}
    del results[0]["bbox"]
    write_json(folder / "r.json", results)


def proposals(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with writing(folder / f"p.{suffix}") as writer:
            for number in range(1, 5):
                boxes = torch.tensor([[2.0, 3.0, 12.5, 12.0], [0.0, 0.0, 20.0, 20.0]])
                writer.add(number, boxes, torch.tensor([0.9, 0.25]))

    return make


def vocabulary(folder: Path) -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    made = {"templates": '["a {}"]', "weights": "0" * 64}
    Vocabulary(NAMES, embeddings, torch.tensor([True, False, False, True]), made).save(
        folder / "v.safetensors"
    )
    np.save(folder / "v.npy", embeddings.numpy())
    torch.save(embeddings, folder / "v.pth")


def mined(folder: Path) -> None:
    """A folder as `mine` leaves it."""
    coco(folder)
    vocabulary(folder)
    regions = [
        MinedRegion(
            n, f"{n}.jpg", 24, 32, (1, 2, 20, 18), 0.5, [0, 2], [0.75, 0.125], "red cup", "red cup", "a cup"
        )
        for n in (1, 1, 2, 3)
    ]
    skipped = [{"image_id": 4, "file_name": "4.jpg", "reason": "no phrase", "unreadable": False}]
    images = [
        MinedImage(n, f"{n}.jpg", 1 + (n == 1), ("a cup",), str(n), height=24, width=32) for n in (1, 2, 3)
    ]
    images.append(MinedImage(4, "4.jpg", reason="no phrase"))
    write_rows(shard_path(folder / "mined", 0), regions, images)
    (folder / "v.safetensors").rename(folder / "mined" / "vocabulary.safetensors")
    (folder / "mined" / "skipped.jsonl").write_text(json.dumps(skipped[0]) + "\n")
    concepts = [{"concept": name, "count": 3, "examples": ["a"], "kind": "phrase"} for name in NAMES]
    (folder / "pool.jsonl").write_text("".join(json.dumps(one) + "\n" for one in concepts))
    save_clip(tiny_clip("resnet"), folder / "w.safetensors")
    config = {
        **{"captions": str(folder / "a.json"), "concepts": str(folder / "pool.jsonl"), "language": ""},
        **{
            "weights": str(folder / "w.safetensors"),
            "teacher": "roi_align",
            "context": 0.0,
            "teacher_scale": 1.0,
        },
        "temperature": 0.0,
    }
    manifest = {
        **{
            "version": VERSION,
            "shards": ["shard-00000.parquet"],
            "images": 4,
            "skipped": 1,
            "regions": 4,
            "samples": [3],
            "max_concepts": 2,
        },
        **{
            "images_folder": str(folder / "images"),
            "tars": {},
            "teacher": content_hash(folder / "w.safetensors"),
        },
        **{"matcher": {"name": "pool", "top_k": 2}, "proposer": {"name": "grid"}, "config": config},
        "synonyms": {"red cup": ["mug"]},
    }
    write_json(folder / "mined" / "manifest.json", manifest)


def tiny_clip(kind: str = "vit") -> CLIP:
    torch.manual_seed(0)
    resnet = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
    vit = VisionConfig(kind="vit", layers=[1], width=32, head_width=16, patch=16, resolution=32)
    text = TextConfig(width=32, heads=1, layers=1, context_length=24)
    return CLIP(CLIPConfig(32, vit if kind == "vit" else resnet, text)).eval()


def torchscript(folder: Path) -> None:
    """An archive with a module, made by `torch.jit.save` as OpenAI's are."""
    module = torch.jit.trace(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.zeros(1, 3))
    torch.jit.save(module, folder / "w.pt")


def network(folder: Path) -> None:
    vision = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
    save_network(
        ProposalNetwork(ProposalNetworkConfig(vision=vision, channels=16)).eval(), folder / "w.safetensors"
    )


def detector(folder: Path) -> None:
    vision = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
    rpn = ProposalNetwork(ProposalNetworkConfig(vision=vision, channels=16))
    made = Detector.untrained(tiny_clip("resnet"), DetectorConfig(max_proposals=20), rpn).eval()
    save_detector(made, folder / "w.safetensors", ["cup"])


def as_image(form: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        image = photo().convert(options.pop("mode", "RGB"))
        more = [photo(24).convert(image.mode)] if form in ("GIF", "TIFF", "WEBP") else []
        extra = {"save_all": True, "append_images": more} if more else {}
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(
            folder / "a.img", form, **extra, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {})
        )

    return make


def video(folder: Path) -> None:
    with writing_video(folder / "a.mp4", 5.0) as writer:
        for _ in range(6):
            writer.add(photo(64).resize((64, 64)))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.net(batch.x).square().mean()}


class Numbers:
    x = torch.ones(2, 2)

    def __len__(self) -> int:
        return 4

    def item(self, index: int, generator: torch.Generator) -> int:
        return index

    def collate(self, items: list[int]) -> Any:
        return self

    def to(self, device: torch.device) -> Any:
        return self


def train(folder: Path) -> None:
    """Trains to the end, or goes on from what is there."""
    torch.manual_seed(0)
    config = TrainConfig(steps=2, batch_size=2, lr=0.1, warmup_steps=1, save_every=1, ema=0.5)
    run = RunFolder(str(folder / "run"), config, "toy", {"data": "x"})
    run.finished()
    loader = Loader(Numbers(), Numbers().collate, config.batch_size, skipped=run.path / "skipped.jsonl")
    fit(Linear(), loader, config, run)
    run.finish({"steps": 2})


def skipped_before(folder: Path) -> None:
    train(folder)
    (folder / "run" / "skipped.jsonl").write_text(
        '{"sample": 1, "reason": "x"}\n{"sample": 3, "reason": "y"}\n'
    )


def journal(folder: Path) -> None:
    with ResumeLog(folder / "log.jsonl", {"a": 1}) as log:
        for number in range(4):
            log.add("found", {"image": f"{number}.jpg", "boxes": [[1, 2, 3, 4.5]]})
            log.end(1)


def phrases(folder: Path) -> None:
    store = PhraseStore(folder / "a.phrases.db", "parser", "hash")
    store.add({f"a red cup {n}": [Phrase("red cup", "cup", 2, 9)] for n in range(40)})
    store.close()


def index(folder: Path) -> None:
    coco(folder)
    made = Index(32, "w.safetensors", "0" * 64)
    made.add([str(folder / "images" / f"{n}.jpg") for n in range(1, 5)], torch.randn(4, 32))
    made.save(folder / "my.index")
    next((folder / "my.index").glob("shard-*")).rename(folder / "my.index" / "shard-000000.safetensors")


def tars(folder: Path) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("cup\ndog\n")
    encoded = io.BytesIO()
    photo().save(encoded, "JPEG")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(4):
            texts = {"jpg": encoded.getvalue(), "txt": "a cup\na mug é".encode(), "cls": b"1"}
            for suffix, data in {**texts, "json": b'{"key": ["u", "v"]}'}.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def boxes_xml(folder: Path) -> None:
    coco(folder)
    (folder / "Annotations").mkdir()
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>12</ymax></bndbox>"
    for n in range(1, 5):
        (folder / "Annotations" / f"{n}.xml").write_text(
            f"<annotation><filename>{n}.jpg</filename><size><width>32</width><height>24</height><depth>3</depth>"
            f"</size><object><name>cup</name><difficult>1</difficult>{box}</object></annotation>"
        )


def cvat(folder: Path) -> None:
    coco(folder)
    images = "".join(
        f'<image id="{n}" name="{n}.jpg" width="32" height="24">'
        f'<box label="cup" xtl="1" ytl="2" xbr="9" ybr="8" rotation="30"/>'
        '<polygon label="dog" points="1,2;3,4;5,1"/></image>'
        for n in range(1, 5)
    )
    (folder / "a.xml").write_text(
        f"<?xml version='1.0'?><annotations><version>1.1</version>{images}</annotations>"
    )


def yolo(folder: Path) -> None:
    coco(folder)
    (folder / "images").rename(folder / "kept")
    for name in ("images", "labels"):
        (folder / name / "val").mkdir(parents=True)
    for n in range(1, 5):
        shutil.copy(folder / "kept" / f"{n}.jpg", folder / "images" / "val")
        (folder / "labels" / "val" / f"{n}.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (folder / "data.yaml").write_text("path: .\nval: images/val\nnames: [cup, dog]\nnc: 2\n")


def label_studio(folder: Path) -> None:
    coco(folder)
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["cup"]}
    found = {"type": "rectanglelabels", "original_width": 32, "original_height": 24, "value": value}
    write_json(
        folder / "a.json",
        [{"data": {"image": f"/data/{n}.jpg"}, "annotations": [{"result": [found]}]} for n in range(1, 5)],
    )


def texts(name: str, content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        coco(folder)
        (folder / name).write_text(content, encoding="utf-8")

    return make


def parquet(images: list[Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        coco(folder)
        rows = {"image": images * 8, "caption": [["x é"], ["y", "z"]] * 8, "status": ["success"] * 16}
        pq.write_table(pa.table(rows), folder / "a.parquet")

    return make


def hugging_face(folder: Path) -> None:
    write_huggingface(tiny_clip(), folder / "hf")


def open_clip(folder: Path) -> None:
    write_open_clip(tiny_clip(), folder / "oc.safetensors")
    (folder / "hub").mkdir()
    tower = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
    write_json(
        folder / "hub" / "open_clip_config.json",
        {"model_cfg": {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}},
    )
    shutil.move(folder / "oc.safetensors", folder / "hub" / "open_clip_model.safetensors")


def pickles(folder: Path) -> None:
    state = {f"visual.{n}": torch.randn(3, 4).to(torch.float16) for n in range(6)}
    torch.save({"state_dict": state, "epoch": 3, "nested": {"a": [1, (2.5, "x")]}}, folder / "w.pt")
    torch.save(tiny_clip().state_dict(), folder / "clip.pt")


def arrays(folder: Path) -> None:
    held = {"model": {f"backbone.{n}": np.ones((3, 2), np.float32) for n in range(6)}, "__author__": "x"}
    (folder / "w.pkl").write_bytes(pickle.dumps(held))
