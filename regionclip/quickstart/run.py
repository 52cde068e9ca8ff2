"""The job `quickstart`: runs all jobs on a synthetic dataset and writes a table and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_base.jobs.config import option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.runtime.progress import clock
from regionclip.quickstart.report import judge_mining, print_table, summary
from regionclip.quickstart.report_page import write_report
from regionclip.quickstart.stages import Stage, run_stages


@everyday(
    "quickstart out=quickstart",
    output="out preset seed",
)
@dataclass
class QuickstartConfig:
    """Options of the whole path."""

    out: str = option("quickstart", "folder for everything", runtime_only=True)
    seed: int = option(0, "determines the dataset, the initial weights and the order of training")
    preset: str = option("quickstart", "which of configs/*/PRESET.yaml the jobs use")


def stages(config: QuickstartConfig) -> list[Stage]:
    """Returns the path from a synthetic dataset to an evaluated detector."""
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
        Stage("generate images", "scenes", 0.5, (f"out={world}", f"seed={config.seed}")),
        Stage(
            "pretrain CLIP on image-text pairs",
            "pretrain",
            6,
            (f"out={out}/clip", "source.name=coco", *(f"source.{pair}" for pair in captions), seed),
        ),
        Stage(
            "train the proposal network on boxes of base classes",
            "region-train-rpn",
            1,
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
            0.5,
            (captions[0], f"out={out}/concepts.jsonl"),
        ),
        Stage(
            "mine region-phrase pairs",
            "region-mine",
            1,
            (*captions, f"weights={clip}", f"concepts={out}/concepts.jsonl", *own, f"out={out}/mined"),
        ),
        Stage(
            "pretrain regions",
            "region-pretrain",
            2.5,
            (f"mined={out}/mined", f"weights={clip}", f"out={out}/regionclip", seed),
        ),
    ]
    return first + _detectors(config, train, val, few, rpn, {"clip": clip, "regionclip": region})


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
                0.1,
                (*tested, "boxes=truth", f"out={out}/evaluation/{name}-truth"),
            ),
            Stage(
                f"detect with {name}, zero-shot",
                "region-evaluate",
                0.2,
                (*tested, *own, f"out={out}/evaluation/{name}-proposals"),
            ),
            Stage(
                f"train the detector from {name} on base classes",
                "region-train-detector",
                1,
                (*train, f"weights={weights}", f"rpn={rpn}", f"out={out}/{detector}", seed),
            ),
            Stage(
                f"detect with the detector from {name}",
                "region-evaluate",
                0.2,
                (*val, f"weights={out}/{detector}/model.safetensors", f"out={out}/evaluation/{detector}"),
            ),
        ]
    return rest


def quickstart(config: QuickstartConfig) -> None:
    """Runs every job on a synthetic dataset, about 15 minutes on two cores; writes report.html."""
    run = RunFolder(config.out, config, "region-quickstart")
    timings = run_stages(stages(config), config.preset, run.path / "timings.json")
    mined = judge_mining(run.path)
    page = write_report(run.path, mined)
    run.finish(summary(run.path, mined))
    print_table(run.path)
    print(f"{clock(sum(timings.values()))} in all; open {page} in a browser")
    print(
        f"try it: regionclip detect {run.path}/world/images/val "
        f'weights={run.path}/detector-regionclip/model.safetensors vocabulary="umbrella, cup, star"'
    )
