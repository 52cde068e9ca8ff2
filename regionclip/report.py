"""What `regionclip quickstart` ends with: the result table, its figures as data, and a page that needs nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_base.errors import InputError
from clip_base.files import read_json, write_text
from clip_base.progress import clock
from regionclip.datasets import CocoDetection
from regionclip.figures import grouped_bars, line_chart, percent, stacked_bars
from regionclip.gallery import (
    JudgedPairs,
    best_threshold,
    pair_figure,
    pick_pairs,
    pick_scenes,
    scene_figure,
)
from regionclip.pairs import Pair, judge_pairs, precision_recall_of_pairs
from regionclip.shards import MANIFEST, read_manifest, read_regions
from regionclip.splits import Split, load_split
from regionclip.structures import Detections

MODELS = {"clip": "CLIP (before region pretraining)", "regionclip": "RegionCLIP (after)"}
PARTS = ("base", "novel", "all")


@dataclass(frozen=True)
class Group:
    """Three columns of the result table.

    Attributes:
        key: name in `summary`.
        title: what was done.
        measure: what is counted.
        folder: of the evaluation, below `evaluation`; {} is the model.
        metrics: names of the base, novel and all figures in its metrics.json.
    """

    key: str
    title: str
    measure: str
    folder: str
    metrics: tuple[str, str, str]


AP50 = ("AP50_base", "AP50_novel", "AP50_all")
GROUPS = (
    Group("truth", "zero-shot, true boxes", "top-1", "{}-truth", ("top1_base", "top1_novel", "top1")),
    Group("proposals", "zero-shot, own proposals", "AP50", "{}-proposals", AP50),
    Group("detector", "detector trained on base", "AP50", "detector-{}", AP50),
)


def _stage(folder: Path, path: str) -> Path:
    """Returns a file that a stage leaves behind, when it is there."""
    if not (folder / path).exists():
        stage = Path(path).parent.as_posix() if "/" in path else path
        raise InputError(
            f"{folder} holds no {path}: the stage {stage!r} has not ended; run `regionclip quickstart out={folder}` again"
        )
    return folder / path


def _metrics(folder: Path, stage: str, names: Sequence[str] = ()) -> dict[str, Any]:
    path = _stage(folder, f"{stage}/metrics.json")
    metrics = read_json(path, "metrics")
    absent = [name for name in names if name not in metrics]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent)}; was the stage run without split= or validation files?")
    return dict(metrics)


def results(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the result table's figures: model -> "truth_base", "truth_novel", …, "detector_all", as shares.

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
    """Returns the result table as text: a header of ten columns, CLIP, RegionCLIP, and their difference in points."""
    return _rows(results(Path(folder)))


def _rows(figures: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    keys = [f"{group.key}_{part}" for group in GROUPS for part in PARTS]
    header = ["", *(f"{group.title}: {group.measure} {part}" for group in GROUPS for part in PARTS)]
    rows = [[title, *(percent(figures[model][key]) for key in keys)] for model, title in MODELS.items()]
    differences = [_difference(figures["clip"][key], figures["regionclip"][key]) for key in keys]
    return [header, *rows, ["difference", *differences]]


def _difference(before: float, after: float) -> str:
    return "–" if min(before, after) < 0 else f"{100 * (after - before):+.1f}"  # noqa: RUF001 a dash is meant


def format_table(folder: Path) -> str:
    """Returns the result table as aligned plain text with two lines of headings."""
    rows = table(folder)
    first = max(len(row[0]) for row in rows)
    wide = max(len(title) for title in (f"{group.title}, {group.measure}" for group in GROUPS))
    cell = -(-wide // 3)
    top = " " * first + "".join(f"  {f'{group.title}, {group.measure}':>{3 * cell}}" for group in GROUPS)
    lines = [top, " " * first + "".join("  " + "".join(f"{part:>{cell}}" for part in PARTS) for _ in GROUPS)]
    for row in rows[1:]:
        groups = [row[1 + 3 * number : 4 + 3 * number] for number in range(len(GROUPS))]
        cells = "".join("  " + "".join(f"{text:>{cell}}" for text in group) for group in groups)
        lines.append(f"{row[0]:<{first}}{cells}")
    return "\n".join(lines)


def print_table(folder: Path, console: Console | None = None) -> None:
    """Prints the result table for a terminal of 80 columns or more."""
    rows = table(folder)
    shown = Table(title="percent; novel: categories whose boxes no training has seen", title_justify="left")
    shown.add_column("")
    shown.add_column("")
    for title in ("CLIP", "RegionCLIP", "difference"):
        shown.add_column(title, justify="right")
    for number, group in enumerate(GROUPS):
        for place, part in enumerate(PARTS):
            column = 1 + 3 * number + place
            name = f"{group.title}, {group.measure}" if place == 0 else ""
            style = "bold" if part == "novel" else None
            shown.add_row(name, part, *(row[column] for row in rows[1:]), style=style, end_section=place == 2)
    (console or Console()).print(shown)


def canonical_name(phrase: str, categories: Sequence[str]) -> str | None:
    """Returns the category that a phrase names, by the whole phrase or else by its last word, whatever the case."""
    names = {name.casefold(): name for name in categories}
    words = phrase.casefold().split()
    return names.get(" ".join(words)) or (names.get(words[-1]) if words else None)


def _judge(folder: Path, split: Split) -> tuple[JudgedPairs, dict[str, float]]:
    """Returns the mined pairs with their verdicts, and mining's precision and recall."""
    _stage(folder, f"mined/{MANIFEST}")
    truth = CocoDetection(_stage(folder, "world/instances_train.json"), None)
    regions = list(read_regions(folder / "mined"))
    pairs = [Pair(region.image_id, region.box, region.concept) for region in regions]
    names = {pair.name: canonical_name(pair.name, truth.categories) for pair in pairs}
    judged = JudgedPairs(regions, judge_pairs(pairs, truth, names.get))
    return judged, precision_recall_of_pairs(pairs, truth, split.novel, names.get)


