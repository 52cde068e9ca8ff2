"""Fixtures of the tests of the evaluation job."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def options(world: Path) -> list[str]:
    return [
        f"annotations={world / 'instances_val.json'}",
        f"images={world / 'images'}",
        f"split={world / 'split.json'}",
        "resize.short=[64]",
        "resize.long=64",
        "precision=fp32",
    ]
