"""The open-vocabulary detector: proposals, region embeddings, a text-embedding classifier, fused scores."""

# B images, N regions of a batch, C names, D embedding size
from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base import config as configs
from clip_base.batch import ImageBatch
from clip_base.checkpoint import load_exactly, read_weights, write_weights
from clip_base.config import option
from clip_base.errors import InputError
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig
from clip_base.models.resnet import ModifiedResNet
from regionclip.boxes import clip_boxes, decode_deltas, nms, soft_nms, valid_boxes
from regionclip.encoder import RegionEncoder
from regionclip.proposals.base import ImageKey, Proposer
from regionclip.proposals.network import ProposalNetwork, ProposalNetworkConfig
from regionclip.structures import Detections, Regions
from regionclip.transforms import Frame, ResizeConfig
from regionclip.vocabulary import Vocabulary

FORMAT = "regionclip.detector/1"
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # Faster R-CNN's second stage


@dataclass
class DetectorConfig:
    """How regions become detections."""

    proposals: int = option(100, "regions an image from the detector's own proposal network")
    proposal_nms: float = option(0.7, "IoU above which the lower scored of two proposals is dropped")
    temperature: float = option(0.0, "what cosines are divided by; 0: the tower's own, 1 / exp(logit scale)")
    alpha_base: float = option(0.5, "exponent of objectness in the score of base names, in [0, 1]")
    alpha_novel: float = option(0.5, "exponent of objectness in the score of novel names, in [0, 1]")
    min_score: float = option(0.001, "detections that score less are dropped")
    suppression: str = option(
        "soft", "nms drops overlapping boxes, soft lowers their scores", choices=("soft", "nms")
    )
    nms: float = option(
        0.5, "suppression=nms: IoU above which the lower scored of two boxes of a name is dropped"
    )
    sigma: float = option(0.5, "suppression=soft: width of the Gaussian")
    detections: int = option(100, "most detections an image")
    candidates: int = option(1000, "best (region, name) pairs an image that go into suppression")

    def __post_init__(self) -> None:
        for name in ("alpha_base", "alpha_novel"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], found {getattr(self, name)}")


