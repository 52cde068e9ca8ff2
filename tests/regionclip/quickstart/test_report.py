"""The quickstart's page and table: made from what the stages leave, whole and self-contained."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json, write_text
from clip_base.synthetic.scenes import ScenesConfig, generate
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.categories import load_split
from regionclip.mining.report_page import pick_pairs
from regionclip.mining.shards import VERSION, MinedRegion, write_rows
from regionclip.quickstart.report import judge_mining, print_table, results, summary
from regionclip.quickstart.report_page import MAX_DRAWN, labeled_scenes, pick_scenes, write_report

TRAIN, VAL = 20, 16
AP50 = {
    "clip": {"AP50_base": 0.10, "AP50_novel": 0.08, "AP50_all": 0.095},
    "regionclip": {"AP50_base": 0.21, "AP50_novel": 0.19, "AP50_all": 0.205},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a quickstart leaves it: a real small world, made-up figures, boxes near the truth."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    generate(ScenesConfig(out=str(folder / "world"), images=TRAIN, val_images=VAL, workers=1, seed=3))
    _logs(folder)
    _metrics(folder)
    _results(folder)
    _mined(folder)
    concepts = [{"concept": name, "count": 9, "examples": ["an <b>anchor</b>"]} for name in ("anchor", "sun")]
    write_text(folder / "concepts.jsonl", "".join(json.dumps(entry) + "\n" for entry in concepts))
    timings = {
        "generate images": 2.5,
        "pretrain CLIP on image-text pairs": 260.0,
        "mine region-phrase pairs": 41.2,
    }
    write_json(folder / "timings.json", timings)
    return folder


def _logs(folder: Path) -> None:
    losses = {
        "clip": ("contrastive",),
        "rpn": ("objectness", "box"),
        "regionclip": ("distillation", "region_text", "image_text"),
        "detector-clip": ("classification", "box"),
        "detector-regionclip": ("classification", "box"),
    }
    for number, (stage, names) in enumerate(losses.items()):
        lines = []
        for step in range(10, 2001, 10):
            values = {
                name: (3 - place) * math.exp(-step / 600) + 0.4 + number / 9 + 0.1 * math.sin(step)
                for place, name in enumerate(names)
            }
            lines.append(json.dumps({"step": step, **values, "lr": 1e-3, "images_per_second": 200.0}) + "\n")
        lines.append(json.dumps({"step": 2000, "accuracy": 0.3}) + "\n")
        write_text(folder / stage / "log.jsonl", "".join(lines))


def _metrics(folder: Path) -> None:
    recall = {
        f"{name}@{limit}{suffix}": value + limit / 400
        for name in ("recall", "AR")
        for limit in (10, 100, 300)
        for suffix, value in (("", 0.55), ("_base", 0.6), ("_novel", 0.4))
    }
    write_json(folder / "rpn" / "metrics.json", {"steps": 2000, "loss": 0.7, **recall})
    names = load_split(folder / "world" / "split.json", _truth(folder, "val").categories)
    for model, gain in (("clip", 0.0), ("regionclip", 0.17)):
        top1 = {"top1": 0.45 + gain, "top1_base": 0.47 + gain, "top1_novel": 0.39 + gain}
        write_json(folder / "evaluation" / f"{model}-truth" / "metrics.json", top1)
        write_json(folder / "evaluation" / f"{model}-proposals" / "metrics.json", AP50[model])
        detector = folder / "evaluation" / f"detector-{model}"
        write_json(detector / "metrics.json", {key: 2 * value for key, value in AP50[model].items()})
        rows = [
            f'"{name}",{number},{name in names.novel},{number + 3},90,0.2,{(number * 0.37) % 0.8 + gain:.6f}'
            for number, name in enumerate(names.all)
        ]
        heading = "name,category_id,novel,boxes,detections,AP,AP50"
        write_text(detector / "per_class.csv", "\n".join([heading, *rows]) + "\n")


def _truth(folder: Path, split: str) -> CocoDetection:
    return CocoDetection(folder / "world" / f"instances_{split}.json", None)


def _results(folder: Path) -> None:
    """Most true boxes are found, every fifth is misnamed; each scene has one weak box of nothing."""
    entries: list[dict[str, Any]] = []
    truth = _truth(folder, "val")
    number = 0
    for record in truth:
        for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
            number += 1
            if number % 7 == 0:
                continue
            name = (label + 1) % len(truth.categories) if number % 5 == 0 else label
            x1, y1, x2, y2 = box
            entries.append(
                {
                    "image_id": record.image_id,
                    "category_id": truth.category_ids[name],
                    "bbox": [x1 + 1, y1 - 1, x2 - x1, y2 - y1],
                    "score": 0.75 if number % 5 == 0 else 0.4 + (number % 6) / 10,
                }
            )
        weak = {"image_id": record.image_id, "category_id": 1, "bbox": [0, 0, 20, 9], "score": 0.1}
        entries.append(weak)
    for model in ("clip", "regionclip"):
        write_json(folder / "evaluation" / f"detector-{model}" / "results.json", entries)


def _mined(folder: Path) -> None:
    truth = _truth(folder, "train")
    captions = read_json(folder / "world" / "captions_train.json")["annotations"]
    files = {
        entry["id"]: entry["file_name"]
        for entry in read_json(folder / "world/instances_train.json")["images"]
    }
    regions: list[MinedRegion] = []
    for record in truth:
        text = next(entry["caption"] for entry in captions if entry["image_id"] == record.image_id)
        for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
            number = len(regions)
            wrong = number % 4 == 3
            name = truth.categories[(label + wrong) % len(truth.categories)]
            name = "a curious thing" if number % 11 == 10 else f"red {name}" if number % 9 == 8 else name
            x1, y1, x2, y2 = box
            moved = (x1, y1, (x1 + x2) / 2, (y1 + y2) / 2) if number % 6 == 5 else (x1, y1, x2, y2)
            said = name.split()[-1] in text
            prob = 0.3 + 0.15 * wrong if wrong else 0.99 - (number % 40) / 60
            regions.append(
                MinedRegion(record.image_id, files[record.image_id], record.height, record.width, moved, 0.8,
                            [1, 0], [prob, 1 - prob], name, name if said else None, text if said else None)
            )  # fmt: skip
    (folder / "mined").mkdir()
    write_rows(folder / "mined" / "shard-00000.parquet", regions)
    manifest = {
        "version": VERSION,
        "shards": ["shard-00000.parquet"],
        "images": TRAIN,
        "regions": len(regions),
    }
    write_json(folder / "mined" / "manifest.json", manifest)


def _report(folder: Path) -> Path:
    return write_report(folder, judge_mining(folder))


def test_the_page_is_whole_and_asks_for_nothing_outside_itself(finished: Path, parsed: Callable[[str], Any]):
    path = _report(finished)
    assert path == finished / "report.html"
    text = path.read_text(encoding="utf-8")
    page = parsed(text)
    assert page.open == []
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert text.count("data:image/jpeg;base64,") >= 12 + 24
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert not list(finished.glob(".report.html*")), "a temporary file was left"


def test_the_page_says_what_was_done_and_found(finished: Path):
    text = re.sub(r"\s+", " ", _report(finished).read_text(encoding="utf-8"))
    for fact in (
        f"A synthetic dataset of {TRAIN} images with {3 * TRAIN} captions",
        f"{VAL} images for validation",
        "5 min 04 s",
        "+17.0 points of top-1",
        "pretrain CLIP on image-text pairs",
        'class="tag correct">correct',
        'class="tag misclassified">misclassified',
        'class="tag background">background',
        'class="tag ignored">ignored',
        "Recall of proposals",
        "from RegionCLIP",
        "detector-regionclip/model.safetensors",
    ):
        assert fact in text


def test_writing_the_page_twice_gives_the_same_page(finished: Path):
    first = _report(finished).read_bytes()
    assert _report(finished).read_bytes() == first


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("evaluation/clip-truth/metrics.json", "evaluation/clip-truth"),
        ("evaluation/detector-regionclip/results.json", "evaluation/detector-regionclip"),
        ("rpn/metrics.json", "rpn"),
        ("mined/manifest.json", "mined"),
        ("clip/log.jsonl", "clip"),
        ("world/split.json", "world"),
        ("concepts.jsonl", "concepts"),
    ],
)
def test_a_missing_stage_is_named(finished: Path, tmp_path: Path, path: str, stage: str):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / path).unlink()
    (folder / "report.html").unlink(missing_ok=True)
    with pytest.raises(InputError, match=re.escape(f"stage '{stage}' is not finished")):
        _report(folder)
    assert not (folder / "report.html").exists()


def test_metrics_without_a_split_are_refused(finished: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    write_json(folder / "evaluation" / "clip-truth" / "metrics.json", {"top1": 0.5})
    with pytest.raises(InputError, match=r"has no top1_base, top1_novel; .*split="):
        results(folder)


def test_the_table_fits_80_columns_and_holds_each_figure_with_the_difference_in_points(finished: Path):
    console = Console(file=io.StringIO(), width=80)
    print_table(finished, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    rows = [line.replace("│", " ").split() for line in printed.splitlines()]
    figures = {(number, row[-4]): row[-3:] for number, row in enumerate(rows) if len(row) >= 4}
    shown = [cells for (_, part), cells in sorted(figures.items()) if part in ("base", "novel", "all")]
    assert shown == [
        ["47.0", "64.0", "+17.0"],
        ["39.0", "56.0", "+17.0"],
        ["45.0", "62.0", "+17.0"],
        ["10.0", "21.0", "+11.0"],
        ["8.0", "19.0", "+11.0"],
        ["9.5", "20.5", "+11.0"],
        ["20.0", "42.0", "+22.0"],
        ["16.0", "38.0", "+22.0"],
        ["19.0", "41.0", "+22.0"],
    ]
    assert "zero-shot, own proposals: AP50" in printed


def test_the_summary_can_be_written_as_json_and_agrees_with_the_stages(finished: Path):
    data = json.loads(json.dumps(summary(finished, judge_mining(finished))))
    assert data["results"]["regionclip"]["detector_novel"] == pytest.approx(0.38)
    assert data["recall"]["recall@100_novel"] == pytest.approx(0.65)
    assert data["counts"]["train_scenes"] == TRAIN
    assert data["seconds"] == pytest.approx(303.7)
    mining = data["mining"]
    assert mining["evaluated"] < mining["pairs"] == data["counts"]["mined_regions"]
    assert mining["precision"] + mining["misclassified"] + mining["background"] == pytest.approx(1)
    assert 0.4 < mining["precision"] < 0.8


def test_scenes_are_picked_by_the_truth_and_show_the_novel_categories(finished: Path):
    truth = _truth(finished, "val")
    split = load_split(finished / "world" / "split.json", truth.categories)
    picked = pick_scenes(truth, split.novel)
    assert len(picked) == 12
    assert [record.image_id for record in picked] == sorted({record.image_id for record in picked})
    shown = {truth.categories[label] for record in picked for label in record.labels.tolist()}
    present = {truth.categories[label] for record in truth for label in record.labels.tolist()}
    assert present & set(split.novel) <= shown
    assert len(pick_scenes(truth, split.novel, VAL + 5)) == VAL


def one_scene(finished: Path, folder: Path) -> tuple[ImageAnnotations, CocoDetection]:
    """Returns the first validation scene of at least two objects, and annotations of it alone."""
    world = finished / "world"
    truth = CocoDetection(world / "instances_val.json", world / "images")
    record = next(record for record in truth if len(record.boxes) >= 2)
    content = read_json(world / "instances_val.json")
    for part, key in (("images", "id"), ("annotations", "image_id")):
        content[part] = [entry for entry in content[part] if entry[key] == record.image_id]
    write_json(folder / "one.json", content)
    return record, CocoDetection(folder / "one.json", world / "images")


def test_scenes_show_what_was_found_and_missed_from_the_best_threshold_on(finished: Path, tmp_path: Path):
    record, truth = one_scene(finished, tmp_path)
    split = load_split(finished / "world" / "split.json", truth.categories)
    x1, y1, x2, y2 = record.boxes[0].tolist()
    label = int(record.labels[0])
    entry = {"image_id": record.image_id, "category_id": truth.category_ids[label], "score": 0.7}
    entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    threshold, (scene,) = labeled_scenes(truth, [entry, entry | {"bbox": [0, 0, 5, 5], "score": 0.3}], split)
    assert threshold == pytest.approx(0.7)
    said = "".join(text for _, text in scene.caption)
    assert said.startswith("found ")
    assert truth.categories[label] in said.partition("missed")[0]
    assert "missed " in said
    threshold, (scene,) = labeled_scenes(truth, [], split)
    assert threshold == 0.5
    assert scene.caption[0] == ("name", "missed")


def test_of_many_detections_the_best_are_drawn(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record, truth = one_scene(finished, tmp_path)
    split = load_split(finished / "world" / "split.json", truth.categories)
    entry = {"image_id": record.image_id, "category_id": truth.category_ids[0], "bbox": [0, 0, 5, 5]}
    drawn: dict[str, list[str]] = {}
    monkeypatch.setattr(
        "regionclip.quickstart.report_page.draw",
        lambda image, **what: drawn.update(what) or Image.new("RGB", (9, 9)),
    )
    labeled_scenes(truth, [entry | {"score": 0.5 + number / 100} for number in range(40)], split)
    assert len(drawn["texts"]) == MAX_DRAWN
    assert drawn["texts"][-1].endswith("0.89")  # the best last, on top


def test_pairs_are_picked_from_all_probabilities_and_over_the_concepts():
    regions = [
        MinedRegion(n, "a.jpg", 9, 9, (0, 0, 5, 5), 1.0, [0], [(n % 100) / 100], f"thing {n % 7}", None, None)
        for n in range(300)
    ]
    chosen = pick_pairs(regions, 28)
    probabilities = [regions[place].concept_probs[0] for place in chosen]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] > 0.9 > 0.1 > probabilities[-1]
    assert all(sum(regions[place].concept == f"thing {n}" for place in chosen) == 4 for n in range(7))
    assert pick_pairs(regions[:3], 28) == [2, 1, 0]
    assert pick_pairs([], 28) == []
