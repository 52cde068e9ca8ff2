"""Mined regions as training samples, read from disk when drawn: memory does not grow with their number.

The shards' tables lie in Parquet, which is read a block at a time. For random access each shard is written
once, when it is first asked for, as an Arrow file with one row per image, of which any one is read alone.
"""

# n regions of one image, K concepts kept a region, S shards
from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clip_base.data.coco import read_captions
from clip_base.jobs.skipped import MAX_SKIPPED, require_present
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing
from regionclip.data.file_names import ids_by_name
from regionclip.mining.places import MinedImages
from regionclip.mining.shards import (
    MinedImage,
    checked_batches,
    image_rows,
    images_path,
    read_images,
    read_manifest,
    shard_in,
    shard_rules,
)
from regionclip.training.samples import Sample

_LAYOUT = 2  # of the Arrow files' columns, so that a resumed run does not read those of another version
_AT_ONCE = 16  # images in a block of an Arrow file, which is what reading one of them reads
_OPEN = 64  # Arrow files that stay open
_LOOKED_AT = 1000  # images that are looked for before training
_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("tar", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.float32())),  # [n · 4]
        ("objectness", pa.list_(pa.float32())),  # [n]
        ("concept_counts", pa.list_(pa.int32())),  # [n], at most K each
        ("concept_ids", pa.list_(pa.int32())),  # of all n regions, one after the other
        ("concept_probs", pa.list_(pa.float32())),
    ]
)


