"""Validation of Parquet tables of regions.

A table that another program wrote, or that was damaged, may hold boxes of NaN, probabilities of 7 or lists of
unequal length; they would go through training and come out in exports.
"""

# n rows of a table
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clip_base.data.coco import LARGEST
from clip_base.runtime.errors import InputError, quote

Mask = NDArray[np.bool_]
SLACK = 0.01  # of an image's side: how far a box may leave it

# Which region of which image: mined ones have these columns, described ones (`features`) too.
REGION_COLUMNS = [
    ("image_id", pa.int64()),
    ("file_name", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("box", pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 in pixels of the original image
    ("objectness", pa.float32()),
]


@dataclass(frozen=True)
class Rule:
    """What every row of a table must hold.

    Attributes:
        column: which is shown when one does not.
        wanted: in words, for the message.
        holds: [n] bool, for each row of a table.
    """

    column: str
    wanted: str
    holds: Callable[[pa.Table], Mask]


def require_rows(
    table: pa.Table, rules: Sequence[Rule], where: str, first: int = 0, optional: Sequence[str] = ()
) -> None:
    """Checks all rows at once: no column but the optional ones is null anywhere, and the rules hold.

    Args:
        table: n rows.
        rules: looked at in their order; a rule may rely on those before it.
        where: the file's name for the message, such as "shard FILE".
        first: the number of the table's first row in the file.
        optional: columns that may be null.

    Raises:
        InputError: a row that is not as it must be; the file, the row, the column and the value are told.
    """
    for name in table.column_names:
        if name not in optional and table[name].null_count:
            wanted = next((rule.wanted for rule in rules if rule.column == name), "given in every row")
            valid = pc.is_valid(table[name]).to_numpy()
            _refuse(table, name, wanted, valid, where, first)
    for rule in rules:
        held = rule.holds(table)
        if not held.all():
            _refuse(table, rule.column, rule.wanted, held, where, first)


def _refuse(table: pa.Table, column: str, wanted: str, held: Mask, where: str, first: int) -> None:
    row = int(np.argmin(held))
    found = quote(table[column][row].as_py())
    raise InputError(
        f"{where}, row {first + row}: {column} must be {wanted}, found {found}; was the file changed or "
        "damaged? Write it again"
    )


def numbers(table: pa.Table, column: str) -> NDArray[np.float64]:
    """Returns a column of numbers, [n], or of lists of four, [n, 4]; a null inside a list is NaN."""
    values = table[column].combine_chunks()
    if pa.types.is_fixed_size_list(values.type):
        flat = values.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, np.float64).reshape(-1, values.type.list_size)
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def is_box(table: pa.Table) -> Mask:
    """Whether `box` is four finite numbers x1 ≤ x2, y1 ≤ y2 that pixels can be."""
    boxes = numbers(table, "box")
    with np.errstate(invalid="ignore"):
        inside = np.all(np.abs(boxes) <= LARGEST, axis=1)  # False for NaN and infinity
        ordered: Mask = inside & np.all(boxes[:, 2:] >= boxes[:, :2], axis=1)
    return ordered


def is_share(column: str) -> Callable[[pa.Table], Mask]:
    """Returns whether a column's numbers are in [0, 1]."""

    def holds(table: pa.Table) -> Mask:
        values = numbers(table, column)
        inside: Mask = (values >= 0) & (values <= 1)  # False for NaN
        return inside

    return holds


def is_size(column: str) -> Callable[[pa.Table], Mask]:
    """Returns whether a column's numbers are sides of images: at least 1."""

    def holds(table: pa.Table) -> Mask:
        values = numbers(table, column)
        inside: Mask = (values >= 1) & (values <= LARGEST)
        return inside

    return holds


def all_in(column: str, least: float, most: float) -> Callable[[pa.Table], Mask]:
    """Returns whether all numbers of a column's lists are in [least, most]; null is not."""

    def holds(table: pa.Table) -> Mask:
        lists = table[column].combine_chunks()
        values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float64)
        rows = pc.list_parent_indices(lists).to_numpy()
        held = np.ones(len(lists), bool)
        held[rows[~((values >= least) & (values <= most))]] = False
        return held

    return holds


def equally_long(first: str, second: str) -> Callable[[pa.Table], Mask]:
    """Returns whether a row's lists in two columns have as many entries as each other."""

    def holds(table: pa.Table) -> Mask:
        lengths = (pc.list_value_length(table[name]).to_numpy() for name in (first, second))
        equal: Mask = np.equal(*lengths)
        return equal

    return holds


BOX = Rule("box", f"four numbers x1 ≤ x2, y1 ≤ y2 in pixels, at most {LARGEST:.0f}", is_box)
OBJECTNESS = Rule("objectness", "in 0…1 (apply a sigmoid if these are logits)", is_share("objectness"))
SIZES = [Rule(side, "at least 1 pixel", is_size(side)) for side in ("height", "width")]


def in_image(table: pa.Table) -> Mask:
    """Whether `box` is in its image, up to a pixel and a hundredth of the image's sides."""
    boxes = numbers(table, "box")
    ends = np.stack([numbers(table, "width"), numbers(table, "height")], 1)  # [n, 2]
    slack = 1 + SLACK * ends
    inside: Mask = np.all((boxes[:, :2] >= -slack) & (boxes[:, 2:] <= ends + slack), axis=1)
    return inside


IN_IMAGE = Rule("box", "inside its image", in_image)
