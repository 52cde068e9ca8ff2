"""Files of the job `detect`: where drawn images go, detections.json and detections.csv."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_base.images.live import is_live
from clip_base.images.video import VIDEOS
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing
from clip_base.storage.tables import TableWriter

COLUMNS = ("file_name", "image_id", "frame", "time", "track_id", "category_id", "category_name", "score")
BOX = ("x", "y", "width", "height")


def targets_of(files: Sequence[Path], out: Path) -> list[Path]:
    """Returns where each file with boxes goes: NAME.jpg (videos: .mp4), numbered when several have that name.

    Raises:
        InputError: an image would take the place of one that was given.
    """
    folder, given = out.resolve(), {file.resolve() for file in files}
    names = unique_names((_named(file), ".mp4" if is_moving(file) else ".jpg") for file in files)
    targets = [out / name for name in names]
    taken = next((target for target in targets if folder / target.name in given), None)
    if taken is not None:
        raise InputError(f"the image with boxes would overwrite {taken}; give another out=")
    return targets


def is_moving(file: Path) -> bool:
    """Whether a source is a video's file, a camera or a stream."""
    return is_live(str(file)) or file.suffix.lower() in VIDEOS


def _named(file: Path) -> Path:
    """Returns what a source is called: a camera by its number, a stream without its address."""
    if not is_live(str(file)):
        return file
    return Path(f"camera-{file}" if str(file).isdecimal() else "stream")


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
    """Writes `detections.json` (COCO's results format) and `detections.csv`, an entry at a time.

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
        table = TableWriter(text)
        more = [f"{what}_{place}" for place in range(1, top + 1) for what in ("name", "probability")]
        table.writerow([*COLUMNS, *BOX, *more])
        for entry in entries():
            ranked = [(one["name"], one["probability"]) for one in entry.get("top", ())]
            values = [entry.get(column, "") for column in COLUMNS]
            table.writerow([*values, *entry["bbox"], *(value for pair in ranked for value in pair)])
    return count
