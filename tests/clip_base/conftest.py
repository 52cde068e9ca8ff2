"""Fixtures of the tests of the base package."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; tests that use it are skipped where none can be mounted."""
    folder = tmp_path / "tiny_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    # Lazily: weights that were read from it may still be mapped into memory.
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve small pictures, `0.png` to `11.png`, each of one colour with a bright square."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        pixels = np.full((40, 48, 3), (20 * index, 255 - 20 * index, 60), np.uint8)
        pixels[10:20, 3 * index : 3 * index + 10] = 255
        cv2.imwrite(str(folder / f"{index}.png"), pixels)
    return folder
