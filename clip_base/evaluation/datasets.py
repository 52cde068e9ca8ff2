"""Pictures with a class each: what is evaluated on, and how it is read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from clip_base.data.coco import box_of, category_name, image_names, is_crowd, read_instances
from clip_base.images.decode import Pixels
from clip_base.images.folders import list_files, note_left_out, subfolders
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import existing


@dataclass(frozen=True)
class Picture:
    """One image, or one box of it, and its class.

    Attributes:
        path: the image file.
        label: index of the class.
        box: (x, y, width, height) in pixels; None is the whole image.
    """

    path: Path
    label: int
    box: tuple[float, float, float, float] | None = None


def folder_pictures(folder: str) -> tuple[list[str], list[Picture]]:
    """Returns the subfolders' names, sorted, `_` as a space, and the images in them.

    Raises:
        InputError: the folder is missing, or holds no subfolders with images.
    """
    root = existing(folder, "image folder")
    listing = list_files(root, what="image folder")
    inside = [path for path in listing.files if len(path.relative_to(root).parts) > 1]
    if not inside:
        raise InputError(
            f"{folder} holds no images in subfolders; put each class's images into a folder of its name, "
            "or give annotations=FILE in COCO's form"
        )
    if len(inside) < len(listing.files):
        listing.left_out["in no subfolder, which belong to no class"] = len(listing.files) - len(inside)
        listing.files = inside
    note_left_out(folder, listing)
    classes = subfolders(root)
    label_of = {path.name: label for label, path in enumerate(classes)}
    pictures = [Picture(path, label_of[path.relative_to(root).parts[0]]) for path in inside]
    return [path.name.replace("_", " ") for path in classes], pictures


def coco_pictures(annotations: str, images: str) -> tuple[list[str], list[Picture]]:
    """Returns the categories of a COCO instances file, by id, and the boxes of its single objects.

    Raises:
        InputError: the file is no such file, or an annotation names an image or category that it does not
            list.
    """
    content, folder = read_instances(annotations), existing(images, "image folder")
    where = f"annotations file {annotations}"
    names: dict[int, str] = {}
    for place, entry in enumerate(content["categories"]):
        names[entry["id"]] = category_name(entry, f"{where}: categories[{place}]", names)
    label_of = {category: label for label, category in enumerate(sorted(names))}
    path_of = {key: folder / name for key, name in image_names(content["images"], where).items()}
    pictures = []
    for place, entry in enumerate(content["annotations"]):
        at = f"{where}: annotations[{place}]"
        for key, known in (("image_id", path_of), ("category_id", label_of)):
            if entry[key] not in known:
                raise InputError(f"{at} has {key} {entry[key]}, which the file does not list")
        if not is_crowd(entry, at):
            box = box_of(entry, at)
            pictures.append(Picture(path_of[entry["image_id"]], label_of[entry["category_id"]], box))
    if not pictures:
        raise InputError(f"{annotations} holds no boxes of single objects")
    return [names[key] for key in sorted(names)], sorted(pictures, key=lambda picture: picture.path)


def batches(
    pictures: list[Picture], load: Callable[[Picture], Tensor | str], size: int, workers: int
) -> Iterator[list[Tensor | str]]:
    """Yields loaded batches in order; the next one is loading meanwhile."""
    waiting: deque[Iterator[Tensor | str]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pictures), size):
            waiting.append(pool.map(load, pictures[start : start + size]))
            if len(waiting) > 1:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())


def load_picture(
    decode: Callable[[Path], Pixels], prepare: Callable[[Pixels], Tensor], picture: Picture
) -> Tensor | str:
    """Returns [3, R, R] uint8, or why the picture cannot be used.

    Args:
        decode: reads an image file as [H, W, 3].
        prepare: makes the tower's input, before normalisation, of the picture's pixels.
        picture: what to read.
    """
    try:
        pixels = decode(picture.path)  # [H, W, 3]
    except InputError as error:
        return str(error)
    if picture.box is not None:
        x, y, width, height = picture.box
        if not all(math.isfinite(value) for value in picture.box):
            return f"box {picture.box} is not finite"
        top, left = max(math.floor(y), 0), max(math.floor(x), 0)
        pixels = pixels[top : max(math.ceil(y + height), 0), left : max(math.ceil(x + width), 0)]
        if width <= 0 or height <= 0 or not pixels.size:
            return f"box {picture.box} holds no pixels of the image"
    return prepare(pixels)