def _split(folder: Path) -> Split:
    content = read_json(_stage(folder, "world/instances_val.json"), "annotations")
    return load_split(_stage(folder, "world/split.json"), [entry["name"] for entry in content["categories"]])


def _counts(folder: Path) -> dict[str, int]:
    """Counts what the run worked on."""
    captions = read_json(_stage(folder, "world/captions_train.json"), "captions")
    validation = read_json(_stage(folder, "world/instances_val.json"), "annotations")
    concepts = _stage(folder, "concepts.jsonl").read_text(encoding="utf-8").splitlines()
    _stage(folder, f"mined/{MANIFEST}")
    return {
        "train_scenes": len(captions["images"]),
        "val_scenes": len(validation["images"]),
        "captions": len(captions["annotations"]),
        "categories": len(validation["categories"]),
        "concepts": sum(bool(line.strip()) for line in concepts),
        "mined_regions": int(read_manifest(folder / "mined")["regions"]),
    }


RECALL = tuple(f"recall@{limit}{suffix}" for limit in (10, 100) for suffix in ("", "_base", "_novel"))


def _recall(folder: Path) -> dict[str, float]:
    metrics = _metrics(folder, "rpn", RECALL)
    return {key: float(value) for key, value in metrics.items() if key.startswith(("recall@", "AR@"))}


def _timings(folder: Path) -> dict[str, float]:
    return {title: float(value) for title, value in read_json(_stage(folder, "timings.json"), "timings").items()}


