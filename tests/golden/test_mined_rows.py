"""The rows that mining a generated dataset gives, by matcher: boxes, concepts and their probabilities.

`GOLDEN_WRITE=1 pytest tests/golden` writes the rows anew, for a change that means to move them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

COLUMNS = ["image_id", "file_name", "height", "width", "objectness", "concept", "phrase"]


def rows_of(mined: Path) -> list[dict[str, Any]]:
    """Returns a mined folder's rows in the order of the shards; probabilities by concept, zeros left out."""
    rows = []
    for shard in sorted(mined.glob("*.parquet")):
        for row in pq.read_table(shard).to_pylist():
            pairs = zip(row.pop("concept_ids"), row["concept_probs"], strict=True)
            assert row["concept_probs"] == sorted(row.pop("concept_probs"), reverse=True)
            probabilities = {str(concept): round(value, 5) for concept, value in pairs if value > 0}
            first = next(iter(probabilities))
            kept = {name: row[name] for name in COLUMNS}
            box = [round(side, 2) for side in row["box"]]
            mass, name = round(row["kept_mass"], 6), int(first)
            rows.append(
                {**kept, "box": box, "kept_mass": mass, "first_id": name, "probabilities": probabilities}
            )
    return rows


def region(row: dict[str, Any]) -> tuple[object, ...]:
    return (row["file_name"], *row["box"])


def close(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two lists of concepts agree; rounding may decide which of two equal ones is the last."""
    least = min(one.values()), min(other.values())
    pairs = [(one.get(key, least[0]), other.get(key, least[1])) for key in one.keys() | other.keys()]
    return len(one) == len(other) and all(abs(a - b) < 1e-4 for a, b in pairs)


@pytest.mark.parametrize("matcher", ["pool", "caption", "hybrid"])
def test_mining_gives_the_stored_rows(
    matcher: str, mine: Callable[[str], Path], stored: Callable[..., Any]
) -> None:
    measured = rows_of(mine(matcher))
    content = stored(f"mined_{matcher}", measured)
    expected = {region(row): row for row in content}
    names = {row["first_id"]: row["concept"] for row in content}
    assert [row["image_id"] for row in measured] == [row["image_id"] for row in content]
    assert sorted(map(region, measured)) == sorted(expected)
    for row in measured:
        other = expected[region(row)]
        for name in ("image_id", "height", "width"):
            assert row[name] == other[name], name
        for name in ("objectness", "kept_mass"):
            assert row[name] == pytest.approx(other[name], abs=1e-4), name
        assert close(row["probabilities"], other["probabilities"]), (row, other)
        assert row["concept"] == names[row["first_id"]]
        if row["first_id"] == other["first_id"]:  # else two were equal but for rounding
            assert row["phrase"] == other["phrase"]
