"""COCO's two JSON forms, instances and results, read and checked; errors name the file and the entry."""

# N annotations
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask

from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import read_json


def read_instances(path: str | Path) -> dict[str, Any]:
    """Reads a file in COCO's instances form and checks that its three lists are lists of objects."""
    content = read_json(path, "annotations file")
    if not isinstance(content, dict):
        hint = "; that is the form of a results file" if isinstance(content, list) else ""
        raise InputError(
            f"annotations file {path} must hold an object with images, annotations, categories{hint}"
        )
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if not isinstance(value, list):
            found = f"{key!r} is a {type(value).__name__}" if key in content else f"there is no {key!r}"
            raise InputError(
                f"annotations file {path} is not in COCO's instances form: {found}, a list is needed"
            )
        wrong = next((place for place, entry in enumerate(value) if not isinstance(entry, dict)), None)
        if wrong is not None:
            raise InputError(f"annotations file {path}: {key}[{wrong}] is no object but {value[wrong]!r:.60}")
    return content


def category_ids_by_name(entries: Sequence[dict[str, Any]], path: str | Path) -> dict[str, int]:
    """Returns category ids by name, in order of id; malformed entries, repeated ids or names: InputError."""
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        category, name = entry.get("id"), entry.get("name")
        if not is_id(category) or not isinstance(name, str) or not name.strip():
            raise InputError(
                f"{path}: categories[{place}] needs a whole number 'id' and a 'name', found {entry!r:.80}"
            )
        if category in names:
            raise InputError(
                f"{path}: category id {category} belongs to both {names[category]!r} and {name!r}"
            )
        if name in names.values():
            raise InputError(f"{path}: two categories are called {name!r}; merge them or rename one")
        names[category] = name
    return {names[category]: category for category in sorted(names)}


def image_ids(content: dict[str, Any], path: str | Path) -> set[int]:
    """Returns the ids of the images; one without a whole number for an id: InputError."""
    wrong = next((place for place, entry in enumerate(content["images"]) if not is_id(entry.get("id"))), None)
    if wrong is not None:
        raise InputError(
            f"{path}: images[{wrong}] needs a whole number 'id', found {content['images'][wrong]!r:.120}"
        )
    return {entry["id"] for entry in content["images"]}


