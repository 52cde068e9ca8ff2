"""The one place where image files are opened: only known formats, and no more pixels than are allowed.

What a header declares is checked before a decoder allocates it: 35 bytes of GIF can declare a billion pixels,
and a chunk of 20 bytes in a PNG four gigabytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image, UnidentifiedImageError

from clip_base.runtime.errors import InputError
from clip_base.storage.kinds import kind_of
from clip_base.storage.limits import MEGAPIXELS
from clip_base.storage.tars import member_at

# What people have. Others (PostScript reaches Ghostscript, QOI, PSD, …) are not given to Pillow.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF")
PNG = b"\x89PNG\r\n\x1a\n"
_NOTES = frozenset((b"eXIf", b"tEXt", b"zTXt", b"iTXt"))  # chunks that may say how a PNG is to be turned


class Stored(Protocol):
    """What holds an encoded image: a Path, or a part of a larger file. As text, it names itself."""

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """An encoded image in memory.

    Attributes:
        data: the encoded image.
        name: where it stands.
    """

    data: bytes
    name: str

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""
        return self.data

    def __str__(self) -> str:
        return self.name


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def read_image_file(path: Path) -> bytes:
    """Returns a file's content; `TAR/NAME` is a file in an uncompressed tar.

    Raises:
        InputError: it cannot be read, or is not a regular file: a named pipe would block.
    """
    try:
        with _opened(path) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from None


def _opened(path: Path | Stored) -> BinaryIO:
    if not isinstance(path, Path):
        return io.BytesIO(path.read_bytes())
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"image {path} cannot be read: it is a folder, a pipe or a device")
        return path.open("rb")
    except NotADirectoryError:
        member = member_at(path)
        if member is None:
            raise
        return io.BytesIO(member.read_bytes())
    except ValueError as error:  # NUL, or half a surrogate pair
        if isinstance(error, InputError):
            raise
        raise InputError(f"image {str(path)!r} cannot be read: no file can have that name") from None


def open_image(file: BinaryIO, name: object) -> Image.Image:
    """Opens an image without decoding its pixels.

    Args:
        file: at its beginning.
        name: as text, is for the error message.

    Raises:
        InputError: it is of no known format, damaged, or has too many pixels.
    """
    if file.read(len(PNG)) == PNG:
        chunks_of(file, name)
    file.seek(0)
    allowed = MEGAPIXELS.value * 1e6
    if Image.MAX_IMAGE_PIXELS is not None and allowed > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow refuses
        Image.MAX_IMAGE_PIXELS = round(allowed / 2) + 1
    try:
        image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError:
        raise InputError(
            f"image {name} declares far more than the {MEGAPIXELS.value:g} million pixels that are allowed"
        ) from None
    except Exception as error:  # decoders raise what they like
        raise undecodable(error, name) from None
    require_size(image.size, name)
    return image


@contextlib.contextmanager
def open_image_file(path: str | Path | Stored) -> Iterator[Image.Image]:
    """Opens an image file as `open_image` does, and closes it."""
    path = Path(path) if isinstance(path, str) else path
    try:
        file = _opened(path)
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from None
    with file:
        yield open_image(file, path)


def undecodable(error: Exception, name: object) -> InputError:
    """Returns the error of an image that a decoder has raised `error` for."""
    if isinstance(error, UnidentifiedImageError):  # which names an object in memory
        kind = kind_of(name) if isinstance(name, str | Path) else ""
        reason = f"it is of no known format{f' ({kind})' if kind else ''}"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"image {name} does not decode: {reason}")


def require_size(size: tuple[int, int] | None, name: object) -> None:
    """Raises an InputError for more pixels, of (width, height), than are allowed; None is not known yet."""
    if size is not None and size[0] * size[1] > MEGAPIXELS.value * 1e6:
        raise InputError(
            f"image {name} has {size[0]} × {size[1]} = {size[0] * size[1] / 1e6:,.0f} million pixels, more "
            f"than the {MEGAPIXELS.value:g} million that are allowed; reduce it, or raise "
            f"{MEGAPIXELS.option}"
        )


def chunks_of(file: BinaryIO, name: object) -> set[bytes]:
    """Returns the kinds of chunks in a PNG (PNG specification, 5.3).

    Args:
        file: behind the signature.
        name: as text, is for the error message.

    Raises:
        InputError: a chunk is longer than what is left of the file: a decoder would allocate all of it.
    """
    place = file.tell()
    end = file.seek(0, os.SEEK_END)
    kinds: set[bytes] = set()
    while place + 8 <= end and b"IEND" not in kinds:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += 12 + length
        if place > end:
            raise InputError(
                f"image {name} does not decode: it is truncated (a chunk declares {length:,} bytes)"
            )
        kinds.add(kind)
    return kinds


def may_be_turned(path: str | Path | Stored) -> bool:
    """Whether a file may state an orientation; a PNG that has any note must be decoded to know."""
    with _opened(Path(path) if isinstance(path, str) else path) as file:
        if file.read(len(PNG)) != PNG:
            return True
        return not _NOTES.isdisjoint(chunks_of(file, path))


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height) from the header of a PNG, a BMP or a WebP; None for anything else."""
    if data[:8] == PNG and len(data) >= 24:
        return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    if data[:2] == b"BM" and len(data) >= 26:
        width, height = struct.unpack("<ii", data[18:26])
        return abs(width), abs(height)
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
