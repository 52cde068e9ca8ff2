"""The students of the results tables: how each RegionCLIP is pretrained, and on which pairs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Student:
    """How one RegionCLIP is pretrained.

    Attributes:
        title: for the table.
        mined: key in MINED.
        options: `key=value` of `regionclip pretrain`.
        main: whether its row is run for all seeds.
    """

    title: str
    mined: str
    options: tuple[str, ...] = ()
    main: bool = False


HALF, GATE = ("teacher=roi_align", "teacher_scale=0.5"), "matcher.min_objectness=0.5"
MINED = {
    "published": ("matcher.name=pool", "teacher=roi_align"),
    "pool": ("matcher.name=pool", GATE, *HALF),
    "hybrid": ("matcher.name=hybrid", GATE, *HALF),
    "caption": ("matcher.name=caption", GATE, *HALF),
    "exclusive": ("matcher.name=exclusive", *HALF),
    "crop": ("matcher.name=exclusive", "teacher=crop", "context=2.2"),
    "published-scale": ("matcher.name=pool", "teacher=roi_align", "teacher_scale=auto"),
    "mixed": ("matcher.name=exclusive", "teacher=mixed", "teacher_scale=auto", "context=2.2"),
    "vit": ("matcher.name=exclusive", "teacher=crop", "context=2.2"),
    "round-2": ("matcher.name=exclusive", "teacher=roi_align", "teacher_scale=auto"),
}
"""Options of `regionclip mine` by the name of the set of pairs."""
TEACHERS = {"vit": "clip-vit", "round-2": "student-best"}
"""The step whose weights mine a set of pairs, where that is not the CLIP that students begin with."""
ONLY = {
    name: tuple(f"{other}={float(other == name)}" for other in ("distillation", "contrastive", "image_text"))
    for name in ("distillation", "contrastive", "image_text")
}
NAMES = ("region_text.soft_labels=true", "region_text.hard_negatives=3", "region_text.localization=true")
STUDENTS = {
    "published": Student("RegionCLIP, as published", "published", main=True),
    "best": Student("our best: matcher exclusive", "exclusive", main=True),
    "shared": Student("our best, region_head=shared", "exclusive", ("region_head=shared",), main=True),
    "dense": Student("our best, region_head=dense", "exclusive", ("region_head=dense",)),
    "pool": Student("matcher pool", "pool"),
    "hybrid": Student("matcher hybrid", "hybrid"),
    "caption": Student("matcher caption", "caption"),
    "crop": Student("our best, teacher `crop`", "crop"),
    "distillation": Student("our best, distillation only", "exclusive", ONLY["distillation"]),
    "contrastive": Student("our best, region-text contrastive loss only", "exclusive", ONLY["contrastive"]),
    "image_text": Student("our best, image-text contrastive loss only", "exclusive", ONLY["image_text"]),
    "crops": Student("our best, plus the crop loss", "exclusive", ("crop_distillation=1",)),
    "temperature": Student("our best, learned temperature", "exclusive", ("learn_temperature=true",)),
    "published-scale": Student("RegionCLIP, as published, `teacher_scale=auto`", "published-scale"),
    "mixed": Student("our best, teacher `mixed`", "mixed"),
    "vit": Student("our best, a ViT as the teacher", "vit"),
    "round-2": Student("our best, mined again by our best", "round-2"),
    "soft": Student("our best, soft labels", "exclusive", ("region_text.soft_labels=true",)),
    "hard": Student("our best, hard negatives", "exclusive", ("region_text.hard_negatives=3",)),
    "localized": Student(
        "our best, weighted by localization", "exclusive", ("region_text.localization=true",)
    ),
    "names": Student("our best, these three together", "exclusive", NAMES),
}
