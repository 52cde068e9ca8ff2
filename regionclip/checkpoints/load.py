"""Detectors and proposal networks out of RegionCLIP's files, and what their class embeddings stand for."""

# C names, D embedding size
from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clip_base.jobs import config as configs
from clip_base.models import zoo
from clip_base.models.clip import CLIP, ImageTower, make_vision_tower
from clip_base.models.configs import CLIPConfig, TextConfig
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.announce import announced
from clip_base.runtime.errors import InputError, note, quote
from clip_base.weights import infer_config
from clip_base.weights.formats import Content, group_of
from clip_base.weights.load import find, is_published, load_clip, local_copy
from clip_base.weights.native import (
    load_exactly,
    maker,
    read_weights,
    sized,
    sizes_in,
    towers_note,
    write_weights,
)
from clip_base.weights.reading import read_foreign
from regionclip.checkpoints import formats as parts
from regionclip.concepts.negatives import embed_negatives
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.categories import parse_names
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.region_heads import KEY, REGION_HEADS, PerRegionHead, choose_head
from regionclip.models.student import NONE, FrozenStudent, StudentConfig, load_student
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import NETWORK
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import content_of, network_of
from regionclip.structures.transforms import ResizeConfig, TrainingResizeConfig

# As the published configurations test (`configs/` of github.com/microsoft/RegionCLIP): images, and how
# regions become detections, by the number of names that boxes were trained on.
RESIZE = ResizeConfig([800], 1333, filter="bilinear", multiple=1)
_COCO = DetectorConfig(
    max_proposals=1000,
    temperature=parts.TEMPERATURE,
    alpha_base=0,
    alpha_novel=0,
    min_score=0.001,
    nms_type="soft",
    max_detections=100,
)
_LVIS = DetectorConfig(
    max_proposals=1000,
    temperature=parts.TEMPERATURE,
    fusion="legacy_logit",
    min_score=0.02,
    nms_type="soft",
    max_detections=300,
)
SETTINGS = {48: _COCO, 65: _COCO, 80: _COCO, 866: _LVIS, 1203: _LVIS}
HEAD_NAMES = ("bbox_pred.weight", "bbox_pred.bias", "cls_bg_score.weight")
_LISTS = ("coco", "coco65", "coco_base", "coco_novel")
FORMAT = "regionclip.detector/1"
STUDENT = "student_region_head"  # in the metadata, if there is a frozen tower beside


def check_published(content: Content, path: Path) -> None:
    """Builds what a file's tensors are for, to prove that they fit.

    Raises:
        InputError: tensors are missing, left over or misshapen.
    """
    if content.form == parts.FINETUNED:
        detector_of(content, path, DetectorConfig())
        return
    if content.form == parts.PRETRAINED:
        clip, weights = _towers(content, path, "")
        load_exactly(clip, {**_counters(clip), **weights}, path)
    if content.form == parts.RPN or group_of(content, NETWORK):
        network_of(content, path)


def load_published_detector(
    weights: str,
    config: DetectorConfig | None = None,
    text_weights: str = "",
    resize: ResizeConfig | None = None,
) -> Detector | None:
    """Returns the detector in a RegionCLIP file; None when the file is something else.

    Args:
        weights: a file, or a published file's name.
        config: scores and suppression; None: as its authors tested it.
        text_weights: a CLIP whose text tower embeds names, for files without one.
        resize: the size at which it sees images; None: as its authors tested it.

    Raises:
        InputError: the file is damaged, not whole, or does not go with `text_weights`.
    """
    path = find(weights)
    content = read_foreign(path) if is_published(path) else None
    if content is None or content.form != parts.FINETUNED:
        return None
    return detector_of(content, path, config, text_weights, resize)


def detector_of(
    content: Content,
    path: Path,
    config: DetectorConfig | None = None,
    text_weights: str = "",
    resize: ResizeConfig | None = None,
) -> Detector:
    """Builds the detector among a file's tensors, in evaluation mode; see `load_published_detector`."""
    head = group_of(content, parts.HEAD)
    missing = [name for name in HEAD_NAMES if name not in head]
    if missing:
        raise InputError(
            f"{path} has no roi_heads.box_predictor.{missing[0]}; it is not a complete RegionCLIP detector"
        )
    if len(head["bbox_pred.weight"]) != 4:
        raise InputError(
            f"{path} has box deltas for each class ({len(head['bbox_pred.weight'])} rows); the published "
            "detectors share them (4 rows)"
        )
    clip, towers = _towers(content, path, text_weights)
    weights = {f"clip.{name}": value for name, value in towers.items()}
    weights |= {f"box_head.{kind}": head[f"bbox_pred.{kind}"] for kind in ("weight", "bias")}
    weights["background"] = head["cls_bg_score.weight"].reshape(-1)
    network = network_of(content, path) if group_of(content, NETWORK) else None
    if network is not None:
        weights |= {f"network.{name}": value for name, value in network.state_dict().items()}
    trained_on = group_of(content, "training names' embeddings").get("cls_score")
    rows = group_of(content, parts.EMBEDDINGS).get("test_cls_score", trained_on)
    detector = Detector.untrained(
        clip,
        config or _settings(trained_on, path),
        network,
        resize=resize or copy.deepcopy(RESIZE),
        class_embeddings=None if rows is None else rows.float(),
    )
    load_exactly(detector, {**_counters(detector), **weights}, path)
    detector.eval().to(memory_format=torch.channels_last)
    return detector


