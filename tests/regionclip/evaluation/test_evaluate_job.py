"""The evaluation job: its figures are pycocotools' on the file it leaves, or naive counts."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clip_base.data.coco import read_instances
from clip_base.jobs.cli import main_regionclip
from clip_base.models.tokenizer import Tokenizer
from clip_base.storage.files import read_json, write_json
from regionclip.checkpoints.load import load_detector
from regionclip.concepts.vocabulary import embed
from regionclip.data import annotations
from regionclip.data.annotations import CocoDetection
from regionclip.data.batches import read_batches, read_record
from regionclip.evaluation import evaluate
from regionclip.metrics import average_precision
from regionclip.models.postprocess import DetectorConfig
from regionclip.structures.regions import Regions
from regionclip.structures.transforms import ResizeConfig

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def measured(options: list[str], clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP's names for a grid of boxes."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    command = ["evaluate", *options, f"weights={clip_file}", "proposer.name=grid", "detector.nms_type=nms"]
    assert main_regionclip([*command, f"out={out}"]) == 0
    return out


def precision(annotations: Path, results: Path) -> tuple[COCOeval, dict[str, int]]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation, {entry["name"]: entry["id"] for entry in truth.dataset["categories"]}


def test_ap_is_pycocotools_on_the_written_results(measured: Path, world: Path) -> None:
    evaluation, ids = precision(world / "instances_val.json", measured / "results.json")
    metrics, split = read_json(measured / "metrics.json"), read_json(world / "split.json")
    keys = [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR@1",
        "AR@10",
        "AR@100",
        "ARs@100",
        "ARm@100",
        "ARl@100",
    ]
    wanted = dict(zip(keys, evaluation.stats.tolist(), strict=True))
    for key, value in wanted.items():
        assert metrics[key] == pytest.approx(value, abs=1e-9), key
    assert metrics["AP50"] > 0
    table = evaluation.eval["precision"][0, :, :, 0, -1]  # [R, K] at IoU 0.5, all areas, 100 detections
    for part in ("base", "novel"):
        columns = [evaluation.params.catIds.index(ids[name]) for name in split[part]]
        measured_part = table[:, columns][table[:, columns] > -1]
        expected = float(measured_part.mean()) if measured_part.size else -1
        assert metrics[f"AP50_{part}"] == pytest.approx(expected, abs=1e-9)
        recall = evaluation.eval["recall"][:, columns, 0, -1]
        expected = float(recall[recall > -1].mean()) if (recall > -1).any() else -1
        assert metrics[f"AR@100_{part}"] == pytest.approx(expected, abs=1e-9)


def test_the_job_ends_with_its_page_and_says_what_was_not_measured(
    measured: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"annotations={world / 'instances_val.json'}", f"results={measured / 'results.json'}"]
    assert main_regionclip(["evaluate", *data, f"out={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"open {tmp_path / 'out' / 'report.html'} in a browser"
    metrics = read_json(tmp_path / "out" / "metrics.json")
    absent = {key for key, value in metrics.items() if value == -1}
    assert absent  # no image has an object of every size
    assert {line.split()[0] for line in lines if line.endswith("not measured")} == absent
    assert not [line for line in lines[:-1] if "-1" in line]


def test_evaluating_the_written_results_gives_the_same_figures(
    measured: Path, world: Path, tmp_path: Path
) -> None:
    data = [f"annotations={world / 'instances_val.json'}", f"split={world / 'split.json'}"]
    command = ["evaluate", *data, f"results={measured / 'results.json'}", f"out={tmp_path / 'out'}"]
    assert main_regionclip(command) == 0
    first, second = read_json(measured / "metrics.json"), read_json(tmp_path / "out" / "metrics.json")
    assert {key: first[key] for key in second} == second


def test_top1_over_true_boxes_is_a_naive_count(
    world: Path, options: list[str], clip_file: Path, tmp_path: Path
) -> None:
    command = ["evaluate", *options, f"weights={clip_file}", "boxes=truth", "batch_size=3"]
    assert main_regionclip([*command, f"out={tmp_path / 'out'}"]) == 0
    metrics, split = read_json(tmp_path / "out" / "metrics.json"), read_json(world / "split.json")
    dataset = CocoDetection(world / "instances_val.json", world / "images")
    dataset = dataset.restrict([*split["base"], *split["novel"]])
    detector = load_detector(str(clip_file), DetectorConfig())
    templates = ["a photo of {article} {}.", "{}"]
    detector.set_vocabulary(embed(detector.clip, Tokenizer(24), dataset.categories, templates))
    right: dict[str, list[bool]] = {"": [], "_base": [], "_novel": []}
    groups = read_batches(dataset, read_record, ResizeConfig([64], 64), 3, torch.device("cpu"))
    for batch in (batch for group in groups for batch in group.batches):
        maps = detector.feature_maps(batch.images)
        for slot, record in enumerate(batch.items):
            for box, label in zip(record.boxes, record.labels.tolist(), strict=True):
                region = Regions(batch.transforms[slot].apply_boxes(box[None]), torch.tensor([slot]))
                cosines = detector.classify(maps, region, background=False)[0][0]
                part = "_novel" if dataset.categories[label] in split["novel"] else "_base"
                for key in ("", part):
                    right[key].append(int(cosines.argmax()) == label)
    assert right["_novel"]
    for key, hits in right.items():
        assert metrics[f"top1{key}"] == pytest.approx(sum(hits) / len(hits)), key


def test_true_boxes_come_back_as_results(
    options: list[str], world: Path, clip_file: Path, tmp_path: Path
) -> None:
    command = ["evaluate", *options, f"weights={clip_file}", "boxes=truth", f"out={tmp_path / 'out'}"]
    assert main_regionclip(command) == 0
    results = read_json(tmp_path / "out" / "results.json")
    truth = read_json(world / "instances_val.json")["annotations"]
    found = {(entry["image_id"], *(round(side) for side in entry["bbox"])) for entry in results}
    assert found == {(entry["image_id"], *(round(side) for side in entry["bbox"])) for entry in truth}
    assert len(results) == 5 * len(truth)


def test_an_image_without_boxes_and_a_crowd_are_no_hindrance(
    options: list[str], world: Path, clip_file: Path, tmp_path: Path
) -> None:
    content = read_json(world / "instances_val.json")
    first, second = content["images"][0]["id"], content["images"][1]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != first]
    for entry in content["annotations"]:
        entry["iscrowd"] = int(entry["image_id"] == second)
    write_json(tmp_path / "instances.json", content)
    others = [option for option in options if not option.startswith("annotations=")]
    command = ["evaluate", *others, f"annotations={tmp_path / 'instances.json'}", f"weights={clip_file}"]
    command += ["boxes=truth", "batch_size=1", f"out={tmp_path / 'out'}"]
    assert main_regionclip(command) == 0
    named = {entry["image_id"] for entry in read_json(tmp_path / "out" / "results.json")}
    assert named == {entry["id"] for entry in content["images"]} - {first, second}


def test_a_broken_image_is_counted_and_named(
    options: list[str], world: Path, detector_file: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    entry = read_json(world / "instances_val.json")["images"][0]
    (images / entry["file_name"]).write_bytes(b"no picture")
    others = [option for option in options if not option.startswith("images=")]
    command = ["evaluate", *others, f"images={images}", f"weights={detector_file}", f"out={tmp_path / 'out'}"]
    assert main_regionclip(command) == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["images"], metrics["skipped"]) == (3, 1)
    listed = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert f'"image_id": {entry["id"]}' in listed
    assert "does not decode" in listed


def test_the_class_table_is_csv_whatever_the_names(world: Path, tmp_path: Path) -> None:
    content = read_json(world / "instances_val.json")
    content["categories"][0]["name"] = 'a "quoted", crème'
    write_json(tmp_path / "instances.json", content)
    write_json(tmp_path / "results.json", [])
    files = [f"annotations={tmp_path / 'instances.json'}", f"results={tmp_path / 'results.json'}"]
    assert main_regionclip(["evaluate", *files, f"out={tmp_path / 'out'}"]) == 0
    with (tmp_path / "out" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["name"] == 'a "quoted", crème'
    assert len(rows) == len(content["categories"])
    assert set(rows[0]) == {"name", "category_id", "novel", "boxes", "detections", "AP", "AP50"}


def test_a_second_call_measures_nothing_anew(measured: Path, options: list[str], clip_file: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in measured.iterdir() if path.suffix != ".yaml"}
    assert {path.name for path in before} >= {"metrics.json", "results.json"}
    command = ["evaluate", *options, f"weights={clip_file}", "proposer.name=grid", "detector.nms_type=nms"]
    assert main_regionclip([*command, f"out={measured}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_results_that_changed_since_are_not_answered_with_the_old_figures(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    results.write_text("[]")
    truth, out = world / "instances_val.json", tmp_path / "out"
    command = ["evaluate", f"annotations={truth}", f"results={results}", f"out={out}"]
    assert main_regionclip(command) == 0
    results.write_text("[] ")
    assert main_regionclip(command) == 2
    assert f"results ({results}) changed since the run in {out} started" in capsys.readouterr().err


@pytest.mark.parametrize("proposer", ["rpn", "precomputed", "grid"])
def test_every_proposer_can_be_named(
    options: list[str], world: Path, clip_file: Path, rpn_file: Path, tmp_path: Path, proposer: str
) -> None:
    boxes = [
        {"image_id": entry["id"], "bbox": [5, 5, 40, 40], "score": 0.5}
        for entry in read_json(world / "instances_val.json")["images"]
    ]
    write_json(tmp_path / "boxes.json", boxes)
    own = {
        "rpn": [f"proposer.weights={rpn_file}", "proposer.limit=10"],
        "precomputed": [f"proposer.file={tmp_path / 'boxes.json'}"],
        "grid": ["proposer.sizes=[1.0]"],
    }
    part = [f"proposer.name={proposer}", *own[proposer]]
    assert (
        main_regionclip(["evaluate", *options, f"weights={clip_file}", *part, f"out={tmp_path / 'e'}"]) == 0
    )
    assert main_regionclip(["propose", *options, *part, f"out={tmp_path / 'p'}"]) == 0
    assert read_json(tmp_path / "e" / "results.json")
    assert read_json(tmp_path / "p" / "proposals.json")
    metrics = read_json(tmp_path / "p" / "metrics.json")
    assert metrics["images"] == 4
    assert {"recall@100", "recall@100_base", "recall@100_novel"} <= metrics.keys()


def test_proposals_go_through_a_file_unchanged(options: list[str], tmp_path: Path) -> None:
    assert main_regionclip(["propose", *options, "proposer.name=grid", f"out={tmp_path / 'first'}"]) == 0
    again = ["proposer.name=precomputed", f"proposer.file={tmp_path / 'first' / 'proposals.json'}"]
    assert main_regionclip(["propose", *options, *again, f"out={tmp_path / 'second'}"]) == 0
    first, second = (read_json(tmp_path / name / "proposals.json") for name in ("first", "second"))
    assert len(first) == len(second)
    key = lambda entry: (entry["image_id"], *entry["bbox"])  # noqa: E731
    for one, other in zip(sorted(first, key=key), sorted(second, key=key), strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give either results=FILE"),
        (["results=a.json", "weights=b"], "give either results=FILE"),
        (["weights=b"], "weights= needs images=DIR"),
        (["results=a.json", "label_set=novel"], "label_set=novel needs split="),
        (["weights=b", "images=c", "results_categories=coco"], "also give results=FILE"),
        (["results=a.json", "results_first_id=2"], "results_first_id=2 must be 0 or 1"),
        (["results=a.json", "max_detections=-1"], "max_detections=-1 not negative"),
    ],
)
def test_contradicting_options_are_refused(
    given: list[str], told: str, tmp_path: Path, regionclip: Command
) -> None:
    code, error = regionclip("evaluate", "annotations=a.json", f"out={tmp_path / 'out'}", *given)
    assert code == 2
    assert told in error


def test_a_clip_without_a_proposer_is_refused(
    options: list[str], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    code, error = regionclip("evaluate", *options, f"weights={clip_file}", f"out={tmp_path / 'out'}")
    assert code == 2
    assert "give, for example, proposer.name=rpn" in error


@pytest.mark.parametrize("part", ["base", "novel"])
def test_only_the_names_that_compete_are_looked_for(
    part: str, options: list[str], world: Path, detector_file: Path, tmp_path: Path
) -> None:
    command = [
        "evaluate",
        *options,
        f"weights={detector_file}",
        f"label_set={part}",
        f"out={tmp_path / 'out'}",
    ]
    assert main_regionclip(command) == 0
    content, split = read_json(world / "instances_val.json"), read_json(world / "split.json")
    ids = {entry["id"] for entry in content["categories"] if entry["name"] in split[part]}
    found = {entry["category_id"] for entry in read_json(tmp_path / "out" / "results.json")}
    assert found
    assert found <= ids
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics[f"AP_{part}"] == metrics["AP_all"] >= 0
    assert metrics[f"AP_{'novel' if part == 'base' else 'base'}"] == -1
    with (tmp_path / "out" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(split[part])


def test_pictures_that_are_missing_are_counted_and_said(
    options: list[str], world: Path, detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    entry = read_json(world / "instances_val.json")["images"][1]
    (images / entry["file_name"]).unlink()
    others = [option for option in options if not option.startswith("images=")]
    command = ["evaluate", *others, f"images={images}", f"weights={detector_file}", f"out={tmp_path / 'out'}"]
    assert main_regionclip(command) == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["images"], metrics["missing"]) == (3, 1)
    said = capsys.readouterr().out
    assert f"1 annotated images are not in {images}, first {Path(entry['file_name']).name}" in said


def as_lvis(world: Path, folder: Path) -> Path:
    """Writes the validation scenes as LVIS would hold them: some categories were not looked for."""
    content, novel = read_json(world / "instances_val.json"), read_json(world / "split.json")["novel"]
    for number, entry in enumerate(content["categories"]):
        entry["frequency"] = "r" if entry["name"] in novel else "fc"[number % 2]
    ids = [entry["id"] for entry in content["categories"]]
    for number, entry in enumerate(content["images"]):
        entry["coco_url"] = f"http://images.cocodataset.org/{entry.pop('file_name')}"
        entry |= {"neg_category_ids": ids[number::3], "not_exhaustive_category_ids": ids[number : number + 2]}
    write_json(folder / "lvis_v1_val.json", content)
    return folder / "lvis_v1_val.json"


def test_lvis_is_measured_by_its_own_protocol_and_its_results_file_gives_the_same(
    options: list[str], world: Path, clip_file: Path, tmp_path: Path
) -> None:
    annotations = as_lvis(world, tmp_path)
    others = [one for one in options if not one.startswith(("annotations=", "split="))]
    detect = [f"weights={clip_file}", "proposer.name=grid", "detector.max_detections=300", *others]
    common = ["evaluate", f"annotations={annotations}", "split=lvis"]
    assert main_regionclip([*common, *detect, f"out={tmp_path / 'first'}"]) == 0
    metrics = read_json(tmp_path / "first" / "metrics.json")
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"} <= metrics.keys()
    assert metrics["APr"] == metrics["AP_novel"]
    assert metrics["AP"] > 0
    assert metrics["ignored_results"] > 0
    again = [*common, f"results={tmp_path / 'first' / 'results.json'}"]
    for evaluator in ("pycocotools", "fast"):
        out = tmp_path / evaluator
        assert main_regionclip([*again, f"evaluator={evaluator}", f"out={out}"]) == 0
        second = read_json(out / "metrics.json")
        assert second == pytest.approx({key: metrics[key] for key in second}, abs=1e-9)
    assert main_regionclip([*again, "protocol=coco", f"out={tmp_path / 'coco'}"]) == 0
    assert "APr" not in read_json(tmp_path / "coco" / "metrics.json")


def test_both_evaluators_give_the_jobs_figures(measured: Path, world: Path, tmp_path: Path) -> None:
    common = ["evaluate", f"annotations={world / 'instances_val.json'}", f"split={world / 'split.json'}"]
    common += [f"results={measured / 'results.json'}", "evaluator=fast", f"out={tmp_path / 'out'}"]
    assert main_regionclip(common) == 0
    first, second = read_json(measured / "metrics.json"), read_json(tmp_path / "out" / "metrics.json")
    assert second == pytest.approx({key: first[key] for key in second}, abs=1e-6)


def test_the_annotations_are_read_once(
    world: Path, measured: Path, tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they are counted, shown to the detector's evaluator, and tried with boxes in other forms."""
    read: list[object] = []

    def counting(path: str | Path) -> dict[str, object]:
        read.append(path)
        return read_instances(path)

    for module in (annotations, average_precision, evaluate):
        monkeypatch.setattr(module, "read_instances", counting)
    entries = read_json(measured / "results.json")
    far = [{**entry, "bbox": [side + 900 for side in entry["bbox"]]} for entry in entries]
    write_json(tmp_path / "results.json", far)
    given = [f"annotations={world / 'instances_val.json'}", f"results={tmp_path / 'results.json'}"]
    assert regionclip("evaluate", *given, "report=false", f"out={tmp_path / 'out'}")[0] == 0
    assert len(read) == 1
