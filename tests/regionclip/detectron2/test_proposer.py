"""A detectron2 model's region proposal network as a proposer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import normalize
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.detectron2.proposer import Detectron2Config, Detectron2Proposer
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.regions import ImageInfo

pytest.importorskip("detectron2")

Command = Callable[..., tuple[int, str]]

SIZES = ((96, 128), (80, 112))
KEYS = [ImageInfo(slot, *size) for slot, size in enumerate(SIZES)]
ZOO = {"c4": "COCO-Detection/rpn_R_50_C4_1x.yaml", "fpn": "COCO-Detection/rpn_R_50_FPN_1x.yaml"}
DESIGNS = {
    "c4": {"design": "c4", "strides": [16], "pre_nms": 6000},
    "fpn": {"design": "fpn", "strides": [4, 8, 16, 32, 64], "pre_nms": 1000},
}


def images() -> ImageBatch:
    """Two images of unlike size in one frame."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]
    return ImageBatch.pad([normalize(picture) for picture in pictures], 32)


def make_network(design: str) -> ProposalNetwork:
    """A published network's shape with random weights that spread over scores and places."""
    torch.manual_seed(7)
    config = ProposalNetworkConfig(
        backbone="resnet50",
        stride_in_1x1=True,
        pixels="caffe",
        frozen_stages=2,
        frozen_batch_norm=True,
        anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0],
        ratios=[0.5, 1.0, 2.0],
        merge_levels=False,
        min_size=0.0,
        **DESIGNS[design],  # type: ignore[arg-type]
    )
    network = ProposalNetwork(config).eval()
    head = network.rpn.head
    with torch.no_grad():  # as initialized, a ResNet without trained norms blows its activations up
        convolution = head.conv[0][0]
        convolution.weight /= convolution(network.features(images())[0]).std()
        head.cls_logits.weight.normal_(std=0.05)
    return network


@pytest.mark.parametrize("design", sorted(ZOO))
def test_its_proposals_are_those_of_our_network_with_the_same_weights(design: str, tmp_path: Path) -> None:
    network = make_network(design)
    torch.save({"model": to_detectron2(network)}, tmp_path / "rpn.pth")
    proposer = Detectron2Proposer(
        Detectron2Config(config=ZOO[design], weights=str(tmp_path / "rpn.pth"), limit=50)
    )
    found = proposer(images(), KEYS)
    wanted = network.propose(images(), 50)
    assert len(wanted) == 100
    assert found.image_index.equal(wanted.image_index)
    assert found.scores is not None
    assert wanted.scores is not None
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.boxes, wanted.boxes, atol=1e-2, rtol=0)


def test_limit_and_min_score_hold(tmp_path: Path) -> None:
    network = make_network("c4")
    torch.save({"model": to_detectron2(network)}, tmp_path / "rpn.pth")
    options = {"config": ZOO["c4"], "weights": str(tmp_path / "rpn.pth")}
    few = Detectron2Proposer(Detectron2Config(**options, limit=5))(images(), KEYS)
    assert torch.bincount(few.image_index).tolist() == [5, 5]
    assert few.scores is not None
    middle = float(few.scores.median())
    best = Detectron2Proposer(Detectron2Config(**options, limit=5, min_score=middle))(images(), KEYS)
    assert best.scores is not None
    assert best.scores.tolist() == [score for score in few.scores.tolist() if score >= middle]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save({"model": to_detectron2(make_network("fpn"))}, tmp_path / "rpn.pth")
    with pytest.raises(InputError, match=r"lack \d+ of the tensors"):
        Detectron2Proposer(Detectron2Config(config=ZOO["c4"], weights=str(tmp_path / "rpn.pth")))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"config": "nothing.yaml"}, "neither a file nor a config"),
        ({"config": ZOO["c4"], "weights": "nowhere.pth"}, "nowhere.pth cannot be read"),
        (
            {"config": "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "weights": "x"},
            "has no proposal_generator",
        ),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Detectron2Proposer(Detectron2Config(**options))


def test_the_propose_job_runs_it(world: Path, regionclip: Command, tmp_path: Path) -> None:
    torch.save({"model": to_detectron2(make_network("c4"))}, tmp_path / "rpn.pth")
    code, told = regionclip(
        "propose",
        f"annotations={world / 'instances_val.json'}",
        f"images={world / 'images'}",
        "proposer.name=detectron2",
        f"proposer.config={ZOO['c4']}",
        f"proposer.weights={tmp_path / 'rpn.pth'}",
        "resize.short=[64]",
        "resize.long=64",
        "precision=fp32",
        f"out={tmp_path / 'out'}",
    )
    assert code == 0, told
    results = read_json(tmp_path / "out" / "proposals.json")
    assert len({entry["image_id"] for entry in results}) == 4
