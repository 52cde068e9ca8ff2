"""Detection by name in pictures: boxes drawn, and the detections in COCO's results form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_base.config import REQUIRED, Part, option, part
from clip_base.data.images import Pixels
from clip_base.errors import InputError
from clip_base.files import existing, replacing, write_json
from clip_base.progress import track
from clip_base.tokenizer import Tokenizer
from clip_base.train import autocast, pick_device
from regionclip.datasets import load_image
from regionclip.detector import Detector, DetectorConfig
from regionclip.evaluate import load_any
from regionclip.inference import build_proposer
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import ImageKey, Proposer
from regionclip.structures import Detections
from regionclip.transforms import ResizeConfig, place, to_batch
from regionclip.visualize import draw
from regionclip.vocabulary import embed, parse_names

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class DetectConfig:
    """Options of detection in pictures."""

    photos: list[str] = option(REQUIRED, "pictures, or folders of them", positional=True)
    weights: str = option(REQUIRED, "a detector, or a CLIP (then give a proposer)")
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
    resize: ResizeConfig = option(
        ResizeConfig(), "size of the pictures, for a CLIP or with own_settings=false"
    )
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one")


def pictures(places: Sequence[str]) -> list[Path]:
    """Returns the picture files among some paths; a folder stands for the pictures directly in it.

    Raises:
        InputError: a path does not exist, or a folder holds no picture.
    """
    files: list[Path] = []
    for place_ in places:
        path = existing(place_, "picture")
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
            if not inside:
                raise InputError(f"folder {path} holds no pictures ({', '.join(PICTURES)})")
            files += inside
        else:
            files.append(path)
    return files


def detect(config: DetectConfig) -> None:
    """Looks for named things in pictures; draws boxes and writes `out/detections.json`."""
    files = pictures(config.photos)
    out = Path(config.out)
    targets = targets_of(files, out)
    names = parse_names(config.vocabulary)
    device = pick_device(config.device)
    detector = load_any(config.weights, config.detector, config.own_settings).to(device)
    tokenizer = Tokenizer(detector.clip.config.text.context_length)
    detector.set_vocabulary(embed(detector.clip, tokenizer, names, config.templates), config.weights)
    proposer: Proposer | None = None
    if config.proposer["name"] != "none":
        proposer = build_proposer(config.proposer, device)
    elif detector.network is None:
        raise InputError(
            f"{config.weights} is a CLIP without a proposal network; give proposer.name=grid, say"
        )
    entries: list[dict[str, Any]] = []
    broken: list[str] = []
    for number, (file, target) in enumerate(track(list(zip(files, targets, strict=True)), "detecting"), 1):
        try:
            pixels = _upright(file)
        except InputError as error:
            broken.append(str(error))
            continue
        found = _in_picture(detector, proposer, pixels, number, config)
        entries += [
            {**entry, "category_name": names[entry["category_id"] - 1], "file_name": str(file)}
            for entry in found.to_coco(number, range(1, len(names) + 1))
        ]
        shown = found.above(config.score)
        with replacing(target) as temporary:
            draw(pixels, shown).save(temporary, format="JPEG", quality=92)
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


def _upright(file: Path) -> Pixels:
    """Returns [H, W, 3] as people see the picture: turned as its EXIF note says."""
    return load_image(file, upright=True).permute(1, 2, 0).numpy()


def _in_picture(
    detector: Detector, proposer: Proposer | None, original: Pixels, number: int, config: DetectConfig
) -> Detections:
    resize = detector.resize or config.resize
    pixels, frame = place(original, resize.short[0], resize.long)
    device = detector.classifier.device
    batch = to_batch([pixels], multiple=32).to(device)
    with torch.no_grad(), autocast(config.precision, device):
        return detector.detect_batch(batch, [frame], [ImageKey(number, *frame.original)], proposer)[0]
