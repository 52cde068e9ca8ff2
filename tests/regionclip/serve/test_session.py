"""What the page of `regionclip serve` answers, without a browser: uploads, thresholds, clicks, names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regionclip
from clip_base.runtime.errors import InputError
from regionclip.inference.region_query import RegionQuery, vocabulary_of
from regionclip.serve.session import NEAREST, TYPED, Answer, DemoSession, LoadedModel, Query, cached
from regionclip.structures.detections import Detections

ALL = (0.0, 1.0, 100)  # score, overlap, boxes
WORDS = ("cup", "star", "tree", "sun")


@pytest.fixture
def image(world: Path) -> str:
    return str(sorted((world / "images" / "val").iterdir())[0])


@pytest.fixture
def new_session(detector_file: Path) -> Callable[[], DemoSession]:
    def make() -> DemoSession:
        model = LoadedModel("one", regionclip.load(detector_file, precision="fp32"))
        return DemoSession([model], {"larger": WORDS}, max_megapixels=1)

    return make


@pytest.fixture
def session(new_session: Callable[[], DemoSession]) -> DemoSession:
    return new_session()


def ask(
    session: DemoSession, image: str, names: str = "cup, star", limits: tuple[float, ...] = ALL
) -> Answer:
    return session.answer(session.query(image, names, *limits), 0)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("", "at least one name"),
        (",".join(map(str, range(2001))), "2001 names are too many"),
        ("a" * 101, "101 letters; separate names by commas"),
    ],
)
def test_unusable_names_are_refused(session: DemoSession, image: str, names: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        ask(session, image, names)


def test_a_typed_path_is_a_name_and_no_file_is_read(session: DemoSession, image: str, tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("password\n")
    assert session.query(image, str(file), *ALL).names == (str(file),)


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(
    session: DemoSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.png"
    Image.new("L", (1001, 1000)).save(file)
    monkeypatch.setattr("clip_base.images.inputs.load_image", None)
    with pytest.raises(
        InputError, match=r"^image large\.png has 1001 × 1000 = 1\.0 million pixels, more than"
    ):
        session.image(str(file))
    monkeypatch.setenv("REGIONCLIP_MAX_MEGAPIXELS", "0.5")
    with pytest.raises(InputError, match=r"^image large\.png has 1001 × 1000 .* the 0.5 million"):
        session.image(str(file))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "of no known format"),
        (b"just words", "of no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "of no known format"),
        (b"P5 99999 99999 255\n", "million pixels"),
        (None, "does not decode"),
    ],
)
def test_a_file_that_is_no_image_is_refused_without_telling_its_folder(
    session: DemoSession, content: bytes | None, told: str, image: str, tmp_path: Path
) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(Path(image).read_bytes()[:700] if content is None else content)
    with pytest.raises(InputError, match=told) as refused:
        session.query(str(file), "cup", *ALL)
    assert str(refused.value).startswith("image cat.png ")
    assert str(tmp_path) not in str(refused.value)


def test_an_image_that_has_gone_is_asked_for_again(session: DemoSession, image: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^gone\.jpg has been deleted; drop it again"):
        session.query(str(tmp_path / "gone.jpg"), "cup", *ALL)
    with pytest.raises(InputError, match="drop an image"):
        session.query("", "cup", *ALL)


def found_three() -> Detections:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 40, 40]], dtype=torch.float32)
    return Detections(boxes, torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0, 0, 1]), ("a", "b"), (50, 50))


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        (ALL, [0, 1, 2]),
        ((0.5, 1.0, 100), [0, 1]),
        ((0.0, 0.5, 100), [0, 2]),  # 1 overlaps 0 by 9/11
        ((0.0, 1.0, 1), [0]),
        ((0.95, 1.0, 100), []),
    ],
)
def test_thresholds_leave_the_best(
    session: DemoSession, image: str, limits: tuple[float, float, int], rows: list[int]
) -> None:
    answer = Answer(Query(image, ("a", "b"), *limits), session.image(image), found_three())
    assert answer.rows == rows
    assert len(answer.shown) == len(answer.table()) == len(rows)


def test_a_row_of_the_table_has_left_top_width_and_height(session: DemoSession, image: str) -> None:
    answer = Answer(Query(image, ("a", "b"), *ALL), session.image(image), found_three())
    assert answer.table()[1:] == [[2, "a", "0.80", 1, 0, 10, 10], [3, "b", "0.30", 0, 0, 40, 40]]


def test_the_page_finds_what_the_predictor_finds(
    session: DemoSession, image: str, detector_file: Path
) -> None:
    answer = ask(session, image)
    alone = regionclip.load(detector_file, vocabulary="cup, star", precision="fp32").detect(image)
    expected = alone.to_coco(1, [1, 2])
    assert [{key: entry[key] for key in expected[0]} for entry in answer.results()] == expected
    assert {entry["file_name"] for entry in answer.results()} == {Path(image).name}
    assert {entry["category_name"] for entry in answer.results()} <= {"cup", "star"}
    assert len(answer.table()) == len(expected)
    assert answer.summary() == f"{len(expected)} of {len(alone)} boxes in 64 × 64 pixels."


def test_a_moved_threshold_and_a_known_vocabulary_compute_nothing_anew(
    session: DemoSession, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ask(session, image)
    for method in ("detect_batch", "set_vocabulary"):
        monkeypatch.setattr(session.models[0].predictor, method, None)
    after = ask(session, image, limits=(0.0, 1.0, 2))
    assert after.rows == before.rows[:2]
    assert len(after.results()) == 2


def test_names_are_embedded_once_for_all_images(session: DemoSession, world: Path) -> None:
    first, second = map(str, sorted((world / "images" / "val").iterdir())[:2])
    embedded = []
    detector = session.models[0].predictor.detector
    encode = detector.clip.encode_text
    detector.clip.encode_text = lambda tokens: embedded.append(1) or encode(tokens)  # type: ignore
    ask(session, first)
    once = len(embedded)
    assert once
    ask(session, second)
    assert len(embedded) == once


def test_when_nothing_is_shown_the_page_says_what_comes_nearest(session: DemoSession, image: str) -> None:
    answer = ask(session, image, limits=(1.0, 1.0, 100))
    assert answer.rows == answer.results() == answer.table() == []
    assert "No box reaches 1.00; the best is" in answer.summary()
    assert answer.drawn().size == (640, 640)
    assert answer.box_at(5, 5) is None


def test_a_clicked_box_has_the_nearest_names_of_its_region(
    session: DemoSession, image: str, detector_file: Path
) -> None:
    answer = ask(session, image)
    x1, y1, x2, y2 = (answer.shown.boxes[2] * 10).tolist()  # 64 pixels are shown as 640
    box = answer.box_at((x1 + x2) / 2, (y1 + y2) / 2)
    assert box is not None
    line, near = session.nearest(answer.query, 0, box, "larger")
    assert line.startswith(f"**Box {box + 1}: {answer.shown.captions[box]}.**")
    alone = regionclip.load(detector_file, vocabulary=WORDS, precision="fp32")
    features = alone.region_features(image, answer.shown.boxes[box : box + 1])
    ((*expected,),) = alone.classify_embeddings(features, NEAREST)
    assert list(near) == [name for name, _ in expected]
    assert list(near.values()) == pytest.approx([value for _, value in expected], abs=1e-5)
    assert set(session.nearest(answer.query, 0, box, TYPED)[1]) == {"cup", "star"}


def test_the_clicked_box_keeps_its_color_and_the_others_turn_gray(session: DemoSession, image: str) -> None:
    answer = ask(session, image, limits=(0.0, 1.0, 5))
    plain, marked = np.asarray(answer.drawn()), np.asarray(answer.drawn(0))
    assert (marked == 150).all(-1).sum() > (plain == 150).all(-1).sum() + 100
    for unknown in (None, -1, 10_000):
        assert np.array_equal(np.asarray(answer.drawn(unknown)), plain)


def test_two_who_look_for_different_things_do_not_disturb_each_other(
    new_session: Callable[[], DemoSession], world: Path
) -> None:
    files = [str(file) for file in sorted((world / "images" / "val").iterdir())[:2]]
    wishes = [(file, names) for file in files for names in ("cup", "star, tree", "sun, cup, heart")]

    def answered(session: DemoSession, file: str, names: str) -> tuple[object, object]:
        answer = ask(session, file, names)
        return answer.results(), session.nearest(answer.query, 0, 0, "larger")[1]

    alone = new_session()
    expected = [answered(alone, *wish) for wish in wishes]
    shared = new_session()
    together = threading.Barrier(4)

    def worker(start: int) -> list[tuple[object, object]]:
        together.wait()
        turned = wishes[start:] + wishes[:start]
        answers = dict(zip(turned, (answered(shared, *wish) for wish in turned), strict=True))
        return [answers[wish] for wish in wishes]

    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(worker, range(4)):
            assert answers == expected


def test_what_several_ask_at_once_is_computed_once_and_the_oldest_goes() -> None:
    computed: list[int] = []
    together = threading.Barrier(8)

    def double(number: int) -> int:
        computed.append(number)
        time.sleep(0.05)  # for the others to ask as well
        return number * 2

    known = cached(2, double, threading.RLock())

    def worker(number: int) -> int:
        together.wait()
        return known(number)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(worker, [1] * 8)) == [2] * 8
    assert computed == [1]
    assert [known(number) for number in (2, 3, 3, 2, 1)] == [4, 6, 6, 4, 2]
    assert computed == [1, 2, 3, 1]


def test_a_known_answer_does_not_wait_for_one_that_is_being_computed() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def compute(number: int) -> int:
        if number == 2:
            begun.set()
            assert go_on.wait(60)
        return number

    known = cached(2, compute, threading.RLock())
    known(1)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(known, 2)
        assert begun.wait(60)
        assert pool.submit(known, 1).result(60) == 1
        assert not slow.done()
        go_on.set()
        assert slow.result(60) == 2


def test_a_chosen_box_is_looked_for_in_another_image(
    session: DemoSession, image: str, world: Path, detector_file: Path
) -> None:
    answer = ask(session, image)
    name = session.region_name(answer.query, 0, 1)
    other = str(sorted((world / "images" / "val").iterdir())[1])
    found = ask(session, other, name)
    predictor = regionclip.load(detector_file, precision="fp32")
    corners = tuple(answer.shown.boxes[1].tolist())
    assert len(corners) == 4
    predictor.set_vocabulary(vocabulary_of(predictor, [RegionQuery(name, Path(image), corners)]))
    torch.testing.assert_close(found.found.scores, predictor.detect(other).scores)
    assert found.found.names == (name,)
    with pytest.raises(InputError, match="cannot be looked for together"):
        ask(session, other, f"{name}, cup")
    with pytest.raises(InputError, match="no longer known"):
        ask(session, other, "like cup in a #99")
