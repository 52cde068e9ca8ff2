"""Weights go to the hub with a card made from config and metrics, and come back from there as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clip_base.jobs.cli import main
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip

pytest.importorskip("huggingface_hub")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a training leaves it."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"large")
    torch.manual_seed(0)
    vision = VisionConfig(kind="resnet", layers=[1, 1, 1, 1], width=8, resolution=64)
    save_clip(
        CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1))), folder / "model.safetensors"
    )
    (folder / "config.yaml").write_text("# pretrain\nsource:\n  images: /home/me/secret/photos\ncrop: 0.9\n")
    (folder / "metrics.json").write_text('{"steps": 1500, "loss": 1.23456789, "name": "x"}')
    (folder / "log.jsonl").write_text("{}\n")
    (folder / ".lock").write_text("")
    return folder


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_server: Callable[..., Any]
) -> Iterator[tuple[Path, list[str], set[str]]]:
    """Yields the server's folder, what it was asked, and its private repositories."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage has a protocol of its own
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "writes")
    root, private = tmp_path / "hub", set[str]()
    root.mkdir()
    with hub_server(root, private) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield root, asked, private


def same(one: CLIP, other: CLIP) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_what_was_pushed_is_what_is_loaded(
    run: Path, hub: tuple[Path, list[str], set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, asked, private = hub
    figures = tmp_path / "evaluation" / "metrics.json"
    figures.parent.mkdir()
    figures.write_text(json.dumps({"AP50": 0.4321098, "by_size": {"small": 0.25}}))
    call = ["push", str(run), "hf://me/clip", f"metrics={figures}", "license=apache-2.0"]
    assert main(call) == 0, capsys.readouterr().err
    assert "/commit/" in capsys.readouterr().out
    assert not private
    assert sorted(path.name for path in (root / "me" / "clip").iterdir()) == [
        "README.md",
        "metrics.json",
        "model.safetensors",
    ]
    assert same(load_clip("hf://me/clip"), load_clip(run / "model.safetensors"))
    card = (root / "me" / "clip" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "zero-shot-image-classification"
    for line in (
        'clip_base.load("hf://me/clip")',
        "| loss | 1.2346 |",
        "| AP50 | 0.43211 |",
        "| by_size.small |",
    ):
        assert line in card
    assert "images: photos" in card
    assert "secret" not in card  # folders of the machine stay there
    asked.clear()
    assert main(call) == 0  # once more, into the repository that exists now
    assert any(line.startswith("POST /api/models/me/clip/commit/") for line in asked)


def test_a_new_repository_can_be_private(run: Path, hub: tuple[Path, list[str], set[str]]) -> None:
    assert main(["push", str(run), "hf://me/mine", "private=true"]) == 0
    assert hub[2] == {"me/mine"}


def test_a_card_of_ones_own_is_taken(run: Path, hub: tuple[Path, list[str], set[str]]) -> None:
    (run / "README.md").write_text("---\ntags: [mine]\n---\nMine.\n")
    assert main(["push", str(run), "hf://me/clip"]) == 0
    assert (hub[0] / "me" / "clip" / "README.md").read_text() == (run / "README.md").read_text()


def test_a_dry_run_shows_files_and_card_and_asks_nobody(
    run: Path, hub: tuple[Path, list[str], set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "hf://me/clip", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors: " in shown
    assert "# clip\n" in shown
    assert hub[1] == []


@pytest.mark.parametrize(
    ("folder", "to", "token", "message"),
    [
        ("run", "me/clip", "writes", "to=me/clip must be hf://owner/name"),
        ("run", "hf://me/clip/file.pt", "writes", "must be hf://owner/name"),
        ("run/checkpoints", "hf://me/clip", "writes", "is damaged and is not uploaded"),
        ("evaluation", "hf://me/clip", "writes", "holds no weights"),
        ("run", "hf://me/clip", "", "without a token: run `hf auth login`"),
        ("run", "hf://me/clip", "wrong", "the hub does not know the token"),
        ("run", "hf://me/clip", "reads", "the token may not write there"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    folder: str,
    to: str,
    token: str,
    message: str,
    run: Path,
    hub: tuple[Path, list[str], set[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    (run.parent / "evaluation").mkdir()
    (run.parent / "evaluation" / "metrics.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run.parent / "no_token"))
    assert main(["push", str(run.parent / folder), to]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (hub[0] / "me").exists()
