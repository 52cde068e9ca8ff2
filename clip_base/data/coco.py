"""Entries of COCO's JSON files, validated in one place for all readers of both packages.

Files in the wild write numbers as texts and as fractions: `"id": "7"`, `"image_id": 7.0`, `"iscrowd": "0"`.
What has one meaning is taken for it, in all entries alike, so that ids still meet; everything else is an
error that names the file, the entry and what it needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from clip_base.jobs import plugins
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.files import existing, is_file, read_json
from clip_base.storage.hashing import text_hash
from clip_base.storage.tables import EXACT, as_number

ANNOTATION_FORMATS = "clip_base.annotation_formats"
AnnotationFormat = Callable[[Path], dict[str, Any] | None]
# A form's lists, and what must be a whole number in each one's entries.
INSTANCES = {"images": ("id",), "annotations": ("image_id", "category_id"), "categories": ("id",)}
CAPTIONS = {"images": ("id",), "annotations": ("image_id",)}
_FOREIGN = (".xml", ".yaml", ".yml", ".txt", ".csv", ".tsv")  # files that are never COCO's JSON
_CROWD = {0: False, 1: True, "0": False, "1": True, None: False}
_TOO_LARGE = 1 << 63  # ids are 64-bit numbers in Parquet, SQLite and tensors
LARGEST = 1e7  # pixels: no image has a longer side, and no box a larger number


def read_instances(path: str | Path) -> dict[str, Any]:
    """Reads annotations in COCO's instances form, see `check_instances`, or in another known format.

    Every job reads its annotations here, so that a format of another package serves all of them. Such a
    format is a function in the group `clip_base.annotation_formats`: of a path, it returns the content in
    COCO's format, or None when the file is not of its format.

        [project.entry-points."clip_base.annotation_formats"]
        via = "my_package.via:read_via"

    Args:
        path: a file or a folder; what stands behind a `#` is for the format, such as a split's name.

    Raises:
        InputError: the file is missing, malformed, or of no known format.
    """
    where, named = f"annotations file {path}", Path(path)
    file = named if named.exists() else Path(str(path).partition("#")[0])
    existing(file, "annotations file")
    for name in plugins.found(ANNOTATION_FORMATS):
        reader: AnnotationFormat = plugins.load(ANNOTATION_FORMATS, name)
        content = reader(named)
        if content is not None:
            return check_instances(content, f"{where} ({name})")
    if file.is_dir() or file.suffix.lower() in _FOREIGN:
        known = ", ".join(plugins.found(ANNOTATION_FORMATS))
        raise InputError(f"{where} is of no known format; known are COCO's JSON and {known}")
    return check_instances(read_json(path, "annotations file"), where)


def annotation_inputs(config: Any, *keys: str) -> dict[str, Path | str]:
    """Returns the annotations that some options name, but the empty ones: `RunFolder`'s `inputs`.

    A file counts by its bytes; a folder, or a part that is named behind a `#`, by what is read of it.

    Raises:
        InputError: see `read_instances`.
    """
    named = {key: str(getattr(config, key)) for key in keys}
    return {
        key: Path(value) if is_file(value) else text_hash([json.dumps(read_instances(value))])
        for key, value in named.items()
        if value
    }


def check_instances(content: Any, where: str) -> dict[str, Any]:
    """Returns a file's content with three lists of objects whose ids are whole numbers, see `checked_entry`.

    Raises:
        InputError: it is not in COCO's instances form, or an id belongs to two images; the entry is named.
    """
    if not isinstance(content, dict):
        hint = "; that is the form of a results file" if isinstance(content, list) else ""
        raise InputError(f"{where} must be an object with images, annotations, categories{hint}")
    lists = _lists(content, where, "instances", INSTANCES)
    names: dict[int, Any] = {}
    for entry in lists["images"]:
        name = entry.get("file_name")  # which evaluation does without
        if names.setdefault(entry["id"], name) != name:
            raise two_images(where, entry["id"], names[entry["id"]], name)
    return content | lists


def read_captions(path: str | Path) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Reads COCO captions: (image id -> captions, image id -> file name); white space becomes single spaces.

    Raises:
        InputError: the file is missing or malformed, an id belongs to two images, or a caption's image is not
            listed.
    """
    where = f"captions file {path}"
    content = read_json(path, "captions file")
    if not isinstance(content, dict) or not all(key in content for key in CAPTIONS):
        raise InputError(
            f"{where} is not in COCO's format: it must have 'images' and 'annotations' at the top level"
        )
    lists = _lists(content, where, "captions", CAPTIONS)
    names = image_names(lists["images"], where)
    captions: dict[int, list[str]] = {}
    for place, entry in enumerate(lists["annotations"]):
        text = " ".join(caption_of(entry, f"{where}: annotations[{place}]").split())
        if text:
            captions.setdefault(entry["image_id"], []).append(text)
    strangers = [key for key in captions if key not in names]
    if strangers:
        raise unlisted(where, len(strangers), strangers[0])
    return captions, names


