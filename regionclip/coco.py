"""COCO's two JSON forms, instances and results, read and checked; errors name the file and the entry."""

# N annotations
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from clip_base.errors import InputError
from clip_base.files import read_json


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
    """Returns the entries reduced to the fields that count."""
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
            box, score = [float(value) for value in entry["bbox"]], float(entry["score"])
            image, category = entry["image_id"], int(entry["category_id"])
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
