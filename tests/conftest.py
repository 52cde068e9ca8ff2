"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests start processes beside each other; OpenMP threads that spin would slow them all down manyfold. Torch
# reads this when it is imported, and what the tests start inherits it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and captions; tests that use it are skipped where it is absent."""
    folder = Path(os.environ.get("REGIONCLIP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real photographs here; set REGIONCLIP_TEST_DATA to their folder")
    return folder
