"""Label Studio: one JSON file with a list of tasks, in its format JSON or JSON-MIN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from clip_base.data.formats.instances import Instances, number_of, rotated
from clip_base.runtime.errors import InputError, note, quote
from clip_base.storage.files import read_json

LABELS = "rectanglelabels"


def read_label_studio(path: Path) -> dict[str, Any] | None:
    """Returns tasks with labeled rectangles in COCO's format; None when the file is no list of tasks.

    An image's name is the last part of its address, for local files what stands behind `?d=`. Sides are
    percent of the image, and a rectangle turns about its left upper corner; a rotated one becomes the
    upright box around it. Tasks without a rectangle do not say how large their image is; they are left out.

    Raises:
        InputError: a task is malformed, or was labeled by several annotators.
    """
    if path.is_dir() or path.suffix.lower() != ".json" or not _is_list(path):
        return None
    tasks, where = read_json(path, "annotations file"), f"annotations file {path}"
    if not tasks or not all(isinstance(task, dict) for task in tasks) or not any(map(_is_task, tasks)):
        return None
    instances, empty = Instances(where), 0
    for place, task in enumerate(tasks):
        here = f"{where}: task [{place}]"
        results = list(_results(task, here))
        if not results:
            empty += 1
            continue
        size = _size(results[0], here)
        image_id = instances.add_image(_file_name(task, here), size)
        for result in results:
            value = result.get("value", result)
            for name in value[LABELS]:
                instances.add_box(image_id, str(name), _corners(value, size, here), here)
    if empty:
        note(f"{path}: {empty:,} of {len(tasks):,} tasks hold no labeled rectangle and are left out")
    return instances.to_coco()


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _is_task(task: dict[str, Any]) -> bool:
    if "data" in task and isinstance(task.get("annotations", task.get("completions")), list):
        return True
    return "bbox" not in task and any(
        isinstance(value, list) and any(isinstance(one, dict) and LABELS in one for one in value)
        for value in task.values()
    )


def _results(task: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """Yields a task's labeled rectangles."""
    if "data" in task:
        given = task.get("annotations") or ()
        if not isinstance(given, list | tuple) or not all(isinstance(one, dict) for one in given):
            raise InputError(f"{place}: annotations must be a list of objects, found {quote(given)}")
        labeled = [one["result"] for one in given if one.get("result") and not one.get("was_cancelled")]
        if len(labeled) > 1:
            raise InputError(
                f"{place} was labeled by {len(labeled)} annotators; export one annotation per task"
            )
        found = labeled[0] if labeled else []
    else:
        found = [one for value in task.values() if isinstance(value, list) for one in value]
    if not isinstance(found, list):
        raise InputError(f"{place}: result must be a list, found {quote(found)}")
    for result in found:
        value = result.get("value", result) if isinstance(result, dict) else None
        if isinstance(value, dict) and isinstance(value.get(LABELS), list):
            yield result


def _size(result: dict[str, Any], place: str) -> tuple[int, int]:
    height, width = (
        int(number_of(result.get(key), place, key)) for key in ("original_height", "original_width")
    )
    return height, width


def _corners(value: dict[str, Any], size: tuple[int, int], place: str) -> tuple[float, ...]:
    height, width = size
    x, y, w, h = (number_of(value.get(key), place, key) for key in ("x", "y", "width", "height"))
    corners = (x * width / 100, y * height / 100, (x + w) * width / 100, (y + h) * height / 100)
    degrees = number_of(value.get("rotation", 0), place, "rotation")
    return rotated(corners, degrees, (corners[0], corners[1])) if degrees else corners


def _file_name(task: dict[str, Any], place: str) -> str:
    data = task.get("data", task)
    image = data.get("image") if isinstance(data, dict) else None
    if not isinstance(image, str) and isinstance(data, dict):
        texts = [value for value in data.values() if isinstance(value, str)]
        image = texts[0] if len(texts) == 1 else None
    if not isinstance(image, str):
        raise InputError(f"{place} needs an 'image', found {quote(data)}")
    address = urlsplit(image)
    local = parse_qs(address.query).get("d")
    return local[0].lstrip("/") if local else unquote(address.path).rsplit("/", 1)[-1]
