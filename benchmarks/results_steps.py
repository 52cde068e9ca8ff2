"""The steps that make the rows of the results tables: jobs with their options, and which needs which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_students import MINED, STUDENTS, TEACHERS, Student

from clip_base.models.clip import CLIP
from clip_base.storage.files import read_json, write_json
from clip_base.synthetic.splits import balanced
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip
from regionclip.quickstart.stages import Stage

ALPHAS = ("0.0", "0.25", "0.75")  # exponents of objectness beside 0.5, the recipe's
BACKGROUND_WEIGHTS = ("0.05", "1.0")  # beside 0.2, the recipe's
CURVE = ("0.25", "0.5", "0.75")  # as configs/region-interpolate/results.yaml has them
HALVED = {"clip": "clip", "published": "student-published", "longer": "student-best"}
"""Detectors beside our best that are interpolated by half with what they began with."""
PRETEND_SEED = 1000  # added to the seed for the images on which a factor is chosen
VIT = (
    *("tower.vision.kind=vit", "tower.vision.layers=[6]", "tower.vision.width=192", "tower.vision.patch=8"),
    *("train.steps=900",),
)
"""A vision transformer as a teacher: options of CLIP's training, beside configs/pretrain/results.yaml."""
SUPERVISED_STEPS = 400  # twice the others', so that the bound is less one of training time

WORLDS: dict[str, tuple[str, ...]] = {
    "fair": (),
    "hard": ("categories=35", "attributes=[striped,tall]", "novel=26", "synonyms=0.3", "images=20000"),
}
"""Options of `clip-base scenes` beside configs/scenes/results.yaml, by the dataset's name."""
LONGER: dict[str, tuple[str, ...]] = {"fair": (), "hard": ("train.steps=1200",)}
"""Options of CLIP's training by dataset: 105 names take longer to learn than 32."""


@dataclass(frozen=True)
class Step:
    """Something to be done once for a dataset and seed.

    Attributes:
        name: unique; also the folder that it leaves, in the seed's folder.
        needs: names of the steps that come before.
        stage: the job; None for what `work` does.
        work: does it, given the seed's folder and the seed.
    """

    name: str
    needs: tuple[str, ...]
    stage: Stage | None = None
    work: Callable[[Path, int], None] | None = None


