"""Region-text mining, region pretraining and open-vocabulary detection.

    predictor = regionclip.load("detector.safetensors", vocabulary=["cat", "dog"])
    detections = predictor.detect("photo.jpg")            # boxes in pixels of the image
    features = predictor.region_features("photo.jpg", detections.boxes)    # [N, D], unit length

The names are looked up when they are first used, so that `import regionclip` loads no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_base.runtime.lazy import lazy

if TYPE_CHECKING:
    from regionclip.concepts.vocabulary import Vocabulary
    from regionclip.inference.predictor import Predictor, load
    from regionclip.mining.matchers.base import Matcher, Matches, MatchInputs
    from regionclip.models.detector import Detector
    from regionclip.proposals.base import Proposer
    from regionclip.structures.detections import Detections
    from regionclip.structures.regions import ImageInfo, RegionBatch, Regions

__all__ = [
    "Detections",
    "Detector",
    "ImageInfo",
    "MatchInputs",
    "Matcher",
    "Matches",
    "Predictor",
    "Proposer",
    "RegionBatch",
    "Regions",
    "Vocabulary",
    "load",
]
__version__: str  # looked up as the names are

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Detections": "regionclip.structures.detections",
        "Detector": "regionclip.models.detector",
        "ImageInfo": "regionclip.structures.regions",
        "MatchInputs": "regionclip.mining.matchers.base",
        "Matcher": "regionclip.mining.matchers.base",
        "Matches": "regionclip.mining.matchers.base",
        "Predictor": "regionclip.inference.predictor",
        "Proposer": "regionclip.proposals.base",
        "RegionBatch": "regionclip.structures.regions",
        "Regions": "regionclip.structures.regions",
        "Vocabulary": "regionclip.concepts.vocabulary",
        "load": "regionclip.inference.predictor",
    },
)
