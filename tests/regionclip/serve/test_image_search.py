"""The tab that searches an index: what is found and refused, and that no other file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_base.jobs.cli import main
from clip_base.runtime.errors import InputError
from clip_base.search.find import SearchConfig, query_of
from clip_base.search.index import Index
from regionclip.serve.image_search import SIDE, ImageSearch


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
    assert [text for _, text in found] == [f"{hit.score:.3f}  {Path(hit.key).name}" for hit in hits]
    assert all(max(image.size) <= SIDE for image, _ in found)


def test_what_is_typed_is_never_a_file(index: Path, world: Path) -> None:
    search = ImageSearch(str(index), torch.device("cpu"))
    file = str(min((world / "images" / "val").iterdir()))
    assert [text for _, text in search(file, 4)] != [text for _, text in search("a cup", 4)]
    assert len(search("absent.jpg", 2)) == 2
    for text in ("  ", "x" * 400):
        with pytest.raises(InputError, match="type what to find"):
            search(text, 3)


def test_an_index_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no index"):
        ImageSearch(str(tmp_path), torch.device("cpu"))
