"""Folders of images mean the same to every job: links followed, system files left out, the rest counted.

Covered: the source `folder`, class folders of zero-shot classification and the linear probe, images of
`pretrain` without captions, and folders and patterns that `detect`, `features` and a Predictor are given.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.data.sources import SOURCES
from clip_base.evaluation.datasets import folder_images
from clip_base.images.folders import list_files, list_images
from clip_base.images.inputs import image_files
from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError, InputNote
from regionclip.training.pretrain import image_samples


def sourced(folder: Path) -> list[Path]:
    found = build_plugin(SOURCES, {"name": "folder", "folder": str(folder)}).pairs()
    return list(found.images)


def below(pattern: str) -> Callable[[Path], list[Path]]:
    return lambda folder: image_files([f"{folder}/{pattern}"])


READERS: dict[str, Callable[[Path], list[Path]]] = {
    "folder source": sourced,
    "class folders": lambda folder: [picture.path for picture in folder_images(str(folder))[1]],
    "pretrain": lambda folder: [Path(sample.path) for sample in image_samples(str(folder))],
    "pattern": below("**"),
    "pattern of files": below("**/*.*"),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, one of them a link to elsewhere, among what systems leave."""
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (
        root / "cat",
        elsewhere,
        root / ".ipynb_checkpoints",
        root / "__MACOSX",
        root / "cat" / "@eaDir",
    ):
        folder.mkdir(parents=True)
        (folder / "x.jpg").touch()
    for name in (
        "b.JPG",
        "c.jfif",
        "d.avif",
        "e.jpe",
        "f.heic",
        "g.HEIC",
        "h",
        "._x.jpg",
        "x.txt",
        "Thumbs.db",
    ):
        (root / "cat" / name).touch()
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "linked.png").symlink_to(elsewhere / "x.jpg")
    return root


WANTED = ["cat/b.JPG", "cat/c.jfif", "cat/d.avif", "cat/e.jpe", "cat/linked.png", "cat/x.jpg", "dog/x.jpg"]


@pytest.mark.parametrize("reader", READERS)
def test_links_are_followed_and_what_systems_leave_is_not_read(photos: Path, reader: str) -> None:
    with pytest.warns(InputNote) as told:
        found = READERS[reader](photos)
    assert [str(path.relative_to(photos)) for path in found] == WANTED
    (message,) = {str(warning.message) for warning in told}
    assert "7 files are read" in message
    for count in ("4 hidden or of the system", "2 with the ending .heic", "1 without an ending"):
        assert count in message


def test_no_folder_of_a_system_becomes_a_class(photos: Path) -> None:
    (photos / "stray.jpg").touch()
    with pytest.warns(InputNote, match="1 in no subfolder, which belong to no class"):
        names, pictures = folder_images(str(photos))
    assert names == ["cat", "dog"]
    assert [picture.label for picture in pictures] == [0] * 6 + [1]


def test_a_folder_itself_stands_for_what_lies_directly_in_it(photos: Path) -> None:
    with pytest.warns(InputNote, match="6 files are read"):
        found = image_files([str(photos / "cat")])
    assert [f"cat/{path.name}" for path in found] == WANTED[:6]
    assert image_files([f"{photos}/*/x.jp*"]) == [photos / "cat/x.jpg", photos / "dog/x.jpg"]


@pytest.mark.parametrize("reader", READERS)
def test_a_cycle_of_links_is_refused_by_name(photos: Path, reader: str) -> None:
    (photos / "cat" / "up").symlink_to(photos)
    (photos / "cat" / "self").symlink_to(photos / "cat" / "self")
    with pytest.raises(
        InputError, match=rf"link {photos}/cat/up leads to a folder that it is in .*remove the link"
    ):
        READERS[reader](photos)


@pytest.mark.parametrize("reader", READERS)
def test_names_that_are_no_utf_8_are_left_out_and_counted(tmp_path: Path, reader: str) -> None:
    (tmp_path / "cat").mkdir()
    for name in (b"a.jpg", b"caf\xe9.jpg"):
        os.close(os.open(os.path.join(os.fsencode(tmp_path / "cat"), name), os.O_CREAT))
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    with pytest.warns(InputNote, match="1 with names that are not UTF-8") as told:
        assert READERS[reader](tmp_path) == [tmp_path / "cat" / "a.jpg"]
    assert "1 pipes or devices" in str(told[0].message)
    odd = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "cat"), b"caf\xe9.jpg")))
    with pytest.raises(InputError, match=r"caf\\udce9.jpg' in .* has a name that is not UTF-8; rename it"):
        image_files([str(odd)])


@pytest.mark.parametrize("reader", ["folder source", "pretrain"])
def test_a_folder_without_images_tells_what_it_has(tmp_path: Path, reader: str) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(InputError, match=r"holds no images \(.*there are 1 with the ending .heic"):
        READERS[reader](tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        READERS[reader](tmp_path / "a.heic")


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    assert list_files(tmp_path).files == [tmp_path / "a.jpg"]


def test_a_clean_folder_is_read_without_a_word(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.txt", "a.json"):
        (tmp_path / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_images(tmp_path) == [tmp_path / "a.jpg"]
