"""The job `report`: examples, coverage and, with ground truth, quality of mined pairs."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_base.evaluation.tables import figure_lines
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import read_json_lines, write_text
from clip_base.storage.remote import address_of
from clip_base.storage.tables import TableWriter
from regionclip.concepts.phrases import read_stop_words
from regionclip.concepts.pool import read_concepts
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import load_split
from regionclip.mining.coverage import reasons
from regionclip.mining.miner import mining_parser, rows_of
from regionclip.mining.places import MinedImages
from regionclip.mining.quality import measure_pairs
from regionclip.mining.report_page import THRESHOLDS, ReportData, ReportLimits, make_page
from regionclip.mining.shards import local_mined, read_manifest
from regionclip.mining.survey import survey


@everyday(
    "report mined=mined images=images out=report",
    input="mined images annotations split",
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
    limits = ReportLimits(config.max_regions, config.concepts, config.examples, config.max_report_mb)
    with tempfile.TemporaryDirectory() as copies:  # of compressed tars
        data, places = read_data(replace(config, mined=local_mined(config.mined)), Path(copies))
        write_text(run.path / "report.html", make_page(data, limits, places))
    _write_tables(run.path, data)
    metrics = _metrics(data)
    run.finish(metrics)
    print("\n".join(figure_lines(metrics)))
    print(f"open {run.path / 'report.html'} in a browser")


_NEEDS = (
    *("images", "regions", "images_folder", "tars", "matcher", "proposer"),
    *(f"config.{key}" for key in ("concepts", "weights", "teacher", "language")),
)


def read_data(config: ReportConfig, copies: Path) -> tuple[ReportData, MinedImages]:
    """Reads what mining left and compares it with the true boxes; also returns where the images are.

    Args:
        config: the options.
        copies: folder for uncompressed copies of tars.

    Raises:
        InputError: mining has not ended, or its captions or images, or the true boxes, are not there.
    """
    manifest = read_manifest(config.mined, *_NEEDS)
    mining: dict[str, Any] = manifest["config"]
    pool_file = _there(config.pool or mining["concepts"], "concept pool", "pool=FILE")
    pool = read_concepts(pool_file)
    if not pool:
        raise InputError(f"concept pool {pool_file} is empty: nothing was mined with it; give another pool=")
    truth = CocoDetection(config.annotations, None) if config.annotations else None
    split = load_split(config.split, truth.categories, truth.frequencies) if truth and config.split else None
    places = MinedImages(manifest, config.mined, config.images, copies, window=2)
    parser = mining_parser(str(pool_file), pool, mining["language"], config.workers)
    concepts = [concept.concept for concept in pool]
    found, coverage = survey(
        config.mined, manifest["regions"], concepts, rows_of(pool), parser.parse, read_stop_words()
    )
    quality = None
    if truth is not None:
        names = [image.file_name for image in found.images.values()]
        quality = measure_pairs(found.regions, truth, split, images=names)
    grouped = reasons(skipped_images(Path(config.mined)))
    return ReportData(manifest, found, coverage, grouped, quality), places


def _there(path: str, what: str, option_: str) -> Path:
    if address_of(path) is None and not Path(path).exists():
        raise InputError(f"the mined {what} {path} does not exist; give its new location with {option_}")
    return Path(path)


def skipped_images(mined: Path) -> Iterator[dict[str, Any]]:
    """Yields the images that gave no region, with the reasons; InputError when the list is damaged."""
    what = "list of skipped images"
    for number, entry in read_json_lines(mined / "skipped.jsonl", what):
        if not isinstance(entry, dict) or not {"file_name", "reason"} <= entry.keys():
            where = f"{what} {mined / 'skipped.jsonl'}, line {number}"
            raise InputError(f"{where} needs a file_name and a reason, found {quote(entry)}; mine again")
        yield entry


def _metrics(data: ReportData) -> dict[str, Any]:
    """Returns the figures of the page: counts and shares, and the tables by threshold as lists."""
    metrics: dict[str, Any] = {**data.coverage.metrics(), "skipped": data.num_skipped}
    metrics |= {f"{what}_histogram": counts for what, counts in data.survey.histograms.items()}
    if data.survey.is_sampled:
        metrics["sampled_regions"] = len(data.survey.regions)
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
