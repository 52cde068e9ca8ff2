"""Every key of detectron2's that concerns our parts is read, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.runtime.errors import InputError
from regionclip.checkpoints.load import read_detector_file

pytest.importorskip("detectron2")

from detectron2.modeling import build_model

from regionclip.detectron2.backbone import to_detector

MakeCfg = Callable[..., Any]

REFUSED = {
    "MODEL.MASK_ON": True,
    "MODEL.KEYPOINT_ON": True,
    "MODEL.LOAD_PROPOSALS": True,
    "TEST.AUG.ENABLED": True,
    "MODEL.RPN.BOUNDARY_THRESH": 0,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.RPN.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    "MODEL.RPN.CONV_DIMS": [-1, -1],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    "MODEL.ROI_HEADS.IOU_LABELS": [1, 0],
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (20.0, 20.0, 10.0, 10.0),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": True,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_asks_for_something_else_is_refused_by_name(
    key: str, detector_file: Path, make_cfg: MakeCfg
) -> None:
    with pytest.raises(InputError, match=rf"{key} is .*, \w+ has "):
        build_model(make_cfg(detector_file, {key: REFUSED[key]}))


def test_all_that_is_refused_is_said_at_once(detector_file: Path, make_cfg: MakeCfg) -> None:
    keys = ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT")
    with pytest.raises(InputError) as caught:
        build_model(make_cfg(detector_file, {key: REFUSED[key] for key in keys}))
    assert all(key in str(caught.value) for key in keys)


def test_sizes_that_agree_with_the_file_are_taken(detector_file: Path, make_cfg: MakeCfg) -> None:
    network = read_detector_file(detector_file)[0].network
    assert network is not None
    sizes, levels = network.config.anchor_sizes, len(network.config.strides)
    each = len(sizes) // levels
    same = {
        "MODEL.ANCHOR_GENERATOR.SIZES": [sizes[level * each : (level + 1) * each] for level in range(levels)],
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    }
    build_model(make_cfg(detector_file, same))


def test_what_is_read_reaches_the_parts(detector_file: Path, make_cfg: MakeCfg) -> None:
    changes = {
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 64,
        "MODEL.RPN.POSITIVE_FRACTION": 0.25,
        "MODEL.RPN.IOU_THRESHOLDS": [0.2, 0.6],
        "MODEL.RPN.SMOOTH_L1_BETA": 0.5,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 40,
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 3,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.25,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.6],
    }
    model = build_model(make_cfg(detector_file, changes))
    proposals, (task,) = model.proposal_generator, model.roi_heads.tasks
    found = proposals.network.config
    assert (found.samples, found.positive_fraction, found.negative_iou, found.positive_iou) == (
        64,
        0.25,
        0.2,
        0.6,
    )
    assert (found.smooth_l1_beta, found.pre_nms, found.min_size) == (0.5, 40, 3)
    assert proposals.network.rpn.fg_bg_sampler.batch_size_per_image == 64
    assert proposals.pre_nms == {True: 50, False: 40}
    assert (task.config.smooth_l1_beta, task.config.positive_iou) == (0.25, 0.6)
    whole = to_detector(model)
    assert whole.network is not None
    assert whole.network.config == found


def test_fewer_anchors_before_suppression_give_fewer_proposals(
    detector_file: Path, make_cfg: MakeCfg, world: Path
) -> None:
    import torch
    from detectron2.data import DatasetCatalog

    from regionclip.detectron2.mapper import RegionMapper

    changes = {"MODEL.RPN.PRE_NMS_TOPK_TEST": 2, "MODEL.RPN.NMS_THRESH": 1.0}
    cfg = make_cfg(detector_file, changes)
    model, sample = build_model(cfg).eval(), RegionMapper(cfg, False)(DatasetCatalog.get("world_all_test")[0])
    with torch.no_grad():
        images = model.preprocess_image([sample])
        (found,), _ = model.proposal_generator(images, model.backbone(images.tensor))
    assert len(found) == 2 * model.proposal_generator.network.levels
