"""The proposal network learns, every proposer stays inside its images, files load or say why they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.rpn import concat_box_prediction_layers

from clip_base import config as configs
from clip_base.batch import ImageBatch
from clip_base.errors import InputError
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights.native import save_clip
from regionclip.boxes import iou
from regionclip.proposals.base import ImageKey
from regionclip.proposals.grid import GridConfig, GridProposer
from regionclip.proposals.network import ProposalNetwork, ProposalNetworkConfig
from regionclip.proposals.precomputed import PrecomputedConfig, PrecomputedProposer
from regionclip.proposals.rpn import RPNConfig, RPNProposer, build_network, load_network, save_network
from regionclip.structures import RegionBatch, Regions
from regionclip.train_rpn import RPNTask, TrainRPNConfig

VISION = VisionConfig(layers=[1, 1, 1, 1], width=16, resolution=64)


def small(**options: object) -> ProposalNetworkConfig:
    values = {"vision": VISION, "channels": 32, "anchor_sizes": [16.0, 24.0, 32.0, 48.0], **options}
    return ProposalNetworkConfig(**values)  # type: ignore[arg-type]


def rectangles(count: int, seed: int) -> RegionBatch:
    """Returns dark noisy images of different sizes in a 96 pixel frame, two bright rectangles in each."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes, index = [], [], []
    for number in range(count):
        height, width = (int(v) for v in torch.randint(72, 97, (2,), generator=generator))
        image = torch.randn(3, height, width, generator=generator) * 0.1 - 1
        for half in range(2):
            sides = torch.randint(18, 34, (2,), generator=generator).tolist()
            left = half * width // 2 + int(
                torch.randint(0, width // 2 - sides[0] + 1, (1,), generator=generator)
            )
            top = int(torch.randint(0, height - sides[1] + 1, (1,), generator=generator))
            image[:, top : top + sides[1], left : left + sides[0]] += 2
            boxes.append([left, top, left + sides[0], top + sides[1]])
            index.append(number)
        images.append(image)
    regions = Regions(torch.tensor(boxes).float(), torch.tensor(index))
    return RegionBatch(ImageBatch.pad(images, 32), regions)


def recall(found: Regions, truth: Regions, best: int) -> float:
    hits = []
    for index in range(int(truth.image_index.max()) + 1):
        overlaps = iou(truth.of_image(index).boxes, found.of_image(index).boxes[:best])
        hits.append(overlaps.amax(1) >= 0.5)
    return float(torch.cat(hits).float().mean())


def assert_inside(regions: Regions, images: ImageBatch) -> None:
    limits = images.sizes[regions.image_index].flip(-1).float()
    assert bool((regions.boxes >= 0).all())
    assert bool((regions.boxes[:, 2:] <= limits).all())
    assert bool((regions.boxes[:, 2:] > regions.boxes[:, :2]).all())


def sorted_within_images(regions: Regions) -> bool:
    assert regions.scores is not None
    key = regions.image_index.double() * 2 - regions.scores.double()
    return bool((key.diff() >= 0).all())


@pytest.fixture(scope="module")
def trained() -> tuple[ProposalNetwork, list[float]]:
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
    trained: tuple[ProposalNetwork, list[float]],
) -> None:
    network, totals = trained
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])
    batch = rectangles(16, 1000)
    assert recall(network.propose(batch.images, 10), batch.regions, 10) > 0.8


def test_proposals_keep_the_contract(trained: tuple[ProposalNetwork, list[float]]) -> None:
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


def test_limit_nms_and_min_score_are_kept(trained: tuple[ProposalNetwork, list[float]]) -> None:
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
    trained: tuple[ProposalNetwork, list[float]],
) -> None:
    network, _ = trained
    images = rectangles(3, 9).images
    last = ImageBatch(images.pixels[2:], images.sizes[2:])
    alone, together = network.propose(last, 5), network.propose(images, 5).of_image(2)
    torch.testing.assert_close(together.boxes, alone.boxes, atol=1e-3, rtol=1e-4)


def test_published_selection_equals_torchvisions() -> None:
    torch.manual_seed(0)
    network = ProposalNetwork(small(merge_levels=False, min_size=0.001, pre_nms=60)).eval()
    torch.nn.init.normal_(network.rpn.head.bbox_pred.weight, std=0.3)
    torch.nn.init.normal_(network.rpn.head.cls_logits.weight, std=0.3)
    images = rectangles(3, 4).images
    found = network.propose(images, 40)
    with torch.no_grad():
        maps = network.features(images.pixels)
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


def test_proposing_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="call eval"):
        ProposalNetwork(small()).propose(rectangles(1, 0).images, 10)


def test_losses_are_float32_under_autocast_and_fixed_by_the_seed() -> None:
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


