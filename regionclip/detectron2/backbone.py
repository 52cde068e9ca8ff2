"""Our weights in detectron2's components: the tower split into trunk and head, and joined again.

As in detectron2's C4 models the backbone ends where the RoI heads begin: stem to layer3 belong to the
backbone, layer4 and the attention pool to the RoI heads, with the text tower that makes the classifier.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from clip_base.models.bottleneck import EXPANSION
from clip_base.models.clip import CLIP, make_vision_tower
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime.errors import InputError
from clip_base.weights.native import load_exactly
from regionclip.checkpoints.load import load_detector
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.student import FrozenStudent
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.transforms import ResizeConfig
from regionclip.training.region_text import freeze

HEAD = ("layer4", "attnpool")
HELD = (("backbone", "tower"), ("proposal_generator", "network"), ("roi_heads", "detector"))
# Where the parts of a model keep what a `Detector` holds, and its own names for it.
PLACES = {
    "backbone.tower.": "clip.visual.",
    "proposal_generator.network.": "network.",
    "roi_heads.detector.": "",
}
STAGES = ("res2", "res3", "res4")  # detectron2's names of the maps after layer1, layer2 and layer3
TRUNK_STAGES = 4  # of `freeze`: the stem and three layers


def read_detector(
    weights: str,
    config: DetectorConfig,
    trained: bool = True,
    box_head: str = "embedding",
    text_weights: str = "",
) -> Detector:
    """Reads a detector, or makes one of a CLIP.

    Args:
        weights: a detector or a CLIP in any form that `regionclip evaluate weights=` takes.
        config: scores and suppression.
        trained: whether a CLIP gets a box head and a background, to be trained; a detector has them.
        box_head: what a new box head reads.
        text_weights: a CLIP whose text tower embeds names, for published detectors, which have none.

    Raises:
        InputError: the file is missing, damaged, of no known format, or its vision tower is no ResNet.
    """
    if not weights:
        raise InputError("MODEL.REGIONCLIP.WEIGHTS is empty; give a CLIP or a detector")
    detector = load_detector(weights, config, use_checkpoint_config=False, text_weights=text_weights)
    if detector.clip.map_tower is None:
        raise InputError(
            f"{weights}: detectron2's parts need a ResNet tower, which can be cut between trunk and head; "
            "this one is a ViT"
        )
    if trained and not detector.trained:
        head = detector.encoder.region_head
        return Detector.untrained(detector.clip, config, boxes=box_head, region_head=head).eval()
    return detector


def trunk_of(visual: ModifiedResNet) -> ModifiedResNet:
    """Takes a ResNet tower's head away, in place."""
    for name in HEAD:
        delattr(visual, name)
    return visual


def head_of(visual: nn.Module) -> nn.Module:
    """Takes a ResNet tower's trunk away, in place."""
    for name in [name for name, _ in visual.named_children() if name not in HEAD]:
        delattr(visual, name)
    return visual


def to_detector(model: nn.Module, resize: ResizeConfig | None = None) -> Detector:
    """Puts a detector together from the parts of an `OpenVocabularyRCNN`; it shares nothing with them.

    Args:
        model: in which the parts are.
        resize: the size at which the detector sees images.

    Raises:
        InputError: a part of the model is not ours.
    """
    parts: Any = model
    held = [getattr(getattr(parts, part, None), name, None) for part, name in HELD]
    if not all(held):
        theirs = ", ".join(type(getattr(parts, part, None)).__name__ for part, _ in HELD)
        raise InputError(
            f"a detector of ours needs our backbone, proposal generator and RoI heads; these are {theirs}"
        )
    network: ProposalNetwork = parts.proposal_generator.network
    half: Detector = parts.roi_heads.detector
    clip = CLIP(half.clip.config)
    own = ProposalNetwork(network.config, clip.map_tower if network.config.share_trunk else None)
    head = half.encoder.region_head
    if half.box_head is None:
        whole = Detector(clip, half.config, own, resize=resize, region_head=head, base=half.base)
    else:
        whole = Detector.untrained(clip, half.config, own, half.box_head.kind, resize, region_head=head)
        whole.base = half.base
    if half.student is not None:
        tower, beside = make_vision_tower(clip.config), half.student
        whole = whole.with_student(
            FrozenStudent(tower, beside.scale, beside.config, beside.encoder.region_head)
        )
    load_exactly(whole, to_our_names(model.state_dict()), "of the model's parts")
    return whole.eval()


def to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of an `OpenVocabularyRCNN` to a `Detector`'s."""
    renamed = {}
    for key, value in state.items():
        theirs, ours = next(place for place in PLACES.items() if key.startswith(place[0]))
        renamed[ours + key.removeprefix(theirs)] = value
    return renamed


@BACKBONE_REGISTRY.register()
class ClipBackbone(Backbone):  # type: ignore[misc]
    """Stem to layer3 of a CLIP's ResNet; takes pixels that are normalized for CLIP.

    Args:
        weights: a CLIP or a detector, see `read_detector`.
        freeze_at: stages kept as they are, counted as detectron2 does: 0 none, 1 the stem, 2 also layer1
            (res2), … 4 also layer3 (res4); what is beyond belongs to the RoI heads.
        freeze_batch_norm: freeze the statistics and gains of batch norms.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, weights: str, freeze_at: int = 2, freeze_batch_norm: bool = True) -> None:
        super().__init__()
        whole = read_detector(weights, DetectorConfig()).clip.map_tower
        assert whole is not None
        tower = trunk_of(whole)
        freeze(tower, min(freeze_at, TRUNK_STAGES), freeze_batch_norm)
        self.tower = tower
        width = tower.trunk_channels // (4 * EXPANSION)
        self._out_features = list(STAGES)
        self._out_feature_strides = {name: 4 * 2**level for level, name in enumerate(STAGES)}
        self._out_feature_channels = {name: width * EXPANSION * 2**level for level, name in enumerate(STAGES)}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Takes MODEL.REGIONCLIP.WEIGHTS, MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.NORM."""
        return {
            "weights": cfg.MODEL.REGIONCLIP.WEIGHTS,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "freeze_batch_norm": cfg.MODEL.RESNETS.NORM == "FrozenBN",
        }

    @property
    def size_divisibility(self) -> int:
        """Padded sides are multiples of 32 pixels, as in our own batches."""
        return 32

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps [B, 3, H, W] to {"res2": [B, C, H/4, W/4], "res3": …, "res4": [B, 4C, H/16, W/16]}."""
        return dict(zip(STAGES, self.tower.stages(pixels), strict=True))
