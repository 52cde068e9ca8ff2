"""Options added to detectron2's configs, and the mapping of its own keys to our options.

What detectron2 has a key for is set by that key; MODEL.REGIONCLIP holds the rest, with the meaning and the
default that the options of `regionclip train-detector` have. A key of what detectron2's own parts do and ours
do otherwise, or read from the weights' file, is refused unless it says what ours do: see `stated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from detectron2.config import CfgNode, get_cfg

from clip_base.runtime.errors import InputError
from regionclip.models.postprocess import DetectorConfig
from regionclip.training.train_detector import TrainDetectorConfig

OWN = "MODEL.REGIONCLIP."
# Our option: its key.
DETECTOR_KEYS = {
    "max_proposals": "MODEL.RPN.POST_NMS_TOPK_TEST",
    "proposal_nms": "MODEL.RPN.NMS_THRESH",
    "min_score": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "nms": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "max_detections": "TEST.DETECTIONS_PER_IMAGE",
    "max_embedded": f"{OWN}MAX_EMBEDDED",
    "temperature": f"{OWN}TEMPERATURE",
    "allow_background": f"{OWN}ALLOW_BACKGROUND",
    "negatives": f"{OWN}NEGATIVES",
    "fusion": f"{OWN}FUSION",
    "alpha_base": f"{OWN}ALPHA_BASE",
    "alpha_novel": f"{OWN}ALPHA_NOVEL",
    "nms_type": f"{OWN}NMS_TYPE",
    "soft_nms_sigma": f"{OWN}SOFT_NMS_SIGMA",
    "soft_nms_min_score": f"{OWN}SOFT_NMS_MIN_SCORE",
}
TRAINING_KEYS = {
    "max_proposals": "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "rois_per_image": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "positive_fraction": "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "box_weight": "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
    "smooth_l1_beta": "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
    "templates": f"{OWN}TEMPLATES",
    "background_weight": f"{OWN}BACKGROUND_WEIGHT",
    "focal_gamma": f"{OWN}FOCAL_GAMMA",
    "box_head": f"{OWN}BOX_HEAD",
    "background_embedding": f"{OWN}BACKGROUND_EMBEDDING",
}

NETWORK_KEYS = {
    "samples": "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "positive_fraction": "MODEL.RPN.POSITIVE_FRACTION",
    "smooth_l1_beta": "MODEL.RPN.SMOOTH_L1_BETA",
    "pre_nms": "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "min_size": "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
}
# What our parts do whatever the config says.
MODEL_VALUES = {
    "MODEL.MASK_ON": False,
    "MODEL.KEYPOINT_ON": False,
    "MODEL.LOAD_PROPOSALS": False,
    "TEST.AUG.ENABLED": False,
}
RPN_VALUES = {
    "MODEL.RPN.HEAD_NAME": "StandardRPNHead",
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.RPN.BOUNDARY_THRESH": -1,
    "MODEL.RPN.IOU_LABELS": [0, -1, 1],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
    "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
}
ROI_VALUES = {
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.IOU_LABELS": [0, 1],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": True,
    "MODEL.ROI_BOX_HEAD.NAME": "",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 0,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": False,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
}
# What the weights' file decides: the part compares it with what the config says.
ANCHOR_SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
ANCHOR_RATIOS = "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
HEAD_CONVS = "MODEL.RPN.CONV_DIMS"
POOLER_RESOLUTION = "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"


def add_regionclip_config(cfg: CfgNode) -> None:
    """Adds our keys to a config of detectron2, in place.

    MODEL.REGIONCLIP.WEIGHTS: a CLIP or a detector, in any form that is known here; gives all sizes and the
    first weights. MODEL.WEIGHTS may name a checkpoint of detectron2's that is loaded over them.
    MODEL.REGIONCLIP.TEXT_WEIGHTS: a CLIP whose text tower embeds names, for published detectors, which have
    none.
    MODEL.REGIONCLIP.RPN: the proposal network; empty: the detector's own.
    MODEL.REGIONCLIP.TRAINED: whether there are a box head and a background; False: zero-shot.
    DATASETS.OPEN_VOCABULARY: datasets to register, NAME: {ANNOTATIONS, IMAGES, SPLIT, PART}; see
    `regionclip.detectron2.register_dataset`.
    """
    own = CfgNode({"WEIGHTS": "", "TEXT_WEIGHTS": "", "RPN": "", "TRAINED": True})
    for defaults, keys in ((DetectorConfig(), DETECTOR_KEYS), (TrainDetectorConfig(), TRAINING_KEYS)):
        for name, key in keys.items():
            if key.startswith(OWN):
                own[key.removeprefix(OWN)] = getattr(defaults, name)
    cfg.MODEL.REGIONCLIP = own
    cfg.DATASETS.OPEN_VOCABULARY = CfgNode(new_allowed=True)


def detector_config(cfg: CfgNode) -> DetectorConfig:
    """Returns scores and suppression as a config of detectron2's says them."""
    return DetectorConfig(**_values(cfg, DETECTOR_KEYS))


def training_config(cfg: CfgNode) -> TrainDetectorConfig:
    """Returns sampling and losses of the RoI heads as a config of detectron2's says them.

    Raises:
        InputError: there is not one threshold of IoU between background and objects.
    """
    thresholds = list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS)
    if len(thresholds) != 1:
        raise InputError(f"MODEL.ROI_HEADS.IOU_THRESHOLDS must be one number, found {thresholds}")
    return TrainDetectorConfig(
        **_values(cfg, TRAINING_KEYS),
        positive_iou=thresholds[0],
        freeze_stages=0,
        freeze_batch_norm=cfg.MODEL.RESNETS.NORM == "FrozenBN",
    )


def network_options(cfg: CfgNode) -> dict[str, Any]:
    """Returns what a config of detectron2's says of a proposal network's sampling, losses and selection.

    Raises:
        InputError: there are not two thresholds of IoU, below which anchors are background and above which
            they are objects.
    """
    thresholds = list(cfg.MODEL.RPN.IOU_THRESHOLDS)
    if len(thresholds) != 2:
        raise InputError(f"MODEL.RPN.IOU_THRESHOLDS must be two numbers, found {thresholds}")
    low, high = thresholds
    return {**_values(cfg, NETWORK_KEYS), "negative_iou": low, "positive_iou": high}


def stated(cfg: CfgNode, keys: Sequence[str]) -> dict[str, Any]:
    """Returns the keys that a config sets to something else than detectron2's default, with their values."""
    names = {key: key for key in keys}
    found, defaults = _values(cfg, names), _values(get_cfg(), names)
    return {key: value for key, value in found.items() if _plain(value) != _plain(defaults[key])}


def require(stated: Mapping[str, Any], values: Mapping[str, Any], part: str) -> None:
    """Raises an InputError that lists the keys which say something else than a part of ours does.

    Args:
        stated: what the config says, see `stated`.
        values: what the part does, by the same keys.
        part: its name, for the message.
    """
    unlike = [key for key, value in stated.items() if _plain(value) != _plain(values[key])]
    if unlike:
        told = "; ".join(f"{key} is {stated[key]}, {part} has {values[key]}" for key in unlike)
        raise InputError(f"{told}. Remove from the config what {part} does not support")


def _plain(value: Any) -> Any:
    """Returns a value with its tuples as lists, which YAML and Python write for one another."""
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _values(cfg: CfgNode, keys: Mapping[str, str]) -> dict[str, Any]:
    return {name: reduce(getattr, key.split("."), cfg) for name, key in keys.items()}
