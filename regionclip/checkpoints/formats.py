"""The purpose of each tensor of a RegionCLIP file: used, or not needed; any other tensor is an error.

The names are those of the modules in github.com/microsoft/RegionCLIP, which saves detectron2 checkpoints:
`backbone.*` is the image tower, `lang_encoder.*` the text tower, `roi_heads.box_predictor.*` what names and
moves boxes, `offline_backbone.*` and `offline_proposal_generator.*` the proposal network.
"""

# C names, D embedding size
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clip_base.runtime.errors import InputError
from clip_base.weights import key_names
from clip_base.weights.formats import Content, Group
from regionclip.models.region_heads import KEY, PerRegionHead
from regionclip.proposals.rpn.detectron2_names import NETWORK

# What cosines are divided by in every published configuration; the files do not hold it.
TEMPERATURE = 0.01
VISUAL = "image tower"
TEXT = "text tower"
HEAD = "box predictor"
EMBEDDINGS = "class embeddings"
PRETRAINED = "a pretrained RegionCLIP"
FINETUNED = "a RegionCLIP detector"
RPN = "a detectron2 checkpoint with a proposal network"
TEACHER = "CLIP twice, as RegionCLIP's pretraining starts from it"
CONCEPTS = "concept embeddings"


@dataclass(frozen=True)
class _Rule:
    """Which tensors form a group: `pattern` at the beginning of a name is replaced by `ours`."""

    group: str
    purpose: str
    pattern: str
    ours: str = ""
    used: bool = True


_NAMES = "embeds names"
_PROPOSES = "proposes regions"
_COUNTERS = _Rule(
    "counters", "batch norms count batches in training", r".*\.num_batches_tracked$", used=False
)
_MODEL = (
    _COUNTERS,
    _Rule(VISUAL, "embeds regions", r"backbone\.(?=(conv|bn|layer)\d|attnpool\.)", "visual."),
    _Rule(TEXT, _NAMES, r"lang_encoder\.(?=logit_scale$)"),
    _Rule(TEXT, _NAMES, r"lang_encoder\.", "text."),
    _Rule("logit scale", "the temperature", r"(?=logit_scale$)"),
    _Rule("teacher", "the frozen CLIP of the pretraining, OpenAI's", r"teacher_backbone\.", used=False),
    _Rule(
        "pools",
        "embeddings of the pretraining's concepts; nothing here reads them out of a model",
        r"(teacher_)?concept_emb$",
        used=False,
    ),
    _Rule("pixel constants", "CLIP's mean and deviation, which are fixed", r"pixel_(mean|std)$", used=False),
    _Rule(NETWORK, _PROPOSES, r"offline_(?=(backbone|proposal_generator)\.|pixel_(mean|std)$)"),
    _Rule(
        "training names' embeddings",
        "stand for the names that boxes were trained on; the names to find take their place",
        r"roi_heads\.box_predictor\.cls_score\.weight$",
        "cls_score",
    ),
    _Rule(
        EMBEDDINGS,
        "stand for the names to find",
        r"roi_heads\.box_predictor\.test_cls_score\.weight$",
        "test_cls_score",
    ),
    _Rule(
        HEAD,
        "moves boxes, and stands for the background",
        r"roi_heads\.box_predictor\.(?=bbox_pred\.|cls_bg_score\.weight$)",
    ),
    _Rule("mask head", "draws masks; this detector gives boxes", r"roi_heads\.mask_head\.", used=False),
)
_PROPOSALS = (
    _COUNTERS,
    _Rule(NETWORK, _PROPOSES, r"(?=(backbone|proposal_generator)\.|pixel_(mean|std)$)"),
    _Rule("second stage", "the Mask R-CNN that the network was trained in", r"roi_heads\.", used=False),
)
_TEACHER = "teacher_"


def recognize(content: Mapping[str, Tensor] | Tensor, path: Path) -> Content | None:
    """Returns what a RegionCLIP file, or a detectron2 file with a proposal network, holds; None for others.

    Raises:
        InputError: the file is one of those and holds tensors that none of them has.
    """
    if isinstance(content, Tensor):
        return _concepts(content)
    names = list(content)
    if _any(names, "backbone.layer1.") and not _any(names, "proposal_generator."):
        return _model(content, path)
    if _any(names, "proposal_generator.rpn_head."):
        groups = _sort(content, _PROPOSALS, RPN, path)
        return Content(RPN, groups)
    if _any(names, _TEACHER):
        return _twice(content, path)
    return None


def _any(names: list[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _model(state: Mapping[str, Tensor], path: Path) -> Content:
    """Sorts what `PretrainFastRCNN` or `CLIPFastRCNN` saved."""
    detects = _any(list(state), "roi_heads.box_predictor.")
    form = FINETUNED if detects else PRETRAINED
    groups = _sort(state, _MODEL, form, path)
    found = {group.name: group.state for group in groups}
    clip, notes = None, []
    if found.get(TEXT):
        clip = {**found.get(VISUAL, {}), **found[TEXT], **found.get("logit scale", {})}
        if "logit_scale" not in clip:
            clip["logit_scale"] = torch.tensor(math.log(1 / TEMPERATURE))
            notes.append(
                f"the file does not hold the temperature; it is {TEMPERATURE:g} in published configurations"
            )
    # Its code runs layer4 on each region.
    return Content(form, groups, clip, "quick_gelu", tuple(notes), metadata={KEY: PerRegionHead.kind})


def _twice(state: Mapping[str, Tensor], path: Path) -> Content:
    """Sorts a file that holds OpenAI's CLIP as the student and once more as the teacher."""
    teacher = {name: value for name, value in state.items() if name.startswith(_TEACHER)}
    clip = key_names.to_ours({name: value for name, value in state.items() if name not in teacher})
    groups = (
        Group("CLIP", "embeds images and names", True, clip),
        Group("teacher", "the same weights once more", False, teacher),
    )
    return Content(TEACHER, groups, clip, "quick_gelu")


def _concepts(content: Tensor) -> Content | None:
    if content.ndim != 2 or not content.is_floating_point():
        return None
    rows, width = content.shape
    purpose = f"{rows} names of {width} numbers each; the file holds no names, their order is the data's"
    return Content(CONCEPTS, (Group(EMBEDDINGS, purpose, True, {"embeddings": content}),))


def _sort(state: Mapping[str, Tensor], rules: tuple[_Rule, ...], form: str, path: Path) -> tuple[Group, ...]:
    """Puts every tensor into the group of the first rule that its name begins with."""
    sorted_: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in state.items():
        rule = next((rule for rule in rules if re.match(rule.pattern, name)), None)
        if rule is None:
            unknown.append(f"{name} {list(value.shape)}")
            continue
        new = re.sub(rf"^(?:{rule.pattern})", rule.ours, name) if rule.used else name
        sorted_.setdefault(rule.group, {})[new] = value
    if unknown:
        raise InputError(
            f"{path} looks like {form}, but {len(unknown)} of its {len(state)} tensors are unknown: "
            f"{', '.join(unknown[:4])}{', …' if len(unknown) > 4 else ''}"
        )
    first = {rule.group: rule for rule in reversed(rules)}
    return tuple(Group(name, first[name].purpose, first[name].used, held) for name, held in sorted_.items())