class Steps:
    """Collects the steps of one dataset and seed.

    Args:
        folder: of the dataset and seed.
        world: a key of `WORLDS`.
        seed: of the dataset and of every training.
    """

    def __init__(self, folder: Path, world: str, seed: int) -> None:
        self.folder, self.world, self.seed = folder, folder / "world", f"train.seed={seed}"
        self.found: dict[str, Step] = {}
        self._shared(world, seed)

    def add(self, name: str, job: str, minutes: float, needs: tuple[str, ...], *options: str) -> None:
        """Adds a job that writes the folder `name`; minutes on one core, for the estimate of what is left."""
        out = f"out={self.folder}/{name}"
        self.found[name] = Step(name, needs, Stage(name, job, minutes, (*options, out)))

    def model(self, name: str) -> Path:
        return self.folder / name / "model.safetensors"

    def boxes(self, part: str, split: str = "world", world: str = "world") -> tuple[str, ...]:
        place = self.folder / world
        annotations = f"annotations={place}/instances_{part}.json"
        return (annotations, f"images={place}/images", f"split={self.folder}/{split}/split.json")

    def captions(self, part: str) -> tuple[str, ...]:
        return (f"captions={self.world}/captions_{part}.json", f"images={self.world}/images")

    def _shared(self, world: str, seed: int) -> None:
        """Adds what all rows share: dataset, CLIP, proposal network, concepts, proposals."""
        self.add("world", "scenes", 1.0, (), *WORLDS[world], f"seed={seed}")
        pairs = (f"source.{pair}" for pair in self.captions("train"))
        self.add("clip", "pretrain", 11, ("world",), "source.name=coco", *pairs, *LONGER[world], self.seed)
        self.rpn("rpn", ())
        concepts = f"{self.folder}/concepts/concepts.jsonl"
        stage = Stage("concepts", "region-concepts", 0.5, (self.captions("train")[0], f"out={concepts}"))
        self.found["concepts"] = Step("concepts", ("world",), stage)
        weights = f"proposer.weights={self.model('rpn')}"
        options = (*self.boxes("train"), "proposer.name=rpn", weights)
        self.add("proposals", "region-propose", 2, ("rpn",), *options)
        self.found["random"] = Step("random", ("clip",), work=forget_vision)
        self.found["all-classes"] = Step("all-classes", ("world",), work=join_split)

    def rpn(self, name: str, needs: tuple[str, ...], split: str = "world") -> None:
        val = f"val_annotations={self.world}/instances_val.json"
        clip = f"network.backbone_weights={self.model('clip')}"
        self.add(
            name, "region-train-rpn", 3, ("clip", *needs), *self.boxes("train", split), val, clip, self.seed
        )

    def mining(self, name: str) -> None:
        teacher = TEACHERS.get(name, "clip")
        concepts, file = (
            f"concepts={self.folder}/concepts/concepts.jsonl",
            f"{self.folder}/proposals/proposals.json",
        )
        proposer = ("proposer.name=precomputed", f"proposer.file={file}")
        options = (
            *self.captions("train"),
            f"weights={self.model(teacher)}",
            concepts,
            *proposer,
            *MINED[name],
        )
        needs = ("proposals", "concepts", *((teacher,) if name in TEACHERS else ()))
        self.add(f"mined-{name}", "region-mine", 1.5, needs, *options)

    def student(self, name: str, student: Student) -> None:
        """Adds a region pretraining, and its pairs."""
        mined = f"mined-{student.mined}"
        if mined not in self.found:
            self.mining(student.mined)
        options = (
            f"mined={self.folder}/{mined}",
            f"weights={self.model('clip')}",
            *student.options,
            self.seed,
        )
        self.add(f"student-{name}", "region-pretrain", 3, (mined,), *options)
        self.zero_shot(f"student-{name}")

    def zero_shot(self, name: str, file: Path | None = None, made_by: str = "") -> None:
        """Adds the evaluations without detector training: true boxes, proposals, and retrieval."""
        weights = f"weights={file or self.model(name)}"
        own = ("proposer.name=rpn", f"proposer.weights={self.model('rpn')}", "proposer.limit=30")
        needs, val = (made_by or name,), (*self.boxes("val"), weights)
        self.add(f"{name}-truth", "region-evaluate", 0.2, needs, *val, "boxes=truth")
        self.add(f"{name}-proposals", "region-evaluate", 0.5, ("rpn", *needs), *val, *own)
        self.add(f"{name}-retrieval", "retrieval", 0.2, needs, weights, *self.captions("val"))

    def detector(
        self,
        name: str,
        start: str,
        *options: str,
        split: str = "world",
        rpn: str = "rpn",
        needs: tuple[str, ...] = (),
    ) -> None:
        """Adds the training of a detector on the base classes of a split, and its evaluation."""
        self.training(name, start, needs, *options, split=split, rpn=rpn)
        self.evaluation(f"detector-{name}", self.model(f"detector-{name}"), f"detector-{name}")

    def training(
        self, name: str, start: str, needs: tuple[str, ...], *options: str, split: str, rpn: str = "rpn"
    ) -> None:
        """Adds the training of a detector alone."""
        files = (f"weights={self.model(start)}", f"rpn={self.model(rpn)}", *options, self.seed)
        boxes = self.boxes("train", split)
        self.add(f"detector-{name}", "region-train-detector", 2.5, (start, rpn, *needs), *boxes, *files)

    def evaluation(self, name: str, weights: Path, made_by: str, *options: str) -> None:
        own = (*self.boxes("val"), f"weights={weights}", *options)
        self.add(f"{name}-evaluation", "region-evaluate", 0.5, (made_by,), *own)

    def curve(self, name: str, first: str, second: str) -> None:
        """Adds an interpolation of two models' weights."""
        ends = (f"first={self.model(first)}", f"second={self.model(second)}")
        self.add(name, "region-interpolate", 0.1, (first, second), *ends)


