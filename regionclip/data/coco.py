"""COCO's instances and results as detection needs them, on top of `clip_base.data.coco`."""

# N annotations
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask

from clip_base.data.coco import as_id, box_of, category_name, checked_entry, file_name_of, is_id
from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError, quote
from clip_base.runtime.files import read_json


def category_ids_by_name(entries: Sequence[dict[str, Any]], path: str | Path) -> dict[str, int]:
    """Returns category ids by name, in order of id; malformed entries, repeated ids or names: InputError."""
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        where = f"{path}: categories[{place}]"
        category = checked_entry(entry, where, ("id",))["id"]
        names[category] = category_name({**entry, "id": category}, where, names)
    return {names[category]: category for category in sorted(names)}


def frequencies(entries: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Returns LVIS's `frequency` of each category ("f", "c", "r"; "" without one), in order of id."""
    ordered = sorted(entries, key=lambda entry: int(entry["id"]))
    return tuple(str(entry.get("frequency") or "") for entry in ordered)


def image_fields(entry: dict[str, Any], path: Path, place: int) -> tuple[int, str, int, int]:
    """Returns an image entry's id, file name, height and width in pixels; `place` is for messages."""
    where = f"{path}: images[{place}]"
    image_id = checked_entry(entry, where, ("id",))["id"]
    name = file_name_of(entry, where)
    height, width = as_id(entry.get("height")), as_id(entry.get("width"))
    if height is None or width is None or min(height, width) < 1:
        raise InputError(f"{where} needs a 'height' and a 'width' in pixels, found {quote(entry)}")
    return image_id, name, height, width


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
        image_ids = [entry["image_id"] for entry in entries]
        category_ids = [entry["category_id"] for entry in entries]
        if not np.isfinite(boxes).all() or not all(map(is_id, image_ids + category_ids)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        for place, entry in enumerate(entries):
            where = f"{path}: annotations[{place}]"
            checked_entry(entry, where, ("image_id", "category_id"))
            box_of(entry, where)
        raise
    crowd = np.array(
        [bool(entry.get("iscrowd")) for entry in entries], dtype=bool
    )  # 0 or 1 since it was read
    return Columns(image_ids, category_ids, boxes, crowd)


def repeated_annotations(
    columns: Columns, entries: list[dict[str, Any]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Returns [N] bool: entries that repeat an earlier one, with the same id, image, category and box."""
    seen: dict[Any, int] = {}
    repeated = np.zeros(len(entries), dtype=bool)
    for place, entry in enumerate(entries):
        annotation = entry.get("id")
        if not isinstance(annotation, int | str):
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
    around its mask, and an `area`, its mask's (as pycocotools takes it). An entry's own `id`, and whatever
    else it holds, has no meaning.

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
        result = checked_result(entry, f"{source}[{place}]")
        strangers += result["image_id"] not in image_ids
        checked.append(result)
    if strangers:
        first = next(entry["image_id"] for entry in checked if entry["image_id"] not in image_ids)
        raise InputError(
            f"{source}: {strangers} of {len(checked)} detections are in images that {where} does not have, "
            f"first image_id {first!r}; evaluate against the annotations of the images that were detected in"
        )
    return checked


def checked_result(entry: Any, where: str) -> dict[str, Any]:
    """Returns a result's image_id, category_id, bbox, score, and `area` where it is a mask without a box.

    Raises:
        InputError: one of them is missing.
    """
    needs = f"{where} needs image_id, category_id, bbox [x, y, width, height], score"
    if not isinstance(entry, dict):
        raise InputError(f"{needs}: it is no object, found {quote(entry)}")
    fields: dict[str, Any] = {}
    for key in ("image_id", "category_id"):
        fields[key] = as_id(entry.get(key))
        if fields[key] is None:
            problem = f"{quote(entry[key], 40)} is no whole number" if key in entry else f"no {key!r}"
            raise InputError(f"{needs}: {problem}, found {quote(entry)}")
    try:
        fields |= {**_box_of(entry), "score": float(entry["score"])}
    except (KeyError, TypeError, ValueError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{needs}: {missing}, found {quote(entry)}") from None
    if len(fields["bbox"]) != 4 or not all(map(math.isfinite, (*fields["bbox"], fields["score"]))):
        raise InputError(f"{where} must have four finite box numbers and a finite score: {quote(entry)}")
    return fields


def _box_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry's bbox; else that around its mask, a run-length code, and the mask's area."""
    code = entry.get("segmentation")
    if "bbox" in entry or not isinstance(code, dict):
        return {"bbox": [float(value) for value in entry["bbox"]]}
    try:
        if isinstance(code["counts"], list):
            height, width = code["size"]
            if sum(code["counts"]) != height * width or min(code["counts"]) < 0:
                raise ValueError
            code = mask.frPyObjects(code, height, width)
        around = {"bbox": mask.toBbox(code).tolist(), "area": float(mask.area(code))}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("no bbox, and the segmentation is no run-length code with size and counts") from None
    return around


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
            f"results_categories: none of its {len(names)} names, such as {names[0]!r}, is a category of the "
            f"annotations; {did_you_mean(names[0], list(ids))}"
        )
    renumbered = []
    for entry in entries:
        place = entry["category_id"] - first
        if not 0 <= place < len(names):
            raise InputError(
                f"results: category id {entry['category_id']} does not count {len(names)} classes from "
                f"{first} on; give another results_categories= or results_first_id={1 - first}"
            )
        if new_ids[place] is not None:
            renumbered.append({**entry, "category_id": new_ids[place]})
    return renumbered
