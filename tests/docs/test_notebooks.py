"""Each notebook runs from top to bottom in an empty folder, on what it draws or the package ships."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"image/png", "image/jpeg"}
LARGEST = 300_000  # bytes: a page that opens at once, a diff that can be read


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_the_five_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "detect_with_your_own_words",
        "evaluate",
        "mine_and_look_at_pairs",
        "photographs",
        "zero_shot_classification",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(
    path: Path, tmp_path: Path, clip_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTS", str(clip_file))  # in the place of a published name
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert any(PICTURES & set(output.get("data", {})) for output in outputs(notebook))
    assert os.listdir(tmp_path)  # what it makes goes to the temporary folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_small_outputs(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert any(PICTURES & set(output.get("data", {})) for output in outputs(notebook))
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert path.stat().st_size < LARGEST
    text = path.read_text()
    assert not re.search(r"/(root|home|work|Users)/", text), "a path of the machine it was made on"