def _lists(
    content: dict[str, Any], where: str, form: str, ids: Mapping[str, Sequence[str]]
) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for key, needed in ids.items():
        value = content.get(key)
        if not isinstance(value, list):
            problem = f"{key!r} is a {type(value).__name__}" if key in content else f"there is no {key!r}"
            raise InputError(f"{where} is not in COCO's {form} format: {problem}, a list is needed")
        found[key] = [
            entry if _is_plain(entry, needed) else checked_entry(entry, f"{where}: {key}[{place}]", needed)
            for place, entry in enumerate(value)
        ]
    return found


def checked_entry(entry: Any, where: str, ids: Sequence[str]) -> dict[str, Any]:
    """Returns an entry with whole numbers for its ids and 0 or 1 for `iscrowd`, where it has one.

    Args:
        entry: what stands in the file.
        where: the file and the entry, for messages.
        ids: the keys that must hold ids.

    Raises:
        InputError: it is no object, an id is no whole number or too large, or `iscrowd` is neither 0 nor 1.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object: {quote(entry)}")
    fixed = dict(entry)
    for key in ids:
        number = as_id(entry.get(key))
        if number is None:
            large = isinstance(entry.get(key), int | float) and abs(entry[key]) >= EXACT
            hint = " below 2 to the power of 63" if large else ""
            raise InputError(f"{where} needs a whole number{hint} {key!r}, found {_shown(entry)}")
        fixed[key] = number
    if "iscrowd" in entry:
        fixed["iscrowd"] = int(is_crowd(entry, where))
    return fixed


def _is_plain(entry: Any, ids: Sequence[str]) -> bool:
    """Whether an entry is as COCO's own, so that nothing needs to be done; of 860,000, most are."""
    if not isinstance(entry, dict):
        return False
    for key in ids:
        if not is_id(entry.get(key)):
            return False
    crowd = entry.get("iscrowd", 0)
    return type(crowd) is int and 0 <= crowd <= 1


