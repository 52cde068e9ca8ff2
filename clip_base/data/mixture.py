"""Several weighted sources, combined into one."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from clip_base.data.sources import SOURCES, Pair, Pairs, Source
from clip_base.images.decode import Stored
from clip_base.jobs.config import REQUIRED, build_plugin, option
from clip_base.runtime.errors import InputError


@dataclass
class MixConfig:
    """Which sources, and how often an epoch shows each one's pairs."""

    sources: list[dict[str, Any]] = option(
        REQUIRED, "sources with their options: [{name: coco, captions: …, images: …}, {name: webdataset, …}]"
    )
    weights: list[float] = option([], "how often an epoch shows each source's pairs on average; empty: once")

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("sources is empty; give at least one")
        if self.weights and len(self.weights) != len(self.sources):
            raise InputError(
                f"weights has {len(self.weights)} entries for {len(self.sources)} sources; give one each"
            )
        if any(not 0 <= weight < float("inf") for weight in self.weights) or (
            self.weights and not any(self.weights)
        ):
            raise InputError(f"weights must be finite, not negative and not all 0, found {self.weights}")


class MixSource:
    """Several sources with weights: 0.5 shows half of a source's pairs an epoch, another half the next."""

    def __init__(self, config: MixConfig) -> None:
        self.weights = config.weights or [1.0] * len(config.sources)
        self.sources: list[Source] = [build_plugin(SOURCES, dict(spec)) for spec in config.sources]

    def pairs(self) -> Pairs:
        """Returns the pairs of all sources, one source after the other."""
        return Mixed([source.pairs() for source in self.sources], self.weights)


class Mixed:
    """Pairs of several sources end to end.

    Args:
        parts: each source's pairs.
        weights: for each, how often an epoch shows its pairs on average.

    Attributes:
        weights: [N] float32, one a pair.
    """

    def __init__(self, parts: list[Pairs], weights: list[float]) -> None:
        self.parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        each = [own_weights(part) * weight for part, weight in zip(parts, weights, strict=True)]
        self.weights = torch.cat(each)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


def own_weights(pairs: Pairs) -> Tensor:
    """Returns [N] float32, how often an epoch shows each pair: 1 unless they are a mix."""
    return pairs.weights if isinstance(pairs, Mixed) else torch.ones(len(pairs))


def weights_of(pairs: Pairs) -> Tensor | None:
    """Returns [N] float32, how often an epoch shows each pair, or None where each is shown once."""
    weights = own_weights(pairs)
    return None if bool((weights == 1).all()) else weights


def listed_images(pairs: Pairs) -> list[Stored]:
    """Returns the images of pairs that are listed in memory; those that are read when drawn are left out."""
    parts = pairs.parts if isinstance(pairs, Mixed) else [pairs]
    return [pair.image for part in parts if isinstance(part, list) for pair in part]