def vocabulary_for(
    detector: Detector,
    names: Sequence[str],
    categories: Sequence[str],
    templates: Sequence[str],
    novel: Tensor | None = None,
    embeddings: str = "",
) -> Vocabulary:
    """Returns the embeddings that a detector shall look for.

    They come from `embeddings`; else from the detector's own file, when that has a row for each of the names;
    else from its text tower.

    Args:
        detector: a detector, or a CLIP as one.
        names: what to look for.
        categories: all names of the data in category order, which is the order of embeddings without names;
            those of COCO's lists have COCO's order.
        templates: prompts for the text tower.
        novel: [C] bool, which of the names are novel.
        embeddings: a vocabulary's file, or a published file's name; "" for none.

    Raises:
        InputError: the file does not fit the names, or there is no text tower and it is needed.
    """
    if embeddings:
        path = find(embeddings)
        own = path.suffix == ".safetensors"
        rows = None if own else _rows(path)
        order = None if rows is None else _order(len(rows), names, categories)
        if rows is not None and order is None:
            raise InputError(
                f"{path} has {len(rows)} embeddings: the data have {len(categories)} categories, of which "
                f"{len(names)} are used; give a file with that many"
            )
        vocabulary = Vocabulary.load(path, names if own else order).subset(names)
    else:
        rows = detector.class_embeddings
        order = None if rows is None else _order(len(rows), names, categories)
        if rows is not None and order is not None:
            unit = torch.nn.functional.normalize(rows, dim=1)
            vocabulary = Vocabulary(tuple(order), unit, None, {"source": "the detector's file"}).subset(names)
        else:
            tokenizer = Tokenizer(detector.clip.config.text.context_length)
            vocabulary = embed(detector.clip, tokenizer, names, templates)
    return Vocabulary(vocabulary.names, vocabulary.embeddings, novel, vocabulary.provenance)


def look_for(
    detector: Detector,
    vocabulary: Vocabulary,
    templates: Sequence[str],
    own_words: bool,
    source: str = "the detector",
    multi_label: bool = False,
) -> None:
    """Sets a detector's vocabulary, the negatives beside it, and whether a region keeps its best name alone.

    Args:
        detector: a trained one has its background, and takes no negatives unless they are asked for; its
            student, which has none, takes them beside a user's own words.
        vocabulary: what to look for.
        templates: prompts for the negatives.
        own_words: whether the names are a user's own words; else they are all that a dataset annotates.
        source: see `Detector.set_vocabulary`.
        multi_label: own words: a region is returned under every name that it scores with, as it is in
            evaluation, and not under its best alone.

    Raises:
        InputError: the embeddings do not have the detector's width.
    """
    vocabulary.require_width(detector.clip.config.embed_dim, source)
    wanted, beside, for_student = detector.config.negatives, vocabulary.negatives, None
    if beside is None:  # else they are regions, which no word competes with
        has_words = not isinstance(detector.clip, ImageTower)  # else the names came without generic ones
        automatic = wanted == "auto" and own_words and has_words
        if wanted == "generic" or (automatic and not detector.trained):
            beside = _generic(detector, vocabulary, templates)
        elif automatic and detector.student is not None:
            for_student = _generic(detector, vocabulary, templates)
    one_name = own_words and not multi_label
    detector.set_vocabulary(vocabulary, source, beside, one_name, for_student)


def _generic(detector: Detector, vocabulary: Vocabulary, templates: Sequence[str]) -> Tensor:
    tokenizer = Tokenizer(detector.clip.config.text.context_length)
    return embed_negatives(detector.clip, tokenizer, vocabulary, templates)


def _rows(path: Path) -> Tensor:
    content = content_of(path)
    rows = group_of(content, parts.EMBEDDINGS).get("embeddings")
    if rows is None:
        raise InputError(f"{path} is {content.form}; embeddings= takes a file of class embeddings")
    return rows


