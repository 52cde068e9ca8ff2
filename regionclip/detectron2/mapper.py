"""From dataset dicts to model inputs with our resizing, so that both trainings see the same pixels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, BoxMode, Instances

from clip_base.images.decode import decode
from clip_base.images.orientation import turned_as_annotated, turned_upright
from clip_base.runtime.errors import InputError
from regionclip.structures.transforms import TrainingResizeConfig, random_resize, resize_shortest_edge


class RegionMapper:
    """Reads an image, resizes and mirrors it with its boxes: RGB, area averaging, as in our own training.

    Args:
        is_train: whether to draw sizes and mirroring, and to hand over the true boxes.
        resize: sizes; without training the first short side is used.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, is_train: bool, resize: TrainingResizeConfig) -> None:
        # A LazyConfig hands over lists of its own kind, which cannot be written into a detector's file.
        self.is_train, self.resize = is_train, dataclasses.replace(resize, short=list(resize.short))

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        """Takes the sizes from cfg.INPUT.

        Raises:
            InputError: cropping, vertical mirroring or sizes drawn from a range, which this mapper does not
                do.
        """
        given = cfg.INPUT
        unlike = {
            "CROP.ENABLED": given.CROP.ENABLED,
            "RANDOM_FLIP": given.RANDOM_FLIP not in ("horizontal", "none"),
            "MIN_SIZE_TRAIN_SAMPLING": given.MIN_SIZE_TRAIN_SAMPLING != "choice",
        }
        for key in (key for key, is_unlike in unlike.items() if is_unlike):
            raise InputError(f"INPUT.{key} is not supported by RegionMapper; remove it, or use DatasetMapper")
        short = given.MIN_SIZE_TRAIN if is_train else given.MIN_SIZE_TEST
        return {
            "is_train": is_train,
            "resize": TrainingResizeConfig(
                short=list(short) if isinstance(short, Sequence) else [short],
                long=given.MAX_SIZE_TRAIN if is_train else given.MAX_SIZE_TEST,
                flip=given.RANDOM_FLIP == "horizontal",
            ),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the dict with `image` [3, h, w] uint8 RGB and, for training, `instances` without crowds."""
        mapped = copy.deepcopy(dataset_dict)
        annotations = mapped.pop("annotations", [])
        path = mapped["file_name"]
        pixels = decode(path)
        if "height" in mapped and "width" in mapped:
            pixels = turned_as_annotated(pixels, path, (mapped["height"], mapped["width"]))
        else:
            pixels = turned_upright(pixels, path)
            mapped["height"], mapped["width"] = pixels.shape[:2]
        if self.is_train:
            pixels, frame = random_resize(pixels, self.resize, torch.default_generator)
        else:
            pixels, frame = resize_shortest_edge(
                pixels, self.resize.short[0], self.resize.long, filter=self.resize.filter
            )
        mapped["image"] = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.is_train:
            single = [entry for entry in annotations if not entry.get("iscrowd")]
            boxes = torch.tensor([_corners(entry) for entry in single], dtype=torch.float32).reshape(-1, 4)
            labels = torch.tensor([entry["category_id"] for entry in single], dtype=torch.int64)
            seen = frame.visible(boxes) >= self.resize.jitter.visible
            mapped["instances"] = Instances(
                frame.size, gt_boxes=Boxes(frame.apply_boxes(boxes[seen])), gt_classes=labels[seen]
            )
        return mapped


def _corners(entry: dict[str, Any]) -> list[float]:
    return list(BoxMode.convert(list(entry["bbox"]), entry["bbox_mode"], BoxMode.XYXY_ABS))
