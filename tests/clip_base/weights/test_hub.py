"""Weights by hub name come through huggingface_hub from a server that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.export.convert import ConvertConfig, convert
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.weights.fetching import hub
from clip_base.weights.load import find, load_clip
from clip_base.weights.native import save_clip

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # the server's only one


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP's file in our form."""
    torch.manual_seed(0)
    vision = VisionConfig(kind="resnet", layers=[1, 2, 1, 1], width=8, resolution=64)
    text = TextConfig(width=64, heads=1, layers=1, context_length=12, vocab_size=600)
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    save_clip(CLIP(CLIPConfig(32, vision, text)).eval(), path)
    return path


@pytest.fixture(scope="module")
def repositories(clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of one CLIP in our form, in open_clip's beside another model, and of several files."""
    root = tmp_path_factory.mktemp("hub")
    (root / "me" / "ours").mkdir(parents=True)
    shutil.copy(clip_file, root / "me" / "ours" / "model.safetensors")
    convert(ConvertConfig(file=str(clip_file), to="open_clip", out=str(root / "me" / "theirs")))
    (root / "me" / "theirs" / "model.safetensors").write_bytes(b"an image tower")
    (root / "me" / "theirs" / "config.json").write_text('{"architecture": "resnet"}')
    (root / "me" / "many").mkdir()
    for name in ("a.pt", "b.pt"):
        (root / "me" / "many" / name).write_bytes(b"?")
    return root


@pytest.fixture
def server(
    repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_server: Callable[..., Any]
) -> Iterator[list[str]]:
    """Yields what was asked of the server."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    with hub_server(repositories, {"me/gated"}) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield asked


def same(one: CLIP, other: CLIP) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "address",
    [
        "hf://me/ours",
        "hf://me/ours@main",
        f"hf://me/ours@{COMMIT}",
        "hf://me/ours/model.safetensors",
        "hf://me/ours@main/model.safetensors",
        "hf://me/theirs",
    ],
)
def test_a_clip_is_loaded_by_its_address(address: str, clip_file: Path, server: list[str]) -> None:
    assert same(load_clip(address), load_clip(clip_file))


def test_a_pair_of_open_clips_is_an_address(
    clip_file: Path, server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = hub.open_clip_table()
    assert table["ViT-B-32/laion2b_s34b_b79k"] == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    monkeypatch.setattr(hub, "open_clip_table", lambda: {"RN50/mine": "me/theirs"})
    assert same(load_clip("RN50/mine"), load_clip(clip_file))
    with pytest.raises(InputError, match="open_clip has no RN50 pretrained as 'mime'; did you mean 'mine'"):
        find("RN50/mime")


def test_the_second_time_nothing_but_the_head_is_asked_and_the_content_is_checked(server: list[str]) -> None:
    path = find("hf://me/ours")
    server.clear()
    assert find("hf://me/ours") == path
    assert not [line for line in server if line.startswith("GET /me/")]
    target = path.resolve()
    target.chmod(0o644)
    target.write_bytes(target.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="is not what was fetched first"):
        find("hf://me/ours")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me", "is not of the form hf://owner/name"),
        ("hf://me/../../etc/passwd", "is not of the form hf://owner/name"),
        ("hf://me/nothing", "no such repository"),
        ("hf://me/ours@v9", "no such revision"),
        ("hf://me/ours/none.pt", "no such file"),
        ("hf://me/gated", "access on request"),
        ("hf://me/many", r"which file of hf://me/many\? .* a\.pt, b\.pt"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(address: str, message: str, server: list[str]) -> None:
    with pytest.raises(InputError, match=message) as told:
        find(address)
    assert "\n" not in str(told.value)


def test_without_a_network_the_copy_serves_and_what_is_missing_is_said(
    server: list[str], tmp_path: Path
) -> None:
    path = find("hf://me/ours")
    lines = "from clip_base.weights.load import find\nimport sys\nprint(find(sys.argv[1]))"
    offline = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }

    def run(address: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", lines, address]
        return subprocess.run(command, env=offline, capture_output=True, text=True, check=False)

    done = run("hf://me/ours")
    assert done.stdout.strip() == str(path), done.stderr
    assert "no copy is in its cache" in run("hf://me/theirs").stderr


def test_the_record_of_hashes_names_the_commit(server: list[str], tmp_path: Path) -> None:
    find("hf://me/ours")
    record = json.loads((tmp_path / "cache" / "sha256.json").read_text())
    assert list(record) == [f"me/ours@{COMMIT}/model.safetensors"]
