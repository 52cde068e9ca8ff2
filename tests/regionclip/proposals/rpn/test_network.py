"""The proposal network learns, keeps the contract of proposals and its anchors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchvision.models.detection.rpn import concat_box_prediction_layers

from clip_base.data.batch import ImageBatch
from clip_base.jobs import config as configs
from clip_base.models.configs import VisionConfig
from clip_base.runtime.errors import InputError
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.boxes import iou
from regionclip.structures.regions import RegionBatch, Regions
from regionclip.training.train_rpn import RPNTask, TrainRPNConfig

Small = Callable[..., ProposalNetworkConfig]
Rectangles = Callable[[int, int], RegionBatch]
AssertInside = Callable[[Regions, ImageBatch], None]


def recall(found: Regions, truth: Regions, best: int) -> float:
    hits = []
    for index in range(int(truth.image_index.max()) + 1):
        overlaps = iou(truth.of_image(index).boxes, found.of_image(index).boxes[:best])
        hits.append(overlaps.amax(1) >= 0.5)
    return float(torch.cat(hits).float().mean())


def sorted_within_images(regions: Regions) -> bool:
    assert regions.scores is not None
    key = regions.image_index.double() * 2 - regions.scores.double()
    return bool((key.diff() >= 0).all())


@pytest.fixture(scope="module")
def trained(small: Small, rectangles: Rectangles) -> tuple[ProposalNetwork, list[float]]:
    torch.manual_seed(0)
    network = ProposalNetwork(small())
    task = RPNTask(network)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    totals = []
    for step in range(60):
        losses = task(rectangles(8, step))
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    return network.eval(), totals


def test_training_lowers_the_loss_and_finds_new_rectangles(
    trained: tuple[ProposalNetwork, list[float]], rectangles: Rectangles
) -> None:
    network, totals = trained
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])
    batch = rectangles(16, 1000)
    assert recall(network.propose(batch.images, 10), batch.regions, 10) > 0.8


def test_proposals_keep_the_contract(
    trained: tuple[ProposalNetwork, list[float]], rectangles: Rectangles, assert_inside: AssertInside
) -> None:
    network, _ = trained
    images = rectangles(6, 7).images
    found = network.propose(images, limit=50)
    assert_inside(found, images)
    assert sorted_within_images(found)
    assert found.scores is not None
    assert 0 <= float(found.scores.min()) <= float(found.scores.max()) <= 1
    counts = found.image_index.bincount(minlength=6)
    assert int(counts.max()) <= 50
    assert int(counts.min()) > 0


def test_limit_nms_and_min_score_are_kept(
    trained: tuple[ProposalNetwork, list[float]], rectangles: Rectangles
) -> None:
    network, _ = trained
    images = rectangles(2, 8).images
    found = network.propose(images, limit=300, nms=0.3, min_score=0.2)
    assert found.scores is not None
    assert float(found.scores.min()) >= 0.2
    for index in range(2):
        boxes = found.of_image(index).boxes
        assert float((iou(boxes, boxes) - torch.eye(len(boxes))).max()) <= 0.3 + 1e-5
    assert len(network.propose(images, limit=1)) == 2


def test_proposals_do_not_depend_on_the_rest_of_the_batch(
    trained: tuple[ProposalNetwork, list[float]], rectangles: Rectangles
) -> None:
    network, _ = trained
    images = rectangles(3, 9).images
    last = ImageBatch(images.pixels[2:], images.sizes[2:])
    alone, together = network.propose(last, 5), network.propose(images, 5).of_image(2)
    torch.testing.assert_close(together.boxes, alone.boxes, atol=1e-3, rtol=1e-4)


def test_published_selection_equals_torchvisions(small: Small, rectangles: Rectangles) -> None:
    torch.manual_seed(0)
    network = ProposalNetwork(small(merge_levels=False, min_size=0.001, pre_nms=60)).eval()
    torch.nn.init.normal_(network.rpn.head.bbox_pred.weight, std=0.3)
    torch.nn.init.normal_(network.rpn.head.cls_logits.weight, std=0.3)
    images = rectangles(3, 4).images
    found = network.propose(images, 40)
    with torch.no_grad():
        maps = network.features(images)
        logits, deltas = network.rpn.head(maps)
        counts = [level[0].numel() for level in logits]
        logits, deltas = concat_box_prediction_layers(logits, deltas)
        network.rpn._pre_nms_top_n, network.rpn._post_nms_top_n = {"testing": 60}, {"testing": 40}
        decoded = network.rpn.box_coder.decode(deltas, [torch.cat(network.anchors(maps))] * 3).reshape(
            3, -1, 4
        )
        sizes = [(height, width) for height, width in images.sizes.tolist()]
        boxes, scores = network.rpn.filter_proposals(decoded, logits, sizes, counts)
    torch.testing.assert_close(found.boxes, torch.cat(boxes), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(found.scores, torch.cat(scores))


def test_proposing_in_training_mode_is_refused(small: Small, rectangles: Rectangles) -> None:
    with pytest.raises(ValueError, match="call eval"):
        ProposalNetwork(small()).propose(rectangles(1, 0).images, 10)


def test_losses_are_float32_under_autocast_and_fixed_by_the_seed(
    small: Small, rectangles: Rectangles
) -> None:
    torch.manual_seed(3)
    network, batch = ProposalNetwork(small()), rectangles(2, 0)
    seen = []
    for _ in range(2):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16):
            losses = network.losses(batch)
        assert {name: loss.dtype for name, loss in losses.items()} == {
            "objectness": torch.float32,
            "box": torch.float32,
        }
        seen.append([loss.item() for loss in losses.values()])
    assert seen[0] == seen[1]


def test_images_without_boxes_and_boxes_without_area_give_finite_losses(
    small: Small, rectangles: Rectangles
) -> None:
    batch = rectangles(2, 0)
    flat = Regions(torch.tensor([[5.0, 5.0, 5.0, 20.0]]), torch.tensor([1]))
    losses = ProposalNetwork(small()).losses(RegionBatch(batch.images, flat))
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert losses["box"].item() == 0


def test_weights_scale_the_losses(small: Small, rectangles: Rectangles) -> None:
    torch.manual_seed(0)
    network, batch = ProposalNetwork(small()), rectangles(2, 0)
    plain, scaled = RPNTask(network), RPNTask(network, objectness_weight=2.0, box_weight=0.5)
    torch.manual_seed(1)
    before = plain(batch)
    torch.manual_seed(1)
    after = scaled(batch)
    torch.testing.assert_close(after["objectness"], 2 * before["objectness"])
    torch.testing.assert_close(after["box"], 0.5 * before["box"])


def test_anchors_are_centered_on_cells_unrounded_and_of_the_asked_area(small: Small) -> None:
    network = ProposalNetwork(small(anchor_sizes=[15.0, 31.0], ratios=[0.5, 2.0]))
    maps = [torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 1)]
    fine, coarse = network.anchors(maps)
    assert len(fine) == 3 * 2 * 2
    assert len(coarse) == 2 * 1 * 2
    centers = (fine[:, :2] + fine[:, 2:]) / 2
    assert centers[::2].tolist() == [[0, 0], [8, 0], [0, 8], [8, 8], [0, 16], [8, 16]]
    sides = coarse[:, 2:] - coarse[:, :2]
    torch.testing.assert_close(sides.prod(1), torch.full((4,), 31.0**2))
    torch.testing.assert_close(sides[:2, 1] / sides[:2, 0], torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize(
    "options",
    [
        {"design": "c4", "strides": [16], "channels": 0},
        {"design": "c4", "strides": [16], "channels": 24},
        {"strides": [4, 8, 16, 32]},
        {
            "backbone": "resnet50",
            "strides": [4, 8, 16, 32, 64],
            "anchor_sizes": [8.0, 16.0, 32.0, 64.0, 128.0],
        },
        {"backbone": "resnet50", "design": "c4", "strides": [16], "frozen_batch_norm": True},
    ],
)
def test_every_design_trains_all_its_weights_and_proposes(
    options: dict[str, object], small: Small, rectangles: Rectangles, assert_inside: AssertInside
) -> None:
    torch.manual_seed(0)
    network, batch = ProposalNetwork(small(**options)), rectangles(2, 0)
    torch.stack(list(network.losses(batch).values())).sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    assert_inside(network.eval().propose(batch.images, 20), batch.images)


def test_frozen_stages_stay_as_they_are(small: Small, rectangles: Rectangles) -> None:
    network = ProposalNetwork(small(frozen_stages=2))
    trainable = {
        name.split(".")[1] for name, p in network.named_parameters() if p.requires_grad and "backbone" in name
    }
    assert trainable == {"layer2", "layer3"}
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    network.losses(rectangles(2, 0))
    changed = {
        name.split(".")[0]
        for name, value in network.backbone.state_dict().items()
        if value.ne(before[name]).any()
    }
    assert changed == {"layer2", "layer3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "c4"}, r"set strides=\[16\]"),
        ({"strides": [8, 32]}, "double"),
        ({"strides": [4, 8]}, "16…32"),
        ({"anchor_sizes": [8.0, 16.0, 32.0]}, "evenly"),
        ({"ratios": [0.0]}, "above 0"),
        ({"positive_iou": 0.2}, "negative_iou"),
        ({"vision": VisionConfig(kind="vit", layers=[1], width=64)}, "needs a CLIP with a resnet"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, object], message: str, small: Small) -> None:
    with pytest.raises(InputError, match=message):
        small(**options)


def test_the_config_is_read_from_overrides() -> None:
    config = configs.resolve(
        TrainRPNConfig,
        overrides=[
            "annotations=a.json",
            "images=a",
            "out=b",
            "network.channels=32",
            "network.anchor_sizes=[16,64]",
        ],
    )
    assert config.network.channels == 32
    assert config.network.anchor_sizes == [16.0, 64.0]