def test_images_without_boxes_and_boxes_without_area_give_finite_losses() -> None:
    batch = rectangles(2, 0)
    flat = Regions(torch.tensor([[5.0, 5.0, 5.0, 20.0]]), torch.tensor([1]))
    losses = ProposalNetwork(small()).losses(RegionBatch(batch.images, flat))
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert losses["box"].item() == 0


def test_anchors_in_the_padding_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ProposalNetwork(small())
    maps = [torch.randn(1, 32, side, side, requires_grad=True) for side in (12, 6)]
    monkeypatch.setattr(network, "features", lambda pixels: maps)
    images = ImageBatch(torch.zeros(1, 3, 96, 96), torch.tensor([[96, 32]]))
    regions = Regions(torch.tensor([[4.0, 4.0, 28.0, 28.0]]), torch.tensor([0]))
    torch.stack(list(network.losses(RegionBatch(images, regions)).values())).sum().backward()
    gradient = maps[0].grad
    assert gradient is not None
    # The head's 3x3 convolution reaches one cell beyond the four columns inside the image.
    assert bool((gradient[..., :4] != 0).any())
    assert bool((gradient[..., 5:] == 0).all())


def test_weights_scale_the_losses() -> None:
    torch.manual_seed(0)
    network, batch = ProposalNetwork(small()), rectangles(2, 0)
    plain, scaled = RPNTask(network), RPNTask(network, objectness_weight=2.0, box_weight=0.5)
    torch.manual_seed(1)
    before = plain(batch)
    torch.manual_seed(1)
    after = scaled(batch)
    torch.testing.assert_close(after["objectness"], 2 * before["objectness"])
    torch.testing.assert_close(after["box"], 0.5 * before["box"])


