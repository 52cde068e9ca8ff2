"""Detection by name in pictures: boxes drawn, and the detections in COCO's results form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_base.config import REQUIRED, Part, option, part
from clip_base.data.images import Pixels
from clip_base.errors import InputError
from clip_base.files import replacing, write_json
from clip_base.progress import track
from clip_base.train import pick_device
from regionclip.detector import DetectorConfig
from regionclip.evaluate import load_any
from regionclip.inference import build_proposer
from regionclip.pictures import picture_files, read_upright
from regionclip.predictor import Predictor
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.structures import Detections
from regionclip.transforms import ResizeConfig
from regionclip.visualize import draw
from regionclip.vocabulary import parse_names


@dataclass
class DetectConfig:
    """Options of detection in pictures."""

    photos: list[str] = option(REQUIRED, "pictures, or folders of them", positional=True)
    weights: str = option(REQUIRED, "a detector (ours or RegionCLIP's), or a CLIP (then give a proposer)")
    vocabulary: str = option(REQUIRED, 'names to look for: "cat, dog", a file with one a line, coco, coco65')
    out: str = option("detections", "folder for the pictures with boxes and detections.json")
    score: float = option(0.3, "boxes that score less are not drawn; detections.json keeps them")
    proposer: Part = part(PROPOSERS, "none", "where regions come from; none: the detector's own network")
    detector: DetectorConfig = option(
        DetectorConfig(), "scores and suppression, for a CLIP or with own_settings=false"
    )
    own_settings: bool = option(
        True, "a detector sees and scores as it was trained to, not as `resize` and `detector` say"
    )
    templates: list[str] = option(["a photo of {article} {}.", "{}"], "prompts, averaged; {} is the name")
    embeddings: str = option(
        "", "file of the names' embeddings, such as RegionCLIP's .pth; empty: names are embedded"
    )
    text: str = option("", "CLIP whose text tower embeds names, for RegionCLIP's detectors, which bring none")
    resize: ResizeConfig = option(
        ResizeConfig(), "size of the pictures, for a CLIP or with own_settings=false"
    )
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one")


def detect(config: DetectConfig) -> None:
    """Looks for named things in pictures; draws boxes and writes `out/detections.json`."""
    files = picture_files(config.photos)
    out = Path(config.out)
    targets = targets_of(files, out)
    names = parse_names(config.vocabulary)
    device = pick_device(config.device)
    detector = load_any(config.weights, config.detector, config.own_settings, config.text).to(device)
    if config.proposer["name"] == "none" and detector.network is None:
        raise InputError(
            f"{config.weights} is a CLIP without a proposal network; give proposer.name=grid, say"
        )
    proposer = None if config.proposer["name"] == "none" else build_proposer(config.proposer, device)
    resize = detector.resize or config.resize
    predictor = Predictor(detector, proposer, resize, config.precision, config.templates)
    predictor.set_vocabulary(names, config.embeddings)
    entries: list[dict[str, Any]] = []
    broken: list[str] = []
    for number, (file, target) in enumerate(track(list(zip(files, targets, strict=True)), "detecting"), 1):
        try:
            pixels, size = read_upright(file)
        except InputError as error:
            broken.append(str(error))
            continue
        (found,) = predictor.in_pixels([(pixels, size)], number)
        entries += [
            {**entry, "category_name": names[entry["category_id"] - 1], "file_name": str(file)}
            for entry in found.to_coco(number, range(1, len(names) + 1))
        ]
        shown = found.above(config.score)
        with replacing(target) as temporary:
            draw(pixels, _at(shown, pixels)).save(temporary, format="JPEG", quality=92)
        print(f"{target}: {shown!r}")
    write_json(out / "detections.json", entries)
    if broken:
        raise InputError(
            f"{len(broken)} of {len(files)} pictures could not be read, the others are done: {broken[0]}"
        )


def targets_of(files: Sequence[Path], out: Path) -> list[Path]:
    """Returns where each picture with boxes goes: NAME.jpg, with a number when several have that name.

    Raises:
        InputError: a picture would take the place of one that was given.
    """
    given = {file.resolve() for file in files}
    targets: list[Path] = []
    for file in files:
        names = (
            out / f"{file.stem}{end}.jpg"
            for end in ("", *(f"-{number}" for number in range(2, len(files) + 1)))
        )
        targets.append(next(name for name in names if name not in targets))
    taken = next((target for target in targets if target.resolve() in given), None)
    if taken is not None:
        raise InputError(f"the picture with boxes would be written over {taken}; give another out=")
    return targets


def _at(found: Detections, pixels: Pixels) -> Detections:
    """Returns detections in the frame of a picture that was perhaps reduced."""
    height, width = pixels.shape[:2]
    factors = torch.tensor([width / found.size[1], height / found.size[0]]).repeat(2)
    return dataclasses.replace(found, boxes=found.boxes * factors, size=(height, width))
