"""A page of thumbnails that opens from disk and loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_base.images.decode import as_rgb, decode_stored
from clip_base.images.html import data_uri, page_environment
from clip_base.images.orientation import turned_upright
from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_text
from clip_base.storage.tars import Member

SIDE = 220  # pixels of a thumbnail's longer side


@dataclass(frozen=True)
class Thumbnail:
    """An image on a page.

    Attributes:
        name: what is written below it.
        note: a second line.
        image: the file, or its place in a tar.
    """

    name: str
    note: str
    image: Path | Member

    @property
    def address(self) -> str:
        """The link to the whole image; "" for one in a tar."""
        return self.image.absolute().as_uri() if isinstance(self.image, Path) else ""

    @property
    def source(self) -> str:
        """The example itself, as a `data:` address; "" when it cannot be read."""
        try:
            decoded = decode_stored(self.image, least=SIDE)
        except InputError:
            return ""
        example = Image.fromarray(as_rgb(turned_upright(decoded, self.image)))
        example.thumbnail((SIDE, SIDE))
        return data_uri(example)


def write_gallery(
    path: Path, title: str, lead: str, sections: Sequence[tuple[str, Sequence[Thumbnail]]]
) -> None:
    """Writes a page.

    Args:
        path: the HTML file.
        title: its headline.
        lead: the sentence below it.
        sections: headings, each with its images; a heading may be empty.
    """
    page = (
        page_environment("clip_base.search")
        .get_template("gallery.html")
        .render(title=title, lead=lead, sections=sections)
    )
    write_text(path, page + "\n")