def summary(folder: Path) -> dict[str, Any]:
    """Returns the figures of a finished quickstart, ready for metrics.json.

    Returns:
        `results` (model -> figure -> share), `recall` (proposals), `mining` (see `precision_recall_of_pairs`),
        `counts`, `timings` (seconds a stage) and `seconds` in all.

    Raises:
        InputError: a stage has not ended; it is named.
    """
    folder = Path(folder)
    timings = _timings(folder)
    return {
        "results": results(folder),
        "recall": _recall(folder),
        "mining": _judge(folder, _split(folder))[1],
        "counts": _counts(folder),
        "timings": timings,
        "seconds": round(sum(timings.values()), 1),
    }


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html` from what the stages left in `folder`; it opens from disk and asks for nothing else.

    Raises:
        InputError: a stage has not ended; it is named.
    """
    folder = Path(folder)
    figures, split, counts, timings = results(folder), _split(folder), _counts(folder), _timings(folder)
    charts = "".join(_loss_charts(folder))
    recall = _recall(folder)
    judged, mining = _judge(folder, split)
    scenes, threshold = _scenes(folder, split)
    values = {
        "css": _packaged("report.css"),
        "intro": _intro(counts, split, sum(timings.values())),
        "table": _result_table(figures),
        "verdict": _verdict(figures),
        "scenes_note": _scenes_note(threshold),
        "scenes": scenes,
        "mining_note": _mining_note(counts, mining),
        "mining_charts": _mining_charts(judged, mining),
        "pairs_note": _PAIRS_NOTE,
        "pairs": "".join(
            pair_figure(folder / "world" / "images", judged.regions[place], judged.verdicts[place])
            for place in pick_pairs(judged.regions)
        ),
        "recall_chart": _recall_chart(recall),
        "per_class": _per_class_table(folder, split),
        "loss_charts": charts,
        "timings": _timings_table(timings),
        "files": _files(folder, split),
    }
    page = folder / "report.html"
    write_text(page, Template(_packaged("report.html")).substitute(values))
    return page


def _packaged(name: str) -> str:
    return (files("regionclip") / "data_files" / name).read_text(encoding="utf-8")


def _intro(counts: Mapping[str, int], split: Split, seconds: float) -> str:
    return (
        f"A world of {counts['train_scenes']:,} scenes with {counts['captions']:,} captions was drawn, and "
        f"{counts['val_scenes']:,} scenes to measure on, showing {counts['categories']} categories of things. A CLIP "
        f"learnt from scenes and captions alone. The captions gave a pool of {counts['concepts']:,} concepts; that CLIP, "
        f"frozen, found them in {counts['mined_regions']:,} proposed regions, and these region-phrase pairs taught it to "
        f"name regions. Boxes of {len(split.base)} base categories then trained a detector, which is measured on the "
        f"{len(split.novel)} novel ones too. All of it took {clock(seconds)}."
    )


def _result_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    groups = "".join(
        f'<th class="group first" colspan="3">{escape(group.title)}<br>{group.measure}</th>' for group in GROUPS
    )
    style = {"base": "first", "novel": "novel", "all": ""}
    parts = "".join(f'<th class="{style[part]}">{part}</th>' for _ in GROUPS for part in PARTS)
    rows = []
    for row in _rows(figures)[1:]:
        cells = ""
        for place, text in enumerate(row[1:]):
            sign = {"+": " up", "-": " down"}.get(text[:1], "") if float(text.replace("–", "0")) else ""  # noqa: RUF001
            cells += f'<td class="{style[PARTS[place % 3]]}{sign}">{text}</td>'
        kind = ' class="difference"' if row[0] == "difference" else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    head = f"<tr><th></th>{groups}</tr><tr><th></th>{parts}</tr>"
    return f'<div class="wide"><table class="result"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _verdict(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Says in words how the novel figures moved, whichever way they did."""
    pieces = []
    for group in GROUPS:
        before, after = (figures[model][f"{group.key}_novel"] for model in MODELS)
        if min(before, after) >= 0:
            pieces.append(f"{_difference(before, after)} points of {group.measure} ({escape(group.title)})")
    if not pieces:
        return "No novel category was measured."
    return f"On novel categories region pretraining made a difference of {', '.join(pieces)}."


def _scenes(folder: Path, split: Split) -> tuple[str, float]:
    truth = CocoDetection(_stage(folder, "world/instances_val.json"), folder / "world" / "images").restrict(split.all)
    entries: dict[int, list[dict[str, Any]]] = {}
    for entry in read_json(_stage(folder, "evaluation/detector-regionclip/results.json"), "results"):
        entries.setdefault(entry["image_id"], []).append(entry)
    found = {
        record.image_id: Detections.from_coco(
            entries.get(record.image_id, []), truth.category_ids, split.all, (record.height, record.width)
        )
        for record in truth
    }
    threshold = best_threshold(truth, found)
    pictures = [
        scene_figure(record, found[record.image_id].above(threshold), truth, split.novel)
        for record in pick_scenes(truth, split.novel)
    ]
    return "".join(pictures), threshold


def _scenes_note(threshold: float) -> str:
    return (
        f"What the detector that started from RegionCLIP found, drawn from a score of {threshold:.2f} on (where precision "
        "and recall over all validation scenes balance best). "
        '<b style="color: var(--base)">Blue</b>: base; <b class="novel-ink">★ orange</b>: novel; <b>✗ grey</b>: there is '
        "no such object there. The scenes were picked by what is in them, not by how well they went."
    )


_PAIRS_NOTE = (
    "A sample over all probabilities and concepts, the surest first: the region with some of its surroundings, what the "
    'teacher called it and how sure it was, and the caption that names it. <b class="tag right">right</b>: an object '
    'of that name is there; <b class="tag wrong">wrong name</b>: an object of another name; <b class="tag nothing">no '
    "object</b>: no object fills that box (IoU below 0.5)."
)


def _mining_note(counts: Mapping[str, int], mining: Mapping[str, float]) -> str:
    return (
        f"Of {counts['mined_regions']:,} mined region-phrase pairs {percent(mining['precision'])} % are right, "
        f"{percent(mining['wrong_name'])} % show an object of another name and {percent(mining['no_object'])} % no whole "
        f"object. They cover {percent(mining['recall_base'])} % of the true base objects and "
        f"{percent(mining['recall_novel'])} % of the novel ones. Mining has seen no box of either for naming; the truth "
        "is used here only to judge."
    )


def _mining_charts(judged: JudgedPairs, mining: Mapping[str, float]) -> str:
    series = {part: [mining[f"{name}_{part}"] for name in ("precision", "recall")] for part in ("base", "novel")}
    bars = grouped_bars("Mined pairs against the truth", ["precision", "recall"], series)
    labels, shares, totals = judged.by_probability()
    return bars + stacked_bars("By the teacher's probability (from …; pairs below)", labels, shares, totals)


def _recall_chart(recall: Mapping[str, float]) -> str:
    series = {part: [recall[f"recall@{limit}_{part}"] for limit in (10, 100)] for part in ("base", "novel")}
    return grouped_bars("Recall of proposals", ["best 10", "best 100"], series)


def _losses(folder: Path, stage: str) -> dict[str, list[tuple[float, float]]]:
    """Reads a training log: loss -> (step, value)."""
    path = _stage(folder, f"{stage}/log.jsonl")
    losses: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{path}, line {number}, is not valid JSON; delete {folder / stage} and run again") from None
        if "lr" in entry:  # other lines are measurements
            for name in entry.keys() - {"step", "lr", "images_per_second"}:
                losses.setdefault(name, []).append((entry["step"], entry[name]))
    return dict(sorted(losses.items()))


def _loss_charts(folder: Path) -> list[str]:
    titles = {"clip": "CLIP: images and captions", "rpn": "Proposal network", "regionclip": "Regions"}
    charts = [
        line_chart(f"{title}, loss", {name.replace("_", "-"): line for name, line in _losses(folder, stage).items()})
        for stage, title in titles.items()
    ]
    starts = {"clip": "from CLIP", "regionclip": "from RegionCLIP"}
    sums = {label: _total(_losses(folder, f"detector-{start}")) for start, label in starts.items()}
    return [*charts, line_chart("Detector on base categories, sum of its losses", sums)]


def _total(losses: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    total: dict[float, float] = {}
    for line in losses.values():
        for step, value in line:
            total[step] = total.get(step, 0.0) + value
    return sorted(total.items())


def _per_class(folder: Path, model: str) -> dict[str, dict[str, str]]:
    path = _stage(folder, f"evaluation/detector-{model}/per_class.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def _per_class_table(folder: Path, split: Split) -> str:
    before, after = (_per_class(folder, model) for model in MODELS)
    names = sorted(before.keys() & after.keys(), key=lambda name: (name not in split.novel, -float(after[name]["AP50"])))
    rows = []
    for name in names:
        values = [float(rows_of[name]["AP50"]) for rows_of in (before, after)]
        meters = "".join(
            f'<span class="{kind}"><i class="meter" style="width: {180 * max(value, 0):.0f}px"></i></span>'
            for kind, value in zip(("before", "after"), values, strict=True)
        )
        shown = escape(f"★ {name}" if name in split.novel else name)
        kind = ' class="novel-row"' if name in split.novel else ""
        rows.append(
            f"<tr{kind}><td>{shown}</td><td>{after[name]['boxes']}</td><td>{percent(values[0])}</td>"
            f'<td>{percent(values[1])}</td><td>{_difference(*values)}</td><td class="meter-cell">{meters}</td></tr>'
        )
    head = "<tr><th>category</th><th>objects</th><th>from CLIP</th><th>from RegionCLIP</th><th>difference</th><th></th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _timings_table(timings: Mapping[str, float]) -> str:
    longest = max([*timings.values(), 1e-9])
    rows = "".join(
        f"<tr><td>{escape(title)}</td><td>{clock(seconds)}</td>"
        f'<td class="meter-cell"><i class="meter" style="width: {180 * seconds / longest:.0f}px"></i></td></tr>'
        for title, seconds in timings.items()
    )
    total = f"<tr><td><b>in all</b></td><td><b>{clock(sum(timings.values()))}</b></td><td></td></tr>"
    return f'<div class="wide"><table><tbody>{rows}{total}</tbody></table></div>'


def _files(folder: Path, split: Split) -> str:
    places = {
        "world": "the scenes, their captions and boxes in COCO's form, and the split",
        "clip/model.safetensors": "CLIP before region pretraining",
        "regionclip/model.safetensors": "and after",
        "rpn/model.safetensors": "the proposal network",
        "concepts.jsonl": "the concept pool",
        "mined": "the region-phrase pairs, Parquet",
        "detector-regionclip/model.safetensors": "the detector",
        "evaluation": "metrics, results in COCO's form, figures of each category",
        "metrics.json": "the figures of this page",
    }
    wide = max(len(str(folder / place)) for place in places)
    listing = "\n".join(f"{folder / place!s:<{wide}}  {what}" for place, what in places.items())
    names = ", ".join((*split.novel[:2], split.base[0]))
    return (
        f"<pre>{escape(listing)}</pre><p>Name what you look for, whether a box of it was ever seen or not, and call the "
        f"detector on scenes:</p><pre>regionclip detect {escape(str(folder))}/world/images/val \\\n"
        f'    weights={escape(str(folder))}/detector-regionclip/model.safetensors vocabulary="{escape(names)}" out=found</pre>'
        "<p><code>regionclip --help</code> lists the jobs, <code>regionclip JOB --help</code> their options. To do the same "
        "with your own captioned images, give their folder and captions to <code>clip-base pretrain</code>, "
        "<code>regionclip concepts</code>, <code>mine</code>, <code>pretrain</code> and <code>train-detector</code> "
        "in that order; the README shows the five calls.</p>"
    )
