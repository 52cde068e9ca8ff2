"""The job `report`: examples, coverage and, with ground truth, quality of mined pairs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_base.evaluation.tables import figure_lines
from clip_base.images.headers import Stored
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import track
from clip_base.storage.files import read_json_lines, write_text
from clip_base.storage.tables import TableWriter
from regionclip.concepts.phrases import Phrase, read_stop_words
from regionclip.concepts.pool import read_concepts
from regionclip.data.annotations import CocoDetection
from regionclip.data.captions import cleaned
from regionclip.data.categories import load_split
from regionclip.mining.coverage import cover
from regionclip.mining.miner import mining_parser, rows_of
from regionclip.mining.places import MinedImages
from regionclip.mining.quality import measure_pairs
from regionclip.mining.report_page import THRESHOLDS, ReportData, ReportLimits, make_page
from regionclip.mining.shards import MinedRegion, read_images, read_manifest, read_regions


@everyday(
    "report mined=mined images=images out=report",
    input="mined images captions annotations split",
    output="out concepts examples max_report_mb",
    speed="workers",
)
@dataclass
class ReportConfig:
    """Options of the report on mined pairs."""

    mined: str = option(REQUIRED, "folder that `regionclip mine` wrote")
    out: str = option(
        REQUIRED, "folder for report.html, metrics.json and the tables as files", runtime_only=True
    )
    annotations: str = option(
        "", "ground-truth boxes of the mined images in COCO's format, to evaluate the pairs; empty: none"
    )
    split: str = option("", "coco, or a JSON file with base and novel names; empty: none is novel")
    images: str = option("", "the mined images (a folder, or tars), if they have been moved")
    pool: str = option("", "the concept pool used for mining, if it has been moved")
    max_regions: int = option(36, "number of regions shown over all scores", renamed_from="regions")
    concepts: int = option(24, "number of concepts shown, half of them the most frequent")
    examples: int = option(6, "regions shown per concept")
    max_report_mb: float = option(
        6.0, "maximum size of the report in MB; further images are left out", renamed_from="megabytes"
    )
    workers: int = option(1, "processes that parse captions", runtime_only=True)

    def __post_init__(self) -> None:
        if min(self.max_regions, self.concepts, self.examples) < 0 or self.workers < 1:
            raise InputError("max_regions, concepts and examples must be at least 0, workers at least 1")
        if self.max_report_mb < 0:
            raise InputError(f"max_report_mb must be at least 0, got {self.max_report_mb}")
        if self.split and not self.annotations:
            raise InputError(
                "split= needs annotations=FILE: without ground-truth boxes there is nothing to split"
            )


def report(config: ReportConfig) -> None:
    """Writes an HTML report on mined pairs: gallery, scores, coverage and, with ground truth, precision."""
    run = RunFolder(config.out, config, "region-report")
    data = read_data(config)
    limits = ReportLimits(config.max_regions, config.concepts, config.examples, config.max_report_mb)
    write_text(run.path / "report.html", make_page(data, limits))
    _write_tables(run.path, data)
    metrics = _metrics(data)
    run.finish(metrics)
    print("\n".join(figure_lines(metrics)))
    print(f"open {run.path / 'report.html'} in a browser")


_NEEDS = (
    *("images", "regions", "images_folder", "tars", "matcher", "proposer"),
    *(f"config.{key}" for key in ("concepts", "weights", "teacher", "language")),
)


def read_data(config: ReportConfig) -> ReportData:
    """Reads what mining left and compares it with the true boxes.

    Raises:
        InputError: mining has not ended, or its captions or images, or the true boxes, are not there.
    """
    manifest = read_manifest(config.mined, *_NEEDS)
    mining: dict[str, Any] = manifest["config"]
    rows = list(read_images(config.mined))
    names = {image.image_id: image.file_name for image in rows}
    captions = {image.image_id: [cleaned(text) for text in image.captions] for image in rows}
    captions = {key: [text for text in texts if text] for key, texts in captions.items()}
    pool_file = _there(config.pool or mining["concepts"], "concept pool", "pool=FILE")
    pool = read_concepts(pool_file)
    if not pool:
        raise InputError(f"concept pool {pool_file} is empty: nothing was mined with it; give another pool=")
    truth = CocoDetection(config.annotations, None) if config.annotations else None
    split = load_split(config.split, truth.categories, truth.frequencies) if truth and config.split else None
    regions = list(read_regions(config.mined))
    matches = None
    if truth is not None:
        matches = measure_pairs(regions, truth, split, images=names.values())
    parser = mining_parser(str(pool_file), pool, mining["language"], config.workers)

    def parse(texts: Sequence[str]) -> Iterable[list[Phrase]]:
        return track(parser.parse(texts), "phrases", len(texts))

    concepts = [concept.concept for concept in pool]
    coverage = cover(regions, captions, names, concepts, rows_of(pool), parse, read_stop_words())
    by_id = {image.image_id: image for image in rows}
    places = MinedImages(manifest, config.mined, config.images)

    def place(region: MinedRegion) -> Path | Stored:
        return places(by_id[region.image_id])

    return ReportData(manifest, place, regions, coverage, _skipped(Path(config.mined)), matches)


def _there(path: str, what: str, option_: str) -> Path:
    if not Path(path).exists():
        raise InputError(f"the mined {what} {path} does not exist; give its new location with {option_}")
    return Path(path)


def _skipped(mined: Path) -> list[dict[str, Any]]:
    """Reads the images that gave no region, with the reasons."""
    return [entry for _, entry in read_json_lines(mined / "skipped.jsonl", "list of skipped images")]


def _metrics(data: ReportData) -> dict[str, Any]:
    """Returns the figures of the page: counts and shares, and the tables by threshold as lists."""
    metrics: dict[str, Any] = {**data.coverage.metrics(), "skipped": len(data.skipped)}
    metrics["probability_histogram"] = data.histogram("probability")
    metrics["objectness_histogram"] = data.histogram("objectness")
    matches = data.quality
    if matches is not None:
        metrics |= {key: value for key, value in matches.metrics().items() if key != "pairs"}
        metrics["by_probability"] = matches.by_threshold(matches.probabilities, THRESHOLDS)
        metrics["by_objectness"] = matches.by_threshold(matches.objectness, THRESHOLDS)
        metrics["best_probability"] = matches.least_mistaken(metrics["by_probability"])
        metrics["best_objectness"] = matches.least_mistaken(metrics["by_objectness"])
    return metrics


def _write_tables(folder: Path, data: ReportData) -> None:
    """Writes the tables of which the page shows the first rows."""
    uses = [asdict(use) for use in data.coverage.by_regions()]
    fields = ("concept", "images", "matched", "regions", "probability")
    write_text(folder / "concepts.csv", _csv(fields, ([use[key] for key in fields] for use in uses)))
    never = (
        {"phrase": use.concept, "images": use.images, "in_pool": use.in_pool, "examples": use.examples}
        for use in data.coverage.never_matched()
    )
    write_text(folder / "never_matched.jsonl", "".join(json.dumps(entry) + "\n" for entry in never))
    if data.quality is not None:
        rows = data.quality.by_category()
        columns = ("name", "part", "objects", "pairs", "precision", "misclassified", "background", "recall")
        write_text(folder / "categories.csv", _csv(columns, ([row[key] for key in columns] for row in rows)))
        confusions = data.quality.labels.confusions()
        write_text(folder / "confusions.csv", _csv(("named", "shown", "pairs"), confusions))


def _csv(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    table = TableWriter(text)
    table.writerow(titles)
    table.writerows([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return text.getvalue()