def _order(count: int, names: Sequence[str], categories: Sequence[str]) -> list[str] | None:
    """Returns the list of `count` names that covers `names`: one of COCO's, the data's own, or part of it.

    COCO's come first: its published embeddings are in category order, in whatever order names are asked for.
    """
    wanted, everything = set(names), parse_names("coco")
    parts_of_coco = (set(parse_names(known)) for known in _LISTS)
    lists = [[name for name in everything if name in chosen] for chosen in parts_of_coco]
    lists += [list(categories), [name for name in categories if name in wanted]]
    return next((one for one in lists if len(one) == count and wanted <= set(one)), None)


def _settings(trained_on: Tensor | None, path: Path) -> DetectorConfig:
    count = 0 if trained_on is None else len(trained_on)
    if count not in SETTINGS:
        raise InputError(
            f"{path} was trained on {count or 'an unknown number of'} names, which is not one of the "
            "published detectors; say how scores are computed: use_checkpoint_config=false "
            "detector.temperature=0.01 detector.…"
        )
    return dataclasses.replace(SETTINGS[count])


def _towers(content: Content, path: Path, text_weights: str) -> tuple[CLIP, dict[str, Tensor]]:
    """Returns an unfilled CLIP and the weights that go into it, the text tower's from a file if need be."""
    visual = group_of(content, parts.VISUAL)
    vision = infer_config.infer_vision(visual, infer_config.Hints(), path)
    scale = {"logit_scale": torch.tensor(math.log(1 / parts.TEMPERATURE))}
    if content.clip is not None:
        if text_weights:
            raise InputError(f"{path} already has a text tower; omit text_weights={text_weights}")
        config = infer_config.infer(content.clip, infer_config.Hints(content.activation), path)
        return CLIP(config), dict(content.clip)
    width = len(visual["visual.attnpool.c_proj.weight"]) if "visual.attnpool.c_proj.weight" in visual else 0
    if not text_weights:
        same = (zoo.config(name) for name in zoo.available_models())
        words = next((one.text for one in same if one.vision == vision), TextConfig())
        return ImageTower(CLIPConfig(width, vision, words)), {**visual, **scale}
    donor = load_clip(text_weights)
    if donor.config.embed_dim != width:
        raise InputError(
            f"text_weights={text_weights} embeds names in {donor.config.embed_dim} numbers, {path} regions "
            f"in {width}"
        )
    clip = CLIP(CLIPConfig(width, vision, donor.config.text, donor.config.activation))
    words_state = {name: value for name, value in donor.state_dict().items() if name.startswith("text.")}
    return clip, {**visual, **scale, **words_state}


def _counters(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns zeros for the batch norms' counters, which their files do not hold."""
    state = module.state_dict()
    return {
        name: torch.zeros_like(value) for name, value in state.items() if name.endswith("num_batches_tracked")
    }


def save_detector(detector: Detector, path: str | Path, base: Sequence[str]) -> None:
    """Writes a trained detector whole: towers, proposal network, box head, student, base names."""
    if detector.network is None or detector.box_head is None:
        raise ValueError("a detector without proposal network or box head cannot be used from a file")
    proposals = {**dataclasses.asdict(detector.network.config), "backbone_weights": ""}
    metadata = {
        "format": FORMAT,
        "clip": json.dumps(dataclasses.asdict(detector.clip.config)),
        "proposals": json.dumps(proposals),
        "box_head": detector.box_head.kind,
        KEY: detector.encoder.region_head,
        "detector": json.dumps(dataclasses.asdict(detector.config)),
        "resize": json.dumps(dataclasses.asdict(detector.resize)),
        "base": json.dumps(list(base)),
        **towers_note(detector.clip),
    }
    if detector.student is not None:
        metadata[STUDENT] = detector.student.encoder.region_head
    write_weights(path, detector.state_dict(), metadata)


def read_detector_file(
    path: str | Path, config: DetectorConfig | None = None, resize: ResizeConfig | None = None
) -> tuple[Detector, tuple[str, ...]]:
    """Reads what `save_detector` wrote: the detector in evaluation mode, and its base names.

    Args:
        path: the file.
        config: scores and suppression; None: as they were when it was trained.
        resize: the size at which it sees images; None: the size that it was trained at.

    Raises:
        InputError: the file is missing, damaged, no detector, or its tensors do not fit.
    """
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds {quote(metadata.get('format', 'unnamed weights'))}, expected {FORMAT!r}"
        )
    where = f"sizes in {path}"
    sizes = configs.check(CLIPConfig, sizes_in(metadata, "clip", path), where)
    clip = sized(maker(metadata), sizes, weights, path)
    proposals = configs.check(ProposalNetworkConfig, sizes_in(metadata, "proposals", path), where)
    shared = clip.map_tower if proposals.share_trunk else None
    settings = config or configs.check(DetectorConfig, sizes_in(metadata, "detector", path), where)
    # A trained detector's file says what training drew, too; a detector has no use for it.
    trained = configs.check(TrainingResizeConfig, sizes_in(metadata, "resize", path), where)
    size = resize or trained.as_seen()
    network = sized(lambda sizes: ProposalNetwork(sizes, shared), proposals, weights, path)
    kind = metadata.get("box_head") or metadata.get("boxes", "")  # its name in files of earlier versions
    head = _head_in(metadata, KEY, path)
    try:
        detector = Detector.untrained(clip, settings, network, kind, size, region_head=head)
    except InputError as error:
        raise InputError(
            f"{path} was trained with box_head={quote(kind)}, which is not installed ({error}); install "
            "the package that declares it"
        ) from None
    if STUDENT in metadata:
        beside = _head_in(metadata, STUDENT, path)
        detector = detector.with_student(
            FrozenStudent(make_vision_tower(clip.config), 1.0, region_head=beside)
        )
    load_exactly(detector, weights, path)
    if detector.student is not None:
        detector.student.scale = float(detector.clip.logit_scale.detach().exp())
    detector.eval().to(memory_format=torch.channels_last)
    base = sizes_in(metadata, "base", path)
    if not isinstance(base, list) or not all(isinstance(name, str) for name in base):
        raise InputError(f"base in the metadata of {path} must be a list of names, found {quote(base)}")
    detector.base = tuple(base)
    return detector, tuple(base)


