"""Image files that ask for too much, or are what they are not called: one line, in no time and no memory.

Covered: `decode` (all jobs), `read_upright` (`detect`, `serve`, a Predictor), the EXIF orientation, folders.
"""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_base.images.decode import decode, read_bytes
from clip_base.images.headers import PNG
from clip_base.images.inputs import read_upright
from clip_base.images.orientation import orientation_of, upright_size
from clip_base.runtime.errors import InputError


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG + header + b"".join(chunks) + chunk(b"IEND", b"")


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    return buffer.getvalue()


ROWS = chunk(b"IDAT", zlib.compress(bytes(100)))
GIF = (
    b"GIF89a" + struct.pack("<HH", 32000, 32000) + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    + b"," + struct.pack("<HHHH", 0, 0, 32000, 32000) + b"\0\x02\x02\x4c\x01\0;"
)  # fmt: skip
BOMBS = {
    "a GIF of 35 bytes": (GIF, "million pixels"),
    "a PNG of 30,000 rows": (png(30000, 30000, ROWS), "million pixels"),
    "a PNG chunk of 4 GB": (png(8, 8, chunk(b"IDAT", b"", 0xF0000000)), "4,026,531,840 bytes"),
    "a chunk of notes of 4 GB": (png(8, 8, chunk(b"tEXt", b"", 0xF0000000), ROWS), "truncated"),
    "a BMP": (saved("BMP")[:18] + struct.pack("<ii", 40000, -40000) + saved("BMP")[26:], "million pixels"),
    "a PPM": (b"P6 99999 99999 255\n", "million pixels"),
}
FOREIGN = {
    "QOI": b"qoif" + struct.pack(">II", 2, 2) + b"\x03\0",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "TGA": saved("TGA"),
    "ICO": saved("ICO"),
    "PCX": saved("PCX"),
}
READERS: dict[str, Callable[[Path], object]] = {"decode": decode, "upright": read_upright}
MB = 1 << 20


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BOMBS)
def test_what_a_header_declares_is_not_allocated(name: str, reader: str, tmp_path: Path) -> None:
    data, told = BOMBS[name]
    file = tmp_path / "a.jpg"
    file.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=told) as caught:
            READERS[reader](file)
        assert orientation_of(file) == (1, False)
        assert tracemalloc.get_traced_memory()[1] < 20 * MB
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_reach_no_decoder(name: str, reader: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FOREIGN[name])
    with pytest.raises(InputError, match="does not decode: it is of no known format"):
        READERS[reader](tmp_path / "a.jpg")
    with pytest.raises(InputError, match="no known format"):
        upright_size(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_the_formats_that_people_have_decode(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(saved(kind))
    assert decode(tmp_path / "a").shape == (16, 16, 3)
    assert read_upright(tmp_path / "a")[1] == (16, 16)


def test_the_limit_of_pixels_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    Image.new("RGBA", (100, 50)).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        monkeypatch.setenv("REGIONCLIP_MAX_MEGAPIXELS", "0.004")
        with pytest.raises(InputError, match=r"100 × 50 .* raise --max-megapixels"):
            decode(tmp_path / name)
        monkeypatch.setenv("REGIONCLIP_MAX_MEGAPIXELS", "0.005")
        assert decode(tmp_path / name).shape == (50, 100, 3)
    monkeypatch.setenv("REGIONCLIP_MAX_MEGAPIXELS", "many")
    with pytest.raises(InputError, match="must be a positive number, found 'many'"):
        decode(tmp_path / "a.png")


def test_more_pixels_than_pillow_takes_are_decoded_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("P", (100, 50)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").shape == (50, 100, 3)


@pytest.mark.parametrize("cut", [40, 60, 200])
def test_a_png_that_is_cut_off_is_no_half_image(cut: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-cut])
    with pytest.raises(InputError, match="does not decode: it is truncated"):
        decode(tmp_path / "a.png")


def test_the_orientation_of_a_png_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", exif=exif)
    assert orientation_of(tmp_path / "a.png") == (6, False)
    assert upright_size(tmp_path / "a.png") == (20, 10)


@pytest.mark.parametrize("reader", [decode, read_upright, read_bytes, upright_size])
def test_a_pipe_is_not_waited_for(reader: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(InputError, match="it is a folder, a pipe or a device"):
            reader(tmp_path / name)
        assert orientation_of(tmp_path / name) == (1, False)


@pytest.mark.parametrize("name", ["a\0b.jpg", "a\ud800.jpg", "a" * 300 + ".jpg"])
@pytest.mark.parametrize("reader", [decode, read_upright])
def test_a_name_that_no_file_can_have_is_an_unreadable_image(
    name: str, reader: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="cannot be read") as caught:
        reader(tmp_path / name)
    str(caught.value).encode()
    assert orientation_of(tmp_path / name) == (1, False)
