"""The open-vocabulary detector: proposals, region embeddings, a text-embedding classifier, fused scores."""

# B images, N regions of a batch, C names, D embedding size
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.box_head import BOX_HEADS, make_box_head
from regionclip.models.postprocess import DetectorConfig, postprocess, score, to_unit_interval
from regionclip.models.region_encoder import RegionEncoder
from regionclip.proposals.base import Proposer
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.boxes import clip_boxes, decode_deltas
from regionclip.structures.detections import Detections
from regionclip.structures.regions import ImageInfo, Regions
from regionclip.structures.transforms import ResizeConfig, ResizeTransform

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # Faster R-CNN's second stage


class Detector(nn.Module):
    """Detects what a vocabulary names.

    Args:
        clip: both towers; the text tower embeds new names.
        config: scores and suppression.
        network: the proposal network, with a backbone of its own or on the CLIP's trunk; None when proposals
            come from elsewhere.
        trained: whether the detector has a box head and a background, as training makes them. Without, boxes
            stay the proposals' and a region is always one of the names (zero-shot).
        boxes: what a trained detector's box head reads, one of `BOX_HEADS`.

    Attributes:
        box_head: moves boxes; None when zero-shot.
        background: [D], stands for "none of the names"; its length is free, and 0 unless it is learnt. None
            when zero-shot.
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
        boxes: str = "embedding",
    ) -> None:
        super().__init__()
        if boxes not in BOX_HEADS:
            raise ValueError(f"boxes must be one of {', '.join(BOX_HEADS)}, got {boxes!r}")
        self.clip, self.config, self.network, self.boxes = clip, config, network, boxes
        self.encoder = RegionEncoder(
            clip.visual, "roi_align" if isinstance(clip.visual, ModifiedResNet) else "crop"
        )
        width = clip.config.embed_dim
        self.trained = trained
        self.box_head = make_box_head(boxes, clip.config) if trained else None
        self.background = nn.Parameter(torch.zeros(width)) if trained else None
        self.resize: ResizeConfig | None = None
        self.vocabulary: Vocabulary | None = None
        self.register_buffer("classifier", torch.zeros(0, width), persistent=False)
        self.register_buffer("alpha", torch.zeros(0), persistent=False)

    @property
    def scale(self) -> float:
        """The factor on cosines."""
        if self.config.temperature:
            return 1 / self.config.temperature
        return float(self.clip.logit_scale.detach().exp())

    @property
    def shares_trunk(self) -> bool:
        """Whether proposals and embeddings come from one map."""
        return self.network is not None and self.network.config.share_trunk

    def set_vocabulary(self, vocabulary: Vocabulary, source: str = "the detector") -> None:
        """Makes the detector look for these names from now on.

        Args:
            vocabulary: C names and their embeddings.
            source: what has the width, for the message.

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
            background: whether a region may be none of the names. Its embedding has length 0 unless it was
                learnt: its logit is then 0 whatever the region (arXiv 2112.09106, section 4), as it is for a
                detector without one.
        """
        units = F.normalize(embeddings.float(), dim=-1)  # [N, D]
        cosines = units @ classifier.T
        if background:
            none = cosines.new_zeros(len(units)) if self.background is None else units @ self.background
            cosines = torch.cat([cosines, none[:, None]], 1)
        return self.scale * cosines

    def stages(self, images: ImageBatch) -> list[Tensor]:
        """Returns the maps of a ResNet tower that proposals and regions need, the regions' own last.

        Each is [B, channels, H / stride, W / stride] of `images`; the regions' own has stride 16.
        """
        visual = self.clip.visual
        assert isinstance(visual, ModifiedResNet)
        return visual.stages(images.pixels) if self.shares_trunk else [visual.trunk(images.pixels)]

    def propose(
        self, images: ImageBatch, stages: list[Tensor] | None = None, limit: int | None = None
    ) -> Regions:
        """Returns the proposals of the detector's own network.

        Args:
            images: B images.
            stages: their maps, for a network on the CLIP's trunk; None: they are computed.
            limit: most regions an image; None: the config's.

        Returns:
            N regions with boxes [N, 4] in pixels of the batch's frame, and their objectness.

        Raises:
            ValueError: the detector has none.
        """
        if self.network is None:
            raise ValueError("this detector has no proposal network; give it a proposer")
        maps = stages if self.shares_trunk else None
        limit = limit or self.config.max_proposals
        return self.network.propose(images, limit, self.config.proposal_nms, maps=maps)

    def heads(self, feature_map: Tensor, regions: Regions) -> tuple[Tensor, Tensor | None]:
        """Returns regions' [N, D] embeddings, not normalised, and how their boxes move: [N, 4], or None.

        Args:
            feature_map: the regions' own of `stages`.
            regions: N regions in the images that it shows.
        """
        visual, head = self.clip.visual, self.box_head
        assert isinstance(visual, ModifiedResNet)
        embeddings, moves = [], []
        for deep in self.encoder.layer4_features(feature_map, regions):  # [n, C, s, s]
            embeddings.append(visual.attnpool(deep).float())
            if head is not None:
                moves.append(head(embeddings[-1] if self.boxes == "embedding" else deep).float())
        return torch.cat(embeddings), torch.cat(moves) if moves else None

    @torch.no_grad()
    def classify(
        self, images: ImageBatch, regions: Regions, background: bool, stages: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Names regions: [N, C] probabilities, and their [N, 4] boxes, moved when the detector is trained.

        Args:
            images: B images.
            regions: N regions in them.
            background: whether a region may be none of the names; rows then sum to less than 1.
            stages: the images' maps as `stages` gives them; None: they are computed.
        """
        moves = None
        if isinstance(self.clip.visual, ModifiedResNet):
            embeddings, moves = self.heads((stages or self.stages(images))[-1], regions)
        else:
            embeddings = self.encoder(images, regions)
        with torch.autocast(embeddings.device.type, enabled=False):
            probabilities = self.logits(embeddings, self.classifier, background).softmax(1)
            boxes = regions.boxes
            if moves is not None:
                boxes = decode_deltas(boxes, moves, DELTA_WEIGHTS)
        return probabilities[:, : len(self.classifier)], boxes

    @torch.no_grad()
    def detect_batch(
        self,
        images: ImageBatch,
        frames: Sequence[ResizeTransform],
        keys: Sequence[ImageInfo],
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

        Raises:
            ValueError: no vocabulary is set, or there is neither a proposer nor a network.
        """
        if self.vocabulary is None:
            raise ValueError("no vocabulary is set; call set_vocabulary first")
        stages = self.stages(images) if isinstance(self.clip.visual, ModifiedResNet) else None
        regions = self.propose(images, stages) if proposer is None else proposer(images, keys)
        background = self.trained or self.config.allow_background
        probabilities, boxes = self.classify(images, regions, background, stages)
        scores = score(regions, probabilities, self.alpha, self.config.fusion)
        return [
            self._select(boxes[mine], scores[mine], frame)
            for mine, frame in ((regions.image_index == slot, frame) for slot, frame in enumerate(frames))
        ]

    def _select(self, boxes: Tensor, scores: Tensor, frame: ResizeTransform) -> Detections:
        """Picks one image's detections from [n, 4] boxes and [n, C] scores."""
        assert self.vocabulary is not None
        boxes, values, labels = postprocess(clip_boxes(boxes, frame.size), scores, self.config)
        originals = clip_boxes(frame.invert_boxes(boxes), frame.original)
        values = to_unit_interval(values, self.config.fusion)
        return Detections(originals, values, labels, self.vocabulary.names, frame.original)
