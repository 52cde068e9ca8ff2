"""The job `report`: examples, coverage and, with ground truth, quality of mined pairs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_base.data.coco import read_captions
from clip_base.evaluation.tables import figure_lines
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError, quote
from clip_base.runtime.progress import track
from clip_base.storage.files import read_json_lines, write_text
from clip_base.storage.paths import image_in
from clip_base.storage.tables import TableWriter
from regionclip.concepts.phrases import Phrase, read_stop_words
from regionclip.concepts.pool import read_concepts
from regionclip.data.annotations import CocoDetection
from regionclip.data.captions import cleaned
from regionclip.data.categories import load_split
from regionclip.data.file_names import ids_by_name
from regionclip.mining.coverage import cover
from regionclip.mining.miner import mining_parser, rows_of
from regionclip.mining.quality import measure_pairs
from regionclip.mining.report_page import THRESHOLDS, ReportData, ReportLimits, make_page
from regionclip.mining.shards import images_of, read_manifest, read_regions


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
    captions: str = option("", "the mined captions, if they have been moved")
    images: str = option("", "the mined images, if they have been moved")
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
    *("images", "regions", "images_folder", "matcher", "proposer"),
    *(f"config.{key}" for key in ("captions", "concepts", "weights", "teacher", "language")),
)


def read_data(config: ReportConfig) -> ReportData:
    """Reads what mining left and compares it with the true boxes.

    Raises:
        InputError: mining has not ended, or its captions or images, or the true boxes, are not there.
    """
    manifest = read_manifest(config.mined, *_NEEDS)
    mining: dict[str, Any] = manifest["config"]
    folder = images_of(manifest, config.images, config.mined)
    file = _there(config.captions or mining["captions"], "captions file", "captions=FILE")
    raw, names = read_captions(file)
    captions = {
        image: [cleaned(text) for text in texts] for image, texts in raw.items()
    }  # as `mine` parsed them
    pool_file = _there(config.pool or mining["concepts"], "concept pool", "pool=FILE")
    pool = read_concepts(pool_file)
    if not pool:
        raise InputError(f"concept pool {pool_file} is empty: nothing was mined with it; give another pool=")
    truth = CocoDetection(config.annotations, None) if config.annotations else None
    split = load_split(config.split, truth.categories, truth.frequencies) if truth and config.split else None
    regions = list(read_regions(config.mined))
    own = {region.image_id: region.file_name for region in regions}
    for name in own.values():
        image_in(folder, name, "the mined regions")
    ids = ids_by_name(own, names, "the mined regions", f"captions file {file}")
    matches = None
    if truth is not None:
        matches = measure_pairs(regions, truth, split, images=names.values())
    parser = mining_parser(str(pool_file), pool, mining["language"], config.workers)

    def parse(texts: Sequence[str]) -> Iterable[list[Phrase]]:
        return track(parser.parse(texts), "phrases", len(texts))

    concepts = [concept.concept for concept in pool]
    captioned = [
        replace(region, image_id=ids[region.image_id]) for region in regions if region.image_id in ids
    ]
    coverage = cover(captioned, captions, names, concepts, rows_of(pool), parse, read_stop_words())
    return ReportData(manifest, folder, regions, coverage, skipped_images(Path(config.mined)), matches)


def _there(path: str, what: str, option_: str) -> Path:
    if not Path(path).exists():
        raise InputError(f"the mined {what} {path} does not exist; give its new location with {option_}")
    return Path(path)


def skipped_images(mined: Path) -> list[dict[str, Any]]:
    """Reads the images that gave no region, with the reasons; InputError when the list is damaged."""
    found, what = list[dict[str, Any]](), "list of skipped images"
    for number, entry in read_json_lines(mined / "skipped.jsonl", what):
        if not isinstance(entry, dict) or not {"file_name", "reason"} <= entry.keys():
            where = f"{what} {mined / 'skipped.jsonl'}, line {number}"
            raise InputError(f"{where} needs a file_name and a reason, found {quote(entry)}; mine again")
        found.append(entry)
    return found


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
