"""A folder laid out as the pages say, in miniature: drawn images, tiny published files, official data."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from clip_base.models.clip import CLIP, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.storage.files import read_json, write_json, write_text
from clip_base.synthetic.scenes import ScenesConfig, generate
from clip_base.weights.fetching import download
from clip_base.weights.native import save_clip
from regionclip.checkpoints.load import save_detector
from regionclip.data.categories import parse_names
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.transforms import ResizeConfig

ROOT = Path(__file__).parents[2]
SIDE = 64
RESNET = VisionConfig(layers=[1, 1, 1, 1], width=8, resolution=SIDE)
VIT = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=SIDE)
TEXT = TextConfig(width=64, heads=1, layers=1, context_length=77)
FILES = {"RN50": RESNET, "RN50x4": RESNET, "ViT-B/32": VIT}
BLOCKS = (1, 1, 1, 1)  # of what stands for ResNet-50
# As RegionCLIP's rpn_coco_48.
C4 = ProposalNetworkConfig(
    backbone="resnet50",
    stride_in_1x1=True,
    pixels="caffe",
    design="c4",
    strides=[16],
    anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0],
    merge_levels=False,
)
NAMES = "dog, puppy\nred umbrella, red parasol  # looked for by its first name\n"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which all commands of the pages are typed; it is the current one meanwhile, and the small
    models that it puts in the place of published ones are known meanwhile alone."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CLIP_BASE_CACHE", str(folder / "cache"))
        for name in ("configs", "tools", "tests", "benchmarks", "docs", "Makefile", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        _own_data(folder)
        for name, vision in FILES.items():
            patch.setitem(download.FILES, name, _publish(name, vision, folder))
        patch.setattr("regionclip.proposals.rpn.backbone.resnet50", _resnet50)
        patch.setattr("regionclip.proposals.rpn.detectron2_names.BLOCKS", BLOCKS)
        torch.save(_resnet50().state_dict(), folder / "resnet50.pth")
        _publish_regionclip(folder / "cache")
        _quickstart(folder)
        _official(folder)
        yield folder


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights."""
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    save_clip(_clip(RESNET), path)
    return path


def _own_data(folder: Path) -> None:
    """Writes what docs/your_own_data.md and docs/clip.md say that one has."""
    world = folder / "world"
    generate(
        ScenesConfig(out=str(world), images=24, val_images=8, size=SIDE, object_min=0.3, workers=1, seed=5)
    )
    (folder / "images").symlink_to(world / "images")
    for ours, theirs in (("", "_train"), ("_val", "_val")):
        for kind in ("captions", "instances"):
            shutil.copy(world / f"{kind}{theirs}.json", folder / f"{kind}{ours}.json")
    shutil.copy(world / "split.json", folder / "split.json")
    write_text(folder / "names.txt", NAMES)
    content = read_json(folder / "captions.json")
    pictures = [entry["file_name"] for entry in content["images"]]
    shutil.copy(world / "images" / pictures[0], folder / "photo.jpg")
    _video(folder / "clip.mp4", folder / "photo.jpg")
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        table.writerows(
            [pictures[entry["image_id"] - 1], entry["caption"]] for entry in content["annotations"]
        )
    for part, count in (("train", 17), ("test", 3)):
        for number, name in enumerate(("cat", "dog")):
            place = folder / "photos" / part / name
            place.mkdir(parents=True)
            for index in range(count):
                source = world / "images" / pictures[(2 * index + number) % len(pictures)]
                shutil.copy(source, place / f"{index}.jpg")


def _video(path: Path, picture: Path) -> None:
    """Writes six frames of one image."""
    pixels = cv2.imread(str(picture))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, (SIDE, SIDE))
    for _ in range(6):
        writer.write(pixels)
    writer.release()


def _clip(vision: VisionConfig) -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, vision, TEXT)).eval()


def _publish(name: str, vision: VisionConfig, folder: Path) -> download.Published:
    """Writes a tiny file in the place of one that OpenAI has published; returns what is known of it."""
    known = download.FILES[name]
    path = folder / "cache" / known.name
    path.parent.mkdir(exist_ok=True)
    state = to_openai_names(_clip(vision).state_dict())
    torch.save({key: value.clone() for key, value in state.items()}, path)
    shutil.copy(path, folder / known.name)
    content = path.read_bytes()
    return replace(
        known, url=f"nowhere/{known.name}", sha256=hashlib.sha256(content).hexdigest(), size=len(content)
    )


