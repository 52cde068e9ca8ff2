"""Pictures as people have them, files or in memory, as pixels; large ones at a reduced size."""

from __future__ import annotations

import contextlib
import glob
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt
from PIL import Image
from torch import Tensor

from clip_base.data.images import Pixels
from clip_base.data.images import resize as shrink
from clip_base.errors import InputError
from clip_base.files import existing
from regionclip.datasets import load_image
from regionclip.pixels import pixels_of

Picture = str | Path | Image.Image | npt.NDArray[Any] | Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGE = 25_000_000  # pixels
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_WARNINGS = threading.Lock()  # what is to be warned of is one setting for all threads


def picture_files(places: Sequence[str], endings: Sequence[str] = PICTURES) -> list[Path]:
    """Returns the picture files that some places stand for, in the order given, each once.

    Args:
        places: files; folders, which stand for the files directly in them; patterns such as `photos/*.jpg` or
            `photos/**/*.jpg`, where `**` is any folders below.
        endings: of the files that folders and patterns stand for; a file that is named itself may end
            otherwise.

    Raises:
        InputError: a place does not exist, is a URL, or stands for no such file.
    """
    files: list[Path] = []
    for place_ in places:
        if "://" in place_:
            raise InputError(
                f"{place_} is a URL; pictures are read from files: download it and give its path"
            )
        path = Path(place_)
        if any(sign in place_ for sign in "*?[") and not path.exists():
            found = (Path(name) for name in glob.iglob(place_, recursive=True))
            inside = sorted(file for file in found if file.suffix.lower() in endings and file.is_file())
            if not inside:
                raise InputError(f"pattern {place_!r} fits no file ({', '.join(endings)})")
            files += inside
        elif existing(path, "picture").is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
            if not inside:
                raise InputError(
                    f"folder {path} holds no pictures ({', '.join(endings)}); those in folders below are "
                    f"'{path}/**'"
                )
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def in_turn(read: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yields read(item) of each item, in order; threads read ahead, twice as many items as there are threads.

    Decoding and resizing run beside what is done with the results, as they hold no lock of Python's.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_picture(picture: Picture) -> tuple[Pixels, tuple[int, int]]:
    """Returns a picture as [H, W, 3] uint8 RGB, and its (height, width), which is larger when it was reduced.

    Args:
        picture: a file's path, turned as its EXIF note says; or a picture in memory, see `pixels_of`.

    Raises:
        InputError: a file is missing or does not decode; an array or a tensor of another form.
    """
    if isinstance(picture, str | Path):
        return read_upright(Path(picture))
    pixels = pixels_of(picture)
    return pixels, (pixels.shape[0], pixels.shape[1])


def read_upright(file: Path) -> tuple[Pixels, tuple[int, int]]:
    """Returns a picture as people see it, turned as its EXIF note says, and its (height, width).

    Of more than `LARGE` pixels the picture is reduced, so that memory stays bounded; a JPEG is reduced as it
    is decoded.

    Raises:
        InputError: the picture does not decode, or is larger than Pillow takes to be harmless.
    """
    with _about_size_unwarned():
        try:
            with Image.open(file) as header:
                width, height = header.size
        except Image.DecompressionBombError as error:
            raise InputError(f"picture {file} is too large: {error}; make it smaller") from None
        except (OSError, ValueError, SyntaxError):
            width = height = 0  # decoding says what is wrong, or knows a form that Pillow does not
    many = width * height > LARGE
    least = round(min(width, height) * (LARGE / (width * height)) ** 0.5) if many else 0
    with _about_size_unwarned() if many else contextlib.nullcontext():
        pixels = load_image(file, upright=True, least=least).permute(1, 2, 0).numpy()
    h, w = pixels.shape[:2]
    size = (height, width) if many else (h, w)
    if (h > w) != (size[0] > size[1]):
        size = size[::-1]  # turned
    if h * w > LARGE:
        factor = (LARGE / (h * w)) ** 0.5
        pixels = shrink(pixels, round(w * factor), round(h * factor))
    return pixels, size


@contextlib.contextmanager
def _about_size_unwarned() -> Iterator[None]:
    """Keeps Pillow's warning of very large pictures away; one thread at a time."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