def frequencies(entries: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Returns LVIS's `frequency` of each category ("f", "c", "r"; "" without one), in order of id."""
    ordered = sorted(entries, key=lambda entry: int(entry["id"]))
    return tuple(str(entry.get("frequency") or "") for entry in ordered)


def is_id(value: Any) -> TypeGuard[int]:
    """Whether `value` is a whole number, as COCO's ids are."""
    return isinstance(value, int) and not isinstance(value, bool)


def image_fields(entry: dict[str, Any], path: Path, place: int) -> tuple[int, str, int, int]:
    """Returns an image entry's id, file name, height and width in pixels; `place` is for messages."""
    image_id, name = entry.get("id"), entry.get("file_name")
    if name is None and isinstance(entry.get("coco_url"), str):
        name = "/".join(
            entry["coco_url"].split("/")[-2:]
        )  # LVIS gives train2017/000000000009.jpg only as a URL
    height, width = entry.get("height"), entry.get("width")
    sides = all(isinstance(side, int | float) and side >= 1 for side in (height, width))
    if not is_id(image_id) or not isinstance(name, str) or not name or not sides:
        raise InputError(
            f"{path}: images[{place}] needs a whole number 'id', a 'file_name', a 'height' and a 'width', "
            f"found {entry!r:.120}"
        )
    return image_id, name, int(height or 0), int(width or 0)


@dataclass(frozen=True)
class Columns:
    """The annotations' fields, an entry a row."""

    image_ids: list[Any]
    category_ids: list[Any]
    boxes: np.ndarray[Any, np.dtype[np.float64]]  # [N, 4] x, y, width, height
    iscrowd: np.ndarray[Any, np.dtype[np.bool_]]  # [N]


def annotation_columns(entries: list[dict[str, Any]], path: Path) -> Columns:
    """Reads the annotations in bulk; only when that fails are they gone through to name the bad one."""
    try:
        boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(len(entries), 4)
        if not np.isfinite(boxes).all():
            raise ValueError
        image_ids = [entry["image_id"] for entry in entries]
        category_ids = [entry["category_id"] for entry in entries]
        if not all(map(is_id, image_ids)) or not all(map(is_id, category_ids)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(_first_bad_annotation(entries, path)) from None
    return Columns(
        image_ids, category_ids, boxes, np.array([bool(e.get("iscrowd")) for e in entries], dtype=bool)
    )


def _first_bad_annotation(entries: list[dict[str, Any]], path: Path) -> str:
    for place, entry in enumerate(entries):
        shown = {key: value for key, value in entry.items() if key != "segmentation"}
        for key in ("image_id", "category_id"):
            if not is_id(entry.get(key)):
                return f"{path}: annotations[{place}] needs a whole number {key!r}, found {shown!r:.120}"
        try:
            box = np.array(entry.get("bbox"), dtype=np.float64)
        except (TypeError, ValueError):
            box = np.array(np.nan)
        if box.shape != (4,) or not np.isfinite(box).all():
            return (
                f"{path}: annotations[{place}] needs a 'bbox' of four finite numbers [x, y, width, height], "
                f"found {shown!r:.120}"
            )
    return f"{path}: the annotations cannot be read"


def repeated_annotations(
    columns: Columns, entries: list[dict[str, Any]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Returns [N] bool: entries that repeat an earlier one, with the same id, image, category and box."""
    seen: dict[Any, int] = {}
    repeated = np.zeros(len(entries), dtype=bool)
    for place, entry in enumerate(entries):
        annotation = entry.get("id")
        if annotation is None:
            continue
        first = seen.setdefault(annotation, place)
        if first == place:
            continue
        same = columns.image_ids[first] == columns.image_ids[place]
        same &= columns.category_ids[first] == columns.category_ids[place]
        # Files that were joined from two have different boxes under one id; nothing here depends on the ids.
        repeated[place] = same and bool((columns.boxes[first] == columns.boxes[place]).all())
    return repeated


def read_results(
    results: str | Path | Sequence[dict[str, Any]], image_ids: set[int], where: str
) -> list[dict[str, Any]]:
    """Returns the entries reduced to the fields that count: image_id, category_id, bbox and score.

    Whole numbers may be written as 7, 7.0 or, for images, "7". An entry with a mask and no box has the box
    around its mask. An entry's own `id`, and whatever else it holds, has no meaning.

    Args:
        results: a results file (`.gz` too) or its content.
        image_ids: the images of the annotations.
        where: the annotations' name, for messages.

    Raises:
        InputError: a malformed entry, or one in an image that the annotations do not have.
    """
    source = "results" if isinstance(results, Sequence) and not isinstance(results, str) else str(results)
    content = read_json(results, "results file") if isinstance(results, str | Path) else results
    if not isinstance(content, Sequence) or isinstance(content, str):
        hint = (
            "; that is an annotations file" if isinstance(content, dict) and "annotations" in content else ""
        )
        raise InputError(f"{source} must hold a list of detections, found a {type(content).__name__}{hint}")
    checked, strangers = [], 0
    for place, entry in enumerate(content):
        try:
            box, score = [float(value) for value in _box_of(entry)], float(entry["score"])
            image, category = _whole(entry["image_id"]), _whole(entry["category_id"])
        except (KeyError, TypeError, ValueError) as error:
            missing = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{source}[{place}] needs image_id, category_id, bbox [x, y, width, height], score: "
                f"{missing}, found {entry!r:.120}"
            ) from None
        if len(box) != 4 or not all(map(math.isfinite, (*box, score))):
            raise InputError(
                f"{source}[{place}] must have four finite box numbers and a finite score: {entry!r:.120}"
            )
        strangers += image not in image_ids
        checked.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    if strangers:
        first = next(entry["image_id"] for entry in checked if entry["image_id"] not in image_ids)
        raise InputError(
            f"{source}: {strangers} of {len(checked)} detections are in images that {where} does not have, "
            f"first image_id {first!r}; evaluate against the annotations of the images that were detected in"
        )
    return checked


def _box_of(entry: dict[str, Any]) -> Sequence[float]:
    if "bbox" in entry or not isinstance(entry.get("segmentation"), dict):
        box: Sequence[float] = entry["bbox"]
        return box
    try:
        around: list[float] = mask.toBbox(entry["segmentation"]).tolist()
    except (KeyError, TypeError, ValueError):
        raise ValueError("no bbox, and the segmentation is no run-length code with size and counts") from None
    return around


def _whole(value: Any) -> int:
    """Returns the whole number that 7, 7.0 and "7" stand for."""
    if is_id(value):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    raise ValueError(f"{value!r} is no whole number")


def numbered_by(
    entries: Sequence[dict[str, Any]], names: Sequence[str], first: int, ids: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Returns results whose category ids count the classes of a list, with the annotations' ids instead.

    Args:
        entries: results.
        names: the class list; "sports ball" also means a category "sports_ball".
        first: the number of the list's first class: 0 or 1.
        ids: the annotations' category ids by name.

    Returns:
        The entries of classes that the annotations have.

    Raises:
        InputError: a number outside the list, or a list of which the annotations have no name.
    """
    known = {name.replace("_", " "): category for name, category in ids.items()}
    new_ids = [known.get(name.replace("_", " ")) for name in names]
    if not any(category is not None for category in new_ids):
        raise InputError(
            f"result_classes: none of its {len(names)} names, such as {names[0]!r}, is a category of the "
            f"annotations; {did_you_mean(names[0], list(ids))}"
        )
    renumbered = []
    for entry in entries:
        place = entry["category_id"] - first
        if not 0 <= place < len(names):
            raise InputError(
                f"results: category id {entry['category_id']} does not count {len(names)} classes from "
                f"{first} on; give another result_classes= or result_first={1 - first}"
            )
        if new_ids[place] is not None:
            renumbered.append({**entry, "category_id": new_ids[place]})
    return renumbered
