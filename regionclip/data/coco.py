"""COCO instances and results for detection, on top of `clip_base.data.coco`."""

# N annotations
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_base.data.coco import (
    LARGEST,
    box_of,
    category_name,
    checked_entry,
    file_name_of,
    is_id,
    stated_size,
)
from clip_base.runtime.errors import InputError, quote


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
    size = stated_size(entry, where)
    if size is None:
        raise InputError(f"{where} needs a 'height' and a 'width' in pixels, found {quote(entry)}")
    return image_id, name, *size


@dataclass(frozen=True)
class Columns:
    """The annotations' fields, one entry per row."""

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
        if not (np.abs(boxes) <= LARGEST).all() or not all(map(is_id, image_ids + category_ids)):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
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
