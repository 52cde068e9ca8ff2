"""Files of mined region-phrase pairs: Parquet shards and a manifest.

A shard is two tables: `NAME.parquet` has one row per region, `images/NAME.parquet` one per image, whether it
has regions or not: where it is, its captions, how many regions it has or why it has none. Both are in the
order in which the images were mined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import existing, read_json, replacing
from clip_base.storage.parquet_files import open_parquet
from clip_base.storage.paths import leads_out
from clip_base.storage.remote import address_of
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

VERSION = 3
MANIFEST, VOCABULARY = "manifest.json", "vocabulary.safetensors"
MOST_MASS = 1.001  # of probabilities that were rounded to float32
_ROWS = 5000  # regions made a table at once: as Python's objects they take ten times the memory
IMAGES = "images"  # folder of the tables of images
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
        ("key", pa.string()),  # what identifies the image in its source: COCO's id, a tar's __key__, a name
        ("tar", pa.string()),  # the tar that the image is in; null: none
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("key", pa.string()),
        ("file_name", pa.string()),  # relative to the images folder, or the member's name in the tar
        ("tar", pa.string()),
        ("offset", pa.int64()),  # of the image's first byte in the (uncompressed) tar; null: it is in none
        ("size", pa.int64()),  # of the image in bytes, in a tar
        ("height", pa.int32()),  # in pixels; null: it was not read
        ("width", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("regions", pa.int32()),  # how many rows of the other table are this image's
        ("reason", pa.string()),  # why it has none
        ("unreadable", pa.bool_()),  # whether it could not be read
        ("concepts", pa.int32()),  # how many concepts each of its regions keeps at most
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


_MOST_CONCEPTS = 100_000  # of one region; training makes room for so many

# What is read of a manifest, and whether a value is of that kind.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "shards": _are_texts,
    **dict.fromkeys(("images", "skipped", "regions"), _is_count),
    "max_concepts": lambda value: _is_count(value) and value <= _MOST_CONCEPTS,
    **dict.fromkeys(("images_folder", "teacher", KEY), _is_text),
    **dict.fromkeys(("matcher", "proposer", "config.backend"), _is_part),
    "samples": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "tars": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "synonyms": lambda value: isinstance(value, dict) and all(map(_are_texts, value.values())),
    "config": lambda value: isinstance(value, dict),
    **dict.fromkeys((f"config.{key}" for key in ("captions", "concepts", "weights", "language")), _is_text),
    **dict.fromkeys(
        (f"config.{key}" for key in ("context", "temperature", "teacher_scale", "crop_below")), _is_number
    ),
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
    key: str = ""
    tar: str | None = None

    @property
    def kept_mass(self) -> float:
        """What the stored probabilities sum to; 1 minus it was cut off, or is the unmatched slot's share."""
        return sum(self.concept_probs)


def shard_path(folder: Path, name: str | int) -> Path:
    """Returns the path of a shard by its name, or by its number where shards are numbered."""
    return folder / (f"shard-{name:05d}.parquet" if isinstance(name, int) else f"{name}.parquet")


@dataclass(frozen=True)
class MinedImage:
    """One row of a shard's table of images; the fields are those of IMAGE_SCHEMA."""

    image_id: int
    file_name: str
    regions: int = 0
    captions: tuple[str, ...] = ()
    key: str = ""
    tar: str | None = None
    offset: int | None = None
    size: int | None = None
    height: int | None = None
    width: int | None = None
    reason: str | None = None
    unreadable: bool = False
    concepts: int = 0

    @property
    def skipped(self) -> dict[str, Any]:
        """Its entry in `skipped.jsonl`."""
        place = {"tar": self.tar} if self.tar else {}
        broken = {"unreadable": True} if self.unreadable else {}
        return {
            "image_id": self.image_id,
            "file_name": self.file_name,
            **place,
            "reason": self.reason,
            **broken,
        }


def images_path(shard: Path) -> Path:
    """Returns the path of a shard's table of images."""
    return shard.parent / IMAGES / shard.name


def region_table(regions: Sequence[MinedRegion]) -> pa.Table:
    """Returns regions as a table."""
    records = [asdict(region) | {"kept_mass": region.kept_mass} for region in regions]
    return pa.Table.from_pylist(records, schema=SCHEMA)


def image_table(images: Sequence[MinedImage]) -> pa.Table:
    """Returns images as a table."""
    return pa.Table.from_pylist([asdict(image) for image in images], schema=IMAGE_SCHEMA)


