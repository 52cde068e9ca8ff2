"""Search by words in an index of images, for a tab of the demo page."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_base.images.decode import as_rgb, decode_stored
from clip_base.images.orientation import turned_upright
from clip_base.runtime.errors import InputError
from clip_base.search.find import embed_text
from clip_base.search.images import places_of
from clip_base.search.index import Index
from clip_base.storage.hashing import content_hash
from clip_base.weights.load import find, load_clip

SIDE = 480  # pixels of a found image's longer side
MOST = 100
MAX_LETTERS = 300


class ImageSearch:
    """Finds images of an index by words; only these images are ever shown.

    Args:
        path: the folder that `clip-base index` wrote.
        device: where texts are embedded.

    Raises:
        InputError: no index, an empty one, or its model is not there or has changed.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.index = Index.load(path)
        if not len(self.index):
            raise InputError(f"index {path} holds no images")
        weights = find(self.index.model)
        self.index.require_model(content_hash(weights), path)
        self._model = load_clip(weights).to(device)
        self._lock = threading.Lock()
        self._embed = lru_cache(256)(self._embed_text)

    def __call__(self, text: str, count: int) -> list[tuple[Image.Image, str]]:
        """Returns the images that are nearest to a text, with their scores and file names.

        What is typed is always a text: no file of that name is read.

        Raises:
            InputError: no text, or a very long one.
        """
        words = " ".join(text.split())
        if not words or len(words) > MAX_LETTERS:
            raise InputError(f"type what to find, in up to {MAX_LETTERS} letters")
        with self._lock:
            query = self._embed(words)
        hits = self.index.search(query, max(1, min(count, MOST)))
        places = places_of([hit.key for hit in hits])
        found = []
        for hit in hits:
            place = places[hit.key]
            try:
                decoded = decode_stored(place, least=SIDE)
            except InputError:  # it has gone since it was indexed
                continue
            if isinstance(place, Path):
                decoded = turned_upright(decoded, place)
            image = Image.fromarray(as_rgb(decoded))
            image.thumbnail((SIDE, SIDE))
            found.append((image, f"{hit.score:.3f}  {Path(hit.key).name}"))
        return found

    @torch.no_grad()
    def _embed_text(self, words: str) -> Tensor:
        return embed_text(self._model, words)
