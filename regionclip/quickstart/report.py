"""Results of the quickstart: the table and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, read_json_lines
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split, load_split
from regionclip.mining.quality import PairQuality, measure_pairs
from regionclip.mining.shards import MANIFEST, read_manifest, read_regions
from regionclip.reports.html import DASH, percent

MODELS = {"clip": "CLIP (before region pretraining)", "regionclip": "RegionCLIP (after)"}
PARTS = ("base", "novel", "all")


@dataclass(frozen=True)
class Group:
    """Three columns of the result table.

    Attributes:
        key: name in `results`.
        setting: what was done.
        measure: what is counted.
        folder: of the evaluation, below `evaluation`; {} is the model.
        metrics: names of the base, novel and all figures in its metrics.json.
    """

    key: str
    setting: str
    measure: str
    folder: str
    metrics: tuple[str, str, str]

    @property
    def title(self) -> str:
        """What was done and counted."""
        return f"{self.setting}: {self.measure}"


AP50 = ("AP50_base", "AP50_novel", "AP50_all")
GROUPS = (
    Group("truth", "zero-shot, true boxes", "top-1", "{}-truth", ("top1_base", "top1_novel", "top1")),
    Group("proposals", "zero-shot, own proposals", "AP50", "{}-proposals", AP50),
    Group("detector", "detector trained on base", "AP50", "detector-{}", AP50),
)
KEYS = tuple(f"{group.key}_{part}" for group in GROUPS for part in PARTS)
RECALL = tuple(f"recall@{limit}{suffix}" for limit in (10, 100) for suffix in ("", "_base", "_novel"))


def stage_file(folder: Path, path: str) -> Path:
    """Returns a file that a stage leaves behind, when it is there."""
    if not (folder / path).exists():
        stage = Path(path).parent.as_posix() if "/" in path else Path(path).stem
        raise InputError(
            f"{folder} has no {path}: the stage {stage!r} is not finished; "
            f"run `regionclip quickstart out={folder}` again"
        )
    return folder / path


def _metrics(folder: Path, stage: str, names: Sequence[str]) -> dict[str, Any]:
    path = stage_file(folder, f"{stage}/metrics.json")
    metrics: dict[str, Any] = read_json(path, "metrics")
    absent = [name for name in names if name not in metrics]
    if absent:
        raise InputError(
            f"{path} has no {', '.join(absent)}; run that stage with split= and, for rpn, val_annotations="
        )
    return metrics


def results(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the result table's figures: model -> KEYS -> share in [0, 1], or -1 where nothing was measured.

    Raises:
        InputError: an evaluation has not ended.
    """
    figures: dict[str, dict[str, float]] = {model: {} for model in MODELS}
    for model in MODELS:
        for group in GROUPS:
            metrics = _metrics(folder, f"evaluation/{group.folder.format(model)}", group.metrics)
            for part, name in zip(PARTS, group.metrics, strict=True):
                figures[model][f"{group.key}_{part}"] = float(metrics[name])
    return figures


def difference(before: float, after: float) -> str:
    """Returns the change of a share in points, with its sign; a dash where one of both was not measured."""
    return DASH if min(before, after) < 0 else f"{100 * (after - before):+.1f}"


def result_rows(figures: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Returns the table of `results` in percent: CLIP, RegionCLIP, their difference in points."""
    rows = [[title, *(percent(figures[model][key]) for key in KEYS)] for model, title in MODELS.items()]
    changes = [difference(figures["clip"][key], figures["regionclip"][key]) for key in KEYS]
    return [*rows, ["difference", *changes]]


def print_table(folder: Path, console: Console | None = None) -> None:
    """Prints the result table upright, so that it fits a terminal of 80 columns."""
    rows = result_rows(results(Path(folder)))
    shown = Table(title="percent; of novel categories no training has seen a box", title_justify="left")
    for heading in ("", ""):
        shown.add_column(heading)
    for heading in ("CLIP", "RegionCLIP", "difference"):
        shown.add_column(heading, justify="right")
    for column, (group, part) in enumerate(((group, part) for group in GROUPS for part in PARTS), start=1):
        cells = (group.title if part == PARTS[0] else "", part, *(row[column] for row in rows))
        shown.add_row(*cells, style="bold" if part == "novel" else None, end_section=part == PARTS[-1])
    (console or Console()).print(shown)


def read_split(folder: Path) -> Split:
    """Returns the base and novel categories of a quickstart."""
    content = read_json(stage_file(folder, "world/instances_val.json"), "annotations")
    return load_split(
        stage_file(folder, "world/split.json"), [entry["name"] for entry in content["categories"]]
    )


def judge_mining(folder: Path) -> PairQuality:
    """Returns the mined regions of a quickstart with the truth's outcomes; `summary` and the page need them.

    Raises:
        InputError: mining has not ended.
    """
    stage_file(folder, f"mined/{MANIFEST}")
    truth = CocoDetection(stage_file(folder, "world/instances_train.json"), None)
    return measure_pairs(list(read_regions(folder / "mined")), truth, read_split(folder))


def _counts(folder: Path) -> dict[str, int]:
    """Counts what the run worked on."""
    captions = read_json(stage_file(folder, "world/captions_train.json"), "captions")
    validation = read_json(stage_file(folder, "world/instances_val.json"), "annotations")
    stage_file(folder, f"mined/{MANIFEST}")
    return {
        "train_scenes": len(captions["images"]),
        "val_scenes": len(validation["images"]),
        "captions": len(captions["annotations"]),
        "categories": len(validation["categories"]),
        "concepts": sum(1 for _ in read_json_lines(stage_file(folder, "concepts.jsonl"), "concepts")),
        "mined_regions": int(read_manifest(folder / "mined")["regions"]),
    }


def _recall(folder: Path) -> dict[str, float]:
    metrics = _metrics(folder, "rpn", RECALL)
    return {key: float(value) for key, value in metrics.items() if key.startswith(("recall@", "AR@"))}


def _timings(folder: Path) -> dict[str, float]:
    timings = read_json(stage_file(folder, "timings.json"), "timings")
    return {title: float(seconds) for title, seconds in timings.items()}


def summary(folder: Path, mined: PairQuality) -> dict[str, Any]:
    """Returns the figures of a finished quickstart, ready for metrics.json.

    Args:
        folder: the quickstart's.
        mined: from `judge_mining`.

    Returns:
        `results` (see there), `recall` (of proposals), `mining` (see `PairLabels.metrics`), `counts`,
        `timings` (seconds a stage) and `seconds` in all.

    Raises:
        InputError: a stage has not ended; it is named.
    """
    folder = Path(folder)
    timings = _timings(folder)
    return {
        "results": results(folder),
        "recall": _recall(folder),
        "mining": mined.metrics(),
        "counts": _counts(folder),
        "timings": timings,
        "seconds": round(sum(timings.values()), 1),
    }
