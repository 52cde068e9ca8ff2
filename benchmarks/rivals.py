"""The detectors that people would choose instead, with random weights and one call: images to boxes.

Each detector sees the image at the size that it was made for. What does not depend on the image is computed
before the clock starts: the names' embeddings of OWL-ViT and of ours. Grounding DINO mixes words and image,
so its text encoder runs every time.
"""

# B images, Q boxes of an image, C names
from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rates import waiting
from rounds import alternate, shown
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.runtime.precision import autocast, computes_in_bf16
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.regions import ImageInfo
from regionclip.structures.transforms import ResizeTransform

IMAGE = 480, 640  # pixels of the images that all detectors are given, height and width
BASELINE = "OWL-ViT B/32, 768 px"
Detect = Callable[[int], object]  # of a batch of so many images

C4 = ProposalNetworkConfig(
    backbone="resnet50",
    design="c4",
    strides=[16],
    anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0],
    pre_nms=6000,
    nms=0.95,  # the best of random scores lie close together: at the published 0.7 no thousand boxes are left
    merge_levels=False,
)


@dataclass(frozen=True)
class Design:
    """One of our detectors.

    Attributes:
        short: pixels of the image's short side.
        proposals: per image.
        own_backbone: whether the proposal network has a ResNet-50 of its own, as published.
        region_head: per_region, as published, or shared.
    """

    short: int
    proposals: int
    own_backbone: bool
    region_head: str

    def __str__(self) -> str:
        name = {
            (True, "per_region"): "RegionCLIP's released design",
            (False, "per_region"): "ours, shared trunk, per-region head",
            (False, "shared"): "ours, shared trunk and head",
        }[self.own_backbone, self.region_head]
        return f"{name}, {self.short} px, {self.proposals:,} proposals"


DESIGNS = [Design(short, 300, own, "per_region") for own in (True, False) for short in (480, 800)]
DESIGNS += [Design(480, 300, False, "shared"), Design(800, 300, False, "shared")]
DESIGNS += [Design(800, 1000, True, "per_region"), Design(800, 1000, False, "shared")]


def make_detector(
    model: str, proposals: int, own_backbone: bool, region_head: str = "per_region", device: str = "cpu"
) -> Detector:
    """Returns a detector with random weights."""
    torch.manual_seed(0)
    clip = CLIP(zoo.config(model))
    sizes, trunk = C4, None
    if not own_backbone:
        sizes = ProposalNetworkConfig(
            vision=clip.config.vision,
            share_trunk=True,
            design="c4",
            strides=[16],
            anchor_sizes=C4.anchor_sizes,
            pre_nms=C4.pre_nms,
            nms=C4.nms,
            merge_levels=False,
        )
        trunk = clip.map_tower
    network = ProposalNetwork(sizes, trunk)
    # The anchors themselves are proposed: random moves leave hardly a box that no other hides.
    nn.init.zeros_(network.rpn.head.bbox_pred.weight)
    config = DetectorConfig(max_proposals=proposals, proposal_nms=C4.nms, temperature=0.01)
    detector = Detector.untrained(clip, config, network, region_head=region_head)
    return detector.eval().to(device).to(memory_format=torch.channels_last)


@torch.no_grad()
def spread(detector: Detector, images: ImageBatch) -> None:
    """Takes out what all regions' embeddings share, so that different names win as with trained weights."""
    maps = detector.feature_maps(images)
    embeddings, _ = detector.roi_heads(maps, detector.propose(maps, 50))
    visual: Any = detector.clip.visual
    visual.attnpool.c_proj.bias -= embeddings.mean(0)


def vocabulary_of(size: int, width: int) -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embeddings = nn.functional.normalize(torch.randn(size, width, generator=generator), dim=1)
    return Vocabulary(tuple(f"thing {number}" for number in range(size)), embeddings)


def ours(design: Design, names: int, device: torch.device) -> Detect:
    detector = make_detector("RN50", design.proposals, design.own_backbone, design.region_head, str(device))
    detector.set_vocabulary(vocabulary_of(names, detector.clip.config.embed_dim))
    size = design.short, round(design.short * IMAGE[1] / IMAGE[0])
    pixels = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    spread(detector, ImageBatch.pad([pixels], 32).to(device))

    def detect(count: int) -> object:
        images = ImageBatch.pad([pixels] * count, 32).to(device)
        keys = [ImageInfo(slot, *size) for slot in range(count)]
        return detector.detect_batch(images, [ResizeTransform(size, size)] * count, keys)

    return detect


