"""Datasets of the evaluation jobs: images with classes or captions, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_base.data.coco import box_of, category_name, image_names, is_crowd, read_instances, stated_size
from clip_base.data.webdataset import WebdatasetConfig, WebdatasetSource
from clip_base.images.decode import Decoded, cut, size_of
from clip_base.images.folders import list_files, note_left_out, subfolders
from clip_base.runtime.errors import InputError, quote
from clip_base.runtime.progress import track
from clip_base.storage.files import existing, read_text
from clip_base.storage.paths import image_in
from clip_base.storage.tars import Member

SHARD_IMAGES = ["webp", "png", "jpg", "jpeg"]  # the extensions that CLIP_benchmark looks for, in its order


@dataclass(frozen=True)
class EvaluationImage:
    """One image, or one box of it, and its class.

    Attributes:
        path: the image file, or its place in a tar.
        label: index of the class.
        box: (x, y, width, height) in pixels; None is the whole image.
        size: (height, width) of the image that the annotations state, which tells the boxes' frame.
    """

    path: Path | Member
    label: int
    box: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None


def folder_images(folder: str) -> tuple[list[str], list[EvaluationImage]]:
    """Returns the names of a folder's classes, and the images in them.

    Args:
        folder: with a subfolder for each class, sorted as `subfolders` says, `_` as a space; or a
            classification dataset of CLIP_benchmark, see `tar_images`.

    Raises:
        InputError: the folder is missing, or holds neither subfolders with images nor tars.
    """
    root = existing(folder, "image folder")
    if tars_folder(root) is not None:
        return tar_images(root)
    listing = list_files(root, what="image folder")
    inside = [path for path in listing.files if len(path.relative_to(root).parts) > 1]
    if not inside:
        raise InputError(
            f"{folder} holds no images in subfolders; put each class's images into a folder of its name, "
            "or give annotations=FILE in COCO's format"
        )
    if len(inside) < len(listing.files):
        listing.left_out["in no subfolder, which belong to no class"] = len(listing.files) - len(inside)
        listing.files = inside
    note_left_out(folder, listing)
    classes = subfolders(root)
    label_of = {path.name: label for label, path in enumerate(classes)}
    examples = [EvaluationImage(path, label_of[path.relative_to(root).parts[0]]) for path in inside]
    return [path.name.replace("_", " ") for path in classes], examples


def tars_folder(folder: Path) -> Path | None:
    """Returns where a dataset in CLIP_benchmark's layout has its tars: here or in `test`; None: nowhere."""
    if not folder.is_dir():
        return None
    return next((place for place in (folder, folder / "test") if any(place.glob("*.tar"))), None)


def beside_tars(folder: Path, name: str) -> Path:
    """Returns a text file of such a dataset, which stands in its root, whether or not it exists."""
    return next((path for path in (folder / name, folder.parent / name) if path.exists()), folder / name)


def tar_images(folder: Path) -> tuple[list[str], list[EvaluationImage]]:
    """Returns the class names and the images of a classification dataset in CLIP_benchmark's `wds_*` layout.

    It has `classnames.txt`, and in `test` and `train` tars of records: an image, and in `.cls` the number of
    its class from 0.

    Args:
        folder: the dataset, of which `test` is taken, or one of its two parts.

    Raises:
        InputError: there are no names, a record has no class, or several classes apply to an image.
    """
    tars = tars_folder(folder) or folder
    kind = beside_tars(folder, "dataset_type.txt")
    if kind.exists() and read_text(kind).strip() not in ("", "classification"):
        raise InputError(
            f"{folder} is a dataset for {read_text(kind).strip()[:80]}, not for classification into one class"
        )
    listed = beside_tars(folder, "classnames.txt")
    if not listed.exists():
        raise InputError(
            f"{folder} has tars and no classnames.txt; write the names there, in order, one per line"
        )
    names = [line.strip() for line in read_text(listed, "class names").splitlines() if line.strip()]
    source = WebdatasetSource(WebdatasetConfig(str(tars), images=SHARD_IMAGES, captions=["cls"]))
    records, examples = source.pairs(), []
    for index in track(range(len(records)), "reading classes"):
        image, (text, *_) = (pair := records[index]).image, pair.captions
        if not text.isdecimal() or int(text) >= len(names):
            raise InputError(
                f"{image}: its class is {quote(text)}; {listed} has {len(names)} names, numbered from 0"
            )
        assert isinstance(image, Member)
        examples.append(EvaluationImage(image, int(text)))
    return names, examples


