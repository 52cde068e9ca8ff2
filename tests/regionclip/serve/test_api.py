"""The HTTP endpoint of `regionclip serve`: an image and names in, JSON out, with the page's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the endpoint needs Gradio: pip install 'regionclip[serve]'")

from starlette.testclient import TestClient

import regionclip
from clip_base.jobs.config import resolve
from regionclip.serve import server
from regionclip.serve.job import ServeConfig, make_server

DETECT = "/api/detect"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with server.private_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def client(detector_file: Path, folder: Path) -> Iterator[TestClient]:
    options = [f"weights={detector_file}", "precision=fp32", "lists=[]", "max_upload_mb=0.02"]
    app = make_server(resolve(ServeConfig, None, options), folder).config.app
    with TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def image(world: Path) -> Path:
    return min((world / "images" / "val").iterdir())


def test_the_answer_is_the_predictors_and_no_file_stays(
    client: TestClient, image: Path, detector_file: Path, folder: Path
) -> None:
    before = set(folder.rglob("*"))
    asked = {"names": "cup, star", "score": "0", "max_boxes": "5"}
    answered = client.post(DETECT, params=asked, content=image.read_bytes())
    assert answered.status_code == 200, answered.text
    assert set(folder.rglob("*")) == before
    found = regionclip.load(detector_file, ["cup", "star"], precision="fp32").detect(image).top(5)
    told = answered.json()
    assert (told["height"], told["width"]) == found.size
    assert [one["name"] for one in told["detections"]] == found.class_names
    assert [one["score"] for one in told["detections"]] == pytest.approx(found.scores.tolist(), abs=1e-4)
    for one, box in zip(told["detections"], found.boxes.tolist(), strict=True):
        assert one["box"] == pytest.approx(box, abs=0.01)


@pytest.mark.parametrize(
    ("params", "content", "status", "told"),
    [
        ({"names": "cup"}, b"no image", 400, "does not decode"),
        ({"names": " , "}, None, 400, "name"),
        ({}, None, 422, "names"),
        ({"names": "cup", "score": "2"}, None, 422, "score"),
        ({"names": "cup", "model": "1"}, None, 400, "there are 1 models"),
        ({"names": "cup"}, b"x" * 20_001, 413, "at most 20000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_told(
    client: TestClient,
    image: Path,
    folder: Path,
    params: dict[str, str],
    content: bytes | None,
    status: int,
    told: str,
) -> None:
    answered = client.post(DETECT, params=params, content=image.read_bytes() if content is None else content)
    assert (answered.status_code, told in answered.text) == (status, True), answered.text
    assert str(folder) not in answered.text


def test_another_sites_page_cannot_use_it(client: TestClient, image: Path) -> None:
    headers = {"origin": "http://example.com"}
    asked = client.post(DETECT, params={"names": "cup"}, content=image.read_bytes(), headers=headers)
    assert asked.status_code == 403


def test_its_description_names_what_it_takes_and_gives(client: TestClient) -> None:
    described = client.get("/api/openapi.json").json()
    assert list(described["paths"]) == [DETECT]
    post = described["paths"][DETECT]["post"]
    assert {one["name"] for one in post["parameters"]} == {"names", "score", "overlap", "max_boxes", "model"}
    assert "image/*" in post["requestBody"]["content"]
    assert set(described["components"]["schemas"]["Detection"]["properties"]) == {"name", "score", "box"}