def all_steps(folder: Path, world: str, seed: int) -> dict[str, Step]:
    """Returns every step of every row, by name; `steps_of` picks those of one."""
    steps = Steps(folder, world, seed)
    steps.zero_shot("random")
    steps.zero_shot("clip")
    small = ("resize.short=[64]", "resize.long=64", "boxes=truth")
    weights = f"weights={steps.model('clip')}"
    steps.add(
        "clip-as-trained-truth", "region-evaluate", 0.2, ("clip",), *steps.boxes("val"), weights, *small
    )
    for name, kind in STUDENTS.items():
        steps.student(name, kind)
    steps.detector("clip", "clip")
    for name in ("published", "best", "shared"):
        steps.detector(name, f"student-{name}")
    steps.rpn("rpn-all", ("all-classes",), "all-classes")
    longer = f"train.steps={SUPERVISED_STEPS}"
    steps.detector("supervised", "student-best", longer, split="all-classes", rpn="rpn-all")
    steps.detector("dense", "student-dense")
    steps.detector("frozen", "student-best", "freeze_stages=5")
    for weight in BACKGROUND_WEIGHTS:
        steps.detector(f"background-{weight}", "student-best", f"background_weight={weight}")
    best = steps.model("detector-best")
    for alpha in ALPHAS:
        fusion = (f"detector.alpha_base={alpha}", f"detector.alpha_novel={alpha}")
        steps.evaluation(
            f"detector-alpha-{alpha}", best, "detector-best", "use_checkpoint_config=false", *fusion
        )
    student = f"student.weights={steps.model('student-best')}"
    steps.evaluation("detector-ensemble", best, "detector-best", student)
    steps.detector("trunk", "student-best", "freeze_stages=4")
    steps.evaluation("detector-trunk-ensemble", steps.model("detector-trunk"), "detector-trunk", student)
    steps.detector("longer", "student-best", longer)
    steps.evaluation("detector-longer-ensemble", steps.model("detector-longer"), "detector-longer", student)
    _add_curves(steps)
    _add_choice(steps, world, seed)
    _add_candidates(steps, world)
    return steps.found


def _add_curves(steps: Steps) -> None:
    """Adds the interpolations: from the CLIP to our best student, from it to its detector, and by half."""
    steps.curve("curve-student", "clip", "student-best")
    steps.curve("curve-detector", "student-best", "detector-best")
    for alpha in CURVE:
        file = f"alpha-{alpha}.safetensors"
        steps.zero_shot(f"student-{alpha}", steps.folder / "curve-student" / file, "curve-student")
        place = steps.folder / "curve-detector" / file
        steps.evaluation(f"detector-{alpha}", place, "curve-detector")
    for detector, start in HALVED.items():
        steps.curve(f"curve-{detector}", start, f"detector-{detector}")
        place = steps.folder / f"curve-{detector}" / "alpha-0.5.safetensors"
        steps.evaluation(f"detector-{detector}-0.5", place, f"curve-{detector}")
    half = steps.folder / "curve-detector" / "alpha-0.5.safetensors"
    student = f"student.weights={steps.model('student-best')}"
    steps.evaluation("detector-0.5-ensemble", half, "curve-detector", student)


def _add_candidates(steps: Steps, world: str) -> None:
    """Adds a ViT teacher, students of the later recipes, and detectors that keep what was known before."""
    pairs = (f"source.{pair}" for pair in steps.captions("train"))
    options = ("source.name=coco", *pairs, *VIT, *LONGER[world], steps.seed)
    steps.add("clip-vit", "pretrain", 15, ("world",), *options)
    steps.zero_shot("clip-vit")
    for name in ("published-scale", "vit", "names", "round-2"):
        steps.detector(name, f"student-{name}")
    mined, file = steps.folder / "mined-exclusive", steps.folder / "pseudo-labels" / "instances.json"
    classes = f"classes=[{steps.world}/instances_train.json]"
    stage = Stage("pseudo-labels", "region-export", 0.1, (f"mined={mined}", classes, f"out={file}"))
    steps.found["pseudo-labels"] = Step("pseudo-labels", ("mined-exclusive",), stage)
    labels = f"pseudo_labels={file}"
    steps.detector("distilled", "student-best", "proposal_distillation=1.0")
    steps.detector("gated", "student-best", "background_gate=0.5")
    steps.detector("pseudo", "student-best", labels, needs=("pseudo-labels",))
    together = ("proposal_distillation=1.0", "background_gate=0.5", labels)
    steps.detector("kept", "student-best", *together, needs=("pseudo-labels",))
    student = f"student.weights={steps.model('student-best')}"
    steps.evaluation("detector-kept-ensemble", steps.model("detector-kept"), "detector-kept", student)


