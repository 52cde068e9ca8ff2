"""A head on a trunk that another owns: one pass, weights listed once, never on the wrong trunk."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from clip_base.jobs.cli import main_regionclip
from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights
from regionclip.proposals.rpn.backbone import trunk_hash
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import (
    RPNConfig,
    RPNProposer,
    build_network,
    clip_tower,
    load_network,
    save_network,
)
from regionclip.structures.regions import FeatureMaps, ImageInfo, RegionBatch
from regionclip.training.train_rpn import RPNTask

Small = Callable[..., ProposalNetworkConfig]
Rectangles = Callable[[int, int], RegionBatch]
TinyClip = Callable[[Path], Path]


@pytest.fixture(scope="module")
def clip(tiny_clip: TinyClip, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("clip")))


def shared(small: Small, clip: str, **options: object) -> ProposalNetwork:
    torch.manual_seed(0)
    return build_network(small(share_trunk=True, backbone_weights=clip, **options))


def test_a_shared_trunk_proposes_as_an_own_copy_of_it_does(
    small: Small, rectangles: Rectangles, clip: str
) -> None:
    network = shared(small, clip).eval()
    own = build_network(small(backbone_weights=clip)).eval()
    own.load_state_dict({**own.state_dict(), **network.state_dict()})
    images = rectangles(2, 3).images
    found, wanted = network.propose(images, 30), own.propose(images, 30)
    assert torch.equal(found.boxes, wanted.boxes)


def test_the_trunk_is_not_among_the_networks_weights(small: Small, clip: str) -> None:
    network = shared(small, clip)
    assert {name.split(".")[0] for name in network.state_dict()} == {"neck", "rpn"}
    network.train()
    assert not network.trunk.training
    both = nn.ModuleList([network.trunk, network])
    names = [name for name, _ in both.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for _, p in both.named_parameters(remove_duplicate=False)})
    twin = copy.deepcopy(both)
    assert twin[1].trunk is twin[0]


def test_maps_that_are_given_spare_the_trunk(
    small: Small, rectangles: Rectangles, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, batch = shared(small, clip).eval(), rectangles(2, 3)
    levels = [level.detach().requires_grad_() for level in network.stages(batch.images)]
    maps = FeatureMaps(batch.images, tuple(levels))
    wanted = network.propose(batch.images, 30)
    torch.manual_seed(0)
    losses = network.losses(batch)
    monkeypatch.setattr(network.trunk, "stages", lambda pixels: pytest.fail("the trunk was run again"))
    assert torch.equal(network.propose(maps, 30).boxes, wanted.boxes)
    torch.manual_seed(0)
    again = network.losses(batch, maps=maps)
    assert {name: loss.item() for name, loss in again.items()} == {
        n: loss.item() for n, loss in losses.items()
    }
    torch.stack(list(again.values())).sum().backward()
    assert all(level.grad is not None and bool(level.grad.any()) for level in levels[1:])


def test_a_network_with_a_trunk_of_its_own_does_not_look_at_anothers_maps(
    small: Small, rectangles: Rectangles
) -> None:
    network = ProposalNetwork(small()).eval()
    images = rectangles(1, 0).images
    maps = FeatureMaps(images, tuple(torch.zeros_like(level) for level in network.stages(images)))
    assert torch.equal(network.propose(maps, 5).boxes, network.propose(images, 5).boxes)


def test_too_few_maps_are_refused(small: Small, rectangles: Rectangles, clip: str) -> None:
    network, images = shared(small, clip).eval(), rectangles(1, 0).images
    maps = FeatureMaps(images, tuple(network.stages(images)[:1]))
    with pytest.raises(ValueError, match="the network needs 3 maps, got 1"):
        network.propose(maps, 5)


def test_training_a_head_leaves_the_trunk_as_it_is(small: Small, rectangles: Rectangles, clip: str) -> None:
    network = shared(small, clip)
    before = trunk_hash(network.trunk)
    task = RPNTask(network).train()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    totals = []
    for step in range(20):
        total = torch.stack(list(task(rectangles(4, step % 2)).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert sum(totals[-4:]) < sum(totals[:4])
    assert trunk_hash(network.trunk) == before == trunk_hash(clip_tower(clip)[0])


def test_a_file_without_trunk_wants_the_one_it_was_trained_on(
    small: Small, rectangles: Rectangles, clip: str, tmp_path: Path
) -> None:
    network, path = shared(small, clip).eval(), tmp_path / "head.safetensors"
    save_network(network, path)
    weights, metadata = read_weights(path)
    assert {name.split(".")[0] for name in weights} == {"neck", "rpn"}
    assert json.loads(metadata["config"])["share_trunk"]
    images = rectangles(2, 5).images
    proposer = RPNProposer(RPNConfig(str(path), clip=clip, limit=20))
    found = proposer(images, [ImageInfo(1, 96, 96), ImageInfo(2, 96, 96)])
    assert torch.equal(found.boxes, network.propose(images, 20).boxes)
    with pytest.raises(InputError, match=r"without the trunk; .*proposer\.clip=FILE"):
        load_network(path)
    other = load_clip(clip).visual
    with torch.no_grad():
        other.layer2[0].conv1.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match="another CLIP"):
        load_network(path, other)


def test_a_clip_for_a_network_with_its_own_backbone_is_refused(
    small: Small, clip: str, tmp_path: Path
) -> None:
    save_network(ProposalNetwork(small()), tmp_path / "whole.safetensors")
    with pytest.raises(InputError, match="its own backbone; omit clip="):
        RPNProposer(RPNConfig(str(tmp_path / "whole.safetensors"), clip=clip))


def test_what_lies_above_the_trunk_does_not_count(clip: str) -> None:
    tower, _ = clip_tower(clip)
    before = trunk_hash(tower)
    with torch.no_grad():
        tower.layer4[0].conv1.weight.zero_()
        tower.attnpool.c_proj.weight.zero_()
    assert trunk_hash(tower.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        tower.layer1[0].bn1.running_mean += 1e-3
    assert trunk_hash(tower) != before


def test_a_trunk_is_given_exactly_when_it_is_shared(small: Small, clip: str) -> None:
    tower, _ = clip_tower(clip)
    with pytest.raises(ValueError, match="got no trunk"):
        ProposalNetwork(small(share_trunk=True))
    with pytest.raises(ValueError, match="got a trunk"):
        ProposalNetwork(small(), tower)
    wider = dataclasses.replace(small().vision, width=32)
    with pytest.raises(ValueError, match="has 256 channels"):
        ProposalNetwork(small(share_trunk=True, vision=wider), tower)
    with pytest.raises(InputError, match=r"needs network\.backbone_weights"):
        build_network(small(share_trunk=True))
    with pytest.raises(InputError, match="needs backbone=clip"):
        small(share_trunk=True, backbone="resnet50", strides=[8, 16])


def test_the_jobs_train_and_use_a_head_on_a_clip(
    world: Path, clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    data += [f"split={world / 'split.json'}", "resize.short=[64]", "resize.long=64"]
    options = ["network.share_trunk=true", f"network.backbone_weights={clip_file}", "network.channels=16"]
    options += ["train.steps=2", "train.batch_size=4", "train.lr=1e-3", f"out={tmp_path / 'rpn'}"]
    assert main_regionclip(["train-rpn", *data, *options]) == 0
    weights = tmp_path / "rpn" / "model.safetensors"
    use = ["propose", *data, f"proposer.weights={weights}", f"out={tmp_path / 'proposals'}"]
    assert main_regionclip(use) == 2
    assert "give the CLIP" in capsys.readouterr().err
    assert main_regionclip([*use, f"proposer.clip={clip_file}"]) == 0
    assert json.loads((tmp_path / "proposals" / "metrics.json").read_text())["proposals"] > 0
