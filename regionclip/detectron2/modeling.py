"""The detector as one of detectron2's meta-architectures."""

# B images, H and W padded height and width
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from clip_base.images.decode import DEVIATION, MEAN, normalize
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from regionclip.checkpoints.load import look_for
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.detectron2.backbone import head_of, read_detector
from regionclip.detectron2.catalog import class_names
from regionclip.detectron2.config import (
    MODEL_VALUES,
    POOLER_RESOLUTION,
    ROI_VALUES,
    detector_config,
    require,
    stated,
    training_config,
)
from regionclip.detectron2.structures import from_images, from_proposals, from_truth
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig, postprocess, score, to_unit_interval
from regionclip.structures.boxes import clip_boxes
from regionclip.structures.regions import FeatureMaps
from regionclip.training.train_detector import DetectorTask, TrainDetectorConfig

RGB = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}  # where the channels of an input lie


@META_ARCH_REGISTRY.register()
class OpenVocabularyRCNN(GeneralizedRCNN):  # type: ignore[misc]
    """Backbone, proposals and RoI heads over pixels as CLIP wants them.

    Pixels are turned to RGB and normalized with CLIP's mean and deviation; MODEL.PIXEL_MEAN and PIXEL_STD,
    which belong to another backbone, are not read.

    Args:
        backbone: `ClipBackbone`, or one that takes the same pixels.
        proposal_generator: `RegionProposals`, or detectron2's own RPN on the backbone's maps.
        roi_heads: `OpenVocabularyROIHeads`.
        input_format: "RGB" or "BGR": the channels of the images that come in.
        vis_period: as in `GeneralizedRCNN`.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        input_format: str = "RGB",
        vis_period: int = 0,
    ) -> None:
        if input_format not in RGB:
            raise InputError(f"INPUT.FORMAT must be one of {', '.join(RGB)}, found {input_format!r}")
        super().__init__(
            backbone=backbone,
            proposal_generator=proposal_generator,
            roi_heads=roi_heads,
            pixel_mean=[255 * value for value in MEAN],
            pixel_std=[255 * value for value in DEVIATION],
            input_format=input_format,
            vis_period=vis_period,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds the parts that the config names.

        Raises:
            InputError: the config asks for masks, keypoints, proposals from a file or test-time augmentation.
        """
        require(stated(cfg, list(MODEL_VALUES)), MODEL_VALUES, "OpenVocabularyRCNN")
        parts: dict[str, Any] = super().from_config(cfg)
        return {key: value for key, value in parts.items() if not key.startswith("pixel_")}

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Returns the images in RGB, normalized for CLIP and padded."""
        channels = list(RGB[self.input_format])
        images = [normalize(item["image"].to(self.device)[channels]) for item in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    @property
    def names(self) -> tuple[str, ...]:
        """What is detected, in the order of `pred_classes`."""
        names: tuple[str, ...] = self.roi_heads.names
        return names

    @torch.no_grad()
    def set_vocabulary(self, names: Sequence[str], novel: Sequence[str] = ()) -> None:
        """Detects these names from now on; see `OpenVocabularyROIHeads.set_vocabulary`."""
        self.roi_heads.set_vocabulary(names, novel)


@ROI_HEADS_REGISTRY.register()
class OpenVocabularyROIHeads(nn.Module):
    """Names regions of the backbone's last map by the text embeddings of class names.

    Training sees the names of the training set, testing those of the test set: both are looked up in the
    catalog when they are first needed, and embedded with the model's own text tower.

    Args:
        weights: a CLIP or a detector, see `read_detector`.
        detector: scores and suppression.
        training: sampling and losses; what concerns data and backbone is not looked at.
        trained: whether there are a box head and a background; without, it detects zero-shot and cannot be
            trained.
        train_dataset: whose classes are trained.
        test_dataset: whose classes are detected, until `set_vocabulary` is called.
        text_weights: a CLIP whose text tower embeds names, for published detectors, which have none.
        feature: name of the map that regions are cut from.
        said: what a config says of things that are fixed here; an InputError where it is something else.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        weights: str,
        detector: DetectorConfig,
        training: TrainDetectorConfig,
        trained: bool = True,
        train_dataset: str = "",
        test_dataset: str = "",
        text_weights: str = "",
        feature: str = "res4",
        said: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        whole = read_detector(weights, detector, trained, training.box_head, text_weights)
        own = {**ROI_VALUES, POOLER_RESOLUTION: whole.clip.visual.region_size}
        require(said or {}, own, "OpenVocabularyROIHeads")
        if not hasattr(whole.clip, "text"):
            raise InputError(
                f"{weights} has no text tower; set MODEL.REGIONCLIP.TEXT_WEIGHTS to the CLIP that it was "
                "made from"
            )
        if whole.trained and not trained:
            raise InputError(f"{weights} is a trained detector; set MODEL.REGIONCLIP.TRAINED to True")
        head_of(whole.clip.visual)
        parts = (whole.box_head, whole.background, whole.resize)
        head, beside = whole.encoder.region_head, whole.student
        half = Detector(whole.clip, detector, None, *parts, region_head=head, student=beside, base=whole.base)
        self.detector, self.templates = half, training.templates
        # In a tuple, because the detector that it trains is registered already.
        self.tasks = (DetectorTask(half, half.classifier, training),) if trained else ()
        self.datasets = {True: train_dataset, False: test_dataset}
        self.feature = feature
        self._vocabularies: dict[bool, Vocabulary] = {}
        self._own_words = False
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Takes MODEL.REGIONCLIP and what detectron2's own keys say; see `regionclip.detectron2.config`."""
        own = cfg.MODEL.REGIONCLIP
        return {
            "weights": own.WEIGHTS,
            "detector": detector_config(cfg),
            "training": training_config(cfg),
            "trained": own.TRAINED,
            "train_dataset": next(iter(cfg.DATASETS.TRAIN), ""),
            "test_dataset": next(iter(cfg.DATASETS.TEST), ""),
            "text_weights": own.TEXT_WEIGHTS,
            "said": stated(cfg, [*ROI_VALUES, POOLER_RESOLUTION]),
        }

    @property
    def names(self) -> tuple[str, ...]:
        """What is detected, in the order of `pred_classes`."""
        return self._vocabulary(training=False).names

    def set_vocabulary(self, names: Sequence[str], novel: Sequence[str] = ()) -> None:
        """Detects these names from now on, whatever the test set's are.

        Args:
            names: C distinct names.
            novel: those of them that training did not see.
        """
        self._vocabularies[False] = self._embed(names, novel)
        self._own_words = True

    def use_dataset(self, name: str) -> None:
        """Detects the classes of this dataset from now on."""
        self.datasets[False] = name
        self._vocabularies.pop(False, None)
        self._own_words = False

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Returns detections in the batch's frame, or in training the weighted losses."""
        regions = from_proposals(proposals)
        maps = FeatureMaps(from_images(images), (features[self.feature],))
        vocabulary = self._vocabulary(self.training)
        if self.training:
            assert targets is not None
            if not self.tasks:
                raise InputError(
                    "a zero-shot model has nothing to train; set MODEL.REGIONCLIP.TRAINED to True"
                )
            (task,) = self.tasks
            task.classifier = vocabulary.embeddings.to(regions.boxes.device)
            losses = task.region_losses(maps, regions, from_truth(targets))
            return [], {"loss_cls": losses["classification"], "loss_box_reg": losses["box"]}
        detector = self.detector
        if detector.vocabulary is not vocabulary:
            look_for(detector, vocabulary, self.templates, self._own_words)
        background = detector.trained or detector.config.allow_background
        regions = detector.shortlist(maps, regions, background)
        probabilities, boxes = detector.classify(maps, regions, background)
        scores = score(regions, probabilities, detector.alpha, detector.config.fusion)
        found = []
        for slot, size in enumerate(images.image_sizes):
            mine = regions.image_index == slot
            found.append(self._instances(clip_boxes(boxes[mine], size), scores[mine], size))
        return found, {}

    def _instances(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Instances:
        config = self.detector.config
        boxes, values, labels = postprocess(boxes, scores, config)
        found = Instances(
            size, pred_boxes=Boxes(boxes), scores=to_unit_interval(values, config.fusion), pred_classes=labels
        )
        return found.to(scores.device)

    def _vocabulary(self, training: bool) -> Vocabulary:
        if training not in self._vocabularies:
            self._vocabularies[training] = self._embed(*class_names(self.datasets[training]))
        return self._vocabularies[training]

    def _embed(self, names: Sequence[str], novel: Sequence[str]) -> Vocabulary:
        clip = self.detector.clip
        # Without a split, the names that a detector's file says it was trained on are what is known.
        is_novel = torch.tensor([name in set(novel) for name in names]) if novel else None
        tokenizer = Tokenizer(clip.config.text.context_length)
        return embed(clip, tokenizer, names, self.templates, is_novel)


def _forget(heads: OpenVocabularyROIHeads, _: Any) -> None:
    """After new weights were loaded: names must be embedded again."""
    heads._vocabularies.clear()