def _resnet50(weights: None = None) -> ResNet:
    """Makes a ResNet-50 with one block a stage: the same maps, a third of the weights."""
    torch.manual_seed(0)
    return ResNet(Bottleneck, list(BLOCKS))


def _publish_regionclip(cache: Path) -> None:
    """Writes RegionCLIP's published files, as far as the pages name them, in their form and tiny."""
    clip, network = _clip(RESNET), to_detectron2(ProposalNetwork(C4))
    image = {
        f"backbone.{name}": value for name, value in clip.visual.state_dict().items() if "num_b" not in name
    }
    text = {f"lang_encoder.{name}": value for name, value in clip.text.state_dict().items()}
    shapes = {
        "cls_score.weight": (48, 32),
        "test_cls_score.weight": (65, 32),
        "cls_bg_score.weight": (1, 32),
        "bbox_pred.weight": (4, 32),
        "bbox_pred.bias": (4,),
    }
    head = {f"roi_heads.box_predictor.{name}": torch.rand(shape) for name, shape in shapes.items()}
    offline = {f"offline_{name}": value for name, value in network.items()}
    _save({**image, **text}, cache / "regionclip_pretrained-cc_rn50.pth")
    _save({**image, **head, **offline}, cache / "regionclip_finetuned-coco_rn50.pth")
    _save(network, cache / "rpn_coco_48.pth")
    torch.save(torch.rand(65, 32), cache / "coco_65_cls_emb.pth")


def _save(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state}, path)


def _quickstart(folder: Path) -> None:
    """Writes what the README uses of the quickstart's folder."""
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "world").symlink_to(folder / "world")
    network = ProposalNetwork(ProposalNetworkConfig(vision=RESNET, channels=16))
    size = ResizeConfig(short=[SIDE], long=SIDE)
    detector = Detector.untrained(_clip(RESNET), DetectorConfig(max_proposals=16), network, resize=size)
    path = folder / "quickstart" / "detector-regionclip" / "model.safetensors"
    save_detector(detector, path, ["cup"])
    shutil.copy(path, folder / "detector.safetensors")  # what docs/detection.md and docs/serve.md look with


def _official(folder: Path) -> None:
    """Writes COCO and LVIS in their official form: the world's boxes, under names that the splits know."""
    coco, lvis = folder / "datasets" / "coco", folder / "datasets" / "lvis"
    (coco / "annotations").mkdir(parents=True)
    lvis.mkdir()
    names = parse_names("coco")
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    novel = set(parse_names("coco_novel"))
    for part in ("train", "val"):
        (coco / f"{part}2017").symlink_to(folder / "world" / "images" / part)
        for kind in ("captions", "instances"):
            content: dict[str, Any] = read_json(folder / "world" / f"{kind}_{part}.json")
            for entry in content["images"]:
                entry["file_name"] = Path(entry["file_name"]).name
            if kind == "instances":
                content["categories"] = categories
            write_json(coco / "annotations" / f"{kind}_{part}2017.json", content)
            if kind == "instances":
                write_json(lvis / f"lvis_v1_{part}.json", _as_lvis(content, part, novel))
    boxes = read_json(lvis / "lvis_v1_val.json")["annotations"]
    results = [
        {"score": 0.5, **{key: box[key] for key in ("image_id", "category_id", "bbox")}} for box in boxes
    ]
    write_text(folder / "results_lvis.json", json.dumps(results))


def _as_lvis(content: dict[str, Any], part: str, rare: set[str]) -> dict[str, Any]:
    """Returns annotations in LVIS's form: URLs for names, frequencies, what was looked for in each image."""
    images = []
    for entry in content["images"]:
        rest = {key: value for key, value in entry.items() if key != "file_name"}
        url = f"http://images.cocodataset.org/{part}2017/{entry['file_name']}"
        images.append({**rest, "coco_url": url, "neg_category_ids": [1], "not_exhaustive_category_ids": []})
    categories = [
        {**entry, "frequency": "r" if entry["name"] in rare else "f", "synonyms": [entry["name"]]}
        for entry in content["categories"]
    ]
    return {**content, "images": images, "categories": categories}
