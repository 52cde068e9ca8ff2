"""What the page of `regionclip serve` answers, without a browser: names, uploads, thresholds, clicks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regionclip
from clip_base.jobs.config import resolve
from clip_base.runtime.errors import InputError
from regionclip.serve import ServeConfig, example_pictures, first_names, open_desk, title_of
from regionclip.serve.desk import (
    NEAREST,
    TYPED,
    Checkpoint,
    Desk,
    Kept,
    Limits,
    Thresholds,
    for_page,
    read_photo,
    rows_shown,
    smallest_at,
    typed_names,
    upload,
)
from regionclip.serve.server import Guard, address, listen, refers_elsewhere
from regionclip.structures.detections import Detections

ALL = Thresholds(0.0, 1.0, 100)
WORDS = ("cup", "star", "tree", "sun")


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Callable[..., tuple[int, str]]:
    """The command line; its own fixture has the package's name, which this file needs."""
    return request.getfixturevalue("regionclip")  # type: ignore[no-any-return]


@pytest.fixture
def picture(world: Path) -> Path:
    return sorted((world / "images" / "val").iterdir())[0]


@pytest.fixture
def desk(detector_file: Path) -> Desk:
    checkpoint = Checkpoint("one", regionclip.load(detector_file, precision="fp32"))
    return Desk([checkpoint], Limits(1, 1), {"larger": WORDS})


def test_names_are_parted_by_commas_and_lines() -> None:
    assert typed_names(" red cup,star\n tree ,, ") == ("red cup", "star", "tree")
    assert len(typed_names("coco")) == 80


def test_a_typed_path_is_a_name_and_no_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("password\n")
    assert typed_names(str(file)) == (str(file),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "at least one name"),
        (" , \n", "at least one name"),
        ("cup, star, cup", "'cup' stands there more than once"),
        (",".join(map(str, range(2001))), "2001 names are too many"),
        ("a" * 101, "101 letters; part names by commas"),
    ],
)
def test_useless_names_are_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        typed_names(text)


def test_uploads_over_the_limits_are_refused(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 0\.0 MB; this page takes up to 1e-06 MB"):
        upload(picture, 1e-6)
    with pytest.raises(InputError, match=r"64 × 64 = 0\.0 million pixels; this page takes up to 0\.004"):
        read_photo("key", picture, 0.004)
    with pytest.raises(InputError, match="no longer here"):
        upload(tmp_path / "gone.jpg", 1)


@pytest.mark.parametrize("content", [b"", b"just words", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_file_that_is_no_picture_is_refused_without_telling_its_folder(
    content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"^cat\.png is no picture that can be read"):
        read_photo("key", file, 1)


def test_a_damaged_picture_is_refused(picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(picture.read_bytes()[:700])
    with pytest.raises(InputError, match=r"^cat\.jpg is a damaged picture"):
        read_photo("key", file, 1)


def test_a_header_of_far_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.png"
    Image.new("L", (200, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(InputError, match=r"bomb\.png has far more than 1 million pixels"):
        read_photo("key", file, 1)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 32), (640, 320)), ((640, 480), (640, 480)), ((2560, 1280), (1280, 640)), ((5000, 1), (1280, 1))],
)
def test_pictures_come_to_the_page_in_a_readable_size(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert for_page(np.zeros((*size, 3), np.uint8)).shape[:2] == shown


def found_three() -> Detections:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 40, 40]], dtype=torch.float32)
    return Detections(boxes, torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0, 0, 1]), ("a", "b"), (50, 50))


@pytest.mark.parametrize(
    ("thresholds", "rows"),
    [
        (ALL, [0, 1, 2]),
        (Thresholds(0.5, 1.0, 100), [0, 1]),
        (Thresholds(0.0, 0.5, 100), [0, 2]),  # 1 overlaps 0 by 9/11
        (Thresholds(0.0, 1.0, 1), [0]),
        (Thresholds(0.95, 1.0, 100), []),
    ],
)
def test_thresholds_leave_the_best(thresholds: Thresholds, rows: list[int]) -> None:
    assert rows_shown(found_three(), thresholds) == rows


