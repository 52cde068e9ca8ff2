"""Files of mined region-phrase pairs: Parquet shards and a manifest."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.runtime.errors import InputError, note, quote
from clip_base.storage.files import existing, read_json, replacing
from clip_base.storage.parquet_files import open_parquet
from clip_base.storage.paths import leads_out
from clip_base.weights.native import open_safetensors
from regionclip.data.region_tables import (
    BOX,
    IN_IMAGE,
    OBJECTNESS,
    REGION_COLUMNS,
    SIZES,
    Rule,
    all_in,
    equally_long,
    numbers,
    require_rows,
)
from regionclip.models.region_heads import KEY

VERSION = 2
MANIFEST, VOCABULARY = "manifest.json", "vocabulary.safetensors"
MOST_MASS = 1.001  # of probabilities that were rounded to float32
_ROWS = 5000  # regions made a table at once: as Python's objects they take ten times the memory
_SKIPPED = b"skipped"
_REMEDY = "delete it and run `regionclip mine` again"
SCHEMA = pa.schema(
    [
        *REGION_COLUMNS,
        ("concept_ids", pa.list_(pa.int32())),  # rows of the vocabulary, most probable first
        ("concept_probs", pa.list_(pa.float32())),
        ("kept_mass", pa.float32()),  # sum of concept_probs; the rest was cut off or belongs to no concept
        ("concept", pa.string()),  # the first concept's name
        ("phrase", pa.string()),  # the phrase of the caption that names it; null when none does
        ("caption", pa.string()),  # the caption that phrase stands in
    ]
)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_part(value: object) -> bool:
    return isinstance(value, dict) and _is_text(value.get("name"))


# What is read of a manifest, and whether a value is of that kind.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "shards": _are_texts,
    **dict.fromkeys(("images", "skipped", "regions"), _is_count),
    **dict.fromkeys(("images_folder", "teacher", KEY), _is_text),
    **dict.fromkeys(("matcher", "proposer"), _is_part),
    "synonyms": lambda value: isinstance(value, dict) and all(map(_are_texts, value.values())),
    "config": lambda value: isinstance(value, dict),
    **dict.fromkeys((f"config.{key}" for key in ("captions", "concepts", "weights", "language")), _is_text),
    **dict.fromkeys((f"config.{key}" for key in ("context", "temperature", "teacher_scale")), _is_number),
    "config.teacher": _is_text,
}


@dataclass(frozen=True)
class MinedRegion:
    """One row of a shard; the fields, with `kept_mass`, are those of SCHEMA."""

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

    @property
    def kept_mass(self) -> float:
        """What the stored probabilities sum to; 1 minus it was cut off, or is the unmatched slot's share."""
        return sum(self.concept_probs)


def shard_path(folder: Path, number: int) -> Path:
    """Returns the path of shard `number`."""
    return folder / f"shard-{number:05d}.parquet"


def write_shard(path: Path, regions: Iterable[MinedRegion], skipped: Sequence[dict[str, Any]] = ()) -> int:
    """Writes one shard atomically; an empty one is a file too, so that its images count as done.

    Args:
        path: the file.
        regions: its rows.
        skipped: images that gave no region, each with the reason; looked at when `regions` has ended.

    Returns:
        How many regions there were.
    """
    rows = iter(regions)
    tables = [SCHEMA.empty_table()]
    while some := list(itertools.islice(rows, _ROWS)):
        records = [asdict(region) | {"kept_mass": region.kept_mass} for region in some]
        tables.append(pa.Table.from_pylist(records, schema=SCHEMA))
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
    table = pa.concat_tables(tables).replace_schema_metadata({_SKIPPED: lines.encode()})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return int(table.num_rows)


def read_skipped(path: Path) -> tuple[str, int]:
    """Returns a shard's skipped images as JSON Lines, and how many regions it holds; reads no region.

    Raises:
        InputError: the shard is damaged.
    """
    with open_parquet(path, "shard", _REMEDY) as file:
        return (file.schema_arrow.metadata or {}).get(_SKIPPED, b"").decode(), int(file.metadata.num_rows)