def _add_choice(steps: Steps, world: str, seed: int) -> None:
    """Adds the interpolated detector whose factor is chosen without a look at novel classes or at val.

    A second detector is trained without a quarter of the base classes, which are novel as far as it goes;
    the factor is the one that is best for it, on images of their own.
    """
    images = ("images=1", "val_images=300", f"seed={PRETEND_SEED + seed}")
    own = [option for option in WORLDS[world] if not option.startswith("images=")]
    steps.add("pretend-world", "scenes", 0.1, (), *own, *images)
    steps.found["pretend"] = Step("pretend", ("world",), work=hold_out)
    steps.training("pretend", "student-best", ("pretend",), split="pretend")
    steps.curve("curve-pretend", "student-best", "detector-pretend")
    evaluated = []
    for alpha in (*CURVE, "1.0"):
        file = steps.folder / "curve-pretend" / f"alpha-{alpha}.safetensors"
        weights = steps.model("detector-pretend") if alpha == "1.0" else file
        options = (*steps.boxes("val", "pretend", "pretend-world"), f"weights={weights}")
        needs = ("curve-pretend", "pretend-world")
        evaluated.append(f"pretend-{alpha}-evaluation")
        steps.add(evaluated[-1], "region-evaluate", 0.3, needs, *options)
    ends = ("detector-best-evaluation", *(f"detector-{alpha}-evaluation" for alpha in CURVE))
    name = "detector-chosen-evaluation"
    steps.found[name] = Step(name, (*evaluated, *ends), work=choose_factor)


def forget_vision(folder: Path, seed: int) -> None:
    """Writes `random/model.safetensors`: the CLIP's text tower, its vision tower with random weights."""
    path = folder / "random" / "model.safetensors"
    if path.exists():
        return
    trained = load_clip(str(folder / "clip" / "model.safetensors"))
    torch.manual_seed(seed)
    fresh = CLIP(trained.config)
    trained.visual.load_state_dict(fresh.visual.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_clip(trained, path)


def join_split(folder: Path, seed: int) -> None:
    """Writes `all-classes/split.json`: every category is a base category, for the upper bound."""
    split: dict[str, Any] = read_json(folder / "world" / "split.json")
    write_json(folder / "all-classes" / "split.json", {"base": split["base"] + split["novel"], "novel": []})


def hold_out(folder: Path, seed: int) -> None:
    """Writes `pretend/split.json`: a quarter of the base classes are novel, the novel ones take no part."""
    base: list[str] = read_json(folder / "world" / "split.json")["base"]
    novel = balanced(base, len(base) // 4, seed)
    kept = [name for name in base if name not in novel]
    write_json(folder / "pretend" / "split.json", {"base": kept, "novel": novel})


def choose_factor(folder: Path, seed: int) -> None:
    """Writes the metrics of the interpolated detector whose factor was best on pretend-novel classes.

    Best is the largest mean of AP50 of the classes that were trained on and of those that were not.
    """
    means = {}
    for alpha in (*CURVE, "1.0"):
        found = read_json(folder / f"pretend-{alpha}-evaluation" / "metrics.json")
        means[alpha] = (found["AP50_base"] + found["AP50_novel"]) / 2
    best = max(means, key=lambda alpha: means[alpha])
    name = "detector-best" if best == "1.0" else f"detector-{best}"
    metrics = read_json(folder / f"{name}-evaluation" / "metrics.json")
    write_json(folder / "detector-chosen-evaluation" / "metrics.json", {**metrics, "factor": float(best)})
