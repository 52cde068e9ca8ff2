"""Writing a shard image by image, so that what was mined of an unfinished one is not lost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from regionclip.mining import shards
from regionclip.mining.shards import (
    IMAGE_SCHEMA,
    SCHEMA,
    MinedImage,
    MinedRegion,
    batches,
    image_table,
    images_path,
    region_table,
)

SAVE_EVERY = 30.0  # seconds: what a kill may cost
_ROWS = 5000  # regions made a table at once: as Python's objects they take ten times the memory


class ShardWriter:
    """Takes the images of one shard in their order and writes it when all are there.

    What was added is saved every `SAVE_EVERY` seconds, and by `save`, in numbered parts beside the shard. A
    writer of the same shard resumes behind them. The shard is written from the rows of all parts: its bytes
    do not depend on where the parts were cut.

    Args:
        path: of the shard, see `regionclip.mining.shards.write_shard`.

    Attributes:
        done: images that are saved or were added.
        regions: their regions.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent / f".{path.stem}.parts"
        self.done = self.regions = self._saved = 0
        self._images: list[pa.Table] = []
        self._regions: list[pa.Table] = []
        self._pending: list[MinedRegion] = []
        self._clock = time.monotonic()
        while (part := self._part(self._saved)).exists():
            for batch in batches(images_path(part), IMAGE_SCHEMA, ["regions"]):
                self.done += batch.num_rows
                self.regions += sum(batch.column("regions").to_pylist())
            self._saved += 1

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"

    def add(self, images: Sequence[MinedImage], regions: Sequence[MinedRegion]) -> None:
        """Adds the images that come next and their regions."""
        self._images.append(image_table(images))
        self._pending += regions
        self.done, self.regions = self.done + len(images), self.regions + len(regions)
        if len(self._pending) >= _ROWS:
            self._pack()
        if time.monotonic() - self._clock >= SAVE_EVERY:
            self.save()

    def _pack(self) -> None:
        self._regions.append(region_table(self._pending))
        self._pending = []

    def save(self) -> None:
        """Saves what was added."""
        if self._images:
            self._pack()
            shards.write_shard(self._part(self._saved), self._regions, self._images)
            self._saved, self._images, self._regions = self._saved + 1, [], []
        self._clock = time.monotonic()

    def finish(self) -> int:
        """Writes the shard, drops the parts and returns how many regions there are."""
        self._pack()
        count = shards.write_shard(self.path, self._all(SCHEMA), self._all(IMAGE_SCHEMA))
        shutil.rmtree(self.folder, ignore_errors=True)
        return count

    def _all(self, schema: pa.Schema) -> Iterator[pa.Table]:
        of_images = schema is IMAGE_SCHEMA
        for number in range(self._saved):
            part = self._part(number)
            for batch in batches(images_path(part) if of_images else part, schema):
                yield pa.Table.from_batches([batch])
        yield from self._images if of_images else self._regions
