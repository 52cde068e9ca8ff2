"""Search by words in an index of images, for a tab of the demo page."""

from __future__ import annotations

import hashlib
import html
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_base.images.decode import as_rgb, decode_stored
from clip_base.images.html import data_uri
from clip_base.images.orientation import turned_upright
from clip_base.runtime.errors import InputError
from clip_base.search.find import embed_text
from clip_base.search.images import places_of
from clip_base.search.index import Index
from clip_base.storage.hashing import content_hash
from clip_base.storage.tars import Member
from clip_base.weights.load import find, load_clip

SIDE = 480  # pixels of a found image's longer side
MOST = 100
MAX_LETTERS = 300
FULL = "/api/found"  # where a found image is shown at its own size
JPEG_SIDE = 65_500  # pixels that a JPEG can be wide and high
MAX_LINKS = 10_000  # found images whose links still lead somewhere


@dataclass(frozen=True)
class SearchResult:
    """An image that was found.

    Attributes:
        image: at most `SIDE` pixels long, upright.
        score: cosine of the image and the text.
        name: its file name.
        link: the last part of the address below `FULL` at which it is shown at its own size.
    """

    image: Image.Image
    score: float
    name: str
    link: str


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
        self._shown: OrderedDict[str, str] = OrderedDict()  # links and the keys of their images, oldest first
        self._embed = lru_cache(256)(self._embed_text)

    def __call__(self, text: str, count: int) -> list[SearchResult]:
        """Returns the images that are nearest to a text; those that have gone since are left out.

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
            try:
                image = _upright(places[hit.key], SIDE)
            except InputError:  # it has gone since it was indexed
                continue
            image.thumbnail((SIDE, SIDE))
            name = Path(hit.key).name.encode(errors="replace").decode()
            found.append(SearchResult(image, hit.score, name, self._link(hit.key)))
        return found

    def full(self, link: str) -> bytes:
        """Returns a found image at its own size, as a JPEG: upright, without what else its file says.

        Raises:
            KeyError: no such image was found, or so many were since that this one is forgotten.
            InputError: it cannot be read any more.
        """
        with self._lock:
            key = self._shown[link]
        image, file = _upright(places_of([key])[key]), io.BytesIO()
        image.thumbnail((JPEG_SIDE, JPEG_SIDE))
        image.save(file, "JPEG", quality=92)
        return file.getvalue()

    def _link(self, key: str) -> str:
        link = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
        with self._lock:
            self._shown[link] = key
            self._shown.move_to_end(link)
            if len(self._shown) > MAX_LINKS:
                self._shown.popitem(last=False)
        return link

    @torch.no_grad()
    def _embed_text(self, words: str) -> Tensor:
        return embed_text(self._model, words)


def _upright(place: Path | Member, least: int = 0) -> Image.Image:
    return Image.fromarray(as_rgb(turned_upright(decode_stored(place, least), place)))


def as_html(found: Sequence[SearchResult]) -> str:
    """Returns the found images as HTML: thumbnails that lead to the images at their own size."""
    figures = (
        f'<figure><a href="{FULL[1:]}/{one.link}" target="_blank" rel="noopener">'
        f'<img src="{data_uri(one.image)}" alt="{html.escape(one.name)}"></a>'
        f"<figcaption>{one.score:.3f} <span>{html.escape(one.name)}</span></figcaption></figure>"
        for one in found
    )
    return f'<div class="found">{"".join(figures)}</div>'
