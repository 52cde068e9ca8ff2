from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rounds", BENCHMARKS / "rounds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rounds", module)
    spec.loader.exec_module(module)
    return module


def test_rivals_alternate_and_the_first_round_does_not_count(rounds: ModuleType) -> None:
    calls: list[str] = []
    rivals = {name: (lambda name=name: calls.append(name)) for name in ("ours", "peer", "fast")}
    seconds = rounds.alternate(rivals, 2)
    assert calls == ["ours", "peer", "fast", "peer", "fast", "ours", "fast", "ours", "peer"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"ours": 2, "peer": 2, "fast": 2}


def test_a_row_holds_the_median_ratio_of_the_rounds_and_their_spread(rounds: ModuleType) -> None:
    (row,) = rounds.compare(
        "task", "images/s", 10, {"ours": [1.0, 2.0, 1.0], "peer": [2.0, 6.0, 5.0]}, "note"
    )
    assert (row.ours, row.theirs, row.ratio) == (10.0, 2.0, 3.0)
    table = rounds.markdown([row]).splitlines()
    assert table[2] == "| task | peer | 10 images/s | 2 images/s | **3.00** | 2.00 to 5.00 | note |"
    assert len({line.count("|") for line in table}) == 1


def test_a_table_goes_between_its_marks_and_nowhere_else(rounds: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- clip: begin -->\nold\n<!-- clip: end -->\nb\n")
    rounds.put(page, "clip", "new")
    assert page.read_text() == "a\n<!-- clip: begin -->\nnew\n<!-- clip: end -->\nb\n"
    with pytest.raises(SystemExit, match="lacks the lines"):
        rounds.put(page, "other", "new")


def test_each_kind_of_processor_keeps_its_own_table(rounds: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- rivals: begin -->\n<!-- rivals: end -->\nb\n")
    for kind, text in (("Zen 5", "five"), ("Zen 3", "old"), ("Zen 3", "three")):
        rounds.put_kind(page, "rivals", kind, text)
    section = "### Zen 3\n\nthree\n\n### Zen 5\n\nfive"
    assert page.read_text() == f"a\n<!-- rivals: begin -->\n{section}\n<!-- rivals: end -->\nb\n"
    assert " cores" not in rounds.processor()


def test_the_command_names_no_folder_of_this_machine(
    rounds: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/benchmarks/clip.py", "--photos", "/home/me/val", "--quick"])
    assert rounds.command() == "python benchmarks/clip.py --photos …/val --quick"
    assert " cores (" in rounds.machine(2)


def test_the_page_has_the_sections_that_the_scripts_write() -> None:
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count("<!-- clip: begin -->") == page.count("<!-- clip: end -->") == 1
