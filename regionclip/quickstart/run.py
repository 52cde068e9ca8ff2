"""The job `quickstart`: runs all jobs on a synthetic dataset and writes a table and a report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from clip_base.jobs.config import option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import clock
from clip_base.storage.files import read_json, write_json
from regionclip.quickstart.pace import measure_pace
from regionclip.quickstart.report import judge_mining, print_table, summary
from regionclip.quickstart.report_page import write_report
from regionclip.quickstart.stages import Stage, run_stages

PRESET = "quickstart"
SIZES = ("auto", "full", "small")
LONGEST = 10.0  # minutes that the full size may take, or the small one is made
SMALL: dict[str, tuple[str, ...]] = {
    "scenes": ("images=4000", "val_images=250"),
    "pretrain": ("train.steps=220",),
    "region-train-rpn": ("train.steps=100",),
    "region-pretrain": ("train.steps=90",),
    "region-train-detector": ("train.steps=60",),
}
"""What the small size changes, by job."""
SMALL_SHARE = 0.6  # of the full size's minutes


@everyday(
    "quickstart out=quickstart",
    output="out size preset seed",
)
@dataclass
class QuickstartConfig:
    """Options of the whole path."""

    out: str = option("quickstart", "folder for everything", runtime_only=True)
    seed: int = option(0, "determines the dataset, the initial weights and the order of training")
    size: str = option(
        "auto",
        f"full, small (half of the work), or auto: small where full takes over {LONGEST:.0f} minutes",
    )
    preset: str = option(PRESET, "which of configs/*/PRESET.yaml the jobs use")

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise InputError(f"size must be one of {', '.join(SIZES)}, found {self.size!r}")
        if self.size == "small" and self.preset != PRESET:
            raise InputError(f"size=small is for preset={PRESET}; leave it out with preset={self.preset}")


def stages(config: QuickstartConfig, size: str = "full") -> list[Stage]:
    """Returns the path from a synthetic dataset to an evaluated detector, in one of `SIZES` but auto."""
    out = Path(config.out)
    world, seed = out / "world", f"train.seed={config.seed}"
    train = (
        f"annotations={world}/instances_train.json",
        f"images={world}/images",
        f"split={world}/split.json",
    )
    val = (f"annotations={world}/instances_val.json", f"images={world}/images", f"split={world}/split.json")
    captions = (f"captions={world}/captions_train.json", f"images={world}/images")
    clip, region, rpn = (f"{out}/{name}/model.safetensors" for name in ("clip", "regionclip", "rpn"))
    own = ("proposer.name=rpn", f"proposer.weights={rpn}")
    few = (*own, "proposer.limit=30")
    first = [
        Stage("generate images", "scenes", 0.12, (f"out={world}", f"seed={config.seed}")),
        Stage(
            "pretrain CLIP on image-text pairs",
            "pretrain",
            1.7,
            (f"out={out}/clip", "source.name=coco", *(f"source.{pair}" for pair in captions), seed),
        ),
        Stage(
            "train the proposal network on boxes of base classes",
            "region-train-rpn",
            0.48,
            (
                *train,
                f"val_annotations={world}/instances_val.json",
                f"network.backbone_weights={clip}",
                f"out={out}/rpn",
                seed,
            ),
        ),
        Stage(
            "collect concepts from the captions",
            "region-concepts",
            0.16,
            (captions[0], f"out={out}/concepts.jsonl"),
        ),
        Stage(
            "mine region-phrase pairs",
            "region-mine",
            0.58,
            (*captions, f"weights={clip}", f"concepts={out}/concepts.jsonl", *own, f"out={out}/mined"),
        ),
        Stage(
            "pretrain regions",
            "region-pretrain",
            1.08,
            (f"mined={out}/mined", f"weights={clip}", f"out={out}/regionclip", seed),
        ),
    ]
    every = first + _detectors(config, train, val, few, rpn, {"clip": clip, "regionclip": region})
    return [made_small(stage) for stage in every] if size == "small" else every


def made_small(stage: Stage) -> Stage:
    """Returns a stage of the small size."""
    overrides = SMALL.get(stage.job, ())
    return replace(stage, overrides=(*stage.overrides, *overrides), minutes=stage.minutes * SMALL_SHARE)


def _detectors(
    config: QuickstartConfig,
    train: tuple[str, ...],
    val: tuple[str, ...],
    own: tuple[str, ...],
    rpn: str,
    towers: dict[str, str],
) -> list[Stage]:
    """Returns, for each CLIP by name, its zero-shot evaluations, its detector and that one's evaluation."""
    out, seed = Path(config.out), f"train.seed={config.seed}"
    rest = []
    for name, weights in towers.items():
        detector = f"detector-{name}"
        tested = (*val, f"weights={weights}")
        rest += [
            Stage(
                f"name true boxes with {name}",
                "region-evaluate",
                0.035,
                (*tested, "boxes=truth", f"out={out}/evaluation/{name}-truth"),
            ),
            Stage(
                f"detect with {name}, zero-shot",
                "region-evaluate",
                0.13,
                (*tested, *own, f"out={out}/evaluation/{name}-proposals"),
            ),
            Stage(
                f"train the detector from {name} on base classes",
                "region-train-detector",
                0.37,
                (*train, f"weights={weights}", f"rpn={rpn}", f"out={out}/{detector}", seed),
            ),
            Stage(
                f"detect with the detector from {name}",
                "region-evaluate",
                0.13,
                (*val, f"weights={out}/{detector}/model.safetensors", f"out={out}/evaluation/{detector}"),
            ),
        ]
    return rest


def quickstart(config: QuickstartConfig) -> None:
    """Runs every job on a synthetic dataset, some minutes on two cores; writes report.html."""
    run = RunFolder(config.out, config, "region-quickstart")
    pace, size = chosen_size(config, run.path / "pace.json")
    timings = run_stages(stages(config, size), config.preset, run.path / "timings.json", pace)
    mined = judge_mining(run.path)
    page = write_report(run.path, mined)
    run.finish(summary(run.path, mined))
    print_table(run.path)
    print(f"{clock(sum(timings.values()))} in all; open {page} in a browser")
    print(
        f"try it: regionclip detect {run.path}/world/images/val "
        f'weights={run.path}/detector-regionclip/model.safetensors vocabulary="umbrella, cup, star"'
    )


def chosen_size(config: QuickstartConfig, path: Path) -> tuple[float, str]:
    """Measures the machine and chooses the size, once per folder: a resumed run keeps both.

    Args:
        config: whose size is wanted.
        path: JSON file that keeps the choice.

    Returns:
        The pace (`measure_pace`), and "full" or "small".
    """
    if path.exists():
        kept = read_json(path, "the quickstart's size")
        return float(kept["pace"]), str(kept["size"])
    pace = measure_pace()
    minutes = {size: pace * sum(one.minutes for one in stages(config, size)) for size in SIZES[1:]}
    slow = config.preset == PRESET and minutes["full"] > LONGEST
    size = config.size if config.size != "auto" else "small" if slow else "full"
    if config.size == "auto" and size == "small":
        print(
            f"the full size would take about {minutes['full']:.0f} minutes here, so the small one is made, "
            "with fewer images and steps; size=full makes the other",
            flush=True,
        )
    write_json(path, {"pace": round(pace, 3), "size": size})
    return pace, size