def read_manifest(folder: str | Path, *needs: str) -> dict[str, Any]:
    """Reads a mined folder's manifest.

    Args:
        folder: of the mined pairs.
        needs: keys of it that the caller reads, `config.captions` for one in its `config`.

    Raises:
        InputError: the folder holds no finished mining run; a key is missing or holds another kind of value.
    """
    path = existing(folder, "folder of mined pairs") / MANIFEST
    if not path.exists():
        raise InputError(f"{folder} has no {MANIFEST}: mining is not finished; run `regionclip mine` again")
    manifest: dict[str, Any] = read_json(path, "manifest")
    version = manifest.get("version") if isinstance(manifest, dict) else manifest
    if version != VERSION:
        raise InputError(f"{path} is of version {quote(version)}, this program reads {VERSION}; mine again")
    for key, fits in _KINDS.items():
        part, _, name = key.rpartition(".")
        content = manifest.get(part, {}) if part else manifest
        if (key in ("shards", *needs) or name in content) and not fits(content.get(name)):
            raise InputError(f"{path} is damaged: {key} is {quote(content.get(name))}; mine again")
    return manifest


def images_of(manifest: dict[str, Any], images: str, mined: str | Path) -> Path:
    """Returns the folder of the images that were mined: the user's, else what the manifest names, noted.

    Args:
        manifest: of `read_manifest`.
        images: what the user gave; "": nothing.
        mined: the mined folder, for messages.

    Raises:
        InputError: the folder does not exist.
    """
    if images:
        return existing(images, "images folder")
    folder = manifest["images_folder"]
    try:
        path = existing(folder, "images folder")
    except InputError as error:
        raise InputError(f"{error}; give images=DIR") from None
    note(f"images are read from {folder}, which {Path(mined) / MANIFEST} names; images= gives another folder")
    return path


def _rules(concepts: int) -> list[Rule]:
    """Returns what the rows of a shard must hold, given how many concepts the vocabulary has."""
    ids = (
        f"rows of the vocabulary, 0 to {concepts - 1}" if concepts else "rows of the vocabulary, not negative"
    )
    most = concepts - 1 if concepts else float("inf")
    return [
        *SIZES,
        BOX,
        IN_IMAGE,
        OBJECTNESS,
        Rule("concept_ids", ids, all_in("concept_ids", 0, most)),
        Rule("concept_probs", "probabilities in 0…1", all_in("concept_probs", 0, MOST_MASS)),
        Rule(
            "concept_probs", "as many as there are concept_ids", equally_long("concept_ids", "concept_probs")
        ),
        Rule("kept_mass", "a sum of probabilities", lambda table: numbers(table, "kept_mass") <= MOST_MASS),
    ]


def _vocabulary_size(folder: Path) -> int:
    """Returns how many concepts the folder's vocabulary has; 0 when it is not there."""
    path = folder / VOCABULARY
    if not path.exists():
        return 0
    with open_safetensors(path, "vocabulary") as file:
        return int(file.get_slice("embeddings").get_shape()[0])


def read_regions(folder: str | Path) -> Iterator[MinedRegion]:
    """Yields all mined regions in the order of the images.

    Raises:
        InputError: the folder is unfinished, or a shard that the manifest lists is missing, damaged, or holds
            what no mining writes; the row and the column are told.
    """
    rules = _rules(_vocabulary_size(Path(folder)))
    for name in read_manifest(folder)["shards"]:
        if leads_out(name):
            raise InputError(
                f"{Path(folder) / MANIFEST}: shard {quote(name)} is not in its folder; mine again"
            )
        path = Path(folder) / name
        with open_parquet(path, "shard", _REMEDY) as file:
            table = file.read()
        if not table.schema.equals(SCHEMA):
            found = ", ".join(table.schema.names[:5])
            raise InputError(
                f"{path} is not a shard of mined regions (its columns: {found}); use another folder"
            )
        require_rows(table, rules, f"shard {path}", optional=("phrase", "caption"))
        for batch in table.drop_columns("kept_mass").to_batches(_ROWS):
            for row in batch.to_pylist():
                yield MinedRegion(**row)
