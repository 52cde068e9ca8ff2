"""Names come from data: none of them becomes a formula in a spreadsheet, in any CSV file that is written."""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.evaluation.tables import to_csv
from clip_base.storage.tables import TableWriter

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd", "'+cmd"),
        ("-cat", "'-cat"),
        ("@user", "'@user"),
        ("\t=1", "'\t=1"),
        ("-1.5", "-1.5"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_text_that_a_spreadsheet_would_compute_is_escaped(cell: str, written: str) -> None:
    text = io.StringIO()
    TableWriter(text).writerow([cell, -2])
    assert next(csv.reader(io.StringIO(text.getvalue()))) == [written, "-2"]
    assert list(csv.reader(io.StringIO(to_csv([{cell: cell}])))) == [[written], [written]] or not cell


def test_detections_of_a_class_that_is_a_formula(
    world: Path, detector_file: Path, regionclip: Command, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("=cup\n@star\n")
    given = [f"weights={detector_file}", f"vocabulary={tmp_path / 'names.txt'}", "draw=false"]
    assert regionclip("detect", world / "images" / "train", *given, f"out={tmp_path / 'out'}")[0] == 0
    rows = list(csv.DictReader((tmp_path / "out" / "detections.csv").open()))
    assert {row["category_name"] for row in rows} <= {"'=cup", "'@star"}
    assert rows


@pytest.mark.parametrize("package", ["clip_base", "regionclip"])
def test_nothing_else_writes_csv(package: str) -> None:
    writers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("writer", "DictWriter")
    }
    assert writers <= {"clip_base/storage/tables.py"}
