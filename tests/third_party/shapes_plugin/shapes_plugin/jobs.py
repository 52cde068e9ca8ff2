"""A job that counts images by their shape."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clip_base.images.decode import decode
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.run import RunFolder
from clip_base.storage.files import existing


@dataclass
class CountShapesConfig:
    """Options of counting."""

    images: str = option(REQUIRED, "folder of pictures")
    out: str = option(REQUIRED, "folder for metrics.json", runtime_only=True)
    tolerance: float = option(0.1, "how far a square's sides may differ, as a share of the longer one")


def count_shapes(config: CountShapesConfig) -> None:
    """Counts images that are wide, tall and square."""
    run = RunFolder(config.out, config, "count-shapes")
    counts: Counter[str] = Counter()
    for path in sorted(existing(config.images, "images folder").glob("*.png")):
        counts[shape(Path(path), config.tolerance)] += 1
    run.finish(dict(counts))
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def shape(path: Path, tolerance: float) -> str:
    """Returns wide, tall or square."""
    height, width = decode(path).shape[:2]
    if abs(height - width) <= tolerance * max(height, width):
        return "square"
    return "wide" if width > height else "tall"