def coco_entry(
    image_id: int,
    category_id: int,
    box: Sequence[float],
    score: float | None = None,
    digits: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Returns the entry of a box for a file of annotations or of results.

    Args:
        image_id: the image's id in the annotations.
        category_id: the category's.
        box: (left, top, width, height) in pixels.
        score: of a result, in [0, 1]; None: the entry is an annotation.
        digits: decimal places of the box; None: as it is.
        more: what else the entry holds, such as `area`.
    """
    sides = [float(side) if digits is None else round(float(side), digits) for side in box]
    entry = {"image_id": int(image_id), "category_id": int(category_id), "bbox": sides, **more}
    return entry if score is None else {**entry, "score": score}


def is_id(value: Any) -> TypeGuard[int]:
    """Whether `value` is a whole number of 64 bits, as COCO's ids are."""
    return isinstance(value, int) and not isinstance(value, bool) and -_TOO_LARGE <= value < _TOO_LARGE


def as_id(value: Any) -> int | None:
    """Returns the id that 7, 7.0 and "7" stand for; None for what stands for none."""
    number = as_number(value)
    return number if is_id(number) else None


def is_crowd(entry: dict[str, Any], where: str) -> bool:
    """Whether an annotation surrounds many objects; InputError when its `iscrowd` is neither 0 nor 1."""
    value = entry.get("iscrowd")
    if not isinstance(value, int | float | str | None) or value not in _CROWD:
        raise InputError(f"{where}: 'iscrowd' must be 0 or 1, found {_shown(entry)}")
    return _CROWD[value]


def is_in_pixels(*numbers: float) -> bool:
    """Whether all numbers are finite, and none is larger than pixels' are in any image."""
    return all(abs(number) <= LARGEST for number in numbers)  # false for NaN


def box_of(entry: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    """Returns an annotation's box as x, y, width, height; InputError unless it has four finite numbers."""
    try:
        sides = () if isinstance(entry["bbox"], str) else entry["bbox"]
        x, y, width, height = (float(value) for value in sides)
    except (KeyError, TypeError, ValueError, OverflowError):
        x = y = width = height = math.nan
    if not is_in_pixels(x, y, width, height):
        raise InputError(
            f"{where} needs a 'bbox' of four finite numbers [x, y, width, height], none beyond {LARGEST:.0f} "
            f"pixels, found {_shown(entry)}"
        )
    return x, y, width, height


def area_of(entry: dict[str, Any], where: str) -> float | None:
    """Returns the area that an annotation states, None when it states none; InputError for no number."""
    if entry.get("area") is None:
        return None
    try:
        area = float(entry["area"])
    except (TypeError, ValueError, OverflowError):
        area = math.nan
    if not 0 <= area < math.inf:
        raise InputError(
            f"{where}: 'area' must be a number of square pixels, found {quote(entry['area'])}; "
            "correct it or leave it out"
        )
    return area


def file_name_of(entry: dict[str, Any], where: str) -> str:
    """Returns an image's file name; LVIS gives it as the end of a URL only.

    A name that no file can have, with NUL or half a surrogate pair, comes back with these escaped: its image
    is one that does not exist, and costs only itself.

    Raises:
        InputError: there is none.
    """
    name = entry.get("file_name")
    if name is None and isinstance(entry.get("coco_url"), str):
        name = "/".join(entry["coco_url"].split("/")[-2:])  # train2017/000000000009.jpg
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where} needs a 'file_name', found {_shown(entry)}")
    return name.replace("\0", "\\x00").encode(errors="backslashreplace").decode()


def image_names(entries: Sequence[dict[str, Any]], where: str) -> dict[int, str]:
    """Returns image id -> file name of checked entries; InputError when an id belongs to two images."""
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        name = file_name_of(entry, f"{where}: images[{place}]")
        if names.setdefault(entry["id"], name) != name:  # an entry may stand twice
            raise two_images(where, entry["id"], names[entry["id"]], name)
    return names


def stated_size(entry: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Returns an image's (height, width); None when it states none, InputError when they are no sizes."""
    if entry.get("height") is None or entry.get("width") is None:
        return None
    height, width = as_id(entry["height"]), as_id(entry["width"])
    if not height or not width or min(height, width) < 1:
        raise InputError(f"{where} needs a 'height' and a 'width' of at least 1, found {_shown(entry)}")
    return height, width


def two_images(where: str, image_id: int, first: object, second: object) -> InputError:
    """Returns the error of an id that belongs to two images."""
    return InputError(
        f"{where}: image id {image_id} is used for both {shortened(str(first))} and "
        f"{shortened(str(second))}; give every image its own id"
    )


def category_name(entry: dict[str, Any], where: str, known: Mapping[int, str]) -> str:
    """Returns a category's name, white space as single spaces.

    Raises:
        InputError: it has none, or its id or name is known already.
    """
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where} needs a 'name', found {_shown(entry)}")
    name = " ".join(name.split())
    if entry["id"] in known:
        both = f"{quote(known[entry['id']])} and {quote(name)}"
        raise InputError(f"{where}: category id {entry['id']} is used for both {both}")
    if name in known.values():
        raise InputError(f"{where}: two categories are called {quote(name)}; merge them or rename one")
    return name


def caption_of(entry: dict[str, Any], where: str) -> str:
    """Returns an annotation's caption; InputError when it has none."""
    text = entry.get("caption")
    if not isinstance(text, str):
        raise InputError(f"{where} needs a 'caption', which must be a text, found {_shown(entry)}")
    return text


def unlisted(where: str, count: int, image_id: int) -> InputError:
    """Returns the error of captions whose images a file does not list."""
    return InputError(
        f"{where} has captions for {count} images that it does not list (image_id {image_id}, for one); "
        "add them to 'images' or remove the captions"
    )


def _shown(entry: dict[str, Any]) -> str:
    # A polygon does not identify its entry.
    return quote({key: value for key, value in entry.items() if key != "segmentation"})