class Detector(nn.Module):
    """Detects what a vocabulary names.

    Args:
        clip: both towers; the text tower embeds new names.
        config: scores and suppression.
        network: the proposal network; None when proposals come from elsewhere.
        trained: whether the detector has a box head and a background, as training makes them. Without, boxes
            stay the proposals' and a region is always one of the names (zero-shot).

    Attributes:
        resize: the size of images that it was trained on; None when it was not trained.
    """

    classifier: Tensor
    alpha: Tensor

    def __init__(
        self,
        clip: CLIP,
        config: DetectorConfig,
        network: ProposalNetwork | None = None,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.clip, self.config, self.network = clip, config, network
        self.encoder = RegionEncoder(
            clip.visual, "roi_align" if isinstance(clip.visual, ModifiedResNet) else "crop"
        )
        width = clip.config.embed_dim
        self.box_head = nn.Linear(width, 4) if trained else None
        self.trained = trained
        self.resize: ResizeConfig | None = None
        self.vocabulary: Vocabulary | None = None
        self.register_buffer("classifier", torch.zeros(0, width), persistent=False)
        self.register_buffer("alpha", torch.zeros(0), persistent=False)
        if self.box_head is not None:
            nn.init.normal_(self.box_head.weight, std=0.001)
            nn.init.zeros_(self.box_head.bias)

    @property
    def scale(self) -> float:
        """The factor on cosines."""
        if self.config.temperature:
            return 1 / self.config.temperature
        return float(self.clip.logit_scale.detach().exp())

    def set_vocabulary(self, vocabulary: Vocabulary, source: str = "the detector") -> None:
        """Makes the detector look for these names from now on.

        Raises:
            InputError: the embeddings do not have the detector's width.
        """
        vocabulary.require_width(self.clip.config.embed_dim, source)
        self.vocabulary = vocabulary
        self.classifier = vocabulary.embeddings.to(self.classifier.device)
        novel = (
            torch.zeros(len(vocabulary.names), dtype=torch.bool)
            if vocabulary.novel is None
            else vocabulary.novel
        )
        alphas = torch.where(novel, self.config.alpha_novel, self.config.alpha_base)
        self.alpha = alphas.to(self.classifier.device)

    def logits(self, embeddings: Tensor, classifier: Tensor, background: bool) -> Tensor:
        """Returns [N, C] logits, or [N, C + 1] with the background last.

        Args:
            embeddings: [N, D], not necessarily of unit length.
            classifier: [C, D], unit length.
            background: whether a region may be none of the names. The background's embedding has length 0, so
                that its logit is 0 whatever the region (arXiv 2112.09106, section 4).
        """
        cosines = F.normalize(embeddings.float(), dim=-1) @ classifier.T
        return F.pad(self.scale * cosines, (0, 1)) if background else self.scale * cosines

    def propose(self, images: ImageBatch) -> Regions:
        """Returns the proposals of the detector's own network."""
        if self.network is None:
            raise ValueError("this detector has no proposal network; give it a proposer")
        return self.network.propose(images, self.config.proposals, self.config.proposal_nms)

    @torch.no_grad()
    def classify(self, images: ImageBatch, regions: Regions, background: bool) -> tuple[Tensor, Tensor]:
        """Names regions: [N, C] probabilities, and their [N, 4] boxes, moved when the detector is trained.

        Args:
            images: B images.
            regions: N regions in them.
            background: whether a region may be none of the names; rows then sum to less than 1.
        """
        if isinstance(self.clip.visual, ModifiedResNet):
            embeddings = self.encoder.of_map(self.clip.visual.trunk(images.pixels), regions).float()
        else:
            embeddings = self.encoder(images, regions)
        boxes = regions.boxes
        with torch.autocast(boxes.device.type, enabled=False):
            probabilities = self.logits(embeddings, self.classifier, background).softmax(1)
            if self.box_head is not None:
                boxes = decode_deltas(boxes, self.box_head(embeddings), DELTA_WEIGHTS)
        return probabilities[:, : len(self.classifier)], boxes

    @torch.no_grad()
    def detect_batch(
        self,
        images: ImageBatch,
        frames: Sequence[Frame],
        keys: Sequence[ImageKey],
        proposer: Proposer | None = None,
    ) -> list[Detections]:
        """Detects in a batch.

        Args:
            images: B images.
            frames: how each lies in the batch's frame.
            keys: which images they are, for proposers that look boxes up.
            proposer: where regions come from; None: the detector's own network.

        Returns:
            B detections, boxes in the original images' frames, best first.
        """
        if self.vocabulary is None:
            raise ValueError("no vocabulary is set; call set_vocabulary first")
        regions = self.propose(images) if proposer is None else proposer(images, keys)
        probabilities, boxes = self.classify(images, regions, self.trained)
        objectness = (
            torch.ones(len(regions), device=boxes.device) if regions.scores is None else regions.scores
        )
        scores = fuse(objectness, probabilities, self.alpha)
        found = []
        for slot, frame in enumerate(frames):
            mine = regions.image_index == slot
            inside = clip_boxes(boxes[mine], frame.size)
            found.append(self._select(inside.cpu(), scores[mine].cpu(), frame))
        return found

    def _select(self, boxes: Tensor, scores: Tensor, frame: Frame) -> Detections:
        """Picks one image's detections from [n, 4] boxes and [n, C] scores."""
        config = self.config
        assert self.vocabulary is not None
        scores = scores * valid_boxes(boxes)[:, None]
        flat = scores.flatten()
        best = flat.topk(min(config.candidates, len(flat))).indices
        best = best[flat[best] >= config.min_score]
        rows, labels = best // scores.shape[1], best % scores.shape[1]
        boxes, values = boxes[rows], flat[best]
        if config.suppression == "soft":
            kept, values = soft_nms(boxes, values, labels, config.sigma, config.min_score)
        else:
            kept = nms(boxes, values, labels, config.nms)
            values = values[kept]
        kept, values = kept[: config.detections], values[: config.detections]
        originals = clip_boxes(frame.boxes_out(boxes[kept]), frame.original)
        return Detections(originals, values, labels[kept], self.vocabulary.names, frame.original)


def fuse(objectness: Tensor, probabilities: Tensor, alpha: Tensor) -> Tensor:
    """Returns [N, C] scores objectness^α · p^(1−α), in [0, 1].

    Args:
        objectness: [N] in [0, 1].
        probabilities: [N, C] in [0, 1].
        alpha: [C] in [0, 1].
    """
    return objectness[:, None] ** alpha * probabilities ** (1 - alpha)


def save_detector(detector: Detector, path: str | Path, base: Sequence[str]) -> None:
    """Writes a trained detector whole: towers, proposal network, box head, and the base names it learned."""
    if detector.network is None:
        raise ValueError("a detector without its proposal network cannot be used from a file")
    proposals = {**dataclasses.asdict(detector.network.config), "backbone_weights": ""}
    metadata = {
        "format": FORMAT,
        "clip": json.dumps(dataclasses.asdict(detector.clip.config)),
        "proposals": json.dumps(proposals),
        "detector": json.dumps(dataclasses.asdict(detector.config)),
        "resize": json.dumps(dataclasses.asdict(detector.resize or ResizeConfig())),
        "base": json.dumps(list(base)),
    }
    write_weights(path, detector.state_dict(), metadata)


def load_detector(path: str | Path, config: DetectorConfig | None = None) -> tuple[Detector, tuple[str, ...]]:
    """Reads what `save_detector` wrote: the detector in evaluation mode, and its base names.

    Args:
        path: the file.
        config: scores and suppression; None: as they were when it was trained.

    Raises:
        InputError: the file is missing, damaged, no detector, or its tensors do not fit.
    """
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds {metadata.get('format', 'unnamed weights')!r}, expected {FORMAT!r}")
    where = f"sizes in {path}"
    clip = CLIP(configs.check(CLIPConfig, json.loads(metadata["clip"]), where))
    network = ProposalNetwork(configs.check(ProposalNetworkConfig, json.loads(metadata["proposals"]), where))
    settings = config or configs.check(DetectorConfig, json.loads(metadata["detector"]), where)
    detector = Detector(clip, settings, network, trained=True)
    load_exactly(detector, weights, path)
    detector.resize = configs.check(ResizeConfig, json.loads(metadata["resize"]), where)
    detector.eval().to(memory_format=torch.channels_last)
    return detector, tuple(json.loads(metadata["base"]))