def shard_captions(folder: Path) -> tuple[list[EvaluationImage], list[tuple[str, ...]], list[dict[str, Any]]]:
    """Returns the images and captions of a retrieval dataset in the `wds_*` layout, and records without them.

    Args:
        folder: with tars in it or in `test`; each line of a record's `.txt` is a caption.
    """
    tars = tars_folder(folder)
    if tars is None:
        raise InputError(f"captions folder {folder} holds no tars, nor does a folder test in it")
    records = WebdatasetSource(WebdatasetConfig(str(tars), images=SHARD_IMAGES)).pairs()
    examples, captions, skipped = [], [], []
    for index in track(range(len(records)), "reading captions"):
        try:
            pair = records[index]
        except InputError as error:
            skipped.append({"image": f"{tars}, record {index}", "box": None, "reason": str(error)})
            continue
        assert isinstance(pair.image, Member)
        examples.append(EvaluationImage(pair.image, 0))
        captions.append(pair.captions)
    return examples, captions, skipped


def coco_images(annotations: str, images: str) -> tuple[list[str], list[EvaluationImage]]:
    """Returns the categories of a COCO instances file, by id, and the boxes of its single objects.

    Raises:
        InputError: the file is no such file, or an annotation names per image or category that it does not
            list.
    """
    content, folder = read_instances(annotations), existing(images, "image folder")
    where = f"annotations file {annotations}"
    names: dict[int, str] = {}
    for place, entry in enumerate(content["categories"]):
        names[entry["id"]] = category_name(entry, f"{where}: categories[{place}]", names)
    label_of = {category: label for label, category in enumerate(sorted(names))}
    listed = image_names(content["images"], where)
    path_of = {key: image_in(folder, name, where) for key, name in listed.items()}
    size_of_image = {
        entry["id"]: stated_size(entry, f"{where}: images[{place}]")
        for place, entry in enumerate(content["images"])
    }
    examples = []
    for place, entry in enumerate(content["annotations"]):
        at = f"{where}: annotations[{place}]"
        for key, known in (("image_id", path_of), ("category_id", label_of)):
            if entry[key] not in known:
                raise InputError(f"{at} has {key} {entry[key]}, which the file does not list")
        if not is_crowd(entry, at):
            image, label = entry["image_id"], label_of[entry["category_id"]]
            examples.append(EvaluationImage(path_of[image], label, box_of(entry, at), size_of_image[image]))
    if not examples:
        raise InputError(f"{annotations} has no boxes of single objects")
    return [names[key] for key in sorted(names)], sorted(examples, key=lambda example: str(example.path))


def prepare_image(
    decode: Callable[[EvaluationImage], Decoded],
    prepare: Callable[[Decoded], Tensor],
    example: EvaluationImage,
) -> Tensor | str:
    """Returns [3, R, R] uint8, or why the image cannot be used.

    Args:
        decode: reads the image file.
        prepare: makes the tower's input, before normalization, of the image's pixels.
        example: what to read.
    """
    try:
        image = decode(example)
    except InputError as error:
        return str(error)
    if example.box is not None:
        x, y, width, height = example.box
        if not all(math.isfinite(value) for value in example.box):
            return f"box {example.box} is not finite"
        last_row, last_column = size_of(image)
        top, left = max(math.floor(y), 0), max(math.floor(x), 0)
        bottom, right = min(math.ceil(y + height), last_row), min(math.ceil(x + width), last_column)
        if width <= 0 or height <= 0 or bottom <= top or right <= left:
            return f"box {example.box} holds no pixels of the image"
        image = cut(image, left, top, right, bottom)
    return prepare(image)
