"""The report on mined pairs: a whole page, figures that agree with what was mined, and no surprises."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json, write_json, write_text
from regionclip.concepts.phrases import Phrase
from regionclip.mining import survey
from regionclip.mining.coverage import CoveredImage, cover, reasons
from regionclip.mining.report_page import MAX_CAPTION, caption_around, labeled_image, pick_concepts
from regionclip.mining.shards import MinedRegion, read_regions, shard_path, write_rows
from regionclip.reports.crops import CropBudget

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def reported(mined: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "report"
    call = [f"mined={mined}", f"annotations={world}/instances_train.json", f"split={world}/split.json"]
    assert main_regionclip(["report", *call, f"out={out}", "concepts=4", "examples=2", "max_regions=6"]) == 0
    return out


def region(image: int = 1, concept: str = "cup", probability: float = 0.5, **other: object) -> MinedRegion:
    values = {"phrase": concept, "caption": f"a {concept} stands there", "file_name": f"{image}.jpg", **other}
    return MinedRegion(
        image, str(values["file_name"]), 64, 64, (4, 4, 30, 40), 0.6, [0], [probability], concept,
        values["phrase"], values["caption"],
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_page_loads_nothing_and_its_charts_are_whole(reported: Path):
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script|src=\"(?!data:)", text)
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 8
    for chart in charts:
        ElementTree.fromstring(chart)
    for tag in ("section", "table", "figure", "div", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_the_metrics_agree_with_what_was_mined(reported: Path, mined: Path, world: Path):
    metrics, regions = read_json(reported / "metrics.json"), list(read_regions(mined))
    assert metrics["regions"] == len(regions) == sum(metrics["probability_histogram"])
    assert metrics["images"] == 12
    assert metrics["images_with_pairs"] == len({one.image_id for one in regions})
    assert metrics["concepts_with_pairs"] == len({one.concept for one in regions})
    assert metrics["skipped"] == 12 - metrics["images_with_pairs"]
    assert metrics["precision"] + metrics["misclassified"] + metrics["background"] == pytest.approx(1)
    rows = metrics["by_probability"]
    assert rows[0]["threshold"] == 0
    assert rows[0]["pairs"] == len(regions)
    assert rows[0]["recall_novel"] == metrics["recall_novel"]
    for key in ("pairs", "recall", "recall_base", "recall_novel"):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=True)


def test_every_true_object_of_the_world_is_counted_once(reported: Path, world: Path):
    with (reported / "categories.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["objects"]) for row in rows) == len(
        read_json(world / "instances_train.json")["annotations"]
    )
    split = read_json(world / "split.json")
    assert {row["name"] for row in rows if row["part"] == "novel"} == set(split["novel"])
    with (reported / "confusions.csv").open() as file:
        wrong = sum(int(row["pairs"]) for row in csv.DictReader(file))
    metrics = read_json(reported / "metrics.json")
    assert wrong == round(metrics["misclassified"] * metrics["evaluated"])


def test_of_many_regions_a_sample_of_images_is_compared_and_all_are_counted(
    mined: Path,
    world: Path,
    reported: Path,
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
):
    whole, regions = read_json(reported / "metrics.json"), list(read_regions(mined))
    monkeypatch.setattr(survey, "SAMPLE", len(regions) // 2)
    call = [f"mined={mined}", f"annotations={world}/instances_train.json", f"split={world}/split.json"]
    assert regionclip("report", *call, f"out={tmp_path / 'out'}")[0] == 0
    part = read_json(tmp_path / "out" / "metrics.json")
    sampled = part["sampled_regions"]
    assert 0 < sampled < len(regions)
    assert part["by_probability"][0]["pairs"] == sampled
    for key in ("regions", "images", "phrases", "phrases_matched", "probability_histogram"):
        assert part[key] == whole[key]
    sizes = {region.image_id: 0 for region in regions}
    for region in regions:
        sizes[region.image_id] += 1
    sums = {0}
    for size in sizes.values():
        sums |= {total + size for total in sums}
    assert sampled in sums  # of whole images
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{sampled:,} of the {len(regions):,} regions" in text


def test_without_true_boxes_nothing_is_judged(mined: Path, tmp_path: Path, regionclip: Command):
    assert regionclip("report", f"mined={mined}", f"out={tmp_path / 'out'}")[0] == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Against the ground truth" not in text
    assert 'class="tag' not in text
    assert not (tmp_path / "out" / "categories.csv").exists()
    assert "precision" not in read_json(tmp_path / "out" / "metrics.json")


def test_a_report_may_be_kept_small(mined: Path, tmp_path: Path, regionclip: Command):
    sizes = []
    for name, limit in (("all", "6"), ("none", "0")):
        call = [f"mined={mined}", f"max_report_mb={limit}", f"out={tmp_path / name}"]
        assert regionclip("report", *call)[0] == 0
        text = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        sizes.append(text.count("data:image"))
    assert sizes[0] > sizes[1] == 0


def test_a_report_made_again_is_the_same_and_another_set_is_refused(
    reported: Path, mined: Path, world: Path, regionclip: Command
):
    before = (reported / "report.html").read_bytes()
    call = [f"mined={mined}", f"annotations={world}/instances_train.json", f"split={world}/split.json"]
    call += ["concepts=4", "examples=2", "max_regions=6", f"out={reported}"]
    assert regionclip("report", *call)[0] == 0
    assert (reported / "report.html").read_bytes() == before
    code, told = regionclip("report", *call, "examples=3")
    assert code == 2
    assert "examples=2 there, 3 here" in told


def test_a_set_without_regions_has_a_page_too(mined: Path, tmp_path: Path, regionclip: Command):
    folder = shutil.copytree(mined, tmp_path / "mined")
    manifest = read_json(folder / "manifest.json")
    for number in range(len(manifest["shards"])):
        write_rows(shard_path(folder, number), [])
    entry = {"image_id": 1, "file_name": "train/1.jpg", "reason": "no <proposals>"}
    write_text(folder / "skipped.jsonl", json.dumps(entry) + "\n")
    for number, truth in enumerate(([], [f"annotations={mined_truth(mined)}"])):
        out = tmp_path / f"out{number}"
        assert regionclip("report", f"mined={folder}", *truth, f"out={out}")[0] == 0
        text = (out / "report.html").read_text(encoding="utf-8")
        assert "No region was kept" in text
        assert "no &lt;proposals&gt;" in text


def mined_truth(mined: Path) -> Path:
    captions = Path(read_json(mined / "manifest.json")["config"]["captions"])
    return captions.with_name("instances_train.json")


def test_what_moved_is_named_with_the_option_that_says_where(
    mined: Path, world: Path, tmp_path: Path, regionclip: Command
):
    folder = shutil.copytree(mined, tmp_path / "mined")
    manifest = read_json(folder / "manifest.json")
    manifest["images_folder"] = "/nowhere/images"
    manifest["config"]["concepts"] = "/nowhere/concepts.jsonl"
    write_json(folder / "manifest.json", manifest)
    code, told = regionclip("report", f"mined={folder}", f"out={tmp_path / 'out'}")
    assert (code, "pool=FILE" in told) == (2, True)
    pool = read_json(mined / "manifest.json")["config"]["concepts"]
    given = [f"mined={folder}", f"out={tmp_path / 'out'}", f"pool={pool}"]
    code, told = regionclip("report", *given)
    assert (code, "images=" in told) == (2, True)
    assert regionclip("report", *given, f"images={world / 'images'}")[0] == 0


def test_a_split_without_true_boxes_is_refused(mined: Path, tmp_path: Path, regionclip: Command):
    code, told = regionclip("report", f"mined={mined}", "split=coco", f"out={tmp_path / 'out'}")
    assert code == 2
    assert "needs annotations=FILE" in told


def phrase(text: str) -> Phrase:
    return Phrase(text, text.rpartition(" ")[2], 0, len(text))


def test_coverage_counts_a_concept_once_an_image():
    images = [
        CoveredImage(["red cup", "cup"], [("cup", 0.5), ("cup", 0.5)]),
        CoveredImage(["cup", "tree", "tree top"], [("sun", 0.9)]),
        CoveredImage([], []),
    ]
    found = cover(
        images,
        ["cup", "sun"],
        {"cup": 0, "sun": 1},
        lambda texts: [[phrase(text)] for text in texts],
        {"tree top"},
    )
    metrics = found.metrics()
    assert (metrics["phrases"], metrics["phrases_matched"], metrics["phrases_outside_the_pool"]) == (
        2,
        0.5,
        1,
    )
    assert (metrics["images_with_captions"], metrics["images_with_pairs"]) == (2, 2)
    assert dict(found.regions_per_image) == {2: 1, 1: 1, 0: 1}
    cup, sun = found.by_regions()
    assert (cup.concept, cup.images, cup.matched, cup.regions, cup.examples) == ("cup", 2, 1, 2, ["cup"])
    assert (sun.concept, sun.images, sun.regions, sun.probability) == ("sun", 0, 1, 0.9)
    assert [(use.concept, use.in_pool) for use in found.never_matched()] == [("tree", False)]


def test_skipped_images_are_grouped_by_their_reason_without_the_name():
    skipped = [
        {"file_name": f"train/{n}.jpg", "reason": f"image /data/train/{n}.jpg does not decode: it is empty"}
        for n in range(5)
    ]
    skipped.append({"file_name": "x.jpg", "reason": "no proposals"})
    assert reasons(skipped) == [
        ("image … does not decode: it is empty", 5, ["train/0.jpg", "train/1.jpg", "train/2.jpg"]),
        ("no proposals", 1, ["x.jpg"]),
    ]


def test_crops_stay_below_their_budget_and_those_left_out_are_counted(world: Path):
    folder = world / "images" / "train"
    files = sorted(path.name for path in folder.glob("*.jpg"))
    regions = [region(file_name=name) for name in files] + [region(file_name="gone.jpg")]

    def bytes_within(budget: CropBudget) -> list[int]:
        images = [labeled_image(folder / one.file_name, one, "correct", budget) for one in regions]
        return [len(image.src) for image in images if image is not None]

    whole = CropBudget()
    everything = bytes_within(whole)
    assert (len(everything), whole.left_out, whole.unreadable) == (len(files), 0, 1)
    small = CropBudget(sum(everything) // 2)
    part = bytes_within(small)
    assert part == everything[: len(part)]
    assert 0 < sum(part) <= sum(everything) // 2
    assert len(part) + small.left_out == len(regions)
    assert bytes_within(CropBudget(0)) == []


def test_half_of_the_concepts_picked_are_the_most_frequent_and_half_are_spread():
    counts = {f"c{n:03d}": 1000 - n for n in range(100)}
    picked = pick_concepts(counts, 10)
    assert picked[:5] == [f"c{n:03d}" for n in range(5)]
    assert picked[5:] == sorted(set(picked[5:]))
    assert picked[-1] > "c080"
    assert pick_concepts({"b": 1, "a": 1, "none": 0}, 10) == ["a", "b"]
    assert pick_concepts(counts, 0) == []


@pytest.mark.parametrize("place", [0, 300, 600])
def test_a_long_caption_is_cut_around_its_phrase(place: int):
    caption = "x " * (place // 2) + "a red cup" + " y" * ((600 - place) // 2)
    before, phrase, after = caption_around(caption, "red cup")
    assert phrase == "red cup"
    assert len(before + phrase + after) <= MAX_CAPTION + len("……")
    assert before.startswith("…") == (place > 0)
    assert after.endswith("…") == (place < 600)


def test_a_phrase_in_another_form_stands_before_its_caption():
    assert caption_around("two <people>", "person") == ("", "person", ": two <people>")
    assert caption_around(None, None) == ("not named in a caption", "", "")


HOSTILE = "<script>alert('$x^2')</script>"


def test_names_and_captions_are_escaped(
    mined: Path, world: Path, tmp_path: Path, regionclip: Command, parsed: Callable[[str], Any]
):
    folder = shutil.copytree(mined, tmp_path / "mined")
    shards = len(read_json(folder / "manifest.json")["shards"])
    regions = [replace(one, concept=HOSTILE, phrase=HOSTILE, caption=HOSTILE) for one in read_regions(mined)]
    for number in range(shards):
        write_rows(shard_path(folder, number), regions if number == 0 else [])
    entry = {"image_id": 1, "file_name": f"{HOSTILE}.jpg", "reason": HOSTILE}
    write_text(folder / "skipped.jsonl", json.dumps(entry) + "\n")
    annotations = read_json(world / "instances_train.json")
    for category in annotations["categories"]:
        category["name"] += HOSTILE
    write_json(tmp_path / "instances.json", annotations)
    call = [f"mined={folder}", f"annotations={tmp_path / 'instances.json'}", f"out={tmp_path / 'out'}"]
    assert regionclip("report", *call)[0] == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10
    assert parsed(text).open == []
