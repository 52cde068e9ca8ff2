"""Regions of images and their names: mining, pretraining, open-vocabulary detection.

    predictor = regionclip.load("detector.safetensors", vocabulary=["cat", "dog"])
    detections = predictor.detect("photo.jpg")            # boxes in pixels of the photograph
    features = predictor.region_features("photo.jpg", detections.boxes)    # [N, D], unit length

The names are looked up when they are first used, so that `import regionclip` loads no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regionclip.detector import Detector as Detector
    from regionclip.predictor import Predictor as Predictor
    from regionclip.predictor import load as load
    from regionclip.structures import Detections as Detections
    from regionclip.vocabulary import Vocabulary as Vocabulary

__all__ = ["Detections", "Detector", "Predictor", "Vocabulary", "load"]

_PLACES = {
    "Detections": "regionclip.structures",
    "Detector": "regionclip.detector",
    "Predictor": "regionclip.predictor",
    "Vocabulary": "regionclip.vocabulary",
    "load": "regionclip.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
