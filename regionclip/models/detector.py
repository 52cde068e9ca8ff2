"""The open-vocabulary detector: proposals, region embeddings, a text-embedding classifier, fused scores."""

# B images, N regions of a batch, C names, D embedding size
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.box_head import BoxHead, make_box_head
from regionclip.models.postprocess import (
    DetectorConfig,
    best_names,
    best_of_each_image,
    postprocess,
    score,
    to_unit_interval,
)
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.region_heads import PerRegionHead
from regionclip.models.student import FrozenStudent
from regionclip.proposals.base import Proposer
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.boxes import clip_boxes, decode_deltas
from regionclip.structures.detections import Detections
from regionclip.structures.regions import FeatureMaps, ImageInfo, Regions
from regionclip.structures.transforms import ResizeConfig, ResizeTransform

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # Faster R-CNN's second stage


class Detector(nn.Module):
    """Detects what a vocabulary names.

    It is whole when it is made: only its vocabulary changes afterwards. `clip`, `network`, `box_head`,
    `background` and `student` are keys of saved files.

    Args:
        clip: both towers; the text tower embeds new names.
        config: scores and suppression.
        network: the proposal network, with a backbone of its own or on the CLIP's trunk; None when proposals
            come from elsewhere.
        box_head: moves boxes; None when zero-shot: boxes stay the proposals'.
        background: [D], stands for "none of the names"; its length is free, and 0 unless it is learned. None
            when zero-shot: a region is always one of the names, unless the config says otherwise.
        resize: the size at which it sees images.
        class_embeddings: [C, D], the embeddings of names that a RegionCLIP file brings along, without the
            names.
        region_head: how a ResNet tower embeds regions, one of `REGION_HEADS`: the one that the weights were
            trained with.
        student: a frozen CLIP whose probabilities are combined with the detector's; see `with_student`.
        base: the names that it was trained on; names of a vocabulary that does not say which are novel count
            as novel if they are not among these. Empty: not known, none counts as novel.

    Attributes:
        encoder: embeds regions with the CLIP's vision tower.
        vocabulary: what it looks for; None until `set_vocabulary` is called.
        negatives: [M, D], what competes with it; see `set_vocabulary`, as for the next.
        one_name: whether a region is returned under its best name alone.

    Raises:
        ValueError: a box head without a background or without a tower whose map it could read, or the other
            way round.
        InputError: the tower has no such region head, or its maps would not cover images padded as `resize`
            says.
    """

    classifier: Tensor
    negatives: Tensor
    student_negatives: Tensor
    alpha: Tensor
    novel: Tensor

    def __init__(
        self,
        clip: CLIP,
        config: DetectorConfig,
        network: ProposalNetwork | None = None,
        box_head: BoxHead | None = None,
        background: nn.Parameter | None = None,
        resize: ResizeConfig | None = None,
        class_embeddings: Tensor | None = None,
        region_head: str = PerRegionHead.kind,
        student: FrozenStudent | None = None,
        base: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.encoder = RegionEncoder.of_maps(clip.visual, otherwise="crop", region_head=region_head)
        if config.max_embedded and self.encoder.region_head != PerRegionHead.kind:
            raise InputError(
                f"max_embedded={config.max_embedded} is for region_head={PerRegionHead.kind}: the other head "
                "embeds every region at the cost of the first score; set it to 0"
            )
        if (box_head is None) != (background is None):
            raise ValueError("a detector has a box head and a background, or neither")
        if box_head is not None and not self.encoder.pools_maps:
            raise ValueError("a box head needs a ResNet tower")
        self.clip, self.config, self.network = clip, config, network
        self.box_head, self.background, self.student = box_head, background, student
        self.base = tuple(base)
        self.resize = resize or ResizeConfig()
        self.encoder.check_padding(self.resize.multiple)
        if student is not None:
            student.encoder.check_padding(self.resize.multiple)
        self.class_embeddings = class_embeddings
        self.vocabulary: Vocabulary | None = None
        self.one_name = False
        width = clip.config.embed_dim
        self.register_buffer("classifier", torch.zeros(0, width), persistent=False)
        self.register_buffer("negatives", torch.zeros(0, width), persistent=False)
        self.register_buffer("student_negatives", torch.zeros(0, width), persistent=False)
        self.register_buffer("alpha", torch.zeros(0), persistent=False)
        self.register_buffer("novel", torch.zeros(0, dtype=torch.bool), persistent=False)

    @classmethod
    def untrained(
        cls,
        clip: CLIP,
        config: DetectorConfig,
        network: ProposalNetwork | None = None,
        boxes: str = "embedding",
        resize: ResizeConfig | None = None,
        class_embeddings: Tensor | None = None,
        region_head: str = PerRegionHead.kind,
    ) -> Detector:
        """Returns a detector with a new box head and background, to be trained or filled from a file.

        Args:
            clip: with a ResNet tower.
            config: see the class, as for the rest.
            network: see the class.
            boxes: the name of the box head, see `make_box_head`.
            resize: see the class.
            class_embeddings: [C, D], see the class.
            region_head: see the class.
        """
        background = nn.Parameter(torch.zeros(clip.config.embed_dim))
        head = make_box_head(boxes, clip.config)
        return cls(clip, config, network, head, background, resize, class_embeddings, region_head)

    def with_network(self, network: ProposalNetwork) -> Detector:
        """Returns a detector of the same parts with this proposal network."""
        return self._of_parts(network, self.student)

    def with_clip(self, clip: CLIP) -> Detector:
        """Returns a detector of the same parts with another CLIP.

        Args:
            clip: its vision tower is this detector's own, whose maps the box head and a network may read.
        """
        return self._of_parts(self.network, self.student, clip)

    def with_student(self, student: FrozenStudent | None) -> Detector:
        """Returns a detector of the same parts that combines its probabilities with a frozen CLIP's.

        Args:
            student: the frozen CLIP, with the same text tower; see `load_student`. None: it stands alone.
        """
        return self._of_parts(self.network, student)

    def _of_parts(
        self, network: ProposalNetwork | None, student: FrozenStudent | None, clip: CLIP | None = None
    ) -> Detector:
        head = (self.box_head, self.background, self.resize, self.class_embeddings, self.encoder.region_head)
        return Detector(clip or self.clip, self.config, network, *head, student, self.base)

    def compile_trunks(self) -> None:
        """Compiles the trunks of a ResNet and of its student with torch.compile."""
        self.encoder.compile()
        if self.student is not None:
            self.student.encoder.compile()

    @property
    def trained(self) -> bool:
        """Whether it has a box head and a background, as training makes them; else it is zero-shot."""
        return self.box_head is not None

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

    def set_vocabulary(
        self,
        vocabulary: Vocabulary,
        source: str = "the detector",
        negatives: Tensor | None = None,
        one_name: bool = False,
        student_negatives: Tensor | None = None,
    ) -> None:
        """Makes the detector look for these names from now on.

        Args:
            vocabulary: C names and their embeddings.
            source: what has the width, for the message.
            negatives: [M, D], unit length, names that share the probabilities and are not reported; see
                `regionclip.concepts.negatives`. None: there are none.
            one_name: whether a region is returned under its best name alone.
            student_negatives: [M, D], the same for the student alone, which has no background of its own.

        Raises:
            InputError: the embeddings do not have the detector's width.
        """
        vocabulary.require_width(self.clip.config.embed_dim, source)
        self.vocabulary, self.one_name = vocabulary, one_name
        self.classifier = vocabulary.embeddings.to(self.classifier.device)
        none = self.classifier.new_zeros(0, self.classifier.shape[1])
        self.negatives = none if negatives is None else negatives.to(self.classifier.device)
        self.student_negatives = (
            none if student_negatives is None else student_negatives.to(self.classifier.device)
        )
        novel = vocabulary.novel
        if novel is None:
            known = {_spelled(name) for name in self.base}
            novel = torch.tensor([bool(known) and _spelled(name) not in known for name in vocabulary.names])
        self.novel = novel.to(self.classifier.device)
        alphas = torch.where(novel, self.config.alpha_novel, self.config.alpha_base)
        self.alpha = alphas.to(self.classifier.device)

    def logits(self, embeddings: Tensor, classifier: Tensor, background: bool) -> Tensor:
        """Returns [N, C] logits, or [N, C + 1] with the background last.

        Args:
            embeddings: [N, D], not necessarily of unit length.
            classifier: [C, D], unit length.
            background: whether a region may be none of the names. Its embedding has length 0 unless it was
                learned: its logit is then 0 whatever the region (arXiv 2112.09106, section 4), as it is for a
                detector without one.
        """
        units = F.normalize(embeddings.float(), dim=-1)  # [N, D]
        cosines = units @ classifier.T
        if background:
            none = cosines.new_zeros(len(units)) if self.background is None else units @ self.background
            cosines = torch.cat([cosines, none[:, None]], 1)
        return self.scale * cosines

    def _all_names(self) -> Tensor:
        """Returns [C + M, D], the names that are looked for and the negatives."""
        return torch.cat([self.classifier, self.negatives.to(self.classifier.dtype)])

    @property
    def asks_student(self) -> bool:
        """Whether there is a student that knows this vocabulary; regions that were shown are of one tower."""
        shown = self.vocabulary is not None and self.vocabulary.negatives is not None
        return self.student is not None and not shown

    def combined(self, probabilities: Tensor, images: ImageBatch, regions: Regions) -> Tensor:
        """Returns [N, C], probabilities of names at regions, combined with the student's if it is asked.

        Args:
            probabilities: [N, C], the detector's own.
            images: B images.
            regions: N regions in their frame.
        """
        if self.student is None or not self.asks_student:
            return probabilities
        names = torch.cat([self._all_names(), self.student_negatives.to(self.classifier.dtype)])
        return self.student.combine(probabilities, images, regions, names, self.novel)

    def feature_maps(self, images: ImageBatch) -> FeatureMaps:
        """Returns the images with the maps that proposals and regions need."""
        return self.encoder.feature_maps(images, every_level=self.shares_trunk)

    def propose(self, maps: FeatureMaps, limit: int | None = None) -> Regions:
        """Returns the proposals of the detector's own network.

        Args:
            maps: B images and their maps; see `feature_maps`.
            limit: most regions per image; None: the config's.

        Returns:
            N regions with boxes [N, 4] in pixels of the batch's frame, and their objectness.

        Raises:
            ValueError: the detector has none.
        """
        if self.network is None:
            raise ValueError("this detector has no proposal network; give it a proposer")
        return self.network.propose(maps, limit or self.config.max_proposals, self.config.proposal_nms)

    def roi_heads(self, maps: FeatureMaps, regions: Regions) -> tuple[Tensor, Tensor | None]:
        """Returns regions' [N, D] embeddings, and how their boxes move: [N, 4], or None when zero-shot.

        The embeddings of a tower whose head pools maps are not normalized.

        Args:
            maps: of the images that the regions are in.
            regions: N regions.
        """
        if not self.encoder.pools_maps:
            return self.encoder(maps.images, regions), None
        head = None if self.box_head is None else self.box_head.deltas
        return self.encoder.roi_heads(maps, regions, head)

    @torch.no_grad()
    def classify(self, maps: FeatureMaps, regions: Regions, background: bool) -> tuple[Tensor, Tensor]:
        """Names regions: [N, C] probabilities, and their [N, 4] boxes, moved when the detector is trained.

        Args:
            maps: of the images that the regions are in; see `feature_maps`.
            regions: N regions.
            background: whether a region may be none of the names; rows then sum to less than 1.
        """
        embeddings, deltas = self.roi_heads(maps, regions)
        with torch.autocast(embeddings.device.type, enabled=False):
            probabilities = self.logits(embeddings, self._all_names(), background).softmax(1)
            boxes = regions.boxes
            if deltas is not None:
                boxes = decode_deltas(boxes, deltas, DELTA_WEIGHTS)
        probabilities = probabilities[:, : len(self.classifier)]
        return self.combined(probabilities, maps.images, regions), boxes

    @torch.no_grad()
    def shortlist(self, maps: FeatureMaps, regions: Regions, background: bool) -> Regions:
        """Returns the `max_embedded` regions of each image that are worth the region head; 0: all.

        The first score is the detector's own, with embeddings of the shared head: layer4 runs once on the
        whole image. The weights were not trained for these, but they rank well enough to leave regions out.

        Args:
            maps: of the images that the regions are in.
            regions: N regions.
            background: see `classify`.
        """
        if not self.config.max_embedded or not self.encoder.pools_maps:
            return regions
        embeddings = self.encoder.rough_embeddings(maps, regions)
        with torch.autocast(embeddings.device.type, enabled=False):
            probabilities = self.logits(embeddings, self._all_names(), background).softmax(1)
        scores = score(regions, probabilities[:, : len(self.classifier)], self.alpha, self.config.fusion)
        return regions[best_of_each_image(regions, scores, self.config.max_embedded)]

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
            frames: how each is in the batch's frame.
            keys: which images they are, for proposers that look boxes up.
            proposer: proposer of regions; None: the detector's own network.

        Returns:
            B detections, boxes in the original images' frames, best first.

        Raises:
            ValueError: no vocabulary is set, or there is neither a proposer nor a network.
        """
        if self.vocabulary is None:
            raise ValueError("no vocabulary is set; call set_vocabulary first")
        maps = self.feature_maps(images)
        regions = self.propose(maps) if proposer is None else proposer(images, keys)
        background = self.trained or self.config.allow_background
        regions = self.shortlist(maps, regions, background)
        probabilities, boxes = self.classify(maps, regions, background)
        scores = score(regions, probabilities, self.alpha, self.config.fusion)
        return [
            self._select(boxes[mine], scores[mine], frame)
            for mine, frame in ((regions.image_index == slot, frame) for slot, frame in enumerate(frames))
        ]

    def _select(self, boxes: Tensor, scores: Tensor, frame: ResizeTransform) -> Detections:
        """Picks one image's detections from [n, 4] boxes and [n, C] scores."""
        assert self.vocabulary is not None
        if self.one_name:
            scores = best_names(scores)
        boxes, values, labels = postprocess(clip_boxes(boxes, frame.size), scores, self.config)
        originals = clip_boxes(frame.invert_boxes(boxes), frame.original)
        values = to_unit_interval(values, self.config.fusion)
        return Detections(originals, values, labels, self.vocabulary.names, frame.original)


def _spelled(name: str) -> str:
    """Returns a name as prompts read it, whatever its case: underscores are spaces."""
    return " ".join(name.replace("_", " ").split()).casefold()
