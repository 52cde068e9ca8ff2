"""`detections.json` over a folder of generated images, as `regionclip detect` writes it.

`GOLDEN_WRITE=1 pytest tests/golden` writes the detections anew, for a change that means to move them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCORE, PIXELS = 1e-4, 0.02  # how far rounding may move a detection


def test_detection_gives_the_stored_entries(
    detected: list[dict[str, Any]], stored: Callable[..., Any]
) -> None:
    measured = [{**entry, "file_name": Path(entry["file_name"]).name} for entry in detected]
    expected = stored("detections", measured)
    assert len(measured) == len(expected)
    # Rounding decides the order of equal scores and which of them is an image's last; so each stored entry is
    # looked for among those of its name, and the last may be missing.
    lowest: dict[int, float] = {}
    for entry in expected:
        lowest[entry["image_id"]] = min(entry["score"], lowest.get(entry["image_id"], 1.0))
    found: dict[tuple[object, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in measured:
        found[_named(entry)].append(entry)
    for entry in expected:
        same = [other for other in found[_named(entry)] if _close(other, entry)]
        if same:
            found[_named(entry)].remove(same[0])
        else:
            assert entry["score"] < lowest[entry["image_id"]] + 2 * SCORE, entry


def test_entries_of_an_image_are_ordered_by_score(detected: list[dict[str, Any]]) -> None:
    ordered = sorted(detected, key=lambda entry: (entry["image_id"], -entry["score"]))
    assert detected == ordered


def _named(entry: dict[str, Any]) -> tuple[object, ...]:
    return tuple(entry[name] for name in ("image_id", "file_name", "category_id", "category_name"))


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    sides = zip(one["bbox"], other["bbox"], strict=True)
    return abs(one["score"] - other["score"]) < SCORE and all(abs(a - b) < PIXELS for a, b in sides)
