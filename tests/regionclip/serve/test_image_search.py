"""The tab that searches an index: what is found and refused, and that no other file is read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_base.jobs.cli import main
from clip_base.runtime.errors import InputError
from clip_base.search.find import SearchConfig, query_of
from clip_base.search.index import Index
from regionclip.serve import image_search
from regionclip.serve.image_search import SIDE, ImageSearch, as_html


@pytest.fixture(scope="module")
def index(world: Path, clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "my.index"
    images = str(world / "images" / "val")
    assert main(["index", images, f"weights={clip_file}", "precision=fp32", f"out={out}"]) == 0
    return out


def test_images_are_those_of_the_search_on_the_command_line(index: Path) -> None:
    found = ImageSearch(str(index), torch.device("cpu"))("a red cup", 3)
    config = SearchConfig(query=[str(index), "a red cup"], precision="fp32")
    loaded = Index.load(index)
    hits = loaded.search(query_of(config, loaded), 3)
    assert [(one.score, one.name) for one in found] == [(hit.score, Path(hit.key).name) for hit in hits]
    assert all(max(one.image.size) <= SIDE for one in found)


def test_what_is_typed_is_never_a_file(index: Path, world: Path) -> None:
    search = ImageSearch(str(index), torch.device("cpu"))
    file = str(min((world / "images" / "val").iterdir()))
    assert [one.score for one in search(file, 4)] != [one.score for one in search("a cup", 4)]
    assert len(search("absent.jpg", 2)) == 2
    for text in ("  ", "x" * 400):
        with pytest.raises(InputError, match="type what to find"):
            search(text, 3)


def test_an_index_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no index"):
        ImageSearch(str(tmp_path), torch.device("cpu"))


def indexed(path: Path, clip_file: Path, out: Path) -> ImageSearch:
    assert main(["index", str(path), f"weights={clip_file}", "precision=fp32", f"out={out}"]) == 0
    return ImageSearch(str(out), torch.device("cpu"))


def write_sideways(file: Path) -> None:
    """Writes an image that is 900 wide and 600 high, and to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_mandelbrot((900, 600), (-2, -1, 1, 1), 50).convert("RGB").save(file, exif=exif)


@pytest.mark.parametrize("tar", [False, True])
def test_a_found_image_leads_to_itself_at_its_own_size_and_upright(
    tar: bool, clip_file: Path, tmp_path: Path
) -> None:
    write_sideways(tmp_path / "<b>.jpg")
    if tar:
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(tmp_path / "<b>.jpg", "<b>.jpg")
    place = tmp_path / "set.tar" if tar else tmp_path / "<b>.jpg"
    search = indexed(place, clip_file, tmp_path / "my.index")
    found = search("a cup", 3)
    assert [one.image.size for one in found] == [(320, 480)]
    with Image.open(io.BytesIO(search.full(found[0].link))) as full:
        assert full.size == (600, 900)
        assert not full.getexif()
    page = as_html(found)
    assert f'<a href="api/found/{found[0].link}" target="_blank"' in page
    assert "<b>" not in page


def test_only_images_that_were_found_are_shown_and_the_oldest_links_are_forgotten(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_search, "MAX_LINKS", 2)
    search = ImageSearch(str(index), torch.device("cpu"))
    first, second, third = search("a cup", 3)
    assert search.full(second.link) != search.full(third.link)
    for link in (first.link, "", "../../etc/passwd"):
        with pytest.raises(KeyError):
            search.full(link)


def test_an_image_that_is_not_found_or_has_gone_is_a_404(clip_file: Path, tmp_path: Path) -> None:
    fastapi = pytest.importorskip("fastapi", reason="the page needs Gradio: pip install 'regionclip[serve]'")
    from starlette.testclient import TestClient

    from regionclip.serve.api import add_found_images

    write_sideways(tmp_path / "one.jpg")
    search = indexed(tmp_path / "one.jpg", clip_file, tmp_path / "my.index")
    app = fastapi.FastAPI()
    add_found_images(app, search)
    client = TestClient(app)
    link = search("a cup", 1)[0].link
    answered = client.get(f"/api/found/{link}")
    assert (answered.status_code, answered.headers["content-type"]) == (200, "image/jpeg")
    assert client.get("/api/found/other").status_code == 404
    (tmp_path / "one.jpg").unlink()
    answered = client.get(f"/api/found/{link}")
    assert (answered.status_code, str(tmp_path) in answered.text) == (404, False)
