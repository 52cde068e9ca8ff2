"""The options that detectron2's configs get, and where its own keys say what ours mean.

What detectron2 has a key for is set by that key; MODEL.REGIONCLIP holds the rest, with the meaning and the
default that the options of `regionclip train-detector` have.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from detectron2.config import CfgNode

from regionclip.scoring import DetectorConfig
from regionclip.train_detector import TrainDetectorConfig

OWN = "MODEL.REGIONCLIP."
# Our option: its key.
DETECTOR_KEYS = {
    "proposals": "MODEL.RPN.POST_NMS_TOPK_TEST",
    "proposal_nms": "MODEL.RPN.NMS_THRESH",
    "min_score": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "nms": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "detections": "TEST.DETECTIONS_PER_IMAGE",
    "temperature": f"{OWN}TEMPERATURE",
    "background": f"{OWN}ZERO_SHOT_BACKGROUND",
    "fusion": f"{OWN}FUSION",
    "alpha_base": f"{OWN}ALPHA_BASE",
    "alpha_novel": f"{OWN}ALPHA_NOVEL",
    "suppression": f"{OWN}SUPPRESSION",
    "sigma": f"{OWN}SIGMA",
    "prune": f"{OWN}PRUNE",
}
TRAINING_KEYS = {
    "proposals": "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "rois": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "positive_share": "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "box_weight": "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
    "templates": f"{OWN}TEMPLATES",
    "background_weight": f"{OWN}BACKGROUND_WEIGHT",
    "focal": f"{OWN}FOCAL",
    "boxes": f"{OWN}BOXES",
    "background": f"{OWN}BACKGROUND",
}


def add_regionclip_config(cfg: CfgNode) -> None:
    """Adds our keys to a config of detectron2, in place.

    MODEL.REGIONCLIP.WEIGHTS: a CLIP or a detector, in any form that is known here; gives all sizes and the
    first weights. MODEL.WEIGHTS may name a checkpoint of detectron2's that is loaded over them.
    MODEL.REGIONCLIP.TEXT: a CLIP whose text tower embeds names, for published detectors, which have none.
    MODEL.REGIONCLIP.RPN: the proposal network; empty: the detector's own.
    MODEL.REGIONCLIP.TRAINED: whether there are a box head and a background; False: zero-shot.
    DATASETS.OPEN_VOCABULARY: datasets to register, NAME: {ANNOTATIONS, IMAGES, SPLIT, PART}; see
    `regionclip.detectron2.register_dataset`.
    """
    own = CfgNode({"WEIGHTS": "", "TEXT": "", "RPN": "", "TRAINED": True})
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
    """Returns sampling and losses of the RoI heads as a config of detectron2's says them."""
    return TrainDetectorConfig(
        **_values(cfg, TRAINING_KEYS),
        positive_iou=cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0],
        freeze_stages=0,
        freeze_batch_norm=cfg.MODEL.RESNETS.NORM == "FrozenBN",
    )


def _values(cfg: CfgNode, keys: dict[str, str]) -> dict[str, Any]:
    return {name: reduce(getattr, key.split("."), cfg) for name, key in keys.items()}
