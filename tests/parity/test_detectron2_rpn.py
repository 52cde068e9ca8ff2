"""The same weights in detectron2's proposal networks and here give the same proposals and losses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN
from clip_base.weights.native import load_exactly
from regionclip.proposals.rpn.detectron2_names import from_detectron2, to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import load_network, save_network
from regionclip.structures.regions import RegionBatch, Regions

pytest.importorskip("detectron2")

from detectron2.config import CfgNode
from detectron2.config import get_cfg as default_config
from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

DESIGNS = ("c4", "fpn", "fpn_lsj")


def peer_config(design: str) -> CfgNode:
    """What Base-RCNN-C4.yaml and Base-RCNN-FPN.yaml say of backbone and proposals, and the LSJ baselines."""
    config = default_config()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RESNETS.DEPTH = 50
    if design == "c4":
        config.MODEL.RPN.PRE_NMS_TOPK_TEST = 6000
        return config
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    config.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    config.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
    if design == "fpn_lsj":
        config.MODEL.BACKBONE.FREEZE_AT = 0
        config.MODEL.RESNETS.NORM = config.MODEL.FPN.NORM = "BN"
        config.MODEL.RPN.CONV_DIMS = [-1, -1]
    return config


class Peer(nn.Module):
    """detectron2's backbone and proposal generator under the names that its checkpoints have."""

    def __init__(self, design: str) -> None:
        super().__init__()
        config = peer_config(design)
        self.backbone = build_backbone(config)
        self.proposal_generator = build_proposal_generator(config, self.backbone.output_shape())
        self.mean = torch.tensor(config.MODEL.PIXEL_MEAN)[:, None, None]
        self.deviation = torch.tensor(config.MODEL.PIXEL_STD)[:, None, None]

    @torch.no_grad()
    def forward(self, images: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Takes [3, h, w] RGB bytes; returns each image's boxes and objectness probabilities."""
        kind = self.proposal_generator.rpn_head.anchor_deltas.weight.dtype
        shown = [(image.flip(0).to(kind) - self.mean) / self.deviation for image in images]
        batch = ImageList.from_tensors(shown, self.backbone.size_divisibility)
        found, _ = self.proposal_generator(batch, self.backbone(batch.tensor))
        return [(one.proposal_boxes.tensor, one.objectness_logits.sigmoid()) for one in found]


@torch.no_grad()
def spread(peer: Peer, images: list[torch.Tensor]) -> None:
    """Draws weights under which maps keep their size and objectness differs from cell to cell.

    As initialized, a frozen batch norm changes nothing and all logits are nearly 0.
    """
    generator = torch.Generator().manual_seed(0)
    for name, value in (*peer.named_parameters(), *peer.named_buffers()):
        if name.endswith(("norm.weight", "norm.running_var")):
            value.uniform_(0.8, 1.2, generator=generator)
            if "conv3" in name:
                value.mul_(0.3 if name.endswith("weight") else 1)
        elif name.endswith(("norm.bias", "norm.running_mean")):
            value.normal_(0, 0.1, generator=generator)
        elif name.endswith("stem.conv1.weight"):
            value.normal_(0, 0.002, generator=generator)  # pixels are in -128…128
        elif value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    head = peer.proposal_generator.rpn_head
    shapes: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, outputs: shapes.extend(outputs[0] + outputs[1]))
    peer(images)
    hook.remove()
    logits, deltas = shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]
    head.objectness_logits.weight /= torch.cat([part.flatten() for part in logits]).std() / 2
    head.anchor_deltas.weight /= torch.cat([part.flatten() for part in deltas]).std() / 0.3


