"""Proposal networks in files: what is written is read, what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from regionclip.proposals.rpn.config import ProposalNetworkConfig, ProposalNetworkOptions
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import (
    RPNConfig,
    RPNProposer,
    build_network,
    load_network,
    save_network,
)
from regionclip.structures.regions import ImageInfo, RegionBatch

Small = Callable[..., ProposalNetworkConfig]
Rectangles = Callable[[int, int], RegionBatch]
TinyClip = Callable[[Path], Path]


def test_a_saved_network_proposes_the_same(tmp_path: Path, small: Small, rectangles: Rectangles) -> None:
    torch.manual_seed(0)
    network = ProposalNetwork(small()).eval()
    save_network(network, tmp_path / "rpn.safetensors")
    images = rectangles(2, 5).images
    proposer = RPNProposer(RPNConfig(str(tmp_path / "rpn.safetensors"), limit=40))
    found = proposer(images, [ImageInfo(1, 200, 200), ImageInfo(2, 200, 200)])
    assert torch.equal(found.boxes, network.propose(images, 40).boxes)


def test_files_that_are_no_whole_network_say_so(tmp_path: Path, small: Small, tiny_clip: TinyClip) -> None:
    path = tmp_path / "rpn.safetensors"
    save_network(ProposalNetwork(small()), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"rpn\.safetensors cannot be read .* truncated"):
        load_network(path)
    with pytest.raises(InputError, match="does not exist"):
        load_network(tmp_path / "absent.safetensors")
    clip = tiny_clip(tmp_path)
    with pytest.raises(InputError, match=r"clip_base\.clip.*expected 'regionclip\.proposals"):
        load_network(clip)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path, small: Small) -> None:
    from clip_base.weights.native import read_weights, write_weights

    path = tmp_path / "rpn.safetensors"
    save_network(ProposalNetwork(small()), path)
    weights, metadata = read_weights(path)
    weights["surplus"] = weights.pop("rpn.head.cls_logits.bias")
    weights["backbone.conv1.weight"] = torch.zeros(2, 2)
    write_weights(path, weights, metadata)
    with pytest.raises(InputError) as caught:
        load_network(path)
    message = str(caught.value)
    assert "1 missing: rpn.head.cls_logits.bias" in message
    assert "1 left over: surplus" in message
    assert "1 misshapen: backbone.conv1.weight" in message


def test_the_backbone_starts_from_clip(tmp_path: Path, small: Small, tiny_clip: TinyClip) -> None:
    path = tiny_clip(tmp_path)
    options = ProposalNetworkOptions(backbone_weights=str(path), channels=32)
    network, tower = build_network(options), load_clip(path).visual
    assert torch.equal(network.trunk.layer3[0].conv2.weight, tower.layer3[0].conv2.weight)
    assert network.config.vision == load_clip(path).config.vision


def test_the_backbone_starts_from_a_local_resnet50(tmp_path: Path, small: Small) -> None:
    from torchvision.models import resnet50

    path, model = tmp_path / "resnet50.pth", resnet50(weights=None)
    torch.save(model.state_dict(), path)
    options = {"backbone": "resnet50", "design": "c4", "strides": [16]}
    network = build_network(small(backbone_weights=str(path), **options))
    torch.testing.assert_close(network.backbone.conv1.weight, model.conv1.weight)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"resnet50\.pth cannot be read"):
        build_network(small(backbone_weights=str(path), **options))
