"""The rows of the results tables: which steps each needs, and what is measured of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results_steps import (
    ALPHAS,
    BACKGROUND_WEIGHTS,
    CURVE,
    Step,
    all_steps,
)
from results_students import STUDENTS

from clip_base.storage.tables import read_yaml
from regionclip.quickstart.stages import shipped

TOP1 = ("top1_base", "top1_novel", "top1")
AP50 = ("AP50_base", "AP50_novel", "AP50_all")
AP = ("AP_all",)
RETRIEVAL = ("image_to_text_R@1", "text_to_image_R@1")


@dataclass(frozen=True)
class Row:
    """One row of a table, of one dataset and seed.

    Attributes:
        key: name of its file.
        title: what the table calls it.
        table: which table it is in, a key of `TABLES`.
        measures: by step whose metrics.json is read, the metrics that are kept of it.
        main: whether it is run for all seeds; the others are ablations.
    """

    key: str
    title: str
    table: str
    measures: dict[str, tuple[str, ...]]
    main: bool = True


def zero_shot(key: str, title: str, table: str = "students", main: bool = True, step: str = "") -> Row:
    """Returns the row of a model without detector training; `step` begins the names of its evaluations."""
    step = step or key
    measures = {f"{step}-truth": TOP1, f"{step}-proposals": (*AP50, *AP), f"{step}-retrieval": RETRIEVAL}
    return Row(key, title, table, measures, main)


def trained(key: str, title: str, main: bool = True, table: str = "detectors") -> Row:
    return Row(key, title, table, {f"{key}-evaluation": (*AP50, *AP)}, main)


ROWS = (
    zero_shot("random", "random weights (chance)"),
    zero_shot("clip", "CLIP"),
    zero_shot("clip-vit", "the ViT teacher (crops)", main=False),
    Row("clip-as-trained", "CLIP, images at its training size", "students", {"clip-as-trained-truth": TOP1}),
    *(zero_shot(f"student-{name}", one.title, main=one.main) for name, one in STUDENTS.items()),
    *(zero_shot(f"student-{alpha}", f"{alpha} of our best, the rest of CLIP", main=False) for alpha in CURVE),
    trained("detector-clip", "initialized from CLIP"),
    trained("detector-published", "initialized from RegionCLIP, as published"),
    trained("detector-best", "initialized from our best"),
    trained("detector-shared", "initialized from our best, region_head=shared"),
    trained("detector-dense", "initialized from our best, region_head=dense", main=False),
    trained("detector-frozen", "our best frozen, a trained box head alone", main=False),
    trained("detector-ensemble", "our best, its student kept beside", main=False),
    trained("detector-trunk", "our best, trunk frozen", main=False),
    trained("detector-trunk-ensemble", "our best, trunk frozen, its student kept beside", main=False),
    trained(
        "detector-chosen",
        "weights between detector and student, the factor chosen on held-out base classes",
        main=False,
    ),
    trained(
        "detector-published-scale",
        "initialized from RegionCLIP, as published, `teacher_scale=auto`",
        main=False,
    ),
    trained("detector-vit", "initialized from our best, a ViT as the teacher", main=False),
    trained("detector-round-2", "initialized from our best, mined again by our best", main=False),
    trained(
        "detector-names",
        "initialized from our best with soft labels, hard negatives, localization",
        main=False,
    ),
    trained("detector-distilled", "our best, proposals outside base boxes distilled", main=False),
    trained("detector-gated", "our best, object-like regions are no background", main=False),
    trained("detector-pseudo", "our best, mined boxes of novel names as labels", main=False),
    trained("detector-kept", "our best, these three together", main=False),
    trained("detector-kept-ensemble", "these three together, the student kept beside", main=False),
    trained("detector-longer", "our best, twice as many steps", main=False),
    trained("detector-longer-ensemble", "our best, twice as many steps, its student kept beside", main=False),
    *(
        trained(f"detector-{name}-0.5", f"half of the detector {title}, the rest of its start", main=False)
        for name, title in (
            ("clip", "from CLIP"),
            ("published", "from RegionCLIP as published"),
            ("longer", "of twice as many steps"),
        )
    ),
    trained("detector-supervised", "supervised on all classes (upper bound)"),
    *(
        trained(f"detector-background-{weight}", f"our best, background weight {weight}", main=False)
        for weight in BACKGROUND_WEIGHTS
    ),
    *(trained(f"detector-alpha-{alpha}", f"our best, α {alpha}", main=False) for alpha in ALPHAS),
    *(
        trained(f"detector-{alpha}", f"{alpha} of our best, the rest of its student", main=False)
        for alpha in CURVE
    ),
    trained(
        "detector-0.5-ensemble",
        "0.5 of our best, the rest of its student, which is also kept beside",
        main=False,
    ),
)


@dataclass(frozen=True)
class Comparison:
    """What a sentence of the text says: that one row's figure is larger than another's.

    Attributes:
        better: key of the row that should have the larger figure.
        worse: key of the other row.
        metric: of both rows' files.
        worse_metric: another metric of the second row; "" for the same.
    """

    better: str
    worse: str
    metric: str
    worse_metric: str = ""


COMPARISONS = (
    Comparison("detector-supervised", "detector-supervised", "AP50_novel", "AP50_base"),
    *(Comparison("student-best", "student-published", metric) for metric in (*TOP1, *AP50)),
    *(Comparison("student-published", "clip", metric) for metric in (*TOP1, *AP50)),
    *(Comparison("student-best", "clip-as-trained", metric) for metric in TOP1),
    *(
        Comparison(f"student-{head}", "student-best", metric)
        for head in ("shared", "dense")
        for metric in (*TOP1, *AP50)
    ),
    *(Comparison("detector-published", "detector-clip", metric) for metric in (*AP50, *AP)),
    *(Comparison("detector-best", "detector-published", metric) for metric in (*AP50, *AP)),
    *(
        Comparison(f"detector-{head}", "detector-best", metric)
        for head in ("shared", "dense")
        for metric in (*AP50, *AP)
    ),
    *(
        Comparison(detector, other, metric)
        for other in ("detector-best", "student-best")
        for detector in (
            "detector-frozen",
            "detector-trunk",
            "detector-0.5",
            "detector-chosen",
            "detector-ensemble",
            "detector-trunk-ensemble",
            "detector-0.5-ensemble",
            "detector-longer",
            "detector-longer-0.5",
            "detector-longer-ensemble",
        )
        for metric in (*AP50, *AP)
    ),
    *(Comparison("detector-best", "student-best", metric) for metric in (*AP50, *AP)),
    *(Comparison("detector-longer-ensemble", "detector-longer", metric) for metric in (*AP50, *AP)),
    *(
        Comparison(f"detector-{start}-0.5", f"detector-{start}", metric)
        for start in ("clip", "published")
        for metric in (*AP50, *AP)
    ),
    *(Comparison("student-published-scale", "student-published", metric) for metric in (*TOP1, *AP50)),
    *(
        Comparison(f"student-{name}", "student-best", metric)
        for name in ("mixed", "vit", "round-2", "soft", "hard", "localized", "names")
        for metric in (*TOP1, *AP50)
    ),
    *(
        Comparison(f"detector-{name}", other, metric)
        for other in ("detector-best", "student-best")
        for name in ("vit", "round-2", "names", "distilled", "gated", "pseudo", "kept", "kept-ensemble")
        for metric in (*AP50, *AP)
    ),
)


def steps_of(row: Row, steps: dict[str, Step]) -> list[Step]:
    """Returns everything that a row needs, each step after those that it needs itself."""
    order: dict[str, Step] = {}

    def visit(name: str) -> None:
        if name in order:
            return
        for needed in steps[name].needs:
            visit(needed)
        order[name] = steps[name]

    for name in row.measures:
        visit(name)
    return list(order.values())


def row_key(row: Row, world: str, seed: int, preset: str) -> str:
    """Returns the hash of all options that decide a row; defaults of the jobs are not among them."""
    place = Path("run")
    told = []
    for step in steps_of(row, all_steps(place, world, seed)):
        stage = step.stage
        if stage is None:
            told.append([step.name, *step.needs])
        else:
            options = read_yaml(shipped(stage.job, preset))
            told.append([step.name, stage.job, str(options), *stage.overrides])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def chosen(keys: Sequence[str], ablations: bool) -> list[Row]:
    """Returns the rows of these keys; without keys the main ones, with `ablations` all."""
    known = {row.key: row for row in ROWS}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise SystemExit(f"there is no row {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[key] for key in keys] if keys else [row for row in ROWS if row.main or ablations]
