from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pretraining_tasks

    yield pretraining_tasks
    for name in ("pretraining_tasks", "rounds"):
        sys.modules.pop(name, None)


def curve(*heights: float) -> dict[str, Any]:
    places = range(100, 100 * len(heights) + 1, 100)
    seconds = [place / 50 for place in places]
    versions = {"machine": "a processor", "versions": "torch 9"}
    return {"images": list(places), "seconds": seconds, "accuracy": list(heights), **versions}


def test_images_for_an_accuracy_are_interpolated_where_it_is_first_reached(tasks: Any) -> None:
    rising = curve(0.2, 0.4, 0.3, 0.5)
    assert tasks.needed(rising, 0.1) == pytest.approx(50)
    assert tasks.needed(rising, 0.35) == pytest.approx(175)
    assert tasks.needed(rising, 0.45, "seconds") == pytest.approx(7.5)
    assert tasks.needed(rising, 0.6) is None


def test_ratios_compare_equal_accuracies_seed_by_seed(tasks: Any) -> None:
    slow = {0: curve(0.1, 0.2, 0.3, 0.4), 1: curve(0.2, 0.4, 0.4, 0.4)}
    fast = {0: curve(0.4, 0.8, 0.8, 0.8), 1: curve(0.4, 0.4, 0.4, 0.4), 2: curve(1.0)}
    found = {"captioning": slow, "bag_of_words": fast}
    # Nine tenths of 0.4 are reached at 360 and 180 images, and at 90.
    assert tasks.ratios(found, "captioning", "bag_of_words", "images") == pytest.approx([4.0, 2.0])
    assert tasks.ratios(found, "captioning", "bag_of_words", "seconds") == pytest.approx([4.0, 2.0])
    low = {0: curve(0.1, 0.12), 1: curve(0.1, 0.12), 2: curve(0.1, 0.12)}
    assert (
        tasks.ratios({"captioning": low, "bag_of_words": fast}, "captioning", "bag_of_words", "images") == []
    )
    report = tasks.report(found)
    assert "| captioning, against bag of words | 3 (2 to 4) | 3 (2 to 4) | 3 |" in report
