"""Regions of images and their names: mining, pretraining, open-vocabulary detection.

    predictor = regionclip.load("detector.safetensors", vocabulary=["cat", "dog"])
    detections = predictor.detect("photo.jpg")            # boxes in pixels of the photograph
    features = predictor.region_features("photo.jpg", detections.boxes)    # [N, D], unit length

The names are looked up when they are first used, so that `import regionclip` loads no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_base.lazy import lazy

if TYPE_CHECKING:
    from regionclip.detections import Detections as Detections
    from regionclip.detector import Detector as Detector
    from regionclip.predictor import Predictor as Predictor
    from regionclip.predictor import load as load
    from regionclip.vocabulary import Vocabulary as Vocabulary

__all__ = ["Detections", "Detector", "Predictor", "Vocabulary", "load"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Detections": "regionclip.detections",
        "Detector": "regionclip.detector",
        "Predictor": "regionclip.predictor",
        "Vocabulary": "regionclip.vocabulary",
        "load": "regionclip.predictor",
    },
)