def test_a_click_means_the_smallest_box_that_holds_it() -> None:
    boxes = torch.tensor([[0, 0, 40, 40], [10, 10, 20, 20], [12, 12, 60, 60]], dtype=torch.float32)
    assert smallest_at(boxes, 15, 15) == 1
    assert smallest_at(boxes, 30, 30) == 0
    assert smallest_at(boxes, 50, 50) == 2
    assert smallest_at(boxes, 50, 5) is None
    assert smallest_at(boxes[:0], 1, 1) is None


def test_boxes_follow_the_size_of_the_picture() -> None:
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.int64), ("cup",), (10, 20))
    assert found.resized((20, 80)).boxes.tolist() == [[4, 4, 12, 8]]


def test_the_page_finds_what_the_predictor_finds(desk: Desk, picture: Path, detector_file: Path) -> None:
    view = desk.view(str(picture), "cup, star", ALL)
    alone = regionclip.load(detector_file, vocabulary="cup, star", precision="fp32").detect(picture)
    entries = desk.results(view, 0)
    expected = alone.to_coco(1, [1, 2])
    assert [{key: entry[key] for key in expected[0]} for entry in entries] == expected
    assert {entry["file_name"] for entry in entries} == {picture.name}
    assert {entry["category_name"] for entry in entries} <= {"cup", "star"}
    table = desk.table(view, 0)
    assert len(table) == len(entries) == len(desk.rows(view, 0))
    assert desk.summary(view, 0).startswith(f"{len(entries)} of {len(alone)} boxes in 64 × 64 pixels")


