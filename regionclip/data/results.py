"""Results in COCO's format: validated entries; images and categories are found by name if they have names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask

from clip_base.data.coco import as_id, is_in_pixels
from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.files import read_json
from regionclip.data.file_names import FileNames, name_images


@dataclass(frozen=True)
class Results:
    """What a results file holds.

    Attributes:
        entries: each with image_id and category_id of the annotations, bbox, score, and `area` where a mask
            was given without a box.
        named: whether the entries state the names of their categories.
        unknown: entries left out since the annotations have no category of their name.
        notes: what was found by name although the number said something else; to print.
    """

    entries: list[dict[str, Any]]
    named: bool = False
    unknown: int = 0
    notes: tuple[str, ...] = field(default=())


def read_results(
    results: str | Path | Sequence[dict[str, Any]],
    images: Mapping[int, str],
    where: str,
    categories: Mapping[str, int] | None = None,
) -> Results:
    """Reads a results file in COCO's format.

    Whole numbers may be written as 7, 7.0 or, for images, "7". An entry with a mask and no box has the box
    around its mask, and an `area`, its mask's (as pycocotools takes it). Entries with a `file_name`, such as
    those of `regionclip detect`, whose numbers count its own images, belong to the image of that name; those
    with a `category_name` to that category. An entry's own `id`, and whatever else it holds, has no meaning.

    Args:
        results: a results file (`.gz` too) or its content.
        images: file name of each of the annotations' images, by id; "" where it is not known.
        where: the annotations' name, for messages.
        categories: the annotations' category ids by name; None: numbers are taken as they are.

    Raises:
        InputError: a malformed entry, one in an image that the annotations do not have, or names that are
            ambiguous or contradict the numbers.
    """
    source = "results" if isinstance(results, Sequence) and not isinstance(results, str) else str(results)
    content = read_json(results, "results file") if isinstance(results, str | Path) else results
    if not isinstance(content, Sequence) or isinstance(content, str):
        hint = (
            "; that is an annotations file" if isinstance(content, dict) and "annotations" in content else ""
        )
        raise InputError(f"{source} must hold a list of detections, found a {type(content).__name__}{hint}")
    entries = [checked_result(entry, f"{source}[{place}]") for place, entry in enumerate(content)]
    notes: list[str] = []
    names = _names(content, "file_name", source)
    if names and any(images.values()):
        _find_images(entries, names, images, source, where, notes)
    strangers = [entry["image_id"] for entry in entries if entry["image_id"] not in images]
    if strangers:
        raise InputError(
            f"{source}: {len(strangers)} of {len(entries)} detections are in images that {where} does not "
            f"have, first image_id {strangers[0]!r}; use the annotations of the images that were detected in"
        )
    kinds = _names(content, "category_name", source)
    if kinds and categories is not None:
        entries, unknown = _find_categories(entries, kinds, categories, source, notes)
        return Results(entries, True, unknown, tuple(notes))
    return Results(entries, bool(kinds), 0, tuple(notes))


def _names(content: Sequence[Any], key: str, source: str) -> list[str]:
    """Returns what each entry has under `key`, a name; empty when none has one. InputError when some have."""
    names = [entry.get(key) for entry in content]
    lacking = [place for place, name in enumerate(names) if not isinstance(name, str) or not name]
    if len(lacking) == len(names):
        return []
    if lacking:
        raise InputError(
            f"{source}: {len(names) - len(lacking)} of {len(names)} detections have a {key}, but "
            f"{source}[{lacking[0]}] has none; give it for all or none"
        )
    return names


def _find_images(
    entries: list[dict[str, Any]],
    names: Sequence[str],
    images: Mapping[int, str],
    source: str,
    where: str,
    notes: list[str],
) -> None:
    """Gives entries the ids that the annotations have for their file names, in place."""
    own: dict[int, str] = {}
    name_images(own, zip((entry["image_id"] for entry in entries), names, strict=True), source)
    known = FileNames({key: name for key, name in images.items() if name}, where)
    found: dict[str, int] = {}
    for name in dict.fromkeys(own.values()):
        image_id = known.find(name)
        if image_id is None:
            raise InputError(
                f"{source}: {where} has no image {shortened(name)}; use the annotations of the images "
                "that were detected in"
            )
        found[name] = image_id
    moved = sum(found[name] != image_id for image_id, name in own.items())
    if moved:
        notes.append(
            f"{source}: images are found by file_name; the image_id of {moved} of {len(own)} images is "
            "another one than in the annotations"
        )
    for entry, name in zip(entries, names, strict=True):
        entry["image_id"] = found[name]


def _find_categories(
    entries: list[dict[str, Any]],
    names: Sequence[str],
    categories: Mapping[str, int],
    source: str,
    notes: list[str],
) -> tuple[list[dict[str, Any]], int]:
    """Returns the entries whose category the annotations have, with its id; and how many others there are."""
    ids = _ids_of(names, categories)
    if not any(category is not None for category in ids):
        raise InputError(
            f"{source}: no category_name, such as {names[0]!r}, is a category of the annotations; "
            f"{did_you_mean(names[0], list(categories))}"
        )
    kept = [
        {**entry, "category_id": category}
        for entry, category in zip(entries, ids, strict=True)
        if category is not None
    ]
    if any(entry["category_id"] != category for entry, category in zip(entries, ids, strict=True)):
        notes.append(f"{source}: categories are found by category_name; category_id numbers them otherwise")
    return kept, len(entries) - len(kept)


def _ids_of(names: Sequence[str], categories: Mapping[str, int]) -> list[int | None]:
    """Returns each name's category id, written with spaces or underscores; None: it has none."""
    known = {_spaced(name): category for name, category in categories.items()}
    return [known.get(_spaced(name)) for name in names]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def checked_result(entry: Any, where: str) -> dict[str, Any]:
    """Returns a result's image_id, category_id, bbox, score, and `area` where it is a mask without a box.

    Raises:
        InputError: one of them is missing.
    """
    needs = f"{where} needs image_id, category_id, bbox [x, y, width, height], score"
    if not isinstance(entry, dict):
        raise InputError(f"{needs}: it is not an object, found {quote(entry)}")
    fields: dict[str, Any] = {}
    for key in ("image_id", "category_id"):
        fields[key] = as_id(entry.get(key))
        if fields[key] is None:
            problem = f"{quote(entry[key], 40)} is no whole number" if key in entry else f"no {key!r}"
            raise InputError(f"{needs}: {problem}, found {quote(entry)}")
    try:
        fields |= {**_box_of(entry), "score": float(entry["score"])}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else shortened(str(error))
        raise InputError(f"{needs}: {missing}, found {quote(entry)}") from None
    if len(fields["bbox"]) != 4 or not is_in_pixels(*fields["bbox"]) or not math.isfinite(fields["score"]):
        raise InputError(f"{where} must have four finite box numbers and a finite score: {quote(entry)}")
    return fields


