"""Mined region-phrase pairs on disk: Parquet shards, and a manifest that says how they were made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.errors import InputError
from clip_base.files import existing, read_json, replacing

VERSION = 1
MANIFEST = "manifest.json"

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("box", pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 in pixels of the original image
        ("objectness", pa.float32()),
        ("concept_ids", pa.list_(pa.int32())),  # rows of the vocabulary, most probable first
        ("concept_probs", pa.list_(pa.float32())),
        ("concept", pa.string()),  # the first concept's name
        ("phrase", pa.string()),  # the phrase of the caption that names it; null when none does
        ("caption", pa.string()),  # the caption that phrase stands in
    ]
)


@dataclass(frozen=True)
class MinedRegion:
    """One row of a shard; the fields are those of SCHEMA."""

    image_id: int
    file_name: str
    height: int
    width: int
    box: tuple[float, float, float, float]
    objectness: float
    concept_ids: list[int]
    concept_probs: list[float]
    concept: str
    phrase: str | None
    caption: str | None


def shard_path(folder: Path, number: int) -> Path:
    """Returns the path of shard `number`."""
    return folder / f"shard-{number:05d}.parquet"


def write_shard(path: Path, regions: list[MinedRegion]) -> None:
    """Writes one shard atomically; an empty one is a file too, so that its images count as done."""
    table = pa.Table.from_pylist([asdict(region) for region in regions], schema=SCHEMA)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads a mined folder's manifest.

    Raises:
        InputError: the folder holds no finished mining run.
    """
    path = existing(folder, "folder of mined pairs") / MANIFEST
    if not path.exists():
        raise InputError(
            f"{folder} has no {MANIFEST}: mining there has not ended; run `regionclip mine` again"
        )
    manifest: dict[str, Any] = read_json(path, "manifest")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {manifest.get('version')}, this program reads {VERSION}; mine again"
        )
    return manifest


def read_regions(folder: str | Path) -> Iterator[MinedRegion]:
    """Yields all mined regions in the order of the images.

    Raises:
        InputError: the folder is unfinished, or a shard that the manifest lists is missing or damaged.
    """
    for name in read_manifest(folder)["shards"]:
        path = existing(Path(folder) / name, "shard")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"shard {path} is damaged ({reason}); delete it and run `regionclip mine` again"
            ) from None
        if not table.schema.equals(SCHEMA):
            found = ", ".join(table.schema.names[:5])
            raise InputError(
                f"{path} is no shard of mined regions (its columns: {found}); mine into another folder"
            )
        for row in table.to_pylist():
            yield MinedRegion(**row)
