"""The matcher `hybrid`: captions first; unmatched regions are matched with the whole pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_base.jobs.config import option
from regionclip.mining.matchers.base import Matches, MatchInputs
from regionclip.mining.matchers.caption import CaptionConfig, CaptionMatcher
from regionclip.mining.matchers.pool import PoolConfig, PoolMatcher


@dataclass
class HybridConfig(CaptionConfig):
    """Options of both matchers."""

    min_pool_probability: float = option(
        0.5, "unmatched regions whose best concept in the pool is less probable are dropped"
    )


class HybridMatcher:
    """The caption matcher, then the pool matcher for the regions it left over."""

    def __init__(self, config: HybridConfig, names: Sequence[str]) -> None:
        self.caption = CaptionMatcher(config, names)
        pool = PoolConfig(
            config.min_pool_probability, config.min_objectness, keep_all_if_none=False, k=config.k
        )
        self.pool = PoolMatcher(pool, names)

    def __call__(self, inputs: MatchInputs) -> Matches:
        """Returns the caption's matches, and the pool's for other regions, in the regions' order."""
        first, second = self.caption(inputs), self.pool(inputs)
        left = ~torch.isin(second.indices, first.indices)
        width = max(first.concept_ids.shape[1], second.concept_ids.shape[1])
        kept = torch.cat([first.indices, second.indices[left]])
        ids = torch.cat([_widen(first.concept_ids, width), _widen(second.concept_ids[left], width)])
        probs = torch.cat([_widen(first.concept_probs, width), _widen(second.concept_probs[left], width)])
        own = torch.cat([first.from_caption, second.from_caption[left]])
        order = kept.argsort()
        return Matches(kept[order], ids[order], probs[order], own[order])


def _widen(rows: Tensor, width: int) -> Tensor:
    """Pads [m, k] to [m, width] with zeros: concept 0 with probability 0 says nothing."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
