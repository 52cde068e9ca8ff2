"""Mined regions as columns of numbers: what counts or exports all of them makes no object of each."""

# n regions of a batch, m concepts of all of them
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clip_base.runtime.errors import InputError
from regionclip.mining.shards import (
    MinedImage,
    MinedRegion,
    checked_batches,
    image_rows,
    images_path,
    read_manifest,
    regions_of,
    shard_in,
    shard_rules,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RegionColumns:
    """Columns of a batch of regions.

    Attributes:
        batch: the rows, of `regionclip.mining.shards.SCHEMA`.
    """

    batch: pa.RecordBatch

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @cached_property
    def image_ids(self) -> Ints:
        """[n] image of each region."""
        return self._numbers("image_id", np.int64)

    @cached_property
    def objectness(self) -> Floats:
        """[n] objectness."""
        return self._numbers("objectness", np.float64)

    @cached_property
    def boxes(self) -> Floats:
        """[n, 4] (x1, y1, x2, y2) in pixels."""
        return self._flat("box", np.float64).reshape(-1, 4)

    @cached_property
    def counts(self) -> Ints:
        """[n] how many concepts each region keeps."""
        counts: Ints = pc.list_value_length(self.batch["concept_probs"]).to_numpy().astype(np.int64)
        return counts

    @cached_property
    def concept_ids(self) -> Ints:
        """[m] rows of the vocabulary, region by region."""
        return self._flat("concept_ids", np.int64)

    @cached_property
    def concept_probs(self) -> Floats:
        """[m] probabilities, region by region, each's highest first."""
        return self._flat("concept_probs", np.float64)

    @cached_property
    def first_probs(self) -> Floats:
        """[n] each region's first probability; InputError when one has none."""
        if len(self) and not self.counts.min():
            row = int(self.counts.argmin())
            name = self.batch["file_name"][row].as_py()
            raise InputError(f"a mined region of {name} has no concept; mine again")
        firsts: Floats = self.concept_probs[np.cumsum(self.counts) - self.counts]
        return firsts

    @cached_property
    def named(self) -> list[tuple[str, float]]:
        """Each region's first concept and its probability."""
        return list(zip(self.batch["concept"].to_pylist(), self.first_probs.tolist(), strict=True))

    def _flat(self, name: str, kind: Any) -> NDArray[Any]:
        values: NDArray[Any] = self.batch[name].flatten().to_numpy(zero_copy_only=False).astype(kind)
        return values

    def _numbers(self, name: str, kind: Any) -> NDArray[Any]:
        values: NDArray[Any] = self.batch[name].to_numpy(zero_copy_only=False).astype(kind)
        return values


@dataclass
class ImageRegions:
    """The regions of one image, in one batch or in several that follow each other.

    Attributes:
        parts: (columns, first row, row after the last).
    """

    parts: list[tuple[RegionColumns, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)

    def named(self) -> list[tuple[str, float]]:
        """Returns each region's first concept and its probability."""
        return [pair for columns, start, stop in self.parts for pair in columns.named[start:stop]]

    def regions(self) -> list[MinedRegion]:
        """Returns the regions as objects."""
        slices = (columns.batch.slice(start, stop - start) for columns, start, stop in self.parts)
        return [region for rows in slices for region in regions_of(rows)]


def read_mined_columns(
    folder: str | Path, on_batch: Callable[[RegionColumns], None]
) -> Iterator[tuple[MinedImage, ImageRegions]]:
    """Yields all images of a mined folder with their regions as columns, in order.

    Args:
        folder: of the mined pairs.
        on_batch: takes each batch of regions, once, before its images are yielded.

    Raises:
        InputError: see `read_regions`.
    """
    rules = shard_rules(Path(folder))
    for name in read_manifest(folder)["shards"]:
        path = shard_in(folder, name)
        batches = _Rows(map(RegionColumns, checked_batches(path, rules)), on_batch)
        for image in image_rows(images_path(path)):
            own = batches.take(image.regions, image.image_id)
            if own is None:
                raise InputError(f"shard {path} and its table of images do not fit each other; mine again")
            yield image, own
        if batches.take(1, None) is not None:
            raise InputError(f"shard {path} has regions of images that its table lacks; mine again")


class _Rows:
    """Takes rows of batches that follow each other."""

    def __init__(self, batches: Iterator[RegionColumns], on_batch: Callable[[RegionColumns], None]) -> None:
        self._batches, self._on_batch = batches, on_batch
        self._columns: RegionColumns | None = None
        self._next = 0

    def take(self, count: int, image_id: int | None) -> ImageRegions | None:
        """Returns the next rows; None when there are fewer, or one is of another image."""
        own = ImageRegions()
        while count:
            if self._columns is None or self._next == len(self._columns):
                self._columns, self._next = next(self._batches, None), 0
                if self._columns is None:
                    return None
                self._on_batch(self._columns)
                continue
            stop = min(self._next + count, len(self._columns))
            if image_id is not None and (self._columns.image_ids[self._next : stop] != image_id).any():
                return None
            own.parts.append((self._columns, self._next, stop))
            count, self._next = count - (stop - self._next), stop
        return own