def _head_in(metadata: dict[str, str], key: str, path: str | Path) -> str:
    """Returns a region head that metadata name; files of earlier versions do not."""
    head = metadata.get(key, PerRegionHead.kind)
    if head not in REGION_HEADS:
        raise InputError(
            f"{path} was trained with region_head={quote(head)}; this version knows {', '.join(REGION_HEADS)}"
        )
    return head


def load_detector(
    weights: str,
    config: DetectorConfig | None = None,
    resize: ResizeConfig | None = None,
    use_checkpoint_config: bool = True,
    text_weights: str = "",
    region_head: str = "auto",
    student: StudentConfig | None = None,
) -> Detector:
    """Returns a detector from a detector's file, ours or RegionCLIP's, or a zero-shot one from a CLIP's.

    Args:
        weights: the file, or a published name.
        config: scores and suppression; None: a detector's own, a CLIP takes the defaults.
        resize: the size at which images are seen; None: the same.
        use_checkpoint_config: a detector keeps its own; `config` and `resize` are for a CLIP.
        text_weights: a CLIP whose text tower embeds names, for RegionCLIP's detectors, which have none.
        region_head: how a ResNet embeds regions, see `choose_head`.
        student: which frozen CLIP is combined with it; None: the one in its file, if there is one.

    Raises:
        InputError: a file is missing, damaged or does not fit.
    """
    detector = _loaded(weights, config, resize, use_checkpoint_config, text_weights, region_head)
    if student is None:
        return detector
    if student.file:
        beside = load_student(student, detector.clip, detector.encoder.region_head)
        return detector.with_student(beside).eval()
    if detector.student is None:
        if (student.base, student.novel) != (StudentConfig().base, StudentConfig().novel):
            note(f"student.base and student.novel are not used: {weights} holds no student")
        return detector
    kept = None if student.weights == NONE else detector.student.with_config(student)
    return detector.with_student(kept).eval()


def _loaded(
    weights: str,
    config: DetectorConfig | None,
    resize: ResizeConfig | None,
    use_checkpoint_config: bool,
    text_weights: str,
    region_head: str,
) -> Detector:
    weights = local_copy(weights)
    head = choose_head(region_head, weights)
    settings, size = (None, None) if use_checkpoint_config else (config, resize)
    is_ours = weights.endswith(".safetensors")
    with announced(f"loading {weights}"):
        published = None if is_ours else load_published_detector(weights, settings, text_weights, size)
        if published is not None:
            return published
        if is_ours and read_weights(weights)[1].get("format") == FORMAT:
            detector = read_detector_file(weights, settings, size)[0]
            if text_weights:
                detector = detector.with_clip(_whole(detector.clip, weights, text_weights)).eval()
            return detector
        clip = load_clip(weights)
        if text_weights:
            clip = _whole(clip, weights, text_weights)
    return Detector(clip, config or DetectorConfig(), resize=resize, region_head=head).eval()


def _whole(clip: CLIP, weights: str, text_weights: str) -> CLIP:
    """Returns a CLIP without a text tower with that of another file."""
    if not isinstance(clip, ImageTower):
        raise InputError(f"{weights} already has a text tower; omit text_weights={text_weights}")
    return clip.with_text_of(load_clip(text_weights))