def test_anchors_are_centred_on_cells_unrounded_and_of_the_asked_area() -> None:
    network = ProposalNetwork(small(anchor_sizes=[15.0, 31.0], ratios=[0.5, 2.0]))
    maps = [torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 1)]
    fine, coarse = network.anchors(maps)
    assert len(fine) == 3 * 2 * 2
    assert len(coarse) == 2 * 1 * 2
    centres = (fine[:, :2] + fine[:, 2:]) / 2
    assert centres[::2].tolist() == [[0, 0], [8, 0], [0, 8], [8, 8], [0, 16], [8, 16]]
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
def test_every_design_trains_all_its_weights_and_proposes(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    network, batch = ProposalNetwork(small(**options)), rectangles(2, 0)
    torch.stack(list(network.losses(batch).values())).sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    assert_inside(network.eval().propose(batch.images, 20), batch.images)


def test_frozen_stages_stay_as_they_are() -> None:
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
        ({"vision": VisionConfig(kind="vit", layers=[1], width=64)}, "vision.kind=resnet"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**options)


def test_the_config_is_read_from_overrides() -> None:
    config = configs.resolve(
        TrainRPNConfig,
        overrides=[
            "annotations=a.json",
            "images=a",
            "out=b",
            "network.vision.width=32",
            "network.anchor_sizes=[16,64]",
        ],
    )
    assert config.network.vision.width == 32
    assert config.network.anchor_sizes == [16.0, 64.0]


def test_a_saved_network_proposes_the_same(
    trained: tuple[ProposalNetwork, list[float]], tmp_path: Path
) -> None:
    network, _ = trained
    save_network(network, tmp_path / "rpn.safetensors")
    images = rectangles(2, 5).images
    proposer = RPNProposer(RPNConfig(str(tmp_path / "rpn.safetensors"), limit=40))
    found = proposer(images, [ImageKey(1, 200, 200), ImageKey(2, 200, 200)])
    torch.testing.assert_close(found.boxes, network.propose(images, 40).boxes, atol=0, rtol=0)


def test_files_that_are_no_whole_network_say_so(tmp_path: Path) -> None:
    path = tmp_path / "rpn.safetensors"
    save_network(ProposalNetwork(small()), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"rpn\.safetensors cannot be read .* cut off"):
        load_network(path)
    with pytest.raises(InputError, match="does not exist"):
        load_network(tmp_path / "absent.safetensors")
    clip = tiny_clip(tmp_path)
    with pytest.raises(InputError, match=r"clip_base\.clip.*expected 'regionclip\.proposals"):
        load_network(clip)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    from clip_base.checkpoint import read_weights, write_weights

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


def tiny_clip(folder: Path) -> Path:
    torch.manual_seed(5)
    text = TextConfig(width=32, heads=2, layers=1, vocab_size=64)
    path = folder / "clip.safetensors"
    save_clip(CLIP(CLIPConfig(32, VISION, text)), path)
    return path


def test_the_backbone_starts_from_clip(tmp_path: Path) -> None:
    path = tiny_clip(tmp_path)
    network = build_network(small(backbone_weights=str(path)))
    torch.manual_seed(5)
    text = TextConfig(width=32, heads=2, layers=1, vocab_size=64)
    clip = CLIP(CLIPConfig(32, VISION, text))
    torch.testing.assert_close(network.backbone.layer3[0].conv2.weight, clip.visual.layer3[0].conv2.weight)
    wider = VisionConfig(layers=[1, 1, 1, 1], width=32, resolution=64)
    with pytest.raises(InputError, match=r"set network\.vision"):
        build_network(small(backbone_weights=str(path), vision=wider))


def test_the_backbone_starts_from_a_local_resnet50(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    path, model = tmp_path / "resnet50.pth", resnet50(weights=None)
    torch.save(model.state_dict(), path)
    options = {"backbone": "resnet50", "design": "c4", "strides": [16]}
    network = build_network(small(backbone_weights=str(path), **options))
    torch.testing.assert_close(network.backbone.conv1.weight, model.conv1.weight)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"resnet50\.pth cannot be read"):
        build_network(small(backbone_weights=str(path), **options))


def batch_of(*sizes: tuple[int, int]) -> ImageBatch:
    return ImageBatch.pad([torch.zeros(3, *size) for size in sizes], 32)


def write_results(path: Path, *rows: tuple[int, list[float], float]) -> str:
    path.write_text(
        json.dumps([{"image_id": i, "category_id": 1, "bbox": b, "score": s} for i, b, s in rows])
    )
    return str(path)


def test_precomputed_boxes_are_scaled_cut_sorted_and_limited(tmp_path: Path) -> None:
    file = write_results(
        tmp_path / "p.json",
        (7, [10, 20, 30, 40], 0.4),
        (7, [90, 0, 50, 50], 0.9),
        (7, [120, 0, 10, 10], 0.8),
        (7, [0, 0, 10, 10], 0.3),
        (8, [0, 0, 10, 10], 0.05),
    )
    proposer = PrecomputedProposer(PrecomputedConfig(file, limit=2, min_score=0.1))
    keys = [ImageKey(9, 10, 10), ImageKey(7, 100, 100), ImageKey(8, 50, 50)]
    found = proposer(batch_of((10, 10), (50, 200), (50, 50)), keys)
    assert found.image_index.tolist() == [1, 1]
    # Image 7 is drawn half as high and twice as wide; its box beyond the right edge is left out.
    assert found.boxes.tolist() == [[180, 0, 200, 25], [20, 10, 80, 30]]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.4]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, [0, 0, 5], 0.5), "entry 0: bbox must be four"),
        ((1, [0, 0, -5, 5], 0.5), "entry 0: bbox must be four"),
        ((1, [0, 0, 5, 5], 3.2), "apply a sigmoid"),
        (("x", [0, 0, 5, 5], 0.5), "needs image_id"),
    ],
)
def test_malformed_precomputed_entries_are_named(tmp_path: Path, row: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrecomputedProposer(PrecomputedConfig(write_results(tmp_path / "p.json", row)))


def test_precomputed_reads_real_proposals(shared_data: Path) -> None:
    folder = shared_data / "coco_mini"
    file = folder / "proposals_yolox_nano_val.json"
    images = json.loads((folder / "instances_val.json").read_text())["images"]
    keys = [ImageKey(image["id"], image["height"], image["width"]) for image in images[:4]]
    batch = batch_of(*((key.height // 2, key.width // 2) for key in keys))
    found = PrecomputedProposer(PrecomputedConfig(str(file)))(batch, keys)
    assert found.image_index.bincount(minlength=4).tolist() == [100] * 4
    assert_inside(found, batch)


def covered(boxes: Tensor, height: int, width: int) -> Tensor:
    seen = torch.zeros(height, width, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.round().long().tolist():
        seen[y1:y2, x1:x2] = True
    return seen


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 200), (131, 70)])
def test_the_grid_of_each_size_covers_the_image_and_stays_inside(height: int, width: int) -> None:
    for size in (0.25, 0.5, 1.0):
        boxes = GridProposer(GridConfig(sizes=[size])).boxes(height, width)
        assert bool(covered(boxes, height, width).all())
        assert bool((boxes >= 0).all())
        assert bool((boxes[:, 2:] <= torch.tensor([width, height])).all())
        assert len(boxes.unique(dim=0)) == len(boxes)


def test_the_grid_depends_on_the_unpadded_size_only() -> None:
    images = batch_of((64, 48), (96, 96), (64, 48))
    found = GridProposer(GridConfig())(images, [ImageKey(i, 64, 64) for i in range(3)])
    assert_inside(found, images)
    assert torch.equal(found.of_image(0).boxes, found.of_image(2).boxes)
    assert found.scores is not None
    assert found.scores.unique().tolist() == [1.0]


def test_a_grid_with_gaps_is_refused() -> None:
    with pytest.raises(InputError, match="gaps"):
        GridConfig(stride=1.5)
