"""Plausibility checks of a results file: boxes in another format, another order of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regionclip.data.box_format import other_forms
from regionclip.data.results import numbered_by

Entries = list[dict[str, Any]]
Measure = Callable[[Entries], float]  # AP50 of results


def box_note(
    entries: Entries, sizes: Mapping[int, tuple[int, int]], ap50: float, measure: Measure
) -> str | None:
    """Returns what to say when boxes fit the ground truth better in another form than COCO's; None: nothing.

    Args:
        entries: results, boxes read for x, y, width, height in pixels.
        sizes: (height, width) of each image, by id.
        ap50: what they give.
        measure: measures other boxes.
    """
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    limits = np.array([sizes[entry["image_id"]] for entry in entries], dtype=np.float64).reshape(-1, 2)
    found = {
        form: measure([{**entry, "bbox": box} for entry, box in zip(entries, pixels.tolist(), strict=True)])
        for form, pixels in other_forms(boxes, limits).items()
    }
    best = max(found, key=found.__getitem__, default="")
    if best and found[best] > ap50:
        return (
            f"the boxes seem to be {best}: read so, AP50 is {found[best]:.4f} instead of {ap50:.4f}; results "
            "in COCO's format have x, y, width, height in pixels"
        )
    negative = int((boxes[:, 2:] < 0).any(1).sum())
    return f"{negative} of {len(boxes)} boxes have negative sides and fit nothing" if negative else None


def order_note(
    entries: Entries,
    names: Sequence[str],
    first: int,
    ids: Mapping[str, int],
    ap50: float,
    measure: Measure,
) -> str:
    """Returns in which order a class list was counted, and whether the annotations' order fits better.

    Args:
        entries: results with the numbers of the file.
        names: the class list.
        first: the number of its first class.
        ids: the annotations' category ids by name, in order of id.
        ap50: what the list's order gives.
        measure: measures results with the annotations' numbers.
    """
    counted = ", ".join(f"{number} is {name!r}" for number, name in enumerate(names[:3], first))
    taken = f"category ids count the class list in its own order: {counted} …"
    place = {name.replace("_", " "): rank for rank, name in enumerate(ids)}
    ordered = sorted(names, key=lambda name: place.get(name.replace("_", " "), len(place)))
    if ordered == list(names):
        return taken
    other = measure(numbered_by(entries, ordered, first, ids))
    if other <= ap50:
        return taken
    return (
        f"{taken}; in the order of the annotations' categories ({first} is {ordered[0]!r}) AP50 is "
        f"{other:.4f} instead of {ap50:.4f}: give the list in the order that the numbers count"
    )
