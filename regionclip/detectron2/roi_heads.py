"""Layer4, attention pool, text-embedding classifier and box head as detectron2's RoI heads."""

# B images, N regions in all, C names
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from clip_base.errors import InputError
from clip_base.tokenizer import Tokenizer
from regionclip.boxes import clip_boxes
from regionclip.detector import Detector, DetectorConfig
from regionclip.detectron2.catalog import class_names
from regionclip.detectron2.config import (
    POOLER_RESOLUTION,
    ROI_VALUES,
    detector_config,
    require,
    stated,
    training_config,
)
from regionclip.detectron2.structures import from_images, from_proposals, from_truth
from regionclip.detectron2.weights import head_of, read_detector
from regionclip.scoring import reported, score, select
from regionclip.train_detector import DetectorTask, TrainDetectorConfig
from regionclip.vocabulary import Vocabulary, embed


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
        text: a CLIP whose text tower embeds names, for published detectors, which have none.
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
        text: str = "",
        feature: str = "res4",
        said: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        whole = read_detector(weights, detector, trained, training.boxes, text)
        own = {**ROI_VALUES, POOLER_RESOLUTION: whole.clip.visual.region_size}
        require(said or {}, own, "OpenVocabularyROIHeads")
        if not hasattr(whole.clip, "text"):
            raise InputError(
                f"{weights} brings no text tower; set MODEL.REGIONCLIP.TEXT to the CLIP that it was made from"
            )
        if whole.trained and not trained:
            raise InputError(f"{weights} is a trained detector; set MODEL.REGIONCLIP.TRAINED to True")
        head_of(whole.clip.visual)
        half = Detector(whole.clip, detector, None, trained, whole.boxes)
        half.load_state_dict({key: value for key, value in whole.state_dict().items() if _is_head(key)})
        self.detector, self.templates = half, training.templates
        # In a tuple, because the detector that it trains is registered already.
        self._task = (DetectorTask(half, half.classifier, training),) if trained else ()
        self.datasets = {True: train_dataset, False: test_dataset}
        self.feature = feature
        self._vocabularies: dict[bool, Vocabulary] = {}
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
            "text": own.TEXT,
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

    def use_dataset(self, name: str) -> None:
        """Detects the classes of this dataset from now on."""
        self.datasets[False] = name
        self._vocabularies.pop(False, None)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Returns detections in the batch's frame, or in training the weighted losses."""
        regions = from_proposals(proposals)
        vocabulary = self._vocabulary(self.training)
        if self.training:
            assert targets is not None
            if not self._task:
                raise InputError(
                    "a zero-shot model has nothing to train; set MODEL.REGIONCLIP.TRAINED to True"
                )
            (task,) = self._task
            task.classifier = vocabulary.embeddings.to(regions.boxes.device)
            losses = task.region_losses(features[self.feature], regions, from_truth(targets))
            return [], {"loss_cls": losses["classification"], "loss_box_reg": losses["box"]}
        detector = self.detector
        if detector.vocabulary is not vocabulary:
            detector.set_vocabulary(vocabulary)
        batch = from_images(images)
        background = detector.trained or detector.config.background
        probabilities, boxes = detector.classify(batch, regions, background, [features[self.feature]])
        scores = score(regions, probabilities, detector.alpha, detector.config.fusion)
        found = []
        for slot, size in enumerate(images.image_sizes):
            mine = regions.image_index == slot
            found.append(self._instances(clip_boxes(boxes[mine], size), scores[mine], size))
        return found, {}

    def _instances(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Instances:
        config = self.detector.config
        boxes, values, labels = select(boxes, scores, config)
        found = Instances(
            size, pred_boxes=Boxes(boxes), scores=reported(values, config.fusion), pred_classes=labels
        )
        return found.to(scores.device)

    def _vocabulary(self, training: bool) -> Vocabulary:
        if training not in self._vocabularies:
            self._vocabularies[training] = self._embed(*class_names(self.datasets[training]))
        return self._vocabularies[training]

    def _embed(self, names: Sequence[str], novel: Sequence[str]) -> Vocabulary:
        clip = self.detector.clip
        is_novel = torch.tensor([name in set(novel) for name in names])
        tokenizer = Tokenizer(clip.config.text.context_length)
        return embed(clip, tokenizer, names, self.templates, is_novel)


def _is_head(key: str) -> bool:
    return not key.startswith("network.")


def _forget(heads: OpenVocabularyROIHeads, _: Any) -> None:
    """After new weights came: names must be embedded anew."""
    heads._vocabularies.clear()