def write_shard(path: Path, regions: Iterable[pa.Table], images: Iterable[pa.Table]) -> int:
    """Writes one shard atomically; an empty one is a file too, so that its images count as done.

    The files depend on the rows alone, not on how they are spread over the tables.

    Args:
        path: of the table of regions, whose presence says that the shard is complete.
        regions: tables of SCHEMA, in order.
        images: tables of IMAGE_SCHEMA, in order.

    Returns:
        How many regions there were.
    """
    _write(images_path(path), IMAGE_SCHEMA, images)
    return _write(path, SCHEMA, regions)


def write_rows(path: Path, regions: Sequence[MinedRegion], images: Sequence[MinedImage] | None = None) -> int:
    """Writes one shard of rows in memory, see `write_shard`; images None: those of the regions."""
    if images is None:
        counts = Counter(region.image_id for region in regions)
        firsts = {region.image_id: region for region in reversed(regions)}
        images = [
            MinedImage(
                *(key, one.file_name, counts[key]),
                height=one.height,
                width=one.width,
                concepts=max(len(region.concept_ids) for region in regions if region.image_id == key),
            )
            for key, one in reversed(firsts.items())
        ]
    return write_shard(path, [region_table(regions)], [image_table(images)])


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    count, waiting = 0, schema.empty_table()
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            count += table.num_rows
            waiting = pa.concat_tables([waiting, table])
            while waiting.num_rows >= _ROWS:
                writer.write_table(waiting.slice(0, _ROWS).combine_chunks())
                waiting = waiting.slice(_ROWS)
        if waiting.num_rows or not count:
            writer.write_table(waiting.combine_chunks())
    return count


def read_images(folder: str | Path) -> Iterator[MinedImage]:
    """Yields all images of a mined folder, those without regions too, in order.

    Raises:
        InputError: the folder is unfinished, or a table is missing, damaged or none of mining's.
    """
    for name in read_manifest(folder)["shards"]:
        yield from image_rows(images_path(shard_in(folder, name)))


def shard_in(folder: str | Path, name: str) -> Path:
    """Returns the path of a shard that a manifest names; InputError when it leads out of the folder."""
    if leads_out(name):
        raise InputError(f"{Path(folder) / MANIFEST}: shard {quote(name)} is not in its folder; mine again")
    return Path(folder) / name


_COUNTED = Rule("regions", "a count", lambda table: numbers(table, "regions") >= 0)
_MAY_LACK = ("tar", "offset", "size", "height", "width", "captions", "reason")


def image_rows(path: Path) -> Iterator[MinedImage]:
    """Yields the rows of one shard's table of images; errors as `batches`'."""
    first = 0
    for batch in batches(path, IMAGE_SCHEMA):
        table = pa.Table.from_batches([batch])
        require_rows(table, [_COUNTED], f"table of images {path}", first, optional=_MAY_LACK)
        first += batch.num_rows
        for row in batch.to_pylist():
            yield MinedImage(**{**row, "captions": tuple(row["captions"] or ())})


def batches(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one of a shard's tables, some thousand at a time.

    Raises:
        InputError: the table is missing, damaged, or none of mining's.
    """
    with open_parquet(path, "shard", _REMEDY) as file:
        if not file.schema_arrow.equals(schema):
            found = ", ".join(file.schema_arrow.names[:5])
            raise InputError(
                f"{path} is not a shard of mined regions (its columns: {found}); use another folder"
            )
        for batch in file.iter_batches(_ROWS, columns=columns):
            batch.validate(full=True)  # texts may be no UTF-8
            yield batch


def local_mined(mined: str) -> str:
    """Returns a folder of mined pairs as it was given; of one at an address, the copy in the cache."""
    return mined if address_of(mined) is None else str(existing(mined, "folder of mined pairs"))


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
    for batch in read_region_batches(folder):
        yield from regions_of(batch)


def read_region_batches(folder: str | Path) -> Iterator[pa.RecordBatch]:
    """Yields the rows of all shards, checked, some thousand at a time; errors as `read_regions`'."""
    rules = _rules(_vocabulary_size(Path(folder)))
    for name in read_manifest(folder)["shards"]:
        yield from checked_batches(shard_in(folder, name), rules)


def checked_batches(path: Path, rules: Sequence[Rule]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one shard, checked; see `shard_rules`."""
    first = 0
    for batch in batches(path, SCHEMA):
        table = pa.Table.from_batches([batch])
        require_rows(table, rules, f"shard {path}", first, optional=("phrase", "caption", "tar"))
        first += batch.num_rows
        yield batch


def shard_rules(folder: Path) -> list[Rule]:
    """Returns what the rows of a mined folder must hold."""
    return _rules(_vocabulary_size(folder))


def regions_of(batch: pa.RecordBatch) -> Iterator[MinedRegion]:
    """Yields the rows of a table as regions."""
    for row in batch.drop_columns("kept_mass").to_pylist():
        yield MinedRegion(**row)
