"""The quickstart's HTML report: data for its template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from clip_base.images.html import data_uri
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, read_json_lines, write_text
from clip_base.storage.tables import open_table
from clip_base.training.curves import NO_LOSS
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.batches import read_record
from regionclip.data.categories import Split
from regionclip.metrics.matching import BACKGROUND, CORRECT, MISCLASSIFIED, MatchResult, match_to_ground_truth
from regionclip.mining.quality import PairQuality
from regionclip.mining.report_page import labeled_image, outcome_chart, pick_pairs
from regionclip.quickstart.report import (
    GROUPS,
    MODELS,
    PARTS,
    difference,
    read_split,
    result_rows,
    stage_file,
    summary,
)
from regionclip.reports import html
from regionclip.reports.charts import Chart, Points, line_chart, share_bars
from regionclip.reports.crops import CropBudget, LabeledImage
from regionclip.reports.html import DASH
from regionclip.structures.drawing import draw

SCENES, PAIRS = 12, 36  # on the page
MAX_DRAWN = 10  # a detector that has learned nothing would cover a scene with boxes
BLUE, ORANGE, GRAY = (47, 111, 208), (235, 135, 30), (120, 124, 130)


def write_report(folder: Path, mined: PairQuality) -> Path:
    """Writes `folder/report.html` from what the stages left there; it opens from disk and loads nothing else.

    Args:
        folder: the quickstart's.
        mined: from `judge_mining`.

    Raises:
        InputError: a stage has not ended; it is named.
    """
    folder = Path(folder)
    figures, split = summary(folder, mined), read_split(folder)
    changes = {
        f"{group.measure} ({group.setting})": difference(
            *(figures["results"][model][f"{group.key}_novel"] for model in MODELS)
        )
        for group in GROUPS
    }
    truth = CocoDetection(stage_file(folder, "world/instances_val.json"), folder / "world" / "images")
    found = read_json(stage_file(folder, "evaluation/detector-regionclip/results.json"), "results")
    threshold, scenes = labeled_scenes(truth.restrict(split.all), found, split)
    budget, images = CropBudget(), folder / "world" / "images"
    pairs = (
        labeled_image(images / region.file_name, region, mined.words[place], budget)
        for place, region in ((place, mined.regions[place]) for place in pick_pairs(mined.regions, PAIRS))
    )
    page = html.render(
        "quickstart.html",
        **figures,
        split=split,
        groups=[group.title for group in GROUPS],
        parts=PARTS,
        rows=result_rows(figures["results"]),
        changes={what: change for what, change in changes.items() if change != DASH},
        threshold=threshold,
        max_drawn=MAX_DRAWN,
        scenes=scenes,
        mining_charts=_mining_charts(mined),
        pairs=[pair for pair in pairs if pair is not None],
        budget=budget,
        recall_chart=share_bars(
            "Recall of proposals",
            ("best 10", "best 100"),
            {
                part: [figures["recall"][f"recall@{limit}_{part}"] for limit in (10, 100)]
                for part in ("base", "novel")
            },
        ),
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
    return [
        share_bars("Mined pairs against the ground truth", names, series),
        outcome_chart("Outcomes by probability, and the number of pairs", mined, mined.probabilities),
    ]


def _losses(folder: Path, stage: str) -> dict[str, Points]:
    """Reads a training log: loss -> (step, value)."""
    path = stage_file(folder, f"{stage}/log.jsonl")
    losses: dict[str, list[tuple[float, float]]] = {}
    for _, entry in read_json_lines(path, "training log"):
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
        path = stage_file(folder, f"evaluation/detector-{model}/per_class.csv")
        rows = list(open_table(path, "table of categories").records())
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
            "change": difference(before[name], after[name]),
        }
        for name in sorted(after, key=lambda name: (name not in split.novel, -after[name], name))
    ]


def labeled_scenes(
    truth: CocoDetection, results: Sequence[Mapping[str, Any]], split: Split
) -> tuple[float, list[LabeledImage]]:
    """Returns the score from which on detections are drawn, and the scenes.

    The score is the one at which precision and recall balance best (F1) over all scenes of `truth`, or 0.5
    where no detection is correct.

    Args:
        truth: annotations of the split's categories.
        results: detections of these categories, in COCO's format.
        split: base and novel categories.
    """
    matches = match_to_ground_truth(truth, results)
    best = matches.best_threshold()
    threshold = best if isfinite(best) else 0.5
    return threshold, [
        _scene(record, matches, threshold, split) for record in pick_scenes(truth, split.novel)
    ]


def pick_scenes(truth: CocoDetection, novel: Sequence[str], count: int = SCENES) -> list[ImageAnnotations]:
    """Picks scenes by what the truth says is in them, never by how well they were detected.

    Three quarters hold novel objects, each novel category in turn with the earliest scene left that shows it;
    the rest are the earliest scenes with base objects alone. Where one kind runs out, the other fills up.

    Returns:
        At most `count` records, in the file's order.
    """
    labels = [truth.categories.index(name) for name in novel if name in truth.categories]
    holding = {label: [r for r in truth if bool((r.labels == label).any())] for label in labels}
    chosen: dict[int, ImageAnnotations] = {}
    wanted = count * 3 // 4
    while len(chosen) < wanted:
        before = len(chosen)
        for label in labels:
            fresh = next((r for r in holding[label] if r.image_id not in chosen), None)
            if fresh is not None and len(chosen) < wanted:
                chosen[fresh.image_id] = fresh
        if len(chosen) == before:
            break
    with_novel = {record.image_id for records in holding.values() for record in records}
    only_base = [r for r in truth if len(r.labels) and r.image_id not in with_novel]
    for record in [*only_base, *truth]:
        if len(chosen) >= count:
            break
        chosen[record.image_id] = record
    return [record for record in truth if record.image_id in chosen]


def _scene(record: ImageAnnotations, matches: MatchResult, threshold: float, split: Split) -> LabeledImage:
    names = [f"★ {name}" if name in split.novel else name for name in matches.names]
    drawn = np.flatnonzero((matches.images == record.image_id) & (matches.scores >= threshold))[:MAX_DRAWN]
    texts: list[str] = []
    colors = []
    for place in drawn[::-1]:  # the best last, on top
        is_false = matches.outcomes[place] in (MISCLASSIFIED, BACKGROUND)
        name = names[matches.labels[place]]
        texts.append(f"{'✗ ' * is_false}{name} {matches.scores[place]:.2f}")
        colors.append(GRAY if is_false else ORANGE if name.startswith("★") else BLUE)
    boxes = matches.boxes[drawn[::-1]].tolist()
    image = draw(read_record(record).pixels, boxes=boxes, texts=texts, colors=colors)
    objects = np.flatnonzero(matches.object_images == record.image_id)
    taken = np.isin(objects, matches.shown[drawn[matches.outcomes[drawn] == CORRECT]])
    caption: list[tuple[str, str]] = []
    for what, places in (("found", objects[taken]), ("missed", objects[~taken])):
        counts = Counter(names[label] for label in matches.object_labels[places])
        texts = [name if count == 1 else f"{count} × {name}" for name, count in counts.items()]
        caption += (
            [("name", f"· {what}" if caption else what), ("quote", f" {', '.join(texts)} ")] if texts else []
        )
    caption = caption or [("quote", "no object of these categories")]
    return LabeledImage(data_uri(image), f"detections in {record.path.name}", caption)