class MinedSamples(Sequence[Sample]):
    """The images of a mined folder that have regions, as training samples.

    Args:
        mined: folder of shards.
        cache: folder for what is written of them.
        images: folder of the images, or their tars, if they have been moved; "": the manifest's.
        captions: COCO captions, which find their images by file name; "": those that were mined.
        window: tars whose uncompressed copies are kept, of those that cannot be sought in.

    Attributes:
        counts: [S] samples of each shard.
        regions: of all samples.

    Raises:
        InputError: there are no regions, the images are not there, or the captions are of other images.
    """

    def __init__(
        self, mined: str | Path, cache: Path, images: str = "", captions: str = "", window: int = 16
    ) -> None:
        manifest = read_manifest(mined, "images_folder", "tars", "samples", "max_concepts", "regions")
        self.mined, self.cache = Path(mined), cache
        self.shards: list[str] = manifest["shards"]
        self.counts: list[int] = manifest["samples"]
        self.regions: int = manifest["regions"]
        self.width: int = manifest["max_concepts"]
        if not sum(self.counts):
            raise InputError(
                f"{mined} has no regions; see its skipped.jsonl, and lower the matcher's thresholds"
            )
        if len(self.counts) != len(self.shards):
            raise InputError(
                f"{mined}: the manifest counts samples of other shards than it lists; mine again"
            )
        self._ends = list(accumulate(self.counts))
        self._captions = _captions_of(mined, captions) if captions else None
        self._rules = shard_rules(self.mined)
        self.places = MinedImages(manifest, mined, images, cache / "tars", window)
        self._require_images(images or manifest["images_folder"])

    def _require_images(self, images: str) -> None:
        """Looks for some images before anything is trained on them."""
        some = range(0, len(self), max(len(self) // _LOOKED_AT, 1)) if self.places.root else ()
        files = [path for index in some if isinstance(path := self[index].path, Path)]
        require_present(files, MAX_SKIPPED, f"images={images}")

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: Any) -> Any:
        """Returns a `Sample`; its image is not opened."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        shard = bisect_right(self._ends, index)
        return self._sample(shard, index - (self._ends[shard - 1] if shard else 0))

    def _sample(self, shard: int, place: int) -> Sample:
        file = _opened(self._arrow(shard))
        block = place // _AT_ONCE
        row = file.get_batch(block).slice(place % _AT_ONCE, 1) if block < file.num_record_batches else None
        if row is None or not len(row):
            raise InputError(
                f"{self.mined}: the manifest counts {self.counts[shard]:,} samples of shard "
                f"{self.shards[shard]}, which holds fewer; mine again"
            )
        values = {name: row.column(name)[0] for name in row.schema.names}
        boxes = _tensor(values["boxes"], np.float32).view(-1, 4)
        ids, probs = (
            _padded(values["concept_counts"], _tensor(values[name], kind), self.width)
            for name, kind in (("concept_ids", np.int64), ("concept_probs", np.float32))
        )
        names = ("image_id", "file_name", "tar", "offset", "size", "height", "width")
        image = MinedImage(**{name: values[name].as_py() for name in names})
        captions = tuple(values["captions"].as_py())
        if self._captions is not None:
            captions = self._captions.get(image.image_id, ())
        size = (image.height or 0, image.width or 0)
        objectness = _tensor(values["objectness"], np.float32)
        return Sample(self.places(image), boxes, None, ids, probs, captions, size, objectness)

    def _arrow(self, shard: int) -> Path:
        """Returns the Arrow file of a shard, which is written when there is none."""
        source = shard_in(self.mined, self.shards[shard])
        path = self.cache / f"{source.stem}-{_LAYOUT}.arrow"
        if not path.exists():
            with replacing(path) as temporary, pa.ipc.new_file(str(temporary), _SCHEMA) as writer:
                for batch in _blocks(source, self._rules):
                    writer.write_batch(batch)
        return path

    def order(self, group: int, generator: torch.Generator) -> Tensor:
        """Returns [N] int64, all samples in an order that reads the shards in groups.

        Args:
            group: how many shards are shuffled together; the shards of a group are drawn at random too.
            generator: all chance comes from it.
        """
        shards = torch.randperm(len(self.counts), generator=generator).tolist()
        starts = [0, *self._ends[:-1]]
        parts = []
        for first in range(0, len(shards), group):
            ranges = [
                torch.arange(starts[shard], self._ends[shard]) for shard in shards[first : first + group]
            ]
            members = torch.cat(ranges)
            parts.append(members[torch.randperm(len(members), generator=generator)])
        return torch.cat(parts)


@functools.lru_cache(maxsize=_OPEN)
def _opened(path: Path) -> pa.RecordBatchFileReader:
    # Not mapped into memory: pages that were read would count as this process's until others need the room.
    return pa.ipc.open_file(pa.OSFile(str(path)))


def _tensor(value: pa.ListScalar, kind: Any) -> Tensor:
    return torch.from_numpy(value.values.to_numpy(zero_copy_only=False).astype(kind))


def _padded(counts: pa.ListScalar, values: Tensor, width: int) -> Tensor:
    """Returns [n, width] of the values of n regions; concept 0 of probability 0 where a region has fewer."""
    each = torch.from_numpy(counts.values.to_numpy(zero_copy_only=False).astype(np.int64))
    table = values.new_zeros(len(each), width)
    table[torch.arange(width) < each[:, None]] = values
    return table


def _blocks(shard: Path, rules: Sequence[Any]) -> Iterator[pa.RecordBatch]:
    """Yields a shard's images with their regions, `_AT_ONCE` at a time."""
    waiting = list[MinedImage]()
    regions = _Rows(checked_batches(shard, rules))
    for image in image_rows(images_path(shard)):
        waiting += [image] if image.regions else []
        if len(waiting) == _AT_ONCE:
            yield _block(waiting, regions, shard)
            waiting = []
    if waiting:
        yield _block(waiting, regions, shard)


def _block(images: Sequence[MinedImage], regions: _Rows, shard: Path) -> pa.RecordBatch:
    count = sum(image.regions for image in images)
    table = regions.take(count)
    fits = table.num_rows == count  # looked at first: a damaged count may be two billion
    if fits:
        owners = [image.image_id for image in images for _ in range(image.regions)]
        fits = table["image_id"].to_pylist() == owners
    if not fits:
        raise InputError(f"shard {shard} and its table of images do not fit each other; mine again")
    ends = np.cumsum([0, *(image.regions for image in images)])
    names = ("box", "objectness", "concept_ids", "concept_probs")
    lists = {name: table[name].combine_chunks() for name in names}
    lengths = lists["concept_ids"].value_lengths().to_numpy()
    inner = np.concatenate([[0], np.cumsum(lengths)])[ends]
    columns = {
        "boxes": _lists(ends * 4, lists["box"].flatten()),
        "objectness": _lists(ends, lists["objectness"].cast(pa.float32())),
        "concept_counts": _lists(ends, pa.array(lengths, pa.int32())),
        "concept_ids": _lists(inner, lists["concept_ids"].flatten()),
        "concept_probs": _lists(inner, lists["concept_probs"].flatten()),
    }
    for field in _SCHEMA:
        if field.name not in columns:
            columns[field.name] = pa.array([getattr(image, field.name) for image in images], field.type)
    return pa.record_batch([columns[field.name] for field in _SCHEMA], schema=_SCHEMA)


def _lists(offsets: Any, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


class _Rows:
    """Rows of record batches, taken some at a time."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._rest = batches, list[pa.RecordBatch]()

    def take(self, count: int) -> pa.Table:
        """Returns the next rows; fewer only at the end."""
        while sum(batch.num_rows for batch in self._rest) < count:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._rest.append(batch)
        table = pa.Table.from_batches(self._rest)
        self._rest = table.slice(count).to_batches()
        return table.slice(0, count)


def _captions_of(mined: str | Path, captions: str) -> dict[int, tuple[str, ...]]:
    """Returns image id -> captions of a COCO file, which are held in memory."""
    found, names = read_captions(captions)
    own = {image.image_id: image.file_name for image in read_images(mined) if image.regions}
    ids = ids_by_name(own, names, "the mined regions", f"captions file {captions}")
    return {key: tuple(found.get(other, ())) for key, other in ids.items()}
