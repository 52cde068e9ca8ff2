"""What `regionclip detect` leaves: where pictures with boxes go, detections as JSON and as a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_base.errors import InputError
from clip_base.files import replacing
from regionclip.videos import VIDEOS

COLUMNS = ("file_name", "image_id", "frame", "time", "category_id", "category_name", "score")
BOX = ("x", "y", "width", "height")


def targets_of(files: Sequence[Path], out: Path) -> list[Path]:
    """Returns where each file with boxes goes: NAME.jpg (videos: .mp4), numbered when several have that name.

    Raises:
        InputError: a picture would take the place of one that was given.
    """
    folder, given = out.resolve(), {file.resolve() for file in files}
    names = unique_names((file, ".mp4" if file.suffix.lower() in VIDEOS else ".jpg") for file in files)
    targets = [out / name for name in names]
    taken = next((target for target in targets if folder / target.name in given), None)
    if taken is not None:
        raise InputError(f"the picture with boxes would be written over {taken}; give another out=")
    return targets


def unique_names(files: Iterable[tuple[Path, str]]) -> Iterator[str]:
    """Yields a name for each (file, ending): its own, or with a number behind it when that is taken."""
    taken: set[str] = set()
    last: dict[str, int] = {}
    for file, ending in files:
        name = f"{file.stem}{ending}"
        while name in taken:
            last[file.stem] = last.get(file.stem, 1) + 1
            name = f"{file.stem}-{last[file.stem]}{ending}"
        taken.add(name)
        yield name


def write_detections(out: Path, entries: Callable[[], Iterable[dict[str, Any]]], top: int) -> int:
    """Writes `detections.json` (COCO's results form) and `detections.csv`, an entry at a time.

    Args:
        out: the folder.
        entries: begins a pass over all detections.
        top: how many names each may have.

    Returns:
        How many detections there are.
    """
    count = 0
    with replacing(out / "detections.json") as temporary, temporary.open("w", encoding="utf-8") as text:
        text.write("[")
        for entry in entries():
            text.write((",\n" if count else "\n") + json.dumps(entry, ensure_ascii=False))
            count += 1
        text.write("\n]\n")
    with (
        replacing(out / "detections.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as text,
    ):
        table = csv.writer(text, lineterminator="\n")
        more = [f"{what}_{place}" for place in range(1, top + 1) for what in ("name", "probability")]
        table.writerow([*COLUMNS, *BOX, *more])
        for entry in entries():
            ranked = [(one["name"], one["probability"]) for one in entry.get("top", ())]
            values = [entry.get(column, "") for column in COLUMNS]
            table.writerow([*values, *entry["bbox"], *(value for pair in ranked for value in pair)])
    return count
