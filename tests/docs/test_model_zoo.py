"""The table of published files says what the code knows of them, and nothing else."""

from __future__ import annotations

from pathlib import Path

from clip_base.models import zoo
from clip_base.weights.fetching import download

PAGE = Path(__file__).parents[2] / "docs" / "model_zoo.md"
MEBIBYTE = 1 << 20


def rows() -> dict[str, str]:
    """Returns the table's row of every published file, by name."""
    made = {}
    for name, file in download.files().items():
        size = f"{file.size / MEBIBYTE:,.0f} MiB" if file.size else "–"
        checksum = f"`{file.sha256[:12]}…`" if file.sha256 else "–"
        place = file.url if file.page else file.name
        made[name] = f"| `{name}` | `{place}` | {size} | {checksum} |"
    return made


def test_the_table_has_exactly_the_published_files() -> None:
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = [line for line in shown if line.count("|") == 5]
    assert listed == list(rows().values())


def test_every_tower_of_the_zoo_is_described() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in zoo.available_models():
        config = zoo.config(name)
        vision = config.vision
        layers = ", ".join(map(str, vision.layers))
        assert f"| `{name}` | {vision.kind} | {layers} | {vision.resolution} | {config.embed_dim} |" in text
