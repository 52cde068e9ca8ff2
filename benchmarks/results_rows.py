"""The rows of the results tables: what is mined, pretrained, trained and measured, as stages of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regionclip.quickstart.stages import Stage

SIDE = 128  # pixels of the scenes that region stages see, as configs/*/results.yaml have it
ALPHAS = ("0.0", "0.25", "0.5", "0.75")
BACKGROUND_WEIGHTS = ("0.05", "1.0")  # beside 0.2, the recipe's and the detectors' of the main table
CURVE = (
    "0.25",
    "0.5",
    "0.75",
)  # shares of the later model, as configs/region-interpolate/results.yaml has them


@dataclass(frozen=True)
class Mining:
    """How one set of pairs is mined.

    Attributes:
        title: for the table.
        options: `key=value` of `regionclip mine`.
    """

    title: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Student:
    """How one RegionCLIP is pretrained.

    Attributes:
        title: for the table.
        mined: key in MINED.
        options: `key=value` of `regionclip pretrain`.
    """

    title: str
    mined: str
    options: tuple[str, ...] = ()


HALF, GATE = ("teacher=roi_align", "teacher_scale=0.5"), "matcher.min_objectness=0.5"
MINED = {
    "published": Mining("pool, RoIAlign at the student's scale", ("matcher.name=pool", "teacher=roi_align")),
    "pool": Mining("pool, RoIAlign at CLIP's scale", ("matcher.name=pool", GATE, *HALF)),
    "hybrid": Mining("hybrid, RoIAlign at CLIP's scale", ("matcher.name=hybrid", GATE, *HALF)),
    "caption": Mining("caption, RoIAlign at CLIP's scale", ("matcher.name=caption", GATE, *HALF)),
    "exclusive": Mining("exclusive, RoIAlign at CLIP's scale", ("matcher.name=exclusive", *HALF)),
    "crop": Mining("exclusive, crops", ("matcher.name=exclusive", "teacher=crop", "context=2.2")),
}
ONLY = {
    name: tuple(f"{other}={float(other == name)}" for other in ("distillation", "contrastive", "image_text"))
    for name in ("distillation", "contrastive", "image_text")
}
STUDENTS = {
    "published": Student("RegionCLIP, as published", "published"),
    "best": Student("our best: matcher exclusive", "exclusive"),
}
ABLATIONS = {
    "pool": Student("matcher pool", "pool"),
    "hybrid": Student("matcher hybrid", "hybrid"),
    "caption": Student("matcher caption", "caption"),
    "crop": Student("our best, teacher `crop`", "crop"),
    "distillation": Student("our best, distillation only", "exclusive", ONLY["distillation"]),
    "contrastive": Student("our best, region-text contrastive loss only", "exclusive", ONLY["contrastive"]),
    "image_text": Student("our best, image-text contrastive loss only", "exclusive", ONLY["image_text"]),
    "crops": Student("our best, plus the crop loss", "exclusive", ("crop_distillation=1",)),
    "temperature": Student("our best, learned temperature", "exclusive", ("learn_temperature=true",)),
}
DETECTORS = {
    "random": "random weights",
    "clip": "CLIP",
    "published": "RegionCLIP, as published",
    "best": "our best",
}


def first_stages(folder: Path, seed: int) -> list[Stage]:
    """Returns what all rows share: world, CLIP, proposal network, concepts, proposals."""
    world, clip, train = folder / "world", model(folder, "clip"), f"train.seed={seed}"
    pairs = (f"captions={world}/captions_train.json", f"images={world}/images")
    return [
        Stage("world", "scenes", 0.5, (f"out={world}", f"seed={seed}")),
        Stage(
            "CLIP",
            "pretrain",
            14,
            (f"out={folder}/clip", "source.name=coco", *(f"source.{pair}" for pair in pairs), train),
        ),
        Stage(
            "proposal network",
            "region-train-rpn",
            2,
            (
                *boxes(world, "train"),
                f"val_annotations={world}/instances_val.json",
                f"network.backbone_weights={clip}",
                f"out={folder}/rpn",
                train,
            ),
        ),
        Stage("concepts", "region-concepts", 0.5, (pairs[0], f"out={folder}/concepts.jsonl")),
        Stage(
            "proposals",
            "region-propose",
            1.5,
            (
                *boxes(world, "train"),
                "proposer.name=rpn",
                f"proposer.weights={model(folder, 'rpn')}",
                f"out={folder}/proposals",
            ),
        ),
    ]


def main_stages(folder: Path, seed: int) -> list[Stage]:
    """Returns the rows of the main tables: students, detectors, and what each figure needs."""
    stages = [mining(folder, name) for name in dict.fromkeys(one.mined for one in STUDENTS.values())]
    stages += zero_shot(folder, "clip")
    for name, student in STUDENTS.items():
        stages.append(pretraining(folder, seed, name, student))
        stages += zero_shot(folder, f"student-{name}")
    start = {"random": "random", "clip": "clip", "published": "student-published", "best": "student-best"}
    for name in DETECTORS:
        own = ("freeze_stages=0", "freeze_batch_norm=false") if name == "random" else ()
        stages += detector(folder, seed, name, start[name], own)
    return [*stages, as_trained(folder)]


def as_trained(folder: Path) -> Stage:
    """Returns the CLIP's evaluation with true boxes in scenes of the size at which it was trained."""
    val = (*boxes(folder / "world", "val"), f"weights={model(folder, 'clip')}", "boxes=truth")
    size = ("resize.short=[64]", "resize.long=64", f"out={folder}/clip-as-trained-truth")
    return Stage("clip at its own scale, true boxes", "region-evaluate", 0.1, (*val, *size))


