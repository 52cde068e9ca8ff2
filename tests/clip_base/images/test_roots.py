"""Images are found by name in a folder or in tars, and a path into a tar is read like any other."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from clip_base.images.inputs import image_files, read_image
from clip_base.images.roots import ImageRoot
from clip_base.runtime.errors import InputError
from clip_base.storage.paths import name_in
from clip_base.storage.spool import SpooledMember, TarSpool
from clip_base.storage.tars import addresses, member_at, names_tars


def jpeg(level: int) -> bytes:
    return cv2.imencode(".jpg", np.full((8, 12, 3), level, np.uint8))[1].tobytes()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(3):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            for name, data in ((f"a/{number}.jpg", jpeg(60 * number)), (f"a/{number}.txt", b"text")):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return tmp_path


def test_names_are_found_in_tars(tars: Path) -> None:
    root = ImageRoot(f"{tars}/s-{{0..2}}.tar")
    assert [tar.name for tar in root.tars] == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert root.path("a/2.jpg") == tars / "s-2.tar" / "a/2.jpg"
    assert (root.has("a/1.jpg"), root.has("1.jpg"), root.has("a/9.jpg")) == (True, False, False)
    pixels, size = read_image(root.path("a/1.jpg"))
    assert size == (8, 12)
    assert abs(int(pixels.mean()) - 60) <= 1
    assert name_in(tars, root.path("a/1.jpg")) == "s-1.tar/a/1.jpg"
    assert name_in(Path("elsewhere"), root.path("a/1.jpg")) == "a/1.jpg"
    with pytest.raises(InputError, match=r"has no file a/9\.jpg"):
        read_image(root.path("a/9.jpg"))


def test_a_tar_stands_for_its_images(tars: Path) -> None:
    wanted = [tars / f"s-{number}.tar" / f"a/{number}.jpg" for number in range(3)]
    assert image_files([f"{tars}/s-*.tar"]) == wanted
    assert image_files([str(tars)]) == wanted  # a folder of tars
    assert image_files([str(wanted[1])]) == wanted[1:2]


def test_a_folder_is_one_of_tars_when_it_holds_no_images(tars: Path) -> None:
    assert names_tars(str(tars))
    assert addresses(str(tars)) == [str(tars / f"s-{number}.tar") for number in range(3)]
    (tars / "x.jpg").write_bytes(jpeg(0))
    assert not names_tars(str(tars))
    with pytest.raises(InputError, match="matches no tar"):
        addresses(f"{tars}/t-*.tar")


def test_a_tar_that_changed_is_read_anew(tars: Path) -> None:
    path = tars / "s-0.tar"
    assert member_at(path / "a/0.jpg") is not None
    path.write_bytes((tars / "s-1.tar").read_bytes() + bytes(512))
    with pytest.raises(InputError, match="has no file"):
        member_at(path / "a/0.jpg")


def test_a_spool_holds_few_copies_and_makes_them_again(tars: Path) -> None:
    wanted = {}
    for number in range(3):
        tar = tars / f"s-{number}.tar"
        member = member_at(tar / f"a/{number}.jpg")
        assert member is not None
        wanted[number] = (member, jpeg(60 * number))
        (tars / f"s-{number}.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    spool = TarSpool(tars / "copies", keep=2)
    for number in (0, 1, 2, 0):
        member, data = wanted[number]
        packed = SpooledMember(spool, tars / f"s-{number}.tar.gz", member.offset, member.size)
        assert packed.read_bytes() == data
        assert len(list((tars / "copies").glob("*.tar"))) <= 2
    cut = tars / "cut.tar.gz"
    cut.write_bytes((tars / "s-0.tar.gz").read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be unpacked"):
        spool.path(cut)