def owl(kind: str, patch: int, side: int, names: int, device: torch.device) -> Detect:
    """OWL-ViT (arXiv 2205.06230) or OWLv2 (arXiv 2306.09683) of transformers, names embedded beforehand."""
    import transformers

    torch.manual_seed(0)
    vision = {"patch_size": patch, "image_size": side}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision)
    model: Any = getattr(transformers, f"{kind}ForObjectDetection")(config).eval().to(device)
    queries = torch.randn(1, names, config.text_config.hidden_size, device=device)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def detect(count: int) -> object:
        images = pixels.expand(count, -1, -1, -1).to(device)
        features = model.image_embedder(pixel_values=images)[0]  # [B, h, w, width]
        flat = features.flatten(1, 2)  # [B, Q, width]
        logits, _ = model.class_predictor(flat, queries.expand(count, -1, -1))
        boxes = model.box_predictor(flat, features)
        return _best(logits.float().sigmoid(), boxes)

    return detect


def grounding_dino(names: int, device: torch.device) -> Detect:
    """Grounding DINO tiny (arXiv 2303.05499) of transformers: Swin-T at 800 px, BERT base."""
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig())
    model = model.eval().to(device)
    # Each name a word and a full stop, between BERT's first and last token.
    words = [token for number in range(names) for token in (2000 + number, 1012)]
    tokens = torch.tensor([[101, *words, 102]], device=device)
    size = 800, round(800 * IMAGE[1] / IMAGE[0])
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))

    def detect(count: int) -> object:
        images = pixels.expand(count, -1, -1, -1).to(device)
        found = model(pixel_values=images, input_ids=tokens.expand(count, -1))
        return _best(found.logits.float().sigmoid(), found.pred_boxes)

    return detect


def _best(scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the 100 best scores [B, 100] of [B, Q, C] and their boxes [B, 100, 4]."""
    values, pairs = scores.flatten(1).topk(100)
    rows = pairs // scores.shape[2]
    return values, boxes.gather(1, rows[..., None].expand(-1, -1, 4))


def makers(names: int, device: torch.device) -> dict[str, Callable[[], Detect]]:
    """Returns for each detector what makes it."""
    found: dict[str, Callable[[], Detect]] = {
        BASELINE: functools.partial(owl, "OwlViT", 32, 768, names, device),
        "OWL-ViT B/16, 768 px": functools.partial(owl, "OwlViT", 16, 768, names, device),
        "OWLv2 B/16, 960 px": functools.partial(owl, "Owlv2", 16, 960, names, device),
        "Grounding DINO tiny, 800 px": functools.partial(grounding_dino, names, device),
    }
    return found | {str(design): functools.partial(ours, design, names, device) for design in DESIGNS}


def side_by_side(options: argparse.Namespace) -> str:
    """Returns a table of seconds per image of all detectors, by precision and batch."""
    device = torch.device(options.device)
    wait = waiting(options.device)
    made = {
        name: make()
        for name, make in makers(options.classes[0], device).items()
        if not options.detectors or any(part in name for part in options.detectors)
    }
    precisions = options.precisions or (["fp32", "bf16"] if computes_in_bf16(device) else ["fp32"])
    header = ["detector", *(f"{kind}, batch {size}" for kind in precisions for size in options.batches)]
    columns: list[dict[str, list[float]]] = []
    for precision in precisions:
        for size in options.batches:
            works = {
                name: functools.partial(_run, detect, size, precision, device)
                for name, detect in made.items()
            }
            # Single images have warmed up what batches need.
            taken = alternate(works, options.rounds, wait, warm_up=size == options.batches[0])
            columns.append({name: [one / size for one in seconds] for name, seconds in taken.items()})
            gc.collect()
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in made:
        cells = [_cell(column[name], column.get(BASELINE)) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _run(detect: Detect, count: int, precision: str, device: torch.device) -> object:
    with torch.no_grad(), autocast(precision, device):
        return detect(count)


def _cell(seconds: list[float], baseline: list[float] | None) -> str:
    """Returns the median, the spread and the ratio to the baseline in the same rounds."""
    text = f"**{shown(statistics.median(seconds))} s**"
    if len(seconds) > 1:
        text += f" ({shown(min(seconds))} to {shown(max(seconds))})"
    if baseline:
        ratio = statistics.median(one / other for one, other in zip(seconds, baseline, strict=True))
        text += f", × {shown(ratio)}"
    return text
