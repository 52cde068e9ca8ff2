"""The end of `regionclip quickstart`: the result table, its figures as data, and a page that stands alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_base.runtime.errors import InputError
from clip_base.runtime.files import read_json, write_text
from clip_base.training.loop import NO_LOSS
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split, load_split
from regionclip.mining.gallery import MAX_DRAWN, labeled_scenes
from regionclip.mining.quality import PairQuality, measure_pairs
from regionclip.mining.report_page import OUTCOME_COLORS, labeled_image, pick_pairs
from regionclip.mining.shards import MANIFEST, read_manifest, read_regions
from regionclip.reports import html
from regionclip.reports.charts import Chart, Points, grouped_bars, line_chart, stacked_bars
from regionclip.reports.crops import CropBudget
from regionclip.reports.html import DASH, percent

MODELS = {"clip": "CLIP (before region pretraining)", "regionclip": "RegionCLIP (after)"}
PARTS = ("base", "novel", "all")
PAIRS = 36  # mined pairs on the page


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


def _left(folder: Path, path: str) -> Path:
    """Returns a file that a stage leaves behind, when it is there."""
    if not (folder / path).exists():
        stage = Path(path).parent.as_posix() if "/" in path else Path(path).stem
        raise InputError(
            f"{folder} has no {path}: the stage {stage!r} has not ended; "
            f"run `regionclip quickstart out={folder}` again"
        )
    return folder / path


def _metrics(folder: Path, stage: str, names: Sequence[str]) -> dict[str, Any]:
    path = _left(folder, f"{stage}/metrics.json")
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


def table(folder: Path) -> list[list[str]]:
    """Returns the result table in percent: ten headings, CLIP, RegionCLIP, their difference in points."""
    header = ["", *(f"{group.title} {part}" for group in GROUPS for part in PARTS)]
    return [header, *_rows(results(Path(folder)))]


def _difference(before: float, after: float) -> str:
    """Returns the change of a share in points, with its sign; a dash where one of both was not measured."""
    return DASH if min(before, after) < 0 else f"{100 * (after - before):+.1f}"


def _rows(figures: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    rows = [[title, *(percent(figures[model][key]) for key in KEYS)] for model, title in MODELS.items()]
    changes = [_difference(figures["clip"][key], figures["regionclip"][key]) for key in KEYS]
    return [*rows, ["difference", *changes]]


def format_table(folder: Path) -> str:
    """Returns the result table as aligned plain text under two lines of headings."""
    rows = table(folder)[1:]
    first = max(len(row[0]) for row in rows)
    cell = -(-max(len(group.title) for group in GROUPS) // len(PARTS))
    lines = [" " * first + "".join(f"  {group.title:>{len(PARTS) * cell}}" for group in GROUPS)]
    for title, *cells in [["", *(PARTS * len(GROUPS))], *rows]:
        texts = (f"{'' if place % len(PARTS) else '  '}{text:>{cell}}" for place, text in enumerate(cells))
        lines.append(f"{title:<{first}}{''.join(texts)}")
    return "\n".join(lines)


def print_table(folder: Path, console: Console | None = None) -> None:
    """Prints the result table upright, so that it fits a terminal of 80 columns."""
    rows = _rows(results(Path(folder)))
    shown = Table(title="percent; of novel categories no training has seen a box", title_justify="left")
    for heading in ("", ""):
        shown.add_column(heading)
    for heading in ("CLIP", "RegionCLIP", "difference"):
        shown.add_column(heading, justify="right")
    for column, (group, part) in enumerate(((group, part) for group in GROUPS for part in PARTS), start=1):
        cells = (group.title if part == PARTS[0] else "", part, *(row[column] for row in rows))
        shown.add_row(*cells, style="bold" if part == "novel" else None, end_section=part == PARTS[-1])
    (console or Console()).print(shown)


def _split(folder: Path) -> Split:
    content = read_json(_left(folder, "world/instances_val.json"), "annotations")
    return load_split(_left(folder, "world/split.json"), [entry["name"] for entry in content["categories"]])


def judge_mining(folder: Path) -> PairQuality:
    """Returns the mined regions of a quickstart with the truth's verdicts; `summary` and the page need them.

    Raises:
        InputError: mining has not ended.
    """
    _left(folder, f"mined/{MANIFEST}")
    truth = CocoDetection(_left(folder, "world/instances_train.json"), None)
    return measure_pairs(list(read_regions(folder / "mined")), truth, _split(folder))


def _counts(folder: Path) -> dict[str, int]:
    """Counts what the run worked on."""
    captions = read_json(_left(folder, "world/captions_train.json"), "captions")
    validation = read_json(_left(folder, "world/instances_val.json"), "annotations")
    concepts = _left(folder, "concepts.jsonl").read_text(encoding="utf-8").splitlines()
    _left(folder, f"mined/{MANIFEST}")
    return {
        "train_scenes": len(captions["images"]),
        "val_scenes": len(validation["images"]),
        "captions": len(captions["annotations"]),
        "categories": len(validation["categories"]),
        "concepts": sum(bool(line.strip()) for line in concepts),
        "mined_regions": int(read_manifest(folder / "mined")["regions"]),
    }


def _recall(folder: Path) -> dict[str, float]:
    metrics = _metrics(folder, "rpn", RECALL)
    return {key: float(value) for key, value in metrics.items() if key.startswith(("recall@", "AR@"))}


def _timings(folder: Path) -> dict[str, float]:
    timings = read_json(_left(folder, "timings.json"), "timings")
    return {title: float(seconds) for title, seconds in timings.items()}


def summary(folder: Path, mined: PairQuality) -> dict[str, Any]:
    """Returns the figures of a finished quickstart, ready for metrics.json.

    Args:
        folder: the quickstart's.
        mined: from `judge_mining`.

    Returns:
        `results` (see there), `recall` (of proposals), `mining` (see `Judgement.metrics`), `counts`,
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


