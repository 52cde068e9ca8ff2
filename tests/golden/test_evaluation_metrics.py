"""`metrics.json` of three evaluations: a stored results file, a CLIP's and a detector's names for true boxes.

`GOLDEN_WRITE=1 pytest tests/golden` writes the metrics anew, for a change that means to move them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parent / "data" / "results.json"
EvaluateJob = Callable[..., dict[str, float]]


def require_stored(measured: dict[str, float], expected: dict[str, float]) -> None:
    """Compares the metrics that are stored; an evaluation may have learned further ones since."""
    assert {name: measured.get(name) for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_stored_results_file_gives_the_stored_metrics(
    evaluate: EvaluateJob, stored: Callable[..., Any]
) -> None:
    measured = evaluate("results", results=RESULTS)
    require_stored(measured, stored("metrics_of_results", measured))


def test_naming_the_true_boxes_gives_the_stored_metrics(
    evaluate: EvaluateJob, clip_file: Path, stored: Callable[..., Any]
) -> None:
    measured = evaluate("truth", weights=clip_file, boxes="truth")
    require_stored(measured, stored("metrics_of_true_boxes", measured))


def test_detections_in_the_true_boxes_give_the_stored_metrics(
    evaluate: EvaluateJob, detector_file: Path, stored: Callable[..., Any]
) -> None:
    measured = evaluate("suppressed", weights=detector_file, boxes="truth_suppressed")
    expected = stored("metrics_of_detections", measured)
    require_stored(measured, expected)
    assert expected["AP50_novel"] > 0
