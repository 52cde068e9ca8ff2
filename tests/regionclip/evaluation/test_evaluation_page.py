"""The evaluation's page: it loads nothing, shows what was measured, and escapes what it is given."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json, write_json

Command = Callable[..., tuple[int, str]]
Parsed = Callable[[str], Any]


@pytest.fixture(scope="module")
def results(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every object but the last is found, one under a wrong name; one detection shows nothing."""
    content = read_json(world / "instances_val.json")
    entries = [
        {
            **{key: entry[key] for key in ("image_id", "category_id", "bbox")},
            "score": 0.9 - place / 1000,
        }
        for place, entry in enumerate(content["annotations"][:-1])
    ]
    ids = [entry["id"] for entry in content["categories"]]
    entries[0]["category_id"] = next(number for number in ids if number != entries[0]["category_id"])
    entries.append(entries[1] | {"bbox": [0, 0, 3, 3], "score": 0.95})
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_json(path, entries)
    return path


@pytest.fixture(scope="module")
def call(world: Path, results: Path) -> list[str]:
    annotations = f"annotations={world / 'instances_val.json'}"
    return ["evaluate", annotations, f"results={results}", f"split={world / 'split.json'}"]


@pytest.fixture(scope="module")
def text(call: list[str], world: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "out"
    assert main_regionclip([*call, f"images={world / 'images'}", f"out={out}"]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(text: str, parsed: Parsed):
    page = parsed(text)
    assert page.open == []
    assert len(page.addresses) > 3
    assert all(address.startswith("data:") for address in page.addresses)
    assert "default-src 'none'" in text
    assert page.headings == [
        "Precision over recall",
        "Misclassified objects",
        "Correct detections with the highest scores",
        "False detections with the highest scores",
        "The largest missed objects",
        "Results by category",
    ]


def test_the_pictures_are_pictures(text: str):
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (240, 240)


def section(text: str, title: str) -> str:
    return text.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]


def test_the_mistakes_are_shown_with_what_is_there(text: str, world: Path, results: Path):
    content, found = read_json(world / "instances_val.json"), read_json(results)
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    true, last = content["annotations"][0], content["annotations"][-1]
    wrong = section(text, "False detections with the highest scores")
    assert wrong.count("<figure>") == 2
    assert wrong.index("background") < wrong.index("it is: ")  # the most confident first
    assert names[found[0]["category_id"]] in wrong
    assert names[true["category_id"]] in wrong
    missed = section(text, "The largest missed objects")
    assert missed.count("<figure>") == 1
    assert names[last["category_id"]] in missed
    confusions = section(text, "Misclassified objects")
    assert names[true["category_id"]] in confusions.partition("</table>")[0]


def test_without_pictures_the_page_says_how_to_see_them(call: list[str], parsed: Parsed, tmp_path: Path):
    assert main_regionclip([*call, f"out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Give images=DIR" in text
    assert "data:image/jpeg" not in text
    assert parsed(text).open == []


def test_pictures_that_cannot_be_read_are_counted(call: list[str], world: Path, tmp_path: Path):
    images = shutil.copytree(world / "images", tmp_path / "images")
    for path in images.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    assert main_regionclip([*call, f"images={images}", f"out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "images could not be read" in text
    assert "None." in section(text, "Correct detections with the highest scores")


def test_a_folder_of_pictures_that_does_not_exist_is_named(
    call: list[str], regionclip: Command, tmp_path: Path
):
    code, told = regionclip(*call, f"images={tmp_path / 'nowhere'}", f"out={tmp_path / 'out'}")
    assert code == 2
    assert "images folder" in told
    assert "nowhere does not exist" in told


def test_no_page_is_written_when_none_is_wanted(call: list[str], tmp_path: Path):
    assert main_regionclip([*call, "report=false", f"out={tmp_path / 'out'}"]) == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {".inputs.json", "config.yaml", "metrics.json", "per_class.csv"}


@pytest.mark.parametrize("found", ["nothing", "a false alarm", "a wrong name"])
def test_names_are_escaped_and_nothing_found_is_a_page_too(
    found: str, world: Path, parsed: Parsed, tmp_path: Path
):
    content = read_json(world / "instances_val.json")
    true = content["annotations"][0]
    for entry in content["categories"]:
        entry["name"] = f"<script>alert({entry['id']})</script>"
    others = [entry["id"] for entry in content["categories"] if entry["id"] != true["category_id"]]
    alarm = {"image_id": true["image_id"], "category_id": others[0], "bbox": [0, 0, 1, 1], "score": 0.5}
    entries = {"nothing": [], "a false alarm": [alarm], "a wrong name": [alarm | {"bbox": true["bbox"]}]}
    write_json(tmp_path / "instances.json", content)
    write_json(tmp_path / "results.json", entries[found])
    command = ["evaluate", f"annotations={tmp_path / 'instances.json'}"]
    command += [
        f"results={tmp_path / 'results.json'}",
        f"images={world / 'images'}",
        f"out={tmp_path / 'out'}",
    ]
    assert main_regionclip(command) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert f"&lt;script&gt;alert({true['category_id']})" in section(text, "The largest missed objects")
    assert parsed(text).open == []
    assert "No detection covers an object of its class" in text


def test_results_whose_numbers_mean_other_names_are_noticed_and_mended(
    world: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = read_json(world / "instances_val.json")
    ids = sorted(entry["id"] for entry in content["categories"])
    names = [entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])]
    listed = names[3:] + names[:3]
    place_of = {number: (place - 3) % len(ids) for place, number in enumerate(ids)}
    counted = [entry | {"category_id": place_of[entry["category_id"]]} for entry in read_json(results)]
    write_json(tmp_path / "counted.json", counted)
    (tmp_path / "names.txt").write_text("\n".join(listed))
    command = ["evaluate", f"annotations={world / 'instances_val.json'}", "report=false"]
    given = f"results={tmp_path / 'counted.json'}"
    assert main_regionclip([*command, given, f"out={tmp_path / 'a'}"]) == 0
    assert "their names hardly ever do; if its category ids count a class list" in capsys.readouterr().out
    assert main_regionclip([*command, f"results={results}", f"out={tmp_path / 'b'}"]) == 0
    mended = f"results_categories={tmp_path / 'names.txt'}"
    assert main_regionclip([*command, given, mended, f"out={tmp_path / 'c'}"]) == 0
    assert "hardly ever" not in capsys.readouterr().out
    assert read_json(tmp_path / "c" / "metrics.json") == read_json(tmp_path / "b" / "metrics.json")
    assert read_json(tmp_path / "c" / "metrics.json")["AP50"] > 0.5
