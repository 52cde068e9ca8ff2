"""One pass over mined pairs: what is counted of all of them, and a sample that is looked at closely."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clip_base.runtime.progress import track
from regionclip.concepts.phrases import Phrase
from regionclip.data.captions import cleaned
from regionclip.mining.columns import ImageRegions, RegionColumns, read_mined_columns
from regionclip.mining.coverage import Coverage, CoveredImage, cover
from regionclip.mining.shards import MinedImage, MinedRegion

SAMPLE = 20_000  # regions that are looked at closely; of fewer all
BINS = 20


@dataclass
class Survey:
    """What one pass over a mined folder found.

    Attributes:
        histograms: "probability" and "objectness" -> how many regions are in each of BINS equal bins.
        regions: a sample of whole images' regions.
        images: the sample's images by id, those without regions too.
        total: how many regions there are.
    """

    histograms: dict[str, list[int]] = field(
        default_factory=lambda: {"probability": [0] * BINS, "objectness": [0] * BINS}
    )
    regions: list[MinedRegion] = field(default_factory=list)
    images: dict[int, MinedImage] = field(default_factory=dict)
    total: int = 0

    @property
    def is_sampled(self) -> bool:
        """Whether the sample is less than all."""
        return len(self.regions) < self.total

    def count(self, columns: RegionColumns) -> None:
        """Counts a batch of regions."""
        self.total += len(columns)
        for what, values in (("probability", columns.first_probs), ("objectness", columns.objectness)):
            bins = np.clip((values * BINS).astype(np.int64), 0, BINS - 1)
            counts = np.bincount(bins, minlength=BINS) + self.histograms[what]
            self.histograms[what] = counts.tolist()

    def sample(self, image: MinedImage, regions: ImageRegions, share: float) -> None:
        """Keeps an image's regions when it is among the share of images that is sampled."""
        if share >= 1 or _place(image.file_name) < share:
            self.regions += regions.regions()
            self.images[image.image_id] = image


def survey(
    mined: str | Path,
    count: int,
    pool: Sequence[str],
    rows: dict[str, int],
    parse: Callable[[Iterable[str]], Iterable[list[Phrase]]],
    stop_words: Collection[str],
) -> tuple[Survey, Coverage]:
    """Reads a mined folder once, a block at a time.

    Args:
        mined: the folder.
        count: its regions, as the manifest says.
        pool: see `cover`, as are `rows`, `parse` and `stop_words`.
    """
    found = Survey()
    share = SAMPLE / max(count, 1)

    def images() -> Iterator[CoveredImage]:
        mined_images = read_mined_columns(mined, found.count)
        for image, regions in track(mined_images, "reading mined images"):
            found.sample(image, regions, share)
            captions = [text for text in map(cleaned, image.captions) if text]  # as `mine` parsed them
            yield CoveredImage(captions, regions.named())

    return found, cover(images(), pool, rows, parse, stop_words)


def _place(name: str) -> float:
    """Returns a number in [0, 1) that depends on an image's name alone."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