def ablation_stages(folder: Path, seed: int) -> list[Stage]:
    """Returns what changes one thing at a time: losses, teacher, matcher, background, fusion, weights."""
    stages = []
    known = {one.mined for one in STUDENTS.values()}
    for name, student in ABLATIONS.items():
        stages += [mining(folder, student.mined)] if student.mined not in known else []
        known.add(student.mined)
        stages.append(pretraining(folder, seed, name, student))
        stages += zero_shot(folder, f"student-{name}")
    for weight in BACKGROUND_WEIGHTS:
        changed = (f"background_weight={weight}",)
        stages += detector(folder, seed, f"background-{weight}", "student-best", changed)
    for alpha in ALPHAS:
        fusion = (
            "use_checkpoint_config=false",
            f"detector.alpha_base={alpha}",
            f"detector.alpha_novel={alpha}",
        )
        stages.append(detection(folder, f"alpha-{alpha}", model(folder, "detector-best"), fusion))
    return stages + curves(folder)


def curves(folder: Path) -> list[Stage]:
    """Returns the interpolations: from the CLIP to our best student, and from that to its detector."""
    clip, student, trained = (model(folder, name) for name in ("clip", "student-best", "detector-best"))
    before, after = folder / "curve-student", folder / "curve-detector"
    stages = [
        Stage(
            "curve to the student",
            "region-interpolate",
            0.1,
            (f"first={clip}", f"second={student}", f"out={before}"),
        ),
        Stage(
            "curve to the detector",
            "region-interpolate",
            0.1,
            (f"first={student}", f"second={trained}", f"out={after}"),
        ),
    ]
    for alpha in CURVE:
        file = f"alpha-{alpha}.safetensors"
        stages += zero_shot(folder, f"student-{alpha}", before / file)
        stages.append(detection(folder, f"detector-{alpha}", after / file))
    return stages


def model(folder: Path, name: str) -> Path:
    return folder / name / "model.safetensors"


def boxes(world: Path, part: str) -> tuple[str, ...]:
    annotations = f"annotations={world}/instances_{part}.json"
    return (annotations, f"images={world}/images", f"split={world}/split.json")


def mining(folder: Path, name: str) -> Stage:
    world = folder / "world"
    return Stage(
        f"mine {name}",
        "region-mine",
        1.5,
        (
            f"captions={world}/captions_train.json",
            f"images={world}/images",
            f"weights={model(folder, 'clip')}",
            f"concepts={folder}/concepts.jsonl",
            "proposer.name=precomputed",
            f"proposer.file={folder}/proposals/proposals.json",
            *MINED[name].options,
            f"out={folder}/mined-{name}",
        ),
    )


def pretraining(folder: Path, seed: int, name: str, student: Student) -> Stage:
    return Stage(
        f"pretrain {name}",
        "region-pretrain",
        2.5,
        (
            f"mined={folder}/mined-{student.mined}",
            f"weights={model(folder, 'clip')}",
            *student.options,
            f"out={folder}/student-{name}",
            f"train.seed={seed}",
        ),
    )


def zero_shot(folder: Path, name: str, file: Path | None = None) -> list[Stage]:
    """Returns the evaluations without detector training: true boxes, proposals, and retrieval."""
    weights, world = f"weights={file or model(folder, name)}", folder / "world"
    own = ("proposer.name=rpn", f"proposer.weights={model(folder, 'rpn')}", "proposer.limit=30")
    val = (*boxes(world, "val"), weights)
    truth = (*val, "boxes=truth", f"out={folder}/{name}-truth")
    return [
        Stage(f"{name}, true boxes", "region-evaluate", 0.1, truth),
        Stage(f"{name}, proposals", "region-evaluate", 0.3, (*val, *own, f"out={folder}/{name}-proposals")),
        Stage(
            f"{name}, retrieval",
            "retrieval",
            0.2,
            (
                weights,
                f"captions={world}/captions_val.json",
                f"images={world}/images",
                f"out={folder}/{name}-retrieval",
            ),
        ),
    ]


def detector(folder: Path, seed: int, name: str, start: str, options: Sequence[str]) -> list[Stage]:
    """Returns the training of a detector on base classes, and its evaluation."""
    training = Stage(
        f"detector {name}",
        "region-train-detector",
        1.3,
        (
            *boxes(folder / "world", "train"),
            f"weights={model(folder, start)}",
            f"rpn={model(folder, 'rpn')}",
            *options,
            f"out={folder}/detector-{name}",
            f"train.seed={seed}",
        ),
    )
    return [training, detection(folder, f"detector-{name}", model(folder, f"detector-{name}"))]


def detection(folder: Path, name: str, weights: Path, options: Sequence[str] = ()) -> Stage:
    val = (*boxes(folder / "world", "val"), f"weights={weights}")
    return Stage(
        f"{name}, evaluation", "region-evaluate", 0.3, (*val, *options, f"out={folder}/{name}-evaluation")
    )
