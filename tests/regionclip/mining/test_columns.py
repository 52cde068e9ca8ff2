"""Regions that are counted and exported as columns give what one region at a time gives."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from clip_base.runtime.errors import InputError
from regionclip.export.pseudo_labels import ExportConfig, labeled
from regionclip.mining.columns import read_mined_columns
from regionclip.mining.shards import (
    MANIFEST,
    VERSION,
    MinedImage,
    MinedRegion,
    read_regions,
    shard_path,
    write_rows,
)
from regionclip.mining.survey import BINS, survey

LABELS: list[int | None] = [0, 1, 1, None, 2, 0]


def region(image_id: int, draw: random.Random, concepts: int) -> MinedRegion:
    x, y = draw.uniform(0, 50), draw.uniform(0, 50)
    ids = draw.sample(range(len(LABELS)), concepts)
    probs = sorted((draw.choice((0.0, 0.25, draw.random())) for _ in ids), reverse=True)
    total = sum(probs) or 1.0
    return MinedRegion(
        *(image_id, f"{image_id}.jpg", 100, 120),
        box=(x, y, x + 9, y + 12),
        objectness=draw.random(),
        concept_ids=ids,
        concept_probs=[value / total for value in probs],
        concept=f"c{ids[0] if ids else 0}",
        phrase=None,
        caption=None,
        key=str(image_id),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards; one image's 5,200 regions are in two batches, another has none."""
    draw, names = random.Random(3), []
    for number, counts in enumerate(([3, 0, 5200, 40], [7, 1])):
        images = [
            MinedImage(10 * number + place, f"{10 * number + place}.jpg", count)
            for place, count in enumerate(counts, 1)
        ]
        rows = [region(image.image_id, draw, 4) for image in images for _ in range(image.regions)]
        path = shard_path(tmp_path, number)
        (tmp_path / "images").mkdir(exist_ok=True)
        write_rows(path, rows, images)
        names.append(path.name)
    (tmp_path / MANIFEST).write_text(json.dumps({"version": VERSION, "shards": names}))
    return tmp_path


def test_a_survey_counts_every_region_once(folder: Path) -> None:
    regions = list(read_regions(folder))
    pool = [f"c{number}" for number in range(len(LABELS))]
    found, coverage = survey(folder, len(regions), pool, {}, lambda texts: [[] for _ in texts], ())
    assert found.total == len(regions) == 5251
    assert found.regions == regions
    assert list(found.images) == [1, 2, 3, 4, 11, 12]
    for what, values in (
        ("objectness", [one.objectness for one in regions]),
        ("probability", [one.concept_probs[0] for one in regions]),
    ):
        counts = [0] * BINS
        for value in values:
            counts[min(int(value * BINS), BINS - 1)] += 1
        assert found.histograms[what] == counts
    for use in coverage.uses:
        own = [one.concept_probs[0] for one in regions if one.concept == use.concept]
        assert (use.regions, use.probability) == (len(own), sum(own) / len(own))


@pytest.mark.parametrize("keep_empty", [False, True])
def test_labels_are_those_of_one_region_at_a_time(folder: Path, keep_empty: bool) -> None:
    options = {
        "labels": 3,
        "min_probability": 0.2,
        "min_objectness": 0.5,
        "nms": 1.0,
        "keep_empty": keep_empty,
    }
    config = ExportConfig(mined=str(folder), out="x", **options)  # type: ignore[arg-type]
    found = {image.image_id: image for image in labeled(config, LABELS)}
    wanted: dict[int, list[tuple[list[float], int, float]]] = {}
    for one in read_regions(folder):
        own = wanted.setdefault(one.image_id, [])
        named: dict[int, float] = {}
        for concept, value in list(zip(one.concept_ids, one.concept_probs, strict=True))[:3]:
            label = LABELS[concept]
            if label is not None and value and value >= 0.2 and one.objectness >= 0.5:
                named[label] = max(named.get(label, 0.0), value)
        own += [(list(one.box), label, value * one.objectness) for label, value in named.items()]
    assert list(found) == [key for key, rows in wanted.items() if rows or keep_empty]
    for key, image in found.items():
        assert list(zip(image.boxes, image.labels, image.scores, strict=True)) == wanted[key]
        assert (image.file_name, image.height, image.width) == (f"{key}.jpg", 100, 120)


def test_a_region_without_a_concept_is_refused(folder: Path) -> None:
    rows = [region(1, random.Random(1), 2), region(1, random.Random(1), 0)]
    write_rows(shard_path(folder, 1), rows)
    with pytest.raises(InputError, match=r"a mined region of 1\.jpg has no concept; mine again"):
        list(read_mined_columns(folder, lambda columns: columns.first_probs.sum()))
