"""The job `search`: an index asked by words, by images, by what they add up to, or for duplicates.

clip-base search my.index "a dog on a beach" minus="a leash" out=found
"""

# D embedding size
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_base.images.decode import decode_stored, normalize
from clip_base.images.folders import IMAGE_SUFFIXES
from clip_base.images.preprocess import square_view
from clip_base.jobs.compute import DeviceOptions
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.search.approximate import Approximate
from clip_base.search.gallery import Thumbnail, write_gallery
from clip_base.search.images import places_of
from clip_base.search.index import Hit, Index
from clip_base.storage.files import is_file
from clip_base.storage.hashing import content_hash
from clip_base.weights.load import find, load_clip

PAGE = "search.html"


@everyday(
    'search photos.index "a red umbrella" out=found',
    input="query minus duplicates",
    output="top_k out",
    model="weights",
    speed="probes device",
)
@dataclass
class SearchConfig(DeviceOptions):
    """Options of `search`."""

    query: list[str] = option(
        REQUIRED,
        "the index, then texts or images; several count together, as what is near to all of them",
        positional=True,
    )
    minus: list[str] = option([], "texts or images that what is found shall be far from")
    duplicates: float = option(0.0, "list pairs of images with at least this cosine instead, in (0, 1]")
    top_k: int = option(20, "images that are found, or pairs that are listed; 0: all pairs")
    probes: int = option(0, "cells of an approximate index that are searched; 0: the exact search")
    weights: str = option("", "the index's model; empty: as it was named when the index was made")
    activation: str = option("", "activation of weights that do not state it")
    out: str = option("", "folder for a page of thumbnails; empty: none")

    def __post_init__(self) -> None:
        if not 0 <= self.duplicates <= 1:
            raise InputError(f"duplicates must be a cosine in (0, 1], found {self.duplicates}")
        if self.top_k < (0 if self.duplicates else 1):
            raise InputError(f"top_k must be at least 1, found {self.top_k}")
        if self.probes < 0 or (self.probes and self.duplicates):
            raise InputError(f"probes must be 0 or more, and 0 for duplicates, found {self.probes}")
        if not self.duplicates and len(self.query) < 2:
            raise InputError('give the index and what to look for, such as my.index "a dog on a beach"')
        if self.duplicates and len(self.query) > 1:
            raise InputError("duplicates= looks at the whole index: give no query")


def search(config: SearchConfig) -> None:
    """Prints the images of an index that are nearest to texts and images, or its duplicates."""
    index = Index.load(config.query[0])
    if not len(index):
        raise InputError(f"{config.query[0]} holds no images")
    if config.duplicates:
        _print_duplicates(config, index)
        return
    if config.probes:
        near = Approximate(index, Path(config.query[0]))
        hits = near.search(query_of(config, index), config.top_k, config.probes)
    else:
        hits = index.search(query_of(config, index), config.top_k)
    for hit in hits:
        print(f"{hit.score:.4f}  {hit.key}")
    if config.out:
        words = " + ".join(config.query[1:]) + "".join(f" - {text}" for text in config.minus)
        page = Path(config.out) / PAGE
        lead = f"{len(hits):,} of {len(index):,} images, by the cosine of {index.model or 'a CLIP'}"
        write_gallery(page, words, lead, [("", thumbnails(hits))])
        print(f"open {page} in a browser")


def query_of(config: SearchConfig, index: Index) -> Tensor:
    """Returns [D], the sum of the queries' unit-length embeddings less those of `minus`.

    Raises:
        InputError: the weights are missing or not the index's, an image cannot be read, or nothing is left.
    """
    path = find(config.weights or index.model)
    index.require_model(content_hash(path), config.query[0])
    model = load_clip(path, config.activation).to(config.pick_device())
    with torch.no_grad(), autocast(config.precision, config.pick_device()):
        query = sum((embed_query(model, text) for text in config.query[1:]), torch.zeros(index.width))
        query = query - sum((embed_query(model, text) for text in config.minus), torch.zeros(index.width))
    if float(query.norm()) < 1e-3:
        raise InputError("what is asked for and minus= are the same: nothing is left to look for")
    return query


def embed_query(model: CLIP, text: str) -> Tensor:
    """Returns [D], unit length, of an image's file, or of a text."""
    if Path(text).suffix.lower() not in IMAGE_SUFFIXES:
        return embed_text(model, text)
    if not is_file(text):
        raise InputError(f"query image {text} does not exist")
    side = model.visual.resolution
    pixels = torch.from_numpy(square_view(decode_stored(text, 2 * side), side))  # [R, R, 3]
    found = model.encode_image(normalize(pixels.permute(2, 0, 1)[None].to(model.logit_scale.device)))[0]
    return F.normalize(found.float(), dim=0).cpu()


def embed_text(model: CLIP, text: str) -> Tensor:
    """Returns [D], unit length, of a text, whatever it looks like."""
    tokens = Tokenizer(model.config.text.context_length)([text], truncate=True)
    found = model.encode_text(tokens.to(model.logit_scale.device))[0]
    return F.normalize(found.float(), dim=0).cpu()


def _print_duplicates(config: SearchConfig, index: Index) -> None:
    pairs = sorted(index.duplicates(config.duplicates), key=lambda pair: -pair[2])
    shown = pairs[: config.top_k] if config.top_k else pairs
    for first, second, score in shown:
        print(f"{score:.4f}  {first}  {second}")
    print(f"{len(pairs):,} pairs of {len(index):,} images have a cosine of at least {config.duplicates:g}")
    if config.out:
        page = Path(config.out) / PAGE
        shots = thumbnails([Hit(key, score) for first, second, score in shown for key in (first, second)])
        sections = [(f"{score:.4f}", shots[2 * row : 2 * row + 2]) for row, (_, _, score) in enumerate(shown)]
        write_gallery(page, "Duplicates", f"pairs of at least {config.duplicates:g}", sections)
        print(f"open {page} in a browser")


def thumbnails(hits: Sequence[Hit]) -> list[Thumbnail]:
    """Returns the images that were found, as a page shows them."""
    places = places_of([hit.key for hit in hits])
    return [Thumbnail(hit.key, f"{hit.score:.3f}", places[hit.key]) for hit in hits]
