"""Fixtures of the region tests: a small synthetic dataset and the tiny models that run on it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from clip_base.jobs.cli import main_regionclip
from clip_base.models.bottleneck import Bottleneck
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.storage.files import read_json, write_text
from clip_base.synthetic.scenes import ScenesConfig, generate
from clip_base.weights.native import save_clip
from regionclip.checkpoints.load import save_detector
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import save_network

RESNET = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
VIT = VisionConfig(kind="vit", layers=[2], width=32, head_width=16, patch=16, resolution=64)
TEXT = TextConfig(width=32, heads=1, layers=1, context_length=24)

MakeClip = Callable[..., CLIP]
Command = Callable[..., tuple[int, str]]


@functools.cache
def _clip(kind: str, seed: int, embed_dim: int) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(CLIPConfig(embed_dim, VIT if kind == "vit" else RESNET, TEXT))
    for module in model.modules():
        if isinstance(module, Bottleneck):  # as initialized every block is the identity, which tests little
            nn.init.uniform_(module.bn3.weight, 0.5, 1.0)
    if kind == "resnet":
        _spread(model)
    return model.eval()


def _make_clip(kind: str = "resnet", seed: int = 0, embed_dim: int = 32) -> CLIP:
    return copy.deepcopy(_clip(kind, seed, embed_dim))


@torch.no_grad()
def _spread(model: CLIP) -> None:
    """Gives the batch norms fitting statistics and takes out what all embeddings share.

    In towers as they are initialized, images differ by a thousandth of their embedding's length.
    """
    images = nn.functional.interpolate(torch.randn(16, 3, 8, 8) + torch.randn(16, 3, 1, 1), (64, 64))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    for _ in norms:  # each pass settles one more of them
        model.train().encode_image(images)
    for norm in norms:
        norm.momentum = 0.1
    shared = model.eval().encode_image(images).mean(0)
    model.visual.attnpool.c_proj.bias -= shared  # type: ignore[union-attr, operator]


class Page(HTMLParser):
    """Checks that tags are closed in order; notes addresses and second headings.

    Attributes:
        open: tags that were not closed.
        addresses: what a browser would load or go to.
        headings: texts of <h2>.
    """

    VOID = ("meta", "link", "img", "br", "line", "rect", "polyline", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = ("src", "href", "srcset", "action")
        self.addresses += [value or "" for name, value in attrs if name in named]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="session")
def parsed() -> Callable[[str], Page]:
    """Reads an HTML page's text; tags that are closed out of order fail the test."""
    return Page


@pytest.fixture(scope="session")
def swapped() -> Callable[..., list[str]]:
    """Replaces options: swapped(["out=a", "b=1"], out="c") is ["b=1", "out=c"]."""

    def swap(options: list[str], **changes: object) -> list[str]:
        kept = [option for option in options if option.partition("=")[0] not in changes]
        return kept + [f"{key}={value}" for key, value in changes.items()]

    return swap


@pytest.fixture(scope="session")
def make_clip() -> MakeClip:
    """Makes a tiny CLIP in evaluation mode: make_clip(kind="resnet", seed=0, embed_dim=32)."""
    return _make_clip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four validation scenes of 64 pixels; twelve base categories, four novel ones."""
    folder = tmp_path_factory.mktemp("scenes") / "world"
    generate(
        ScenesConfig(out=str(folder), images=12, val_images=4, size=64, object_min=0.3, workers=1, seed=5)
    )
    return folder


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ResNet CLIP as a file."""
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    save_clip(_make_clip(), path)
    return path


@pytest.fixture(scope="session")
def make_network() -> Callable[[], ProposalNetwork]:
    """Makes a tiny proposal network in evaluation mode whose proposals spread over the image."""

    def make() -> ProposalNetwork:
        torch.manual_seed(1)
        network = ProposalNetwork(ProposalNetworkConfig(vision=RESNET, channels=16))
        return network.eval()

    return make


@pytest.fixture(scope="session")
def rpn_file(tmp_path_factory: pytest.TempPathFactory, make_network: Callable[[], ProposalNetwork]) -> Path:
    """The tiny proposal network as a file."""
    path = tmp_path_factory.mktemp("rpn") / "model.safetensors"
    save_network(make_network(), path)
    return path


@pytest.fixture(scope="session")
def make_detector(make_network: Callable[[], ProposalNetwork]) -> Callable[..., Detector]:
    """Makes a tiny trained-like detector: make_detector(**options of DetectorConfig)."""

    def make(**options: object) -> Detector:
        settings = DetectorConfig(**{"max_proposals": 20, **options})  # type: ignore[arg-type]
        return Detector.untrained(_make_clip(), settings, make_network()).eval()

    return make


@pytest.fixture(scope="session")
def detector_file(tmp_path_factory: pytest.TempPathFactory, make_detector: Callable[..., Detector]) -> Path:
    """The tiny detector as a file."""
    path = tmp_path_factory.mktemp("detector") / "model.safetensors"
    save_detector(make_detector(), path, ["cup"])
    return path


@pytest.fixture(scope="session")
def concepts_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept pool of the world's category names."""
    path = tmp_path_factory.mktemp("pool") / "concepts.jsonl"
    names = [entry["name"] for entry in read_json(world / "instances_train.json")["categories"]]
    entries = [{"concept": name, "count": 3, "examples": [], "kind": "given"} for name in names]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def regionclip(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process: exit code and what stood on stderr, progress left out."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main_regionclip([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def mining_options(world: Path, clip_file: Path, concepts_file: Path) -> list[str]:
    """What mining the world needs, but for `out`: a grid of proposals and a matcher that keeps a lot."""
    return [
        f"images={world / 'images'}",
        f"captions={world / 'captions_train.json'}",
        f"weights={clip_file}",
        f"concepts={concepts_file}",
        "proposer.name=grid",
        "proposer.sizes=[0.5,1.0]",
        "matcher.name=caption",
        "matcher.min_probability=0.0",
        "resize.short=[64]",
        "resize.long=64",
        "batch_size=4",
        "shard_images=5",
        "precision=fp32",
    ]


@pytest.fixture(scope="session")
def mined(mining_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, mined."""
    folder = tmp_path_factory.mktemp("mining") / "mined"
    assert main_regionclip(["mine", *mining_options, f"out={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes of `world`, as three tars."""
    folder = tmp_path_factory.mktemp("tars") / "w"
    sizes = {"images": 12, "val_images": 4, "size": 64, "object_min": 0.3, "workers": 1, "seed": 5}
    generate(ScenesConfig(out=str(folder), format="webdataset", tar_images=5, **sizes))
    return folder