def photographs() -> list[torch.Tensor]:
    """Two images of odd sides, neither of which holds the other: both are padded."""
    generator = torch.Generator().manual_seed(1)
    images = []
    for height, width in ((139, 203), (187, 131)):
        coarse = torch.rand(1, 3, height // 20, width // 20, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        noisy = smooth * 255 + torch.randn(3, height, width, generator=generator) * 8
        images.append(noisy.clamp(0, 255).to(torch.uint8))
    return images


@pytest.fixture(scope="module", params=DESIGNS)
def pair(request: pytest.FixtureRequest) -> tuple[Peer, ProposalNetwork]:
    peer = Peer(request.param).eval()
    spread(peer, photographs())
    config, state = from_detectron2(peer.state_dict())
    network = ProposalNetwork(config)
    load_exactly(network, state, "detectron2")
    return peer, network.eval().to(memory_format=torch.channels_last)


def batch_of(images: list[torch.Tensor], multiple: int, kind: torch.dtype) -> ImageBatch:
    mean, deviation = (torch.tensor(row, dtype=kind)[:, None, None] for row in (MEAN, DEVIATION))
    return ImageBatch.pad([(image.to(kind) / 255 - mean) / deviation for image in images], multiple)


@pytest.mark.parametrize("multiple", [1, 64])
def test_proposals_are_detectron2s(pair: tuple[Peer, ProposalNetwork], multiple: int) -> None:
    # In float64, or among a thousand boxes two have objectness so much alike that rounding swaps them.
    peer, network = (copy.deepcopy(part).double() for part in pair)
    generator = peer.proposal_generator
    generator.anchor_generator.float()
    # torchvision's NMS wants boxes and scores of one type, and detectron2 makes its boxes float32.
    generator.rpn_head.register_forward_hook(
        lambda module, inputs, outputs: tuple([level.float() for level in part] for part in outputs)
    )
    images = photographs()
    found = network.propose(batch_of(images, multiple, torch.float64), 1000)
    for index, (boxes, scores) in enumerate(peer(images)):
        mine = found.of_image(index)
        assert len(boxes) > 200
        assert float(scores.std()) > 0.05
        assert mine.boxes.shape == boxes.shape
        assert mine.scores is not None
        assert float((mine.boxes - boxes).abs().max()) < 0.01
        assert float((mine.scores - scores).abs().max()) < 1e-5


def test_in_float32_too_every_box_has_its_like(pair: tuple[Peer, ProposalNetwork]) -> None:
    peer, network = pair
    images = photographs()
    found = network.propose(batch_of(images, 32, torch.float32), 1000)
    for index, (boxes, scores) in enumerate(peer(images)):
        mine = found.of_image(index)
        assert mine.scores is not None
        ours, theirs = (
            torch.cat([b, s[:, None]], 1) for b, s in ((mine.boxes, mine.scores), (boxes, scores))
        )
        apart = (ours[:, None] - theirs[None]).abs().amax(2)  # [n, m] pixels
        # Rounding may decide one suppression in a hundred the other way; it does not move a box.
        assert float((apart.amin(0) < 0.01).float().mean()) > 0.99
        assert float((apart.amin(1) < 0.01).float().mean()) > 0.99


def test_every_key_goes_there_and_back(pair: tuple[Peer, ProposalNetwork], tmp_path: Path) -> None:
    peer, network = pair
    wanted = {k: v for k, v in peer.state_dict().items() if not k.endswith("num_batches_tracked")}
    back = to_detectron2(network)
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)
    save_network(network, tmp_path / "rpn.safetensors")
    assert load_network(tmp_path / "rpn.safetensors").config == network.config


TRUTH = ([[20.0, 10.0, 75.0, 90.0], [60.0, 40.0, 180.0, 110.0]], [[5.0, 60.0, 45.0, 120.0]])


@pytest.mark.parametrize("padded", [False, True], ids=["of one size", "padded"])
@pytest.mark.parametrize("beta", [0.0, 1 / 9])
@pytest.mark.parametrize("samples", [256, 100_000], ids=["sampled", "fewer anchors than asked for"])
def test_losses_are_detectron2s(
    pair: tuple[Peer, ProposalNetwork],
    beta: float,
    samples: int,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anchors in the padding of the smaller image count as background in both; both draw alike here."""
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.sin(12.9898 * torch.arange(n)).argsort())
    peer, network = pair
    generator = peer.proposal_generator
    images = photographs() if padded else [image[:, :128, :128].contiguous() for image in photographs()]
    normal = [(image.flip(0).float() - peer.mean) / peer.deviation for image in images]
    multiple = network.frame_multiple
    shown = ImageList.from_tensors(normal, multiple)
    truth = [
        Instances((image.shape[1], image.shape[2]), gt_boxes=Boxes(torch.tensor(boxes)))
        for image, boxes in zip(images, TRUTH, strict=True)
    ]
    before = generator.smooth_l1_beta, generator.batch_size_per_image
    generator.smooth_l1_beta, generator.batch_size_per_image = beta, samples
    generator.train()
    try:
        with EventStorage():
            _, wanted = generator(shown, peer.backbone(shown.tensor), truth)
    finally:
        generator.smooth_l1_beta, generator.batch_size_per_image = before
        generator.eval()

    sizes = dataclasses.replace(network.config, smooth_l1_beta=beta, samples=samples)
    mine = ProposalNetwork(sizes).eval()
    mine.load_state_dict(network.state_dict())
    regions = Regions(
        torch.cat([torch.tensor(boxes) for boxes in TRUTH]),
        torch.tensor([0] * len(TRUTH[0]) + [1] * len(TRUTH[1])),
    )
    found = mine.losses(RegionBatch(batch_of(images, multiple, torch.float32), regions))
    torch.testing.assert_close(found["box"], wanted["loss_rpn_loc"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["objectness"], wanted["loss_rpn_cls"], atol=1e-5, rtol=1e-4)