def _box_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry's bbox; else that around its mask, a run-length code, and the mask's area."""
    code = entry.get("segmentation")
    if "bbox" in entry or not isinstance(code, dict):
        return {"bbox": [float(value) for value in entry["bbox"]]}
    try:
        height, width = code["size"]
        runs = code["counts"] if isinstance(code["counts"], list) else runs_of(code["counts"])
        if not is_in_pixels(height, width) or sum(runs) != height * width or min(runs) < 0:
            raise ValueError
        code = mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        around = {"bbox": mask.toBbox(code).tolist(), "area": float(mask.area(code))}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(
            "no bbox, and the segmentation is not a run-length code with size and counts"
        ) from None
    return around


def runs_of(counts: Any) -> list[int]:
    """Returns the lengths in a compressed run-length code of COCO's; a code of garbage crashes its library.

    Numbers are written in pieces of five bits, the lowest first; a sixth bit says that a piece follows, and
    the last piece's highest bit is the sign. From the third on they are differences to the one before the
    last (pycocotools, maskApi.c).

    Raises:
        ValueError: it is cut off, or holds a character that no piece is written as.
    """
    if not isinstance(counts, str):
        raise TypeError(f"a run-length code is a text or a list, found {type(counts).__name__}")
    runs: list[int] = []
    value = place = 0
    for character in counts.encode("ascii"):
        piece = character - 48
        if not 0 <= piece < 64 or place > 60:
            raise ValueError("no run-length code")
        value |= (piece & 31) << place
        place += 5
        if not piece & 32:
            value -= (piece & 16) << 1 + place - 5
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    if place:
        raise ValueError("the run-length code is cut off")
    return runs


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
    new_ids = _ids_of(names, ids)
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
