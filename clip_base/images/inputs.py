"""Images given as files or in memory, as [H, W, 3] uint8 RGB; large ones at reduced size."""

# H, W height and width
from __future__ import annotations

import contextlib
import glob
import itertools
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from torch import Tensor

from clip_base.images.decode import Pixels, load_image
from clip_base.images.decode import resize as shrink
from clip_base.images.folders import (
    IMAGE_SUFFIXES,
    Listing,
    fits,
    is_ordinary,
    list_files,
    none_found,
    note_left_out,
    require_utf8,
)
from clip_base.images.headers import open_image_file
from clip_base.images.samples import located
from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing
from clip_base.storage.tars import TAR, expand, member_at, names_tars, scan

ImageLike = str | Path | Image.Image | npt.NDArray[Any] | Tensor
LARGE = 25_000_000  # pixels
_WARNINGS = threading.Lock()  # what is to be warned of is one setting for all threads


def pixels_of(image: Image.Image | npt.NDArray[Any] | Tensor) -> Pixels:
    """Returns an image as [H, W, 3] uint8 RGB.

    Args:
        image: a PIL image, rotated by its EXIF orientation; an array [H, W, 3] (RGB), [H, W, 4] (of which the
            transparency is dropped), [H, W, 1] or [H, W] (gray); or a tensor of these forms with the channels
            first. Numbers are uint8, or floating in [0, 1].

    Raises:
        InputError: an array or a tensor of another form, something else, or an image of more than 8 bits.
    """
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        # Pillow would cut off 16 bits at 255 and not scale them: such images are refused as arrays are.
        deep = image.mode.startswith(("I", "F"))
        return _checked(np.array(image if deep else image.convert("RGB")), repr(image))
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        if tensor.ndim == 3:
            tensor = tensor.permute(1, 2, 0)
        whole = tensor.float() if tensor.is_floating_point() else tensor
        return _checked(whole.numpy(), f"a tensor {list(image.shape)}")
    array = np.asarray(image)
    known = isinstance(image, np.ndarray)
    return _checked(array, f"an array {list(array.shape)}" if known else type(image).__name__)


def _checked(array: npt.NDArray[Any], given: str) -> Pixels:
    """Returns [H, W, 3] uint8 of an array with the channels last; `given` names what the user gave."""
    colors = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if colors not in (1, 3, 4) or not array.size:
        raise InputError(
            f"an image is a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W]; got {given}"
        )
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise InputError(
                f"a floating image is in [0, 1], got {low:g}…{high:g}; was it normalized? Give it before "
                "normalization, or, if 255 is white, divided by 255"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"an image's pixels are uint8, or floating in [0, 1]; got {array.dtype}")
    array = array.reshape(*array.shape[:2], colors)
    return np.ascontiguousarray(array[..., :3] if colors > 1 else array.repeat(3, axis=2))


def image_files(places: Sequence[str], endings: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Returns the image files that some places stand for, in the order given, each once.

    Args:
        places: files; samples such as `sample:cat`; uncompressed tars, which stand for the images in them;
            folders, which stand for the files directly in them; patterns such as `photos/*.jpg` or
            `photos/**/*.jpg`, where `**` is any folders below. Folders are listed by `list_files`.
        endings: of the files that folders and patterns stand for; a file that is named itself may end
            otherwise.

    Raises:
        InputError: a place does not exist, is a URL, or stands for no such file.
    """
    files: list[Path] = []
    for place_ in places:
        if "://" in place_:
            raise InputError(f"{place_} is a URL; download it and give the path of the file")
        path = located(place_)
        if TAR not in endings and names_tars(place_):
            for tar in expand(place_):
                names = scan(tar).names
                files += [tar / name for name in names if Path(name).suffix.lower() in endings]
        elif not path.exists() and member_at(path) is not None:
            files.append(path)
        elif glob.has_magic(place_) and not path.exists():
            inside = _matching(path, endings)
            if not inside:
                raise InputError(f"pattern {place_!r} matches no file ({', '.join(sorted(endings))})")
            files += inside
        elif existing(path, "image").is_dir():
            listing = list_files(path, endings, recursive=False)
            if not listing.files:
                error = none_found(f"folder {path}", endings, listing)
                raise InputError(f"{error}; those in folders below are '{path}/**'")
            note_left_out(path, listing)
            files += listing.files
        else:
            require_utf8(path, "image")
            files.append(path)
    return list(dict.fromkeys(files))


def _matching(pattern: Path, endings: Collection[str]) -> list[Path]:
    """Returns the files that fit a pattern, sorted."""
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    base, rest = Path(*fixed), pattern.parts[len(fixed) :]
    if "**" not in rest:
        found = [Path(name) for name in glob.iglob(str(pattern))]
        files = sorted(file for file in found if file.suffix.lower() in endings and file.is_file())
        return [file for file in files if is_ordinary(file.relative_to(base))]
    listing = list_files(base, endings) if base.is_dir() else Listing()
    listing.files = [file for file in listing.files if fits(file.relative_to(base), rest)]
    note_left_out(pattern, listing)
    return listing.files


def read_image(image: ImageLike) -> tuple[Pixels, tuple[int, int]]:
    """Returns an image as [H, W, 3] uint8 RGB, and its (height, width), which is larger when it was reduced.

    Args:
        image: a file's path, rotated by its EXIF orientation, or `sample:cat`, see `samples`; or an image in
            memory, see `pixels_of`.

    Raises:
        InputError: a file is missing or does not decode; an array or a tensor of another form.
    """
    if isinstance(image, str | Path):
        return read_upright(located(image))
    pixels = pixels_of(image)
    return pixels, (pixels.shape[0], pixels.shape[1])


def read_upright(file: Path, max_megapixels: float | None = None) -> tuple[Pixels, tuple[int, int]]:
    """Returns an image as people see it, rotated by its EXIF orientation, and its (height, width).

    Of more than `LARGE` pixels the image is reduced, so that memory stays bounded; a JPEG is reduced as it
    is decoded.

    Args:
        file: the image.
        max_megapixels: images of more million pixels are not decoded; None: no further limit.

    Raises:
        InputError: the image does not decode, or is larger than allowed.
    """
    with _about_size_unwarned(), open_image_file(file) as header:
        width, height = header.size
    if max_megapixels is not None and width * height > max_megapixels * 1e6:
        raise InputError(
            f"image {file} has {width} × {height} = {width * height / 1e6:.1f} million pixels, more than the "
            f"{max_megapixels:g} million that are allowed; reduce it"
        )
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
    """Keeps Pillow's warning of very large images away; one thread at a time."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
