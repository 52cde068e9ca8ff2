"""Approximate search by faiss (an extra), for indexes of more than a few million images.

The vectors are sorted into cells around centers that k-means finds; a query looks into the cells whose
centers are nearest to it. The exact index stays: what is found is scored by it.
"""

# N images, D embedding size
from __future__ import annotations

import bisect
import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import track
from clip_base.search.index import Hit, Index
from clip_base.storage.files import read_json, replacing, write_json

FILE, ABOUT = "approximate.faiss", "approximate.json"
_PER_CELL = 64  # vectors per cell that k-means sees
_LEAST = 40  # images per cell on average, below which faiss warns


def _faiss() -> ModuleType:
    try:
        import faiss  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError("approximate search needs faiss: pip install 'regionclip[faiss]'") from None
    return faiss


def cells_of(images: int) -> int:
    """Returns how many cells an index of so many images has: four times their square root."""
    return max(1, min(round(4 * math.sqrt(images)), images // _LEAST))


def build(index: Index, folder: Path) -> None:
    """Writes the approximate index of a saved index into its folder.

    Raises:
        InputError: faiss is not installed, or the index is empty.
    """
    faiss = _faiss()
    if not len(index):
        raise InputError(f"{folder} holds no images, so that there is nothing to search")
    cells = cells_of(len(index))
    every = max(1, len(index) // (_PER_CELL * cells))
    sample = torch.cat([shard.vectors[::every] for shard in index.shards]).float().numpy()  # [n, D]
    kind = faiss.ScalarQuantizer.QT_fp16  # as the vectors are kept
    made = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(index.width), index.width, cells, kind, faiss.METRIC_INNER_PRODUCT
    )
    made.cp.min_points_per_centroid = 1  # of few images it would warn
    made.train(sample)
    for shard in track(index.shards, f"sorting {len(index):,} images into {cells:,} cells"):
        made.add(shard.vectors.float().numpy())
    with replacing(folder / FILE) as temporary:
        faiss.write_index(made, str(temporary))
    write_json(folder / ABOUT, {"images": len(index), "shards": _names(index)})


def _names(index: Index) -> list[str]:
    return [shard.file.name if shard.file else "" for shard in index.shards]


class Approximate:
    """The approximate index of a folder, memory-mapped.

    Args:
        index: the exact one, which the folder holds.
        folder: of both.

    Raises:
        InputError: there is none, it is of another state of the index, or faiss is not installed.
    """

    def __init__(self, index: Index, folder: Path) -> None:
        faiss = _faiss()
        remedy = "`clip-base index … approximate=true` makes it"
        if not (folder / FILE).exists() or not (folder / ABOUT).exists():
            raise InputError(f"{folder} has no approximate index; {remedy}")
        about = read_json(folder / ABOUT, "approximate index")
        if about != {"images": len(index), "shards": _names(index)}:
            raise InputError(f"the approximate index of {folder} is older than its images; {remedy} again")
        self.index = index
        self._ends = list(itertools.accumulate(len(shard.keys) for shard in index.shards))
        try:
            flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
            self._faiss: Any = faiss.read_index(str(folder / FILE), flags)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-100:]
            raise InputError(f"{folder / FILE} is damaged ({reason}); {remedy} again") from None

    def search(self, query: Tensor, k: int = 10, probes: int = 32) -> list[Hit]:
        """Returns up to k images that are near to a query by cosine, best first.

        Args:
            query: [D], of any length above 0.
            k: how many.
            probes: cells that are searched; all of them find what the exact search does.
        """
        unit = F.normalize(query.detach().float().cpu(), dim=0)
        self._faiss.nprobe = min(probes, self._faiss.nlist)
        _, rows = self._faiss.search(unit[None].numpy(), k)
        found = [
            self._hit(row, unit.half()) for row in rows[0].tolist() if row >= 0
        ]  # -1: fewer in the cells
        return sorted(found, key=lambda hit: -hit.score)

    def _hit(self, row: int, unit: Tensor) -> Hit:
        place = bisect.bisect_right(self._ends, row)
        shard = self.index.shards[place]
        inside = row - (self._ends[place - 1] if place else 0)
        return Hit(shard.keys[inside], float(shard.vectors[inside] @ unit))


def recall(exact: list[list[Hit]], approximate: list[list[Hit]]) -> float:
    """Returns the share of the exact searches' images that the approximate ones found too."""
    shares = [
        len({hit.key for hit in one} & {hit.key for hit in other}) / len(one)
        for one, other in zip(exact, approximate, strict=True)
    ]
    return float(np.mean(shares))
