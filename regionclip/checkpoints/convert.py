"""Conversion between our files and RegionCLIP's or detectron2's, for `clip-base convert`."""

# C names, D embedding size
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError, shortened
from clip_base.storage.files import replacing
from clip_base.weights import infer_config
from clip_base.weights.formats import Content
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights
from clip_base.weights.reading import is_safetensors, read_notes
from regionclip.checkpoints import load
from regionclip.checkpoints.formats import FINETUNED, PRETRAINED, RPN, recognize
from regionclip.checkpoints.load import check_published, detector_of, read_detector_file, save_detector
from regionclip.concepts import vocabulary as vocabularies
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.categories import parse_names
from regionclip.models.detector import Detector
from regionclip.models.region_heads import KEY, PerRegionHead
from regionclip.proposals.rpn import config as proposals
from regionclip.proposals.rpn.detectron2_names import OFFLINE
from regionclip.proposals.rpn.detectron2_names import to_detectron2 as network_names
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import content_of, load_network, network_of, save_network

# Forms that hold more than a CLIP.
_NATIVE = (FINETUNED, RPN)
HEAD = ("clip.visual.layer4.", "clip.visual.attnpool.")  # of the image tower: what embeds a region


def content_with_readers(content: Mapping[str, Tensor] | Tensor, path: Path) -> Content | None:
    """Returns what `recognize` finds in a file, with how to check it and how to write it in our form.

    Raises:
        InputError: see `recognize`.
    """
    found = recognize(content, path)
    if found is None or found.form not in (PRETRAINED, *_NATIVE):
        return found
    return replace(found, check=check_published, native=to_ours if found.form in _NATIVE else None)


def to_regionclip(path: Path, out: Path) -> str:
    """Writes our CLIP, detector, proposal network or vocabulary as RegionCLIP's code saves its own.

    Args:
        path: our file, or a CLIP in any known format.
        out: a .pth file.

    Returns:
        What was written, in words.

    Raises:
        InputError: RegionCLIP has no place for what the file holds.
    """
    form = _form(path)
    if form == vocabularies.FORMAT:
        rows = Vocabulary.load(path).embeddings
        _save(rows, out)
        return f"{out}: {len(rows)} embeddings, for MODEL.CLIP.TEXT_EMB_PATH; their names have no place there"
    if form == proposals.FORMAT:
        _save({"model": _network(load_network(path), path)}, out)
        return f"{out}, for MODEL.CLIP.BB_RPN_WEIGHTS"
    if form == load.FORMAT:
        detector, base = read_detector_file(path)
        _require_published_head(path)
        state = {**_clip(detector.clip, path), **_head(detector, base, path)}
        if detector.network is not None:
            network = _network(detector.network, path)
            state |= {f"{OFFLINE}{name}": value for name, value in network.items()}
        _save({"model": state}, out)
        beside = "" if detector.student is None else ", the frozen student beside it"
        lost = f"how it scores{beside} and the names of its classes"
        return f"{out}, for MODEL.WEIGHTS; {lost} have no place there"
    _require_published_head(path)
    _save({"model": _clip(load_clip(path), path)}, out)
    return f"{out}, for MODEL.WEIGHTS"


def to_detectron2(path: Path, out: Path) -> str:
    """Writes our proposal network for detectron2's own models, or our detector for `OpenVocabularyRCNN`.

    Args:
        path: our file.
        out: a .pth file.

    Raises:
        InputError: the file holds neither, or a network that detectron2 has no names for.
    """
    form = _form(path)
    if form == proposals.FORMAT:
        network = load_network(path)
        _save({"model": _network(network, path)}, out)
        kind = "C4" if network.config.design == "c4" else "FPN"
        return f"{out}, for MODEL.WEIGHTS of a {kind} model on ResNet-50"
    if form == load.FORMAT:
        _require_published_head(path)
        weights = read_weights(path)[0]
        _save({"model": {part_of(name): value for name, value in weights.items()}}, out)
        told = f"{out}, for MODEL.WEIGHTS of an OpenVocabularyRCNN"
        if any(name.startswith("student.") for name in weights):
            told += f"; its student counts only in a model with MODEL.REGIONCLIP.WEIGHTS={path}"
        return told
    raise InputError(
        f"{path} holds {shortened(form or 'no form of ours')}; detectron2's format is for proposal networks "
        f"({proposals.FORMAT}) and detectors ({load.FORMAT})"
    )


