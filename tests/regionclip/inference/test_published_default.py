"""Without `weights=`, `detect` fetches the published detector; the servers here stand for the real ones."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clip_base.images.samples import located
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.storage import remote
from clip_base.storage.hashing import file_hash
from clip_base.weights.fetching import download
from clip_base.weights.fetching.published import Published
from clip_base.weights.native import save_clip
from regionclip.checkpoints import zoo
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork

Run = Callable[..., tuple[int, str]]
SMALL = ("use_checkpoint_config=false", "detector.max_proposals=20", "resize.short=[96]", "resize.long=128")
BOX = "roi_heads.box_predictor."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small detector with the published one's tensors, and a CLIP with OpenAI's."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    vision = VisionConfig(layers=[1, 1, 1, 1], width=8, resolution=64)
    clip = CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1))).eval()
    network = ProposalNetwork(
        ProposalNetworkConfig(
            backbone="resnet50",
            stride_in_1x1=True,
            pixels="caffe",
            frozen_stages=2,
            frozen_batch_norm=True,
            design="c4",
            strides=[16],
            anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0],
            ratios=[0.5, 1.0, 2.0],
            pre_nms=6000,
            merge_levels=False,
            min_size=0.0,
        )
    )
    visual = {f"backbone.{name}": value for name, value in clip.visual.state_dict().items()}
    state = {name: value for name, value in visual.items() if "num_batches" not in name}
    state |= {f"offline_{name}": value for name, value in to_detectron2(network).items()}
    state |= {f"{BOX}cls_score.weight": torch.randn(48, 32), f"{BOX}cls_bg_score.weight": torch.zeros(1, 32)}
    state |= {f"{BOX}test_cls_score.weight": torch.randn(65, 32)}
    state |= {f"{BOX}bbox_pred.weight": torch.zeros(4, 32), f"{BOX}bbox_pred.bias": torch.zeros(4)}
    torch.save({"model": state}, folder / f"{zoo.DETECTOR}.pth")
    save_clip(clip, folder / "RN50.pt")
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def cache(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; the CLIP is on a server, the detector in what stands for the shared folder."""
    handler = functools.partial(Handler, directory=str(files))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    clip, url = files / "RN50.pt", f"http://127.0.0.1:{server.server_port}/RN50.pt"
    published = {
        zoo.DETECTOR: zoo.FILES[zoo.DETECTOR],
        "RN50": Published(url, file_hash(clip), clip.stat().st_size),
    }
    monkeypatch.setattr(download, "files", lambda: published)
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    server.shutdown()
    server.server_close()


class Drive:
    """Stands for the package gdown: a folder with the detector."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def download_folder(self, **_: Any) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(id=file.name, path=f"x/regionclip/{file.name}") for file in self.folder.iterdir()
        ]

    def download(self, id: str, output: str, progress: Callable[[int, int | None], None], **_: Any) -> None:
        shutil.copy(self.folder / id, output)
        size = Path(output).stat().st_size
        progress(size // 2, size)
        progress(size, size)


def test_detect_takes_the_published_detector_and_its_text_tower(
    regionclip: Run, files: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gdown", Drive(files))
    call = ["detect", "sample:cat", "vocabulary=cat, garden gnome", f"out={tmp_path / 'found'}", *SMALL]
    code, told = regionclip(*call)
    assert code == 0, told
    large = (files / f"{zoo.DETECTOR}.pth").stat().st_size / 2**20
    assert f"downloading {zoo.DETECTOR} (of a size that Drive tells when it begins) and RN50 (" in told
    assert f"to {cache}, once" in told
    assert f"{zoo.DETECTOR}.pth: {large:,.0f} MiB" in told
    assert (tmp_path / "found" / "cat.jpg").exists()
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert {entry["file_name"] for entry in found} == {str(located("sample:cat"))}
    monkeypatch.setitem(sys.modules, "gdown", None)
    code, told = regionclip(*call)  # everything is here now
    assert (code, "downloading" in told) == (0, False)


def test_names_that_the_detector_brings_along_need_no_text_tower(
    regionclip: Run, files: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gdown", Drive(files))
    code, told = regionclip(
        "detect", "sample:cat", "vocabulary=cat, cup", f"out={tmp_path / 'found'}", *SMALL
    )
    assert code == 0, told
    assert "RN50 (" not in told
    assert not (cache / "RN50.pt").exists()


def test_offline_one_line_says_what_is_missing_and_what_to_do(
    regionclip: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    gone = {
        zoo.DETECTOR: zoo.FILES[zoo.DETECTOR],
        "RN50": Published("http://127.0.0.1:9/RN50.pt", "0" * 64, 5 << 20),
    }
    monkeypatch.setattr(download, "files", lambda: gone)
    code, told = regionclip("detect", "sample:cat", "vocabulary=gnome", f"out={tmp_path / 'found'}")
    assert code == 2
    notice, error = told.splitlines()
    assert "and RN50 (5 MiB)" in notice
    for part in ("give weights=FILE", f"put it at {cache / 'regionclip'}", f"put it at {cache / 'RN50.pt'}"):
        assert part in error
    assert not (tmp_path / "found" / "detections.json").exists()
