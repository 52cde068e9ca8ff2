"""The model of small.yaml for detectron2's LazyConfig, trained with AdamW.

tools/train_net.py --config-file configs/detectron2/world/small.py sources.weights=clip/model.safetensors \
    sources.rpn=rpn/model.safetensors
"""

from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.model_zoo import get_config
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from regionclip.detectron2 import (
    ClipBackbone,
    OpenVocabularyEvaluator,
    OpenVocabularyRCNN,
    OpenVocabularyROIHeads,
    RegionMapper,
    RegionProposals,
)
from regionclip.models.postprocess import DetectorConfig
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.train_detector import TrainDetectorConfig

STEPS, SIDE = 250, 128

sources = {"weights": "", "rpn": ""}
datasets = {
    "world_b_train": {
        "annotations": "world/instances_train.json",
        "images": "world/images",
        "split": "world/split.json",
        "part": "base",
    },
    "world_all_test": {
        "annotations": "world/instances_val.json",
        "images": "world/images",
        "split": "world/split.json",
        "part": "all",
    },
}

model = L(OpenVocabularyRCNN)(
    backbone=L(ClipBackbone)(weights="${sources.weights}", freeze_at=2),
    proposal_generator=L(RegionProposals)(
        weights="${sources.weights}", rpn="${sources.rpn}", limits=(30, 30)
    ),
    roi_heads=L(OpenVocabularyROIHeads)(
        weights="${sources.weights}",
        detector=L(DetectorConfig)(max_proposals=30),
        training=L(TrainDetectorConfig)(max_proposals=30, rois_per_image=16, freeze_stages=0),
        train_dataset="world_b_train",
        test_dataset="world_all_test",
    ),
)

resize = L(TrainingResizeConfig)(short=[SIDE], long=SIDE)
dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="world_b_train"),
        mapper=L(RegionMapper)(is_train=True, resize=resize),
        total_batch_size=16,
        num_workers=2,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="world_all_test", filter_empty=False),
        mapper=L(RegionMapper)(is_train=False, resize=resize),
        num_workers=2,
    ),
    "evaluator": L(OpenVocabularyEvaluator)(dataset="world_all_test", out="${train.output_dir}/inference"),
}

optimizer = get_config("common/optim.py").AdamW
optimizer.update(lr=3e-4, weight_decay=0.05)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0], milestones=[], num_updates=STEPS),
    warmup_factor=0.001,
    warmup_length=20 / STEPS,
)
train = get_config("common/train.py").train
train.update(device="cpu", max_iter=STEPS, output_dir="output/world_lazy")
