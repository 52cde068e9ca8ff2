"""Twenty seeded steps of region-text pretraining, of the proposal network and of the detector: stored losses.

`GOLDEN_WRITE=1 pytest tests/golden` writes the losses anew, for a change that means to move them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("run", "losses"),
    [
        ("pretrained", ("distillation", "region_text", "image_text")),
        ("proposal_network", ("objectness", "box")),
        ("detector", ("classification", "box")),
    ],
)
def test_twenty_steps_give_the_stored_losses(
    run: str,
    losses: tuple[str, ...],
    logged: Callable[[Path], dict[str, list[float]]],
    stored: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    measured = logged(request.getfixturevalue(run))
    expected = stored(run, measured)
    assert set(losses) <= set(expected)
    for name, values in expected.items():
        assert len(values) == 20
        # Other processors round differently, which each step magnifies; the first loss knows nothing of it.
        assert measured[name][0] == pytest.approx(values[0], rel=3e-5, abs=1e-6), name
        assert measured[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