def write_report(folder: Path, mined: PairQuality) -> Path:
    """Writes `folder/report.html` from what the stages left there; it opens from disk and loads nothing else.

    Args:
        folder: the quickstart's.
        mined: from `judge_mining`.

    Raises:
        InputError: a stage has not ended; it is named.
    """
    folder = Path(folder)
    figures, split, timings = results(folder), _split(folder), _timings(folder)
    changes = {
        f"{group.measure} ({group.setting})": _difference(
            figures["clip"][f"{group.key}_novel"], figures["regionclip"][f"{group.key}_novel"]
        )
        for group in GROUPS
    }
    truth = CocoDetection(_left(folder, "world/instances_val.json"), folder / "world" / "images")
    found = read_json(_left(folder, "evaluation/detector-regionclip/results.json"), "results")
    threshold, scenes = labeled_scenes(truth.restrict(split.all), found, split)
    budget = CropBudget()
    pairs = (
        labeled_image(folder / "world" / "images", mined.regions[place], mined.words[place], budget)
        for place in pick_pairs(mined.regions, PAIRS)
    )
    page = html.render(
        "quickstart.html",
        counts=_counts(folder),
        split=split,
        timings=timings,
        groups=[group.title for group in GROUPS],
        parts=PARTS,
        rows=_rows(figures),
        changes={what: change for what, change in changes.items() if change != DASH},
        threshold=threshold,
        max_drawn=MAX_DRAWN,
        scenes=scenes,
        mining=mined.metrics(),
        mining_charts=_mining_charts(mined),
        pairs=[pair for pair in pairs if pair is not None],
        budget=budget,
        recall_chart=_recall_chart(folder),
        per_class=_per_class(folder, split),
        loss_charts=_loss_charts(folder),
        folder=folder,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _mining_charts(mined: PairQuality) -> list[Chart]:
    mining, names = mined.metrics(), ("precision", "recall")
    series = {part: [mining[f"{name}_{part}"] for name in names] for part in ("base", "novel")}
    title = "Outcomes by probability (bins of 0.1; number of pairs below)"
    return [
        grouped_bars("Mined pairs against the ground truth", names, series),
        stacked_bars(title, *mined.by_bin(mined.probabilities), colors=OUTCOME_COLORS),
    ]


def _recall_chart(folder: Path) -> Chart:
    recall = _recall(folder)
    series = {part: [recall[f"recall@{limit}_{part}"] for limit in (10, 100)] for part in ("base", "novel")}
    return grouped_bars("Recall of proposals", ("best 10", "best 100"), series)


def _losses(folder: Path, stage: str) -> dict[str, Points]:
    """Reads a training log: loss -> (step, value)."""
    path = _left(folder, f"{stage}/log.jsonl")
    losses: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(
                f"{path}, line {number}, is not valid JSON; delete {folder / stage} and run again"
            ) from None
        if "lr" in entry:  # other lines are measurements
            for name in entry.keys() - NO_LOSS:
                losses.setdefault(name.replace("_", "-"), []).append((entry["step"], entry[name]))
    return dict(sorted(losses.items()))


def _loss_charts(folder: Path) -> list[Chart]:
    titles = {
        "clip": "CLIP, image-text loss",
        "rpn": "Proposal network, losses",
        "regionclip": "Regions, losses",
    }
    charts = [line_chart(title, _losses(folder, stage)) for stage, title in titles.items()]
    starts = {"clip": "from CLIP", "regionclip": "from RegionCLIP"}
    sums = {label: _total(_losses(folder, f"detector-{start}")) for start, label in starts.items()}
    return [*charts, line_chart("Detector on base categories, sum of its losses", sums)]


def _total(losses: Mapping[str, Points]) -> Points:
    total: dict[float, float] = {}
    for line in losses.values():
        for step, value in line:
            total[step] = total.get(step, 0.0) + value
    return sorted(total.items())


def _per_class(folder: Path, split: Split) -> list[dict[str, Any]]:
    """Returns AP50 of each category, from CLIP and from RegionCLIP: novel ones first, the best first."""
    aps: list[dict[str, float]] = []
    objects: dict[str, int] = {}
    for model in MODELS:
        path = _left(folder, f"evaluation/detector-{model}/per_class.csv")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        aps.append({row["name"]: float(row["AP50"]) for row in rows})
        objects = {row["name"]: int(row["boxes"]) for row in rows}
    if aps[0].keys() != aps[1].keys():
        raise InputError(
            f"{folder}: the two detectors were evaluated on different categories; evaluate both again"
        )
    before, after = aps
    return [
        {
            "name": name,
            "novel": name in split.novel,
            "objects": objects[name],
            "before": before[name],
            "after": after[name],
            "change": _difference(before[name], after[name]),
        }
        for name in sorted(after, key=lambda name: (name not in split.novel, -after[name], name))
    ]
