"""The page of `regionclip serve` in a real browser: two tiny checkpoints side by side."""

from __future__ import annotations

import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'regionclip[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")

from clip_base.jobs.cli import main  # noqa: E402
from clip_base.jobs.config import resolve  # noqa: E402
from clip_base.storage.files import read_json  # noqa: E402
from regionclip.checkpoints.load import save_detector  # noqa: E402
from regionclip.models.detector import Detector  # noqa: E402
from regionclip.serve import server  # noqa: E402
from regionclip.serve.job import ServeConfig, make_server  # noqa: E402

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium found: install it, or name it in CHROMIUM"),
]
SEVERAL = re.compile(r"^\s*([4-9]|\d\d) of ")  # boxes, more than three
PATIENCE = 180_000  # milliseconds, for a machine that is busy
NAMES = "cup, star, sun"


@dataclass(frozen=True)
class Served:
    """A page being served: its address, its folder, and the weights behind it."""

    url: str
    folder: Path
    weights: Path


@pytest.fixture(scope="module")
def served(
    detector_file: Path,
    clip_file: Path,
    world: Path,
    make_detector: Callable[..., Detector],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """The page over two detectors that differ and an index, in a thread of this process."""
    index = tmp_path_factory.mktemp("index") / "my.index"
    images = str(world / "images" / "val")
    assert main(["index", images, f"weights={clip_file}", "precision=fp32", f"out={index}"]) == 0
    other, model = tmp_path_factory.mktemp("other") / "model.safetensors", make_detector()
    assert model.background is not None
    model.background.data.fill_(0.02)
    save_detector(model, other, ["cup"])
    options = [
        f"weights={detector_file}",
        f"compare={other}",
        "precision=fp32",
        "max_upload_mb=0.5",
        "lists=[coco]",
        f"vocabulary={NAMES}",
        f"index={index}",
        "score_threshold=0",
    ]
    config = resolve(ServeConfig, None, options)
    listener, url = server.listen(config.host, 0)
    with listener, server.private_folder() as folder:
        running = make_server(config, folder)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        yield Served(url, folder, detector_file)
        running.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Where the open page sent requests, by URL."""
    return []


@pytest.fixture(scope="module")
def opened(served: Served, browser: playwright.Browser, asked: list[str]) -> playwright.Page:
    """One tab for all tests, so that the page is loaded once; each test looks for what it needs."""
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.set_default_timeout(PATIENCE)
    playwright.expect.set_options(timeout=PATIENCE)
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(served.url)
    return tab


@pytest.fixture
def tab(opened: playwright.Page) -> playwright.Page:
    """The tab, with boxes of the first example in it, whatever the test before did."""
    with opened.expect_response("**/run/predict"):  # else the example comes later than what a test drops
        opened.locator("#examples button").first.click()
    look_for(opened, NAMES)
    playwright.expect(opened.locator("#table-0")).to_contain_text(re.compile("cup|star|sun"))
    playwright.expect(summary(opened)).to_contain_text("384 × 384")  # of the example, and not of the last one
    return opened


def look_for(tab: playwright.Page, names: str) -> None:
    """Types names and waits for the answer: boxes, or what is wrong."""
    tab.locator("#names textarea").fill(names)
    tab.locator("#names textarea").press("Enter")


def summary(tab: playwright.Page, which: int = 0) -> playwright.Locator:
    return tab.locator(f"#summary-{which}")


def drop(tab: playwright.Page, file: Path) -> None:
    """Uploads a file in the place of the image that is there."""
    tab.get_by_label("Remove Image").click()
    tab.locator("#image input[type=file]").set_input_files(file)


def downloaded(tab: playwright.Page, which: int, target: Path) -> list[dict[str, object]]:
    with tab.expect_download() as coming:
        tab.locator(f"#download-{which}").click()
    coming.value.save_as(target)
    found: list[dict[str, object]] = read_json(target)
    return found


def test_the_first_example_is_there_with_its_boxes(tab: playwright.Page) -> None:
    playwright.expect(tab.locator("#boxes-0 img")).to_be_visible()
    playwright.expect(summary(tab)).to_contain_text("boxes in 384 × 384 pixels")
    assert tab.locator("#examples button img").count() == 6
    assert tab.locator("#names textarea").input_value() == NAMES


def test_an_uploaded_picture_and_typed_names_give_boxes(
    tab: playwright.Page, world: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "mine.png"
    Image.open(sorted((world / "images" / "val").iterdir())[0]).resize((96, 48)).save(photo)
    drop(tab, photo)
    playwright.expect(summary(tab)).to_contain_text("boxes in 96 × 48 pixels")
    look_for(tab, "blue moon")
    playwright.expect(tab.locator("#table-0")).to_contain_text("blue moon")
    entries = downloaded(tab, 0, tmp_path / "found.json")
    assert entries
    assert {(entry["category_name"], entry["file_name"]) for entry in entries} == {("blue moon", "mine.png")}
    x, y, w, h = entries[0]["bbox"]  # type: ignore[misc]
    assert x + w <= 96.01
    assert y + h <= 48.01
    assert summary(tab).inner_text().startswith(f"{len(entries)} of ")


def test_a_moved_threshold_leaves_fewer_boxes(tab: playwright.Page) -> None:
    playwright.expect(summary(tab)).to_contain_text(SEVERAL)
    before = summary(tab).inner_text()
    tab.locator("#most input[type=number]").fill("3")
    tab.locator("#most input[type=number]").press("Enter")
    playwright.expect(summary(tab)).to_contain_text(re.compile(r"^\s*3 of "))
    tab.locator("#most input[type=number]").fill("50")
    tab.locator("#most input[type=number]").press("Enter")
    playwright.expect(summary(tab)).to_have_text(before)


def test_a_click_on_a_box_tells_its_nearest_names(tab: playwright.Page) -> None:
    playwright.expect(summary(tab)).to_contain_text(SEVERAL)
    x, y, w, h = (float(tab.get_by_test_id(f"cell-0-{column}").first.inner_text()) for column in range(3, 7))
    box = tab.locator("#boxes-0 img").bounding_box()
    assert box is not None
    at = {"x": (x + w / 2) * box["width"] / 384, "y": (y + h / 2) * box["height"] / 384}
    tab.locator("#boxes-0 img").click(position=at)
    playwright.expect(tab.locator("#caption-0")).to_contain_text(re.compile(r"Box \d+: .* among 3 names"))
    playwright.expect(tab.locator("#nearest-0")).to_contain_text(re.compile(r"(cup|star|sun)[\s\S]*%"))
    tab.locator("#among").get_by_label("coco").check()
    playwright.expect(tab.locator("#caption-0")).to_contain_text("among 80 names")
    tab.locator("#among").get_by_label("the names above").check()
    playwright.expect(tab.locator("#caption-0")).to_contain_text("among 3 names")


def test_a_click_on_a_line_of_the_table_tells_the_same(tab: playwright.Page) -> None:
    playwright.expect(summary(tab)).to_contain_text(SEVERAL)
    tab.locator("#table-1 [data-testid^=cell-1-]").nth(1).click()
    playwright.expect(tab.locator("#caption-1")).to_contain_text("Box 2: ")
    playwright.expect(tab.locator("#nearest-1")).to_be_visible()


def test_two_checkpoints_stand_side_by_side_with_results_of_their_own(
    tab: playwright.Page, tmp_path: Path
) -> None:
    playwright.expect(summary(tab, 1)).to_contain_text("boxes in 384 × 384 pixels")
    first, second = (tab.locator(f"#boxes-{which}").bounding_box() for which in (0, 1))
    assert first is not None
    assert second is not None
    assert first["x"] + first["width"] <= second["x"]
    one, other = (downloaded(tab, which, tmp_path / f"{which}.json") for which in (0, 1))
    assert one
    assert other
    assert one != other


@pytest.mark.parametrize(
    ("names", "told"),
    [(" ", "a vocabulary needs at least one name"), ("cup, cup", "'cup' occurs more")],
)
def test_useless_names_are_told(tab: playwright.Page, names: str, told: str) -> None:
    look_for(tab, names)
    playwright.expect(tab.get_by_role("alert")).to_contain_text(told)
    playwright.expect(tab.locator("#boxes-0 img")).to_have_count(0)


def test_a_file_that_is_no_picture_is_told(tab: playwright.Page, tmp_path: Path) -> None:
    words = tmp_path / "words.png"
    words.write_text("not a picture")
    drop(tab, words)
    playwright.expect(tab.get_by_role("alert")).to_contain_text("words.png does not decode")


def test_a_file_that_is_too_large_is_told(tab: playwright.Page, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    Image.new("RGB", (500, 500)).save(large)  # 0.75 MB
    drop(tab, large)
    playwright.expect(tab.get_by_text("exceed", exact=False).first).to_be_visible()


def test_a_second_tab_keeps_its_own_names(
    tab: playwright.Page, served: Served, browser: playwright.Browser
) -> None:
    other = browser.new_page(viewport={"width": 390, "height": 800})
    other.set_default_timeout(PATIENCE)
    other.goto(served.url)
    look_for(other, "tree")
    playwright.expect(other.locator("#table-0")).to_contain_text("tree")
    tab.locator("#most input[type=number]").fill("7")
    tab.locator("#most input[type=number]").press("Enter")
    playwright.expect(summary(tab)).to_contain_text(re.compile(r"^\s*7 of "))
    playwright.expect(tab.locator("#table-0")).to_contain_text(re.compile("cup|star|sun"))
    playwright.expect(tab.locator("#table-0")).not_to_contain_text("tree")
    wide = other.evaluate("document.documentElement.scrollWidth")
    other.close()
    assert wide <= 390  # on a phone nothing is cut off at the side


def test_a_found_image_leads_to_itself_at_its_own_size(
    served: Served, browser: playwright.Browser, world: Path
) -> None:
    other = browser.new_page()
    other.set_default_timeout(PATIENCE)
    other.goto(served.url)
    other.get_by_role("tab", name="Find images").click()
    other.locator("#find textarea, #find input").fill("a red cup")
    other.locator("#find textarea, #find input").press("Enter")
    thumbnail = other.locator("#found a").first
    thumbnail.wait_for()
    box = other.locator("#found").bounding_box()
    assert box is not None
    assert box["width"] > 1000  # of 1280: the page's whole width
    with other.expect_popup() as coming:
        thumbnail.click()
    coming.value.wait_for_load_state("load")
    width = coming.value.locator("img").evaluate("image => image.naturalWidth")
    with Image.open(min((world / "images" / "val").iterdir())) as image:
        assert width == image.width
    other.close()


def test_everything_comes_from_this_machine(tab: playwright.Page, asked: list[str]) -> None:
    # The tab has answered once, so that everything was asked for. The network is never idle: the page keeps a
    # connection on which the server sees that the tab is still there.
    tab.wait_for_load_state("load")
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


def answer(served: Served, path: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(served.url + path, headers=headers)) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_outside_the_page_is_readable(served: Served) -> None:
    assert answer(served, "/") == 200
    outside = ["/etc/passwd", str(served.weights), str(served.folder / ".." / "x"), str(Path(__file__))]
    codes = {path: answer(served, f"/gradio_api/file={path}") for path in outside}
    assert set(codes.values()) <= {403, 404}, codes
    assert answer(served, "/gradio_api/file=http://127.0.0.1:1/x") == 403
    assert answer(served, "/", Host="elsewhere.example") == 400


def test_the_browser_is_told_to_load_nothing_from_elsewhere(served: Served) -> None:
    with urllib.request.urlopen(served.url) as response:
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]


def test_a_request_cannot_make_the_page_read_another_file(
    served: Served, browser: playwright.Browser
) -> None:
    """The question that the page itself asks, with another file's path in it."""
    tab = browser.new_page()
    tab.set_default_timeout(PATIENCE)
    with tab.expect_request("**/queue/join**") as coming:
        tab.goto(served.url)
    body = coming.value.post_data_json
    for path in (str(served.weights), "/etc/hostname"):
        body["data"][1] = {"path": path, "meta": {"_type": "gradio.FileData"}}
        reply = tab.request.post(f"{served.url}/gradio_api/run/predict", data=body)
        assert reply.status == 403, reply.text()
    tab.close()
