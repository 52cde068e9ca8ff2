"""Files of region embeddings: Parquet with one row per region, or one .npz file per image."""

# n regions of one image, N regions of a file, D embedding size, K names a region
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.storage.files import replacing
from regionclip.data.region_tables import REGION_COLUMNS

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageFeatures:
    """An image's regions.

    Attributes:
        image_id: in the annotations; of images without annotations the place in the list, from 1.
        file_name: as the annotations have it; without them, the path as it was given.
        size: (height, width) in pixels.
        boxes: [n, 4] float32 (x1, y1, x2, y2) in pixels of the original image.
        scores: [n] float32, objectness in [0, 1].
        embeddings: [n, D] float16 or float32, unit length.
        whole: [n] bool, which row is the whole image.
        categories: names of true boxes' categories; empty for other boxes.
        names: each region's K most probable names with probabilities; empty without a vocabulary.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    boxes: Array
    scores: Array
    embeddings: Array
    whole: Array
    categories: Sequence[str | None]
    names: Sequence[Sequence[tuple[str, float]]]

    def __len__(self) -> int:
        """Returns n."""
        return len(self.boxes)


def schema(width: int, dtype: str) -> pa.Schema:
    """Returns the columns of the Parquet files: embeddings are fixed-size lists of `width` numbers."""
    number = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            *REGION_COLUMNS,
            ("whole_image", pa.bool_()),
            ("category", pa.string()),  # of a true box; else null
            ("names", pa.list_(pa.string())),  # most probable first; null without a vocabulary
            ("probabilities", pa.list_(pa.float32())),
            ("embedding", pa.list_(number, width)),
        ]
    )


def write_table(path: Path, images: Sequence[ImageFeatures], width: int, dtype: str) -> None:
    """Writes the regions of some images as one Parquet file, atomically.

    Its columns include those that proposals in Parquet have, so the file serves as such too.
    """
    counts = [len(image) for image in images]

    def each(values: Sequence[Any]) -> Array:
        return np.repeat(np.asarray(values), counts)

    def joined(name: str, empty: Array) -> Array:
        return np.concatenate([empty, *(getattr(image, name) for image in images)])

    boxes = joined("boxes", np.zeros((0, 4), np.float32))
    embeddings = joined("embeddings", np.zeros((0, width), dtype))
    ranked = [one for image in images for one in (image.names or repeat(None, len(image)))]
    columns = [
        pa.array(each([image.image_id for image in images]), pa.int64()),
        pa.array([image.file_name for image in images for _ in range(len(image))], pa.string()),
        pa.array(each([image.size[0] for image in images]), pa.int32()),
        pa.array(each([image.size[1] for image in images]), pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4),
        pa.array(joined("scores", np.zeros(0, np.float32))),
        pa.array(joined("whole", np.zeros(0, bool))),
        pa.array([name for image in images for name in image.categories or [None] * len(image)], pa.string()),
        pa.array(
            [None if one is None else [name for name, _ in one] for one in ranked], pa.list_(pa.string())
        ),
        pa.array(
            [None if one is None else [value for _, value in one] for one in ranked], pa.list_(pa.float32())
        ),
        pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), width),
    ]
    table = pa.table(columns, schema=schema(width, dtype))
    texts = ["file_name", "category", "names.list.element"]
    with replacing(path) as temporary:
        # A dictionary of numbers that hardly ever repeat costs time and saves nothing.
        pq.write_table(table, temporary, compression="zstd", use_dictionary=texts)


def write_arrays(path: Path, image: ImageFeatures) -> None:
    """Writes one image as an `.npz` file that needs no pickle, atomically; see `ImageFeatures`."""
    arrays: dict[str, Any] = {
        "image_id": image.image_id,
        "file_name": image.file_name,
        "size": np.asarray(image.size),
        "boxes": image.boxes,
        "scores": image.scores,
        "whole_image": image.whole,
        "embeddings": image.embeddings,
    }
    if image.categories:
        arrays["categories"] = np.asarray([name or "" for name in image.categories])
    if image.names:
        arrays["names"] = np.asarray([[name for name, _ in one] for one in image.names])
        arrays["probabilities"] = np.asarray([[value for _, value in one] for one in image.names], np.float32)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