def test_a_moved_threshold_and_a_known_vocabulary_compute_nothing_anew(
    desk: Desk, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = desk.rows(desk.view(str(picture), "cup, star", ALL), 0)
    predictor = desk.checkpoints[0].predictor
    monkeypatch.setattr(predictor, "detect_batch", None)
    monkeypatch.setattr(predictor, "set_vocabulary", None)
    view = desk.view(str(picture), "cup, star", Thresholds(0.0, 1.0, 2))
    assert desk.rows(view, 0) == before[:2]
    assert len(desk.results(view, 0)) == 2


def test_names_are_embedded_once_for_all_pictures(desk: Desk, world: Path) -> None:
    first, second = sorted((world / "images" / "val").iterdir())[:2]
    embedded = []
    predictor = desk.checkpoints[0].predictor
    encode = predictor.detector.clip.encode_text
    predictor.detector.clip.encode_text = lambda tokens: embedded.append(1) or encode(tokens)  # type: ignore
    desk.rows(desk.view(str(first), "cup, star", ALL), 0)
    once = len(embedded)
    assert once
    desk.rows(desk.view(str(second), "cup, star", ALL), 0)
    assert len(embedded) == once


def test_when_nothing_is_shown_the_page_says_what_comes_nearest(desk: Desk, picture: Path) -> None:
    view = desk.view(str(picture), "cup, star", Thresholds(1.0, 1.0, 100))
    assert desk.rows(view, 0) == []
    assert "No box reaches 1.00; the best is" in desk.summary(view, 0)
    assert desk.picture(view, 0).size == (640, 640)
    assert desk.results(view, 0) == []
    assert desk.row_at(view, 0, 5, 5) is None


def test_a_clicked_box_has_the_nearest_names_of_its_region(
    desk: Desk, picture: Path, detector_file: Path
) -> None:
    view = desk.view(str(picture), "cup, star", ALL)
    row = desk.rows(view, 0)[2]
    x1, y1, x2, y2 = (
        desk.checkpoints[0].detections(desk.photo(str(picture)), view.names).boxes[row] * 10
    ).tolist()
    clicked = desk.row_at(view, 0, (x1 + x2) / 2, (y1 + y2) / 2)
    assert clicked is not None
    line, near = desk.nearest(view, 0, clicked, "larger")
    assert line.startswith(f"**Box {desk.rows(view, 0).index(clicked) + 1}: ")
    alone = regionclip.load(detector_file, vocabulary=WORDS, precision="fp32")
    boxes = desk.checkpoints[0].detections(desk.photo(str(picture)), view.names).boxes
    ((*expected,),) = alone.classify_embeddings(
        alone.region_features(picture, boxes[clicked : clicked + 1]), NEAREST
    )
    assert list(near) == [name for name, _ in expected]
    assert list(near.values()) == pytest.approx([value for _, value in expected], abs=1e-5)
    assert set(desk.nearest(view, 0, clicked, TYPED)[1]) == {"cup", "star"}


def test_the_clicked_box_keeps_its_colour_and_the_others_turn_grey(desk: Desk, picture: Path) -> None:
    view = desk.view(str(picture), "cup, star", Thresholds(0.0, 1.0, 5))
    row = desk.rows(view, 0)[0]
    plain, marked = np.asarray(desk.picture(view, 0)), np.asarray(desk.picture(view, 0, row))
    grey = (marked == 150).all(-1)
    assert grey.sum() > (plain == 150).all(-1).sum() + 100
    assert np.array_equal(np.asarray(desk.picture(view, 0, 10_000)), plain)


def test_two_who_look_for_different_things_do_not_disturb_each_other(
    detector_file: Path, world: Path
) -> None:
    files = [str(file) for file in sorted((world / "images" / "val").iterdir())[:2]]
    wishes = [(file, text) for file in files for text in ("cup", "star, tree", "sun, cup, heart")]

    def new() -> Desk:
        checkpoint = Checkpoint("one", regionclip.load(detector_file, precision="fp32"))
        return Desk([checkpoint], Limits(1, 1), {"larger": WORDS})

    def asked(desk: Desk, file: str, text: str) -> tuple[object, object]:
        view = desk.view(file, text, ALL)
        return desk.results(view, 0), desk.nearest(view, 0, desk.rows(view, 0)[0], "larger")[1]

    alone = new()
    expected = [asked(alone, *wish) for wish in wishes]
    shared = new()
    together = threading.Barrier(4)

    def worker(start: int) -> list[tuple[object, object]]:
        together.wait()
        turned = wishes[start:] + wishes[:start]
        answers = dict(zip(turned, (asked(shared, *wish) for wish in turned), strict=True))
        return [answers[wish] for wish in wishes]

    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(worker, range(4)):
            assert answers == expected


def test_what_several_ask_at_once_is_worked_out_once_and_the_oldest_goes() -> None:
    kept: Kept[int, int] = Kept(2)
    worked: list[int] = []

    def answer(question: int) -> int:
        return kept(question, lambda: worked.append(question) or question * 2)  # type: ignore[func-returns-value]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, [1] * 8)) == [2] * 8
    assert worked == [1]
    assert [answer(question) for question in (2, 3, 3, 2, 1)] == [4, 6, 6, 4, 2]
    assert worked == [1, 2, 3, 1]


def test_a_picture_that_has_gone_is_asked_for_again(desk: Desk, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(picture.read_bytes())
    view = desk.view(str(file), "cup", ALL)
    file.unlink()
    with pytest.raises(InputError, match=r"cat\.jpg is no longer here; drop it again"):
        desk.picture(view, 0)
    with pytest.raises(InputError, match="drop a picture"):
        desk.view(None, "cup", ALL)


def test_the_options_open_one_or_two_checkpoints(detector_file: Path, clip_file: Path) -> None:
    options = [f"weights={detector_file}", f"compare={clip_file}", "lists=[coco]"]
    with pytest.raises(
        InputError, match=r"model\.safetensors has no proposal network; give proposer\.name=grid"
    ):
        open_desk(resolve(ServeConfig, None, options))
    desk = open_desk(resolve(ServeConfig, None, [*options, "proposer.name=grid"]))
    assert [checkpoint.predictor.proposer is None for checkpoint in desk.checkpoints] == [True, False]
    assert desk.checkpoints[0].title == f"{detector_file.parent.name}/model.safetensors"
    assert list(desk.lists) == ["coco"]
    assert title_of("RN50.pt") == "RN50.pt"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("score=1.5", r"score must lie in \[0, 1\]"),
        ("port=70000", "port must lie in 0…65535"),
        ("megapixels=0", "megapixels must be above 0"),
        ("megabytes=-1", "megabytes must be above 0"),
    ],
)
def test_impossible_options_are_refused(change: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        resolve(ServeConfig, None, ["weights=x", change])


def test_examples_are_drawn_or_a_folders(tmp_path: Path, world: Path) -> None:
    drawn = example_pictures("", tmp_path)
    assert len(drawn) == 6
    assert all(tmp_path in file.parents for file in drawn)
    assert first_names("").startswith("airplane, ")
    assert len(example_pictures(str(world / "images" / "val"), tmp_path)) == 4
    assert first_names("coco").count(",") == 79


def test_a_taken_port_is_told_before_anything_is_loaded(
    command: Callable[..., tuple[int, str]],
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, told = command("serve", "weights=nowhere.safetensors", f"port={port}")
    assert code == 2
    assert told == f"error: port {port} is taken; give another port=, or port=0 for a free one\n"


def test_bad_calls_are_told_in_one_line(command: Callable[..., tuple[int, str]], detector_file: Path) -> None:
    assert command("serve", "potr=1") == (2, "error: there is no option 'potr'; did you mean 'port'?\n")
    assert command("serve", "port=0") == (2, "error: missing: weights=…; see --help\n")
    code, told = command("serve", "weights=nowhere.safetensors", "port=0")
    assert (code, told.count("\n")) == (2, 1)
    assert "nowhere.safetensors" in told
    code, told = command("serve", f"weights={detector_file}", "port=0", "examples=nowhere", "lists=[]")
    assert (code, told.count("\n")) == (2, 1)
    assert "nowhere does not exist" in told


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert ServeConfig.host == "127.0.0.1"
    with listen(ServeConfig.host, 0) as listener:
        host, port = listener.getsockname()
        assert (host, address(listener)) == ("127.0.0.1", f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match="is no address"):
        listen("no such host", 0)
    with pytest.raises(InputError, match="cannot listen on 192"):
        listen("192.0.2.1", 0)
    with listen("0.0.0.0", 0) as open_to_all:
        assert address(open_to_all).startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("method", "path", "length", "status"),
    [
        ("GET", "/", b"", None),
        ("GET", "/assets/index.js", b"", None),
        ("POST", "/gradio_api/queue/join", b"100", None),
        ("POST", "/gradio_api/upload", b"1001", 413),
        ("POST", "/gradio_api/upload", b"", 411),
        ("GET", "/gradio_api/file=/tmp/x.png", b"", None),
        ("GET", "/gradio_api/file=http://127.0.0.1/secret", b"", 403),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/secret", b"", 404),
        ("POST", "/gradio_api/call/predict", b"10", 404),
        ("POST", "/gradio_api/vibe-edit", b"10", 404),
        ("POST", "/gradio_api/process_recording", b"10", 404),
        ("GET", "/docs", b"", 404),
    ],
)
def test_the_guard_lets_through_what_the_page_needs(
    method: str, path: str, length: bytes, status: int | None
) -> None:
    headers = [(b"content-length", length)] if length else []
    refusal = Guard(None, Path(), 1000).refuses(
        {"type": "http", "method": method, "path": path, "headers": headers}
    )
    assert (refusal and refusal[0]) == status
    assert Guard(None, Path(), 1000).refuses({"type": "websocket", "path": "/"}) == (404, "not found")


@pytest.mark.parametrize(
    ("body", "elsewhere"),
    [
        ('{"data": [{"path": "FOLDER/a/b.png", "url": "http://127.0.0.1/a.png"}, "http://x", null]}', False),
        ("", False),
        ('{"data": [{"path": "FOLDER/../b.png"}]}', True),
        ('{"data": [[{"path": "/etc/passwd"}]]}', True),
        ('{"data": {"a": {"path": "pyproject.toml"}}}', True),
        ('{"data": [[{"path": "\\u0068ttp://example.com/a.png"}]]}', True),
        ('{"data": [{"path": "\\u0000"}]}', True),
        ("[" * 100_000, True),
        ("no JSON", True),
    ],
)
def test_a_request_that_names_a_file_outside_the_pages_folder_is_found(
    body: str, elsewhere: bool, tmp_path: Path
) -> None:
    assert refers_elsewhere(body.replace("FOLDER", str(tmp_path)).encode(), tmp_path) is elsewhere


def test_ctrl_c_ends_it_cleanly_and_leaves_no_upload_behind(detector_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    code = "import sys; from clip_base.jobs.cli import main_regionclip; sys.exit(main_regionclip())"
    command = [sys.executable, "-c", code, "serve", f"weights={detector_file}", "port=0", "lists=[]"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        line = next(line for line in running.stdout if line.startswith("http"))
        with urllib.request.urlopen(line.split()[0]) as response:
            assert "regionclip" in response.read().decode()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("regionclip-serve-")]
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 0
    assert told.splitlines()[-1] == "stopped"
    assert "Traceback" not in told
    assert not list(tmp_path.glob("regionclip-serve-*"))