def _require_published_head(path: Path) -> None:
    """Raises an InputError for weights of another region head than other packages' code has."""
    head = read_notes(path).get(KEY, PerRegionHead.kind)
    if head != PerRegionHead.kind:
        raise InputError(
            f"{path} was trained with region_head={head}, and RegionCLIP's form has no place to say so: its "
            f"code runs layer4 on each region. Train with region_head={PerRegionHead.kind} to convert it"
        )


def part_of(name: str) -> str:
    """Returns where `regionclip.detectron2` keeps a detector's tensor; it cuts towers where regions enter."""
    if name.startswith("network."):
        return f"proposal_generator.{name}"
    trunk = name.startswith("clip.visual.") and not name.startswith(HEAD)
    if trunk:
        return f"backbone.tower.{name.removeprefix('clip.visual.')}"
    return f"roi_heads.detector.{name}"


def to_ours(path: Path, out: Path, text_weights: str) -> str:
    """Writes a RegionCLIP detector or a detectron2 proposal network in our form.

    Args:
        path: the published file.
        out: a .safetensors file.
        text_weights: the CLIP whose text tower is added to a detector that has none.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"out={out}: our format is a .safetensors file; give such a name")
    content = content_of(path)
    if content.form == FINETUNED:
        if content.clip is None and not text_weights:
            raise InputError(
                f"{path} has no text tower, but our format includes one: give text_weights=FILE, OpenAI's "
                "CLIP or the pretrained RegionCLIP that the detector started from"
            )
        detector = detector_of(content, path, None, text_weights)
        if detector.network is None:
            raise InputError(f"{path} has no proposal network, which our format requires")
        trained_on = 0 if detector.class_embeddings is None else len(detector.class_embeddings)
        save_detector(detector, out, parse_names("coco_base") if trained_on in (48, 65) else [])
        return str(out)
    save_network(network_of(content, path), out)
    return str(out)


def _form(path: Path) -> str:
    return read_weights(path)[1].get("format", "") if path.is_file() and is_safetensors(path) else ""


def _save(content: object, out: Path) -> None:
    if out.suffix != ".pth":
        raise InputError(f"out={out}: RegionCLIP and detectron2 read .pth, give such a name")
    with replacing(out) as temporary:
        torch.save(content, temporary)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the usual memory order and without batch counters, which frozen norms lack."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def _clip(model: CLIP, path: Path) -> dict[str, Tensor]:
    infer_config.require_transformer(model.config, f"{path}: RegionCLIP")
    if model.map_tower is None or model.config.activation != "quick_gelu":
        raise InputError(
            f"{path} has a {model.config.vision.kind} with {model.config.activation}; RegionCLIP's towers "
            "are ResNets with quick_gelu"
        )
    if model.config.vision.head_width != 64:
        raise InputError(
            f"{path} has heads of {model.config.vision.head_width} channels; RegionCLIP's files do not "
            "store the head width, and its code assumes 64"
        )
    places = {"visual.": "backbone.", "text.": "lang_encoder.", "logit_scale": "lang_encoder.logit_scale"}
    state = {}
    for name, value in _plain(model.state_dict()).items():
        prefix = next(prefix for prefix in places if name.startswith(prefix))
        state[places[prefix] + name.removeprefix(prefix)] = value
    return state


def _head(detector: Detector, base: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    kind = "nothing" if detector.box_head is None else detector.box_head.kind
    if kind != "embedding" or detector.background is None:
        raise InputError(
            f"{path} has a box head that reads {kind}, RegionCLIP's read the embedding; train one with "
            "box_head=embedding"
        )
    state = detector.state_dict()
    head = {
        "bbox_pred.weight": state["box_head.weight"],
        "bbox_pred.bias": state["box_head.bias"],
        "cls_bg_score.weight": state["background"][None],
    }
    if base:
        tokenizer = Tokenizer(detector.clip.config.text.context_length)
        head["cls_score.weight"] = embed(detector.clip, tokenizer, base, ["{}."]).embeddings
    return {f"roi_heads.box_predictor.{name}": value for name, value in _plain(head).items()}


def _network(network: ProposalNetwork, path: Path) -> dict[str, Tensor]:
    try:
        return _plain(network_names(network))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
