"""Our weights as detectron2's parts hold them: the tower cut where regions enter, and put together again.

As in detectron2's C4 models the backbone ends where the RoI heads begin: stem to layer3 belong to the
backbone, layer4 and the attention pool to the RoI heads, with the text tower that makes the classifier.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clip_base.checkpoint import load_exactly
from clip_base.errors import InputError
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet
from regionclip.detector import Detector, DetectorConfig
from regionclip.evaluate import load_any
from regionclip.proposals.network import ProposalNetwork

HEAD = ("layer4", "attnpool")
HELD = (("backbone", "tower"), ("proposal_generator", "network"), ("roi_heads", "detector"))
# Where the parts of a model keep what a `Detector` holds, and its own names for it.
PLACES = {
    "backbone.tower.": "clip.visual.",
    "proposal_generator.network.": "network.",
    "roi_heads.detector.": "",
}


def read_detector(
    weights: str, config: DetectorConfig, trained: bool = True, boxes: str = "embedding", text: str = ""
) -> Detector:
    """Reads a detector, or makes one of a CLIP.

    Args:
        weights: a detector or a CLIP in any form that `regionclip evaluate weights=` takes.
        config: scores and suppression.
        trained: whether a CLIP gets a box head and a background, to be trained; a detector has them.
        boxes: what a new box head reads.
        text: a CLIP whose text tower embeds names, for published detectors, which have none.

    Raises:
        InputError: the file is missing, damaged, of no known form, or its vision tower is no ResNet.
    """
    if not weights:
        raise InputError("MODEL.REGIONCLIP.WEIGHTS is empty; give a CLIP or a detector")
    detector = load_any(weights, config, own_settings=False, text=text)
    if not isinstance(detector.clip.visual, ModifiedResNet):
        raise InputError(
            f"{weights}: detectron2's parts need a ResNet tower, which can be cut between trunk and head; "
            "this one is a ViT"
        )
    if trained and not detector.trained:
        return Detector(detector.clip, config, trained=True, boxes=boxes).eval()
    return detector


def trunk_of(visual: nn.Module) -> nn.Module:
    """Takes a ResNet tower's head away, in place."""
    for name in HEAD:
        delattr(visual, name)
    return visual


def head_of(visual: nn.Module) -> nn.Module:
    """Takes a ResNet tower's trunk away, in place."""
    for name in [name for name, _ in visual.named_children() if name not in HEAD]:
        delattr(visual, name)
    return visual


def to_detector(model: nn.Module) -> Detector:
    """Puts a detector together from the parts of an `OpenVocabularyRCNN`; it shares nothing with them.

    Raises:
        InputError: a part of the model is not ours.
    """
    parts: Any = model
    held = [getattr(getattr(parts, part, None), name, None) for part, name in HELD]
    if not all(held):
        theirs = ", ".join(type(getattr(parts, part, None)).__name__ for part, _ in HELD)
        raise InputError(
            f"a detector of ours needs our backbone, proposals and RoI heads; these are {theirs}"
        )
    network: ProposalNetwork = parts.proposal_generator.network
    half: Detector = parts.roi_heads.detector
    clip = CLIP(half.clip.config)
    shared = clip.visual if network.config.share_trunk else None
    assert shared is None or isinstance(shared, ModifiedResNet)
    whole = Detector(clip, half.config, ProposalNetwork(network.config, shared), half.trained, half.boxes)
    load_exactly(whole, to_our_names(model.state_dict()), "of the model's parts")
    return whole.eval()


def to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of an `OpenVocabularyRCNN` to a `Detector`'s."""
    renamed = {}
    for key, value in state.items():
        theirs, ours = next(place for place in PLACES.items() if key.startswith(place[0]))
        renamed[ours + key.removeprefix(theirs)] = value
    return renamed
