"""RegionCLIP's released evaluation, written out from detectron2's and open_clip's parts, and ours agree.

The reference follows what the released code computes, step by step: detectron2's image reading, resizing,
proposal network, RoIAlign, box decoding and post-processing around open_clip's ResNet. Both sides read the
same seeded files, which have the names and shapes of the released ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN, normalize
from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import write_json
from regionclip.checkpoints.load import load_published_detector
from regionclip.data.categories import parse_names
from regionclip.models.postprocess import DetectorConfig
from regionclip.structures.regions import Regions

pytest.importorskip("detectron2")
pytest.importorskip("open_clip")

from detectron2 import model_zoo
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.layers import batched_nms
from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, BoxMode, ImageList, Instances, pairwise_iou
from open_clip.modified_resnet import ModifiedResNet

CONFIGS = Path(__file__).parents[2] / "configs" / "region-evaluate"
WIDTH, EMBED, SIDE = 8, 32, 64  # of the small tower; SIDE / 16 cells are the side of a region
SHORT, LONG = 128, 213
PROPOSALS = 24
ROUNDING = 1e-5  # of scores, in which different processors differ by up to 3e-6
SIZES = ((113, 171), (268, 100))
COCO = parse_names("coco")
TRUTH = torch.tensor([[9, 9, 50, 40], [12, 9, 50, 44], [30, 50.5, 41, 60], [0, 0, 99, 112]])  # x, y, w, h
LVIS = "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"


def offline_network(design: str, proposals: int, nms: float) -> nn.ModuleDict:
    """Returns backbone and proposal network of the detectron2 configurations that the released ones name."""
    files = {"c4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x", "fpn": LVIS, "fpn_lsj": LVIS}
    config = model_zoo.get_config(f"{files[design]}.yaml")
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RPN.NMS_THRESH = nms
    config.MODEL.RPN.POST_NMS_TOPK_TEST = proposals
    if design == "fpn_lsj":
        config.MODEL.BACKBONE.FREEZE_AT = 0
        config.MODEL.RESNETS.NORM = config.MODEL.FPN.NORM = "BN"  # SyncBN, which needs a GPU, in training
        config.MODEL.RPN.CONV_DIMS = [-1, -1]
    backbone = build_backbone(config)
    generator = build_proposal_generator(config, backbone.output_shape())
    return nn.ModuleDict({"backbone": backbone, "proposal_generator": generator}).eval()


@torch.no_grad()
def seed(network: nn.Module, scale: float = 1.0) -> None:
    """Draws weights under which maps keep their size and regions differ."""
    generator = torch.Generator().manual_seed(0)
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        last = name.rpartition(".")[2]
        if "cell_anchors" in name or last == "num_batches_tracked":
            continue
        if last == "running_var" or (last == "weight" and value.ndim == 1):
            value.uniform_(0.8, 1.2, generator=generator)
            if name.endswith(("conv3.norm.weight", "bn3.weight")):
                value.mul_(0.3)
        elif last in ("bias", "running_mean"):
            value.normal_(0, 0.1, generator=generator)
        elif "stem.conv1" in name:
            value.normal_(0, 0.002, generator=generator)  # pixels are in -128…128
        elif value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        else:
            value.normal_(0, scale * value.shape[-1] ** -0.5, generator=generator)


class Released:
    """What the released meta-architecture and its RoI heads compute at test time, for one image."""

    def __init__(self, design: str, classes: int, side: int = SIDE, **settings: Any) -> None:
        self.side = side
        self.settings: dict[str, Any] = {
            "multiply": False, "deltas": True, "soft": True, "threshold": 0.001, "limit": 100, "nms": 0.7
        } | settings  # fmt: skip
        torch.manual_seed(0)
        self.tower = ModifiedResNet([1, 2, 1, 1], EMBED, heads=WIDTH * 32 // 64, image_size=side, width=WIDTH)
        seed(self.tower.eval())
        with torch.no_grad():
            self.tower.attnpool.c_proj.bias.normal_(0, 0.5)
        self.offline = offline_network(design, PROPOSALS, self.settings["nms"])
        seed(self.offline)
        self.spread()
        # Names that lie close together beside what regions share: probabilities are neither 0 nor 1.
        self.text = 0.04 * torch.randn(classes, EMBED) + 2 * F.normalize(
            self.tower.attnpool.c_proj.bias, dim=0
        )
        self.boxes = nn.Linear(EMBED, 4)
        nn.init.normal_(self.boxes.weight, std=0.3)

    @torch.no_grad()
    def spread(self) -> None:
        """Scales the proposal network's head so that objectness and moves vary as in trained networks."""
        found: list[Tensor] = []
        head = self.offline.proposal_generator.rpn_head
        hook = head.register_forward_hook(lambda module, inputs, outputs: found.extend(outputs))
        generator = torch.Generator().manual_seed(2)
        pixels = F.interpolate(torch.randn(1, 3, 12, 16, generator=generator) * 60, scale_factor=16.0)
        batch = ImageList.from_tensors([pixels[0]], 32)
        self.offline.proposal_generator(batch, self.offline.backbone(batch.tensor))
        hook.remove()
        logits, deltas = (torch.cat([level.flatten() for level in levels]) for levels in found)
        head.objectness_logits.weight /= logits.std() / 2
        head.objectness_logits.bias -= 5  # some of the best proposals are less likely objects than not
        head.anchor_deltas.weight /= deltas.std() / 0.3

    def state(self) -> dict[str, Tensor]:
        """Returns the detector's tensors by the released code's names."""
        state = {f"backbone.{name}": value for name, value in self.tower.state_dict().items()}
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        box = "roi_heads.box_predictor."
        state |= {f"{box}bbox_pred.{name}": value for name, value in self.boxes.state_dict().items()}
        state[f"{box}cls_bg_score.weight"] = torch.zeros(1, EMBED)
        state[f"{box}cls_score.weight"] = torch.randn(48, EMBED)
        state[f"{box}test_cls_score.weight"] = self.text
        return state | {f"offline_{name}": value for name, value in self.offline.state_dict().items()}

    def image(self, path: Path) -> tuple[Tensor, int, int]:
        pixels = detection_utils.read_image(str(path), format="RGB")
        height, width = pixels.shape[:2]
        given = T.AugInput(pixels)
        T.AugmentationList([T.ResizeShortestEdge([SHORT, SHORT], LONG, "choice")])(given)
        return torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1))), height, width

    @torch.no_grad()
    def features(self, image: Tensor, boxes: Boxes) -> Tensor:
        """Returns [N, D] region features, not normalized."""
        mean, deviation = (torch.tensor(row)[:, None, None] for row in (MEAN, DEVIATION))
        x = ImageList.from_tensors([(image / 255.0 - mean) / deviation], 0).tensor
        tower = self.tower
        x = tower.layer3(tower.layer2(tower.layer1(tower.stem(x))))
        pooler = ROIPooler(self.side // 16, scales=(1 / 16,), sampling_ratio=0, pooler_type="ROIAlignV2")
        found: Tensor = tower.attnpool(tower.layer4(pooler([x], [boxes])))
        return found

    @torch.no_grad()
    def __call__(self, path: Path) -> Instances:
        """Returns detections in the original image's pixels."""
        image, height, width = self.image(path)
        proposals = self.proposals(image, width, height)
        features = self.features(image, proposals.proposal_boxes)
        cosines = F.normalize(features, dim=1) @ F.normalize(self.text, dim=1).T
        scores = (F.pad(cosines, (0, 1)) / 0.01).softmax(1)
        boxes = proposals.proposal_boxes.tensor
        if self.settings["deltas"]:
            boxes = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(self.boxes(features), boxes)
        if self.settings["multiply"]:
            scores = (scores * proposals.objectness_logits[:, None]) ** 0.5
        return detector_postprocess(self.pick(boxes, scores, image.shape[1:]), height, width)

    def proposals(self, image: Tensor, width: int, height: int) -> Instances:
        """Returns those of the offline network, or the true boxes brought into the frame."""
        if "truth" in self.settings:
            high, wide = image.shape[1:]
            boxes = self.settings["truth"] * torch.tensor([wide / width, high / height] * 2)
            return Instances((high, wide), proposal_boxes=Boxes(boxes.float()))
        shown = image.flip(0) - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
        batch = ImageList.from_tensors([shown], self.offline.backbone.size_divisibility)
        (found,), _ = self.offline.proposal_generator(batch, self.offline.backbone(batch.tensor))
        return found

    def pick(self, boxes: Tensor, scores: Tensor, size: Any) -> Instances:
        finite = boxes.isfinite().all(1) & scores.isfinite().all(1)
        clipped = Boxes(boxes[finite])
        clipped.clip(tuple(size))
        rows, labels = (scores[finite][:, :-1] > self.settings["threshold"]).nonzero().unbind(1)
        boxes, values = clipped.tensor[rows], scores[finite][rows, labels]
        if self.settings["soft"]:
            kept, values = soft_nms(boxes, values, labels)
        else:
            kept = batched_nms(boxes, values, labels, 0.5)
            values = values[kept]
        kept, values = kept[: self.settings["limit"]], values[: self.settings["limit"]]
        return Instances(tuple(size), pred_boxes=Boxes(boxes[kept]), scores=values, pred_classes=labels[kept])


def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian, σ 0.5: all classes in one queue, kept apart by moving each class's boxes elsewhere."""
    moved = boxes + labels[:, None] * (boxes.max() + 1)
    left, scores = torch.arange(len(scores)), scores.clone()
    kept, values = [], []
    while len(left):
        best = int(scores[left].argmax())
        first = left[best]
        kept.append(first)
        values.append(scores[first].clone())
        overlap = pairwise_iou(Boxes(moved[first][None]), Boxes(moved[left]))[0]
        scores[left] *= torch.exp(-(overlap**2) / 0.5)
        staying = scores[left] > 0.001
        staying[best] = False
        left = left[staying]
    return torch.stack(kept), torch.stack(values)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without loss, and annotations in COCO's format with COCO's categories."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(1)
    images = []
    for number, (height, width) in enumerate(SIZES, 1):
        coarse = torch.rand(1, 3, height // 12, width // 12, generator=generator)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0] * 255
        noisy = smooth + torch.randn(3, height, width, generator=generator) * 8
        pixels = noisy.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    categories = [{"id": 2 * index + 1, "name": name} for index, name in enumerate(COCO)]
    truth = [
        {"id": 10 * image["id"] + place, "image_id": image["id"], "category_id": 1, "bbox": [x, y, w, h],
         "area": w * h, "iscrowd": 0} for image in images for place, (x, y, w, h) in enumerate(TRUTH.tolist())
    ]  # fmt: skip
    write_json(folder / "instances.json", {"images": images, "annotations": truth, "categories": categories})
    return folder


def expected(
    released: Released, folder: Path, report: Callable[[Tensor], Tensor] = lambda scores: scores
) -> list[dict[str, Any]]:
    names = [name for name in COCO if name in set(parse_names("coco65"))]
    entries = []
    for number in range(1, len(SIZES) + 1):
        found = released(folder / f"{number}.png")
        boxes = BoxMode.convert(found.pred_boxes.tensor.numpy(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        entries += [
            {"image_id": number, "category_id": 2 * COCO.index(names[label]) + 1, "bbox": box, "score": score}
            for box, score, label in zip(
                boxes.tolist(), report(found.scores).tolist(), found.pred_classes.tolist(), strict=True
            )
        ]
    return entries


def assert_same_detections(found: list[dict[str, Any]], wanted: list[dict[str, Any]], limit: int) -> None:
    """Every detection has its like: image, name, score within 1e-4, corners within 0.02 pixels.

    Where scores are equal up to rounding it is rounding that decides which of two boxes suppresses the
    other, and which detection is the last of the `limit` best: such a detection may have another's like.
    """
    assert len(found) == len(wanted)
    assert len(wanted) > 100
    key = ("image_id", "category_id")
    mine = torch.tensor([[float(e[k]) for k in key] + e["bbox"] + [e["score"]] for e in found])
    theirs = torch.tensor([[float(e[k]) for k in key] + e["bbox"] + [e["score"]] for e in wanted])
    same = (mine[:, None, :2] == theirs[None, :, :2]).all(-1)
    near = (mine[:, None, 2:6] - theirs[None, :, 2:6]).abs().amax(-1) < 0.02
    apart = (mine[:, None, 6] - theirs[None, :, 6]).abs()
    alike = same & near & (apart < 1e-4)
    corners = [torch.cat([e[:, 2:4], e[:, 2:4] + e[:, 4:6]], 1) for e in (mine, theirs)]
    rivals = same & (apart < ROUNDING) & (pairwise_iou(*map(Boxes, corners)) > 0.5)
    for one, other, like in ((mine, theirs, alike | rivals), (theirs, mine, (alike | rivals).T)):
        for detection in one[~like.any(1)]:
            beside = other[other[:, 0] == detection[0], 6]
            assert len(beside) == limit, detection
            assert abs(detection[6] - beside.min()) < ROUNDING, detection
    assert (~alike.any(1)).sum() <= len(mine) // 50


def run(folder: Path, out: Path, config: str, *options: str) -> list[dict[str, Any]]:
    code = main_regionclip([
        "evaluate", str(CONFIGS / f"{config}.yaml"), f"annotations={folder / 'instances.json'}",
        f"images={folder}", f"out={out}", "split=coco", "protocol=coco", "report=false",
        f"resize.short=[{SHORT}]", f"resize.long={LONG}", "device=cpu",
        *options,
    ])  # fmt: skip
    assert code == 0
    entries: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return entries


def saved(state: dict[str, Tensor], path: Path) -> Path:
    """Writes a checkpoint as fvcore does."""
    torch.save({"model": state, "iteration": 89999, "scheduler": {"last_epoch": 90000}}, path)
    return path


@pytest.mark.parametrize("side", [SIDE, 288])
def test_region_features_are_the_released_codes(tmp_path: Path, photographs: Path, side: int) -> None:
    released = Released("c4", 65, side=side)  # 288: RoIAlign gives 18 cells a side, as RN50x4's
    path = saved(released.state(), tmp_path / "regionclip_finetuned-coco_rn50.pth")
    detector = load_published_detector(str(path), DetectorConfig())
    assert detector is not None
    for number in range(1, len(SIZES) + 1):
        image, _, _ = released.image(photographs / f"{number}.png")
        high, wide = image.shape[1:]
        drawn = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(number))
        corners = drawn * torch.tensor([wide, high])
        boxes = torch.cat([corners.amin(0), corners.amax(0)], 1)
        wanted = released.features(image, Boxes(boxes))
        regions = Regions(boxes, torch.zeros(len(boxes), dtype=torch.int64))
        batch = ImageBatch.whole(normalize(image[None]))
        with torch.no_grad():
            found, moves = detector.roi_heads(detector.feature_maps(batch), regions)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
            assert moves is not None
            torch.testing.assert_close(moves, released.boxes(wanted), rtol=0, atol=1e-4)
    assert wanted.std() > 0.1


def test_a_coco_detectors_detections_are_the_released_codes(tmp_path: Path, photographs: Path) -> None:
    released = Released("c4", 65, limit=3000)  # all, so that the thresholds decide
    weights = saved(released.state(), tmp_path / "regionclip_finetuned-coco_rn50.pth")
    rpn = saved(dict(released.offline.state_dict()), tmp_path / "rpn_coco_48.pth")
    torch.save(released.text, tmp_path / "coco_65_cls_emb.pth")
    found = run(
        photographs, tmp_path / "out", "published_coco_rn50", f"weights={weights}",
        f"proposer.weights={rpn}", f"proposer.limit={PROPOSALS}",
        f"embeddings={tmp_path / 'coco_65_cls_emb.pth'}",
        "detector.max_detections=3000",
    )  # fmt: skip
    assert_same_detections(found, expected(released, photographs), released.settings["limit"])


def test_an_lvis_detectors_detections_are_the_released_codes(tmp_path: Path, photographs: Path) -> None:
    released = Released("fpn_lsj", 65, multiply=True, threshold=0.02, limit=300)
    weights = saved(released.state(), tmp_path / "regionclip_finetuned-lvis_rn50.pth")
    rpn = saved(dict(released.offline.state_dict()), tmp_path / "rpn_lvis_866_lsj.pth")
    found = run(
        photographs, tmp_path / "out", "published_lvis_rn50", f"weights={weights}",
        f"proposer.weights={rpn}", f"proposer.limit={PROPOSALS}", "embeddings=",
    )  # fmt: skip
    wanted = expected(released, photographs, lambda scores: scores / (1 + scores))
    assert_same_detections(found, wanted, released.settings["limit"])


def test_zero_shot_detections_are_the_released_codes(tmp_path: Path, photographs: Path) -> None:
    released = Released("fpn", 65, multiply=True, deltas=False, soft=False, nms=0.9)
    state = {n: v for n, v in released.state().items() if n.startswith("backbone.")}
    weights = saved({**state, **words()}, tmp_path / "regionclip_pretrained-cc_rn50.pth")
    rpn = saved(dict(released.offline.state_dict()), tmp_path / "rpn_lvis_866.pth")
    torch.save(released.text, tmp_path / "coco_65_cls_emb.pth")
    found = run(
        photographs, tmp_path / "out", "published_coco_rn50_zeroshot", f"weights={weights}",
        f"proposer.weights={rpn}", f"proposer.limit={PROPOSALS}",
        f"embeddings={tmp_path / 'coco_65_cls_emb.pth'}",
    )  # fmt: skip
    wanted = expected(released, photographs, lambda scores: scores / (1 + scores))
    assert_same_detections(found, wanted, released.settings["limit"])


def test_true_boxes_are_named_and_suppressed_as_in_the_released_code(
    tmp_path: Path, photographs: Path
) -> None:
    corners = torch.cat([TRUTH[:, :2], TRUTH[:, :2] + TRUTH[:, 2:]], 1)
    released = Released("c4", 65, truth=corners, deltas=False, soft=False)
    state = {n: v for n, v in released.state().items() if n.startswith("backbone.")}
    weights = saved({**state, **words()}, tmp_path / "regionclip_pretrained-cc_rn50.pth")
    torch.save(released.text, tmp_path / "coco_65_cls_emb.pth")
    found = run(
        photographs, tmp_path / "out", "published_coco_rn50_truth", f"weights={weights}",
        f"embeddings={tmp_path / 'coco_65_cls_emb.pth'}",
    )  # fmt: skip
    assert_same_detections(found, expected(released, photographs), released.settings["limit"])


def words() -> dict[str, Tensor]:
    """Returns a small text tower by the released code's names."""
    from clip_base.models.configs import TextConfig
    from clip_base.models.text import TextTower

    tower = TextTower(TextConfig(width=64, heads=1, layers=1, context_length=16), EMBED, "quick_gelu")
    return {f"lang_encoder.{name}": value for name, value in tower.state_dict().items()}
